"""Whether more rows would help: `sweep --rows` on nested parts of the training rows, and `data.max_train_samples`."""

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import check_refused, config_in, write_rows
from fork_server import ForkServer
from running import WEIGHTS, Cli, MakeConfig, before_batch, until
from test_preferences import config as preference_config

from loratune import data
from loratune.codes import Code
from loratune.compare.metrics import RowLosses
from loratune.config import DataSection
from loratune.report.study import BEST, DONE, WORSE, RowsCurve, StudyResults
from loratune.study.sweep import Study

LABELS = {"a": " b", "c": " d", "e": " f", "g": " h"}
"""Letter of a prompt → its label."""
LETTERS = "aaaacccgge"
PARTS = ("--rows", "1/4,1/2,1")
AUTO: dict[str, Any] = {
    "data": {"validation": 0.2},
    "training": {"learning_rate": "auto", "num_train_epochs": "auto", "per_device_train_batch_size": 2},
}
"""All rows are read twice, at one rate; a quarter of them alone would be read four times, at half of it."""


def labelled(count: int) -> list[dict[str, str]]:
    letters = [LETTERS[number % len(LETTERS)] for number in range(count)]
    return [{"prompt": f"{number} {one}", "completion": LABELS[one]} for number, one in enumerate(letters)]


def used(file: Path, rows: list[dict[str, str]], count: int | None, seed: int = 0, **section: Any) -> list[int]:
    """The numbers of the training rows that are used."""
    values = {"train": str(write_rows(file, rows)), "max_train_samples": count} | section
    split = data.read_datasets(DataSection.model_validate(values), seed).train
    return [int(example.where.split(":")[-1]) - 1 for example in split.examples()]


def results(folder: Path) -> StudyResults:
    found = StudyResults.read(folder / "out.study")
    assert found is not None
    return found


def curve(folder: Path) -> RowsCurve:
    found = results(folder).curve
    assert found is not None
    return found


# data.max_train_samples


@pytest.mark.parametrize("validation", [None, 0.2])
def test_fewer_rows_are_a_part_of_more_with_the_same_shares_of_labels(tmp_path: Path, validation: float | None) -> None:
    rows = labelled(200)
    taken = {
        count: used(tmp_path / "rows.jsonl", rows, count, validation=validation)
        for count in (10, 25, 40, 80, 150, 1000, None)
    }
    everything = taken[None]
    assert len(everything) == (200 if validation is None else 160) and taken[1000] == everything
    shares = Counter(rows[number]["completion"] for number in everything)
    for fewer, more in ((10, 25), (25, 40), (40, 80), (80, 150), (150, None)):
        assert {*taken[fewer]} < {*taken[more]} and len(taken[fewer]) == fewer
        counts = Counter(rows[number]["completion"] for number in taken[fewer])
        assert all(abs(counts[one] - fewer * count / len(everything)) < 1.01 for one, count in shares.items())
    assert used(tmp_path / "rows.jsonl", rows, 40, seed=1, validation=validation) != taken[40]


def test_texts_and_answers_without_labels_are_drawn_at_random(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(100)]
    few, more = (used(tmp_path / "rows.jsonl", rows, count) for count in (20, 60))
    assert {*few} < {*more} and few == sorted(few) and few != [*range(20)]


def test_held_out_rows_do_not_depend_on_how_many_are_used(tmp_path: Path, cli: Cli, run_config: MakeConfig) -> None:
    path = run_config(data={"validation": 0.2}, training={"max_steps": 2})
    write_rows(tmp_path / "rows.jsonl", labelled(60))
    found = []
    for count in ("100", "24"):
        out = tmp_path / f"out-{count}"
        ran = cli("train", path, "--set", f"data.max_train_samples={count}", "--set", f"output_dir={out}", "-v")
        assert ran.code == 0, ran.err
        assert ("max_train_samples is 100, and there are only 48 training rows" in ran.err) == (count == "100")
        found.append(json.loads((out / "loratune.json").read_text())["fingerprints"])
    assert "24 of 48 rows are used (data.max_train_samples), stratified by 4 labels" in ran.out + ran.err
    assert found[0]["validation"] == found[1]["validation"] and found[0]["data"] != found[1]["data"]


# A sweep over parts of the rows


