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
from running import Cli

from loratune import console, events
from loratune.cli import terminal
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


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: events.progress("wait\x1bing"), "wait\\x1bing: 0 s"),
        (lambda: events.counting("counting", 3), "counting: 2 of 3, left 0 s"),
        (lambda: events.reading("reading", 4_000_000), "reading: 0 of 4 MB, 0.0 MB/s"),
    ],
    ids=["progress", "count", "bytes"],
)
def test_slow_work_prints_a_line_and_later_another(
    work: Callable[[], object], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.1)
    monkeypatch.setattr(terminal, "_PAUSE", 0.2)
    monkeypatch.setattr(events, "_INTERVAL", 0.0)
    with events.listening(Terminal()), work() as advance:  # type: ignore[attr-defined]
        advance(2)
        time.sleep(0.4)
    ran = capsys.readouterr()
    assert ran.out == "" and ran.err.splitlines() == [expected] * 2


def test_a_task_is_not_shown_while_one_within_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would say how long the same work takes."""
    monkeypatch.setattr(terminal, "PATIENCE", 1.0)
    monkeypatch.setattr(terminal, "_PAUSE", 0.1)

    def shown(what: str) -> str:
        told = ""
        while f"{what}: " not in told:
            time.sleep(0.05)
            told += capsys.readouterr().err
        return told

    with events.listening(Terminal()), events.progress("outside"):
        with events.counting("inside", 3):
            told = shown("inside")
        assert "outside" not in told
        shown("outside")


def test_lines_between_reports_have_no_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be that of an earlier step, and so would be the learning rate."""
    monkeypatch.setattr(terminal, "_PAUSE", -1.0)
    with events.listening(Terminal()):
        events.emit(events.TrainingEvent(4, 0))
        events.emit(events.StepEvent(1, 4, 10, 0.5, 1e-3, {"reward_margin": 2.0}))
        events.emit(events.StepEvent(2, 4, 20))
        events.emit(events.TrainingEvent(4, 2, finished=True))
    first, second = (line.replace(",", "") for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"step +1/4  loss 0\.5000  lr 1\.00e-03  \d+ tokens/s  reward margin 2\.000  left .+", first)
    assert re.fullmatch(r"step +2/4  \d+ tokens/s  left .+", second)


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
        assert shown.splitlines() == ["outside: 0 s", "inside: 0 of 2", "a line beside it"]
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
    assert capsys.readouterr().err == "working: 0 s\n" * 2


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
             "trying batches on the base", "estimating the memory", "writing, in tokens of each text",
             "taking the first step",
             "computing losses, in batches"],
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
    said = {line.rpartition(": ")[0] for line in ran.err.splitlines()}
    assert [stage for stage in stages if stage not in said] == []
    if "--json" in command:
        json.loads(ran.out)
    assert not any(stage in ran.out for stage in stages)
