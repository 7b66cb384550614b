"""Reasoning of answers, and the arguments of chat templates: with real templates, what is trained is what is served."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import byte_tokenizer, meanings, write_rows
from test_rendering import changed, fetched, loaded, supervised, turn
from test_template_arguments import SWITCHED
from test_templates import CALL, TOOLS, said, templates
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from loratune import data
from loratune.codes import Code
from loratune.config import DataSection
from loratune.config.template_variables import unread, variables
from loratune.data.formats import Conversation, Message
from loratune.data.formats.reasoning import dropped, end_of_reasoning, kind_of, reasoning_of, without
from loratune.data.rendering import Renderer
from loratune.data.rendering.chat_template import ChatTemplate
from loratune.data.rendering.spans import RenderedText
from loratune.errors import AdapterError, DataError, ModelError
from loratune.export import ollama

GEMMA4 = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>")
V31 = (
    "{{ bos_token }}{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"  # noqa: RUF001
    "{% elif m.role == 'assistant' %}<｜Assistant｜></think>"  # noqa: RUF001
    "{{ m.content.split('</think>', 1)[1] if '</think>' in m.content else m.content }}<｜end▁of▁sentence｜>{% endif %}"  # noqa: RUF001
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"  # noqa: RUF001
)
"""As that of DeepSeek-V3.1, without tools."""
SMOLLM3 = (
    "{%- set enable_thinking = enable_thinking if enable_thinking is defined else true -%}"
    "<|im_start|>system\nReasoning Mode: {{ '/think' if enable_thinking else '/no_think' }}<|im_end|>\n"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' and not enable_thinking and '</think>' not in m.content -%}"
    "{{ '<think>\n\n</think>\n' }}{%- endif -%}{{ m.content.lstrip('\n') }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n"
    "{%- if not enable_thinking -%}{{ '<think>\n\n</think>\n' }}{%- endif -%}{%- endif -%}"
)
"""In the manner of SmolLM3: the mode is in the system message, and reasoning in the content."""
OWN = {"DeepSeek-V3.1": V31, "SmolLM3": SMOLLM3}
THINKING: dict[str, list[dict[str, Any]]] = {"enable_thinking": [{}, {"enable_thinking": True}]}
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
MODELS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "Qwen3": ("qwen3", "qwen3", [{}, ON, OFF]),
    "Qwen3, marked": ("qwen3", "qwen3_training", [{}]),
    "Qwen3.5": ("qwen3", "qwen3_5_think", [{}, ON, OFF]),
    "Qwen3.5, small": ("qwen3", "qwen3_5_nothink", [{}, ON, OFF]),
    "Qwen3.6": ("qwen3", "qwen3_6", [{}, OFF, {"preserve_thinking": True}]),
    "DeepSeek-R1": ("deepseek_v3", "deepseek_r1_distill", [{}]),
    "DeepSeek-V3.1": ("deepseek_v3", "", [{}, {"thinking": True}]),
    "GPT-OSS": ("gptoss", "gptoss", [{}, {"reasoning_effort": "high"}, {"model_identity": "Be."}]),
    "Gemma 4": ("bytes", "gemma4_v5", [{}, ON, OFF]),
    "GLM-4.5": ("qwen3", "glm4moe", [{}, OFF]),
    "Nemotron 3": ("qwen3", "nemotron_3_nano", [{}, OFF, {"truncate_history_thinking": False}]),
    "SmolLM3": ("qwen3", "", [{}, OFF]),
    "Mistral-Nemo": ("mistral_nemo", "own", [{}]),
}
"""Name → tokenizer, template in the `trl` wheel, and settings of the switches."""
CASES = [(name, number) for name, (*_, switches) in MODELS.items() for number in range(len(switches))]
Q1, Q2 = turn("user", "First?"), turn("user", "Second?")
CHATS: dict[str, Conversation] = {
    "plain": Conversation("", (Q1, said("Alpha"), Q2, said("Beta"))),
    "reasoning": Conversation(
        "", (Q1, said("Alpha", reasoning_content="Hmm one."), Q2, said("Beta", reasoning_content="Hmm two."))
    ),
    "in the content": Conversation(
        "",
        (Q1, said("<think>\nHmm one.\n</think>\n\nAlpha"), Q2, said("<think>\nHmm two.\n</think>\n\nBeta")),
    ),
    "some": Conversation("", (Q1, said("Alpha", reasoning="Hmm one."), Q2, said("Beta"))),
    "mixed": Conversation(
        "",
        (
            *(Q1, said("Alpha", reasoning_content="Hmm one."), Q2, said("Beta")),
            *(turn("user", "Third?"), said("Gamma", reasoning_content="Hmm three.")),
        ),
    ),
    "system": Conversation("", (turn("system", "Be brief."), Q1, said("Beta", thinking="Hmm two."))),
    "a tool": Conversation(
        "",
        (
            Q1,
            said("", tool_calls=[CALL], reasoning_content="Hmm one."),
            {"role": "tool", "name": "get_weather", "tool_call_id": "abc123XYZ", "content": "15"},
            said("Beta", reasoning_content="Hmm two."),
        ),
        tools=TOOLS,
    ),
}


CLOSED = {
    *(("Qwen3", 2), ("Qwen3.5", 2), ("Qwen3.5, small", 0), ("Qwen3.5, small", 2), ("Qwen3.6", 1), ("GLM-4.5", 1)),
    *(("Nemotron 3", 1), ("DeepSeek-V3.1", 0)),
}
"""The cases in which the prompt closes the reasoning, so that an answer cannot have its own."""
WITHOUT_TOOLS = {"DeepSeek-R1", "DeepSeek-V3.1", "SmolLM3", "Mistral-Nemo"}
UNREAD = {"SmolLM3", "Mistral-Nemo"}
"""Templates that do not read the fields of reasoning."""


def refusal(name: str, number: int, chat: str) -> Code | None:
    """Why a conversation cannot be trained with a template; without its reasoning it can."""
    if chat == "a tool" and name in WITHOUT_TOOLS:
        return Code.TEMPLATE_OMITS
    if chat == "in the content" and (name, number) == ("SmolLM3", 1):
        return Code.TEMPLATE_OMITS
    is_closed = (name, number) in CLOSED or (name in UNREAD and chat != "in the content")
    return Code.TEMPLATE_OMITS if is_closed and chat != "plain" else None


@cache
def tokenizer_of(name: str) -> Any:
    source, template, _ = MODELS[name]
    tokenizer = byte_tokenizer() if source == "bytes" else loaded(fetched(source))
    if template != "own":
        tokenizer = copy.copy(tokenizer)
        own = OWN.get(name) or (templates() / f"{template}.jinja").read_text(encoding="utf-8")
        tokenizer.chat_template = own
    if name == "Gemma 4":
        special = [AddedToken(token, normalized=False, special=True) for token in GEMMA4]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@cache
def renderer_of(name: str, number: int) -> Renderer:
    return Renderer(tokenizer_of(name), None, MODELS[name][2][number])


def answer_of(messages: tuple[Message, ...]) -> str:
    return str(messages[-1]["content"]).rpartition("</think>")[2].strip()


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}, {number}" for name, number in CASES])
def test_what_is_trained_is_what_is_served(name: str, number: int, chat: str) -> None:
    """Each answer that is supervised comes after the prompt that a server renders for it, with its own reasoning."""
    renderer, switches = renderer_of(name, number), MODELS[name][2][number]
    parts = renderer.parts(CHATS[chat], "completion")
    if expected := refusal(name, number, chat):
        with pytest.raises(DataError) as caught:
            renderer.rows(parts)
        assert {code for code, *_ in meanings(caught.value)} == {expected}
        assert chat == "a tool" or renderer.row(dropped(CHATS[chat])).supervised
        return
    rows = renderer.rows(parts)
    for part, row in zip(parts, rows, strict=True):
        history, tools = list(part.messages[:-1]), list(part.tools) or None
        settings: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "return_dict": False, **switches}
        assert list(row.ids[: len(row.prompt)]) == renderer.tokenizer.apply_chat_template(history, **settings)
        assert row.prompt == renderer.prompt(history, tools=part.tools)
        text = renderer.tokenizer.decode(row.completion)
        reasoning = part.messages[-1].get("reasoning_content") or part.messages[-1].get("thinking") or ""
        assert reasoning in text and answer_of(part.messages) in text
        whole = renderer.tokenizer.apply_chat_template(
            list(part.messages), **(settings | {"add_generation_prompt": False, "tokenize": False})
        )
        if whole.startswith(renderer.tokenizer.decode(row.prompt)) and name != "GPT-OSS":
            assert whole.startswith(renderer.tokenizer.decode(row.ids[:-1]))
    texts = [text for row in rows for text in supervised(renderer.tokenizer, row)]
    if chat in ("reasoning", "in the content"):
        assert [sum(f"Hmm {which}." in text for text in texts) for which in ("one", "two")] == [1, 1]
        assert all(("Hmm one." in text) == ("Alpha" in text) for text in texts)
    masked = [
        text for row in renderer.rows(parts, masks_reasoning=True) for text in supervised(renderer.tokenizer, row)
    ]
    assert len(masked) == len(texts) and not any("Hmm" in text or "think>" in text for text in masked)
    assert all(text.endswith(short) for text, short in zip(texts, masked, strict=True))


def text_of(renderer: Renderer, messages: tuple[Message, ...], *, prompt: bool, **settings: Any) -> str:
    settings |= {"tokenize": False, "add_generation_prompt": prompt}
    return str(renderer.tokenizer.apply_chat_template(list(messages), **settings))


@pytest.mark.parametrize("drops", [False, True], ids=["train", "drop"])
@pytest.mark.parametrize("chat", [*CHATS, "system, twice"])
@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}, {number}" for name, number in CASES])
def test_earlier_answers_are_trained_as_they_are_served(name: str, number: int, chat: str, drops: bool) -> None:
    """Each answer is supervised once: after the prompt that a server renders for it, as the template ends it then."""
    if (not drops and refusal(name, number, chat)) or (chat == "a tool" and name in WITHOUT_TOOLS):
        return
    system = (turn("system", "Be brief."),) if chat == "system, twice" else ()
    known = CHATS["plain" if system else chat]
    example = replace(known, messages=(*system, *known.messages))
    example, renderer = dropped(example) if drops else example, renderer_of(name, number)
    settings: dict[str, Any] = {**MODELS[name][2][number], "tools": list(example.tools) or None}
    parts, found = renderer.parts(example, "completion"), dict[str, str]()
    rows = renderer.rows(parts)
    for row, text in zip(rows, renderer._texts(parts, "completion", masks_reasoning=False), strict=True):
        assert isinstance(text, RenderedText) and len(row.spans) == len(text.spans)
        for start, end in text.spans:  # in characters: a borrowed tokenizer may merge characters across a boundary
            assert text.text[:start] not in found
            found[text.text[:start]] = text.text[start:end]
    turns = example.supervised_turns("completion")
    assert len(found) == len(turns)
    for at in turns if name != "Qwen3, marked" else ():  # what it marks begins after the header
        asked = text_of(renderer, example.messages[:at], prompt=True, **settings)
        answered = text_of(renderer, example.messages[: at + 1], prompt=False, **settings)
        if asked not in found:  # an earlier answer with its tag in its content
            assert chat == "in the content" and at != turns[-1]
            asked = asked.removesuffix("<think>\n")
        if answered.startswith(asked):
            assert answered.removeprefix(asked).rstrip() == found[asked].rstrip() or name == "Gemma 4"
    once = {"Mistral-Nemo", "Qwen3, marked", "Gemma 4"} | ({"SmolLM3"} if chat != "a tool" else set())
    if name in once and chat == "plain":
        assert len(parts) == 1
    if name in ("Qwen3", "Qwen3.5", "GPT-OSS", "DeepSeek-R1") and not number and chat != "a tool":
        assert len(parts) == len(turns)


def test_a_template_that_renders_all_turns_alike_is_tested_once(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer)
    with mock.patch.object(ChatTemplate, "text", autospec=True, side_effect=ChatTemplate.text) as text:
        assert renderer.parts(CHATS["plain"], "completion") == [CHATS["plain"]]
        count = text.call_count
        for chat in (CHATS["plain"], replace(CHATS["plain"], messages=CHATS["plain"].messages * 20)):
            assert renderer.parts(chat, "completion") == [chat]
        assert text.call_count == count < 20


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("<think>x</think>Write </think> to close it.", "x", "Write </think> to close it."),
        ("<think>a</think>visible one<think>b</think>two", "a", "visible one<think>b</think>two"),
        (" \n<think>\n4\n</think>\n\nIt is 4.", "4", "It is 4."),
        ("Use </think> tag", "", "Use </think> tag"),
        ("a<think>b</think>c", "", "a<think>b</think>c"),
    ],
)
def test_only_a_block_at_the_beginning_is_reasoning(
    content: str, reasoning: str, rest: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert (reasoning_of(said(content)), without(said(content))["content"]) == (reasoning, rest)
    chat, renderer = Conversation("", (Q1, said(content))), Renderer(tokenizer)  # whose template writes the content
    whole, masked, bare = (
        *renderer.rows([chat]),
        *renderer.rows([chat], masks_reasoning=True),
        *renderer.rows([dropped(chat)]),
    )
    assert supervised(tokenizer, whole)[0].strip() == f"{content.strip()}<|end|>"
    assert supervised(tokenizer, masked) == supervised(tokenizer, bare) == [f"{rest}<|end|>"]


def test_answers_that_a_template_cuts_at_a_later_tag_are_refused() -> None:
    """Qwen3's takes all before the last closing tag for reasoning, and writes only its beginning."""
    chat = Conversation("rows:1", (Q1, said("<think>x</think>Write </think> to close it.")))
    with pytest.raises(DataError) as caught:
        renderer_of("Qwen3", 0).row(chat)
    assert meanings(caught.value)[0][:2] == (Code.TEMPLATE_ANSWER, "rows:1")


