"""What programs read: values and errors of `--json`, their schemas, and the skill for agents, whose commands are run.

The fixture `cli` validates whatever any test of the suite prints with `--json`, see `conftest.check_printed`.
"""

import ast
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, ROWS, Ran, check_printed, printed_schema, run_command, tree, write_rows
from jsonschema import Draft202012Validator, ValidationError
from test_packaging import broken_links
from typer.main import get_command

from loratune.cli import app
from loratune.codes import Code
from loratune.errors import Problem

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]
AGENT = ROOT / "configs" / "agent"
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


# Schemas


@pytest.mark.parametrize("name", [*(name for name in COMMANDS if name != "chat"), "error"])
def test_every_command_has_json_and_a_documented_schema(name: str, cli: Cli) -> None:
    schema = json.loads(cli("schema", "--for", name).out)
    Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object" and "$schema" in schema
    for kind in schema.get("anyOf", [schema]):
        assert all("description" in value for value in kind.get("properties", {}).values())
    assert name == "error" or "--json" in cli(name, "--help").out


def test_the_schema_of_the_config_is_the_default(cli: Cli) -> None:
    assert cli("schema").out == cli("schema", "--json").out and "lora" in json.loads(cli("schema").out)["properties"]


def test_values_that_do_not_fit_their_schema_are_detected() -> None:
    good = {"page": "page.html"}
    check_printed("report", Ran(0, json.dumps(good), ""))
    for bad in ({}, {"page": 1}, {**good, "pages": 2}):
        with pytest.raises(ValidationError):
            check_printed("report", Ran(0, json.dumps(bad), ""))
    failure = {"exit_code": 3, "errors": [{"code": "a.b", "place": "", "key": "", "what": "", "fix": ""}]}
    check_printed("report", Ran(3, "", f"a line\n{json.dumps(failure)}\n"))
    with pytest.raises(AssertionError):
        check_printed("report", Ran(4, "", json.dumps(failure)))


