"""Several processes as one run, on torch.distributed as accelerate sets it up.

What they agree on while steps are taken goes through torch's collectives; what one of them may take minutes for, and
what ends them, through a store of their own (`store`), which no collective blocks and no stranger can speak in. A
thread in each process shows there that it is alive, and ends the process when another one has failed or gone, whatever
its main thread is waiting for.
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

from loratune.console import EscapedStream
from loratune.errors import LostError, Problem
from loratune.system.launcher import Failure, host
from loratune.training.rendezvous import own_store
from loratune.training.signed_store import SignedStore, deleted

_log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT = 0.5
"""Seconds between two signs of life."""
PATIENCE = 30.0
"""Seconds without a sign of life after which a process is given up. A cable that is out for 10 s costs no run."""
SILENT = 2.0
"""The same, where a connection broke, or everything is being stopped: then it needs no second look."""
SOON = 3.0
"""Seconds that processes which are ending wait for each other."""
_RESUME = "once all is back, go on with --resume, or start again if no checkpoint was kept"


def join() -> "DistributedGroup":
    """Meet the other processes, on the device that is this one's. Raises LostError: they do not come together."""
    try:
        return DistributedGroup(PartialState(cpu=not torch.accelerator.is_available()))
    except (RuntimeError, ValueError, OSError) as error:  # torch's errors of the network are RuntimeErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        what = f"the processes do not come together: {reason}"
        raise LostError(Problem(what, where, fix="is that address right, and reachable from each machine?")) from None


class DistributedGroup:
    """A group of several processes; see `launched.Group`."""

    def __init__(self, state: PartialState):
        self.rank, self.count = state.process_index, state.num_processes
        self.main, self.leads_machine = self.rank == 0, state.local_process_index == 0
        self._device = state.device
        self._store, clear = own_store(self.rank, self.count, self._device)
        self._said, self._parted = 0, False
        self._own: list[str] = []  # keys of what this process has said and others may not have read yet
        try:
            self._watch = _Heartbeat(self._store, self.rank, self.count, self._missing)
            members = [_Member(**one) for one in self.all_gather(asdict(_Member.this()))]
        finally:
            clear()
        self._watch.start(members)

    def broadcast(self, value: T) -> T:
        """What the main process gives, in all of them; values are such as JSON has."""
        key = self._next()
        if self.main:
            self._put(key, value)
            return value
        found: T = self._get(key)
        return found

    def all_gather(self, value: T) -> list[T]:
        """What all of them give, by rank; values are such as JSON has."""
        key, before = self._next(), self._own
        self._own = []
        self._put(f"{key}/{self.rank}", value)
        found: list[T] = [self._get(f"{key}/{rank}") for rank in range(self.count)]
        self._store.forget(before)  # whoever has said this has read all that was said before
        return found

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all of them."""
        sums = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def on_end(self, clear: Callable[[], None]) -> None:
        """What this process clears away when another one ends them all."""
        self._watch.clear = clear

    def fail(self, error: BaseException, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """All of them end. What is printed is the first failure of all, or this one's own if it is of the same kind."""
        if self._parted:
            return list(problems), code
        mine = Failure(self.rank, host(), tuple(problems), code)
        if _is_broken(error) or isinstance(error, KeyboardInterrupt):  # because another one has gone, perhaps
            mine = self._watch.why(SOON, only_if_gone=isinstance(error, KeyboardInterrupt)) or mine
        first = self._watch.end(mine)
        told = first if first.code != code else mine
        return (told.problems_for(self.rank) if self._watch.tells(first) else []), told.code

    def close(self) -> None:
        """Wait for all, then stop watching them."""
        self.all_gather(None)
        self._parted = True
        self._watch.leave()
        dist.destroy_process_group()

    def _next(self) -> str:
        self._said += 1
        return f"said/{self._said}"

    def _put(self, key: str, value: Any) -> None:
        self._store.put(key, value)
        self._own.append(key)

    def _missing(self) -> str | None:
        """A key of what this process has said and has not taken back, which is there no more. What the others wait for
        would never come: each process looks after its own keys, as it alone removes them."""
        missing = next((key for key in list(self._own) if not self._store.has(key)), None)
        return missing if missing in self._own else None  # the main thread takes keys out before it removes them

    def _get(self, key: str) -> Any:
        while not self._store.has(key):  # to wait inside the store would keep the other thread out of it
            time.sleep(0.02)
        return self._store.get(key)


def _is_broken(error: BaseException) -> bool:
    """Whether a collective failed because a connection did. Gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@dataclass(frozen=True)
class _Member:
    """A process. host: the name of its machine; machine: what tells machines, and containers on them, apart."""

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

    def dead(self) -> bool:
        """Of one on this machine: whether it has ended. It may still have a number, until its parent has taken note."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True