@pytest.mark.parametrize("reasoning", ["4", "hi", "think", "<", "n", "b", "a loratune", "</think>", " \nx\n "])
def test_short_reasoning_is_found_where_it_is_written(reasoning: str, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Conversation("rows:1", (Q1, said("It is 4, hi.", reasoning_content=reasoning)))
    renderer = Renderer(changed(tokenizer, chat_template=SWITCHED))
    masked = renderer.rows([chat], masks_reasoning=True)[0]
    assert supervised(tokenizer, masked) == ["It is 4, hi.<|end|>"]
    with pytest.raises(DataError) as caught:  # by a template that does not read the field
        Renderer(tokenizer).row(chat)
    assert meanings(caught.value)[0][:2] == (Code.TEMPLATE_OMITS, "rows:1")


CUT = {"role": "assistant", "content": "<think>\nA long thought that was cut"}
ANSWERED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think></think>b"}]


@pytest.mark.parametrize("reasoning", ["train", "mask", "drop"])
def test_an_unclosed_reasoning_is_an_invalid_row(
    reasoning: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"messages": [*ANSWERED[:1], CUT]}, {"messages": ANSWERED}, {"messages": [*ANSWERED[:1], CUT, *ANSWERED]}]
    path = write_rows(tmp_path / "r.jsonl", rows)
    section = DataSection(train={"path": str(path)}, reasoning=reasoning, max_dropped=1.0)
    split = data.read_datasets(section, 0).train
    with pytest.raises(DataError) as caught:
        data.prepare(split, Renderer(tokenizer), section, 264)
    assert [(code, where) for code, where, _ in meanings(caught.value)] == [
        (Code.DATA_FIELD, f"{path}:{line}") for line in (1, 3)
    ]
    section = section.model_copy(update={"invalid_rows": "drop"})
    found = data.prepare(split, Renderer(tokenizer), section, 264)
    assert (len(found.rows), found.report.invalid.count) == (1, 2)


