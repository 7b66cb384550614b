"""Standard streams that are closed, full, or cannot encode the output, in real processes."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import Expected, Ran, check_refused, run_command
from running import WEIGHTS, Cli, MakeConfig

from loratune.codes import Code

NO_ROOM: Expected = (Code.OUTPUT_FAILED, "standard output", "")
ARROWS = [{"prompt": f"é → {number}", "completion": " ö"} for number in range(16)]


def shell(*arguments: object, redirected: str, stdin: bytes = b"", **environment: str) -> Ran:
    """Run `loratune ARGUMENTS` in a shell that redirects its streams, as in `>&-`."""
    command = ["bash", "-c", f'"$@" {redirected}', "bash", sys.executable, "-m", "loratune", *map(str, arguments)]
    done = run_command(command, capture_output=True, input=stdin, env=os.environ | environment, check=False)
    return Ran(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


@pytest.fixture
def arrows(run_config: MakeConfig, tmp_path: Path) -> Path:
    """A config whose rows contain characters outside ASCII."""
    rows = tmp_path / "arrows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ARROWS))
    return run_config(data={"train": str(rows)}, training={"max_steps": 1})


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        ("--version", "1"),
        ("train --help", ""),
        pytest.param("--version", "", marks=pytest.mark.slow),
        pytest.param("train --help", "1", marks=pytest.mark.slow),
        pytest.param("--help", "1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("redirected", "code", "problems"),
    [
        (">&-", 0, []),
        ("2>&-", 0, []),
        ("<&- >&- 2>&-", 0, []),
        (">/dev/full", 8, [NO_ROOM]),
        (">/dev/full 2>/dev/full", 8, []),
        ("| true; exit ${PIPESTATUS[0]}", 0, []),
    ],
)
def test_help_and_version_with_closed_or_full_streams(
    arguments: str, unbuffered: str, redirected: str, code: int, problems: list[Expected]
) -> None:
    ran = shell(*arguments.split(), redirected=redirected, PYTHONUNBUFFERED=unbuffered)
    check_refused(ran, code, *problems)
    assert ran.err.count("\n") == len(problems)


@pytest.mark.parametrize(
    "redirected",
    [
        ">/dev/full",
        "<&- >&- 2>&-",
        *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-", "2>/dev/full")),
    ],
)
def test_errors_keep_their_exit_code_with_closed_or_full_streams(redirected: str) -> None:
    ran = shell("params", "no.yaml", redirected=redirected)
    assert ran.code == 2 and ran.out == ""
    if "2>" not in redirected:
        check_refused(ran, 2, (Code.CONFIG_UNREADABLE, "no.yaml", ""))
        assert ran.err.count("\n") == 1


def test_characters_outside_ascii_are_escaped(arrows: Path, tmp_path: Path, forked: Cli) -> None:
    """In rows, marks of supervised text and the final summary. The adapter is published."""
    settled = (
        "import sys; sys.stdout.reconfigure(encoding='ascii');"
        "sys.stderr.reconfigure(encoding='ascii', errors='backslashreplace')"
    )
    check_escaped(partial(forked, first=settled), "\\u2192", arrows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict", "utf-8"])
def test_characters_outside_the_stream_encoding_are_escaped(encoding: str, arrows: Path, tmp_path: Path) -> None:
    """With the encoding that the interpreter chooses at startup."""
    run = partial(shell, redirected="", PYTHONIOENCODING=encoding)
    check_escaped(run, "→" if encoding == "utf-8" else "\\u2192", arrows, tmp_path)


def check_escaped(run: Cli, arrow: str, arrows: Path, tmp_path: Path) -> None:
    ran = run("train", arrows)
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).is_file()
    assert arrow in ran.out and f"é {arrow}" in ran.err.replace("\\xe9", "é").replace("�", "é")
    ran = run("train", arrows, "--dry-run", "--overwrite")
    assert ran.code == 0 and arrow in ran.out, ran.err


@pytest.mark.slow
def test_run_succeeds_with_all_streams_closed(arrows: Path, tmp_path: Path) -> None:
    """No printed output ends up in the files it opens."""
    ran = shell("train", arrows, redirected="<&- >&- 2>&-")
    assert ran == Ran(0, "", "")
    for path in [*(tmp_path / "out").iterdir(), arrows, tmp_path / "arrows.jsonl"]:
        assert b"trainable params" not in path.read_bytes() and b"\n  saved " not in path.read_bytes()
    answered = shell(
        "generate", "--adapter", tmp_path / "out", "--max-new-tokens", "2", "é →", redirected=">&-", PYTHONUTF8="1"
    )
    assert answered == Ran(0, "", "")


def test_descriptors_of_closed_streams_are_not_reused_for_files(tmp_path: Path) -> None:
    code = (
        "from loratune import console; console.secure(); import sys; file = open(sys.argv[1], 'w');"
        "print('told', flush=True); print('erred', file=sys.stderr, flush=True);"
        "print(file.fileno(), repr(sys.stdin.read()), file=file)"
    )
    path = tmp_path / "file"
    run_command(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code, str(path)], check=True)
    assert path.read_text() == "3 ''\n"


ENDING = """
import atexit, ctypes, gc, sys
from loratune.__main__ import main

atexit.register(lambda: sys.stdout.write(f"{gc.get_freeze_count() > 0}\\n"))  # called last
ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).malloc_stats)  # called when Python has ended; writes to stderr, in C
try:
    main()
finally:
    atexit.register(print, "a summary", file=sys.stderr)  # as trackers print one
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc has malloc_stats")
@pytest.mark.parametrize("debug", [False, True])
def test_stderr_ends_before_native_code_reports_on_itself(debug: bool) -> None:
    """As nanobind does in Triton 3.9. What libraries print before that is shown, and all of it with --debug.

    Nor is anything collected then, which takes 2 s with all libraries.
    """
    command = [sys.executable, "-c", ENDING, "params", "no.yaml", *["--debug"] * debug]
    done = run_command(command, capture_output=True, text=True, check=False)
    error, _, rest = done.stderr.partition("a summary\n")
    assert (done.returncode, done.stdout) == (2, f"{not debug}\n") and error.count("]: no.yaml: ") == 1
    assert ("Arena 0:" in rest) is debug and bool(rest) is debug


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_undecodable_prompt_on_stdin_is_refused(encoding: str) -> None:
    ran = shell("generate", "--adapter", "x", redirected="", stdin=b"caf\xe9 \n", PYTHONIOENCODING=encoding)
    check_refused(ran, 4, (Code.USAGE_BAD_VALUE, "stdin", ""))
    assert ran.out == "" and ran.err.count("\n") == 1
