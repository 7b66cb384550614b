"""The study of a sweep: foreign files are left alone, no trial is lost or run twice, and results are checked."""

import json
import os
import resource
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import Ran, check_refused, meanings, tree
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from running import MakeConfig
from test_study_grid import RATES, parsed, study_config

from loratune.codes import Code
from loratune.compare.metrics import RowLosses
from loratune.errors import ConfigError, LockedError, ResourceError, ResumeError
from loratune.report.study import BEST, DONE, LIKE_BEST, WORSE, StudyResults, TrialResult, rank
from loratune.study import storage
from loratune.study.study import Study, TrialRecord

Cli = Callable[..., Ran]
_ANY = ".*"  # messages of numpy, zlib and base64
RANGE = parsed("lora.r=2..8").axes
VALUES = parsed("lora.r=2,4,8").axes


@pytest.fixture
def config(tmp_path: Path, run_config: MakeConfig) -> Callable[..., Path]:
    """Writes a sweep config into the folder of a test."""
    return lambda **sections: study_config(tmp_path, run_config, **sections)


def opened(folder: Path, url: str | None = None) -> Study:
    study = Study(folder, "out", url, halving=False, seed=0)
    study.check({}, record=True)  # as a sweep does before its first trial
    return study


def states(study: Study) -> list[tuple[int, str]]:
    return [(one.number, one.state) for one in study.records()]


# Foreign files


def optunas(study: Path, name: str, *, trials: int = 0, cut: bytes = b"") -> None:
    """An optuna journal written by another program."""
    storage = JournalStorage(JournalFileBackend(str(study / "journal.log")))
    theirs = optuna.create_study(study_name=name, storage=storage)
    for _ in range(trials):
        theirs.ask()
    with (study / "journal.log").open("ab") as journal:
        journal.write(cut)


def database(path: Path, *tables: str) -> Path:
    with closing(sqlite3.connect(path)) as made:
        for table in tables or ("notes",):
            made.execute(f"CREATE TABLE {table} (note TEXT)")
    return path


def inside(study: Path, parent: str, name: str) -> Path:
    (study / parent).mkdir()
    return study / parent / name


def journal(text: str) -> tuple[str, Callable[[Path], object]]:
    return "journal.log", lambda study: (study / "journal.log").write_text(text)


