"""The empty block of reasoning before answers without any: context if no row reasons, and then prompts have it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Ran, config_in, mainly, tiny_llama, write_rows
from fork_server import ForkServer
from peft import PeftModel
from running import checkpoints, interrupt
from test_reasoning import CHATS, MODELS, renderer_of, tokenizer_of
from test_rendering import changed, supervised
from test_template_arguments import ASKED, OFF, ON, THOUGHT, Cli, conversation, prompt_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loratune.compare import behavior, reasoning
from loratune.config import DataSection
from loratune.data.rendering import Renderer
from loratune.data.rendering.chat_template import with_closed_reasoning

pytestmark = pytest.mark.usefixtures("untraced_module")

BLOCKS = {
    **dict.fromkeys(["Qwen3", "Qwen3, marked"], THOUGHT),
    **dict.fromkeys(["Qwen3.5", "Qwen3.6", "DeepSeek-R1"], "\n</think>\n\n"),
    "GLM-4.5": "\n<think></think>\n",
    "Nemotron 3": "</think>",
}
"""Model → what its prompts lack to be those of answers without reasoning; the other templates write no empty block."""
UNREAD = {"DeepSeek-R1"}
"""Templates that do not read `enable_thinking`."""
QWEN = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ (m.reasoning_content or '').strip('\n') }}\n</think>\n\n{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}\n"
)
"""In the manner of Qwen3: the last answer has a block, which is empty without reasoning."""
ROWS = [conversation(f"{number}:", "xyz"[number % 3]) for number in range(12)]
REASONED = {**conversation("a", "b"), "messages": [ASKED, {"role": "assistant", "content": "b", "thinking": "Hm."}]}


def closing(name: str) -> Renderer:
    renderer = renderer_of(name, 0).closing_reasoning()
    assert renderer is not None
    return renderer


def rendered(tokenizer: Any, messages: Any, *, prompt: bool = True, **arguments: Any) -> str:
    return str(tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=prompt, **arguments))


@pytest.mark.parametrize("name", MODELS)
def test_which_templates_have_the_block(name: str) -> None:
    assert (renderer_of(name, 0).closing_reasoning() is not None) == (name in BLOCKS)
    for number, arguments in enumerate(MODELS[name][2]):
        if "enable_thinking" in arguments:  # the user decides
            assert renderer_of(name, number).closing_reasoning() is None


@pytest.mark.parametrize("name", mainly(["Qwen3", "GLM-4.5"], BLOCKS))
def test_only_the_default_prompt_changes(name: str, tmp_path: Path) -> None:
    """The saved template, in transformers, against the template of the base."""
    before = tokenizer_of(name)
    closing(name).tokenizer.save_pretrained(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    for chat in ("plain", "system", "some", "reasoning"):
        messages = CHATS[chat].messages
        for given in ({}, ON, OFF):
            assert rendered(after, messages, prompt=False, **given) == rendered(before, messages, prompt=False, **given)
        asked = messages[:-1]
        assert rendered(after, asked) == rendered(before, asked) + BLOCKS[name]
        assert rendered(after, asked, **ON) == rendered(before, asked, **ON)
        closed = BLOCKS[name] if name in UNREAD else ""
        assert rendered(after, asked, **OFF) == rendered(before, asked, **OFF) + closed


@pytest.mark.parametrize("name", BLOCKS)
def test_answers_without_reasoning_are_trained_after_the_block(name: str) -> None:
    """The labels, against an oracle: the prompt of transformers is context, and the rest of the row is learned."""
    renderer, tokenizer = closing(name), closing(name).tokenizer
    parts = renderer.parts(CHATS["plain"], "completion")
    rows = renderer.rows(parts)
    for part, row in zip(parts, rows, strict=True):
        prompt = rendered(tokenizer, part.messages[:-1])
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert row.labels[: len(ids)].count(-100) == len(ids) or len(row.spans) > 1
        assert list(row.ids[: len(ids)]) == ids and row.labels[len(ids) :] == list(row.ids[len(ids) :])
    texts = [text for row in rows for text in supervised(tokenizer, row)]
    assert [text[:4] for text in texts] == ["Alph", "Beta"] and not any("think>" in text for text in texts)
    own = renderer_of(name, 0)
    learned = [text for row in own.rows(own.parts(CHATS["plain"], "completion")) for text in supervised(tokenizer, row)]
    assert "</think>" in learned[-1]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "  ", "\n  ", "{# note #}\n", "{% if false %}{% endif %}\n\n"])
@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  ", "{%- set x = 1 -%}\n"])
def test_white_space_around_the_template_stays(start: str, end: str, tokenizer: PreTrainedTokenizerFast) -> None:
    before = changed(tokenizer, chat_template=start + QWEN.removesuffix("\n") + end)
    after = changed(tokenizer, chat_template=with_closed_reasoning(before.chat_template, THOUGHT))
    for given in (ON, OFF):
        assert rendered(after, [ASKED], **given) == rendered(before, [ASKED], **given)
    assert rendered(after, [ASKED]) == rendered(before, [ASKED]) + THOUGHT
    assert rendered(after, [ASKED], prompt=False) == rendered(before, [ASKED], prompt=False)


def test_several_templates_and_the_second_time(tokenizer: PreTrainedTokenizerFast) -> None:
    before = changed(tokenizer, chat_template={"default": QWEN, "tool_use": "{{ tools }}" + QWEN})
    renderer = Renderer(before).closing_reasoning()
    assert renderer is not None and renderer.closing_reasoning() is None
    for tools in (None, [{"name": "f"}]):
        assert rendered(renderer.tokenizer, [ASKED], tools=tools).endswith(f"<|assistant|>{THOUGHT}")
    assert before.chat_template["default"] == QWEN


def test_conflicts() -> None:
    for more in ({"loss_on": "all"},):
        with pytest.raises(ValueError, match="supervises every token"):
            DataSection(train="rows.jsonl", empty_reasoning="context", **more)  # type: ignore[arg-type]


# The command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("reasoning") / "base"
    tiny_llama().save_pretrained(path)
    changed(tokenizer, chat_template=QWEN).save_pretrained(path)
    return path


def config_of(folder: Path, base: Path, rows: list[Any] = ROWS, **settings: Any) -> Path:
    data_settings = {"train": str(write_rows(folder / "chats.jsonl", rows)), **settings}
    return config_in(folder, base)(data=data_settings, training={"max_steps": 8, "save_steps": 1})


def decided(path: Path) -> str:
    return str(yaml.safe_load((path / "run.yaml").read_text())["data"]["empty_reasoning"])


def test_a_run_without_reasoning_and_its_commands(base: Path, cli: Cli, tmp_path: Path) -> None:
    config, out = config_of(tmp_path, base), tmp_path / "out"
    plan = cli("train", config, "--dry-run")
    assert "the empty block of reasoning before answers is context, not learned" in plan.out + plan.err
    ran: Ran = cli("train", config, "--allow-worse")
    assert ran.code == 0, ran.err
    assert f"{THOUGHT}\u27e6" in ran.err and decided(out) == "context"
    assert prompt_of(out).endswith(f"<|assistant|>{THOUGHT}") and prompt_of(out, arguments=ON).endswith("<|assistant|>")
    saved = AutoTokenizer.from_pretrained(out)
    assert rendered(saved, [ASKED]) == prompt_of(out) and rendered(saved, [ASKED], **OFF) == prompt_of(out)
    assert "chat_template.jinja" in (out / "README.md").read_text()
    rows, scored = write_rows(tmp_path / "held-out.jsonl", ROWS[:2]), tmp_path / "scored.jsonl"
    ran = cli("evaluate", "--adapter", out, "--data", rows, "--output", scored)
    assert ran.code == 0, ran.err
    assert all(json.loads(line)["prompt"].endswith(THOUGHT) for line in scored.read_text().splitlines())
    asked = [{"messages": [ASKED]}, {"messages": [ASKED], "chat_template_kwargs": OFF}]
    given = write_rows(tmp_path / "asked.jsonl", asked)
    ran = cli("generate", "--adapter", out, "--input", given, "--output", "-", "--max-new-tokens", 3)
    first, second = (json.loads(line)["completion"] for line in ran.out.splitlines())
    assert first == second
    again = cli("train", out / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}", "--allow-worse")
    assert again.code == 0 and prompt_of(tmp_path / "again") == prompt_of(out)


@pytest.mark.parametrize(
    "settings", [{"empty_reasoning": "supervised"}, {"loss_on": "all"}, {"prompt_loss_weight": 0.5}]
)
def test_a_block_that_is_supervised(settings: dict[str, Any], base: Path, cli: Cli, tmp_path: Path) -> None:
    ran = cli("train", config_of(tmp_path, base, **settings), "--allow-worse")
    assert ran.code == 0, ran.err
    assert decided(tmp_path / "out") == "supervised" and prompt_of(tmp_path / "out").endswith("<|assistant|>")


@pytest.mark.parametrize(("where", "drop"), [("train", False), ("validation", False), ("train", True)])
def test_a_row_that_reasons(where: str, drop: bool, base: Path, cli: Cli, tmp_path: Path) -> None:
    rows, settings = [*ROWS, REASONED] if where == "train" else ROWS, dict[str, Any]()
    if where == "validation":
        settings["validation"] = str(write_rows(tmp_path / "validation.jsonl", [REASONED]))
    if drop:
        settings["reasoning"] = "drop"
    ran = cli("train", config_of(tmp_path, base, rows, **settings), "--allow-worse")
    assert ran.code == 0, ran.err
    assert decided(tmp_path / "out") == ("context" if drop else "supervised")


def test_a_setting_without_effect(base: Path, cli: Cli, tmp_path: Path) -> None:
    config = config_of(tmp_path, base, empty_reasoning="context", chat_template_kwargs=OFF)
    assert "data.empty_reasoning has no effect" in cli("train", config, "--dry-run").out


def test_the_cache_keeps_both(base: Path, cli: Cli, tmp_path: Path) -> None:
    """The same rows with one setting and the other, and again from the cache."""
    fingerprints = []
    for setting in ("auto", "supervised", "auto", "supervised"):
        ran = cli("train", config_of(tmp_path, base, empty_reasoning=setting), "--allow-worse", "--overwrite")
        assert ran.code == 0, ran.err
        record = json.loads((tmp_path / "out" / "loratune.json").read_text())
        fingerprints.append((record["fingerprints"]["data"], record["rows"]["supervised"]))
    assert fingerprints[:2] == fingerprints[2:] and fingerprints[0] != fingerprints[1]
    assert fingerprints[0][1] < fingerprints[1][1]


@pytest.mark.parametrize("setting", ["auto", "context"])
def test_a_resumed_run_goes_on_as_it_began(
    setting: str, base: Path, cli: Cli, tmp_path: Path, processes: ForkServer
) -> None:
    config = config_of(tmp_path, base, empty_reasoning=setting)
    interrupt(processes, config, tmp_path / "out.partial")
    assert checkpoints(tmp_path / "out.partial")
    other = cli("train", config, "--resume", "--set", "data.empty_reasoning=supervised")
    assert other.code == 7 and "data.empty_reasoning" in other.err
    ran = cli("train", config, "--resume", "--allow-worse")
    assert ran.code == 0, ran.err
    assert decided(tmp_path / "out") == "context" and prompt_of(tmp_path / "out").endswith(THOUGHT)


# Whether it still reasons

OPENED = QWEN.replace("{% endif %}{% endif %}\n", "{% else %}<think>\n{% endif %}{% endif %}\n")
"""In the manner of Qwen3.5: the prompt opens the reasoning."""


def counted(base: Path, adapter: Path | None) -> int:
    """The answers that begin with reasoning, by stock transformers and PEFT, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, str(adapter)).eval() if adapter is not None else model
    count = 0
    for line in behavior.INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
        text = rendered(tokenizer, [{"role": "user", "content": line}], **ON)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
        whole = model.generate(ids, do_sample=False, max_new_tokens=32, pad_token_id=0, eos_token_id=ends)
        count += bool(tokenizer.decode(whole[0, ids.shape[1] :]).split("</think>")[0].strip())
    return count


