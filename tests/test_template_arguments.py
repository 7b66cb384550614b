"""`data.chat_template_kwargs` and `data.reasoning` in every command, from the config to the programs that serve."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ran, check_refused, config_in, tiny_llama, write_rows
from running import Cli, MakeConfig
from test_rendering import changed
from transformers import PreTrainedTokenizerFast

from loratune import data
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import DataSection, template_arguments
from loratune.data.measured_rows import measure
from loratune.data.rendering import Renderer
from loratune.export import ollama

pytestmark = pytest.mark.usefixtures("untraced_module")

THOUGHT = "<think>\n\n</think>\n\n"
SWITCHED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A template that writes the reasoning of the last answer, and closes an empty one if the argument says so."""
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}


def conversation(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


ASKED = {"role": "user", "content": "a"}
REASONED = {"role": "assistant", "content": "b", "reasoning_content": "Because."}
ROWS = [conversation(f"{number}:", "xyz"[number % 3]) for number in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model, with the template above."""
    path = tmp_path_factory.mktemp("switched") / "base"
    tiny_llama().save_pretrained(path)
    changed(tokenizer, chat_template=SWITCHED).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, cli: Cli) -> tuple[Path, Ran]:
    """An adapter trained without reasoning, but for a few rows, and what the command printed."""
    folder = tmp_path_factory.mktemp("arguments")
    rows = [*ROWS, *(conversation(f"{number}.", "ab", chat_template_kwargs=ON) for number in range(4))]
    settings = {"train": str(write_rows(folder / "chats.jsonl", rows)), "chat_template_kwargs": {**OFF, "unknown": [1]}}
    config = config_in(folder, base)(data=settings, training={"max_steps": 20})
    return folder / "out", cli("train", config, "--allow-worse")


def prompt_of(path: Path, *assignments: str, **row: Any) -> str:
    """How a command renders a prompt for an adapter."""
    loaded = loading.load(AdapterDirectory.open(path, assignments=assignments))
    return str(loaded.tokenizer.decode(loaded.renderer.prompt([{"role": "user", "content": "a"}], **row)))


def test_the_arguments_of_training_apply_to_every_command(trained: tuple[Path, Ran], cli: Cli, tmp_path: Path) -> None:
    path, ran = trained
    assert ran.code == 0, ran.err
    assert f"{THOUGHT}\u27e6x" in ran.err.replace("\n\n</think>", "\n\n</think>")
    assert "`unknown` is not read by the chat template, which reads enable_thinking" in ran.err
    recorded = yaml.safe_load((path / "run.yaml").read_text())["data"]
    assert recorded["chat_template_kwargs"] == {**OFF, "unknown": [1]} and recorded["reasoning"] == "train"
    record = json.loads((path / "loratune.json").read_text())
    assert any(one.get("chat_template_kwargs") == ON for one in record["prompts"]) or len(record["prompts"]) == 8
    assert prompt_of(path).endswith(f"<|assistant|>{THOUGHT}")
    assert prompt_of(path, arguments=ON).endswith("<|assistant|>")
    assert prompt_of(path, "data.chat_template_kwargs={}").endswith("<|assistant|>")
    assert prompt_of(path, "data.chat_template_kwargs.enable_thinking=true").endswith("<|assistant|>")
    card = (path / "README.md").read_text()
    assert "--default-chat-template-kwargs" in card and "enable_thinking=False" in card
    assert "--chat-template-kwargs" in card
    out = tmp_path / "rows.jsonl"
    held_out = [conversation("77:", "x"), conversation("8:", "x", chat_template_kwargs=ON)]
    rows = write_rows(tmp_path / "held-out.jsonl", held_out)
    for options, expected in (((), [True, False]), (("--set", "data.chat_template_kwargs={}"), [False, False])):
        ran = cli("evaluate", "--adapter", path, "--data", rows, "--output", out, "--overwrite", *options)
        assert ran.code == 0, ran.err
        assert [json.loads(line)["prompt"].endswith(THOUGHT) for line in out.read_text().splitlines()] == expected


def test_generate_and_chat_render_as_training(trained: tuple[Path, Ran], cli: Cli, tmp_path: Path) -> None:
    """The rows with reasoning were answered with `ab`."""
    path, _ = trained
    asked = [{"messages": [{"role": "user", "content": "1:"}], **more} for more in ({}, {"chat_template_kwargs": ON})]
    rows = write_rows(tmp_path / "r.jsonl", asked)
    ran = cli("generate", "--adapter", path, "--input", rows, "--output", "-", "--max-new-tokens", 1)
    assert ran.code == 0 and "is not read" not in ran.err, ran.err
    unread = write_rows(tmp_path / "u.jsonl", [*asked, {**asked[0], "chat_template_kwargs": {**ON, "tone": "dry"}}])
    other = cli("generate", "--adapter", path, "--input", unread, "--output", "-", "--max-new-tokens", 1)
    assert other.code == 0 and "`tone` is not read by the chat template" in other.err
    alone = cli("chat", "--adapter", path, "--max-new-tokens", 1, stdin="1:")
    first, second = (json.loads(line)["completion"].strip() for line in ran.out.splitlines())
    assert alone.out.strip() == first != second
    switch = ("--set", "data.chat_template_kwargs.enable_thinking=true", "--max-new-tokens", 1)
    assert cli("chat", "--adapter", path, *switch, stdin="1:").out.strip() == second
    ran = cli("generate", "--adapter", path, "--input", rows, "--output", "-", *switch)
    assert [json.loads(line)["completion"].strip() for line in ran.out.splitlines()] == [second, second]
    ran = cli("generate", "--adapter", path, "1:", "--set", "training.seed=1")
    assert ran.code == 2 and "set keys of data.* only" in ran.err


def test_the_modelfile_has_the_arguments(trained: tuple[Path, Ran], tokenizer: PreTrainedTokenizerFast) -> None:
    made = changed(tokenizer, chat_template=SWITCHED)
    texts = [ollama.modelfile(Renderer(made, None, arguments), "m.gguf", chat=True).text for arguments in ({}, OFF)]
    assert [THOUGHT in text for text in texts] == [False, True]


def test_explain_lists_what_the_template_reads(base: Path, run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    config, key = run_config(model={"name_or_path": str(base)}), "data.chat_template_kwargs"
    ran = cli("explain", key, config)
    assert ran.code == 0 and "template reads" in ran.out and "enable_thinking" in ran.out
    (tmp_path / "own.jinja").write_text("{{ messages }}{{ tone | default('dry') }}")
    ran = cli("explain", key, config, "--set", f"data.chat_template={tmp_path / 'own.jinja'}", "--json")
    assert json.loads(ran.out)["keys"][key]["template_reads"] == {"tone": '"dry"'}
    for model in (tmp_path / "none", "someone/unknown"):
        ran = cli("explain", key, config, "--set", f"model.name_or_path={model}")
        assert ran.code == 0 and "unknown" in ran.out
    assert "template reads" not in cli("explain", key).out


@pytest.mark.parametrize(
    "arguments",
    [
        "{messages: []}", "{tools: 1}", "{add_generation_prompt: false}", "{tokenize: true}", "{bos_token: a}",
        "{chat_template: a}", "{a b: 1}", "{1: 1}", "{'': 1}", "[1]", "5", "{x: .nan}", "{self: 1}", "{x: 'False'}",
        "{conversations: 1}", "{documents: 5}", "{documents: [1]}", "{x: 'off'}", "{x: '0'}", "{x: none}",
        "{x: disabled}", "{effort: 'no'}",
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_set_are_refused(arguments: str, run_config: MakeConfig, cli: Cli) -> None:
    ran = cli("train", run_config(), "--dry-run", "--set", f"data.chat_template_kwargs={arguments}")
    assert ran.code == 2 and len(ran.errors) == 1 and "data.chat_template_kwargs" in ran.errors[0]


def test_arguments_that_can_be_set() -> None:
    for arguments in (
        {"reasoning_effort": "none"},
        {"thinking_mode": "off"},
        {"documents": [{"text": "a"}]},
        {"x": "on"},
    ):
        assert template_arguments.problem(arguments) == ""


@pytest.mark.parametrize(
    "value", [{"messages": []}, {"a b": 1}, [OFF], "x", "[1]", 5, 0, [], False, {"x": "\ud800"}, {"x": "a" * 200_000}]
)
def test_arguments_of_a_row_that_cannot_be_set_are_refused(
    value: Any, base: Path, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [*ROWS, conversation("a", "b", chat_template_kwargs=value)])
    ran = cli("train", run_config(model={"name_or_path": str(base)}, data={"train": str(rows)}), "--dry-run")
    check_refused(ran, 4, (Code.DATA_FIELD, f"{rows}:{len(ROWS) + 1}", ""))


def test_arguments_of_rows_in_tables(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A cell of CSV is JSON; a null is an argument that only other rows have."""
    section = DataSection(train={"path": str(tmp_path / "r.jsonl")}, chat_template_kwargs={"enable_thinking": True})
    cells: list[Any] = [None, "", {}, json.dumps(OFF), OFF, {"enable_thinking": None, "x": 1}]
    write_rows(tmp_path / "r.jsonl", [conversation("a", "b", chat_template_kwargs=cell) for cell in cells])
    split = data.read_datasets(section, 0).train
    renderer = Renderer(changed(tokenizer, chat_template=SWITCHED), None, section.chat_template_kwargs)
    rows = data.prepare(split, renderer, section, 264)
    prompts = [tokenizer.decode(row.prompt).endswith(THOUGHT) for row in rows.rows.rows()]
    assert prompts == [False, False, False, True, True, False]
    assert rows.report.duplicates.count == 3  # the first three, and the two that turn reasoning off


TWICE: list[dict[str, Any]] = [
    {"reasoning_content": "a", "reasoning": "b"},
    {"thinking": "a", "content": "<think>b</think>c"},
]


@pytest.mark.parametrize("fields", [*TWICE, {"reasoning": ["a"]}, {"thinking": 5}])
def test_ambiguous_reasoning_is_refused(
    fields: dict[str, Any], run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "b", **fields}]}
    rows = write_rows(tmp_path / "r.jsonl", [row])
    ran = cli("train", run_config(data={"train": str(rows)}), "--dry-run")
    check_refused(ran, 4, (Code.DATA_FIELD, f"{rows}:1", ""))


