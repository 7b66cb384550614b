"""The cache: entries are replaced as a whole, are never those of somebody else or of another key, and do not pile up.

The tests are of results of checks; those of other kinds are in test_token_cache.py and test_library.py."""

import errno
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import pytest

from loratune.compare.base_results import NUMBERS
from loratune.system import cache
from loratune.system.cache import REFUSAL, KeptResults, keeping_in

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_results_are_kept_with_any_umask(mask: int, kept: Path) -> None:
    before = os.umask(mask)
    try:
        results = KeptResults("a")
        assert results.store({"a": 1}) == ""
    finally:
        os.umask(before)
    assert results.load() == {"a": 1}
    assert [path.stat().st_mode & 0o777 for path in (kept, *kept.iterdir())] == [0o700, 0o600]


NAMES: dict[str, Callable[[Path], Any]] = {
    "thesis.txt": Path.touch,
    "run1.json": Path.touch,
    f"{HEX}.txt": Path.touch,
    f"{HEX.upper()}.json": Path.touch,
    f"{HEX[:-1]}.json": Path.touch,
    HEX[:32]: Path.touch,
    "folder": Path.mkdir,
    f"{HEX}.json": Path.mkdir,
    "dangling": lambda path: path.symlink_to("/nonexistent/x"),
    f"{'0' * 64}.json": lambda path: path.symlink_to("/nonexistent/x"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("name", NAMES)
def test_only_own_old_files_are_removed(name: str, kept: Path) -> None:
    kept.mkdir(mode=0o700)
    NAMES[name](kept / name)
    os.utime(kept / name, (1, 1), follow_symlinks=False)
    for own in (f"{'1' * 64}.json", f".{'2' * 64}.json.{HEX[:12]}.unfinished"):
        (kept / own).touch()
        os.utime(kept / own, (1, 1))
    assert KeptResults("a").store({"a": 1}) == "" and KeptResults("a").load() == {"a": 1}
    assert len([*kept.iterdir()]) == 2 and os.path.lexists(kept / name)


def test_the_least_recently_used_of_too_many_are_removed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RESULTS", replace(cache.RESULTS, most=2))
    now = time.time()
    for number, name in enumerate("abc"):
        KeptResults(name).store({name: 1})
        os.utime(kept / f"{KeptResults(name).key}.json", (now - 100 + number, now - 100 + number))
    assert KeptResults("a").load() == {"a": 1}  # which is a use
    KeptResults("d").store({"d": 1})
    assert [name for name in "abcd" if KeptResults(name).load()] == ["a", "c", "d"]


def test_results_on_a_read_only_file_system_are_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    KeptResults("a").store({"a": 1})
    monkeypatch.setattr(os, "utime", read_only)
    assert KeptResults("a").load() == {"a": 1}


def test_results_survive_a_full_disk(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    results = KeptResults("a")
    results.store({"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in results.store({"a": 2}) and results.load() == {"a": 1}
    assert results.once("b", int, lambda: 3) == 3 and len([*kept.iterdir()]) == 1


def test_a_link_in_the_place_of_results_is_replaced(kept: Path, tmp_path: Path) -> None:
    results = KeptResults("a")
    results.store({"a": 1})
    (path,) = kept.iterdir()
    for target in (tmp_path / "missing", tmp_path / "precious"):
        path.unlink()
        path.symlink_to(target)
        assert results.load() == {} and results.store({"a": 2}) == "" and results.load() == {"a": 2}
        (tmp_path / "precious").write_text('{"a": 3}')
    assert (tmp_path / "precious").read_text() == '{"a": 3}' and not (tmp_path / "missing").exists()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a digit of a value": lambda content: content.replace(b"2:a5", b"2:a7"),
    "a name": lambda content: content.replace(b"print", b"prinz"),
    "no digest": lambda content: b'{"fingerprint": "2:a5"}',
    "cut": lambda content: content[:-1],
    "a byte more": lambda content: content + b" ",
    "a digest alone": lambda content: content[-32:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_not_kept(damage: str, kept: Path) -> None:
    results = KeptResults("a")
    results.store({"fingerprint": "2:a5"})
    (path,) = kept.iterdir()
    content = path.read_bytes()
    assert DAMAGE[damage](content) != content
    path.write_bytes(DAMAGE[damage](content))
    assert results.load() == {}
    assert results.once("fingerprint", str, lambda: "2:a5") == "2:a5" and path.read_bytes() == content


def test_a_named_pipe_does_not_block(kept: Path) -> None:
    KeptResults("a").store({"a": 1})
    (path,) = kept.iterdir()
    path.unlink()
    os.mkfifo(path)
    assert KeptResults("a").load() == {} and KeptResults("a").store({"a": 1}) == "" and path.is_file()


def test_numbers_that_cannot_be_written_leave_no_files(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with keeping_in(tmp_path / "numbers"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            assert NUMBERS.write(HEX, bytes(8192)) == "File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [*(tmp_path / "numbers").iterdir()] == [] and NUMBERS.read(HEX) is None
        assert NUMBERS.write(HEX, bytes(8192)) == "" and NUMBERS.read(HEX) == bytes(8192)


def test_results_of_something_else_are_not_kept(kept: Path) -> None:
    KeptResults("a").store({"a": 1})
    (path,) = kept.iterdir()
    KeptResults("b").store({"a": 2})
    (other,) = {*kept.iterdir()} - {path}
    other.write_bytes(path.read_bytes())
    assert KeptResults("b").load() == {} and KeptResults("a").load() == {"a": 1}


@pytest.mark.parametrize("place", ["directory", "file"])
@pytest.mark.parametrize("problem", ["belongs to another user", "can be written to by others", "is a link"])
def test_what_others_could_have_written_is_not_used(problem: str, place: str, kept: Path, tmp_path: Path) -> None:
    results = KeptResults("a")
    assert results.store({"a": 1}) == "" and results.load() == {"a": 1}
    changed = kept if place == "directory" else next(kept.iterdir())
    if problem == "is a link":
        changed.rename(tmp_path / "moved")
        changed.symlink_to(tmp_path / "moved")
    elif problem.startswith("can"):
        changed.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(changed, 4242, -1)
    else:
        pytest.skip("only root can give a directory to another user")
    assert results.load() == {}
    assert results.store({"a": 2}) == (f"{changed} {problem}" if place == "directory" else "")
    assert results.once("a", int, lambda: 3) == (3 if place == "directory" else 2)


@pytest.mark.parametrize("variable", ["/elsewhere", "relative", ""])
def test_the_cache_is_where_xdg_says(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    expected = Path(variable) if variable == "/elsewhere" else Path.home() / ".cache"
    assert cache.cache_directory() == expected / "loratune"


def test_without_a_home_directory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache, "RESULTS", replace(cache.RESULTS, place=missing))
    assert KeptResults("a").store({"a": 1}) == "Could not determine home directory." and KeptResults("a").load() == {}


TYPES: list[tuple[type | UnionType, Any, tuple[Any, ...]]] = [
    (str, "2:a", (None, 1, ["2:a"], {})),
    (NoneType, None, ("", False, [])),
    (list, ["norms"], (None, "norms", {"equal": ["norms"]})),
    (REFUSAL, None, (False, 1, [], {})),
    (REFUSAL, "mixes rows", (False, 1, [], {})),
]


@pytest.mark.parametrize(("kind", "value", "others"), TYPES)
def test_a_value_of_another_type_is_not_kept(
    kind: type | UnionType, value: Any, others: tuple[Any, ...], kept: Path
) -> None:
    results = KeptResults("a")
    for wrong in others:
        results.store({"a": wrong, "b": 1})
        assert results.once("a", kind, lambda: value) == value
        assert results.load() == {"a": value, "b": 1}
        assert results.once("a", kind, lambda: 1 / 0) == value


def test_what_is_kept_while_another_result_is_computed_stays(kept: Path) -> None:
    results = KeptResults("a")
    assert results.once("a", str, lambda: KeptResults("a").store({"b": 1}) or "x") == "x"
    assert results.load() == {"a": "x", "b": 1}


def test_readers_see_whole_results_while_others_write(kept: Path) -> None:
    def write(name: str) -> None:
        for _ in range(30):
            KeptResults(name).store({"a": "x" * 5000})

    for name in ("a", "b", "c"):
        KeptResults(name).store({"a": "x" * 5000})
    writers = [threading.Thread(target=write, args=(name,)) for name in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert all(KeptResults(name).load() == {"a": "x" * 5000} for name in ("a", "b", "c"))


def test_elsewhere_nothing_is_known_of_what_was_kept_before(kept: Path, tmp_path: Path) -> None:
    results = KeptResults("a")
    results.store({"a": 1})
    with keeping_in(tmp_path / "other"):
        assert results.load() == {}
        assert results.once("a", int, lambda: 2) == 2
        assert results.load() == {"a": 2}
    assert results.load() == {"a": 1}