def test_a_rejected_answer_may_be_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": ANSWERED[:1], "chosen": ANSWERED[1:], "rejected": [CUT]}])
    section = DataSection(train={"path": str(path)})
    assert len(data.prepare(data.read_datasets(section, 0).train, Renderer(tokenizer), section, 264).rows) == 2


# Arguments of templates

IDENTITY = '"You are ChatGPT, a large language model trained by OpenAI."'


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen3", {"enable_thinking": ""}),
        ("Qwen3.6", {"add_vision_id": "", "enable_thinking": "", "preserve_thinking": ""}),
        ("GPT-OSS", {"builtin_tools": "", "model_identity": IDENTITY, "reasoning_effort": '"medium"'}),
        ("Nemotron 3", {"enable_thinking": "true", "truncate_history_thinking": "true"}),
        ("DeepSeek-V3.1", {"thinking": "false"}),
        ("SmolLM3", {"enable_thinking": "true"}),
        ("DeepSeek-R1", {}),
    ],
)
def test_the_arguments_that_a_template_reads(name: str, expected: dict[str, str]) -> None:
    assert variables(tokenizer_of(name).chat_template) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ x | default('a') }}{{ y | d(2, true) }}", {"x": '"a"', "y": "2"}),
        ("{% set x = 3 if x is undefined else x %}{{ x }}", {"x": "3"}),
        ("{% if not x is defined %}{% set x = none %}{% endif %}{{ x }}", {"x": "null"}),
        (
            "{% if not x is defined %}{% if y %}{% set x = y %}{% endif %}{% endif %}{{ x }}",
            {"x": "", "y": ""},
        ),
        ("{% for m in messages %}{% if m %}{% set c = 1 %}{% endif %}{{ c }}{% endfor %}", {}),
        ("{%- generation -%}{{ x }}{%- endgeneration -%}", {"x": ""}),
        ("{% for m in messages %}{{ m.y }}{{ loop.index }}{{ strftime_now('%d') }}{% endfor %}{{ bos_token }}", {}),
        ("{% macro f(a) %}{{ a }}{{ x }}{% endmacro %}{{ f(1) }}", {"x": ""}),
        ("{% if %}", {}),
        ("{{ x | nothing }}", {}),
        ("{{ 9**99999 }}", {}),
        ("{{ level|default(9**99999) }}", {}),
        ("", {}),
    ],
)
def test_defaults_of_arguments(source: str, expected: dict[str, str]) -> None:
    assert variables(source) == expected


