"""The command line: heavy libraries are imported late, each problem is one line, and a failed run changes no files."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Expected, Ran, check_refused, meanings, run_command, tree
from running import Cli, MakeConfig
from typer.testing import CliRunner

from loratune import __version__
from loratune.cli import app, boundary
from loratune.codes import Code
from loratune.errors import ConfigError, LoratuneError, Problem
from loratune.system.environment import cache_fix
from loratune.system.signals import Termination
from loratune.training.checkpoints import run_dir

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "scipy")
OLD = {"adapter_config.json": b'{"old": true}', "adapter_model.safetensors": b"old weights"}
COMMANDS = (
    "quickstart", "init", "train", "sweep", "params", "schema", "explain", "evaluate", "report", "generate", "classify",
    "chat", "merge", "export", "push", "env",
)  # fmt: skip
"""In the order of the help."""
ONE_STEP = {"max_steps": 1}


IN_ONE_PROCESS = f"""
import json, sys
from typer.testing import CliRunner
from loratune.cli import app
results = [CliRunner().invoke(app, arguments, prog_name="loratune") for arguments in json.loads(sys.argv[1])]
ran = [[result.exit_code, result.stdout, result.stderr] for result in results]
print(json.dumps([ran, [name for name in {HEAVY} if name in sys.modules]]))
"""


def imported(*commands: Sequence[object]) -> tuple[list[Ran], set[str]]:
    """Runs commands one after another in a new process. Also returns which of the heavy libraries they imported."""
    arguments = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, "-c", IN_ONE_PROCESS, arguments]
    done = run_command(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    ran, heavy = json.loads(done.stdout.splitlines()[-1])
    return [Ran(*one) for one in ran], set(heavy)


def old_adapter(path: Path) -> Path:
    path.mkdir()
    for name, content in OLD.items():
        (path / name).write_bytes(content)
    return path


# Lazy imports


def test_help_version_usage_and_config_errors_import_nothing_heavy(run_config: MakeConfig) -> None:
    path, rows = run_config(lora={"rank": 8}), run_config("rows.yaml", data={"validation": 0.2})
    help_of, wrong = [[command, "--help"] for command in COMMANDS], [["train", path], ["params", path]]
    usage = [["params"], ["train"], ["train", "x.yaml", "--nope"], ["generate"], ["nope"], []]
    commands = [["--version"], ["--help"], ["-h"], *help_of, ["explain", "learning_rate", rows], *usage, *wrong]
    (version, *others), heavy = imported(*commands, ["sweep", rows, "--grid", "lora.rank=8,16"])
    assert heavy == set()
    assert version.code == 0 and __version__ in version.out
    count = 2 + len(COMMANDS)
    helped, explained, refused = others[:count], others[count], others[count + 1 : count + 7]
    train, params, sweep = others[count + 7 :]
    assert all(ran.code == 0 and "Usage: loratune" in ran.out for ran in helped)
    assert explained.code == 0 and explained.out.startswith("training.learning_rate\n")
    assert {ran.code for ran in refused} == {2}
    line = path.read_text().splitlines().index("  rank: 8") + 1
    for ran in (train, params):
        check_refused(ran, 2, (Code.CONFIG_UNKNOWN_KEY, f"{path}:{line}", "lora.rank"))
        assert ran.out == "" and ran.err.endswith("; did you mean `lora.r`?\n") and ran.err.count("\n") == 1
    check_refused(sweep, 2, (Code.CONFIG_UNKNOWN_KEY, "--grid", "lora.rank"))
    assert "did you mean `lora.r`" in sweep.err


def test_the_help_describes_each_command_in_a_sentence(cli: Cli) -> None:
    listed = cli("--help").out.partition("Commands:\n")[2].splitlines()
    assert tuple(line.split()[0] for line in listed) == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


@pytest.mark.parametrize(
    ("typed", "offered"), [("loratune ex", ["explain", "export"]), ("loratune train --over", ["--overwrite"])]
)
def test_shells_complete_commands_and_options(typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the script that `--install-completion` installs and `--show-completion` prints.

    Both detect the shell that started the process, and tests may have none: the variable names one.
    """
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")

    def printed(*arguments: str, **environment: str) -> str:
        return str(CliRunner().invoke(app, arguments, prog_name="loratune", env=environment).stdout)

    assert "_LORATUNE_COMPLETE=complete_bash" in printed("--show-completion", "bash")
    shell = {"_LORATUNE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert printed(**shell).split() == offered


@pytest.mark.slow  # a control: without torch, most tests would fail
def test_a_run_that_needs_torch_imports_it(run_config: MakeConfig) -> None:
    (ran,), heavy = imported(["params", run_config()])
    assert ran.code == 0 and heavy >= {"torch", "transformers", "peft"}, ran.err


BAD_ROWS = {
    "missing": (None, "", Code.DATA_NOT_FOUND),
    "empty": ("", "", Code.DATA_EMPTY),
    "type": ('{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}\n', ":2", Code.DATA_FIELD),
    "cut": ('{"prompt": "a", "completion": "b"}\n{"prom', ":2", Code.DATA_SYNTAX),
}


def test_invalid_rows_and_outputs_are_refused_before_importing_torch(run_config: MakeConfig, tmp_path: Path) -> None:
    """The output is checked before the rows and the model."""
    config, commands = run_config(), list[list[object]]()
    for name, (rows, _, _) in BAD_ROWS.items():
        if rows is not None:
            (tmp_path / name).with_suffix(".jsonl").write_text(rows)
        commands.append(["train", config, "--set", f"data.train={tmp_path / name}.jsonl"])
    old_adapter(tmp_path / "old")
    absent = ["--set", "data.train=absent.jsonl", "--set", "model.name_or_path=./absent"]
    before = tree(tmp_path)
    (*refused, judged), heavy = imported(
        *commands, ["train", config, "--set", f"output_dir={tmp_path / 'old'}", *absent]
    )
    for ran, (name, (_, place, code)) in zip(refused, BAD_ROWS.items(), strict=True):
        check_refused(ran, 4, (code, f"{tmp_path / name}.jsonl{place}", ""))
    check_refused(judged, 2, (Code.OUTPUT_EXISTS, str(tmp_path / "old"), "output_dir"))
    assert not heavy & {"torch", "peft", "bitsandbytes"} and tree(tmp_path) == before


# Usage


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nope"], "nope"),
        (["train"], "CONFIG"),
        (["train", "a.yaml", "b.yaml"], "b.yaml"),
        (["train", "a.yaml", "--nope"], "--nope"),
        (["train", "a.yaml", "--set"], "--set"),
        (["generate", "hello"], "--adapter"),
        (["generate", "--adapter", "x", "--max-new-tokens", "0", "hello"], "--max-new-tokens"),
        (["generate", "--adapter", "x", "--max-new-tokens", "few", "hello"], "--max-new-tokens"),
        (["generate", "--adapter", "x", "--temperature", "-1", "hello"], "--temperature"),
        (["evaluate", "--adapter", "x"], f"error[{Code.USAGE_CONFLICT}]: give --data, --tasks, or both"),
        (["params"], "one of CONFIG, --model and --adapter"),
        (["params", "a.yaml", "--model", "b"], "one of CONFIG, --model and --adapter"),
        (["params", "a.yaml", "--adapter", "b"], "one of CONFIG, --model and --adapter"),
        (["params", "--model", "b", "--adapter", "b"], "one of CONFIG, --model and --adapter"),
        (["params", "--adapter", "b", "--set", "lora.r=4"], f"error[{Code.USAGE_CONFLICT}]: "),
        (["generate", "--adapter", "x", "hello", "--input", "rows.jsonl"], "not both"),
        (["generate", "--adapter", "x", "hello", "--temperature", "0.0001"], f"[{Code.USAGE_BAD_VALUE}]"),
        (["generate", "--adapter", "x", "hello", "--overwrite"], "only works with --output"),
        (["train", "a.yaml", "--allow-change", "lora.r"], "only works with --resume"),
        (["train", "a.yaml", "--rows", "2"], "only works with --dry-run"),
        (
            ["generate", "--adapter", "x", "hello", "--output", "no/such/file"],
            "--output: its directory no/such does not",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(cli: Cli, arguments: list[str], expected: str) -> None:
    """The last line names what is wrong, in the words of typer and pydantic, or in our own."""
    ran = cli(*arguments)
    assert ran.code == 2
    assert expected in ran.err.splitlines()[-1]
    assert ran.out == ""


@pytest.mark.parametrize("stdin", ["", "\n \n"])
def test_generate_without_a_prompt_is_refused(cli: Cli, stdin: str) -> None:
    ran = cli("generate", "--adapter", "x", stdin=stdin)
    check_refused(ran, 4, (Code.USAGE_NO_PROMPT, "", ""))
    assert ran.out == "" and ran.err.count("\n") == 1


@pytest.mark.parametrize("closed", [False, True], ids=["at its end", "closed"])
def test_generate_with_a_closed_or_empty_stdin_is_refused(closed: bool) -> None:
    shell = f'"{sys.executable}" -m loratune generate --adapter x {"<&-" if closed else "</dev/null"}'
    done = run_command(["bash", "-c", shell], capture_output=True, text=True, check=False)
    check_refused(Ran(done.returncode, done.stdout, done.stderr), 4, (Code.USAGE_NO_PROMPT, "", ""))
    assert done.stdout == "" and done.stderr.count("\n") == 1


# Errors of the commands


@pytest.mark.parametrize("error", sorted(LoratuneError.__subclasses__(), key=lambda kind: kind.exit_code))
def test_each_error_has_its_own_exit_code_and_line(
    error: type[LoratuneError], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, boundary.boundary(debug=False):
        raise error(Problem(Code.UNEXPECTED, "something is wrong"))
    assert caught.value.exit_code == error.exit_code
    assert capsys.readouterr().err == "error: something is wrong\n"


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {error.__name__: error.exit_code for error in LoratuneError.__subclasses__()}
    assert codes == {
        "ConfigError": 2, "ModelError": 3, "DataError": 4, "AdapterError": 5, "NumericError": 6, "ResumeError": 7,
        "ResourceError": 8, "LockedError": 9, "LostError": 10, "RequirementError": 11,
        "Interrupted": 130, "Terminated": 143,
    }  # fmt: skip


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError(), 8, "error[system.out_of_memory]: out of memory; free memory\n"),
        (
            OSError(28, "No space left on device", "a.bin"),
            8,
            "error[system.disk_full]: a.bin: No space left on device; make room\n",
        ),
        (OSError(13, "Permission denied", "a.bin"), 2, "error[system.call_failed]: a.bin: Permission denied; check"),
        (OSError(5, "Input/output error"), 1, "error[system.call_failed]: Input/output error\n"),
        (ZeroDivisionError("oh"), 1, "error: unexpected ZeroDivisionError: oh; run again with --debug\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes_of_unexpected_exceptions(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, boundary.boundary(debug=False):
        raise error
    assert caught.value.exit_code == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("variable", "file"), [("HF_HOME", "token"), ("HF_DATASETS_CACHE", "a___b"), ("XDG_CACHE_HOME", "huggingface/hub")]
)
@pytest.mark.parametrize("hidden", [False, True], ids=["", "behind another error"])
def test_an_unusable_cache_is_reported_with_the_variable_that_sets_it(
    variable: str, file: str, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/caches")
    error: Exception = PermissionError(13, "Permission denied", f"/caches/{file}")
    if hidden:
        outer, outer.__cause__ = RuntimeError("it failed"), error
        error = outer
    name = "HF_HOME" if variable == "XDG_CACHE_HOME" else variable
    assert cache_fix(error) == f"set {name} to a directory that you can write to"
    assert cache_fix(PermissionError(13, "Permission denied", f"/elsewhere/{file}")) == ""
    if not hidden:
        assert boundary._explain(error, "")[0][0].fix == cache_fix(error)


def test_a_deleted_working_directory_is_reported(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ran = cli("explain", "lora.r")
    assert ran.errors == ["the working directory has been removed; change to another directory"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 200, "x" * 200),
        ("x" * 5000, f"{'x' * 100}[...]{'x' * 40}"),
        ("/a" * 500, "/a" * 500),
        ("/a" * 2500, f"{'/a' * 250}[...]{'/a' * 100}"),
        (f"`{'a b ' * 2000}`", f"`{'a b ' * 24}a b[...]{' b a' * 9} b `"),
        (f"'{'a b ' * 2000}'", f"'{'a b ' * 24}a b[...]{' b a' * 9} b '"),
        ("it's a b " * 20, "it's a b " * 20),
        ("a b " * 2000, f"{'a b ' * 250}[...]{'a b ' * 100}"),
    ],
    ids=["short", "long", "path", "long path", "in quotes", "text", "apostrophes", "all"],
)
def test_long_values_are_shortened_in_the_middle(value: str, shown: str) -> None:
    assert str(Problem(Code.USAGE_CONFLICT, value, value, value, value)) == (
        f"{shown}: {shown}: {shown} [usage.conflict]; {shown}"
    )


def test_a_context_entered_as_a_signal_arrives_is_exited(tmp_path: Path) -> None:
    """Its generator is suspended at `yield`, and no `with` statement has begun that would exit it."""

    @contextmanager
    def unfinished() -> Iterator[None]:
        (tmp_path / "a").touch()
        try:
            yield
        finally:
            (tmp_path / "a").unlink()

    def enter() -> None:
        entered = unfinished()
        entered.__enter__()
        assert (tmp_path / "a").exists()
        raise Termination

    with pytest.raises(typer.Exit) as caught, boundary.boundary(debug=False):
        try:
            enter()
        except KeyboardInterrupt as stop:
            raise boundary.stop_error(stop) from None
    assert caught.value.exit_code == 143 and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "no.yaml"],
        ["params", "no.yaml"],
        ["generate", "--adapter", "no", "--input", "no.jsonl"],
        ["generate", "--adapter", "no", "hello"],
        ["evaluate", "--adapter", "no", "--data", "no.jsonl"],
    ],
    ids=" ".join,
)
def test_debug_adds_only_a_traceback(cli: Cli, arguments: list[str]) -> None:
    plain, debugged = cli(*arguments), cli(*arguments, "--debug")
    assert (debugged.code, debugged.out) == (plain.code, "")
    assert debugged.err.startswith("Traceback (most recent call last)") and debugged.err.endswith(plain.err)
    assert plain.err.startswith("error") and plain.err.count("\n") == 1


