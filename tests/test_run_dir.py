"""What a run may overwrite, and what it must never follow, block on or remove."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from conftest import check_refused, is_problem, meanings, problem_text, run_command, tiny_llama, tree
from fork_server import ForkServer
from running import WEIGHTS, Cli, MakeConfig, before_batch, checkpoints

from loratune.codes import Code
from loratune.errors import ConfigError
from loratune.lora import adapter_files
from loratune.system import directories
from loratune.system.files import kind as kind_of_file
from loratune.training.checkpoints import run_dir

ONE_STEP = {"max_steps": 1}


def adapter(path: Path, *listed: str) -> Path:
    """A directory with the files its record lists: two adapter files and `listed`."""
    path.mkdir(parents=True)
    for name in ("adapter_config.json", WEIGHTS, *listed):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("old")
    files = dict.fromkeys(("adapter_config.json", WEIGHTS, *listed), "digest")
    (path / "loratune.json").write_text(json.dumps({"files": files, "fingerprints": {}}))
    (path / "README.md").write_text("edited")
    return path


def everything(path: Path) -> dict[str, Any]:
    """Everything below a path, by name: kind, and content or target."""
    found: dict[str, Any] = {}
    for one in sorted(path.rglob("*")):
        kind = kind_of_file(one)
        found[str(one.relative_to(path))] = (
            os.readlink(one) if kind == "a link" else one.read_bytes() if kind == "a file" else kind
        )
    return found


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system, or bind-mount a directory, at a path."""
    made: list[Path] = []

    def mount(place: Path, *, again: Path | None = None, of: tuple[str, str] = ("tmpfs", "size=1m")) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        how = ["--bind", str(again)] if again else ["-t", of[0], "-o", of[1], "none"]
        done = run_command(["mount", *how, str(place)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
        made.append(place)
        return place

    yield mount
    for place in reversed(made):
        run_command(["umount", "--lazy", str(place)], check=True)


# What is at output_dir


Refusal = tuple[Code, str]
"""A code, and the message after its place and key."""


def other_files(names: str) -> Refusal:
    """The refusal of a directory in which these names do not belong to the adapter."""
    return Code.OUTPUT_OVERWRITE, f"also holds {names}, "


def foreign_file(tmp_path: Path) -> Refusal:
    (adapter(tmp_path / "out") / "thesis.txt").write_text("precious")
    return other_files("thesis.txt")


def repository(tmp_path: Path) -> str:
    adapter(tmp_path / "out", ".git/objects/a")
    for name in "bcde":
        (tmp_path / "out" / ".git" / "objects" / name).write_text("precious")
    return other_files(".git/objects/b, .git/objects/c, .git/objects/d (and 1 more)")


def foreign_link(tmp_path: Path) -> Refusal:
    (adapter(tmp_path / "out") / "link").symlink_to(tmp_path)
    return other_files("link")


def foreign_pipe(tmp_path: Path) -> Refusal:
    os.mkfifo(adapter(tmp_path / "out") / "pipe")
    return other_files("pipe")


def own_repository(tmp_path: Path) -> Refusal:
    (adapter(tmp_path / "out") / ".git" / "objects").mkdir(parents=True)
    (tmp_path / "out" / ".git" / "HEAD").write_text("precious")
    return other_files(".git/")


def empty_directory(tmp_path: Path) -> Refusal:
    (adapter(tmp_path / "out", "deeper/words.txt") / "deeper" / "thesis").mkdir()
    return other_files("deeper/thesis/")


def of_the_trainer(tmp_path: Path) -> Refusal:
    (
        adapter(tmp_path / "out", "checkpoint-5/optimizer.pt", "trainer_state.json", "rng_state.pth") / "loratune.json"
    ).unlink()
    return other_files("checkpoint-5/, rng_state.pth, trainer_state.json")


def damaged_record(tmp_path: Path) -> Refusal:
    (adapter(tmp_path / "out", "words.bin") / "loratune.json").write_text("{")
    return other_files("words.bin")


def of_peft(tmp_path: Path) -> Refusal:
    (adapter(tmp_path / "out", "tokenizer.json", "optimizer.pt") / "loratune.json").unlink()
    return other_files("optimizer.pt")


def base_model(tmp_path: Path) -> Refusal:
    tiny_llama().save_pretrained(tmp_path / "out")
    return Code.OUTPUT_OVERWRITE, "move it away, or choose another"


def link(tmp_path: Path) -> Refusal:
    (tmp_path / "out").symlink_to(adapter(tmp_path / "real"))
    return Code.OUTPUT_UNUSABLE, f"name {tmp_path / 'real'} "


HELD: dict[str, Callable[[Path], Refusal]] = {
    made.__name__: made
    for made in (
        foreign_file,
        repository,
        own_repository,
        empty_directory,
        foreign_link,
        foreign_pipe,
        damaged_record,
        of_peft,
        of_the_trainer,
        base_model,
        link,
    )
}


@pytest.mark.parametrize("name", HELD)
def test_overwrite_of_other_files_is_refused(name: str, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Before anything is read: the rows and the base do not exist."""
    config = run_config(data={"train": "absent.jsonl"}, model={"name_or_path": "./absent"})
    code, detail = HELD[name](tmp_path)
    before = everything(tmp_path)
    for more in ((), ("--dry-run",)):
        ran = cli("train", config, "--overwrite", *more)
        check_refused(ran, 2, (code, str(tmp_path / "out"), "output_dir"))
        assert ran.out == "" and detail in ran.err and ran.err.count("\n") == 1, ran.err
        assert code is not Code.OUTPUT_OVERWRITE or re.search("; move .*, or choose an", ran.err)
    assert everything(tmp_path) == before


def test_overwrite_replaces_the_files_of_an_adapter(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Including subdirectories, an edited card, and adapters of PEFT without a record."""
    config = run_config(training=ONE_STEP)
    adapter(tmp_path / "out", "additional_chat_templates/tool.jinja")
    assert cli("train", config, "--overwrite").code == 0
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    assert cli("train", config, "--overwrite").code == 0  # overwriting its own output
    for name in ("loratune.json", "run.yaml"):
        (tmp_path / "out" / name).unlink()
    assert cli("train", config, "--overwrite").code == 0
    (tmp_path / "empty").mkdir()
    assert cli("train", config, "--overwrite", "--set", f"output_dir={tmp_path / 'empty'}").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out", "rows.jsonl", "run.yaml"]


DROPPINGS = (
    ".DS_Store", "._adapter_config.json", "deeper/Thumbs.db", "desktop.ini", ".gitattributes",
    ".cache/huggingface/download/README.md.metadata", ".cache/huggingface/.gitignore",
)  # fmt: skip


def test_operating_system_files_do_not_block_overwrite(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Such as .DS_Store, which belongs neither to the user nor to the adapter."""
    for recorded in (True, False):
        out = adapter(tmp_path / "out", *(("deeper/words.txt",) if recorded else ()))
        for name in DROPPINGS:
            if recorded or not name.startswith("deeper"):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text("dropped")
        (out / ".cache" / "huggingface" / "upload").mkdir()
        if not recorded:
            (out / "loratune.json").unlink()
        ran = cli("train", run_config(training=ONE_STEP), "--overwrite")
        assert ran.code == 0, ran.err
        assert not {*DROPPINGS} & set(tree(tmp_path / "out")) and not (tmp_path / "out.partial").exists()
        for name in DROPPINGS:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("dropped")
        assert adapter_files.inspect(out).edits() == []
        shutil.rmtree(out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("dropped")
    assert cli("train", run_config(training=ONE_STEP), "--overwrite").code == 0


def test_all_tokenizer_file_names_of_transformers_are_known() -> None:
    """Unknown names left in the work directory would be treated as the user's files."""
    package = Path(transformers.models.__file__).parent
    named = re.compile(r'"([\w.-]+\.(?:json|txt|model|spm|bpe|codes|vocab))"')
    listed = re.compile(r"VOCAB_FILES_NAMES(?::[^=]*)? = \{(.*?)\}", re.DOTALL)
    found = {
        name
        for path in package.glob("*/tokenization*.py")
        for table in listed.findall(path.read_text(encoding="utf-8"))
        for name in named.findall(table)
    }
    assert len(found) > 15 and found - directories.ADAPTER_FILES == {"config.json"} & found


def test_run_can_be_repeated_from_the_run_yaml_it_replaces(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """The file has already been read when it is replaced."""
    assert cli("train", run_config(training=ONE_STEP)).code == 0
    out, config = tmp_path / "out", tmp_path / "out" / "run.yaml"
    before = tree(out)
    ran = cli("train", config)
    check_refused(ran, 2, (Code.OUTPUT_EXISTS, str(out), "output_dir"))
    assert ran.err.endswith("; choose another with --set output_dir=NEW, or replace it with --overwrite\n")
    assert ran.out == "" and ran.err.count("\n") == 1
    ran = cli("train", config, "--overwrite")
    assert ran.code == 0, ran.err
    assert tree(out)[WEIGHTS] == before[WEIGHTS]
    for name in ("mine.yaml", "run.yaml"):  # a file that no record lists, and one that the user edited
        (out / name).write_text(config.read_text() + "# precious\n")
        before = tree(out)
        ran = cli("train", out / name, "--overwrite")
        check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(out), "output_dir"))
        assert "(the config file" in ran.err
        assert tree(out) == before
        (out / "mine.yaml").unlink(missing_ok=True)


def test_current_directory_is_never_replaced(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    out = adapter(tmp_path / "out", "deeper/README.md")
    before = tree(tmp_path)
    for place, named in ((out, "."), (out / "deeper", ".."), (out / "deeper", str(out))):
        monkeypatch.chdir(place)
        ran = cli("train", config, "--overwrite", "--set", f"output_dir={named}")
        check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, named, "output_dir"))
    assert tree(tmp_path) == before


INPUTS = {
    "the config file": "run.yaml", "data.train": "train.jsonl", "data.validation": "held.jsonl",
    "data.test": "test.jsonl", "data.chat_template": "chat.jinja", "model.name_or_path": "base",
}  # fmt: skip


@pytest.mark.parametrize("through", ["", "link", "bind"])
@pytest.mark.parametrize("name", INPUTS)
def test_directory_with_inputs_is_never_replaced(
    name: str, through: str, cli: Cli, run_config: MakeConfig, tmp_path: Path, mounted: Callable[..., Path]
) -> None:
    """Even if its record lists the input, and if the input is given by another path."""
    out = adapter(tmp_path / "out", *(name for name in INPUTS.values() if name != "base"), "base/config.json")
    by = tmp_path / "other" if through else out
    if through == "link":
        by.symlink_to(out)
    elif through == "bind":
        mounted(by, again=out)
    place = str(by / INPUTS[name])
    sections = {
        "data.train": {"data": {"train": [place]}},
        "data.validation": {"data": {"validation": place}},
        "data.test": {"data": {"test": place}},
        "data.chat_template": {"data": {"chat_template": place}},
        "model.name_or_path": {"model": {"name_or_path": place}},
    }.get(name, {})
    config = run_config(**sections)
    if name == "the config file":
        config = Path(place)
        config.write_text((tmp_path / "run.yaml").read_text())
    before = tree(tmp_path)
    ran = cli("train", config, "--overwrite")
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(out), "output_dir"))
    assert f"({name}: {place})" in ran.err and "; choose another" in ran.err, ran.err
    assert tree(tmp_path) == before


