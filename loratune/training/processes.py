"""Several processes as one run, on torch.distributed as accelerate sets it up.

The launcher starts the processes and supervises them. Collectives carry numbers, and objects as JSON in tensors of
bytes, never as pickles. Before objects are exchanged, processes that are ready early wait outside of any collective, on
a counter in the key-value store of the process group, so that tokenizing or hashing may take longer than
`training.ddp_timeout`.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from loratune.codes import Code
from loratune.errors import LostError, Problem
from loratune.system import accelerator
from loratune.system.launcher import SINGLE_PROCESS, Group, host
from loratune.system.signals import Interruption, Stop, Termination
from loratune.training import upstream

T = TypeVar("T")

_PAUSE = 0.02  # seconds between two looks at the store
_GRACE = 1.0
"""Seconds for which a main process that failed waits for the others to read why: it may be the one that serves the
store."""
_FIRST_SIGNAL_CODE = 128
"""Exit codes above it stand for a signal, which the launcher sends to all processes."""
_FAILED, _ENDED = "loratune/failed", "loratune/ended"
_RESUME = "start all processes again, with `resume=True` if a checkpoint was written"


def join() -> "DistributedGroup":
    """Join the other processes of the run, on the device of this process.

    Raises:
        LostError: The processes cannot reach each other.
    """
    try:
        return DistributedGroup(PartialState(cpu=not accelerator.has_gpu()))
    except (RuntimeError, ValueError, OSError) as error:  # torch's network errors are RuntimeErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        what = f"the processes of the run cannot reach each other: {reason}"
        fix = "check that this address is right, and that each machine can reach it"
        raise LostError(Problem(Code.DISTRIBUTED_LOST, what, where, fix=fix)) from None


@contextmanager
def _connected() -> Iterator[None]:
    """Inside, a collective that fails raises LostError. Gloo's errors have no class of their own."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        what = f"another process of the run has ended, or does not answer: {next(iter(str(error).splitlines()), '')}"
        raise LostError(Problem(Code.DISTRIBUTED_LOST, what, fix=_RESUME)) from error


class DistributedGroup(Group):
    """A group of several processes; see `launcher.Group`."""

    def __init__(self, state: PartialState):
        self.rank, self.count = state.process_index, state.num_processes
        self.main, self.leads_machine = self.rank == 0, state.local_process_index == 0
        self._device, self._store = state.device, upstream.default_store()
        self._meetings, self._closed = 0, False

    def connected(self) -> Any:
        """Returns a context manager; inside, a collective that fails raises LostError."""
        return _connected()

    def set_timeout(self, seconds: int) -> None:
        """Set how long a collective may take; the launcher or NCCL's own watchdog ends what does not return."""
        upstream.set_collective_timeout(timedelta(seconds=seconds))

    @_connected()
    def broadcast(self, value: T) -> T:
        """The value of the main process, in all processes."""
        self._meet()
        content = self._encoded(value)
        size = torch.tensor([len(content)], device=self._device)
        dist.broadcast(size, 0)
        if not self.main:
            content = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        dist.broadcast(content, 0)
        received: T = value if self.main else _decoded(content)
        return received

    @_connected()
    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        self._meet()
        content = self._encoded(value)
        sizes = [torch.tensor([0], device=self._device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(content)], device=self._device))
        longest = max(map(int, sizes))
        padded = torch.nn.functional.pad(content, (0, longest - len(content)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [_decoded(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    @_connected()
    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def fail(self, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """Record that this process ends with an error.

        Returns:
            The problems that this process prints, and its exit code. The first process that fails prints its own, with
            its name, and all have its exit code. After a signal the main process prints.
        """
        if self._closed:
            return list(problems), code
        own = list(problems)
        if not self.main:
            own = [replace(problem, what=f"process {self.rank} on {host()}: {problem.what}") for problem in problems]
        try:
            first, code = json.loads(self._store.compare_set(_FAILED, "", json.dumps([self.rank, code])))
            self._store.add(_ENDED, 1)
        except RuntimeError:  # the main process, which may serve the store, is gone
            return own if code < _FIRST_SIGNAL_CODE else [], code
        deadline = time.monotonic() + _GRACE
        with suppress(RuntimeError):
            while self.main and time.monotonic() < deadline and self._store.add(_ENDED, 0) < self.count:
                time.sleep(_PAUSE)
        prints = first == self.rank if code < _FIRST_SIGNAL_CODE else self.main
        return own if prints else [], code

    def close(self) -> None:
        """Wait for all processes, and leave the group."""
        self.all_gather(None)
        self._closed = True
        dist.destroy_process_group()

    def _meet(self) -> None:
        """Wait until all processes have come to this point, however long that takes, or one has failed."""
        self._meetings += 1
        key = f"loratune/meeting/{self._meetings}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.count:
            if self._store.check([_FAILED]):
                raise LostError(Problem(Code.DISTRIBUTED_LOST, "another process of the run has failed", fix=_RESUME))
            time.sleep(_PAUSE)

    def _encoded(self, value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)


def _decoded(content: torch.Tensor) -> Any:
    return json.loads(content.cpu().numpy().tobytes())


class SharedStop:
    """Whether any process of a run was asked to stop, on which all agree.

    Attributes:
        own: The signal that asked this process to stop, if any.
        group: The processes of the run.
    """

    def __init__(self, own: Stop | None = None, group: Group = SINGLE_PROCESS) -> None:
        self.own, self.group = own or Stop(), group

    def is_requested(self) -> bool:
        """Whether any process was asked to stop. All processes call it together, and from then on all know.

        A signal that comes while they agree is not forgotten: the next call finds it.
        """
        requests = self.group.total([self.own.requested is kind for kind in (Interruption, Termination)])
        if any(requests):
            self.own.requested = Termination if requests[1] else Interruption
        return any(requests)

    def check(self) -> None:
        """Raise KeyboardInterrupt if any process was asked to stop. All processes call it together."""
        if self.is_requested() and self.own.requested is not None:
            raise self.own.requested