class _Heartbeat:
    """Shows that its process is alive, and sees that the others are: the main one looks at all, they look at it.

    One thread talks to the store. What it asks across a cable that is cut never returns, so a second thread looks at
    nothing but the time since the last answer.
    """

    def __init__(self, store: SignedStore, rank: int, count: int, missing: Callable[[], str | None]):
        self.members: list[_Member] = []
        self._beside: list[int] = []
        self.clear: Callable[[], None] = lambda: None
        self._store, self._rank, self._count, self._missing = store, rank, count, missing
        self._main, self._beats = rank == 0, 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._answered = time.monotonic()
        self._over, self._ending = threading.Event(), threading.Lock()
        self._screen = sys.stderr if self._main else EscapedStream(sys.__stderr__)
        self._beat()

    def start(self, members: list[_Member]) -> None:
        """Begin to look. members: all processes, by rank."""
        self.members, own = members, members[self._rank]
        self._beside = [rank for rank, one in enumerate(members) if one.machine == own.machine and own.machine]
        for loop in (self._talk, self._listen):
            threading.Thread(target=loop, name=f"loratune{loop.__name__}", daemon=True).start()

    def end(self, failure: Failure) -> Failure:
        """Tell all of a failure. Returns the one that was told first. No other thread ends the process after this, but
        if the store does not answer."""
        if not self._ending.acquire(blocking=False):
            time.sleep(PATIENCE)  # another thread is ending it
        self._over.set()
        backstop = threading.Timer(2 * SOON, os._exit, [failure.code])
        backstop.daemon = True
        backstop.start()
        first = self._published(failure)
        self._meet()
        backstop.cancel()
        return first

    def tells(self, failure: Failure) -> bool:
        """Whether this process tells the user: the main one, or the first of its machine if that has gone."""
        if failure.rank != 0 or not failure.gone:
            return self._main
        beside = [rank for rank, one in enumerate(self.members) if one.host == self.members[self._rank].host]
        return self._rank == next(rank for rank in beside if rank != 0)

    def why(self, seconds: float, *, only_if_gone: bool) -> Failure | None:
        """What another process failed of, or which one has gone, as soon as that is known. A signal that all were sent
        shows in the failures of the others, and is none of these."""
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            try:
                if (failure := self._failure()) is not None:
                    return None if only_if_gone else failure
                if (failure := self._given_up(SILENT)) is not None:
                    return failure
            except (RuntimeError, OSError):
                return self._gone(0)
            except LostError as error:
                return self._forged(error)
            time.sleep(BEAT / 5)
        return None

    def leave(self) -> None:
        """Stop, when all have come to this point."""
        self._store.put(f"left/{self._rank}", True)
        self._over.set()
        self._meet()

    def _talk(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat()
                if (key := self._missing()) is not None:
                    raise deleted(key)
                failure = self._failure() or self._given_up(PATIENCE)
                self._answered = time.monotonic()
            except (RuntimeError, OSError):  # the store has gone, and with it the process that kept it
                failure = self._gone(0)
            except LostError as error:
                failure = self._forged(error)
            if failure is not None and not self._over.is_set():
                self._end_here(self._published(failure))
                return

    def _listen(self) -> None:
        while not self._over.wait(BEAT):
            if time.monotonic() - self._answered > PATIENCE:
                self._end_here(self._gone(0))
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.put(f"beat/{self._rank}", self._beats)

    def _failure(self) -> Failure | None:
        return Failure.from_json(self._store.get("failed")) if self._store.has("failed") else None

    def _given_up(self, patience: float) -> Failure | None:
        """A process on this machine that has ended, or any that has not shown that it is alive for so many seconds."""
        for rank in self._beside:
            if self.members[rank].dead() and not self._has(f"left/{rank}"):
                return self._gone(rank)
        for rank in range(1, self._count) if self._main else [0]:
            beat, now = self._store.get(f"beat/{rank}"), time.monotonic()
            known, since = self._seen.get(rank, (0, now))
            if beat > known:  # an older one could be written again by a stranger who has read it
                self._seen[rank] = (beat, now)
            elif now - since > patience:
                return self._gone(rank)
        return None

    def _gone(self, rank: int) -> Failure:
        which = "the main process" if rank == 0 else f"process {rank}"
        where = self.members[rank].host
        what = f"{which} on {where} has gone, or cannot be reached"
        return Failure(rank, where, (Problem(what, fix=_RESUME),), LostError.exit_code, gone=True)

    def _forged(self, error: LostError) -> Failure:
        """The failure of this process to believe what stands in the store."""
        return Failure(self._rank, host(), error.problems, error.exit_code)

    def _has(self, key: str) -> bool:
        """Whether a process of this run has put something there."""
        return self._store.has(key) and self._store.get(key) is not None

    def _published(self, failure: Failure) -> Failure:
        try:
            return Failure.from_json(self._store.first("failed", failure.as_json()))
        except (RuntimeError, OSError):
            _log.debug("the failure is not known to the others", exc_info=True)
            return failure
        except LostError as error:
            return self._forged(error)

    def _meet(self) -> None:
        """The main process, which keeps the store, stays until the others have read it."""
        deadline = time.monotonic() + SOON
        try:
            if not self._main:
                self._store.put(f"read/{self._rank}", True)
                return
            waiting = list(range(1, self._count))
            while waiting and time.monotonic() < deadline:
                time.sleep(0.02)
                waiting = [rank for rank in waiting if not self._has_read(rank)]
        except (RuntimeError, OSError):
            _log.debug("the others are not waited for", exc_info=True)
            return

    def _has_read(self, rank: int) -> bool:
        """Whether a process says that it has read why all end. What a stranger wrote in its place says nothing."""
        try:
            return self._has(f"read/{rank}")
        except LostError:
            return False

    def _end_here(self, failure: Failure) -> None:
        """End the process from beside its main thread, which may be waiting for what never comes."""
        if not self._ending.acquire(blocking=False):
            return  # another thread is ending it
        backstop = threading.Timer(2 * SOON, os._exit, [failure.code])
        backstop.start()
        if self.tells(failure):
            lines = [f"error: {problem}" for problem in failure.problems_for(self._rank)]
            print(*lines, sep="\n", file=self._screen, flush=True)
        if self._main or failure.rank != 0:
            self._meet()
        try:
            self.clear()
        finally:
            os._exit(failure.code)
