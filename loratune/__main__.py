"""The entry point of `loratune` and `python -m loratune`. `accelerate launch -m` and `torchrun -m` can start it too."""

import atexit
import gc
import os
import sys

try:
    from loratune.system import signals
except KeyboardInterrupt:  # no handler is installed yet
    _problem = b'{"code": "interrupted", "place": "", "key": "", "what": "interrupted", "fix": ""}'
    _is_json = "--json" in sys.argv
    os.write(2, b'{"exit_code": 130, "errors": [%b]}\n' % _problem if _is_json else b"error: interrupted\n")
    os._exit(130)


def main() -> None:
    """Handle signals from the start, then load the command line and run it.

    With several processes, only rank 0 prints; another rank prints to `sys.__stderr__` if rank 0 has ended.
    """
    try:
        with signals.exit_on_signals():
            _run()
    finally:
        signals.ignore_signals()  # all work is done, and the handlers that report signals are removed


def _end_quickly() -> None:
    """Leave the last collection out, which takes 2 s, and discard what native code prints after it.

    nanobind, with which Triton 3.9 is made, then lists what is left, although nobody uses this program any more.
    """
    from loratune import console

    gc.freeze()
    console.discard_stderr()


def _run() -> None:
    from loratune import console
    from loratune.codes import Code
    from loratune.errors import LoratuneError, Problem, ResourceError, is_out_of_memory
    from loratune.system import launcher

    console.secure()
    if "--debug" not in sys.argv:
        atexit.register(_end_quickly)  # the first that is registered is the last that runs
    if launcher.rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends
    try:
        from loratune.cli import app

        sys.stderr = console.LossyStream(sys.stderr)
        try:
            app(prog_name="loratune")
        finally:  # `app` ends with SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of --help or similar output has closed the pipe
        sys.exit(0)
    except LoratuneError as error:
        console.print_problems(error.problems, error.exit_code)
        sys.exit(error.exit_code)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = "out of memory while the program was loading"
        console.print_problems(
            [Problem(Code.SYSTEM_OUT_OF_MEMORY, what, fix="raise ulimit -v")], ResourceError.exit_code
        )
        sys.exit(ResourceError.exit_code)


if __name__ == "__main__":
    main()