def test_the_plan_as_json_agrees_with_the_run(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """`train --dry-run --json` has the rows, the values of `auto`, and the supervised text; it writes nothing."""
    path = run_config(training={"max_steps": 1, "learning_rate": "auto"})
    ran = cli("train", path, "--dry-run", "--rows", "2", "--json")
    assert ran.code == 0, ran.err
    planned = json.loads(ran.out)
    assert not (tmp_path / "out").exists() and planned["rows"]["train"]["rows"] == len(ROWS)
    assert planned["examples"][1]["text"].startswith("1 and 1 make⟦ 2") and len(planned["examples"]) == 2
    assert isinstance(planned["config"]["training"]["learning_rate"], float)
    counted = json.loads(cli("params", path, "--json").out)
    assert {name: planned[name] for name in ("trainable", "total", "targets")} == {
        name: counted[name] for name in ("trainable", "total", "targets")
    }
    assert json.loads(cli("train", path, "--json").out)["adapter_bytes"] == planned["adapter_bytes"]


def test_init_without_a_file_prints_the_config_in_json(
    cli: Cli, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    ran = cli("init", "rows.jsonl", "--model", tiny_dir, "--output", "-", "--json")
    started = json.loads(ran.out)
    assert started["config"] is None and yaml.safe_load(started["text"])["data"]["train"] == "rows.jsonl"
    assert started["rows"] == len(ROWS) and started["memory"]["total"] > 0 and not (tmp_path / "config.yaml").exists()


# Errors

ERRORS: dict[str, tuple[list[str], int, str, str, str]] = {
    "no argument": (["train", "--json"], 2, Code.USAGE_BAD_VALUE, "", ""),
    "an unknown option": (["train", "a.yaml", "--json", "--nope"], 2, Code.USAGE_BAD_VALUE, "", "--nope"),
    "a value": (["train", "a.yaml", "--json=1"], 2, Code.USAGE_BAD_VALUE, "", "--json"),
    "an unknown command": (["nope", "--json"], 2, Code.USAGE_BAD_VALUE, "", ""),
    "a command without JSON": (["chat", "--adapter", "x", "--json"], 2, Code.USAGE_BAD_VALUE, "", "--json"),
    "a wrong value": (["evaluate", "--adapter=x", "--worst=few", "--json"], 2, Code.USAGE_BAD_VALUE, "", "--worst"),
    "a combination": (["train", "a.yaml", "--resume", "--overwrite", "--json"], 2, Code.USAGE_CONFLICT, "", ""),
    "no schema": (["schema", "--for", "chat", "--json"], 2, Code.USAGE_BAD_VALUE, "", "--for"),
    "an unknown key": (["train", "wrong.yaml", "--json"], 2, Code.CONFIG_UNKNOWN_KEY, "wrong.yaml:4", "lora.rank"),
    "no rows": (["init", "gone.jsonl", "--model", "x", "--json"], 4, Code.DATA_NOT_FOUND, "gone.jsonl", ""),
    "no adapter": (["generate", "--adapter", "gone", "hi", "--json"], 5, Code.ADAPTER_NOT_FOUND, "gone", ""),
    "no prompt": (["generate", "--adapter", "gone", "--json"], 4, Code.USAGE_NO_PROMPT, "", ""),
    "odd characters": (["explain", "\x7f\u202e\n\udcff", "--json"], 2, Code.CONFIG_UNKNOWN_KEY, "", ""),
    "a long value": (["explain", "x" * 100_000, "--json"], 2, Code.CONFIG_UNKNOWN_KEY, "", ""),
}


PATHS = ["gone/no", "a.folder", "an.empty", "binary.jsonl", "binary.jsonl/in", "loop.jsonl", "n" * 300, ""]
"""Relative to a working directory, where odd things are."""
TAKING_A_PATH = {
    "init": ["PATH", "--model", "BASE", "--output", "-"],
    "init --model": ["rows.jsonl", "--model", "PATH", "--output", "-"],
    "train": ["PATH"],
    "train --set data.train": ["run.yaml", "--set", "data.train=PATH"],
    "train --set model.name_or_path": ["run.yaml", "--set", "model.name_or_path=PATH"],
    "sweep": ["PATH", "--grid", "training.learning_rate=1e-3"],
    "params": ["PATH"],
    "params --model": ["--model", "PATH"],
    "explain": ["lora.r", "PATH"],
    "evaluate": ["--adapter", "PATH", "--data", "rows.jsonl"],
    "report": ["--adapter", "PATH"],
    "generate": ["--adapter", "PATH", "hi"],
    "generate --input": ["--adapter", "gone", "--input", "PATH"],
    "merge": ["--adapter", "PATH", "--output", "merged"],
    "export": ["--adapter", "PATH", "--to", "peft", "--output", "exported"],
    "push": ["--adapter", "PATH", "me/mine"],
}


@pytest.mark.parametrize("command", TAKING_A_PATH)
def test_a_wrong_path_is_an_error_in_json(
    command: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
) -> None:
    """With a code of its own, and a place or a key; nothing is written. The fixture validates the JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("a.folder").mkdir()
    Path("an.empty").touch()
    Path("binary.jsonl").write_bytes(bytes(range(256)))
    Path("loop.jsonl").symlink_to("loop.jsonl")
    write_rows(Path("rows.jsonl"), ROWS)
    Path("run.yaml").write_text(RUN.replace("base", str(tiny_dir)))
    before, unclear = tree(tmp_path), []
    for path in PATHS:
        words = [word.replace("PATH", path).replace("BASE", str(tiny_dir)) for word in TAKING_A_PATH[command]]
        ran = cli(command.split()[0], *words, "--json", stdin="")
        errors = json.loads(ran.err.splitlines()[-1])["errors"] if ran.code else [{}]
        if ran.code in (0, 1) or ran.out or not all(one["what"] and (one["place"] or one["key"]) for one in errors):
            unclear.append((path[:20], ran.code, errors[0]))
        assert tree(tmp_path) == before, path
    assert unclear == []


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "chat"])
def test_an_unknown_option_is_an_error_in_json(command: str, cli: Cli) -> None:
    (error,) = json.loads(cli(command, "--json", "--nope").err.splitlines()[-1])["errors"]
    assert (error["code"], error["key"]) == (Code.USAGE_BAD_VALUE, "--nope") and error["what"] and error["fix"]


EARLY = """
import os, sys
from loratune.system import signals
with signals.exit_on_signals():
    os.kill(os.getpid(), int(sys.argv.pop(1)))
"""


@pytest.mark.parametrize(("number", "code", "what"), [(2, 130, Code.INTERRUPTED), (15, 143, Code.TERMINATED)])
def test_a_signal_while_the_program_loads_is_an_error_in_json(number: int, code: int, what: Code) -> None:
    for words, is_json in ((["env", "--json"], True), (["generate", "--", "--json"], False)):
        command = [sys.executable, "-c", EARLY, str(number), *words]
        done = run_command(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, "")
        if is_json:
            failure = json.loads(done.stderr)
            printed_schema("error").validate(failure)
            assert failure == {"exit_code": code, "errors": [Problem(what, what).to_dict()]}
        else:
            assert done.stderr == f"error: {what}\n"


EARLIER = """
import sys

class Finder:
    def find_spec(self, name, *rest):
        if name == "loratune.system.signals":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
import loratune.__main__
"""


def test_an_interrupt_before_the_handlers_are_installed_is_an_error_in_json() -> None:
    for words in (["env", "--json"], ["env"]):
        done = run_command([sys.executable, "-c", EARLIER, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (130, "")
        if "--json" in words:
            failure = {"exit_code": 130, "errors": [Problem(Code.INTERRUPTED, "interrupted").to_dict()]}
            assert json.loads(done.stderr) == failure
        else:
            assert done.stderr == "error: interrupted\n"


RUN = "model: {name_or_path: base}\ndata: {train: rows.jsonl}\noutput_dir: out\n"


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_of_json(name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, after any progress; stdout is empty. Nothing waits for input, which here is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(f"{RUN}lora: {{rank: 8, alfa: 2}}\n")
    arguments, code, kind, place, key = ERRORS[name]
    ran = cli(*arguments, stdin="")
    failure = json.loads(ran.err.splitlines()[-1])
    printed_schema("error").validate(failure)
    first = failure["errors"][0]
    assert (ran.code, failure["exit_code"], ran.out) == (code, code, "")
    assert first["code"] == kind and first["place"].startswith(place) and (not key or first["key"] == key), first
    assert first["what"] and len(ran.err) < 10_000 and "error: " not in ran.err
    assert name != "an unknown key" or [one["key"] for one in failure["errors"]][:2] == ["lora.rank", "lora.alfa"]


def test_without_json_errors_are_text_again(cli: Cli) -> None:
    """Also right after a command with it, and if `--json` is a prompt."""
    cli("schema", "--for", "nope", "--json")
    assert cli("schema", "--for", "nope").errors[0].startswith("--for: ")
    assert cli("generate", "--adapter", "gone", "--", "--json").errors and cli("train").err.startswith("Usage: ")


def test_only_chat_asks() -> None:
    """No other module reads what a user types."""
    asking = {"input", "getpass", "getpass.getpass", "typer.prompt", "typer.confirm", "Prompt.ask", "Confirm.ask"}
    found = {
        path.name
        for path in (ROOT / "loratune").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in asking
    }
    assert found == {"chat.py"}


# The skill


def command_lines(path: Path) -> list[str]:
    """The indented commands of a page."""
    return re.findall(r"^    (loratune .+)$", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_skill_says_what_it_is() -> None:
    _, front, text = (AGENT / "SKILL.md").read_text(encoding="utf-8").split("---\n", 2)
    said = yaml.safe_load(front)
    assert {*said} == {"name", "description"} and re.fullmatch(r"[a-z-]{1,64}", said["name"])
    assert 100 < len(said["description"]) <= 1024 and len(text.splitlines()) < 100
    assert list(broken_links(AGENT / "llms.txt")) == []
    title, _, quote = (AGENT / "llms.txt").read_text(encoding="utf-8").splitlines()[:3]
    assert title == "# loratune" and quote.startswith("> ")


def test_llms_txt_has_commands_of_the_skill() -> None:
    assert {*command_lines(AGENT / "llms.txt")} < {*command_lines(AGENT / "SKILL.md")}


def test_the_commands_of_the_skill_work(
    cli: Cli, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, in a folder with the rows. Each prints JSON of its schema, with the keys that the skill names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_dir, tmp_path / "BASE")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    held_out = ({"prompt": f"{one} and {one} make", "completion": f" {2 * one}"} for one in range(100, 120))
    write_rows(tmp_path / "held-out.jsonl", held_out)
    text, printed = (AGENT / "SKILL.md").read_text(encoding="utf-8"), dict[str, Any]()
    mentioned = [line for line in re.findall(r"`(loratune [^`]+)`", text) if len(line.split()) > 2]
    assert len(mentioned) == 3
    for line in [*command_lines(AGENT / "SKILL.md"), *mentioned]:
        ran = cli(*shlex.split(line)[1:])
        if line.startswith("loratune push"):
            assert ran.code == 2 and f"[{Code.PUSH_LOCAL_PATH}]" in ran.err  # the base is a directory
            continue
        assert ran.code == 0, (line, ran.err)
        assert "--json" in line and ran.out, line
        name = line.split()[1]
        printed.setdefault(name, json.loads(ran.out.splitlines()[0] if name == "generate" else ran.out))
    assert (
        printed["init"]["config"] == "config.yaml" and (tmp_path / "config.yaml").read_text() == printed["init"]["text"]
    )
    assert printed["train"]["notes"] is not None and printed["train"]["rows"]["train"]["dropped"] == 0
    assert printed["evaluate"]["requirements"][0]["met"] and printed["evaluate"]["overlap"]["exact"] == 0
    assert printed["report"]["page"] == "report.html" and (tmp_path / "report.html").is_file()
    assert "completion" in printed["generate"] and printed["export"]["commands"]
