"""`loratune` and `python -m loratune`, so that `accelerate launch -m` and `torchrun -m` can start it."""

import sys

from loratune.interrupts import Termination, terminable


def main() -> None:
    """Hear signals from the start, then load the command line and obey it."""
    try:
        with terminable():
            from loratune.cli import app

            app(prog_name="loratune")
    except KeyboardInterrupt as stop:  # before a command has begun
        sys.exit(143 if isinstance(stop, Termination) else 130)


if __name__ == "__main__":
    main()
