"""Files that commands write to a user-given path: complete or absent, and never replacing inputs."""

import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, Process, check_refused, config_in, meanings, run_command, tree, write_rows
from running import Cli

from loratune.codes import Code
from loratune.errors import ConfigError, Problem, ResourceError
from loratune.system import output_file
from loratune.system.output_file import Output
from loratune.text import one_line


def output(path: Path | str, *inputs: Path, overwrite: bool = False) -> Output:
    return output_file.output(Path(path), "--output", overwrite=overwrite, inputs=inputs)


def refused(code: Code, path: Path | str, *inputs: Path, overwrite: bool = False) -> Problem:
    """The only problem of a refused path, which must have this code."""
    with pytest.raises(ConfigError) as error:
        output(path, *inputs, overwrite=overwrite)
    assert meanings(error.value) == [(code, str(path), "--output")]
    return error.value.problems[0]


def write(path: Path | str, text: str = "new\n", *inputs: Path, overwrite: bool = False) -> None:
    with output(path, *inputs, overwrite=overwrite).opened() as file:
        file.write(text)


def test_new_file_appears_only_when_complete(tmp_path: Path) -> None:
    with output(tmp_path / "a.txt").opened() as file:
        file.write("half")
        file.flush()
        (unfinished,) = tmp_path.iterdir()
        assert re.fullmatch(r"\.a\.txt\.[0-9a-f]{12}\.unfinished", unfinished.name)
    assert tree(tmp_path) == {"a.txt": b"half"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_mode_follows_the_umask_or_the_replaced_file(umask: int, tmp_path: Path) -> None:
    """A new file's mode follows the umask. A replaced file keeps its mode."""
    (tmp_path / "old").touch()
    (tmp_path / "old").chmod(0o640)
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
        write(tmp_path / "old", overwrite=True)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old")] == [0o666 & ~umask, 0o640]


def test_existing_file_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("precious")
    problem = refused(Code.OUTPUT_EXISTS, tmp_path / "a.txt")
    assert "`overwrite=True`" in problem.fix
    assert tree(tmp_path) == {"a.txt": b"precious"}
    write(tmp_path / "a.txt", overwrite=True)
    assert tree(tmp_path) == {"a.txt": b"new\n"}


def same(path: Path) -> Path:
    return path


def link(path: Path) -> Path:
    path.with_name("link").symlink_to(path)
    return path.with_name("link")


def hard_link(path: Path) -> Path:
    os.link(path, path.with_name("hard"))
    return path.with_name("hard")


def around(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


@pytest.mark.parametrize("by", [same, link, hard_link, around])
@pytest.mark.parametrize("as_input", ["file", "directory", "glob"])
def test_input_files_are_never_overwritten(by: Callable[[Path], Path], as_input: str, tmp_path: Path) -> None:
    path = tmp_path / "rows" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("precious")
    read = {"file": path, "directory": path.parent, "glob": path.parent / "*.jsonl"}[as_input]
    named = by(path)
    problem = refused(Code.OUTPUT_UNUSABLE, named, read, overwrite=True)
    assert problem.what == f"is, or belongs to, an input ({read})"
    if as_input == "directory":
        for new in (path.with_name("b.jsonl"), path.parent / "deeper" / ".." / "b.jsonl"):
            (path.parent / "deeper").mkdir(exist_ok=True)
            problem = refused(Code.OUTPUT_UNUSABLE, new, read)
            assert problem.what == f"lies in an input ({read})"
    else:
        assert output(path.with_name("b.jsonl"), read).path.name == "b.jsonl"
    with pytest.raises(ConfigError) as error:
        output(named, overwrite=True).reading(read)
    assert meanings(error.value) == [(Code.OUTPUT_UNUSABLE, str(named), "--output")]


@pytest.mark.parametrize("read", ["~/rows/a.jsonl", "~/rows", "~/rows/*.jsonl"])
def test_inputs_given_with_a_tilde_are_never_overwritten(
    read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("precious")
    problem = refused(Code.OUTPUT_UNUSABLE, tmp_path / "rows" / "a.jsonl", Path(read), overwrite=True)
    assert problem.what == f"is, or belongs to, an input ({read})"


def test_planted_symlinks_are_not_followed(tmp_path: Path) -> None:
    """Neither under the old, predictable temporary name nor under a guessed random one, as temporary files are always
    new."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".a.txt.unfinished").symlink_to(tmp_path / "victim")
    write(tmp_path / "a.txt")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / ".a.txt.unfinished").is_symlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda _: "0" * 12)
        (tmp_path / f".b.txt.{'0' * 12}.unfinished").symlink_to(tmp_path / "victim")
        with pytest.raises(ConfigError, match="File exists") as error:
            write(tmp_path / "b.txt")
        assert meanings(error.value) == [(Code.OUTPUT_UNUSABLE, str(tmp_path / "b.txt"), "--output")]
    assert (tmp_path / "victim").read_text() == "precious"


def test_output_symlink_is_kept_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(Path("there", "target"))
    problem = refused(Code.OUTPUT_UNUSABLE, tmp_path / "first", overwrite=True)
    assert "No such file or directory" in problem.what
    assert not (tmp_path / "there" / "target").exists()
    (tmp_path / "there" / "target").write_text("old")
    write(tmp_path / "first", overwrite=True)
    assert (tmp_path / "there" / "target").read_text() == "new\n" and (tmp_path / "first").is_symlink()
    refused(Code.OUTPUT_EXISTS, tmp_path / "first")
    (tmp_path / "round").symlink_to("round")
    problem = refused(Code.OUTPUT_UNUSABLE, tmp_path / "round")
    assert "Too many levels of symbolic links" in problem.what


def test_failed_write_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("precious")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        for name in ("new", "old"):
            with pytest.raises(error), output(tmp_path / name, overwrite=True).opened() as file:
                file.write("half")
                raise error
    assert tree(tmp_path) == {"old": b"precious"}


def test_file_that_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    """The result is not lost either. With overwrite, a file is replaced, but a directory is not."""
    with pytest.raises(ConfigError, match="already exists") as error, output(tmp_path / "a.txt").opened() as file:
        file.write("new")
        (tmp_path / "a.txt").write_text("precious")
    assert meanings(error.value) == [(Code.OUTPUT_UNUSABLE, str(tmp_path / "a.txt"), "--output")]
    assert (tmp_path / "a.txt").read_text() == "precious"
    kept = re.search(r"is kept in (.*unfinished)$", str(error.value))
    assert kept is not None and Path(kept[1]).read_text() == "new"
    with output(tmp_path / "b.txt", overwrite=True).opened() as file:
        (tmp_path / "b.txt").write_text("of another")
        file.write("new")
    assert (tmp_path / "b.txt").read_text() == "new"
    with (
        pytest.raises(ConfigError, match="is a directory") as error,
        output(tmp_path / "c.txt", overwrite=True).opened(),
    ):
        (tmp_path / "c.txt").mkdir()
    assert meanings(error.value) == [(Code.OUTPUT_UNUSABLE, str(tmp_path / "c.txt"), "--output")]


def test_exclusive_creation_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT file systems."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "a.txt")
    assert tree(tmp_path) == {"a.txt": b"new\n"}
    target = output(tmp_path / "b.txt")
    monkeypatch.setattr(Output, "check", lambda _: (tmp_path / "b.txt").write_text("precious"))
    monkeypatch.setattr(output_file, "kind", lambda _: "")
    with pytest.raises(ConfigError, match="File exists") as error, target.opened() as file:
        file.write("new")
    assert meanings(error.value) == [(Code.OUTPUT_UNUSABLE, str(tmp_path / "b.txt"), "--output")]
    assert (tmp_path / "b.txt").read_text() == "precious"


def test_concurrent_writers_never_mix_their_content(tmp_path: Path) -> None:
    """Processes write to one path line by line. The file is from exactly one of them, even if all may overwrite."""
    script = (
        "import sys, time; from pathlib import Path; from loratune.system import output_file\n"
        "from loratune.errors import ConfigError\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    place = output_file.output(Path(sys.argv[1]), '--output', overwrite=sys.argv[2] == 'over')\n"
        "    with place.opened() as file:\n"
        "        for number in range(200):\n"
        "            print(sys.argv[3], number, file=file, flush=True)\n"
        "except ConfigError: sys.exit(2)\n"
    )
    for how in ("over", "not"):
        path = tmp_path / how
        command = [sys.executable, "-c", script, str(path), how]
        running = [Process([*command, str(n)], stdin=subprocess.PIPE, text=True) for n in range(6)]
        for child in running:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        codes = [child.wait() for child in running]
        assert sorted(codes) == ([0] * 6 if how == "over" else [0] + [2] * 5)
        lines = path.read_text().splitlines()
        assert lines == [f"{lines[0].split()[0]} {number}" for number in range(200)]
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".over")] == []


# Devices, pipes and open files, which are written directly


def test_devices_and_pipes_can_be_written(tmp_path: Path) -> None:
    write("/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(ResourceError) as error:
        write("/dev/full")
    assert meanings(error.value) == [(Code.SYSTEM_DISK_FULL, "/dev/full", "--output")]
    assert error.value.problems[0].fix == "make room"
    os.mkfifo(tmp_path / "pipe")
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe", "through a pipe")
    reader.join(60)
    assert received == ["through a pipe"] and [one.name for one in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "LINK"])
def test_open_files_are_written_at_their_current_position(name: str, tmp_path: Path) -> None:
    """Whether they are files or pipes."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    path = str(tmp_path / "link") if name == "LINK" else name
    script = (
        "import os, sys; from pathlib import Path; from loratune.system import output_file\n"
        "os.write(1, b'before\\n')\n"
        "place = output_file.output(Path(sys.argv[1]), '--output', overwrite=False)\n"
        "with place.opened() as file: print('new', file=file)\n"
        "os.write(1, b'behind\\n')\n"
    )
    command = [sys.executable, "-c", script, path]
    assert run_command(command, capture_output=True, check=True).stdout == b"before\nnew\nbehind\n"
    with (tmp_path / "file").open("w") as file:
        run_command(command, stdout=file, check=True)
    assert (tmp_path / "file").read_text() == "before\nnew\nbehind\n"


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    reading = os.open("/dev/null", os.O_RDONLY)
    os.close(closed := os.dup(reading))
    for path, code, detail in (
        (str(tmp_path), Code.OUTPUT_UNUSABLE, ""),
        (str(tmp_path / "socket"), Code.OUTPUT_UNUSABLE, "is a socket"),
        (str(tmp_path / "absent" / "a.txt"), Code.OUTPUT_UNUSABLE, str(tmp_path / "absent")),
        (str(tmp_path / ("x" * 300)), Code.OUTPUT_UNUSABLE, "File name too long"),
        ("a\0b", Code.OUTPUT_UNUSABLE, "embedded null byte"),
        (f"/dev/fd/{reading}", Code.OUTPUT_UNUSABLE, "not open"),
        (f"/dev/fd/{closed}", Code.OUTPUT_UNUSABLE, "not open"),
    ):
        problem = refused(code, path, overwrite=True)
        assert detail in problem.what
        assert str(problem).startswith(f"{one_line(path)}: --output: ")
    os.close(reading)


def test_longest_file_name_and_text_that_is_not_utf8(tmp_path: Path) -> None:
    """The longest allowed name, and a lone surrogate, which is written as a JSON escape."""
    name = "ä" * 125 + ".json"
    write(tmp_path / name, "\udcff")
    assert (tmp_path / name).read_bytes() == rb"\udcff"


def test_full_disk_leaves_the_old_output_unchanged(tmp_path: Path) -> None:
    """File sizes are limited to 1,000 bytes. The incomplete file is removed."""
    script = (
        "import resource, sys; from pathlib import Path; from loratune.system import output_file\n"
        "from loratune.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with output_file.output(Path(sys.argv[1]), '--output', overwrite=True).opened() as file:\n"
        "        file.write('x' * 5000)\n"
        "except ResourceError as error: sys.exit(error.exit_code)\n"
    )
    (tmp_path / "old").write_text("precious")
    for name in ("new", "old"):
        assert run_command([sys.executable, "-c", script, str(tmp_path / name)], check=False).returncode == 8
    assert tree(tmp_path) == {"old": b"precious"}


def test_an_interrupt_just_after_the_creation_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes before the new file is in use."""
    create = os.open

    def interrupted(path: Any, *args: Any) -> int:
        os.close(create(path, *args))
        assert list(tmp_path.iterdir()) == [path]
        raise KeyboardInterrupt

    made = output(tmp_path / "answers.jsonl")
    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), made.opened():
        pass
    assert list(tmp_path.iterdir()) == []


# What adapters are made of


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Cli) -> Path:
    """An adapter whose rows are a file, a directory and a glob."""
    folder = tmp_path_factory.mktemp("adapter")
    model = shutil.copytree(tiny_dir, folder / "model")
    (folder / "validation").mkdir()
    for name in ("chat.jsonl", "validation/rows.jsonl", "test-1.jsonl"):
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": "a"}]
        write_rows(folder / name, [{"messages": turns}] * 8)
    (folder / "template.jinja").write_text(CHAT_TEMPLATE)
    data = {
        "train": "chat.jsonl",
        "validation": "validation",
        "test": "test-*.jsonl",
        "chat_template": "template.jinja",
    }
    data = {key: str(folder / name) for key, name in data.items()}
    ran = cli("train", config_in(folder, model)(data=data, training={"max_steps": 1}), "--allow-worse")
    assert ran.code == 0, ran.err
    return folder / "out"


COMMANDS: dict[str, tuple[str, ...]] = {
    "report": (),
    "generate": ("--input", "missing.jsonl"),
    "evaluate": ("--data", "missing.jsonl"),
}
MADE_OF = ("chat.jsonl", "validation/rows.jsonl", "test-1.jsonl", "template.jinja", "model/model.safetensors")


@pytest.mark.parametrize("by", [same, link, hard_link, around])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_an_adapter_was_made_of_is_never_overwritten(
    command: str, by: Callable[[Path], Path], adapter: Path, cli: Cli
) -> None:
    """Even by a command that does not read it. This is checked before the command reads rows."""
    for name in MADE_OF:
        named, before = by(adapter.parent / name), tree(adapter.parent)
        ran = cli(command, "--adapter", adapter, *COMMANDS[command], "--output", named, "--overwrite")
        check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(Path(named)), "--output"))
        assert tree(adapter.parent) == before
        if by in (link, hard_link):
            named.unlink()


def test_nothing_is_written_into_an_adapter_directory(tmp_path: Path) -> None:
    """Also of an adapter that the command does not read."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("card")
    for name in ("README.md", "new.jsonl", "adapter_config.json"):
        assert "lies in an adapter directory" in refused(Code.OUTPUT_UNUSABLE, tmp_path / name, overwrite=True).what


@pytest.mark.parametrize("begins", ["{", output_file.HTML])
def test_only_a_file_of_the_same_kind_is_replaced(begins: str, tmp_path: Path) -> None:
    """A config is in no record of its adapter, so nothing else would protect it from a mistyped name."""
    for number, text in enumerate(("", begins, f"{begins} and more\n")):
        path = tmp_path / str(number)
        path.write_text(text)
        output_file.output(path, "--output", overwrite=True, begins=begins)
    for name, content in {"run.yaml": b"model:\n", "cut.html": b"<!DOC", "model": b"\xff\x00", "page": b" \n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            output_file.output(tmp_path / name, "--output", overwrite=True, begins=begins)
        assert meanings(caught.value) == [(Code.OUTPUT_UNUSABLE, str(tmp_path / name), "--output")]
        assert "another kind of file" in caught.value.problems[0].what


def test_outputs_may_be_beside_the_rows_of_an_adapter(adapter: Path, cli: Cli) -> None:
    """Even in a directory of rows: who trains on the rows of the working directory writes results there."""
    page = adapter.parent / "validation" / "page.html"
    ran = cli("report", "--adapter", adapter, "--output", page)
    assert ran.code == 0 and page.is_file(), ran.err
    page.unlink()


def test_errors_about_a_mixture_name_what_was_given(adapter: Path, cli: Cli, tmp_path: Path) -> None:
    """And not the directory in which it is made. The base has been moved away."""
    copy, base = shutil.copytree(adapter, tmp_path / "copy"), adapter.parent / "model"
    base.rename(moved := base.with_name("moved"))
    try:
        mixed = ("--adapter", f"a={adapter}", "--adapter", f"b={copy}", "--mix", "a:0.5,b:0.5")
        ran = cli("export", *mixed, "--to", "peft", "--output", tmp_path / "out")
    finally:
        moved.rename(base)
    assert ran.code == 3 and str(adapter / "adapter_config.json") in ran.err, ran.err
    assert tempfile.gettempdir() not in ran.err.replace(str(tmp_path), "").replace(str(adapter.parent), "")