def test_directory_searched_by_an_input_glob_is_never_replaced(
    cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    adapter(tmp_path / "out", "rows.jsonl")
    ran = cli("train", run_config(data={"train": str(tmp_path / "out" / "*.jsonl")}), "--overwrite")
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(tmp_path / "out"), "output_dir"))
    assert "(data.train: " in ran.err


def test_mount_points_are_never_replaced(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, mounted: Callable[..., Path]
) -> None:
    """An empty volume, one with an adapter, and one at the path of the work directory."""
    config = run_config()
    mounted(tmp_path / "empty volume")
    adapter(mounted(tmp_path / "full") / "in it")
    mounted(tmp_path / "out.partial")
    before = tree(tmp_path)
    for name, expected in {
        "empty volume": "is a mount point, so it cannot be replaced",
        "full": "is a mount point, so it cannot be replaced",
        "out": "is a mount point, so it cannot be replaced",
    }.items():
        for more in ((), ("--overwrite",)):
            ran = cli("train", config, "--set", f"output_dir={tmp_path / name}", *more)
            place = str(tmp_path / ("out.partial" if name == "out" else name))
            check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, place, "output_dir"))
            assert f": output_dir: {expected}" in ran.err, ran.err
            assert "name a directory inside it that does not exist yet" in ran.err
    assert tree(tmp_path) == before
    ran = cli("train", config, "--set", f"output_dir={tmp_path / 'full' / 'new'}")
    assert ran.code == 0, ran.err