@pytest.mark.usefixtures("all_instructions")
def test_it_still_reasons(cli: Cli, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path, out = tmp_path / "base", tmp_path / "out"
    tiny_llama().save_pretrained(path)
    changed(tokenizer, chat_template=OPENED).save_pretrained(path)
    ran = cli("train", config_of(tmp_path, path), "--allow-worse")
    assert ran.code == 0, ran.err
    found = json.loads((out / "loratune.json").read_text())["metrics"]["reasons"]
    assert (found["asked"], found["base"], found["adapter"]) == (24, counted(path, None), counted(path, out))
    assert found["base"] > 0 and found["share"] == found["adapter"] / 24
    line = f"base {found['base']} of 24, adapter {found['adapter']}"
    assert line in ran.out + ran.err and f"**Reasons:** {line}" in (out / "README.md").read_text()
    rows = write_rows(tmp_path / "held-out.jsonl", [conversation("77:", "x")] * 3)
    asked = ("evaluate", "--adapter", out, "--data", rows, "--forgetting", "builtin")
    for bound, code in ((0, 0), (1, 11)):
        ran = cli(*asked, "--json", "--require", f"reasons>={bound}")
        assert ran.code == code, ran.err
        assert json.loads(ran.out)["reasons"] == found
    assert line in cli(*asked).out
    refused = cli(*asked[:-2], "--require", "reasons>=0.5")
    assert refused.code == 2 and "forgetting" in refused.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nHm", True),
        ("<think>Hm</think>4", True),
        ("<think>\n\n</think>\n\n4", False),
        ("<think>", False),
        ("4 <think>Hm", False),
        ("", False),
    ],
)
def test_what_begins_with_reasoning(text: str, expected: bool) -> None:
    assert reasoning.begins_with_reasoning(text, "<think>", "</think>") == expected