def test_arguments_that_no_template_reads_are_reported() -> None:
    assert unread(["{{ x }}", "{{ y }}"], ["x", "y"]) == ""
    line = unread(["{{ x | default(1) }}"], ["z", "x", "w"])
    assert "`z`, `w`" in line and "x (default 1)" in line
    assert "no argument" in unread([""], ["z"])


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("Qwen3", "<think>\nHmm.\n</think>\n\nAlpha<|im_end|>", ("Hmm.", "Alpha<|im_end|>")),
        ("Qwen3", "<think>\n\n</think>\n\nAlpha<|im_end|>", ("", "Alpha<|im_end|>")),
        ("Qwen3", "Alpha", None),
        ("Qwen3.5", "Hmm.\n</think>\n\nAlpha", ("Hmm.", "Alpha")),
        ("DeepSeek-R1", "Hmm.\n</think>\n\nAlpha", ("Hmm.", "Alpha")),
        (
            "GPT-OSS",
            "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant<|channel|>final<|message|>Alpha<|return|>",
            ("Hmm.", "Alpha<|return|>"),
        ),
        ("GPT-OSS", "<|channel|>final<|message|>Alpha<|return|>", None),
        ("Mistral-Nemo", "a </think> b", None),
    ],
)
def test_the_reasoning_of_an_answer_is_told_from_the_rest(
    name: str, written: str, expected: tuple[str, str] | None
) -> None:
    assert renderer_of(name, 0).template().split_reasoning(written) == expected