@pytest.fixture(scope="module")
def swept(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a sweep over parts of 80 training rows. Its stdout is in `said`, its stderr in `log`."""
    folder = tmp_path_factory.mktemp("more")
    path = config_in(folder, tiny_dir)(**AUTO)
    write_rows(folder / "rows.jsonl", labelled(100))
    child = processes.start("sweep", path, *PARTS)
    assert child.wait() == 0, child.said()
    (folder / "said").write_text(child.out.read_text())
    (folder / "log").write_text(child.said())
    return folder


def test_all_rows_come_first_and_decide_the_settings_of_their_parts(swept: Path) -> None:
    log = re.findall(r"^trial \d: data.max_train_samples=(\d+)$", (swept / "log").read_text(), flags=re.MULTILINE)
    assert log == ["80", "40", "20"]
    records = Study(swept / "out.study", "out", None, seed=0).records()
    decided = [one.result["decided"] for one in records]
    assert decided[0] == decided[1] == decided[2] and decided[0]["training.num_train_epochs"] == 2
    assert [one.result["steps"] for one in records] == [80, 40, 20]
    assert all(
        (swept / "out.study" / "trials" / f"{trial.number:04}").exists() == (trial.verdict != WORSE)
        for trial in results(swept).trials
    )


def test_published_adapter_is_that_of_all_rows(swept: Path, forked: Cli, tmp_path: Path) -> None:
    ran = forked("train", swept / "run.yaml", "--set", f"output_dir={tmp_path / 'out'}")
    assert ran.code == 0, ran.err
    assert (swept / "out" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    found = results(swept)
    assert found.published == str(swept / "out") and found.trials[0].verdict == BEST and found.winner is not None


def test_curve_is_printed_and_in_the_json(swept: Path, forked: Cli, cli: Cli, tmp_path: Path) -> None:
    said, found = (swept / "said").read_text(), curve(swept)
    assert found.metric == "exact_match" and [point.rows for point in found.points] == [20, 40, 80]
    assert found.gained_from == 40 and found.gain is not None and found.gain_interval is not None
    assert found.gain == pytest.approx(found.points[2].value - found.points[1].value)
    assert found.gain_interval[0] <= found.gain <= found.gain_interval[1]
    assert "rows" in said and found.sentence("20 held-out rows") in " ".join(said.split())
    assert "training rows" in said and "right answers" in said and "compared with all rows" in said
    assert "higher ones may be better" not in said
    ran = forked("sweep", swept / "run.yaml", *PARTS, "--overwrite", "--json")
    assert ran.code == 0 and "trial 0:" not in ran.err, ran.err
    values = json.loads(ran.out)
    assert values["curve"]["gain"] == found.gain and values["winner"] == found.points[-1].trial
    page = tmp_path / "page.html"
    assert cli("report", "--adapter", swept / "out", "--output", page).code == 0
    assert "Right held-out answers by training rows" in page.read_text()


def test_interrupted_sweep_continues_with_the_decided_settings(
    processes: ForkServer, forked: Cli, tmp_path: Path, tiny_dir: Path, swept: Path
) -> None:
    """In the second trial, after all rows have decided; and a smaller part is added."""
    path = config_in(tmp_path, tiny_dir)(**AUTO | {"training": AUTO["training"] | {"save_steps": 3}})
    write_rows(tmp_path / "rows.jsonl", labelled(100))
    child = processes.start("sweep", path, "--rows", "1/2,1")
    checkpoints = tmp_path / "out.study" / "trials" / "0001" / "out.partial" / "checkpoints"
    until(lambda: [*checkpoints.glob("*/manifest.json")], child)
    child.send(signal.SIGINT)
    assert child.wait() == 130 and not (tmp_path / "out").exists(), child.said()
    assert "no smaller part has an adapter to compare with" in child.out.read_text()
    ran = forked("sweep", path, *PARTS)
    assert ran.code == 0 and "trial 0:" not in ran.err and ("continuing" in ran.err or "resum" in ran.err), ran.err
    assert [trial.state for trial in results(tmp_path).trials] == [DONE] * 3
    assert [point.value for point in curve(tmp_path).points] == [point.value for point in curve(swept).points]
    other = forked("sweep", path, "--grid", "data.max_train_samples=40,80", "--overwrite")
    check_refused(other, 2, (Code.SWEEP_STUDY, str(tmp_path / "out.study"), ""))


def test_no_part_is_tried_while_another_process_trains_on_all_rows(
    processes: ForkServer, tmp_path: Path, tiny_dir: Path
) -> None:
    path = config_in(tmp_path, tiny_dir)(**AUTO | {"training": AUTO["training"] | {"save_steps": 3}})
    write_rows(tmp_path / "rows.jsonl", labelled(100))
    first = processes.start("sweep", path, *PARTS, first=before_batch(9, "os.kill(os.getpid(), signal.SIGSTOP)"))
    until(lambda: [*(tmp_path / "out.study").glob("trials/0000/out.partial/checkpoints/*/manifest.json")], first)
    second = processes.start("sweep", path, *PARTS)
    assert second.wait() == 0 and "trial 1:" not in second.said(), second.said()
    assert "1 trial run elsewhere" in second.out.read_text() and not (tmp_path / "out").exists()
    first.send(signal.SIGCONT)
    assert first.wait() == 0 and len(curve(tmp_path).points) == 3, first.said()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_are_compared_by_their_loss(
    objective: str, forked: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    sections = {"data": {"validation": 0.25}} if objective == "kto" else {}
    path = preference_config(run_config, tmp_path, objective, **sections)
    ran = forked("sweep", path, "--rows", "0.5,1", "--set", "training.per_device_train_batch_size=2")
    assert ran.code == 0, ran.err
    found = curve(tmp_path)
    assert found.metric == "loss" and len(found.points) == 2 and "in the held-out loss" in ran.out


def test_blocks_of_texts_are_compared_by_their_loss(forked: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    path = run_config(data={"validation": 0.25, "max_length": 16}, training={"max_steps": 3})
    texts = [
        {"text": " ".join(f"{number} and {other} make {number + other}." for other in range(9))} for number in range(16)
    ]
    write_rows(tmp_path / "rows.jsonl", texts)
    ran = forked("sweep", path, "--rows", "1/2,1")
    assert ran.code == 0 and curve(tmp_path).metric == "loss", ran.err


REFUSED: dict[str, tuple[tuple[str, ...], tuple[Code, str, str], str]] = {
    "division by zero": (("--rows", "1/0,1"), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "more than all": (("--rows", "1,2"), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "none": (("--rows", "0,1"), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "words": (("--rows", "half,all"), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "nothing": (("--rows", ""), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "an enormous exponent": (("--rows", "1e-999999999,1"), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "without all rows": (("--rows", "1/4,1/2"), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "all rows alone": (("--rows", "1"), (Code.USAGE_BAD_VALUE, "", "--rows"), "1/4,1/2,1"),
    "too few rows": (("--rows", "1/8,1"), (Code.USAGE_BAD_VALUE, "", "--rows"), "is 4, fewer"),
    "the same rows twice": (("--rows", "1/2,0.51,1"), (Code.USAGE_BAD_VALUE, "", "--rows"), "as many as another"),
    "a grid": ((*PARTS, "--grid", "data.max_train_samples=8,16"), (Code.USAGE_CONFLICT, "", "--grid"), "--rows"),
    "a number of trials": ((*PARTS, "--trials", "2"), (Code.USAGE_CONFLICT, "", "--trials"), "--rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_reported_before_the_first_trial(
    name: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    arguments, problem, words = REFUSED[name]
    ran = cli("sweep", run_config(data={"validation": 0.2}), *arguments)
    check_refused(ran, 2, problem)
    assert words in ran.errors[0] and not (tmp_path / "out.study").exists()


def test_held_out_rows_are_required(cli: Cli, run_config: MakeConfig) -> None:
    path = run_config()
    check_refused(cli("sweep", path, *PARTS), 2, (Code.CONFIG_MISSING_KEY, str(path), "data.validation"))


# The sentence

ONES = np.ones(100)


def found(right: tuple[int, ...], counts: tuple[int, ...], more: tuple[float, ...] = (0, 0, 0)) -> str:
    """The sentence on trials with so many training rows, each with so many right answers of 100: the first ones. more:
    how much more loss each has."""
    answers = {number: (np.arange(100) < count).astype(float) for number, count in enumerate(right)}
    losses = {number: RowLosses(2 - one + more[number], ONES, ONES) for number, one in answers.items()}
    return RowsCurve.of(dict(enumerate(counts)), losses, answers).sentence("100 held-out rows")


def test_sentence_says_what_the_last_doubling_gained() -> None:
    assert re.fullmatch(
        r"doubling from 200 to 400 rows gained 10\.0 points of right answers \[\d+\.\d, \d+\.\d\]; more rows are "
        "likely to help",
        found((80, 70, 50), (400, 200, 100)),
    )
    assert re.fullmatch(
        r"doubling from 200 to 401 rows gained 1\.0 points of right answers \[-\d\.\d, \d\.\d\]: a gain is not to be "
        r"seen on 100 held-out rows; about [\d,]+ would tell",
        found((71, 70), (401, 200)),
    )
    assert found((60, 70), (400, 200)).endswith("; more rows did not help")
    assert found((70, 70), (400, 200)).endswith("a gain is not to be seen on 100 held-out rows")
    only = found((70, 70), (400, 200), (0, 0.5))
    assert only.endswith("on 100 held-out rows, a gain is to be seen only in the loss, so more rows may help")
    assert found((80, 70), (400, 300)).startswith("going from 300 to 400 rows gained")
    assert found((80, 70, 60), (400, 300, 210)).startswith("going from 210 to 400 rows gained 20.0")
    assert "no smaller part has an adapter to compare with" in found((80,), (400,))


def test_sentence_on_losses() -> None:
    noise = np.random.default_rng(0).random(100)
    losses = {0: RowLosses(3 + noise, ONES, ONES), 1: RowLosses(3.5 + 1.1 * noise, ONES, ONES)}
    curve = RowsCurve.of({0: 400, 1: 200}, losses, None)
    text = curve.sentence("100 held-out rows")
    assert re.fullmatch(
        r"doubling from 200 to 400 rows gained 0\.5\d+ in the held-out loss \[0\.5\d+, 0\.5\d+\]; more rows are likely "
        "to help",
        text,
    )
    few = {number: one.take(range(2)) for number, one in losses.items()}
    assert RowsCurve.of({0: 400, 1: 200}, few, None).sentence("2 held-out rows").endswith("are too few to tell")