# Where the output goes


def blocked(kind: str, tmp_path: Path) -> tuple[str, Expected, str]:
    """Makes an output_dir that cannot be used. Returns it, the problem, and what else the message says."""
    out, key = tmp_path / "out", "output_dir"
    if kind == "proc":
        return "/proc/out", (Code.OUTPUT_UNUSABLE, "/proc/out", key), "No such file or directory"
    if kind == "root":
        return "/", (Code.OUTPUT_UNUSABLE, "/", key), ""
    if kind == "parent missing":
        path = tmp_path / "no" / "out"
        return str(path), (Code.OUTPUT_UNUSABLE, str(path), key), f" {path.parent} "
    if kind == "parent is a file":
        path = tmp_path / "rows.jsonl" / "out"
        return str(path), (Code.OUTPUT_UNUSABLE, str(path), key), f" {path.parent} "
    if kind == "file":
        out.write_text("precious")
        return str(out), (Code.OUTPUT_UNUSABLE, str(out), key), ""
    if kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
        return str(out), (Code.OUTPUT_UNUSABLE, str(out), key), ""
    if kind == "long name":
        path = tmp_path / ("x" * 300)
        return str(path), (Code.CONFIG_BAD_VALUE, "--set", key), "is longer than a path can be, got text '/"
    if kind == "partial of another":
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
        return str(out), (Code.OUTPUT_UNUSABLE, str(out), key), " holds thesis.txt,"
    if kind == "partial is a file":
        (tmp_path / "out.partial").write_text("precious")
        return str(out), (Code.OUTPUT_UNUSABLE, str(out), key), " is a file"
    if kind == "interrupted":
        (tmp_path / "out.partial" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (tmp_path / "out.partial" / "checkpoints" / "checkpoint-1" / "manifest.json").write_text("precious")
        return str(out), (Code.RUN_INTERRUPTED, str(out), key), "out.partial"
    old_adapter(out)
    return str(out), (Code.OUTPUT_EXISTS, str(out), key), "; choose another, or replace it with --overwrite"


@pytest.mark.parametrize(
    "kind",
    ["proc", "root", "parent missing", "parent is a file", "file", "dangling link", "long name", "partial of another",
     "partial is a file", "interrupted", "exists"],
)  # fmt: skip
def test_an_unusable_output_is_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    config = run_config()
    output, expected, detail = blocked(kind, tmp_path)
    before, names = tree(tmp_path), sorted(tmp_path.rglob("*"))
    overridable = kind in ("interrupted", "exists")
    checked_later = kind == "proc"  # by writing there, which a dry run does not do
    for more in [[]] if overridable else [[], ["--overwrite"]] + [["--dry-run"]] * (not checked_later):
        ran = cli("train", config, "--set", f"output_dir={output}", *more)
        check_refused(ran, 2, expected)
        assert ran.out == "" and detail in ran.err and ran.err.count("\n") == 1
        assert kind != "interrupted" or "; continue it with --resume, or start" in ran.err
    if overridable:
        dry = cli("train", config, "--set", f"output_dir={output}", "--dry-run")
        assert dry.code == 0 and "trainable params: " in dry.out
        what = f"training will be refused: {ran.errors[0].partition(';')[0]}"
        assert any(line.startswith(what) for line in dry.err.splitlines()), dry.err
        assert (
            "will be refused"
            not in cli("train", config, "--set", f"output_dir={output}", "--dry-run", "--overwrite").err
        )
    assert (tree(tmp_path), sorted(tmp_path.rglob("*"))) == (before, names)


OPTIONS: dict[str, tuple[list[str], dict[str, bytes], int, Expected]] = {
    "overwrite what is no adapter": (
        ["--overwrite"], {"thesis.txt": b"precious"}, 2, (Code.OUTPUT_OVERWRITE, "{out}", "output_dir"),
    ),
    "resume nothing": (["--resume"], {}, 7, (Code.RESUME_CHECKPOINT, "{out}", "")),
    "resume and overwrite": (["--resume", "--overwrite"], OLD, 2, (Code.USAGE_CONFLICT, "", "")),
}  # fmt: skip


@pytest.mark.parametrize(("options", "files", "exit_code", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_contradict_the_state_of_the_output(
    options: list[str], files: dict[str, bytes], exit_code: int, expected: Expected, cli: Cli,
    run_config: MakeConfig, tmp_path: Path,
) -> None:  # fmt: skip
    for name, content in files.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    config, (code, where, key) = run_config(training=ONE_STEP), expected
    before = tree(tmp_path)
    ran = cli("train", config, *options)
    check_refused(ran, exit_code, (code, where.format(out=tmp_path / "out"), key))
    assert ran.out == "" and ran.err.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "changes, code",
    [
        ({"model": {"name_or_path": "./absent"}}, 3),
        ({"data": {"max_length": 2}}, 4),
        ({"lora": {"target_modules": ["no_such_module"]}}, 3),
        ({"training": {"learning_rate": 1e30, "max_steps": 3}}, 6),
    ],
    ids=["model", "rows", "targets", "numbers"],
)
def test_a_failed_overwrite_keeps_the_old_adapter(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], code: int
) -> None:
    config = run_config(**changes)
    old_adapter(tmp_path / "out")
    before = tree(tmp_path)
    ran = cli("train", config, "--overwrite")
    assert ran.code == code, ran.err
    assert ran.err.splitlines()[-1].startswith("error")
    assert tree(tmp_path) == before
    assert not (tmp_path / "out.partial").exists()


def test_a_successful_overwrite_replaces_the_whole_adapter(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training=ONE_STEP)
    (old_adapter(tmp_path / "out") / "vocab.txt").write_text("of the old adapter")
    ran = cli("train", config, "--overwrite")
    assert ran.code == 0, ran.err
    new = tree(tmp_path / "out")
    assert "vocab.txt" not in new
    assert {name for name, content in OLD.items() if new[name] == content} == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "run.yaml"]