@pytest.mark.parametrize(
    "content",
    ["<think>never closed", "</think>only closed", "a <think>b</think>", "<think></think>a", "<think> </think>", "a"],
)
@pytest.mark.parametrize("name", ["Qwen3", "GPT-OSS", "Mistral-Nemo"])
def test_odd_reasoning_neither_fails_nor_vanishes(name: str, content: str) -> None:
    """An answer that only looks like one with reasoning is rendered as the template says, or refused."""
    renderer = renderer_of(name, 0)
    for fields in ({}, {"reasoning": " "}, {"thinking": "4"}):
        chat = Conversation("rows:1", (Q1, said(content, **fields), Q2, said("4", **fields)))
        for example in (chat, dropped(chat)):
            try:
                rows = renderer.rows(renderer.parts(example, "completion"), masks_reasoning=True)
            except DataError as error:
                assert error.problems[0].where == "rows:1"
                continue
            assert all(row.supervised for row in rows) and rows[-1].labels[-1] == rows[-1].ids[-1]
            texts = [text for row in rows for text in supervised(renderer.tokenizer, row)]
            assert "4" in texts[-1] and not texts[-1].startswith("<think>")


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}, {number}" for name, number in CASES])
def test_the_modelfile_renders_as_the_template_with_its_arguments(name: str, number: int) -> None:
    renderer, messages = renderer_of(name, number), [Q1, said("Alpha"), Q2]
    if name == "GPT-OSS":  # it writes the date
        with pytest.raises(AdapterError):
            ollama.find_turns(renderer)
        return
    text = ollama.find_turns(renderer)[0].render(messages)
    settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **MODELS[name][2][number]}
    expected = renderer.tokenizer.apply_chat_template(messages, **settings)
    assert text == (expected.removeprefix(renderer.tokenizer.bos_token) if renderer.starts_with_bos else expected)


@pytest.mark.parametrize("source", ["{{ 9**99999 }}", "{{ level|default(9**99999) }}", f"{{{{ {'9' * 5000} }}}}"])
def test_a_number_that_cannot_be_written_is_no_template(source: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError) as caught:
        Renderer(changed(tokenizer, chat_template=source)).prompt([Q1])
    assert meanings(caught.value)[0][0] == Code.TEMPLATE_INVALID


def test_white_space_costs_no_time() -> None:
    assert end_of_reasoning(" \n" * 500_000 + "a", 0, None) == 0
    assert end_of_reasoning("\n<think>\n" + " " * 500_000 + "</think>\n\na", 0, None) == 500_019


def test_kinds_of_conversations() -> None:
    assert [kind_of(CHATS[name]) for name in ("plain", "in the content", "system", "a tool")] == [
        "", "reasoning", "reasoning, a system message", "reasoning, tools",
    ]  # fmt: skip
