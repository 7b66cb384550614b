"""Real processes of `loratune` without the 6 s of imports for each: one process imports, and forks for every command.

    python scripts/fork_server.py

reads a JSON object a line, {"argv": [...], "err": "FILE", "out": "FILE", "env": {...}, ...} (see `ForkServer.start`),
and answers with the process id of the fork; then, whenever one ends, with [process id, exit code], negative for the
signal that killed it. The parent computes nothing while it serves, so that a fork finds no thread of torch's half way
through anything. `ForkServer` is the other end of it, for tests and scripts.
"""

import ctypes
import gc
import io
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 240
"""The seconds within which the server has run its warm commands and answers; on a busy machine it takes half a minute.
"""
PR_SET_PDEATHSIG = 1
"""Of `man 2 prctl`: the signal that a process gets when the one that started it has ended."""


@dataclass
class Child:
    """A command that was started. code: its exit code once it has ended, negative for the signal that killed it."""

    server: "ForkServer"
    pid: int
    err: Path
    out: Path

    @property
    def code(self) -> int | None:
        """The exit code, if the server has reported it."""
        return self.server.ended.get(self.pid)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        self.server.listen(0)
        return self.code

    def wait(self, seconds: float = 120) -> int:
        """The exit code, once it has ended. Raises TimeoutError, and kills it: it takes longer."""
        end = time.monotonic() + seconds
        while (code := self.code) is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(self.said())
            self.server.listen(0.05)
        return code

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def said(self) -> str:
        """What it has written to stderr."""
        return self.err.read_text() if self.err.exists() else ""