@pytest.mark.parametrize("reasoning", ["train", "mask", "drop"])
def test_the_reasoning_of_preferences(reasoning: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": [ASKED], "chosen": [REASONED], "rejected": [REASONED | {"content": "c"}]}
    section = DataSection(train={"path": str(write_rows(tmp_path / "r.jsonl", [pair]))}, reasoning=reasoning)
    renderer = Renderer(changed(tokenizer, chat_template=SWITCHED), 264)
    rows = data.prepare(data.read_datasets(section, 0).train, renderer, section, 264)
    start = "<think>\nBecause.\n</think>\n\n" if reasoning == "train" else ""
    assert [tokenizer.decode(row.completion) for row in rows.rows.rows()] == [f"{start}b<|end|>", f"{start}c<|end|>"]


MANY = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            REASONED,
            {"role": "user", "content": "c"},
            REASONED | {"content": "d"},
        ]
    },
    conversation("a", "b"),
    {"messages": [{"role": "system", "content": "s"}, *conversation("e", "f")["messages"]]},
]


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("train", [["<think>\nBecause.\n</think>\n\nb<|end|>"], ["<think>\nBecause.\n</think>\n\nd<|end|>"]]),
        ("mask", [["b<|end|>"], ["d<|end|>"]]),
        ("drop", [["b<|end|>", "d<|end|>"]]),
    ],
)
def test_what_becomes_of_the_reasoning(
    reasoning: Any, expected: list[list[str]], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    section = DataSection(train={"path": str(write_rows(tmp_path / "r.jsonl", MANY))}, reasoning=reasoning)
    renderer = Renderer(changed(tokenizer, chat_template=SWITCHED), 264)
    rows = data.prepare(data.read_datasets(section, 0).train, renderer, section, 264)
    found = [[tokenizer.decode(row.ids[start:end]) for start, end in row.spans] for row in rows.rows.rows()]
    assert found == [*expected, ["b<|end|>"], ["f<|end|>"]]
    report = rows.report
    assert (report.rows, report.written, report.own_rows) == (3, len(found), len(expected) - 1)
    first = {"": len(expected), "a system message": len(expected) + 1}
    first |= {} if reasoning == "drop" else {"reasoning": len(expected) - 1}
    assert report.kinds == {kind: (1, number) for kind, number in first.items()} or reasoning == "drop"
    assert any("rows of their own" in line for line in report.remarks(1024)) == (reasoning != "drop")
    assert any("which is context" in line for line in report.losses()) == (reasoning == "mask")
    assert measure(section, renderer, 264)[0].items_per_row == len(found) / 3, "so `init` counts the steps of `train`"
    short = section.model_copy(update={"max_length": 20, "max_dropped": 1.0})
    rows = data.prepare(data.read_datasets(section, 0).train, renderer, short, 264)
    assert not rows.report.own_rows and rows.report.written == len(rows.rows)


def test_the_plan_shows_a_row_of_each_kind(base: Path, run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [*MANY[1:], MANY[0], *ROWS])
    ran = cli("train", run_config(model={"name_or_path": str(base)}, data={"train": str(rows)}), "--dry-run")
    assert ran.code == 0, ran.err
    for kind in ("reasoning", "a system message"):
        assert ran.out.count(f"first row with {kind}, supervised text marked") == 1
    assert "Because." in ran.out and "messages alone" not in ran.out


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"chat_template_kwargs": OFF}, "data.chat_template_kwargs"),
        ({"reasoning": "mask"}, "data.reasoning"),
        ({"reasoning": "drop"}, "data.reasoning"),
    ],
)
def test_settings_of_templates_need_conversations(
    settings: dict[str, Any], key: str, run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    ran = cli("train", run_config(data=settings), "--dry-run")
    check_refused(ran, 4, (Code.DATA_FORMAT, f"{tmp_path / 'rows.jsonl'}:1", key))
