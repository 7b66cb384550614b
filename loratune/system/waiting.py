"""How many threads torch has, and how they wait for each other: what suits a machine that does something else too, and
a container that has a share of one.

Threads meet after each product. OpenMP's runtime lets those that are first spin: on an idle machine that is fastest,
but beside another process they take the time from the very thread that they wait for. scripts/README.md has the
figures. What a run computes does not depend on it. And it starts a thread for each processor that it sees, where a
container may be allowed the time of a few: then all of them are halted again and again.
"""

import importlib
import math
import os
import sys
import time
from pathlib import Path

from loratune.system import containers, launcher

_STATISTICS = Path("/proc/stat")
_THREADS = "OMP_NUM_THREADS"
_CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""By each of these a user decides how threads wait."""
_SPINS = "100"
_BUSY = 0.4
"""Processors that others use, from which on few spins are faster."""
_SECONDS = 0.3
"""The shortest time over which that is measured; the kernel counts in hundredths of a second."""


def threads() -> int:
    """How many threads a program that is started is to have: as many as OMP_NUM_THREADS says, or as it has processors,
    or the time of processors in a container."""
    given = os.environ.get(_THREADS, "").partition(",")[0]
    if given.isascii() and given.isdecimal() and int(given) > 0:
        return int(given)
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), containers.processors())))


def adapt_threads() -> list[str]:
    """Have as many threads as the limit of a container allows, which spin briefly if others use the processors too.

    OpenMP reads its settings as torch is loaded, so torch must not be loaded yet. The load is measured while libraries
    are imported that a command needs in any case. What the user has set stays.

    Returns:
        Lines for the user on what was set.
    """
    if "torch" in sys.modules or not _STATISTICS.exists() or launcher.world_size() > 1:
        return []
    return [*_fit_to_container(), *_fit_to_load()]


def _fit_to_container() -> list[str]:
    """As many threads as the processors whose time the container may use, where these are fewer than it sees."""
    seen, allowed = len(os.sched_getaffinity(0)), containers.processors()
    if allowed > seen - 1 or os.environ.get(_THREADS):
        return []
    os.environ[_THREADS] = str(threads())
    return [f"a container may use {allowed:g} of {seen} processors, so threads are as few ({_THREADS}={threads()})"]


def _fit_to_load() -> list[str]:
    """Threads that spin briefly if other processes use the processors of this one."""
    seen = len(os.sched_getaffinity(0))
    if os.environ.get(_THREADS) == "1" or seen == 1 or any(os.environ.get(name) for name in _CHOSEN):
        return []
    start, before = time.monotonic(), _others_seconds()
    for name in ("datasets", "transformers"):
        importlib.import_module(name)
    time.sleep(max(0.0, start + _SECONDS - time.monotonic()))
    others = (_others_seconds() - before) / (time.monotonic() - start)
    if not others >= _BUSY or "torch" in sys.modules:
        return []
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return [
        f"other processes use {others:.1f} of {seen} processors, so threads wait asleep (GOMP_SPINCOUNT={_SPINS}); "
        "results do not depend on it"
    ]


def _others_seconds() -> float:
    """The time that other processes have used the processors of this one; NaN where the kernel does not tell."""
    try:
        return _busy_seconds(_STATISTICS.read_text()) - sum(os.times()[:4])
    except (OSError, ValueError):
        return math.nan


def _busy_seconds(statistics: str) -> float:
    """The time that the processors of this process were not idle, from `/proc/stat`; see proc_stat(5).

    What a hypervisor took counts too.

    Raises:
        ValueError: The text has another form.
    """
    own, ticks = os.sched_getaffinity(0), 0
    for line in statistics.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in own:
            user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, counts[:8])
            ticks += user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK")
