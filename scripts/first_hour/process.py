"""One command of a tool: its exit code, its seconds, and what it said."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\].*?\x07")
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b: ")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled", "COLUMNS": "160", "NO_COLOR": "1",
}  # fmt: skip
"""No hub is reached, no GPU seen, and nothing sent to a tracker."""


@dataclass(frozen=True)
class Ran:
    """A command that ended. exit: negative for a signal; said: its output and errors, without colours."""

    exit: int
    seconds: float
    said: str

    @property
    def last(self) -> str:
        """Its last line; of a traceback the last error of the tool itself, not that of a launcher that started it."""
        lines = [text for line in self.said.splitlines() if (text := line.strip(" │╭╰─╮╯"))]
        errors = [line for line in lines if _ERROR.match(line) and "CalledProcessError" not in line]
        return ((self.traceback and errors) or lines or [""])[-1]

    @property
    def traceback(self) -> bool:
        """Whether it showed one."""
        return "Traceback (most recent call last)" in self.said


def plain(text: str) -> str:
    """Text of a terminal as lines, each as it was in the end."""
    lines = _ESCAPE.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(part[-1] if (part := [one for one in line.split("\r") if one.strip()]) else "" for line in lines)


def run(
    command: list[str],
    programs: Path,
    place: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
    until: Callable[[], bool] | None = None,
) -> Ran:
    """Run a command in a directory. programs: where its program is; limit: seconds; until: kill it, and all that it
    started, once this holds."""
    log = place / f"log-{time.time_ns()}"
    variables = os.environ | ENVIRONMENT | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    variables.pop("PYTHONPATH", None)
    variables |= {"HF_DATASETS_CACHE": str(place / "datasets")} | dict(environment or {})
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(programs / command[0]), *command[1:]], cwd=place, env=variables, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None and time.monotonic() - start < limit and not (until and until()):
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = plain(log.read_text(encoding="utf-8", errors="replace"))
    return Ran(process.returncode, round(time.monotonic() - start, 1), said)
