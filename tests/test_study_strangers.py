"""A study whose files others may have changed, and sweeps that end at the worst moment: nothing is believed or lost."""

import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from conftest import Ran, check_refused, config_in, meanings, tree, write_rows
from fork_server import ForkServer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from running import WEIGHTS

from loratune.codes import Code
from loratune.commands.sweep import budget, grid
from loratune.commands.sweep.running import _Sweep
from loratune.commands.sweep.storage import without_password
from loratune.commands.sweep.study import SETTINGS, Study
from loratune.errors import ConfigError, LockedError, ResumeError
from loratune.evaluation.study_results import DONE, RowLosses, StudyResults, rank, trial_result

Cli = Callable[..., Ran]
RATES = ("--grid", "training.learning_rate=1e-3,1e-2")
HELD_OUT = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(40, 60)]
_ANY = ".*"  # what numpy, zlib and base64 say
RANGE = grid.parse(["lora.r=2..8"], Path("c.yaml"), []).axes


def config(folder: Path, model: Path, **training: Any) -> Path:
    data = {"train": str(folder / "rows.jsonl"), "validation": str(write_rows(folder / "held-out.jsonl", HELD_OUT))}
    return config_in(folder, model)(data=data, training=training)


@pytest.fixture(scope="module")
def swept(processes: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a sweep over two rates, and what it printed in `said`."""
    folder = tmp_path_factory.mktemp("swept")
    child = processes.start("sweep", config(folder, tiny_dir, max_steps=3), *RATES)
    assert child.wait() == 0, child.said()
    (folder / "said").write_text(child.out.read_text())
    return folder


@pytest.fixture
def copied(swept: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may spoil, without what was published."""
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    shutil.copytree(swept / "out.study", tmp_path / "out.study", dirs_exist_ok=True)  # whose adapters are called out
    values = yaml.safe_load((swept / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def opened(folder: Path, url: str | None = None) -> Study:
    study = Study(folder, "out", url, halving=False, seed=0)
    study.check({}, record=True)  # as a sweep does before its first trial
    return study


def adapter(folder: Path) -> Path:
    """The adapter of the best trial."""
    number = StudyResults.read(folder / "out.study").trials[0].number
    return folder / "out.study" / "trials" / f"{number:04}" / "out"


# The storage


def optunas(study: Path, name: str, *, trials: int = 0, cut: bytes = b"") -> None:
    """A journal that optuna has written for another program."""
    storage = JournalStorage(JournalFileBackend(str(study / "journal.log")))
    theirs = optuna.create_study(study_name=name, storage=storage)
    for _ in range(trials):
        theirs.ask()
    with (study / "journal.log").open("ab") as journal:
        journal.write(cut)


def database(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE notes (note TEXT)")
    return path


def inside(study: Path, parent: str, name: str) -> Path:
    (study / parent).mkdir()
    return study / parent / name


URLS = {"storage": "sqlite:///{}/storage", "uri": "sqlite:///file:{}/storage?uri=true"}
NOT_OURS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a link to a directory": ("", lambda study: (study.rmdir(), study.symlink_to(study.parent / "elsewhere"))),
    "a link that leads nowhere": ("", lambda study: (study.rmdir(), study.symlink_to("nowhere"))),
    "a file in place of the study": ("", lambda study: (study.rmdir(), study.write_text("mine"))),
    "a directory of something else": ("", lambda study: (study / "notes.txt").write_text("mine")),
    "an unfinished line": ("journal.log", lambda study: (study / "journal.log").write_text("mine")),
    "an unfinished line of JSON": (
        "journal.log",
        lambda study: (study / "journal.log").write_text('{"op_code":0,"wor'),
    ),
    "a line of text": ("journal.log", lambda study: (study / "journal.log").write_text("mine\n")),
    "lines of text": ("journal.log", lambda study: (study / "journal.log").write_text("a\nb\nand half a lin")),
    "other JSON": ("journal.log", lambda study: (study / "journal.log").write_text('{"level": 3}\n{"level"')),
    "an empty file": ("journal.log", lambda study: (study / "journal.log").touch()),
    "the journal of another study": ("", lambda study: optunas(study, "other", cut=b'{"op')),
    "a journal of another program": ("journal.log", lambda study: optunas(study, "out", trials=1, cut=b'{"op')),
    "a journal that another program has begun": ("journal.log", lambda study: optunas(study, "out", cut=b"my notes")),
    "a link to a journal": ("journal.log", lambda study: (study / "journal.log").symlink_to("/dev/zero")),
    "a pipe": ("journal.log", lambda study: os.mkfifo(study / "journal.log")),
    "a directory in place of a journal": ("journal.log", lambda study: (study / "journal.log").mkdir()),
    "other results": ("results.json", lambda study: (study / "results.json").write_text('{"loss": 1}')),
    "results that are no JSON": ("results.json", lambda study: (study / "results.json").write_text("mine")),
    "a link to results": ("results.json", lambda study: (study / "results.json").symlink_to("../elsewhere/mine")),
    "a link to locks": ("locks", lambda study: (study / "locks").symlink_to("../elsewhere")),
    "a link to trials": ("trials", lambda study: (study / "trials").symlink_to("nowhere")),
    "a link to a lock": (
        "locks/choosing",
        lambda study: inside(study, "locks", "choosing").symlink_to("../../elsewhere/new"),
    ),
    "a pipe in place of a lock": ("locks/choosing", lambda study: os.mkfifo(inside(study, "locks", "choosing"))),
    "a link to the lock of a trial": ("locks/0000", lambda study: inside(study, "locks", "0000").symlink_to("nowhere")),
    "a directory in place of a journal that is begun": (
        "locks/journal.log.unfinished",
        lambda study: inside(study, "locks", "journal.log.unfinished").mkdir(),
    ),
    "a link to a trial": ("trials/0000", lambda study: inside(study, "trials", "0000").symlink_to("../../elsewhere")),
    "another database by its URI": ("uri", lambda study: database(study.parent / "storage")),
    "another database": ("storage", lambda study: database(study.parent / "storage")),
    "a text in place of a database": ("storage", lambda study: (study.parent / "storage").write_text("mine " * 200)),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_ours_is_refused_and_left_as_it_is(name: str, cli: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    file, study = config(tmp_path, tiny_dir), tmp_path / "out.study"
    study.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    place, make = NOT_OURS[name]
    make(study)
    url = URLS[place].format(tmp_path) if place in URLS else None
    before = sorted(tmp_path.rglob("*")), tree(tmp_path)
    ran = cli("sweep", file, *RATES, *(("--storage", url) if url else ()))
    code = Code.SWEEP_OTHER_STUDY if "journal of another" in name or "another program" in name else Code.SWEEP_STORAGE
    where, key = (url, "--storage") if url else (str(study / place), "")
    check_refused(ran, 2, (code, where, key))
    assert (sorted(tmp_path.rglob("*")), tree(tmp_path)) == before


def test_a_damaged_journal_is_named_with_its_line(tmp_path: Path) -> None:
    """Optuna passes over a last line that it cannot read, and writes behind it, after which nobody can read more."""
    opened(tmp_path)
    for line in (b"mine\n", b"[1]\n", b"[" * 100_000 + b"\n"):
        kept = (tmp_path / "journal.log").read_bytes()
        (tmp_path / "journal.log").write_bytes(kept + line)
        with pytest.raises(ResumeError) as damaged:
            opened(tmp_path)
        assert meanings(damaged.value) == [(Code.SWEEP_STORAGE, f"{tmp_path / 'journal.log'}:4", "")]
        assert (tmp_path / "journal.log").read_bytes() == kept + line
        (tmp_path / "journal.log").write_bytes(kept)
    assert opened(tmp_path).records() == []


def test_opening_a_study_adds_nothing_to_it(tmp_path: Path) -> None:
    opened(tmp_path)
    with (tmp_path / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code":4,"worker')  # half a line, which the next line will take the place of
    before = tree(tmp_path)
    assert opened(tmp_path).records() == [] and tree(tmp_path) == before


def test_a_locked_database_is_not_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    url = f"sqlite:///{path}?timeout=0.01"
    study = opened(tmp_path / "study", url)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for use in (study.records, lambda: opened(tmp_path / "study", url)):
            with pytest.raises(LockedError) as locked:
                use()
            assert meanings(locked.value) == [(Code.SYSTEM_LOCKED, url, "--storage")]
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 4000)
    with pytest.raises(ResumeError):
        opened(tmp_path / "study", url)


def test_a_lock_that_a_killed_process_left_holds_nobody_up(tmp_path: Path) -> None:
    """Optuna's own lock, a link that leads nowhere, would be waited for without end."""
    opened(tmp_path)
    (tmp_path / "journal.log.lock").symlink_to("nowhere")
    opened(tmp_path).enqueue([{"lora.r": "8"}])
    assert len(opened(tmp_path).records()) == 1


def test_half_a_line_of_another_process_spoils_no_other_line(tmp_path: Path) -> None:
    study, other = opened(tmp_path), opened(tmp_path)
    with (tmp_path / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code":4,"worker')
    study.enqueue([{"lora.r": "8"}])
    other.enqueue([{"lora.r": "4"}])
    assert (
        [one.settings["lora.r"] for one in study.records()]
        == ["8", "4"]
        == [one.settings["lora.r"] for one in opened(tmp_path).records()]
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {SETTINGS: {"model.trust_remote_code": "true"}},  # of the config, but not of the grid
        {SETTINGS: {"lora.r": "8", "data.train": "/etc/passwd"}},
        {SETTINGS: ["lora.r"]},
        {SETTINGS: {"lora.r": 8}},
        {SETTINGS: {"lora.r": "8"}, "first": -1},
        {SETTINGS: {"lora.r": "8"}, "first": "../../x"},
        {SETTINGS: {"lora.r": "8"}, "result": "x"},
        {SETTINGS: {"lora.r": "8"}, "host": 3},
    ],
    ids=str,
)
def test_a_forged_trial_is_not_worked_on(tmp_path: Path, attributes: dict[str, Any]) -> None:
    study = opened(tmp_path)
    study._study.enqueue_trial({}, user_attrs=attributes)
    with pytest.raises(ResumeError) as lost:
        study.records()
        study.claim(None, RANGE, None)
    assert "no sweep has written" in lost.value.problems[0].what


def test_an_identity_of_another_kind_is_refused(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study._study.set_user_attr("identity", "x")
    with pytest.raises(ResumeError):
        study.check({"lora.r": "8"}, record=True)


def test_a_study_under_another_name_is_not_begun_anew(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError) as refused:
        Study(tmp_path, "new", None, halving=False, seed=0)
    assert refused.value.problems[0].code == Code.SWEEP_OTHER_STUDY and "'out'" in refused.value.problems[0].what


def test_what_other_commands_wait_for_stays_in_the_queue(tmp_path: Path) -> None:
    study, axes = opened(tmp_path), grid.parse(["lora.r=2,4,8"], Path("c.yaml"), []).axes
    study.enqueue([{"lora.r": r} for r in ("2", "4", "8")])
    claim = study.claim({"lora.r=8"}, axes, None)
    assert claim is not None and claim.settings == {"lora.r": "8"} and claim.number == 2
    assert [(one.number, one.state) for one in study.records()] == [(0, "waiting"), (1, "waiting"), (2, "running")]


def test_a_trial_that_has_ended_is_not_put_back(tmp_path: Path) -> None:
    """As where a signal comes between the end of a trial and what follows."""
    study = opened(tmp_path)
    study.enqueue([{"lora.r": "8"}])
    claim = study.claim(None, RANGE, 1)
    assert claim is not None
    study.finish(claim, {}, 1.0)
    study.give_back(claim)
    assert [(one.number, one.state) for one in study.records()] == [(0, DONE)]


@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("mysql://joe:hunter2@host/db", "hunter2"), ("mysql:joe:hunter2@host", "hunter2"),
        ("joe:hunter2@host", "hunter2"), ("mysql://joe:hun@ter2@host/db", "hun@ter2"),
        ("postgresql://host/db?user=joe&password=hunter2", "hunter2"), ("sqlite:///host?PWD=hunter2", "hunter2"),
    ],
)  # fmt: skip
def test_no_password_is_printed(url: str, password: str) -> None:
    for text in (url, f"cannot connect to {url}", f"host: wrong password {password!r}"):
        shown = without_password(text, url)
        assert password not in shown and "host" in shown


def test_no_password_is_in_an_error(cli: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    ran = cli("sweep", config(tmp_path, tiny_dir), *RATES, "--storage", "mysql:joe:hunter2@host")
    assert ran.code == 2 and f"[{Code.SWEEP_STORAGE}]" in ran.err and "hunter2" not in ran.err + ran.out


# Its results


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
def test_forged_results_make_no_page(cli: Cli, swept: Path, tmp_path: Path, spoil: Callable[[Any], str]) -> None:
    file = study_in(tmp_path) / "results.json"
    file.write_text(spoil(json.loads((swept / "out.study" / "results.json").read_text())))
    ran = cli("report", "--study", file.parent, "--output", tmp_path / "page.html")
    check_refused(ran, 2, (Code.SWEEP_NO_STUDY, str(file), "--study"))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_only_a_file_holds_results(cli: Cli, tmp_path: Path, target: str) -> None:
    file = study_in(tmp_path) / "results.json"
    os.mkfifo(file) if target == "pipe" else file.symlink_to(target)
    ran = cli("report", "--study", file.parent, "--output", tmp_path / "page.html")
    check_refused(ran, 2, (Code.SWEEP_NO_STUDY, str(file), "--study"))


def test_a_page_shows_what_a_stranger_wrote_as_text(cli: Cli, swept: Path, tmp_path: Path) -> None:
    values = json.loads((swept / "out.study" / "results.json").read_text())
    values["keys"].append("$\\frac{")
    evil = {"$\\frac{": "$x_{", "training.learning_rate": "1e400"}
    values["trials"][0] |= {"settings": evil, "note": "<script>alert(1)</script>", "state": "\x1b]0;x\x07"}
    (study_in(tmp_path) / "results.json").write_text(json.dumps(values))
    page = tmp_path / "page.html"
    assert cli("report", "--study", tmp_path / "study", "--output", page).code == 0
    assert "<script" not in page.read_text() and "&lt;script&gt;" in page.read_text()


def test_a_page_of_a_study_that_moved_names_no_adapter_that_is_gone(cli: Cli, copied: Path, tmp_path: Path) -> None:
    values = json.loads((copied / "out.study" / "results.json").read_text())
    values["published"] = "/gone/out"
    (copied / "out.study" / "results.json").write_text(json.dumps(values))
    page = tmp_path / "page.html"
    assert cli("report", "--study", copied / "out.study", "--output", page).code == 0
    assert "/gone/out" not in page.read_text()


def test_results_are_written_through_no_link(swept: Path, tmp_path: Path) -> None:
    results, precious = StudyResults.read(swept / "out.study"), tmp_path / "precious"
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


def test_losses_that_no_trial_has_are_refused() -> None:
    ones = np.ones(6)
    good = RowLosses(ones, ones, ones)
    assert RowLosses.unpacked(good.packed()).is_of_rows_of(good)
    assert not good.is_of_rows_of(RowLosses(ones, ones * 2, ones)) and not RowLosses(ones * 1e39, ones, ones).is_finite
    bomb = RowLosses(*[np.ones(1 << 22)] * 3).packed()
    bad = [RowLosses(ones * np.nan, ones, ones).packed(), RowLosses(ones, ones * 0, ones).packed()]
    for text in ("", "AAAA", "\0", good.packed()[:-7], *bad):
        with pytest.raises(ValueError, match=_ANY):
            RowLosses.unpacked(text)
    with pytest.raises(ValueError, match=_ANY):  # not all of it is unpacked, and a part is none of three rows
        RowLosses.unpacked(bomb)


def test_values_of_a_trial_are_checked() -> None:
    assert rank([trial_result(number=0, settings={}, values={}, state="waiting")], {})[0].verdict == ""
    with pytest.raises(ValueError, match="seconds"):
        trial_result(number=0, settings={}, values={}, state="done", seconds="soon")


# The winner


def test_the_example_is_one_of_the_rows(swept: Path) -> None:
    assert f"generate --adapter {swept / 'out'} '0 and 0 make'" in (swept / "said").read_text()


def test_none_or_another_adapter_in_the_place_of_the_best_is_not_published(forked: Cli, copied: Path) -> None:
    other = copied / "other"
    ran = forked("train", copied / "run.yaml", "--set", f"output_dir={other}", "--set", "training.max_steps=1")
    assert ran.code == 0, ran.err
    shutil.rmtree(adapter(copied))
    missing = (Code.SWEEP_WINNER_MISSING, str(adapter(copied)), "")
    check_refused(forked("sweep", copied / "run.yaml", *RATES), 5, missing)
    shutil.copytree(other, adapter(copied))
    check_refused(forked("sweep", copied / "run.yaml", *RATES), 5, missing)
    assert not (copied / "out").exists()


def test_a_link_leads_out_of_no_study(forked: Cli, copied: Path) -> None:
    place = adapter(copied).parent
    place.rename(copied / "elsewhere")
    place.symlink_to(copied / "elsewhere")
    check_refused(forked("sweep", copied / "run.yaml", *RATES), 2, (Code.SWEEP_STORAGE, str(place), ""))
    assert (copied / "elsewhere" / "out" / WEIGHTS).exists() and not (copied / "out").exists()


@pytest.mark.parametrize("level", range(4), ids=["adapter", "trial", "trials", "study"])
def test_no_link_that_appeared_is_followed_where_a_trial_is_removed(copied: Path, level: int) -> None:
    found = adapter(copied)
    place = (found, *found.parents)[level]
    place.rename(copied / "elsewhere")
    place.symlink_to(copied / "elsewhere")
    kept = tree(copied / "elsewhere")
    begun: Any = object.__new__(_Sweep)
    begun.request, begun.name, begun.log = SimpleNamespace(directory=copied / "out.study"), "out", print
    with pytest.raises(ConfigError) as refused:
        begun._remove(int(found.parent.name))
    assert meanings(refused.value) == [(Code.SWEEP_STORAGE, str(place), "")]
    assert tree(copied / "elsewhere") == kept


def test_what_appeared_at_output_dir_stays(processes: ForkServer, copied: Path) -> None:
    first = "from loratune.commands.sweep.running import _Sweep\nimport os\nend = _Sweep._end\n"
    first += f"def later(self, stop):\n    os.mkdir({str(copied / 'out')!r})\n    return end(self, stop)\n"
    first += "_Sweep._end = later"
    child = processes.start("sweep", copied / "run.yaml", *RATES, first=first)
    assert child.wait() == 2 and f"[{Code.RUN_OUTPUT_APPEARED}]" in child.said()
    assert [*(copied / "out").iterdir()] == []


# Trials that fail, and signals


def test_an_error_of_one_trial_is_its_result(forked: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    """No step fits into 6 ms; a minute is more than one epoch takes."""
    file = config(tmp_path, tiny_dir, num_train_epochs=1)
    ran = forked("sweep", file, "--grid", "training.max_minutes=0.0001,1")
    assert ran.code == 0, ran.err
    done, failed = StudyResults.read(tmp_path / "out.study").trials
    assert (done.state, failed.state) == ("done", "failed") and "too short" in failed.note and failed.note in ran.out


def test_a_budget_that_failed_trials_used_up_is_not_called_shorter_than_one() -> None:
    left = budget.Budget(100.0, started=-1e9)
    left.begin()
    assert not left.fits(90)
    with pytest.raises(ConfigError):
        budget.Budget(100.0, started=-1e9).fits(90)


_AFTER_TELL = "import os, signal, optuna\ntell, calls = optuna.Study.tell, []\n" + (
    "def later(self, *arguments, **keywords):\n"
    "    result = tell(self, *arguments, **keywords)\n"
    "    calls.append(1)\n"
    "    if len(calls) == 1: os.kill(os.getpid(), signal.{})\n"
    "    return result\n"
    "optuna.Study.tell = later"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_signal_between_the_end_of_a_trial_and_the_next(
    processes: ForkServer, forked: Cli, tmp_path: Path, tiny_dir: Path, number: signal.Signals
) -> None:
    file = config(tmp_path, tiny_dir, max_steps=3)
    child = processes.start("sweep", file, *RATES, first=_AFTER_TELL.format(number.name))
    assert child.wait() == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        trials = StudyResults.read(tmp_path / "out.study").trials
        assert [(one.number, one.state) for one in trials] == [(0, "done"), (1, "waiting")]
    ran = forked("sweep", file, *RATES)
    assert ran.code == 0 and "trial 0:" not in ran.err, ran.err
    assert [one.state for one in StudyResults.read(tmp_path / "out.study").trials] == ["done", "done"]


# The grid


@pytest.mark.parametrize(
    ("option", "code"),
    [("lora={r: 2},{r: 4}", Code.SWEEP_KEY), ("training.learning_rate=1e-3,0.001", Code.SWEEP_BAD_GRID)],
)
def test_sections_and_one_value_in_two_spellings_are_refused(
    cli: Cli, tmp_path: Path, tiny_dir: Path, option: str, code: Code
) -> None:
    ran = cli("sweep", config(tmp_path, tiny_dir), "--grid", option)
    assert ran.code == 2 and f"[{code}]" in ran.err, ran.err
    assert not (tmp_path / "out.study").exists()


# What is not the sweep's


def test_what_no_trial_wrote_stays(forked: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    """Neither where a trial would write, which ends the sweep, nor beside what a trial that fails has written."""
    file, place = config(tmp_path, tiny_dir, max_steps=3), tmp_path / "out.study" / "trials" / "0000"
    (place / "out").mkdir(parents=True)
    (place / "out" / "notes.txt").write_text("mine")
    ran = forked("sweep", file, *RATES)
    check_refused(ran, 2, (Code.RUN_OVERWRITE_NO_ADAPTER, str(place / "out"), "output_dir"))
    assert (place / "out" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "out.study")
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    ran = forked("sweep", file, "--grid", "training.learning_rate=1e30,1e-3")
    assert ran.code == 0 and (place / "notes.txt").read_text() == "mine", ran.err
    assert not (place / "out").exists() and not (place / "out.partial").exists()


def test_the_study_of_another_program_is_left_alone(forked: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    """Its trials would be taken for those of the sweep."""
    url, file = f"sqlite:///{tmp_path / 'theirs.db'}", config(tmp_path, tiny_dir, max_steps=3)
    theirs = optuna.create_study(study_name="out", storage=url)
    theirs.ask()
    theirs.enqueue_trial({"x": 0.9})
    check_refused(forked("sweep", file, *RATES, "--storage", url), 2, (Code.SWEEP_OTHER_STUDY, url, ""))
    theirs = optuna.load_study(study_name="out", storage=url)
    assert [trial.state.name for trial in theirs.trials] == ["RUNNING", "WAITING"] and not theirs.user_attrs
    optuna.create_study(study_name="out", storage=f"{url}2", direction="maximize")
    check_refused(forked("sweep", file, *RATES, "--storage", f"{url}2"), 2, (Code.SWEEP_OTHER_STUDY, f"{url}2", ""))


def test_a_living_trial_of_another_directory_is_not_taken(tmp_path: Path) -> None:
    """Two output directories of one name on one machine and one database; the lock lies in the first."""
    url, axes = f"sqlite:///{tmp_path / 'study.db'}", grid.parse(["lora.r=2,4"], Path("c.yaml"), []).axes
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (Study(tmp_path / name, "out", url, halving=False, seed=0) for name in ("one", "two"))
    one.enqueue([{"lora.r": "2"}])
    claim = one.claim({"lora.r=2"}, axes, None)
    assert claim is not None and two.claim({"lora.r=2"}, axes, None) is None
    one.give_back(claim)
    taken = two.claim({"lora.r=2"}, axes, None)
    assert taken is not None and [record.place for record in two.records()] == [str((tmp_path / "two").resolve())]


@pytest.mark.parametrize("url", ["study.db", "", "nosuch://x", "oracle://host/x", "mysql://h:a/db", "sqlite:///a\0b"])
def test_what_is_no_database_is_a_mistake_in_the_command(cli: Cli, tmp_path: Path, tiny_dir: Path, url: str) -> None:
    ran = cli("sweep", config(tmp_path, tiny_dir), *RATES, "--storage", url)
    assert ran.code == 2 and f"[{Code.SWEEP_STORAGE}]" in ran.err and "--storage" in ran.err, ran.err


def test_a_budget_that_loading_takes_leaves_no_study(forked: Cli, tmp_path: Path, tiny_dir: Path) -> None:
    """It would stand in the way of a sweep over other keys."""
    file = config(tmp_path, tiny_dir, max_steps=3)
    ran = forked("sweep", file, *RATES, "--budget", "0.001s")
    check_refused(ran, 2, (Code.SWEEP_BUDGET, "", "--budget"))
    assert "have passed before it" in ran.err
    ran = forked("sweep", file, "--grid", "lora.r=2", "--budget", "1h")
    assert ran.code == 0, ran.err
    again = forked("sweep", file, "--grid", "lora.r=2,4")
    assert again.code == 2 and "--overwrite goes on with" in again.err, again.err
