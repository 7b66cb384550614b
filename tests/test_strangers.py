"""Untrusted input: code and kernels of other repositories, files added to an adapter, and escape sequences in text."""

import json
import os
import pty
import re
import select
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from conftest import ROWS, check_refused, run_command, write_rows
from fork_server import ForkServer
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from running import Cli, MakeConfig
from typer.testing import CliRunner

from loratune.cli import app
from loratune.codes import Code
from loratune.errors import Problem
from loratune.lora import adapter_files
from loratune.text import code_block, code_span, markdown, one_line, printable, shell_word

pytestmark = pytest.mark.usefixtures("untraced_module")

# Code of other repositories


NAMED = {
    "a configuration": ("config.json", {"auto_map": {"AutoConfig": "other/repo--evil.Config"}}),
    "a model": (
        "config.json",
        {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "other/repo--mine.Model"}},
    ),
    "a tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "other/repo--evil.Tokenizer"]}}),
    "a tokenizer as a list": ("tokenizer_config.json", {"auto_map": ["other/repo--evil.Slow", None]}),
    "a tokenizer in the configuration": ("config.json", {"auto_map": {"AutoTokenizer": "other/repo--evil.Tokenizer"}}),
    "a part": ("config.json", {"text_config": {"auto_map": {"AutoConfig": "other/repo--evil.Config"}}}),
    "a processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "other/repo--evil.Processor"}}),
    "generation": ("generation_config.json", {"custom_generate": "other/repo--evil.generate"}),
    "below": ("more/config.json", {"auto_map": {"AutoConfig": "other/repo--evil.Config"}}),
    "a path": ("config.json", {"auto_map": {"AutoConfig": "/tmp/evil.Config"}}),
    "a parent": ("config.json", {"auto_map": {"AutoConfig": "../evil.Config"}}),
    "twice": ("config.json", {"auto_map": {"AutoConfig": "other/repo--other/repo--evil.Config"}}),
}
"""File → content that must be refused even with trust_remote_code."""


def add(path: Path, values: dict[str, Any]) -> None:
    """Add keys to a JSON file, which is created if missing."""
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | values))


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another repository in the hub cache whose code leaves a mark. Returns the path of the mark."""
    mark, commit = tmp_path / "executed", "e" * 40
    cached = tmp_path / "hub" / "models--other--repo"
    (cached / "refs").mkdir(parents=True)
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    for name in ("evil", "mine"):
        (cached / "snapshots" / commit / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return mark


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("command", ["train", "params"])
def test_code_of_another_repository_is_refused(
    command: str, name: str, evil: Path, tiny_dir: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """Exit code 3; the error names the file; nothing was run."""
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    (base / "mine.py").write_text("from transformers import LlamaConfig as Config\n")
    file, values = NAMED[name]
    add(base / file, values)
    ran = cli(command, run_config(model={"name_or_path": str(base), "trust_remote_code": True, "revision": "main"}))
    check_refused(ran, 3, (Code.MODEL_FOREIGN_CODE, str(base / file), ""))
    assert (ran.out, ran.err.count("\n")) == ("", 1), ran.err
    assert ("other/repo--" in ran.err) == (name not in ("a path", "a parent"))
    assert not evil.exists() and not (tmp_path / "out").exists()


def test_transformers_would_run_code_of_the_other_repository(evil: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """The control for the tests above."""
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    add(base / "config.json", {"auto_map": {"AutoConfig": "other/repo--evil.Config"}})
    with pytest.raises(AttributeError, match="Config"):
        transformers.AutoConfig.from_pretrained(base, trust_remote_code=True, revision="main")
    assert evil.exists()


def cached_base(tmp_path: Path, tiny_dir: Path, name: str, **files: dict[str, Any]) -> None:
    """The tiny model as a cached hub repository, with additional file contents."""
    cached, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "a" * 40
    shutil.copytree(tiny_dir, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(commit)
    for file, values in files.items():
        add(cached / "snapshots" / commit / f"{file}.json", values)


@pytest.mark.parametrize("file", ["config", "tokenizer_config", "generation_config", "adapter_config"])
def test_code_of_another_repository_is_refused_for_a_hub_id(
    file: str, evil: Path, tiny_dir: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """Also if a base claims to be an adapter: transformers would load the code of that adapter's base."""
    values = {"auto_map": {"AutoConfig": "other/repo--evil.Config"}}
    cached_base(tmp_path, tiny_dir, "own/repo", **{file: values if file != "adapter_config" else
                {"base_model_name_or_path": "other/repo"}})  # fmt: skip
    ran = cli("params", run_config(model={"name_or_path": "own/repo", "trust_remote_code": True, "revision": "v1"}))
    assert ran.code == 3 and "other/repo" in ran.err and f"{file}.json: " in ran.err, ran.err
    assert not evil.exists()


