"""The cache of tokenized rows: entries are complete or absent, even with concurrent writers, readers and removals."""

import os
import re
import stat
import sys
from pathlib import Path

import datasets
import pytest
import rows_at_once
from conftest import ROOT, run_command, tree
from rows_at_once import COUNT, OLD, fill, key, whole
from running import Cli, MakeConfig

from loratune.data import token_cache

WITH_PACKAGE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache with one row per shard."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "_SHARD_ROWS", 1)
    return tmp_path / "cache" / "loratune"


def unexpected(writer: token_cache.TokenCacheWriter) -> None:
    """Must not be called if the rows are cached."""
    pytest.fail("the rows are written once more")


def age(*paths: Path) -> None:
    for path in paths:
        os.utime(path, (OLD, OLD))


# Reading and writing


@pytest.mark.parametrize("remaining", [0, 1, COUNT - 1, COUNT])
def test_partially_removed_entry_is_not_valid(cache: Path, remaining: int) -> None:
    """No matter how many of its shards remain."""
    assert whole(token_cache.load_or_write(key(1), fill))
    for number in range(remaining, COUNT):
        (cache / key(1) / f"{number:05}.arrow").unlink()
    rows = token_cache.open_trusted(cache / key(1))
    assert rows is None if remaining < COUNT else rows is not None and whole(rows)
    assert whole(token_cache.load_or_write(key(1), fill))
    assert whole(token_cache.load_or_write(key(1), unexpected))


def test_first_of_two_writers_publishes(cache: Path) -> None:
    """The second writer of the same rows uses them, and none of its own files remain."""
    stamps: list[int] = []

    def second(writer: token_cache.TokenCacheWriter) -> None:
        fill(writer)
        assert whole(token_cache.load_or_write(key(1), fill))
        stamps.append((cache / key(1)).stat().st_ino)

    assert whole(token_cache.load_or_write(key(1), second))
    assert stamps == [(cache / key(1)).stat().st_ino] and [path.name for path in cache.iterdir()] == [key(1)]