class ForkServer:
    """Starts commands. ended: process id → exit code of those that have."""

    def __init__(self, scratch: Path, warm: Sequence[Sequence[object]] = (), **environment: str):
        self.ended: dict[int, int] = {}
        self._scratch, self._children, self._incomplete_line = scratch, list[Child](), b""
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(json.dumps([*map(str, command)]) for command in warm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment,
        )
        self._started: list[int] = []

    def start(
        self,
        *arguments: object,
        limit: int | None = None,
        memory: int | None = None,
        ignored: int | None = None,
        first: str = "",
        stdout: str | Path | None = None,
        stderr: str | Path | None = None,
        **environment: str,
    ) -> Child:
        """Start `loratune ARGUMENTS`.

        Args:
            limit: The bytes beyond which no file may grow, as on a disk that is full.
            memory: The bytes that it may take beyond what its imports take.
            ignored: A signal that is ignored, as under nohup.
            first: Python code that is run before the command.
            stdout: Where its output goes, such as a named pipe that somebody has opened, in place of a file.
            stderr: The same for its messages.
            environment: Variables. Those that libraries read when they are imported come too late.
        """
        number = len(self._children)
        out, err = (
            Path(stream or self._scratch / f"{number}.{end}") for stream, end in ((stdout, "out"), (stderr, "err"))
        )
        order: dict[str, Any] = {
            "argv": [*map(str, arguments)],
            "out": str(out),
            "err": str(err),
            "env": environment,
            "first": first,
        }
        order |= {"limit": limit, "memory": memory, "ignored": ignored}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        end = time.monotonic() + LIMIT
        while not self._started:
            if time.monotonic() > end:
                self._process.kill()
                raise TimeoutError(f"the fork server has started nothing for {LIMIT} s")
            self.listen(1)
        child = Child(self, self._started.pop(), err, out)
        self._children.append(child)
        return child

    def launch(self, count: int, *arguments: object, each: Sequence[dict[str, Any]] = ()) -> list[Child]:
        """Start the processes of one run, with the variables that torchrun sets. each: more keywords of `start`."""
        port = str(free_port())
        more: Sequence[dict[str, Any]] = each or [{}] * count
        variables = [launch_variables(rank, count, port) for rank in range(count)]
        return [self.start(*arguments, **own | further) for own, further in zip(variables, more, strict=True)]

    def listen(self, seconds: float) -> None:
        """Read what the server reports, waiting at most this number of seconds."""
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        if not select.select([stream], [], [], seconds)[0]:
            return
        block = os.read(stream, 1 << 16)
        if not block:
            raise RuntimeError("the fork server has ended")
        *lines, self._incomplete_line = (self._incomplete_line + block).split(b"\n")
        for report in map(json.loads, lines):
            if isinstance(report, int):
                self.ended.pop(report, None)  # of an earlier process that had the same number
                self._started.append(report)
            else:
                self.ended[report[0]] = report[1]

    def close(self) -> None:
        """End all that still runs."""
        for child in self._children:
            child.send(signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


_PORTS = itertools.count()


def free_port() -> int:
    """A port that nobody has. The kernel gives none of this range to others, and other processes try others first."""
    while True:
        port = 20_000 + (os.getpid() * 64 + next(_PORTS)) % 10_000
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def launch_variables(rank: int, count: int, port: str) -> dict[str, str]:
    """What torchrun sets for one of several processes on this machine."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@contextmanager
def fork_server(scratch: Path, warm: Sequence[Sequence[object]] = (), **environment: str) -> Iterator[ForkServer]:
    """A fork server that is closed again.

    Args:
        scratch: A directory for what commands write.
        warm: The arguments of commands that the server itself runs first, so that what they import, compile and cache
            is there in every fork. A training of the tiny model then takes a third of the time.
        environment: Variables.
    """
    made = ForkServer(scratch, warm, **environment)
    try:
        yield made
    finally:
        made.close()


class SharedTraces(dict[str, Any]):
    """`memory.activations._TRACED`, the result of each step that was traced, for all processes of a test session."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def __contains__(self, key: object) -> bool:
        return (self._folder / str(key)).exists()

    def __getitem__(self, key: str) -> Any:
        return json.loads((self._folder / key).read_text())

    def __setitem__(self, key: str, traced: Any) -> None:
        unfinished = self._folder / f"{key}.{os.getpid()}"
        unfinished.write_text(json.dumps(traced))
        unfinished.rename(self._folder / key)


def born(order: dict[str, Any]) -> int:
    """Fork, and be `loratune` in the child."""
    if child := os.fork():
        return child
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the server
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.close(0)
    os.environ |= order["env"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if order["ignored"]:
        signal.signal(order["ignored"], signal.SIG_IGN)
    if limit := order["limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if memory := order["memory"]:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.RLIM_INFINITY))
    sys.argv = ["loratune", *order["argv"]]
    code = 1
    try:
        exec(order["first"], {})
        from loratune.__main__ import main  # noqa: PLC0415  imported already, see `prepare`

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what the boundary let through is shown, and is a fault
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def tell(value: Any) -> None:
    """A line of JSON to whoever started us."""
    print(json.dumps(value), flush=True)


def prepare(warm: Sequence[Sequence[str]]) -> None:
    """Import what every command imports, make the tables that transformers makes of names, and run the warm commands.

    The collector leaves alone what is there: to look at it would make a copy of most of its memory in each fork.
    """
    from loratune.system import hub_kernels  # noqa: PLC0415

    with hub_kernels.hidden_from_bitsandbytes():
        import bitsandbytes  # noqa: F401, PLC0415
    import transformers.models.llama.modeling_llama  # noqa: F401, PLC0415
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: PLC0415

    import loratune.adapter.answering  # noqa: PLC0415
    import loratune.cli  # noqa: PLC0415  once for all forks, and not where only `ForkServer` is wanted
    import loratune.cli.display  # noqa: PLC0415
    import loratune.cli.terminal  # noqa: PLC0415
    import loratune.compare.behavior  # noqa: PLC0415
    import loratune.compare.evaluation  # noqa: PLC0415
    import loratune.memory.activations  # noqa: PLC0415
    import loratune.study.sweep  # noqa: PLC0415
    import loratune.training.processes  # noqa: PLC0415
    import loratune.training.run  # noqa: PLC0415

    if folder := os.environ.get("SHARED_TRACES"):
        loratune.memory.activations._TRACED = SharedTraces(Path(folder))
    if path := os.environ.get("FEW_INSTRUCTIONS"):
        loratune.compare.behavior.INSTRUCTIONS = Path(path)
    loratune.cli.terminal.PATIENCE = 3600.0  # or lines about slow work would come as it suits the machine
    get_checkpoint_conversion_mapping("llama")
    for command in warm:
        run_here(command)
    gc.collect()
    gc.freeze()


def run_here(command: Sequence[str]) -> None:
    """Run a command in this process, silently. Raises RuntimeError: it failed."""
    from accelerate.state import AcceleratorState, GradientState  # noqa: PLC0415

    from loratune.cli import app  # noqa: PLC0415
    from loratune.kernels.compiled import fused_ops  # noqa: PLC0415

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            app(list(command), prog_name="loratune")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(said.getvalue()) from end
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    fused_ops._loaded.cache_clear()
    fused_ops._library.cache_clear()  # each fork finds a compiler, and a cache, by its own variables
    tempfile.tempdir = None


def serve() -> None:
    """Until stdin ends."""
    prepare([json.loads(command) for command in sys.argv[1:]])
    waiting, pending = 0, b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01 if waiting else None)
        if ready:
            block = os.read(0, 1 << 16)
            if not block:
                return
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                tell(born(json.loads(line)))
                waiting += 1
        while waiting:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                break
            waiting -= 1
            tell([child, os.waitstatus_to_exitcode(status)])


if __name__ == "__main__":
    serve()
