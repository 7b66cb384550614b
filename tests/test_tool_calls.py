"""Tool calls of answers: their forms in real chat templates, what may be wrong, and the metric `tool_call`."""

import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_reasoning
import test_templates
import torch
from conftest import ROOT, byte_tokenizer, check_refused, once, tiny_llama, write_rows
from fork_server import ForkServer
from running import Cli
from test_rendering import fetched
from test_templates import templates

from loratune.codes import Code
from loratune.compare.metrics import CALL_ERRORS, read_json
from loratune.compare.tool_calls import Call, CallErrors, CallForm, InvalidCallError, call_error, call_scores
from loratune.data.rendering.chat_template import ChatTemplate

INVALID, MISSING, FUNCTION, ARGUMENT, NEEDLESS = CALL_ERRORS
LOOP = (
    "{{ tools | tojson if tools }}{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</u>{% else %}"
    "{{ m.content }}CALLS<|endoftext|>{% endif %}{% endfor %}"
)
OWN = {
    "Mistral, newer": (
        "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
        "{{ c.function.arguments | tojson }}{% endfor %}"
    ),
    "DeepSeek, newer": (
        "{% for c in m.tool_calls or [] %}{{ '<|tool_calls_begin|>' if loop.first }}<|tool_call_begin|>"
        "{{ c.function.name }}<|tool_sep|>{{ c.function.arguments | tojson }}<|tool_call_end|>"
        "{{ '<|tool_calls_end|>' if loop.last }}{% endfor %}"
    ),
    "Cohere": (
        "{% if m.tool_calls %}<|START_ACTION|>[{% for c in m.tool_calls %}"
        '{"tool_call_id": "{{ loop.index0 }}", "tool_name": {{ c.function.name | tojson }}, "parameters": '
        "{{ c.function.arguments | tojson }}}{{ ', ' if not loop.last }}{% endfor %}]<|END_ACTION|>{% endif %}"
    ),
}
"""Templates in the manner of some that no wheel has with calls."""
NAMES = (
    "recipe", "Qwen2.5", "Qwen3", "Qwen3, newer", "Qwen3.5, thinking", "Llama-3.2", "Mistral-Nemo", "Gemma 4",
    "GLM-4.5", "Nemotron 3", "GPT-OSS", *OWN,
)  # fmt: skip
SINGLE = {"Llama-3.2", "GPT-OSS"}
"""Templates that refuse several calls, or write only the first."""
MARKED = {"Qwen3.5, thinking", "GLM-4.5", "Nemotron 3"}
"""Those that write texts without quotation marks."""
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"city": "Köln"},
    {"city": "a } \\ \"quoted\" {'name': 1}", "n": 7, "share": 0.25, "yes": True},
    {"place": {"lat": 1.5, "of": [{"deep": [[], {}]}, "x, y: z"], "empty": ""}, "emoji": "🙂 – ‰", "lines": "a\nb"},  # noqa: RUF001
    {"tag": "it says </b> and <a>, [TOOL] too", "many": [1, 2, 3]},
)


