"""Rows that processes share: taken from the main process's cache, or made once on a machine that does not see it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratune.errors import DataError
from loratune.training import tokenization


@dataclass
class Pair:
    """Two processes, as two threads, each the first of its machine."""

    rank: int
    box: list[Any]
    barrier: threading.Barrier
    count: int = 2
    leads_machine: bool = True
    main: bool = field(init=False)

    def __post_init__(self) -> None:
        self.main = self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        self.box[self.rank] = value
        self.barrier.wait(10)
        found = list(self.box)
        self.barrier.wait(10)
        return found

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def both(makes: list[Callable[[], Any]]) -> list[Any]:
    """What `_shared` gives in each, or raises."""
    results: list[Any] = [None, None]
    box, barrier = [None, None], threading.Barrier(2)

    def run(rank: int) -> None:
        try:
            results[rank] = tokenization._shared(makes[rank], Pair(rank, box, barrier))  # type: ignore[arg-type]
        except DataError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def prepared(directory: Path, fingerprint: str) -> Any:
    return SimpleNamespace(rows=SimpleNamespace(directory=directory), fingerprint=fingerprint)


@pytest.mark.parametrize("own", ["the same", "another"])
def test_a_machine_that_does_not_see_the_cache_makes_its_own(own: str, tmp_path: Path) -> None:
    made = [prepared(tmp_path / "not here", "the same"), prepared(tmp_path, own)]
    calls: list[int] = []

    def make(rank: int) -> Any:
        calls.append(rank)
        return made[rank]

    found = both([lambda: make(0), lambda: make(1)])
    assert sorted(calls) == [0, 1]
    assert found[0] is made[0]
    if own == "the same":
        assert found[1] is made[1]
    else:
        assert "are others than those of the main process; give all machines the same files" in str(found[1])
