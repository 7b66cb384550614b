"""Progress: work that takes longer than two seconds has a line on stderr in every command; quick work has none."""

import io
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import config_in, write_rows
from running import Cli, MakeConfig

from loratune import console, events
from loratune.cli import display, terminal
from loratune.cli.terminal import Terminal

ROWS = [{"prompt": f"{number}:", "completion": f" {number}"} for number in range(8)]


class Screen(io.StringIO):
    """Records what is printed, as a terminal would."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)


def test_quick_work_is_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.5)
    with events.listening(Terminal()), events.progress("waiting"), events.reading("reading", 100) as advance:
        advance(100)
    assert capsys.readouterr() == ("", "")


def said_until(capsys: pytest.CaptureFixture[str], is_enough: Callable[[str], bool], seconds: float = 60) -> str:
    """What is printed on stderr from now on until it is enough, and nothing on stdout."""
    said, end = "", time.monotonic() + seconds
    while not is_enough(said):
        assert time.monotonic() < end, said
        time.sleep(0.01)
        out, err = capsys.readouterr()
        said += err
        assert out == ""
    return said


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: events.progress("wait\x1bing"), ["wait\\x1bing", "wait\\x1bing: 0 s so far"]),
        (lambda: events.counting("counting", 3), ["counting: 2 of 3, left 0 s"] * 2),
        (lambda: events.reading("reading", 4_000_000), ["reading: 0 of 4 MB, 0.0 MB/s"] * 2),
    ],
    ids=["progress", "count", "bytes"],
)
def test_slow_work_prints_a_line_and_later_another(
    work: Callable[[], object], expected: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.1)
    monkeypatch.setattr(terminal, "_PAUSE", 0.2)
    monkeypatch.setattr(events, "_INTERVAL", 0.0)
    with events.listening(Terminal()), work() as advance:  # type: ignore[attr-defined]
        advance(2)
        said = said_until(capsys, lambda said: said.count("\n") == 2)
    assert said.splitlines() == expected and capsys.readouterr() == ("", "")


def test_a_task_is_not_shown_while_one_within_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would say how long the same work takes."""
    monkeypatch.setattr(terminal, "PATIENCE", 1.0)
    monkeypatch.setattr(terminal, "_PAUSE", 0.1)

    with events.listening(Terminal()), events.progress("outside"):
        with events.counting("inside", 3):
            told = said_until(capsys, lambda said: "inside" in said)
        assert "outside" not in told
        said_until(capsys, lambda said: "outside" in said)


def test_quick_evaluations_have_no_lines_between_those_of_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    with events.listening(Terminal()):
        events.emit(events.TrainingEvent(2, 0))
        events.emit(events.StepEvent(1, 2, 10, 0.5, 1e-3))
        with events.counting("scoring rows", 1):
            time.sleep(0.2)
        events.emit(events.TrainingEvent(2, 2, finished=True))
        assert "scoring" not in capsys.readouterr().err
        with events.counting("scoring rows", 1):
            said = said_until(capsys, bool)
    assert said + capsys.readouterr().err == "scoring rows\n"


