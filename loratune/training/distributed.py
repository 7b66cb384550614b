"""Several processes as one run, on torch.distributed as accelerate sets it up.

What they exchange while steps are taken goes through torch's collectives. What a process may take minutes for, and what
ends them, goes through a store of their own (`rendezvous`), which no collective blocks and in which no other program
can speak. A thread in each process writes a heartbeat there, and ends the process when another one has failed or
disappeared, whatever its main thread is waiting for.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from loratune.codes import Code
from loratune.console import EscapedStream
from loratune.errors import LostError, Problem
from loratune.system.launcher import Failure, host
from loratune.system.signals import exit_while_blocked
from loratune.training.rendezvous import SignedStore, open_store, removed_error

_log = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT = 0.5
"""Seconds between two heartbeats."""
PATIENCE = 30.0
"""Seconds without a heartbeat after which a process counts as lost. A cable that is out for 10 s costs no run."""
SHORT_PATIENCE = 2.0
"""The same where a connection broke, or all processes are being stopped: then there is other evidence."""
GRACE = 3.0
"""Seconds that processes which are ending wait for each other."""


def join() -> "DistributedGroup":
    """Meet the other processes of the run, on the device of this process.

    Raises:
        LostError: The processes cannot reach each other.
    """
    try:
        with exit_while_blocked():
            state = PartialState(cpu=not torch.accelerator.is_available())
        return DistributedGroup(state)
    except (RuntimeError, ValueError, OSError) as error:  # torch's network errors are RuntimeErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        what = f"the processes of the run cannot reach each other: {reason}"
        fix = "check that this address is right, and that each machine can reach it"
        raise LostError(Problem(Code.DISTRIBUTED_NOT_MET, what, where, fix=fix)) from None


class DistributedGroup:
    """A group of several processes; see `launcher.Group`."""

    def __init__(self, state: PartialState):
        self.rank, self.count = state.process_index, state.num_processes
        self.main, self.leads_machine = self.rank == 0, state.local_process_index == 0
        self._device = state.device
        self._store, clean_up = open_store(self.rank, self.count, self._device)
        self._exchanges, self._closed = 0, False
        self._own_keys: list[str] = []  # values of this process that others may not have read yet
        try:
            self._heartbeat = _Heartbeat(self._store, self.rank, self.count, self._removed_key)
            members = [_Member(**values) for values in self.all_gather(asdict(_Member.this()))]
        finally:
            clean_up()
        self._heartbeat.start(members)

    def broadcast(self, value: T) -> T:
        """The value of the main process, in all processes. Values are such as JSON has."""
        key = self._next_key()
        if self.main:
            self._put(key, value)
            return value
        received: T = self._get(key)
        return received

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Values are such as JSON has."""
        key, earlier_keys = self._next_key(), self._own_keys
        self._own_keys = []
        self._put(f"{key}/{self.rank}", value)
        values: list[T] = [self._get(f"{key}/{rank}") for rank in range(self.count)]
        self._store.remove(earlier_keys)  # a process that has written this value has read all earlier ones
        return values

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def on_end(self, clean_up: Callable[[], None]) -> None:
        """Set what this process cleans up when another one ends all of them."""
        self._heartbeat.clean_up = clean_up

    def fail(self, error: BaseException, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """End all processes because of an error in this one.

        Returns:
            The problems that this process prints, and its exit code. They are those of the first failure of all
            processes, or its own if the exit codes are the same; only one process prints any.
        """
        if self._closed:
            return list(problems), code
        own = Failure(self.rank, host(), tuple(problems), code)
        if _is_broken_connection(error) or isinstance(error, KeyboardInterrupt):  # perhaps another process was lost
            lost_only = isinstance(error, KeyboardInterrupt)
            own = self._heartbeat.find_cause(GRACE, lost_only=lost_only) or own
        first = self._heartbeat.end(own)
        printed = first if first.code != code else own
        problems = printed.problems_for(self.rank) if self._heartbeat.is_reporter(first) else []
        return list(problems), printed.code

    def close(self) -> None:
        """Wait for all processes, then stop watching them."""
        self.all_gather(None)
        self._closed = True
        self._heartbeat.stop()
        dist.destroy_process_group()

    def _next_key(self) -> str:
        self._exchanges += 1
        return f"exchange/{self._exchanges}"

    def _put(self, key: str, value: Any) -> None:
        self._store.put(key, value)
        self._own_keys.append(key)

    def _removed_key(self) -> str | None:
        """A key that this process has put and not removed, and that is gone from the store, if there is one.

        The others would wait for its value without end. Each process looks after its own keys, as it alone removes
        them.
        """
        removed = next((key for key in list(self._own_keys) if not self._store.has(key)), None)
        return removed if removed in self._own_keys else None  # the main thread unlists keys before it removes them

    def _get(self, key: str) -> Any:
        while not self._store.has(key):  # to wait inside the store would lock the heartbeat's thread out of it
            time.sleep(0.02)
        return self._store.get(key)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because a connection did. Gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@dataclass(frozen=True)
class _Member:
    """A process of the run.

    Attributes:
        host: The name of its machine.
        machine: An id that differs between machines, and between containers on one machine.
        pid: Its process id.
    """

    host: str
    machine: str
    pid: int

    @classmethod
    def this(cls) -> "_Member":
        """This process."""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(host(), f"{boot} {os.stat('/proc/self/ns/pid').st_ino}", os.getpid())
        return cls(host(), "", os.getpid())

    def has_ended(self) -> bool:
        """Whether a process on this machine has ended, be it a zombie that its parent has not waited for yet."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True


class _Heartbeat:
    """Shows that its process is alive, and watches the others: the main process watches all, and all watch it.

    One thread reads and writes the store. Across a cable that is cut its calls never return, so a second thread watches
    nothing but the time since the store last answered.
    """

    def __init__(self, store: SignedStore, rank: int, count: int, removed_key: Callable[[], str | None]):
        self.members: list[_Member] = []
        self._local_ranks: list[int] = []
        self.clean_up: Callable[[], None] = lambda: None
        self._store, self._rank, self._count, self._removed_key = store, rank, count, removed_key
        self._main, self._beats = rank == 0, 0
        self._last_beats: dict[int, tuple[int, float]] = {}
        self._answered = time.monotonic()
        self._over, self._ending = threading.Event(), threading.Lock()
        self._screen = sys.stderr if self._main else EscapedStream(sys.__stderr__)
        self._beat()

    def start(self, members: list[_Member]) -> None:
        """Start to watch. members: all processes, by rank."""
        self.members, own = members, members[self._rank]
        self._local_ranks = [rank for rank, one in enumerate(members) if one.machine == own.machine and own.machine]
        for loop in (self._watch_members, self._watch_answers):
            threading.Thread(target=loop, name=f"loratune{loop.__name__}", daemon=True).start()

    def end(self, failure: Failure) -> Failure:
        """Publish a failure, and wait until the others have read it.

        No other thread ends this process afterwards, unless the store does not answer.

        Returns:
            The failure that was published first.
        """
        if not self._ending.acquire(blocking=False):
            time.sleep(PATIENCE)  # another thread is ending the process
        self._over.set()
        backstop = threading.Timer(2 * GRACE, os._exit, [failure.code])
        backstop.daemon = True
        backstop.start()
        first = self._publish(failure)
        self._await_readers()
        backstop.cancel()
        return first

    def is_reporter(self, failure: Failure) -> bool:
        """Whether this process prints the failure: the main one does, or the first of its machine if that is lost."""
        if failure.rank != 0 or not failure.lost:
            return self._main
        ranks = [rank for rank, one in enumerate(self.members) if one.host == self.members[self._rank].host]
        return self._rank == next(rank for rank in ranks if rank != 0)

    def find_cause(self, seconds: float, *, lost_only: bool) -> Failure | None:
        """Look for so many seconds for the failure or the loss of another process that explains an error in this one.

        lost_only: whether a failure that another process published explains nothing. A signal that was sent to all
        processes shows in their failures too.
        """
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            try:
                if (failure := self._published()) is not None:
                    return None if lost_only else failure
                if (failure := self._lost_member(SHORT_PATIENCE)) is not None:
                    return failure
            except (RuntimeError, OSError):
                return self._loss_of(0)
            except LostError as error:
                return self._own_failure(error)
            time.sleep(HEARTBEAT / 5)
        return None

    def stop(self) -> None:
        """Stop to watch once all processes have come to this point."""
        self._store.put(f"closed/{self._rank}", True)
        self._over.set()
        self._await_readers()

    def _watch_members(self) -> None:
        while not self._over.wait(HEARTBEAT):
            try:
                self._beat()
                if (key := self._removed_key()) is not None:
                    raise removed_error(key)
                failure = self._published() or self._lost_member(PATIENCE)
                self._answered = time.monotonic()
            except (RuntimeError, OSError):  # the store is gone, and with it the main process, which serves it
                failure = self._loss_of(0)
            except LostError as error:
                failure = self._own_failure(error)
            if failure is not None and not self._over.is_set():
                self._exit(self._publish(failure))
                return

    def _watch_answers(self) -> None:
        while not self._over.wait(HEARTBEAT):
            if time.monotonic() - self._answered > PATIENCE:
                self._exit(self._loss_of(0))
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.put(f"beat/{self._rank}", self._beats)

    def _published(self) -> Failure | None:
        return Failure.from_json(self._store.get("failed")) if self._store.has("failed") else None

    def _lost_member(self, patience: float) -> Failure | None:
        """The loss of a process on this machine that has ended, or of any without a heartbeat for so many seconds."""
        for rank in self._local_ranks:
            if self.members[rank].has_ended() and not self._has_value(f"closed/{rank}"):
                return self._loss_of(rank)
        for rank in range(1, self._count) if self._main else [0]:
            key, now = f"beat/{rank}", time.monotonic()
            last, since = self._last_beats.get(rank, (0, now))
            # To wait inside the store for a heartbeat that another program removed would hide why a process ends.
            beat = self._store.get(key) if self._store.has(key) else last
            if beat > last:  # another program that has read an older one could write it again
                self._last_beats[rank] = (beat, now)
            elif now - since > patience:
                return self._loss_of(rank)
        return None

    def _loss_of(self, rank: int) -> Failure:
        process, where = "the main process" if rank == 0 else f"process {rank}", self.members[rank].host
        what = f"{process} on {where} has ended, or cannot be reached any more"
        fix = "start all processes again, with --resume if a checkpoint was written"
        problem = Problem(Code.DISTRIBUTED_LOST, what, fix=fix)
        return Failure(rank, where, (problem,), LostError.exit_code, lost=True)

    def _own_failure(self, error: LostError) -> Failure:
        """The failure of this process because another program wrote to the store."""
        return Failure(self._rank, host(), error.problems, error.exit_code)

    def _has_value(self, key: str) -> bool:
        """Whether a process of this run has put a value there."""
        return self._store.has(key) and self._store.get(key) is not None

    def _publish(self, failure: Failure) -> Failure:
        """Tell the other processes of a failure. Returns the one that was published first."""
        try:
            return Failure.from_json(self._store.put_first("failed", failure.as_json()))
        except (RuntimeError, OSError):
            _log.debug("the failure could not be published", exc_info=True)
            return failure
        except LostError as error:
            return self._own_failure(error)

    def _await_readers(self) -> None:
        """Wait until the others have read why all end: the store is gone as soon as the main process has ended."""
        deadline = time.monotonic() + GRACE
        try:
            if not self._main:
                self._store.put(f"read/{self._rank}", True)
                return
            ranks = list(range(1, self._count))
            while ranks and time.monotonic() < deadline:
                time.sleep(0.02)
                ranks = [rank for rank in ranks if not self._has_read(rank)]
        except (RuntimeError, OSError):
            _log.debug("this process ends without waiting for the others", exc_info=True)

    def _has_read(self, rank: int) -> bool:
        """Whether a process has read why all end. A value that another program wrote in its place does not count."""
        try:
            return self._has_value(f"read/{rank}")
        except LostError:
            return False

    def _exit(self, failure: Failure) -> None:
        """End the process from another thread than the main one, which may be waiting without end."""
        if not self._ending.acquire(blocking=False):
            return  # another thread is ending it
        backstop = threading.Timer(2 * GRACE, os._exit, [failure.code])
        backstop.start()
        if self.is_reporter(failure):
            lines = [f"error: {problem}" for problem in failure.problems_for(self._rank)]
            print(*lines, sep="\n", file=self._screen, flush=True)
        if self._main or failure.rank != 0:
            self._await_readers()
        try:
            self.clean_up()
        finally:
            os._exit(failure.code)