def test_repository_may_refer_to_its_own_code(
    evil: Path, tiny_dir: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """As transformers writes it. The class comes from the pinned revision, not from the newest one."""
    classes = {"AutoConfig": "own/repo--mine.Config", "AutoModelForCausalLM": "own/repo--mine.Model"}
    cached_base(tmp_path, tiny_dir, "own/repo", config={"model_type": "mine_own", "auto_map": classes})
    repository = tmp_path / "hub" / "models--own--repo"
    (repository / "snapshots" / ("a" * 40) / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine_own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    newest = repository / "snapshots" / ("b" * 40)
    newest.mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    (newest / "mine.py").write_text(f"open({str(evil)!r}, 'w').close()\n")
    ran = cli("params", run_config(model={"name_or_path": "own/repo", "trust_remote_code": True, "revision": "v1"}))
    assert ran.code == 0, ran.err
    assert not evil.exists()


def test_hub_kernels_are_not_run(tiny_dir: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig) -> None:
    """transformers reads the names of kernels from config.json, even without trust_remote_code."""
    base, named = tmp_path / "base", {"attn_implementation": "other/kernel", "experts_implementation": "sonicmoe"}
    shutil.copytree(tiny_dir, base)
    add(base / "config.json", named)
    ran = cli("params", run_config(model={"name_or_path": str(base)}))
    check_refused(ran, 3, *((Code.MODEL_FOREIGN_CODE, str(base), key) for key in named))
    assert "other/kernel" in ran.err and "sonicmoe" in ran.err


# Files that were added to an adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A small trained adapter."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    rows = write_rows(out.parent / "rows.jsonl", ROWS)
    sections = {
        "model": {"name_or_path": str(tiny_dir), "dtype": "float32"}, "data": {"train": str(rows)},
        "training": {"max_steps": 2, "learning_rate": 1e-2}, "output_dir": str(out),
    }  # fmt: skip
    (out.parent / "run.yaml").write_text(yaml.safe_dump(sections))
    ran = CliRunner().invoke(app, ["train", str(out.parent / "run.yaml")])
    assert ran.exit_code == 0, ran.stderr
    return out


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


ADDED = [
    "additional_chat_templates/default.jinja", "additional_chat_templates/tool_use.jinja", "a/b/c/tokenizer.model",
    "chat_template.json", "custom_generate/generate.py", "Config.JSON", "special_tokens_map.json", "more/vocab.txt",
    "nested/adapter_config.json", ".hidden/tokenizer.json", "qwen.tiktoken",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [*ADDED[::4], *(pytest.param(one, marks=pytest.mark.slow) for one in ADDED if one not in ADDED[::4])]
)
def test_added_files_that_libraries_read_are_refused(name: str, copy: Path, cli: Cli) -> None:
    """At any depth. Other files are allowed."""
    for other in ("notes.txt", "plots/loss.png", ".git/config.json", ".cache/huggingface/download/x.json"):
        (copy / other).parent.mkdir(parents=True, exist_ok=True)
        (copy / other).write_text("{}")
    ran = cli("generate", "x", "--adapter", copy, "--max-new-tokens", 1)
    assert (ran.code, ran.err) == (0, "")
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("{}")
    ran = cli("generate", "x", "--adapter", copy, "--max-new-tokens", 1)
    check_refused(ran, 5, (Code.ADAPTER_CHANGED, str(copy / name), ""))
    assert ran.err.endswith("--force\n") and ran.err.count("\n") == 1


def test_added_link_to_a_directory_is_refused(copy: Path, cli: Cli) -> None:
    """Even though the files behind it are in the record, under other names."""
    (copy / "additional_chat_templates").symlink_to(copy)
    ran = cli("generate", "x", "--adapter", copy)
    check_refused(ran, 5, (Code.ADAPTER_CHANGED, str(copy / "additional_chat_templates"), ""))
    assert "a link to a directory" in ran.err


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_special_files_are_not_opened(kind: str, recorded: bool, copy: Path, cli: Cli) -> None:
    """Opening a pipe would block forever."""
    place = copy / "special_tokens_map.json"
    if not recorded:
        (copy / "loratune.json").unlink()
    if kind == "pipe":
        os.mkfifo(place)
    else:
        with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as made:
            patch.chdir(copy)
            made.bind(place.name)
    ran = cli("generate", "x", "--adapter", copy)
    check_refused(ran, 5, (Code.ADAPTER_UNSAFE, str(place), ""))
    assert ran.err.count("\n") == 1


def test_records_include_directories_and_older_records_are_read(copy: Path, cli: Cli) -> None:
    """Several chat templates are saved and recorded in a directory. Records of older releases do not list it."""
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "other.jinja").write_text("x")
    record = json.loads((copy / "loratune.json").read_text())
    assert "adapter_config.json" in record["files"] and not any("/" in name for name in record["files"])
    record["files"] = adapter_files.manifest(copy)
    assert "additional_chat_templates/other.jinja" in record["files"]
    (copy / "loratune.json").write_text(json.dumps(record))
    ran = cli("generate", "x", "--adapter", copy, "--max-new-tokens", 1)
    assert (ran.code, ran.err) == (0, "")
    (copy / "additional_chat_templates" / "other.jinja").write_text("y")
    ran = cli("generate", "x", "--adapter", copy, "--max-new-tokens", 1)
    check_refused(ran, 5, (Code.ADAPTER_CHANGED, str(copy / "additional_chat_templates" / "other.jinja"), ""))


# Escape sequences in text


EVIL = "a\x1b]52;c;aGk=\x07b\x1b]0;title\x07\x9b2Jc\u202ed\x7f\re"
"""Writes to the clipboard, sets the title, clears the screen, reverses text, returns to the start of the line."""
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


MARKDOWN = MarkdownIt("commonmark").enable("strikethrough")


def clean(text: str) -> None:
    assert not RAW.search(text), ascii(text)


def test_escaping_for_terminals_and_shells() -> None:
    assert one_line("a\tb\nc\x1b\x9b\u202e\ud800é🙂\U000e0041") == ("a\\tb\\nc\\x1b\\x9b\\u202e\\ud800é🙂\\U000e0041")
    assert printable("a\tb\nc\r\x1b") == "a\tb\nc\\r\\x1b"
    for word in ("plain", "it's", "it's `$HOME` \\ \"!", EVIL, "new\nline", "\\x1b'\x1b", "\udcff", "é\u202e"):
        quoted = shell_word(word)
        clean(quoted)
        assert "\n" not in quoted
        said = run_command(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
        assert said == word.encode("utf-8", "surrogateescape")
    assert [shell_word(word) for word in ("it's", "it's $5", "it's new!")] == [
        '"it\'s"', "'it'\"'\"'s $5'", "'it'\"'\"'s new!'",
    ]  # fmt: skip
    problem = Problem(Code.UNEXPECTED, "a\nb", "c\nd", "e\x1b", "f\r")
    assert str(problem) == "c\\nd: e\\x1b: a\\nb; f\\r"


@pytest.mark.parametrize(
    "word",
    ["my_adapter", "a`b", "``", " `", "*a* _b_ **c**", "<img src=x>", "[a](b) ![c](d)", "&lt; # ~~d~~ \\* #", "$x$ |"],
)
def test_escaping_for_markdown(word: str) -> None:
    """As text and as code, a renderer shows the word itself, without markup or links."""
    block = code_block(f"{word}\n```", "sh")
    text = f"# {markdown(word)}\n\n{code_span(word)}\n\n{block}\n"
    words, code, fence = (token for token in MARKDOWN.parse(text) if token.type in ("inline", "fence"))
    assert {token.type for token in words.children or ()} <= {"text", "text_special"}
    assert "".join(token.content for token in words.children or ()) == word.strip()
    (shown,) = code.children or ()
    assert (shown.type, shown.content) == ("code_inline", word)
    assert (fence.info, fence.content) == ("sh", f"{word}\n```\n")


def test_card_contains_no_untrusted_markup(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """From file and directory names, and from the suggested prompt, which is taken from the rows."""
    rows = [{"prompt": f"`<img src=x>` *{number}*", "completion": " 7"} for number in range(8)]
    file, output = write_rows(tmp_path / "a`b.jsonl", rows), tmp_path / "*out*`"
    ran = cli("train", run_config(data={"train": str(file)}, training={"max_steps": 1}, output_dir=str(output)))
    assert ran.code == 0, ran.err
    text = (output / "README.md").read_text().split("---\n", 2)[2]
    shown = [token for part in MARKDOWN.parse(text) for token in part.children or ()]
    known = {"text", "text_special", "softbreak", "code_inline", "strong_open", "strong_close"}
    assert {token.type for token in shown} <= known
    codes = [token.content for token in shown if token.type == "code_inline"]
    assert str(file) in codes and any("'`<img src=x>` *0*'" in code for code in codes)
    assert sum(token.type == "strong_open" for token in shown) == text.count("\n- **")


def test_run_on_rows_with_escape_sequences_prints_none_of_them(
    cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """In the first row, the table, the final summary with its suggested command, and the published card."""
    rows = [{"prompt": f"{EVIL} {number}", "completion": f" {EVIL}{number}"} for number in range(8)]
    data = {"train": str(write_rows(tmp_path / f"{EVIL}\nrows.jsonl", rows))}
    out = tmp_path / f"o{EVIL}"
    config = run_config(data=data | {"validation": 0.5}, training={"max_steps": 1}, output_dir=str(out))
    for arguments in (("--dry-run", "--rows", 2), ()):
        ran = cli("train", config, *arguments)
        assert ran.code == 0, ran.err
        clean(ran.out + ran.err)
        assert "\\x1b]52;c;" in ran.out + ran.err
    assert "--adapter $'" in ran.out
    clean((out / "README.md").read_text())
    (result,) = ModelCard.load(out / "README.md").data.eval_results
    clean(f"{result.dataset_name} {result.dataset_type}")
    assert "\\nrows.jsonl" in result.dataset_name and str(tmp_path) not in result.dataset_name


QUOTED = json.dumps(f"/no{EVIL}").replace("\x7f", "\\x7f")  # as parsed from YAML
PLACES: dict[str, Callable[[Path, Path], list[Any]]] = {
    "a missing config": lambda config, copy: ["train", f"no{EVIL}\n.yaml"],
    "a key of the config": lambda config, copy: ["train", config, "--set", f"training.x{EVIL}=1"],
    "a value of the config": lambda config, copy: ["train", config, "--set", f"training.optim={QUOTED}"],
    "a path of rows": lambda config, copy: ["train", config, "--set", f"data.train={QUOTED}"],
    "a base": lambda config, copy: ["params", "--model", f"/no{EVIL}"],
    "an option": lambda config, copy: ["params", f"--no{EVIL}"],
    "a command": lambda config, copy: [f"no{EVIL}"],
    "an adapter": lambda config, copy: ["generate", "x", "--adapter", f"no{EVIL}\nx"],
    "the keys of a row": lambda config, copy: ["train", config, "--set", f"data.train={copy.parent / 'evil.jsonl'}"],
    "the base of an adapter": lambda config, copy: ["generate", "x", "--adapter", copy],
    "an adapter's header": lambda config, copy: ["params", "--adapter", copy],
    "an adapter's header as JSON": lambda config, copy: ["params", "--adapter", copy, "--json"],
}


@pytest.mark.parametrize("place", PLACES)
def test_commands_print_no_raw_escape_sequences(place: str, copy: Path, cli: Cli, run_config: MakeConfig) -> None:
    """Errors stay on one line."""
    write_rows(copy.parent / "evil.jsonl", [{f"key{EVIL}\n": 1, f"other{EVIL}": "\x1b"}])
    add(copy / "adapter_config.json", {"base_model_name_or_path": f"/no{EVIL}\nx"})
    ran = cli(*PLACES[place](run_config(), copy))
    clean(ran.out + ran.err)
    assert "\\x1b" in ran.out + ran.err or "\\u001b" in ran.out
    assert ran.err.count("\n") == len(re.findall("^error", ran.err, re.M)) or "Usage" in ran.err, ran.err
    if place.endswith("JSON"):
        assert json.loads(ran.out)["base"] == f"/no{EVIL}\nx"


def terminal(processes: ForkServer, *command: Any) -> str:
    """What a command writes to a terminal, stdout and stderr combined."""
    main, end = pty.openpty()
    name = os.ttyname(end)
    child = processes.start(*command, stdout=name, stderr=name, TERM="xterm")
    said, ended = b"", False
    while not ended:
        ended = child.poll() is not None  # read once more to get the last output
        while select.select([main], [], [], 0.02)[0]:
            said += os.read(main, 1 << 16)
    for handle in (main, end):
        os.close(handle)
    return said.decode()


def test_terminal_receives_only_our_own_escape_sequences(
    copy: Path, run_config: MakeConfig, tmp_path: Path, processes: ForkServer, forked: Cli
) -> None:
    """In a real terminal: the first row, and an answer made malicious by the tokenizer. Bars appear after two
    seconds."""
    rows = [{"prompt": f"{EVIL} {number}", "completion": f" {EVIL}{number}"} for number in range(8)]
    config = run_config(data={"train": str(write_rows(tmp_path / "r.jsonl", rows))}, training={"max_steps": 3})
    said = terminal(processes, "train", config)
    assert "? better than its base: " in said
    assert "\x1b]" not in said and "\x9b" not in said and "\u202e" not in said and "\x07" not in said
    assert "\\x1b]52;c;aGk=\\x07" in said
    values = json.loads((copy / "tokenizer.json").read_text())
    replaced = {"type": "Replace", "pattern": {"Regex": ".+"}, "content": "\x1b]0;t\x07\tz\n"}
    values["decoder"] = {"type": "Sequence", "decoders": [replaced, {"type": "Fuse"}]}
    (copy / "tokenizer.json").write_text(json.dumps(values))  # each token of an answer is an escape sequence
    said = terminal(processes, "generate", "x", "--adapter", copy, "--force", "--max-new-tokens", 3)
    assert "\x1b]" not in said and "\x07" not in said and "\\x1b]0;t\\x07\tz\r\n" in said, said
    asked = write_rows(tmp_path / "q.jsonl", [{"prompt": "x\x9b\x7f\u202e"}])
    to_stdout = ("--input", asked, "--output", "/dev/stdout")
    said = terminal(processes, "generate", "--adapter", copy, "--force", "--max-new-tokens", 1, *to_stdout)
    assert '"completion"' in said and "\x9b" not in said and "\x7f" not in said and "\u202e" not in said
    plain = forked("generate", "x", "--adapter", copy, "--force", "--max-new-tokens", 3)
    assert plain.code == 0 and "\x1b]0;t\x07\tz\n" in plain.out