@pytest.mark.parametrize("how", [{"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}], ids=str)
def test_the_old_adapter_survives_a_kill_while_publishing(tmp_path: Path, how: dict[str, bool]) -> None:
    """The old adapter had been moved away, and the new one was not in place yet."""
    out = old_adapter(tmp_path / "out")
    directory = run_dir.check(str(out), resume=False, overwrite=True)
    with directory.locked():
        directory.prepare(resume=False)
        (directory.checkpoints / "checkpoint-1").mkdir()
        (directory.checkpoints / "checkpoint-1" / "manifest.json").touch()
    directory.staging.mkdir()
    directory.output.rename(directory.replaced)
    with pytest.raises(ConfigError, match="`resume=True`, or start afresh with `overwrite=True`"):
        run_dir.check(str(out), resume=False, overwrite=False)

    again = run_dir.check(str(out), **how)
    with again.locked():
        assert tree(out) == OLD
        again.prepare(resume=how["resume"])
        assert not directory.staging.exists()
        assert directory.is_kept() == how["resume"]
        directory.staging.mkdir()
        (directory.staging / "adapter_config.json").write_text("new")
        directory.publish()
    assert tree(tmp_path) == {"out/adapter_config.json": b"new"}


def test_resume_does_not_replace_an_adapter_that_appeared_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_dir.check(str(out), resume=False, overwrite=False).locked() as directory:
        directory.prepare(resume=False)
        (directory.checkpoints / "checkpoint-1").mkdir()
    run_dir.check(str(out), resume=True, overwrite=False)
    old_adapter(out)
    with pytest.raises(ConfigError) as caught:
        run_dir.check(str(out), resume=True, overwrite=False)
    assert meanings(caught.value) == [(Code.OUTPUT_EXISTS, str(out), "output_dir")]


@pytest.mark.parametrize("command", ["schema", pytest.param("params", marks=pytest.mark.slow)])
def test_a_closed_stdout_is_not_an_error(command: str, run_config: MakeConfig) -> None:
    words = f"{command} {run_config()}" if command == "params" else command
    line = f'"{sys.executable}" -m loratune {words} | true; exit ${{PIPESTATUS[0]}}'
    done = run_command(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
