"""`loratune` and `python -m loratune`, so that `accelerate launch -m` and `torchrun -m` can start it."""

import os
import signal
import sys

from loratune import launched
from loratune.interrupts import Termination, terminable


def main() -> None:
    """Hear signals from the start, then load the command line and obey it. Of several processes one is heard; another
    one speaks by `sys.__stderr__`, should that one have gone."""
    if launched.rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends
    try:
        with terminable():
            from loratune.cli import app
            from loratune.console import Patient

            sys.stderr = Patient(sys.stderr) if sys.stderr is not None else None

            app(prog_name="loratune")
    except KeyboardInterrupt as stop:  # before a command has begun
        terminated = isinstance(stop, Termination)
        print("error: terminated" if terminated else "error: interrupted", file=sys.stderr)
        sys.exit(143 if terminated else 130)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to be stopped, and nobody to say so nicely
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
