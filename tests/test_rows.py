"""Tokenized rows shared by processes: read from the main process's cache, or prepared where it is inaccessible."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import meanings

from loratune.codes import Code
from loratune.errors import DataError
from loratune.training.rows import shared_rows


@dataclass
class Pair:
    """Two processes, simulated by threads, each the first on its machine."""

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
        values = list(self.box)
        self.barrier.wait(10)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def share(makes: list[Callable[[], Any]]) -> list[Any]:
    """What `shared_rows` returns in each process, or the error it raises."""
    results: list[Any] = [None, None]
    box, barrier = [None, None], threading.Barrier(2)

    def run(rank: int) -> None:
        try:
            results[rank] = shared_rows(makes[rank], Pair(rank, box, barrier))  # type: ignore[arg-type]
        except DataError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def dataset(directory: Path, fingerprint: str) -> Any:
    return SimpleNamespace(rows=SimpleNamespace(directory=directory), fingerprint=fingerprint)


@pytest.mark.parametrize("own", ["the same", "another"])
def test_machine_without_access_to_the_cache_prepares_its_own_rows(own: str, tmp_path: Path) -> None:
    datasets = [dataset(tmp_path / "not here", "the same"), dataset(tmp_path, own)]
    calls: list[int] = []

    def make(rank: int) -> Any:
        calls.append(rank)
        return datasets[rank]

    results = share([lambda: make(0), lambda: make(1)])
    assert sorted(calls) == [0, 1]
    assert results[0] is datasets[0]
    if own == "the same":
        assert results[1] is datasets[1]
    else:
        assert meanings(results[1]) == [(Code.DISTRIBUTED_SETTING, "", "data.train")]