URLS = {"storage": "sqlite:///{}/storage", "uri": "sqlite:///file:{}/storage?uri=true"}
NOT_OURS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a link to a directory": ("", lambda study: (study.rmdir(), study.symlink_to(study.parent / "elsewhere"))),
    "a link that leads nowhere": ("", lambda study: (study.rmdir(), study.symlink_to("nowhere"))),
    "a file in place of the study": ("", lambda study: (study.rmdir(), study.write_text("mine"))),
    "a directory of something else": ("", lambda study: (study / "notes.txt").write_text("mine")),
    "an unfinished line": journal("mine"),
    "an unfinished line of JSON": journal('{"op_code":0,"wor'),
    "a line of text": journal("mine\n"),
    "lines of text": journal("a\nb\nand half a lin"),
    "other JSON": journal('{"level": 3}\n{"level"'),
    "an empty file": journal(""),
    "the journal of another study": ("journal.log", lambda study: optunas(study, "other", cut=b'{"op')),
    "a journal of another program": ("journal.log", lambda study: optunas(study, "out", trials=1, cut=b'{"op')),
    "a link to a journal": ("journal.log", lambda study: (study / "journal.log").symlink_to("/dev/zero")),
    "a pipe": ("journal.log", lambda study: os.mkfifo(study / "journal.log")),
    "a directory in place of a journal": ("journal.log", lambda study: (study / "journal.log").mkdir()),
    "a link to the lock on a journal": (
        "journal.log.lock",
        lambda study: (study / "journal.log.lock").symlink_to("nowhere"),
    ),
    "other results": ("results.json", lambda study: (study / "results.json").write_text('{"loss": 1}')),
    "results that are no JSON": ("results.json", lambda study: (study / "results.json").write_text("mine")),
    "a link to results": ("results.json", lambda study: (study / "results.json").symlink_to("../elsewhere/mine")),
    "a link to locks": ("locks", lambda study: (study / "locks").symlink_to("../elsewhere")),
    "a link to trials": ("trials", lambda study: (study / "trials").symlink_to("nowhere")),
    "a link to a lock": (
        "locks/study",
        lambda study: inside(study, "locks", "study").symlink_to("../../elsewhere/new"),
    ),
    "a pipe in place of a lock": ("locks/study", lambda study: os.mkfifo(inside(study, "locks", "study"))),
    "a link to the lock of a trial": ("locks/0000", lambda study: inside(study, "locks", "0000").symlink_to("nowhere")),
    "a link to a trial": ("trials/0000", lambda study: inside(study, "trials", "0000").symlink_to("../../elsewhere")),
    "another database by its URI": ("uri", lambda study: database(study.parent / "storage")),
    "another database": ("storage", lambda study: database(study.parent / "storage")),
    "a database with a table that Optuna has too": (
        "storage",
        lambda study: database(study.parent / "storage", "users", "alembic_version"),
    ),
    "a text in place of a database": ("storage", lambda study: (study.parent / "storage").write_text("mine " * 200)),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_foreign_files_are_refused_and_left_unchanged(name: str, cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    file, study = config(), tmp_path / "out.study"
    study.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    place, make = NOT_OURS[name]
    make(study)
    url = URLS[place].format(tmp_path) if place in URLS else None
    before = sorted(tmp_path.rglob("*")), tree(tmp_path)
    ran = cli("sweep", file, *RATES, *(("--storage", url) if url else ()))
    where, key = (url.partition("?")[0], "--storage") if url else (str(study / place), "")
    check_refused(ran, 2, (Code.SWEEP_STUDY, where, key))
    assert (sorted(tmp_path.rglob("*")), tree(tmp_path)) == before


def test_optuna_study_of_another_program_is_refused(tmp_path: Path) -> None:
    """Its trials would be mistaken for those of the sweep."""
    url = f"sqlite:///{tmp_path / 'theirs.db'}"
    theirs = optuna.create_study(study_name="out", storage=url)
    theirs.ask()
    theirs.enqueue_trial({"x": 0.9})
    optuna.create_study(study_name="out", storage=f"{url}2", direction="maximize")
    for one in (url, f"{url}2"):
        with pytest.raises(ConfigError) as refused:
            Study(tmp_path / "study", "out", one, halving=False, seed=0).check({}, record=False)
        assert meanings(refused.value) == [(Code.SWEEP_STUDY, one, "")]
    theirs = optuna.load_study(study_name="out", storage=url)
    assert [trial.state.name for trial in theirs.trials] == ["RUNNING", "WAITING"] and not theirs.user_attrs


def test_directory_of_a_study_with_another_name_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError) as refused:
        Study(tmp_path, "new", None, halving=False, seed=0)
    assert refused.value.problems[0].code == Code.SWEEP_STUDY and "'out'" in refused.value.problems[0].what


@pytest.mark.parametrize(
    "attributes",
    [
        {"settings": {"model.trust_remote_code": "true"}},  # a valid key of the config, but not of the grid
        {"settings": {"lora.r": "8", "data.train": "/etc/passwd"}},
        {"settings": ["lora.r"]},
        {"settings": {"lora.r": 8}},
        {"settings": {"lora.r": "8"}, "first": -1},
        {"settings": {"lora.r": "8"}, "first": "../../x"},
        {"settings": {"lora.r": "8"}, "result": "x"},
        {"settings": {"lora.r": "8"}, "host": 3},
    ],
    ids=str,
)
def test_forged_trial_is_not_run(tmp_path: Path, attributes: dict[str, Any]) -> None:
    study = opened(tmp_path)
    study._study.enqueue_trial({}, user_attrs=attributes)
    with pytest.raises(ResumeError) as lost, study.claim(None, RANGE, None):
        raise AssertionError
    assert "no sweep has written" in lost.value.problems[0].what


