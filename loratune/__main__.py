"""`loratune` and `python -m loratune`, so that `accelerate launch -m` and `torchrun -m` can start it."""

import os
import sys

try:
    from loratune.system import signals
except KeyboardInterrupt:  # before there is a handler
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def main() -> None:
    """Hear signals from the start, then load the command line and obey it. Of several processes one is heard; another
    one speaks by `sys.__stderr__`, should that one have gone."""
    try:
        with signals.immediate():
            _run()
    finally:
        signals.ignore()  # nothing is left to be stopped, and nobody to say so nicely


def _run() -> None:
    from loratune.errors import LoratuneError, ResourceError, is_out_of_memory
    from loratune.system import launcher, streams

    streams.secure()
    if launcher.rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends
    try:
        from loratune.cli import app
        from loratune.console import Patient

        sys.stderr = Patient(sys.stderr)
        try:
            app(prog_name="loratune")
        finally:  # by SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # of a text that no command prints, such as --help
        sys.exit(0)
    except LoratuneError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory while the program was loaded; raise ulimit -v", file=sys.stderr)
        sys.exit(ResourceError.exit_code)


if __name__ == "__main__":
    main()
