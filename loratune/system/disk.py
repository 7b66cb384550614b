"""Writing to the disk: whether there is room, and that it has arrived."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratune.errors import Problem, ResourceError, is_disk_full


def check_room(directory: Path, needed: int) -> None:
    """Raises ResourceError: fewer than `needed` bytes are free where a run writes."""
    if (free := shutil.disk_usage(directory).free) < needed:
        what = f"checkpoints and the adapter directory take {needed:,} bytes, {free:,} are free"
        raise ResourceError(Problem(what, str(directory), "output_dir", "make room, or choose another disk"))


@contextmanager
def room_for(what: str, size: int, where: Path, fix: str) -> Iterator[None]:
    """Something of about `size` bytes is written inside.

    Raises ResourceError: the disk is full, or the user's share of it.
    """
    try:
        yield
    except Exception as error:  # torch and safetensors have errors of their own for it
        if not is_disk_full(error):
            raise
        left, (limit, _) = f"{shutil.disk_usage(where).free:,} are free", resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY:
            left += f", and a file may hold {limit:,} (ulimit -f)"
        what = f"no room for {what}: it takes {size:,} bytes, {left}"
        raise ResourceError(Problem(what, str(where), fix=fix)) from None


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON with a final newline; keys keep their order."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