@cache
def tokenizer_of(name: str) -> Any:
    if name in test_reasoning.MODELS and name not in test_templates.MODELS:
        return test_reasoning.tokenizer_of(name)
    if name in test_templates.MODELS:
        return test_templates.rendering(name, fetched(test_templates.MODELS[name].tokenizer)).tokenizer
    tokenizer = byte_tokenizer()
    recipe = (ROOT / "configs" / "recipes" / "tools.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = LOOP.replace("CALLS", OWN[name]) if name in OWN else recipe
    return tokenizer


@cache
def form_of(name: str) -> CallForm:
    form = CallForm.of(ChatTemplate(tokenizer_of(name)))
    assert form is not None
    return form


def made(*calls: tuple[str, dict[str, Any]]) -> list[Call]:
    return [Call(name, read_json(json.dumps(arguments))[0]) for name, arguments in calls]


def answer_of(name: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """What stock transformers writes as an answer with calls."""
    functions = [{"name": own, "arguments": arguments} for own, arguments in calls]
    given = [{"type": "function", "id": "abc123XYZ", "function": one} for one in functions]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": given}]
    render = tokenizer_of(name).apply_chat_template
    asked = render(messages[:1], tools=list(test_templates.TOOLS), tokenize=False, add_generation_prompt=True)
    text: str = render(messages, tools=list(test_templates.TOOLS), tokenize=False)
    common = next((at for at, (one, two) in enumerate(zip(asked, text, strict=False)) if one != two), len(asked))
    return text[common:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_calls_are_read_as_templates_write_them(name: str, arguments: dict[str, Any]) -> None:
    form, one, two = form_of(name), ("get_weather", arguments), ("set-timer.v2", {"minutes": 3})
    assert form.parse(answer_of(name, one)) == made(one)
    if name not in SINGLE:
        assert form.parse(answer_of(name, one, two, one)) == made(one, two, one)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_cut_off_is_none(name: str) -> None:
    """Wherever a call ends too early, it is not read as another one; without its first mark, it is text."""
    form, call = form_of(name), ("get_weather", {"city": "Köln", "days": 3})
    whole = answer_of(name, call)
    without_end, read = re.sub(r"(\s*(<[|]\w+[|]?>|</s>))+\s*$", "", whole), 0
    for end in range(len(whole)):
        try:
            found = form.parse(whole[:end])
        except InvalidCallError:
            read += 1
        else:
            assert found in ([], made(call)), whole[:end]
            assert not found or end >= len(without_end)
    assert read > 10
    assert form.parse("It is 15 degrees, {so} [to] <say>.") == form.parse("") == []


@pytest.mark.parametrize("name", ["Gemma-3", "Phi-3", "SmolLM2"])
def test_a_template_without_calls_has_no_form(name: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue("smollm2") if name == "SmolLM2" else fetched(test_templates.MODELS[name].tokenizer)
    assert CallForm.of(ChatTemplate(test_templates.rendering(name, place).tokenizer)) is None


def test_a_form_that_is_not_known_is_none() -> None:
    """LFM2 writes calls as Python does."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (templates() / "lfm2_v2.jinja").read_text(encoding="utf-8")
    assert CallForm.of(ChatTemplate(tokenizer)) is None


def test_qwen_and_gemma_are_read_as_by_transformers() -> None:
    """Its server has its own readers of three forms."""
    specs = pytest.importorskip("transformers.cli.serving.utils")._RESPONSE_TEMPLATE_FALLBACKS
    parsing = pytest.importorskip("transformers.utils.chat_parsing")
    for name, kind, start in (
        ("Qwen3", "qwen3", "<|im_start|>assistant\n"),
        ("Qwen3.5, thinking", "qwen3_5", "<|im_start|>assistant\n<think>\n"),
        ("Gemma 4", "gemma4", "<|turn>model\n"),
    ):
        spec = next(own for kinds, own in specs.items() if kind in kinds)
        for arguments in ARGUMENTS[:2] if name in MARKED else ARGUMENTS:
            text = answer_of(name, ("get_weather", arguments), ("other", {}))
            theirs = parsing.parse_response(text, spec, prefix=start)["tool_calls"]
            assert form_of(name).parse(text) == made(
                *((one["function"]["name"], one["function"]["arguments"]) for one in theirs)
            )


OSLO = '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 1}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("answer", "error", "wrong"),
    [
        (hermes(OSLO), "", ()),
        (hermes('{"arguments": {"days": 1.0, "city": "\\u004fslo"}, "name": "get_weather"}'), "", ()),
        (f"I look it up.\n{hermes(OSLO)}", "", ()),
        (f"{hermes(OSLO)}\nDone.", "", ()),
        (f"<tool_call>{OSLO}</tool_call>", "", ()),
        ("<think>\nA <tool_call> helps.\n</think>\n\n" + hermes(OSLO), "", ()),
        ('It is {"name": "get_weather"}.', MISSING, ()),
        ("", MISSING, ()),
        (OSLO, MISSING, ()),
        (hermes(OSLO)[:-20], INVALID, ()),
        (f"<tool_call>\n{OSLO}", INVALID, ()),
        (hermes(OSLO + "}"), INVALID, ()),
        (hermes(OSLO[:-1]), INVALID, ()),
        (hermes(OSLO, "{"), INVALID, ()),
        (hermes('{"name": "get_weather"}'), INVALID, ()),
        (hermes('{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 1}"}'), INVALID, ()),
        (hermes('{"name": ["get_weather"], "arguments": {}}'), INVALID, ()),
        (hermes(OSLO.replace("1", "NaN")), INVALID, ()),
        (hermes(OSLO.replace("1", "1e9999999999999999999")), INVALID, ()),
        (hermes(OSLO.replace("1", "[" * 100_000)), INVALID, ()),
        (hermes("null"), INVALID, ()),
        (hermes(OSLO.replace("1", "9" * 5000)), ARGUMENT, ("days",)),
        (hermes(OSLO.replace("1", "1.0000000000000000000001")), ARGUMENT, ("days",)),
        (hermes(OSLO.replace("1", "true")), ARGUMENT, ("days",)),
        (hermes(OSLO.replace("1", '"1"')), ARGUMENT, ("days",)),
        (hermes(OSLO.replace("Oslo", "Rome").replace("1", "2")), ARGUMENT, ("city", "days")),
        (hermes(OSLO.replace('"days": 1', '"days": 1, "unit": null')), ARGUMENT, ("unit",)),
        (hermes('{"name": "get_weather", "arguments": {"city": "Oslo"}}'), ARGUMENT, ("days",)),
        (hermes(OSLO.replace('"Oslo"', '"Rome", "city": "Oslo"')), "", ()),
        (hermes(OSLO.replace('"Oslo"', '"Oslo", "city": "Rome"')), ARGUMENT, ("city",)),
        (hermes(OSLO.replace("get", "set")), FUNCTION, ()),
        (hermes(OSLO, OSLO), FUNCTION, ()),
        (hermes(OSLO, OSLO.replace("get", "set")), FUNCTION, ()),
    ],
)
def test_each_error_is_told(answer: str, error: str, wrong: tuple[str, ...]) -> None:
    for name in ("recipe", "Qwen3"):
        form = form_of(name)
        expected = form.parse(hermes(OSLO))
        try:
            given = form.parse(answer)
        except InvalidCallError:
            given = None
        if name == "recipe" and answer.startswith("<think>"):  # its template has no reasoning
            continue
        assert call_error(expected, given) == (error, wrong)
        assert call_error([], given) == (NEEDLESS if given is None or given else "", ())


@pytest.mark.parametrize(
    ("name", "answer", "calls"),
    [
        ("Llama-3.2", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', 1),
        ("Llama-3.2", '{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 2}}', 2),
        ("Llama-3.2", ' {"parameters": {"x": 1}, "name": "f"}\n', 1),
        ("Llama-3.2", 'I call {"name": "f", "parameters": {"x": 1}}', 0),
        ("Llama-3.2", '{"answer": 42}', 0),
        ("Llama-3.2", '{"name": "f", "parameters": {"x": 1}} is the call', None),
        ("Llama-3.2", '{"name": "f", "arguments": {"x": 1}}', None),
        ("Mistral-Nemo", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', 1),
        ("Mistral-Nemo", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}] there', None),
        ("Mistral-Nemo", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, 3]', None),
        ("Mistral-Nemo", '[{"name": "f", "arguments": {"x": 1}}]', 0),
        ("Mistral, newer", '[TOOL_CALLS]f[CALL_ID]9[ARGS]{"x": 1}[TOOL_CALLS]f[CALL_ID]8[ARGS]{"x": 2}', 2),
        ("Mistral, newer", '[TOOL_CALLS]f{"x": 1}', None),
        ("Mistral, newer", '[TOOL_CALLS]f[CALL_ID]9[ARGS]["x"]', None),
        ("Qwen3.5, thinking", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</tool_call>", None),
        ("Qwen3.5, thinking", "<tool_call><function=f><parameter=x>1</parameter></function></tool_call>", 1),
        ("Qwen3.5, thinking", "<tool_call><function=f><parameter=x></parameter></function></tool_call>", 1),
        ("Gemma 4", '<|tool_call>call:f{x:1,y:{"z":<|"|>a: {b}, None<|"|>},n:None}<tool_call|>', 1),
        ("Gemma 4", "<|tool_call>call:f{x:a}<tool_call|>", None),
        ("Gemma 4", "<|tool_call>call:f[1]<tool_call|>", None),
    ],
)
def test_forms_of_other_templates(name: str, answer: str, calls: int | None) -> None:
    try:
        found: int | None = len(form_of(name).parse(answer))
    except InvalidCallError:
        found = None
    assert found == calls


def test_calls_are_compared_in_any_order() -> None:
    one, two, other = made(("f", {"x": 1, "y": 0}), ("f", {"x": 2, "y": 0}), ("f", {"x": 3, "y": 0}))
    assert call_error([one, two], [two, one]) == ("", ())
    assert call_error([one, two], [other, one]) == (ARGUMENT, ("x",))
    assert call_error([one, one], [one]) == (FUNCTION, ())


def test_errors_are_counted_with_copies() -> None:
    with_call, without = dict.fromkeys(CALL_ERRORS[:-1], 0.0), {NEEDLESS: 0.0}
    answers: list[tuple[int, dict[str, float], tuple[str, ...]]] = [
        (3, with_call | {"tool_call": 1.0}, ()),
        (2, with_call | {"tool_call": 0.0, ARGUMENT: 1.0}, ("b", "a")),
        (1, with_call | {"tool_call": 0.0, ARGUMENT: 1.0}, ("a",)),
        (4, without | {"tool_call": 0.0, NEEDLESS: 1.0}, ()),
    ]
    errors = dict.fromkeys(CALL_ERRORS, 0) | {ARGUMENT: 3, NEEDLESS: 4}
    assert CallErrors.of(answers) == CallErrors(10, 6, 3, errors, {"a": 3, "b": 2})
    assert call_scores(ARGUMENT, is_expected=True) == answers[1][1] and call_scores("", is_expected=False) == {
        "tool_call": 1.0, NEEDLESS: 0.0,
    }  # fmt: skip


# The metric

TEMPLATES = {
    "marks": "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}",
    "special": "{% if m.tool_calls %}[TOOL_CALLS][{{ m.tool_calls[0].function | tojson }}]{% endif %}",
}
STEPS = 120
START = {"marks": "<tool_call>", "special": "[{"}
"""How the text of a call begins, which is without special tokens."""


def template(name: str) -> str:
    return (
        "{{ tools | tojson if tools }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        + TEMPLATES[name]
        + "<|end|>{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
    )


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Questions about rain, about a timer, and others that no function answers."""
    found = []
    for number in range(start, start + count):
        city, minutes = "ABC"[number // 3 % 3], number // 3 % 4
        question, name, arguments = [
            (f"{number}: rain in {city}?", "rain", {"city": city}),
            (f"{number}: wait {minutes}", "wait", {"minutes": minutes, "city": "A"}),
            (f"{number}: hello", "", {}),
        ][number % 3]
        call = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        answer = {"tool_calls": [call]} if name else {"content": "hi"}
        tools = [{"type": "function", "function": {"name": one}} for one in ("rain", "wait")]
        turns = [{"role": "user", "content": question}, {"role": "assistant", **answer}]
        found.append({"tools": tools, "messages": turns})
    return found


def knowing(tokenizer: Any, known: list[dict[str, Any]]) -> torch.nn.Module:
    """A tiny model that has learned the form of the answers, and a part of what they say."""
    model, chance = tiny_llama(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        texts = []
        for row in chance.sample(known, 8):
            call = row["messages"][1].get("tool_calls")
            turns = [row["messages"][0], {"content": "", **row["messages"][1]}]
            if call:
                function = {**call[0]["function"], "arguments": json.loads(call[0]["function"]["arguments"])}
                turns[1] = {**turns[1], "tool_calls": [{**call[0], "function": function}]}
            texts.append(tokenizer.apply_chat_template(turns, tools=row["tools"], return_dict=False))
        length = max(map(len, texts))
        ids = torch.tensor([[*one, *[256] * (length - len(one))] for one in texts])
        loss = model(ids, labels=torch.where(ids == 256, -100, ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module", params=TEMPLATES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, processes: ForkServer
) -> tuple[str, Path]:
    """How calls are marked, and the folder of an adapter of a tiny model, and of unseen rows."""
    kept = tmp_path_factory.mktemp("kept")

    def make(folder: Path) -> None:
        tokenizer = byte_tokenizer()
        special = ["[TOOL_CALLS]", "<|user|>", "<|assistant|>", "<|end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template(request.param)
        tokenizer.save_pretrained(kept / "base")
        knowing(tokenizer, rows(120)).save_pretrained(kept / "base")
        config = {
            "model": {"name_or_path": str(kept / "base"), "dtype": "float32"},
            "data": {"train": str(write_rows(kept / "rows.jsonl", rows(120)))},
            "lora": {"r": 16, "target_modules": "all-linear"},
            "training": {"max_steps": 150, "learning_rate": 2e-2, "per_device_train_batch_size": 8},
            "output_dir": str(folder / "adapter"),
        }
        write_rows(folder / "unseen.jsonl", [*rows(24, start=600), *rows(2, start=600)])
        (folder / "config.yaml").write_text(json.dumps(config))
        child = processes.start("train", folder / "config.yaml", "--allow-worse")
        assert child.wait() == 0, child.said()

    return request.param, once(tmp_path_factory, f"calls-{request.param}", make)


def told(text: str | None, kind: str) -> dict[str, Any] | None:
    """The call that an answer has; null for one that cannot be read. An independent reader."""
    body = str(text).partition(START[kind])[2]
    body = body.removesuffix("</tool_call>") if kind == "marks" else "{" + body.removesuffix("]")
    try:
        return json.loads(body)  # type: ignore[no-any-return]
    except ValueError:
        return None


def test_the_metric_is_computed(trained: tuple[str, Path], cli: Cli, tmp_path: Path) -> None:
    """Counts, shares, and the answers of each row agree with an independent reading of the written answers."""
    kind, folder = trained
    asked = ("evaluate", "--adapter", folder / "adapter", "--data", folder / "unseen.jsonl", "--metric", "tool_call")
    ran = cli(*asked, "--json", "--output", tmp_path / "rows.jsonl")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    read = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(read) == 26
    for model in ("base", "adapter"):
        counts, arguments = Counter[str](), Counter[str]()
        for row in read:
            one, said, calls = row[model], row[model]["answer"], START[kind] in row["expected"]
            if not calls:
                error = NEEDLESS if START[kind] in said else ""
            elif START[kind] not in said:
                error = MISSING
            elif (own := told(said, kind)) is None or own.keys() != {"name", "arguments"}:
                error = INVALID
            else:
                right = told(row["expected"], kind)
                assert right is not None
                error = FUNCTION if own["name"] != right["name"] else ARGUMENT if own != right else ""
                if error == ARGUMENT:
                    names = own["arguments"].keys() | right["arguments"].keys()
                    wrong = {name for name in names if own["arguments"].get(name) != right["arguments"].get(name)}
                    assert one["wrong_arguments"] == sorted(wrong)
                    arguments.update(wrong)
            counts[error] += 1
            possible = CALL_ERRORS[:-1] if calls else CALL_ERRORS[-1:]
            assert {name: one.get(name) for name in CALL_ERRORS} == {
                name: float(name == error) if name in possible else None for name in CALL_ERRORS
            }
            assert one["tool_call"] == (not error) and ("wrong_arguments" in one) == (error == ARGUMENT)
        assert found["tool_calls"][model] == {
            "rows": 26, "calls": 18, "right": counts[""], "errors": {name: counts[name] for name in CALL_ERRORS},
            "arguments": dict(arguments),
        }  # fmt: skip
        assert found[model]["tool_call"] == pytest.approx(counts[""] / 26)
        assert found[model][NEEDLESS] == pytest.approx(counts[NEEDLESS] / 8)
        assert found[model][MISSING] == pytest.approx(counts[MISSING] / 18)
    apart = found["adapter"]["tool_call"] - found["base"]["tool_call"]
    assert found["difference"]["tool_call"]["value"] == pytest.approx(apart)
    assert found["metric"] == "tool_call" and "p" in found["difference"]["tool_call"]
    shown = cli(*asked).out
    assert f"right in {found['tool_calls']['adapter']['right']} of 26" in shown
    assert "tool call " in shown and "needless call" not in shown
    assert found["tool_calls"]["adapter"]["right"] > 0
    assert sum(max(found[model][name] for model in ("base", "adapter")) > 0 for name in CALL_ERRORS) > 1


def test_each_error_can_be_required(trained: tuple[str, Path], cli: Cli) -> None:
    _, folder = trained
    asked = ("evaluate", "--adapter", folder / "adapter", "--data", folder / "unseen.jsonl", "--json")
    missing = cli(*asked, "--require", "needless_call<0.9")
    check_refused(missing, 2, (Code.USAGE_CONFLICT, "", "--require"))
    assert "--metric tool_call" in missing.err
    ran = cli(*asked, "--metric", "tool_call", "--require", "tool_call>base", "--require", "needless_call<0.9")
    assert ran.code in (0, 11)
    assert {one["text"]: one["value"] is not None for one in json.loads(ran.out)["requirements"]} == {
        "tool_call>base": True, "needless_call<0.9": True,
    }  # fmt: skip


def test_expected_calls_that_cannot_be_read_are_refused(trained: tuple[str, Path], cli: Cli, tmp_path: Path) -> None:
    kind, folder = trained
    asked = ("evaluate", "--adapter", folder / "adapter", "--metric", "tool_call", "--data")
    mark = {"marks": "<tool_call>", "special": "[TOOL_CALLS]"}[kind]
    broken = [*rows(6), *rows(2, start=6)]
    broken[4]["messages"][1] = {"role": "assistant", "content": f"{mark}rain"}
    check_refused(
        cli(*asked, write_rows(tmp_path / "broken.jsonl", broken)),
        4,
        (Code.DATA_FIELD, f"{tmp_path / 'broken.jsonl'}:5", "--metric"),
    )