def test_lines_between_reports_have_no_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be that of an earlier step, and so would be the learning rate."""
    monkeypatch.setattr(terminal, "_PAUSE", -1.0)
    with events.listening(Terminal(verbose=True)):
        events.emit(events.TrainingEvent(4, 0))
        events.emit(events.StepEvent(1, 4, 10, 0.5, 1e-3, {"reward_margin": 2.0}))
        events.emit(events.StepEvent(2, 4, 20))
        events.emit(events.TrainingEvent(4, 2, finished=True))
    first, second = (line.replace(",", "") for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"step +1/4  loss 0\.5000  lr 1\.00e-03  \d+ tokens/s  reward margin 2\.000  left .+", first)
    assert re.fullmatch(r"step +2/4  \d+ tokens/s  left .+", second)


def test_few_lines_report_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """One at the end, as no half minute passes."""
    with events.listening(Terminal()):
        events.emit(events.TrainingEvent(4, 0))
        for step in range(1, 5):
            events.emit(events.StepEvent(step, 4, 10 * step, 0.5 / step, 1e-3))
            events.emit(events.EvaluationEvent(step, 4, 0.25 / step))
        events.emit(events.TrainingEvent(4, 4, finished=True))
    assert capsys.readouterr().err.splitlines()[-1] == "training: step 4 of 4  loss 0.125  held out 0.0625  0 s left"


def test_the_plan_is_a_few_short_lines(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    monkeypatch.delenv("LORATUNE_VERBOSE")
    ran = cli("train", run_config(data={"validation": 0.2}, training={"num_train_epochs": "auto"}))
    assert ran.code == 0, ran.err
    lines = ran.err.splitlines()
    plan = lines[: next(number for number, line in enumerate(lines) if line.startswith("time ")) + 1]
    assert len(plan) <= 15 and max(map(len, plan)) <= 100, plan
    assert [line.split()[0] for line in plan if line[0] not in " !"][-4:] == ["rows", "example", "plan", "time"]
    assert "LoRA r 8 on " in ran.err and " held out" in ran.err and "auto: " not in ran.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  sure?    only a few rows, so optimistic", ["  sure?    only a few rows, so", "           optimistic"]),
        ("a word and-another-one and more words", ["a word and-another-one and", "more words"]),
        ("  try it   loratune generate --adapter out 'hello'", ["  try it   loratune generate --adapter out 'hello'"]),
        ("         rows  duplicates  dropped", ["         rows  duplicates  dropped"]),
        ("short", ["short"]),
    ],
)
def test_long_lines_are_wrapped_between_words(line: str, expected: list[str]) -> None:
    assert console.wrapped(line, 30) == expected


@pytest.mark.parametrize(("line", "colour"), [
    ("✓ beats its base", "green"), ("✗ worse", "red"), ("? cannot tell", "yellow"), ("         ! 4 labels", "yellow"),
    ("error[data.format]: rows", "red"), ("errors are", None), ("  kept  what the base could do?", None),
])  # fmt: skip
def test_the_mark_of_a_line_is_coloured(line: str, colour: str | None) -> None:
    """And nothing else: a line reads the same without colours."""
    found = console.coloured(line)
    assert found.plain == line and [str(span.style) for span in found.spans] == ([f"bold {colour}"] if colour else [])


def test_a_table_is_stacked_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    header = ["", "base", "adapter"]
    rows = [["  loss", "6.5 [6.3, 6.6]", "0.1 [0.0, 0.2]"], ["  exact match", "0 %", "91 %"]]
    assert [*display._table(header, rows)][1].split() == ["loss", "6.5", "[6.3,", "6.6]", "0.1", "[0.0,", "0.2]"]
    monkeypatch.setattr(display, "columns", lambda: 30)
    assert [*display._table(header, rows)] == [
        "loss", "  base     6.5 [6.3, 6.6]", "  adapter  0.1 [0.0, 0.2]",
        "exact match", "  base     0 %", "  adapter  91 %",
    ]  # fmt: skip


@pytest.mark.parametrize("interactive", [True, False])
def test_terminal_progress_line_is_erased(impatient: None, monkeypatch: pytest.MonkeyPatch, interactive: bool) -> None:
    """Also for nested progress. Where lines cannot be erased, plain ones are printed."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(console.err, "is_interactive", interactive)  # rich checks this when it is imported
    monkeypatch.setenv("TERM", "xterm" if interactive else "dumb")
    with events.listening(Terminal()), events.progress("outside"):
        time.sleep(0.2)
        with events.counting("inside", 2) as advance:
            time.sleep(0.7)
            advance(1)
        events.note("a line beside it")
    shown = screen.getvalue()
    if not interactive:
        assert shown.splitlines() == ["outside", "inside", "a line beside it"]
    else:
        assert "outside" in shown and "inside" in shown and "a line beside it" in shown
        assert shown.endswith("\r\x1b[1A\x1b[2K")  # erases the line


def test_error_ends_the_progress_line(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    @events.progress("working")
    def work() -> None:
        time.sleep(0.1)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), events.listening(Terminal()):
            work()
    assert capsys.readouterr().err == "working\n" * 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Cli) -> Path:
    """A folder with an adapter and rows."""
    folder = tmp_path_factory.mktemp("progress")
    write_rows(folder / "rows.jsonl", ROWS)
    data = {"train": str(folder / "rows.jsonl"), "validation": 0.5}
    assert cli("train", config_in(folder, tiny_dir)(data=data, training={"max_steps": 1})).code == 0
    return folder


BASE = ["loading the base", "hashing the base", "attaching the adapter"]


@pytest.mark.parametrize(
    ("command", "stages"),
    [
        (
            "train {place}/run.yaml --set output_dir={out} --set retention.kl_weight=1 --json",
            ["loading the base", "checking the weights of the base", "hashing the base", "attaching LoRA",
             "trying batches on the base", "estimating the memory", "writing answers",
             "taking the first step",
             "scoring rows"],
        ),
        ("params {place}/run.yaml --json", ["attaching LoRA", "estimating the memory"]),
        (
            "evaluate --adapter {place}/out --data {place}/rows.jsonl --json",
            [*BASE, "scoring base", "scoring adapter"],
        ),
        ("generate --adapter {place}/out --input {place}/rows.jsonl --max-new-tokens 2", [*BASE, "answering"]),
        (
            "merge --adapter {place}/out --output {out} --json",
            ["hashing the base", "merging", "comparing the merged model"],
        ),
        ("report --adapter {place}/out --output {out}", ["drawing the page"]),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_every_command_reports_its_slow_stages(
    impatient: None, cli: Cli, place: Path, tmp_path: Path, command: str, stages: list[str]
) -> None:
    """Each stage has its own line on stderr. stdout contains only the output for programs."""
    ran = cli(*command.format(place=place, out=tmp_path / "new").split())
    assert ran.code == 0, ran.err
    said = {line.partition(": ")[0] for line in ran.err.splitlines()}
    assert [stage for stage in stages if stage not in said] == []
    if "--json" in command:
        json.loads(ran.out)
    assert not any(stage in ran.out for stage in stages)
