"""Results of checks in the cache directory: replaced as a whole, never another's, never of the wrong type."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import pytest

from loratune.system import kept_results
from loratune.system.kept_results import REFUSAL, KeptResults, keeping_in

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
    for own in (f"{'1' * 64}.json", f"{'2' * 64}.json.{HEX[:32]}"):
        (kept / own).touch()
        os.utime(kept / own, (1, 1))
    assert KeptResults("a").store({"a": 1}) == "" and KeptResults("a").load() == {"a": 1}
    assert len([*kept.iterdir()]) == 2 and os.path.lexists(kept / name)


def test_old_files_in_the_place_of_a_linked_cache_are_removed_by_name_only(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other" / "results").mkdir(parents=True)
    (own := tmp_path / "other" / "results" / "run1.json").write_text("1")
    os.utime(own, (1, 1))
    (tmp_path / "link").symlink_to(tmp_path / "other")
    monkeypatch.setattr(kept_results, "directory", lambda: tmp_path / "link" / "results")
    assert KeptResults("a").store({"a": 1}) == "" and own.exists()


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
    "a lone surrogate": lambda content: content.replace(b"2:a5", rb"2:\ud800"),
    "a name": lambda content: content.replace(b"print", b"prinz"),
    "the digest": lambda content: content.replace(b'"sha256": "', b'"sha256": "0')[:-3] + b'"}',
    "no digest": lambda content: content[: content.index(b', "sha256"')] + b"}",
    "results alone": lambda content: b'{"fingerprint": "2:a5"}',
    "cut": lambda content: content[:-1],
    "a byte more": lambda content: content + b" ",
    "another key twice": lambda content: content.replace(b'{"results"', b'{"results": {}, "results"'),
    "a list": lambda content: b"[" + content + b"]",
    "a number": lambda content: b"1",
    "no object": lambda content: content.replace(b'{"fingerprint": "2:a5"}', b"null"),
    "deep": lambda content: b"[" * 100_000,
    "bytes": lambda content: b"\xff" + content,
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


def test_results_of_something_else_are_not_kept(kept: Path) -> None:
    KeptResults("a").store({"a": 1})
    (path,) = kept.iterdir()
    KeptResults("b").store({"a": 2})
    (other,) = {*kept.iterdir()} - {path}
    other.write_bytes(path.read_bytes())
    assert KeptResults("b").load() == {} and KeptResults("a").load() == {"a": 1}


@pytest.mark.parametrize("place", ["results", "loratune"])
@pytest.mark.parametrize("problem", ["belongs to another user", "can be written to by others"])
def test_nothing_is_kept_where_another_user_can_write(
    problem: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the directory above, in which they could put another one in its place; compiled code is refused there."""
    folder = tmp_path / "loratune" / "results"
    monkeypatch.setattr(kept_results, "directory", lambda: folder)
    results, changed = KeptResults("a"), folder if place == "results" else folder.parent
    assert results.store({"a": 1}) == "" and results.load() == {"a": 1}
    if problem.startswith("can"):
        changed.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(changed, 4242, -1)
    else:
        pytest.skip("only root can give a directory to another user")
    assert results.load() == {} and results.store({"a": 2}) == f"{changed} {problem}"
    assert results.once("a", int, lambda: 3) == 3


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