def test_directory_without_write_permission_is_refused(tmp_path: Path) -> None:
    """Moving it needs permission, which is checked at the start. Tested as another user, as root may do anything."""
    if os.geteuid() != 0:
        pytest.skip("only root becomes someone else")
    out = adapter(tmp_path / "out")
    out.chmod(0o555)
    for place in tmp_path.parents:
        if not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    if not (child := os.fork()):
        try:
            os.setuid(12345)
            run_dir.check(str(out), resume=False, overwrite=True)
        except ConfigError as error:
            os._exit(7 if meanings(error) == [(Code.OUTPUT_UNUSABLE, str(out), "output_dir")] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# Files that appear during a run


def test_files_added_to_the_old_adapter_during_a_run_are_kept(
    processes: ForkServer, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    """The work is also kept. Once the old adapter is moved away, the run can be completed."""
    config = run_config(training={"max_steps": 3, "save_steps": 2})
    thesis = adapter(tmp_path / "out") / "thesis.txt"
    child = processes.start("train", config, "--overwrite", first=before_batch(2, f"open('{thesis}', 'w').close()"))
    assert child.wait() == 2
    (error,) = [line for line in child.said().splitlines() if line.startswith("error")]
    before = tree(tmp_path / "out")
    assert sorted(before) == ["README.md", "adapter_config.json", WEIGHTS, "loratune.json", "thesis.txt"]
    problem = Code.OUTPUT_OVERWRITE, str(tmp_path / "out"), "output_dir"
    assert is_problem(problem_text(error), problem) and "also holds thesis.txt, " in error, error
    assert error.endswith("; move or delete these files, and continue with --resume")
    ran = cli("train", config, "--resume")
    check_refused(ran, 2, problem)
    assert "also holds thesis.txt, " in ran.err
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    assert not (tmp_path / "out.partial").exists() and tree(tmp_path / "elsewhere") == before


def test_file_added_while_the_old_adapter_is_moved_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It appears after the last check of the directory, just as it is moved."""
    out = adapter(tmp_path / "out")
    directory = run_dir.check(str(out), resume=False, overwrite=True)
    move = Path.rename

    def late(path: Path, target: Path) -> Path:
        if path == out:
            (out / "thesis.txt").write_text("precious")
        return move(path, target)

    with pytest.raises(ConfigError, match="thesis") as caught, directory.locked():
        directory.prepare(resume=False)
        (directory.checkpoints / "checkpoint-1").mkdir()
        adapter(directory.staging)
        monkeypatch.setattr(Path, "rename", late)
        directory.publish()
    assert meanings(caught.value) == [(Code.OUTPUT_OVERWRITE, str(out), "output_dir")]
    assert (out / "thesis.txt").read_text() == "precious" and (out / "README.md").exists()
    assert directory.checkpoints.is_dir() and not directory.staging.exists() and not directory.replaced.exists()


def test_removal_spares_files_that_no_record_lists(tmp_path: Path) -> None:
    out = adapter(tmp_path / "out", "deeper/words.txt", "deeper/more.txt")
    whole = adapter(tmp_path / "whole", "deeper/words.txt")
    assert directories.remove_own(whole, directories.scan_recorded(whole))
    (out / "deeper" / "thesis.txt").write_text("precious")
    assert not directories.remove_own(out, directories.scan_recorded(out))
    assert tree(out) == {"deeper/thesis.txt": b"precious"}


def test_foreign_file_in_the_work_directory_is_kept_on_publishing(tmp_path: Path) -> None:
    with run_dir.check(str(tmp_path / "out"), resume=False, overwrite=False).locked() as directory:
        directory.prepare(resume=False)
        (directory.partial / "thesis.txt").write_text("precious")
        adapter(directory.staging)
        directory.publish()
    assert (tmp_path / "out" / WEIGHTS).is_file()
    assert tree(directory.partial) == {"thesis.txt": b"precious"}


THEIRS = (
    "adapter/notes.txt", "adapter/deeper/", "checkpoints/notes.txt", "checkpoints/best-so-far/adapter_config.json",
    "checkpoints/checkpoint-5-good/optimizer.pt", "checkpoints/checkpoint-5/notes.txt", "checkpoints/empty/",
    "checkpoints/unfinished/notes.txt", "replaced/notes.txt", "notes/",
)  # fmt: skip


def put(place: Path, name: str) -> None:
    if name.endswith("/"):
        (place / name).mkdir(parents=True)
    else:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("precious")


def test_work_directory_with_foreign_files_is_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """They used to be deleted by the first run, even by one that failed immediately."""
    config = run_config(data={"train": "absent.jsonl"})
    for name in THEIRS:
        put(tmp_path / "out.partial", name)
        before = everything(tmp_path)
        for more in ((), ("--overwrite",), ("--resume",)):
            ran = cli("train", config, *more)
            check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(tmp_path / "out"), "output_dir"))
            assert ran.err.count("\n") == 1, (name, ran.err)
            assert ": out.partial, " in ran.err and f" holds {name.partition('/')[0]}" in ran.err, ran.err
        assert everything(tmp_path) == before
        shutil.rmtree(tmp_path / "out.partial")


@pytest.mark.parametrize("how", ["published", "left", "begun anew"])
def test_files_added_to_the_work_directory_during_a_run_are_kept(how: str, tmp_path: Path) -> None:
    """Only files that the run created are removed."""
    with run_dir.check(str(tmp_path / "out"), resume=False, overwrite=False).locked() as directory:
        directory.prepare(resume=False)
        adapter(directory.staging)
        names = ("adapter/notes/", *THEIRS[2:-1]) if how == "published" else THEIRS[:-2]
        for name in ("checkpoints/unfinished/checkpoint-3/optimizer.pt", "checkpoints/checkpoint-5/run.json", *names):
            put(directory.partial, name)
        if how == "published":
            (directory.staging / "notes").rmdir()
            left = directory.publish()
            assert directory.partial / "replaced" / "notes.txt" in left
        elif how == "begun anew":
            with pytest.raises(ConfigError) as caught:
                directory.prepare(resume=False)
            assert meanings(caught.value) == [(Code.OUTPUT_UNUSABLE, str(directory.partial), "output_dir")]
        else:
            directory.remove_checkpoints()
    kept = {
        name for name in everything(directory.partial) if (directory.partial / name).is_file() or f"{name}/" in names
    }
    assert kept - {"lock"} == {name.rstrip("/") for name in names if name != "adapter/notes/"}


def test_foreign_file_left_in_the_work_directory_is_reported(
    processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    kept = tmp_path / "out.partial" / "checkpoints" / "notes.txt"
    config = run_config(training={"max_steps": 3, "save_steps": 1})
    child = processes.start("train", config, first=before_batch(3, f"open('{kept}', 'w').write('precious')"))
    assert child.wait() == 0
    assert f"{kept} is kept: this run did not write it" in child.said()
    assert kept.read_text() == "precious"


# Links, named pipes, and files at the paths of directories


def test_link_at_the_path_of_the_work_directory_is_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    config = run_config()
    before = everything(tmp_path)
    for more in ((), ("--overwrite",), ("--resume",)):
        ran = cli("train", config, *more)
        check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(tmp_path / "out"), "output_dir"))
        assert ran.out == "" and ran.err.count("\n") == 1 and ": out.partial, " in ran.err and "is a link," in ran.err
    assert everything(tmp_path) == before


@pytest.fixture
def interrupted(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> Path:
    """The config of a run that was stopped with a checkpoint."""
    config = run_config(training={"num_train_epochs": 2, "save_steps": 1000})
    child = processes.start("train", config, first=before_batch(2, "signal.raise_signal(signal.SIGINT)"))
    assert child.wait() == 130, child.said()
    assert len(checkpoints(tmp_path / "out.partial")) == 1
    return config


ODD: dict[str, Callable[[Path, Path], Any]] = {
    "a file": lambda place, outside: place.write_text("mine"),
    "a link": lambda place, outside: place.symlink_to(outside),
    "a named pipe": lambda place, outside: os.mkfifo(place),
    "a directory": lambda place, outside: place.mkdir(),
}


def test_unexpected_file_types_in_the_work_directory_are_refused(interrupted: Path, cli: Cli, tmp_path: Path) -> None:
    """Each type under each name, in a single test, as each command takes only a moment."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "thesis.txt").write_text("precious")
    partial = tmp_path / "out.partial"
    names = ("checkpoints", "adapter", "replaced", "checkpoints/unfinished", "checkpoints/checkpoint-7", "lock")
    for name in (*names, "may_replace"):
        right = "a file" if name in ("lock", "may_replace") else "a directory"
        place, aside = partial / name, tmp_path / "aside"
        if place.exists():
            place.rename(aside)
        for kind, make in ODD.items():
            if kind == right:
                continue
            make(place, tmp_path / "outside")
            before = everything(tmp_path)
            for more in ("--resume", "--overwrite"):
                ran = cli("train", interrupted, more)
                check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(tmp_path / "out"), "output_dir"))
                assert ran.out == "" and ran.err.count("\n") == 1 and f"holds {name}, which no run made" in ran.err
            assert everything(tmp_path) == before
            place.rmdir() if kind == "a directory" else place.unlink()
        if aside.exists():
            aside.rename(place)
    ran = cli("train", interrupted, "--resume", "--set", "training.num_train_epochs=1")
    assert ran.code == 7 and "training.num_train_epochs" in ran.err  # the run is unchanged


# Names that are not UTF-8


def test_non_utf8_working_directory_is_refused(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name could not be recorded, which is reported at the start."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.mkdir()
    monkeypatch.chdir(odd)
    config = run_config(data={"train": "rows.jsonl"}, output_dir="out")
    shutil.copy(tmp_path / "rows.jsonl", odd)
    ran = cli("train", config)
    assert ran.code == 2 and ": output_dir: the path is not UTF-8, so it could not be recorded; " in ran.err
    assert [path.name for path in odd.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("by", ["", "*.jsonl"])
def test_rows_are_read_from_a_file_with_a_non_utf8_name(
    by: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    config = run_config(data={"train": str(tmp_path / "rows" / by)}, training=ONE_STEP)
    source = Path(yaml.safe_load(run_config("other.yaml").read_text())["data"]["train"])
    shutil.copy(source, os.fsdecode(os.fsencode(tmp_path / "rows") + b"/\xff.jsonl"))
    ran = cli("train", config)
    assert ran.code == 0, ran.err
