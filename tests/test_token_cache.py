"""The cache of tokenized rows: all of them or none, whoever else writes, reads or removes."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import rows_at_once
from conftest import ROOT, Ran, tree
from rows_at_once import COUNT, OLD, fill, key, whole
from running import Cli, MakeConfig

from loratune.data import token_cache, token_cache_dir

WITH_PACKAGE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in which every row has a shard of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "_SHARD_ROWS", 1)
    return tmp_path / "cache" / "loratune"


def unexpected(writer: token_cache.TokenCacheWriter) -> None:
    """What is not to be called, where the rows are there."""
    pytest.fail("the rows are written once more")


# Whoever reads


@pytest.mark.parametrize("remaining", range(COUNT + 1))
def test_an_entry_in_removal_is_none(cache: Path, remaining: int) -> None:
    """However many of its shards remain; it used to be taken for a smaller one."""
    assert whole(token_cache_dir.load_or_write(key(1), fill))
    for number in range(remaining, COUNT):
        (cache / key(1) / f"{number:05}.json").unlink()
        (cache / key(1) / f"{number:05}.arrow").unlink()
    rows = token_cache_dir.open_trusted(cache / key(1))
    assert rows is None if remaining < COUNT else rows is not None and whole(rows)
    assert whole(token_cache_dir.load_or_write(key(1), fill))


@pytest.mark.parametrize("name", ["whole", "00003.json", "00003.arrow"])
def test_odd_things_in_an_entry(cache: Path, name: str) -> None:
    """Nothing waits at a named pipe, and no link is followed; an entry with either is not ours to remove."""
    token_cache_dir.load_or_write(key(1), fill)
    place = cache / key(1) / name
    place.rename(cache / "aside")
    for make in (os.mkfifo, lambda place: place.symlink_to(cache / "aside")):
        make(place)
        rows = token_cache_dir.load_or_write(key(1), fill)
        assert whole(rows) and rows.directory != cache / key(1)
        place.unlink()


def test_of_two_processes_the_first_publishes(cache: Path) -> None:
    """The second one, which was writing the same rows, takes them, and none of its own files remain."""
    stamps: list[int] = []

    def second(writer: token_cache.TokenCacheWriter) -> None:
        fill(writer)
        assert whole(token_cache_dir.load_or_write(key(1), fill))
        stamps.append((cache / key(1)).stat().st_ino)

    assert whole(token_cache_dir.load_or_write(key(1), second))
    assert stamps == [(cache / key(1)).stat().st_ino] and [path.name for path in cache.iterdir()] == [key(1)]


@pytest.mark.parametrize("asked", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_many_processes_on_new_entries(asked: int, tmp_path: Path) -> None:
    """Entries are removed at the same time: see `rows_at_once`."""
    command = [sys.executable, rows_at_once.__file__, str(tmp_path / "cache"), str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | WITH_PACKAGE)
    assert done.returncode == 0, done.stderr
    rounds, failed = map(int, done.stdout.split())
    assert (failed, done.stderr) == (0, "") and rounds == asked
    assert not [path.name for path in (tmp_path / "cache" / "loratune").iterdir() if "." in path.name]


# Whoever removes


def age(*paths: Path) -> None:
    for path in paths:
        os.utime(path, (OLD, OLD))


def foreign(cache: Path) -> None:
    """Old directories of others, under all names that ours have, and under others."""
    for name in ("someone", key(2), f"{key(3)}.partial", key(4), key(5), key(6)):
        (cache / name).mkdir(parents=True)
    (cache / "someone" / "thesis.txt").write_text("precious")
    (cache / key(2) / "thesis.txt").write_text("precious")
    (cache / f"{key(3)}.partial" / "00000.arrow").write_text("precious")  # the right name, and no record
    token_cache_dir.load_or_write(key(7), fill)
    (cache / key(7) / "thesis.txt").write_text("a stranger in an entry of ours")
    (cache / key(4) / "entry.json").write_bytes((cache / key(7) / "entry.json").read_bytes())  # a record of another
    (cache / key(4) / "00000.arrow").write_text("precious")
    (cache / key(5) / "whole").symlink_to(cache / "someone" / "thesis.txt")
    (cache / key(6) / "deeper").mkdir()
    (cache / key(8)).symlink_to(cache / "someone")
    age(*(path for path in cache.iterdir() if not path.is_symlink()))


def test_only_entries_of_ours_are_removed(cache: Path) -> None:
    foreign(cache)
    before = tree(cache)
    for number in (20, 21, 22):
        token_cache_dir.load_or_write(key(number), fill)
    (cache / key(21)).rename(cache / f"{key(21)}.partial")  # as it is before it is published, and was left
    (cache / f"{key(23)}.removed").mkdir()
    age(cache / key(20), cache / f"{key(21)}.partial", cache / f"{key(23)}.removed")
    token_cache_dir.remove_old_entries()
    assert {path.name for path in cache.iterdir()} & {key(number) for number in range(20, 24)} == {key(22)}
    assert not (cache / f"{key(21)}.partial").exists() and not (cache / f"{key(23)}.removed").exists()
    assert before.items() <= tree(cache).items() and (cache / key(8)).is_symlink()


def test_entries_of_other_users_are_left_alone(cache: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    token_cache_dir.load_or_write(key(1), fill)
    os.chown(cache / key(1), 12345, -1)
    age(cache / key(1))
    token_cache_dir.remove_old_entries()
    assert (cache / key(1)).exists()


def test_removal_beneath_a_reader(cache: Path) -> None:
    """Rows that are being read stay readable, and an entry that is used while it is looked at stays."""
    rows = token_cache_dir.load_or_write(key(1), fill)
    age(cache / key(1))
    token_cache_dir.remove_old_entries()
    assert not (cache / key(1)).exists() and whole(rows)
    token_cache_dir.load_or_write(key(1), fill)
    age(cache / key(1))
    assert whole(token_cache_dir.load_or_write(key(1), unexpected))
    token_cache_dir.remove_old_entries()
    assert (cache / key(1)).exists()


def test_what_is_in_the_way_is_left_alone(cache: Path) -> None:
    """The rows go to a directory that is removed with them."""
    foreign(cache)
    (cache / f"{key(30)}.partial").symlink_to(cache / "someone")
    before = tree(cache)
    for number in (2, 4, 5, 6, 8):
        rows = token_cache_dir.load_or_write(key(number), fill)
        assert whole(rows) and rows.directory != cache / key(number)
        del rows
        assert tree(cache) == before
    for number in (3, 30):
        assert whole(token_cache_dir.load_or_write(key(number), fill))
    assert before.items() <= tree(cache).items()


def test_a_dry_run_removes_nothing(cli: Cli, run_config: MakeConfig, cache: Path) -> None:
    """A run removes them."""
    token_cache_dir.load_or_write(key(20), fill)
    foreign(cache)
    age(cache / key(20))
    before = tree(cache)
    ran: Ran = cli("train", run_config(), "--dry-run")
    assert ran.code == 0, ran.err
    assert before.items() <= tree(cache).items()
    ran = cli("train", run_config(training={"max_steps": 1}))
    assert ran.code == 0, ran.err
    assert (
        {name for name in before if name not in tree(cache)}
        == {name for name in before if name.startswith(key(20))}
        != set()
    )


# Whoever plants rows, or could


def check_written_anew(cache: Path, remark: str, *, in_cache: bool) -> None:
    """Rows are written anew, with a remark; the next run takes them from the cache, unless the cache is not ours."""
    calls: list[int] = []

    def counted(writer: token_cache.TokenCacheWriter) -> None:
        calls.append(1)
        fill(writer)

    rows = token_cache_dir.load_or_write(key(1), counted)
    assert whole(rows) and calls == [1] and re.fullmatch(remark, rows.remark), rows.remark
    assert (rows.directory == cache / key(1)) == in_cache
    rows = token_cache_dir.load_or_write(key(1), counted)
    assert whole(rows) and len(calls) == (1 if in_cache else 2) and bool(rows.remark) == (not in_cache)


def modes(path: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) & 0o077 for file in (path, *path.rglob("*"))}


@pytest.mark.parametrize("umask", [0, 0o002, 0o022])
def test_nobody_else_may_write_to_the_cache(umask: int, cache: Path) -> None:
    """Whatever the umask is; and what a stopped preparation left is continued."""

    def stopped(writer: token_cache.TokenCacheWriter) -> None:
        fill(writer)
        raise KeyboardInterrupt

    before = os.umask(umask)
    try:
        with pytest.raises(KeyboardInterrupt):
            token_cache_dir.load_or_write(key(1), stopped)
        read: list[int] = []
        token_cache_dir.load_or_write(key(1), lambda writer: read.append(writer.read))
    finally:
        os.umask(before)
    assert read == [COUNT] and modes(cache) == {0}


@pytest.mark.parametrize("name", ["", "entry.json", "whole", "00003.json", "00003.arrow"])
def test_rows_of_another_user_are_not_used(name: str, cache: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    token_cache_dir.load_or_write(key(1), fill)
    place = cache / key(1) / name
    os.chown(place, 4242, -1)
    assert token_cache_dir.open_trusted(cache / key(1)) is None
    check_written_anew(cache, f"the cached rows were not used: {place} belongs to another user", in_cache=bool(name))


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("name", ["", "entry.json", "whole", "00003.json", "00003.arrow"])
def test_rows_that_others_could_write_are_not_used(name: str, mode: int, cache: Path) -> None:
    token_cache_dir.load_or_write(key(1), fill)
    (cache / key(1) / name).chmod(mode)
    assert token_cache_dir.open_trusted(cache / key(1)) is None
    place = cache / key(1) / name
    check_written_anew(cache, f"the cached rows were not used: {place} can be written to by others", in_cache=True)
    assert modes(cache) == {0}


def test_rows_by_a_link_are_not_used(cache: Path, tmp_path: Path) -> None:
    token_cache_dir.load_or_write(key(1), fill)
    (cache / key(1)).rename(tmp_path / "elsewhere")
    (cache / key(1)).symlink_to(tmp_path / "elsewhere")
    assert token_cache_dir.open_trusted(cache / key(1)) is None
    check_written_anew(cache, f"the cached rows were not used: {cache / key(1)} is a link", in_cache=False)


def test_rows_of_another_key_are_not_used(cache: Path) -> None:
    """Whoever could write to the cache could exchange entries of ours."""
    token_cache_dir.load_or_write(key(2), fill)
    (cache / key(2)).rename(cache / key(1))
    calls: list[int] = []

    def counted(writer: token_cache.TokenCacheWriter) -> None:
        calls.append(1)
        fill(writer)

    rows = token_cache_dir.load_or_write(key(1), counted)
    assert whole(rows) and calls == [1] and rows.directory != cache / key(1)


def test_what_others_began_is_not_continued(cache: Path) -> None:
    token_cache_dir.load_or_write(key(1), fill)
    (cache / key(1)).rename(cache / f"{key(1)}.partial")
    (cache / f"{key(1)}.partial").chmod(0o777)
    check_written_anew(cache, "", in_cache=True)


def test_a_cache_that_others_could_write_to_is_made_private(cache: Path) -> None:
    token_cache_dir.load_or_write(key(1), fill)
    cache.chmod(0o777)
    rows = token_cache_dir.load_or_write(key(1), unexpected)  # what is in it was ours alone
    assert rows.remark == f"others could write to {cache}: now only you can" and modes(cache) == {0}


def test_a_cache_that_is_not_ours_is_not_used(cache: Path, tmp_path: Path) -> None:
    token_cache_dir.load_or_write(key(1), fill)
    before = tree(tmp_path)
    if os.geteuid() == 0:
        os.chown(cache, 4242, -1)
        check_written_anew(
            cache, f"the rows are tokenized for this run only: {cache} belongs to another user", in_cache=False
        )
        os.chown(cache, 0, -1)
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    check_written_anew(cache, f"the rows are tokenized for this run only: {cache}: Not a directory; .*", in_cache=False)
    cache.unlink()
    (tmp_path / "elsewhere").rename(cache)
    assert tree(tmp_path) == before


def test_a_cache_that_cannot_be_written_is_said_with_what_sets_it(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    check_written_anew(
        cache,
        f"the rows are tokenized for this run only: {cache}: Not a directory; set HF_DATASETS_CACHE or HF_HOME to a "
        "directory that you can write to",
        in_cache=False,
    )


def test_rows_that_are_not_used_are_reported(cli: Cli, run_config: MakeConfig, cache: Path) -> None:
    config = run_config(training={"max_steps": 1})
    assert cli("train", config, "--dry-run").code == 0
    entries = [*cache.iterdir()]  # of the rows, and of unrelated text
    for entry in entries:
        entry.chmod(0o777)
    ran = cli("train", config, "--dry-run")
    told = [f"the cached rows were not used: {entry} can be written to by others" in ran.out for entry in entries]
    assert ran.code == 0 and sorted(told) == [False, True]
