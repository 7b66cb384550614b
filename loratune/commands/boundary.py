"""Where errors become `error:` lines and exit codes: the one place, around every command."""

import errno
import logging
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

from loratune.console import Screen
from loratune.errors import (
    ConfigError,
    Interrupted,
    LoratuneError,
    Problem,
    ResourceError,
    Terminated,
    is_disk_full,
    is_out_of_memory,
)
from loratune.system import launcher, signals
from loratune.system.launcher import Group, SingleProcess
from loratune.system.signals import Stop, Termination, terminable


@contextmanager
def boundary(debug: bool, join: Callable[[], Group] = SingleProcess, *, scarce: str = "free memory") -> Iterator[Group]:
    """Turn what goes wrong into `error:` lines and an exit code; keep the libraries' own remarks off the screen.

    join: meets the other processes of a run; a command without it is for one process. scarce: what to do where this
    command runs out of memory. debug: what the package logs is shown too, as where an error is no reason to stop.
    """
    log, shown = logging.getLogger("loratune"), logging.StreamHandler()
    if debug:
        shown.setFormatter(logging.Formatter("debug: %(name)s: %(message)s"))
        log.addHandler(shown)
        log.setLevel(logging.DEBUG)
    else:
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    group: Group = SingleProcess()
    stop = Stop()
    try:
        with terminable() as stop:
            if join is SingleProcess and (started := launcher.count()) > 1:
                fix = "start it without a launcher"
                raise ConfigError(Problem(f"was started {started} times, and is for one process", fix=fix))
            group = join()
            yield group
        with printed():
            pass  # what was printed before and is still on its way
    except typer.Exit:
        raise
    except BrokenPipeError:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115  whoever read us has gone; the exit must not flush to it
        raise typer.Exit(0) from None
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        told = error if stop.asked is None or _says_so(error) else stop.asked()
        with signals.ending(hurried=_says_so(told)):
            _fail(group, told, debug, scarce)
    finally:
        log.removeHandler(shown)
        log.setLevel(logging.NOTSET)


_ENDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (8, "make room")),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), (8, "raise ulimit -n")),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM), (2, "check the path")),
}
"""Error of the system → exit code, and what to do, where no command knows better."""


def _says_so(error: BaseException) -> bool:
    """Whether an error is that of a signal; a library may have turned the signal into one of its own."""
    return isinstance(error, KeyboardInterrupt | Interrupted | Terminated)


def stopped(stop: KeyboardInterrupt) -> tuple[str, type[LoratuneError]]:
    """What happened, and the error that ends the command."""
    return ("terminated", Terminated) if isinstance(stop, Termination) else ("interrupted", Interrupted)


@contextmanager
def printed() -> Iterator[None]:
    """Results are printed inside, when all else is done. Raises ResourceError: there is no room for them."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not is_disk_full(error):
            raise
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115  the exit must not try it again
        what = "no room for what was to be printed; all else is done"
        raise ResourceError(Problem(what, "standard output", fix="make room")) from None


def _fail(group: Group, error: BaseException, debug: bool, scarce: str) -> None:
    problems, code = group.fail(error, *_explained(error, scarce))
    screen = sys.stderr if group.main else Screen(sys.__stderr__)
    if debug:
        traceback.print_exception(error, file=screen)
    for problem in problems:
        print(f"error: {problem}", file=screen, flush=True)
    if group.count > 1:
        os._exit(code)  # torch may wait for the others as Python ends, and they are gone
    raise typer.Exit(code) from None


def _explained(error: BaseException, scarce: str) -> tuple[Sequence[Problem], int]:
    """What is said of an error, and its exit code. scarce: the way out where memory is short."""
    if isinstance(error, LoratuneError):
        return error.problems, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        what, kind = stopped(error)
        return [Problem(what)], kind.exit_code
    if is_out_of_memory(error):
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        allowed = "" if limit == resource.RLIM_INFINITY else f"; this process may have {limit:,} bytes (ulimit -v)"
        return [Problem(f"out of memory{allowed}", fix=scarce)], 8
    if isinstance(error, OSError):
        what, where = error.strerror or str(error), str(error.filename or "")
        code, fix = _ENDS.get(error.errno or 0, (1, ""))
        return [Problem(what, where, fix=fix)], code
    if is_disk_full(error):
        return [Problem("no room on the disk", fix="make room")], 8
    first = next(iter(str(error).splitlines()), "")
    return [Problem(f"unexpected {type(error).__name__}: {first}", fix="run again with --debug")], 1
