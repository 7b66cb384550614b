"""How the threads of torch wait for each other: what suits a machine that does something else too.

Threads meet after each product. OpenMP's runtime lets those that are first spin: on an idle machine that is fastest,
but beside another process they take the time from the very thread that they wait for. scripts/README.md has the
figures. What a run computes does not depend on it.
"""

import importlib
import math
import os
import sys
import time
from pathlib import Path

from loratune.system import launcher

_STATISTICS = Path("/proc/stat")
_CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""By each of these a user decides it."""
_SPINS = "100"
_BUSY = 0.4
"""Processors that others use, from which on few spins are faster."""
_SECONDS = 0.3
"""The shortest time over which that is measured; the kernel counts in hundredths of a second."""


def adapt_to_load() -> float | None:
    """Have threads spin briefly if other processes use the processors of this one.

    OpenMP reads its settings as torch is loaded, so torch must not be loaded yet. The load is measured while libraries
    are imported that a command needs in any case.

    Returns:
        How many processors others use, if it made a difference.
    """
    is_late = "torch" in sys.modules or not _STATISTICS.exists()
    if is_late or launcher.world_size() > 1 or any(os.environ.get(name) for name in _CHOSEN):
        return None
    if os.environ.get("OMP_NUM_THREADS") == "1" or len(os.sched_getaffinity(0)) == 1:
        return None
    start, before = time.monotonic(), _others_seconds()
    for name in ("datasets", "transformers"):
        importlib.import_module(name)
    time.sleep(max(0.0, start + _SECONDS - time.monotonic()))
    elapsed = time.monotonic() - start
    others = (_others_seconds() - before) / elapsed
    if not others >= _BUSY or "torch" in sys.modules:
        return None
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return others


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


def described(others: float) -> str:
    """A line for the user."""
    return (
        f"other processes use {others:.1f} of {len(os.sched_getaffinity(0))} processors, so threads wait asleep "
        f"(GOMP_SPINCOUNT={_SPINS}); results do not depend on it"
    )
