"""Where errors become `error:` lines and exit codes: the one place, around every command."""

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

from loratune import launched
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
from loratune.interrupts import Termination, terminable
from loratune.launched import Alone, Group


@contextmanager
def boundary(debug: bool, join: Callable[[], Group] = Alone) -> Iterator[Group]:
    """Turn what goes wrong into `error:` lines and an exit code; keep the libraries' own remarks off the screen.

    join: meets the other processes of a run; a command without it is for one process.
    """
    if not debug:
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    group: Group = Alone()
    try:
        with terminable():
            if join is Alone and (started := launched.count()) > 1:
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
    except (Exception, KeyboardInterrupt) as error:
        _fail(group, error, debug)


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


def _fail(group: Group, error: BaseException, debug: bool) -> None:
    if group.count > 1:
        for number in (signal.SIGINT, signal.SIGTERM):  # the launcher passes on what ends this process already
            signal.signal(number, signal.SIG_IGN)
    problems, code = group.fail(error, *_explained(error))
    screen = sys.stderr if group.main else Screen(sys.__stderr__)
    if debug:
        traceback.print_exception(error, file=screen)
    for problem in problems:
        print(f"error: {problem}", file=screen, flush=True)
    if group.count > 1:
        os._exit(code)  # torch may wait for the others as Python ends, and they are gone
    raise typer.Exit(code) from None


def _explained(error: BaseException) -> tuple[Sequence[Problem], int]:
    """What is said of an error, and its exit code."""
    if isinstance(error, LoratuneError):
        return error.problems, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        what, kind = stopped(error)
        return [Problem(what)], kind.exit_code
    if isinstance(error, OSError):
        full = is_disk_full(error)
        what, where = error.strerror or str(error), str(error.filename or "")
        return [Problem(what, where, fix="make room" if full else "")], 8 if full else 1
    if is_out_of_memory(error):
        fix = "lower training.per_device_train_batch_size or data.max_length, or set training.activation_checkpointing"
        return [Problem("out of memory", fix=fix)], 8
    if is_disk_full(error):
        return [Problem("no room on the disk", fix="make room")], 8
    first = next(iter(str(error).splitlines()), "")
    return [Problem(f"unexpected {type(error).__name__}: {first}", fix="run again with --debug")], 1
