"""How much memory a process may still take."""

import logging
import resource
from pathlib import Path

import psutil
import torch

_log = logging.getLogger(__name__)

_CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that are free on a GPU; on a CPU, in the machine and within the limits of process and container."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    bounds = [int(psutil.virtual_memory().available)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - int(psutil.Process().memory_info().vms))
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        if most != "max":
            bounds.append(int(most) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or an older kernel's
        _log.debug("no limit of a container is known", exc_info=True)
    return max(0, min(bounds))
