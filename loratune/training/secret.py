"""The secret that the processes of one run share, and no other program on the network knows.

The launcher's run id is none: torchrun keeps it as a key in a store that answers everybody who reaches its endpoint.
"""

import hmac
import logging
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from loratune.errors import LostError, Problem

_log = logging.getLogger(__name__)

VARIABLE = "LORATUNE_SECRET"
"""The environment variable by which machines without a common directory are given one secret."""
_SHORTEST = 16  # characters of a secret that a user gives


def given() -> bytes | None:
    """The secret that the user set, None without one. Raises LostError: it can be guessed."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    if len(text) < _SHORTEST or len(set(text)) < _SHORTEST // 2:
        what = f"is shorter than {_SHORTEST} characters, or repeats itself, so it can be guessed"
        raise LostError(Problem(what, VARIABLE, fix=f"{VARIABLE}=$(openssl rand -hex 32), the same on all machines"))
    return os.fsencode(text)


def write(name: str, *, one_machine: bool) -> Path | None:
    """Write a new secret to a file that no other user can read, where the processes of this run look for it.

    name: a random text that all of them know; one_machine: no other machine needs to see the file. Returns the path of
    the file, which the caller removes; None if no directory can be written.
    """
    for directory in _places(one_machine=one_machine):
        path = directory / _file(name)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
            return path
        except OSError:
            _log.debug("no secret can be shared in %s", directory, exc_info=True)
    return None


def read(name: str, *, one_machine: bool) -> bytes | None:
    """What `write` wrote in another process of the same user; None if it is not to be found from here."""
    for directory in _places(one_machine=one_machine):
        with suppress(OSError):
            handle = os.open(directory / _file(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(handle, "rb") as file:
                status = os.fstat(handle)
                private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077 and status.st_uid == os.geteuid()
                if private and len(content := file.read(65)) == 64:
                    return content
    return None


def derived(secret: bytes, nonces: Iterable[bytes]) -> bytes:
    """The secret of one run. nonces: random bytes of each of its processes, so that no older run had the same."""
    return hmac.digest(secret, b"loratune run" + b"".join(nonces), "sha256")


def _file(name: str) -> str:
    return f".loratune-{name}.secret"


def _places(*, one_machine: bool) -> list[Path]:
    """Directories that processes of one user see in common, whatever their environments say of temporary files."""
    if one_machine:
        return [Path(f"/run/user/{os.geteuid()}"), Path("/dev/shm"), Path("/tmp")]
    with suppress(RuntimeError):
        return [Path.home(), Path.cwd()]
    return [Path.cwd()]
