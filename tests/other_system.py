"""Runs commands of loratune as on another system: `python tests/other_system.py SYSTEM '[["train", "config.yaml"]]'`.

Only the modules of loratune notice it, as the libraries here are those for Linux: what the system lacks cannot be
imported by them, is no attribute of `os`, `signal`, `select` and `platform`, and no file of /proc and /sys can be
opened. Prints a line of JSON for each command: its exit code.
"""

import builtins
import errno
import fcntl
import json
import os
import platform
import resource
import select
import signal
import sys
import types
from typing import Any

LACKS = {
    "Darwin": "os.sched_getaffinity os.memfd_create os.MFD_CLOEXEC os.MFD_ALLOW_SEALING",
    "Windows": "fcntl resource os.sched_getaffinity os.memfd_create os.MFD_CLOEXEC os.MFD_ALLOW_SEALING os.O_NOFOLLOW "
    "os.O_NONBLOCK os.O_CLOEXEC os.geteuid os.getuid os.getpgid os.killpg os.uname os.fchmod os.mkfifo os.fork "
    "signal.SIGHUP signal.SIGUSR1 signal.SIGUSR2 signal.SIGXCPU signal.SIGKILL signal.SIGALRM signal.SIGPIPE "
    "signal.pthread_sigmask select.poll select.PIPE_BUF",
}
SYSTEM = sys.argv[1]
MISSING = {*LACKS[SYSTEM].split()}


def open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return os.open(path, flags, *rest, **named)


def sync(handle: int) -> None:
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(handle)


def locking(handle: int, mode: int, count: int) -> None:
    assert (mode, count) == (2, 1) and os.lseek(handle, 0, os.SEEK_CUR) >= 1 << 30
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def usage(who: int) -> types.SimpleNamespace:
    found = resource.getrusage(who)
    fields = {name: getattr(found, name) for name in dir(found) if name.startswith("ru_")}
    return types.SimpleNamespace(**fields | {"ru_maxrss": found.ru_maxrss * 1024})  # bytes, and not KiB


MSVCRT = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
DIFFERS: dict[str, dict[str, Any]] = {
    "platform": {"system": lambda: SYSTEM, "libc_ver": lambda: ("", ""), "processor": lambda: ""},
    "os": {"uname": lambda: types.SimpleNamespace(sysname=SYSTEM)},
    "importlib": {},
}
if SYSTEM == "Windows":
    DIFFERS["os"] |= {"name": "nt", "open": open_file, "fsync": sync}
    DIFFERS["importlib"] = {"import_module": lambda name: MSVCRT if name == "msvcrt" else importing(name)}


class Masked:
    """A module without what the system lacks."""

    def __init__(self, module: types.ModuleType):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        module = self._module
        if f"{module.__name__}.{name}" in MISSING:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return DIFFERS.get(module.__name__, {}).get(name) or getattr(module, name)


if SYSTEM == "Darwin":
    DIFFERS["resource"] = {"getrusage": usage}
MASKED = {
    module.__name__: Masked(module) for module in (os, signal, select, platform, resource, sys.modules["importlib"])
}
importing, import_original = sys.modules["importlib"].import_module, builtins.__import__


def of_loratune(name: str) -> bool:
    return name.partition(".")[0] == "loratune"


def import_masked(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
    module = import_original(name, globals, *rest, **named)
    if not of_loratune((globals or {}).get("__name__", "")):
        return module
    if name in MISSING:
        raise ModuleNotFoundError(f"No module named {name!r}")
    return MASKED.get(name, module)


def hide(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not str(arguments[0]).startswith(("/proc", "/sys")):
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] in ("pathlib", "pathlib._local", "io"):
        frame = frame.f_back
    if of_loratune(frame.f_globals["__name__"]):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", arguments[0])


def main() -> None:
    builtins.__import__ = import_masked
    sys.addaudithook(hide)
    run = importing("loratune.__main__").main
    for command in json.loads(sys.argv[2]):
        sys.argv[:] = ["loratune", *command]
        code = 0
        try:
            run()
        except SystemExit as exit:
            code = exit.code or 0  # type: ignore[assignment]
        print(json.dumps({"code": code}), flush=True)


if __name__ == "__main__":
    main()
