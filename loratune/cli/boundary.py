"""Turns errors into `error:` lines and exit codes. `boundary` surrounds every command."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

from loratune.cli.options import problem_as_options
from loratune.cli.terminal import Terminal
from loratune.codes import Code
from loratune.console import EscapedStream, log, print_problems
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
from loratune.events import listening
from loratune.system import environment, launcher, platforms, signals
from loratune.system.environment import cache_fix
from loratune.system.launcher import Group
from loratune.system.signals import Stop, StopSignal, Termination, raise_on_signals
from loratune.text import without_userinfo

_DISK_FULL = (Code.SYSTEM_DISK_FULL, 8, "make room")
_TOO_MANY_FILES = (Code.SYSTEM_CALL_FAILED, 8, "raise ulimit -n")
_BAD_PATH = (Code.SYSTEM_CALL_FAILED, 2, "check the path")
_OS_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _DISK_FULL),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _TOO_MANY_FILES),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM), _BAD_PATH),
}
"""errno → code, exit code, and the default fix."""


@contextmanager
def boundary(
    debug: bool, join: Callable[[], Group] = Group, *, memory_fix: str = "free memory", verbose: bool = False
) -> Iterator[Group]:
    """Turn errors into `error:` lines and an exit code, show events, and hide warnings of libraries.

    This is the only place that sets signal handlers, warning filters, loggers and the number of threads of a command.

    Args:
        debug: Print tracebacks, warnings, and log messages of the package, such as non-fatal errors.
        join: Joins the other processes of a run; by default the command runs in one process.
        memory_fix: The fix to report if this command runs out of memory.
        verbose: Show reasons and counts.
    """
    logger, handler = logging.getLogger("loratune"), logging.StreamHandler()
    if debug:
        handler.setFormatter(logging.Formatter("debug: %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    else:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers reads it on import
        for library in ("bitsandbytes", "liger_kernel"):
            logging.getLogger(library).setLevel(logging.ERROR)
    group: Group = Group()
    stop = Stop()
    try:
        with raise_on_signals(signals.write_line) as stop, listening(Terminal(verbose)):
            _check_working_directory()
            if join is Group and (size := launcher.world_size()) > 1:
                what = f"was started {size} times, but this command runs in one process"
                fix = "start it without a launcher"
                raise ConfigError(Problem(Code.USAGE_CONFLICT, what, fix=fix))
            if line := environment.limit_threads():
                log(line)
            group = join()
            yield group
        with checked_output():
            pass  # flushes earlier output
    except typer.Exit:
        raise
    except BrokenPipeError:
        _print_nowhere()
        raise typer.Exit(0) from None
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust panics derive from BaseException
        cause = error if stop.requested is None or _is_stop(error) else stop.requested()
        with signals.hold_signals(requested=_is_stop(cause)):
            _close_contexts(error)
            _fail(group, cause, debug, memory_fix)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _check_working_directory() -> None:
    """Raises ConfigError: it has been removed; libraries would report this less clearly."""
    try:
        os.getcwd()
    except FileNotFoundError:
        what, fix = "the working directory has been removed", "change to another directory"
        raise ConfigError(Problem(Code.SYSTEM_CALL_FAILED, what, fix=fix)) from None


def _close_contexts(error: BaseException | None) -> None:
    """Let context managers that an error left open clean up before the process ends.

    A signal may arrive after the generator of a context manager has reached its `yield`, but before the body of the
    `with` statement begins. The generator then ends only when the frames that refer to it are cleared.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _is_stop(error: BaseException) -> bool:
    """Whether an error was raised by a signal handler; a library may have replaced it with its own error."""
    return isinstance(error, KeyboardInterrupt | Interrupted | Terminated)


def stop_error(stop: KeyboardInterrupt, fix: str = "") -> LoratuneError:
    """The error that ends a command after a signal. fix: how to continue; by default that the result is in its place,
    if it was before the command reacted to the signal."""
    if not fix and isinstance(stop, StopSignal) and stop.published is not None:
        fix = f"{stop.published} is finished and whole"
    if isinstance(stop, Termination):
        return Terminated(Problem(Code.TERMINATED, "terminated", fix=fix))
    return Interrupted(Problem(Code.INTERRUPTED, "interrupted", fix=fix))


@contextmanager
def checked_output() -> Iterator[None]:
    """A context for printing results, after all other work is done. Raises ResourceError: the disk is full."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not is_disk_full(error):
            raise
        _print_nowhere()
        what = "not everything was printed, because the disk is full; all other work is done"
        raise ResourceError(Problem(Code.OUTPUT_FAILED, what, "standard output", fix="make room")) from None


@contextmanager
def unread_output() -> Iterator[None]:
    """Ignore a closed pipe inside, as with `| head`, so that the command ends with its own exit code."""
    try:
        with checked_output():
            yield
    except BrokenPipeError:
        _print_nowhere()


def _print_nowhere() -> None:
    """Discard further output after the reader of stdout has gone or the disk is full, as Python flushes it at exit."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _fail(group: Group, error: BaseException, debug: bool, memory_fix: str) -> None:
    problems, exit_code = group.fail(*_explain(error, memory_fix))
    problems = [*map(problem_as_options, problems)]
    stream = sys.stderr if group.main else EscapedStream(sys.__stderr__)
    if debug:
        print(without_userinfo("".join(traceback.format_exception(error))), end="", file=stream)
    print_problems(problems, exit_code, stream)
    if group.count > 1:
        os._exit(exit_code)  # at exit, torch may wait for the other processes, which have ended
    raise typer.Exit(exit_code) from None


def _explain(error: BaseException, memory_fix: str) -> tuple[Sequence[Problem], int]:
    """The problems of an error, and its exit code."""
    if isinstance(error, KeyboardInterrupt):
        error = stop_error(error)
    if isinstance(error, LoratuneError):
        return error.problems, error.exit_code
    if is_out_of_memory(error):
        limit = platforms.memory_limit()
        allowed = "" if limit is None else f"; this process may have {limit:,} bytes (ulimit -v)"
        return [Problem(Code.SYSTEM_OUT_OF_MEMORY, f"out of memory{allowed}", fix=memory_fix)], 8
    if isinstance(error, OSError):
        what, where = error.strerror or str(error), str(error.filename or "")
        code, exit_code, fix = _OS_ERRORS.get(error.errno or 0, (Code.SYSTEM_CALL_FAILED, 1, ""))
        return [Problem(code, what, where, fix=cache_fix(error) or fix)], exit_code
    if is_disk_full(error):
        code, exit_code, fix = _DISK_FULL
        return [Problem(code, "no room on the disk", fix=fix)], exit_code
    first = next(iter(str(error).splitlines()), "")
    what, fix = f"unexpected {type(error).__name__}: {first}", "run again with --debug"
    return [Problem(Code.UNEXPECTED, what, fix=fix)], 1