def test_invalid_study_identity_is_refused(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study._study.set_user_attr("identity", "x")
    with pytest.raises(ResumeError):
        study.check({"lora.r": "8"}, record=True)


# A damaged, locked or unreachable storage


def test_damaged_journal_is_reported_with_the_line_number(tmp_path: Path) -> None:
    """Optuna ignores an unreadable last line and appends to it, which would make the journal unreadable."""
    opened(tmp_path)
    for line in (b"mine\n", b"[1]\n", b"[" * 100_000 + b"\n"):
        kept = (tmp_path / "journal.log").read_bytes()
        (tmp_path / "journal.log").write_bytes(kept + line)
        with pytest.raises(ResumeError) as damaged:
            opened(tmp_path)
        assert meanings(damaged.value) == [(Code.SWEEP_STUDY, f"{tmp_path / 'journal.log'}:3", "")]
        assert (tmp_path / "journal.log").read_bytes() == kept + line
        (tmp_path / "journal.log").write_bytes(kept)
    assert opened(tmp_path).records() == []


def test_incomplete_last_line_of_a_journal_is_replaced(tmp_path: Path) -> None:
    """Opening a study does not change its journal."""
    study, other = opened(tmp_path), opened(tmp_path)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    before = tree(tmp_path)
    assert opened(tmp_path).records() == [] and tree(tmp_path) == before
    study.enqueue([{"lora.r": "8"}])
    other.enqueue([{"lora.r": "4"}])
    for one in (study, opened(tmp_path)):
        assert [record.settings["lora.r"] for record in one.records()] == ["8", "4"]


def test_full_disk_is_reported_and_the_study_stays_usable(tmp_path: Path) -> None:
    """Simulated by a file size limit. The incomplete line is removed later."""
    study, path = opened(tmp_path), tmp_path / "journal.log"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(ResourceError) as full:
            study.enqueue([{"lora.r": "8"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert meanings(full.value) == [(Code.SYSTEM_DISK_FULL, str(path), "")]
    assert not path.read_bytes().endswith(b"\n")
    again = Study(tmp_path, "out", None, halving=False, seed=0)
    again.enqueue([{"lora.r": "8"}])
    assert states(again) == [(0, "waiting")]


def test_locked_database_is_distinguished_from_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    url = f"sqlite:///{path}?timeout=0.01"
    study = opened(tmp_path / "study", url)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for use in (study.records, lambda: opened(tmp_path / "study", url)):
            with pytest.raises(LockedError) as locked:
                use()
            assert meanings(locked.value) == [(Code.SYSTEM_LOCKED, f"sqlite:///{path}", "--storage")]
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 4000)
    with pytest.raises(ResumeError):
        opened(tmp_path / "study", url)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://joe:hunter2@host/db", "postgresql://host/db?user=joe&password=hunter2", "sqlite:///host?PWD=hunter2",
        "mysql:joe:hunter2@host", "joe:hunter2@host",
    ],
)  # fmt: skip
def test_passwords_in_storage_urls_are_not_printed(url: str) -> None:
    is_url = "://" in url
    assert "hunter2" not in storage.shown(url) and ("host" in storage.shown(url)) == is_url
    if is_url:
        error = storage.explained(OSError(f"cannot connect to {url}: wrong password 'hunter2'"), "host", url)
        assert "hunter2" not in str(error) and "wrong password" in str(error)


# Claiming trials


def taken(study: Study, *labels: str, most: int | None = None) -> TrialRecord | None:
    """The trial that a process claims and does not finish."""
    with study.claim({*labels} or None, VALUES if labels else RANGE, most) as record:
        return record


def test_trials_outside_the_grid_of_a_command_stay_queued(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.enqueue([{"lora.r": r} for r in ("2", "4", "8")])
    with study.claim({"lora.r=8"}, VALUES, None) as record:
        assert record is not None and record.settings == {"lora.r": "8"} and record.number == 2
        assert states(study) == [(0, "waiting"), (1, "waiting"), (2, "running")]
    assert states(study) == [(0, "waiting"), (1, "waiting"), (2, "waiting")]


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"], ids=["journal", "database"])
def test_trial_is_claimed_once_and_keeps_its_number_on_retry(tmp_path: Path, url: str | None) -> None:
    """Also if its process was killed, so that its lock is free although its state is still running."""
    url = url and url.format(tmp_path)
    one, two = opened(tmp_path / "study", url), opened(tmp_path / "study", url)
    for study in (one, two):
        study.enqueue([{"lora.r": "2"}, {"lora.r": "4"}])
    with one.claim({"lora.r=2"}, VALUES, None) as record:
        assert record is not None and record.number == 0
        assert taken(two, "lora.r=2") is None
        with two.claim({"lora.r=2", "lora.r=4"}, VALUES, None) as other:
            assert other is not None and other.number == 1
            two.finish(other, {"seconds": 1.0}, 0.5)
    assert states(two) == [(0, "waiting"), (1, DONE)]
    killed = one.claim({"lora.r=2"}, VALUES, None)
    record = killed.__enter__()
    assert record is not None and record.number == 0 and states(two)[0] == (0, "running")
    os.unlink(tmp_path / "study" / "locks" / "0000")  # as if the kernel had released it
    again = taken(two, "lora.r=2")
    assert again is not None and again.number == 0 and states(two)[0] == (0, "waiting")
    killed.__exit__(None, None, None)


def test_finished_trial_is_not_requeued_after_an_interrupt(tmp_path: Path) -> None:
    """The interrupt arrives after the trial was recorded as finished."""
    study = opened(tmp_path)
    study.enqueue([{"lora.r": "8"}])
    with pytest.raises(KeyboardInterrupt), study.claim(None, RANGE, 1) as record:
        assert record is not None
        study.finish(record, {}, 1.0)
        raise KeyboardInterrupt
    assert states(study) == [(0, DONE)]


def test_only_trials_without_recent_heartbeat_are_taken_over(tmp_path: Path) -> None:
    """Two output directories of the same name share a database, like two machines, and see only each other's
    heartbeats."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one, two = (opened(tmp_path / name, url) for name in ("one", "two"))
    one.enqueue([{"lora.r": "2"}])
    with one.claim({"lora.r=2"}, VALUES, None) as record:
        assert record is not None and taken(two, "lora.r=2") is None
        with closing(sqlite3.connect(tmp_path / "study.db")) as storage:
            storage.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-29 minutes')")
            storage.commit()
            assert taken(two, "lora.r=2") is None
            storage.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-31 minutes')")
            storage.commit()
        with two.claim({"lora.r=2"}, VALUES, None) as again:
            assert again is not None and again.number == record.number == 0
            assert [found.place for found in two.records()] == [str((tmp_path / "two").resolve())]
            two.finish(again, {}, 0.5)
    assert states(one) == [(0, DONE)]


def test_combination_enqueued_by_two_machines_is_one_trial(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for _ in range(2):
        study._study.enqueue_trial({}, user_attrs={"settings": {"lora.r": "2"}})
    with study.claim({"lora.r=2"}, VALUES, None) as record:
        assert record is not None and states(study) == [(0, "running")]
        study.finish(record, {}, 0.5)
    assert taken(study, "lora.r=2") is None and states(study) == [(0, DONE)]


def test_sampled_values_are_not_repeated(tmp_path: Path) -> None:
    study, drawn = opened(tmp_path), []
    for _ in range(9):
        with study.claim(None, parsed("lora.r=2..4").axes, 5) as record:
            if record is not None:
                drawn.append(record.settings["lora.r"])
                study.finish(record, {}, float(len(drawn)))
    assert sorted(drawn) == ["2", "3", "4"]


# Results


def made_results() -> StudyResults:
    """Results of three trials: the second is best, the third is worse."""
    losses = {
        number: RowLosses(np.full(6, 5.0 + extra), np.ones(6), np.ones(6)) for number, extra in ((0, 0.1), (1, 0))
    }
    found = [
        TrialResult(number, {"training.learning_rate": rate}, {}, DONE if number < 2 else "waiting", seconds=1.5)
        for number, rate in enumerate(("1e-3", "1e-2", "3e-2"))
    ]
    return StudyResults("out", "base", ["training.learning_rate"], 6, 6, rank(found, losses), "/gone/out")


def study_in(folder: Path) -> Path:
    path = folder / "study"
    path.mkdir()
    return path


def spoiled(**changes: Any) -> Callable[[dict[str, Any]], str]:
    def spoil(values: dict[str, Any]) -> str:
        values["trials"][0] |= changes
        return json.dumps(values)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled(loss=float("nan")), spoiled(loss="five"), spoiled(settings=[]), spoiled(number=-1),
        spoiled(verdict="won"), spoiled(seconds=1e300), lambda _: "[" * 100_000, lambda _: "[]", lambda _: "\0",
        lambda values: json.dumps(values | {"winner": 7}), lambda values: json.dumps(values | {"rows": "many"}),
        lambda values: json.dumps(values | {"version": 2}), lambda values: json.dumps(values).replace("5.", "5" * 400),
    ],
)  # fmt: skip
def test_forged_results_are_refused(cli: Cli, tmp_path: Path, spoil: Callable[[Any], str]) -> None:
    file = study_in(tmp_path) / "results.json"
    file.write_text(spoil(json.loads(json.dumps(made_results().to_dict()))))
    ran = cli("report", "--study", tmp_path / "study", "--output", tmp_path / "page.html")
    check_refused(ran, 2, (Code.SWEEP_STUDY, str(file), "--study"))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_results_must_be_a_regular_file(cli: Cli, tmp_path: Path, target: str) -> None:
    file = study_in(tmp_path) / "results.json"
    os.mkfifo(file) if target == "pipe" else file.symlink_to(target)
    ran = cli("report", "--study", tmp_path / "study", "--output", tmp_path / "page.html")
    check_refused(ran, 2, (Code.SWEEP_STUDY, str(file), "--study"))


def test_page_shows_untrusted_results_as_text(cli: Cli, tmp_path: Path) -> None:
    values = json.loads(json.dumps(made_results().to_dict()))
    values["keys"].append("$\\frac{")
    evil = {"$\\frac{": "$x_{", "training.learning_rate": "1e400"}
    values["trials"][0] |= {"settings": evil, "note": "<script>alert(1)</script>", "state": "\x1b]0;x\x07"}
    (study_in(tmp_path) / "results.json").write_text(json.dumps(values))
    page = tmp_path / "page.html"
    assert cli("report", "--study", tmp_path / "study", "--output", page).code == 0
    assert "<script" not in page.read_text() and "&lt;script&gt;" in page.read_text()
    assert "/gone/out" not in page.read_text()  # a path that does not exist, as if the study had been moved


def test_results_are_not_written_through_links_or_pipes(tmp_path: Path) -> None:
    results, precious = made_results(), tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "results.json.unfinished").symlink_to(precious)
    results.write(tmp_path)
    os.mkfifo(tmp_path / "results.json.unfinished")
    results.write(tmp_path)
    assert precious.read_text() == "precious" and StudyResults.read(tmp_path) == results
    (tmp_path / "results.json").unlink()
    (tmp_path / "results.json").mkdir()
    with pytest.raises(ResumeError):
        results.write(tmp_path)
    assert not (tmp_path / "results.json.unfinished").exists()


def test_invalid_row_losses_are_refused() -> None:
    ones = np.ones(6)
    good = RowLosses(ones, ones, ones)
    assert RowLosses.unpacked(good.packed()).has_rows_of(good)
    assert not good.has_rows_of(RowLosses(ones, ones * 2, ones)) and not RowLosses(ones * 1e39, ones, ones).is_finite
    bomb = RowLosses(*[np.ones(1 << 22)] * 3).packed()
    bad = [RowLosses(ones * np.nan, ones, ones).packed(), RowLosses(ones, ones * 0, ones).packed()]
    for text in ("", "AAAA", "\0", good.packed()[:-7], *bad, bomb):  # the last one would decompress to a huge size
        with pytest.raises(ValueError, match=_ANY):
            RowLosses.unpacked(text)


def test_trial_result_values_are_validated() -> None:
    assert rank([TrialResult(0, {}, {}, "waiting")], {})[0].verdict == ""
    with pytest.raises(ValueError, match="seconds"):
        TrialResult(number=0, settings={}, values={}, state="done", seconds="soon")  # type: ignore[arg-type]


def test_ranking_compares_row_by_row() -> None:
    generator = np.random.default_rng(0)
    nats, noise = generator.random(50) * 20, generator.standard_normal(50)
    tokens, copies = nats * 0 + 10, nats * 0 + 1
    losses = {
        0: RowLosses(nats + 0.5, tokens, copies),  # worse by half a nat on each row, far less than the spread of rows
        1: RowLosses(nats, tokens, copies),
        2: RowLosses(nats + 0.3 * (noise - noise.mean()) + 1e-3, tokens, copies),
    }
    trials = [TrialResult(number, {}, {}, "done") for number in (*losses, 3)]
    ranked = rank(trials, {number: RowLosses.unpacked(one.packed()) for number, one in losses.items()})
    assert [(one.number, one.verdict) for one in ranked] == [(1, BEST), (2, LIKE_BEST), (0, WORSE), (3, "")]
    assert ranked[2].difference == pytest.approx(0.05, rel=1e-5)
    assert ranked[0].interval is not None and ranked[0].interval[1] - ranked[0].interval[0] > 0.05


def test_remarks_name_the_limits_of_a_comparison() -> None:
    """Whether the best value is at the edge of those tried (including diverged trials), and which losses are
    compared."""

    def remarks(*trials: tuple[dict[str, str], str]) -> list[str]:
        found = [TrialResult(number, values, {}, state) for number, (values, state) in enumerate(trials)]
        first = replace(found[0], verdict=BEST)
        return StudyResults("out", "base", [*trials[0][0]], 9, 9, [first, *found[1:]]).remarks()

    rate, r = "training.learning_rate", "lora.r"
    best = {rate: "1e-3", r: "8"}
    lower, waiting, diverged = ({rate: text, r: "8"} for text in ("1e-4", "1e-2", "2e-3"))
    said = [f"{rate}: the best value is the highest that was tried; higher ones may be better"]
    lowest = [said[0].replace("highest", "lowest").replace("higher", "lower")]
    assert remarks((best, "done"), (lower, "done"), (waiting, "waiting")) == said
    assert remarks((best, "done"), (lower, "done"), (diverged, "diverged")) == []
    assert remarks((best, "done"), (diverged, "done")) == lowest
    packing = [({"data.packing": one}, "done") for one in ("full", "none")]
    seeds = [({"training.seed": one}, "done") for one in ("1", "2")]
    assert remarks((best, "done")) == remarks(*packing) == remarks(*seeds) == []
    (one,) = remarks(({"training.objective": "dpo"}, "done"), ({"training.objective": "simpo"}, "done"))
    assert "favours those that were trained to lower it" in one