@pytest.mark.parametrize("asked", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_concurrent_processes_on_new_entries(asked: int, tmp_path: Path) -> None:
    """Entries are removed at the same time. See `rows_at_once`."""
    command = [sys.executable, rows_at_once.__file__, str(tmp_path / "cache"), str(asked)]
    done = run_command(command, capture_output=True, text=True, check=False, env=os.environ | WITH_PACKAGE)
    assert done.returncode == 0, done.stderr
    rounds, failed = map(int, done.stdout.split())
    assert (failed, done.stderr) == (0, "") and rounds == asked
    assert not [path.name for path in (tmp_path / "cache" / "loratune").iterdir() if "." in path.name]


# Removal


def foreign(cache: Path) -> None:
    """Old directories with foreign content, named like entries and otherwise."""
    for name in ("someone", key(2), key(6)):
        (cache / name).mkdir(parents=True)
    (cache / "someone" / "thesis.txt").write_text("precious")
    (cache / key(2) / "thesis.txt").write_text("precious")
    token_cache.load_or_write(key(7), fill)
    (cache / key(7) / "thesis.txt").write_text("a stranger in an entry of ours")
    (cache / key(6) / "deeper").mkdir()
    (cache / key(8)).symlink_to(cache / "someone")
    age(*(path for path in cache.iterdir() if not path.is_symlink()))


def test_only_old_entries_are_removed(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    foreign(cache)
    before = tree(cache)
    for number in (20, 21, 22):
        token_cache.load_or_write(key(number), fill)
    (cache / key(21)).rename(cache / f"{key(21)}.partial")
    (cache / f"{key(23)}.removed").mkdir()
    age(cache / key(20), cache / f"{key(21)}.partial", cache / f"{key(23)}.removed")
    token_cache.ROWS.remove_old()
    assert {path.name[:64] for path in cache.iterdir()} & {key(number) for number in range(20, 24)} == {key(22)}
    assert before.items() <= tree(cache).items() and (cache / key(8)).is_symlink()


def test_removal_does_not_disturb_readers(cache: Path) -> None:
    """Rows that are being read stay readable. An entry that has just been used is not removed."""
    rows = token_cache.load_or_write(key(1), fill)
    age(cache / key(1))
    token_cache.ROWS.remove_old()
    assert not (cache / key(1)).exists() and whole(rows)
    token_cache.load_or_write(key(1), fill)
    age(cache / key(1))
    assert whole(token_cache.load_or_write(key(1), unexpected))
    token_cache.ROWS.remove_old()
    assert (cache / key(1)).exists()


def test_foreign_files_at_the_path_of_an_entry_are_kept(cache: Path) -> None:
    """The rows are written to a temporary directory, which is removed with them."""
    cache.mkdir(parents=True, mode=0o700)
    foreign(cache)
    before = tree(cache)
    for number in (2, 6, 8):
        rows = token_cache.load_or_write(key(number), fill)
        assert whole(rows) and rows.directory != cache / key(number)
        del rows
        assert tree(cache) == before


def test_dry_run_removes_no_cache_entries(cli: Cli, run_config: MakeConfig, cache: Path) -> None:
    """A training run does."""
    token_cache.load_or_write(key(20), fill)
    age(cache / key(20))
    for options, is_kept in ((("--dry-run",), True), ((), False)):
        ran = cli("train", run_config(), *options)
        assert ran.code == 0, ran.err
        assert (cache / key(20)).exists() is is_kept


# Rows that other users could have written


def check_written_anew(cache: Path, remark: str, *, in_cache: bool) -> None:
    """Rows must be rewritten. The next run reads them from the cache, unless it is unusable, which must be reported."""
    calls: list[int] = []

    def counted(writer: token_cache.TokenCacheWriter) -> None:
        calls.append(1)
        fill(writer)

    for expected in (1, 1 if in_cache else 2):
        rows = token_cache.load_or_write(key(1), counted)
        assert whole(rows) and len(calls) == expected and re.fullmatch(remark, rows.remark), rows.remark
        assert (rows.directory == cache / key(1)) == in_cache


@pytest.mark.parametrize("umask", [0, 0o002, 0o022])
def test_cache_is_private_to_the_user(umask: int, cache: Path) -> None:
    """Whatever the umask is. A stopped preparation is continued."""

    def stopped(writer: token_cache.TokenCacheWriter) -> None:
        fill(writer)
        raise KeyboardInterrupt

    before = os.umask(umask)
    try:
        with pytest.raises(KeyboardInterrupt):
            token_cache.load_or_write(key(1), stopped)
        read: list[int] = []
        token_cache.load_or_write(key(1), lambda writer: read.append(writer.read))
    finally:
        os.umask(before)
    directories = [cache, cache.parent, cache / key(1)]
    assert read == [COUNT] and {stat.S_IMODE(path.stat().st_mode) for path in directories} == {0o700}


@pytest.mark.parametrize("fault", [
    "another user", 0o720, 0o702, "a link", "another key", "its beginning, by others", "whole", "00000.arrow",
])  # fmt: skip
def test_untrusted_entries_are_not_used(fault: str | int, cache: Path, tmp_path: Path) -> None:
    entry = cache / key(1)
    token_cache.load_or_write(key(2 if fault == "another key" else 1), fill)
    if isinstance(fault, int):
        entry.chmod(fault)
    elif fault == "another user":
        if os.geteuid() != 0:
            pytest.skip("only root may give files away")
        os.chown(entry, 4242, -1)
    elif fault == "a link":
        entry.rename(tmp_path / "elsewhere")
        entry.symlink_to(tmp_path / "elsewhere")
    elif fault == "another key":
        (cache / key(2)).rename(entry)
    elif fault in ("whole", "00000.arrow"):
        (entry / fault).unlink()
        os.mkfifo(entry / fault)  # to read it would wait for ever
    else:
        entry.rename(cache / f"{key(1)}.partial")
        (cache / f"{key(1)}.partial").chmod(0o777)
    if fault not in ("another key", "whole", "00000.arrow"):
        assert token_cache.open_trusted(entry) is None
    check_written_anew(cache, "", in_cache=fault not in ("a link", "whole", "00000.arrow"))


@pytest.mark.parametrize("fault", ["another user", "writable", "a link", "a file"])
def test_cache_that_others_could_write_to_is_not_used(fault: str, cache: Path, tmp_path: Path) -> None:
    """The reason is reported, and how to choose another cache."""
    token_cache.load_or_write(key(1), fill)
    reason = {"another user": "belongs to another user", "writable": "can be written to by others"}.get(
        fault, "is a link"
    )
    if fault == "another user":
        if os.geteuid() != 0:
            pytest.skip("only root may give files away")
        os.chown(cache, 4242, -1)
    elif fault == "writable":
        cache.chmod(0o770)
    elif fault == "a link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.rename(tmp_path / "elsewhere")
        cache.parent.rmdir()
        cache.parent.write_text("")
    reason = f"Not a directory: {cache}" if fault == "a file" else f"{cache} {reason}"
    fix = "set HF_DATASETS_CACHE or HF_HOME to a directory that only you can write to"
    check_written_anew(cache, f"the rows are tokenized for this run only: {reason}; {fix}", in_cache=False)


def test_unusable_cache_is_reported(cli: Cli, run_config: MakeConfig, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    ran = cli("train", run_config(), "--dry-run")
    assert ran.code == 0 and f"{cache} can be written to by others" in " ".join(ran.out.split())
