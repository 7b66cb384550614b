"""Fields → formats → examples: how every common shape of row is read, and what is refused with which code."""

import json
import pickle
from typing import Any

import pytest
from conftest import meanings

from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.formats import (
    Conversation,
    Example,
    Ids,
    Plain,
    PreferencePair,
    RowError,
    UnpairedPreference,
    check_ids,
    drop_reason,
    no_loss_reason,
)
from loratune.data.formats.questions import parse_question
from loratune.data.formats.recognition import CHAT_FORMATS, FORMATS, Parser
from loratune.data.row_keys import completion_key, content_key, prompt_key
from loratune.data.sources.rows import Row
from loratune.errors import DataError, Problem

PAIR = {"prompt": "a", "completion": "b"}
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}
SYSTEM = {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


ANY = DataSection.model_validate({"train": "f"})


def parser(first: dict[str, Any], **section: Any) -> Parser:
    return Parser(Row("f:1", first), DataSection.model_validate({"train": "f"} | section))


def parse(values: dict[str, Any], **section: Any) -> Example:
    return parser(values, **section)(Row("f:1", values))


def chat(values: dict[str, Any], **section: Any) -> Conversation:
    example = parse(values, **section)
    assert isinstance(example, Conversation)
    return example


def conversation(*messages: dict[str, Any], **row: Any) -> Conversation:
    return chat({"messages": list(messages)} | row)


def refused(values: dict[str, Any], **section: Any) -> list[Problem]:
    """The problems of a file that starts with this row."""
    with pytest.raises(DataError) as caught:
        parser(values, **section)
    return list(caught.value.problems)


def row_error(values: dict[str, Any], first: dict[str, Any] | None = None, **section: Any) -> RowError:
    """The error of this row in a file that starts with another row, or with the row itself."""
    parse_row = parser(first or values, **section)
    with pytest.raises(RowError) as caught:
        parse_row(Row("f:2", values))
    problem = caught.value.at("f:2")
    assert (problem.code, problem.where, problem.key) == (Code.DATA_FIELD, "f:2", "") and problem.fix
    return caught.value


def check_row_error(error: RowError, *details: str) -> None:
    """Check that the message names the place within the row, the fields and the values."""
    for detail in details:
        assert detail in str(error)


READ = {
    "ids": ({"input_ids": [3, 0, 5]}, "input_ids", Ids("f:1", (3, 0, 5))),
    "labels": (
        {"input_ids": [3, 0, 5], "labels": [-100, 0, -100]},
        "input_ids",
        Ids("f:1", (3, 0, 5), (-100, 0, -100)),
    ),
    "null labels": ({"input_ids": [3], "labels": None, "attention_mask": [1]}, "input_ids", Ids("f:1", (3,))),
    "strings": (PAIR | {"id": 7}, "prompt_completion", Plain("f:1", "a", "b")),
    "lists": ({"prompt": [USER], "completion": [BOT]}, "messages", Conversation("f:1", (USER, BOT), 1)),
    "lists in cells of CSV": (
        {"prompt": json.dumps([USER]), "completion": json.dumps([BOT])},
        "messages",
        Conversation("f:1", (USER, BOT), 1),
    ),
    "text in brackets": (
        {"prompt": "[INST] a", "completion": "[1]"},
        "prompt_completion",
        Plain("f:1", "[INST] a", "[1]"),
    ),
    "messages": ({"messages": [USER, BOT]}, "messages", Conversation("f:1", (USER, BOT))),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, "conversations", Conversation("f:1", (USER, BOT))),
    "alpaca": ({"instruction": "a", "output": "b"}, "alpaca", Conversation("f:1", (USER, BOT), 1)),
    "text": ({"text": "a", "label": "x"}, "text", Plain("f:1", "", "a", whole=True)),
    "NUL": ({"text": "a\0"}, "text", Plain("f:1", "", "a\0", whole=True)),
}


@pytest.mark.parametrize(("values", "name", "expected"), READ.values(), ids=READ)
def test_every_format_is_detected_and_can_be_set(values: dict[str, Any], name: str, expected: Example) -> None:
    copy = pickle.loads(pickle.dumps(parser(values)))
    assert (copy.format_name, copy(Row("f:1", values))) == (name, expected)
    assert parse(values, format=name) == expected
    assert (copy.format_name in CHAT_FORMATS) == isinstance(expected, Conversation)


def test_message_lists_are_read_under_both_field_names() -> None:
    lists = {"prompt": [USER], "completion": [BOT]}
    assert [parser(lists, format=name).format_name for name in ("messages", "prompt_completion")] == ["messages"] * 2
    assert parse(lists, format="prompt_completion") == parse(lists)


BAD_ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({"prompt": "a", "n": 1}, ["no field `completion`", "prompt_completion", "fields are `n`, `prompt`"]),
    "null": ({"prompt": None, "completion": "b"}, ["`prompt`", "got null"]),
    "number": ({"prompt": "a", "completion": 3}, ["`completion`", "got a number"]),
    "bool": ({"prompt": "a", "completion": True}, ["`completion`", "got true or false"]),
    "list": ({"prompt": "a", "completion": ["b"]}, ["`completion`", "got a list"]),
    "object": ({"prompt": {}, "completion": "b"}, ["`prompt`", "got an object"]),
    "surrogate": ({"prompt": "a\ud800", "completion": "b"}, ["`prompt`"]),
}


BAD_IDS: dict[str, tuple[Any, Any, list[str]]] = {
    "text": ("1 2", None, ["`input_ids`", "list of whole numbers", "got text"]),
    "empty": ([], None, ["`input_ids`", "list of whole numbers", "got an empty list"]),
    "negative": ([1, -1], None, ["entry 2 of `input_ids` is -1"]),
    "bool": ([1, True], None, ["entry 2 of `input_ids`", "got true or false"]),
    "float": ([1, 2.0], None, ["entry 2 of `input_ids`", "got the number 2.0"]),
    "null": ([None, 1], None, ["entry 1 of `input_ids`", "got null"]),
    "batch": ([[1, 2]], None, ["entry 1 of `input_ids`", "got a list"]),
    "short": ([1, 2, 3], [2, 3], ["`labels` has 2", "`input_ids` has 3"]),
    "no labels": ([1, 2], [-100, -100], ["all `labels` are -100"]),
    "float label": ([1, 2], [1, 2.0], ["entry 2 of `labels`", "whole number"]),
    "shifted": ([1, 2, 3], [2, 3, -100], ["entry 1 of `labels` is 2", "`input_ids` is 1"]),
}


FURTHER_BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [USER], "completion": [USER]}, "no assistant message"),
    ({"prompt": [USER, BOT], "completion": [USER]}, "no assistant message"),
    ({"prompt": [USER], "completion": "b"}, "`completion` must be a list of messages, got text"),
    ({"messages": [USER, BOT], "functions": [{"name": "f"}]}, "`functions`"),
    ({"messages": [SYSTEM, USER, BOT], "system": "t"}, "`system`"),
    ({"messages": [USER, BOT], "system": 3}, "`system` must be text, got a number"),
    ({"messages": [BOT], "label": True}, "no message comes before"),
    ({"messages": [USER, BOT, USER], "label": True}, "`label` is about no answer"),
    ({"messages": [USER, BOT | {"weight": 0}], "kto_tag": True}, "compared whole"),
    ({"prompt": "a", "chosen": [SYSTEM, OTHER], "rejected": [OTHER]}, "not `prompt`"),
    ({"chosen": [BOT], "rejected": [OTHER]}, "no message comes before"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BOT]}, "no assistant message"),
    ({"chosen": [USER, BOT], "rejected": "c"}, "must be a list of messages"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "must be text"),
    ({"messages": [USER, BOT], "chosen": "b", "rejected": "c"}, "ends with an answer"),
    ({"instruction": 3, "chosen": "b", "rejected": "c"}, "`instruction` must be text"),
    (
        {"prompt": '[{"role": "user", "content": "\\ud800"}]', "chosen": "b", "rejected": "c"},
        "`content` of message 1 of `prompt` holds a lone surrogate",
    ),
    (
        {"prompt": [USER], "chosen": [BOT | {"weight": 0}], "rejected": [OTHER]},
        "compared whole",
    ),
    *(
        ({"messages": [USER, BOT], "tools": tools}, detail)
        for tools, detail in [
            ("{", "`tools` must be valid JSON"),
            ("[" * 100_000, "`tools` must be valid JSON"),
            ({"name": "f"}, "`tools` must be a list of JSON schemas, got an object"),
            ([3], "entry 1 of `tools` must be a JSON schema, got a number"),
            (["x"], "entry 1 of `tools` must be valid JSON"),
            ([{"name": "\ud800"}], "`tools`"),
            ([{"name": b"f"}], "`tools` cannot be written as JSON"),
        ]
    ),
    *(
        ({"instruction": "a", "output": "b"} | fields, detail)
        for fields, detail in [
            ({"instruction": None}, "`instruction` must be text, got null"),
            ({"output": 3}, "`output` must be text, got a number"),
            ({"input": ["i"]}, "`input` must be text, got a list"),
            ({"history": "q"}, "`history` must be a list of pairs of question and answer, got text"),
            ({"history": [["q"]]}, "entry 1 of `history` must be a pair of question and answer"),
            ({"history": [["q", None]]}, "`answer` of entry 1 of `history` must be text, got null"),
        ]
    ),
]


@pytest.mark.parametrize(("values", "detail"), FURTHER_BAD)
def test_invalid_plain_rows_are_refused(values: dict[str, Any], detail: str) -> None:
    check_row_error(row_error(values), detail)


def test_an_attention_mask_with_padding_is_refused() -> None:
    for mask in ([1, 0], [1], [1, 1, 1], 1):
        error = row_error({"input_ids": [1, 0], "attention_mask": mask})
        check_row_error(error, "`attention_mask` is not a list with 1 for every token")


def test_ids_outside_the_vocabulary_are_refused() -> None:
    assert check_ids(Ids("f:1", (0, 263)), 264) is None
    problem = check_ids(Ids("f:1", (0, 264)), 264)
    assert problem is not None and (problem.code, problem.where) == (Code.DATA_FIELD, "f:1")
    assert "entry 2 of `input_ids` is 264" in problem.what and "the vocabulary has 264 tokens" in problem.what


FIRST, SECOND = "message 1 of `messages`", "message 2 of `messages`"
BAD_CHATS: dict[str, tuple[Any, list[str]]] = {
    "role": ([USER, BOT | {"role": "robot"}], [f"{SECOND} has the role 'robot', not one of system, "]),
    "no role": ([{"content": "a"}], [f"{FIRST} has the role None"]),
    "odd role": ([BOT | {"role": ["user"]}], [f"{FIRST} has the role ['user']"]),
    "no content": ([USER, {"role": "assistant"}], [f"`content` of {SECOND}", "got null"]),
    "no calls": ([USER, {"role": "assistant", "tool_calls": []}], [f"`content` of {SECOND}"]),
    "no parts": ([USER | {"content": []}], [f"`content` of {FIRST}", "got an empty list"]),
    "part without text": ([USER | {"content": [{"type": "text"}]}], [f"`text` of a part of {FIRST}"]),
    "image": ([USER | {"content": [{"type": "image_url"}]}], [f"{FIRST} has a part of the type 'image_url'"]),
    "string part": ([USER | {"content": ["a"]}], [f"{FIRST} has a part that is text"]),
    "text": ("hello", ["`messages` must be a list of messages, got text"]),
    "null": (None, ["`messages` must be a list of messages, got null"]),
    "empty": ([], ["`messages` must be a list of messages, got an empty list"]),
    "strings": (["a"], [f"{FIRST} must be an object"]),
    "unknown": ([USER, BOT | {"function_call": {}}], [f"{SECOND} has `function_call`"]),
    "unanswered": ([USER], []),
    "surrogate": ([USER | {"name": "\udc00"}], [f"`name` of {FIRST}"]),
    "weight": ([USER, BOT | {"weight": 0.5}], [f"{SECOND} has the weight 0.5", "0 or 1"]),
    "user's weight": ([USER | {"weight": 1}, BOT], [f"{FIRST} has the weight 1", "assistant"]),
    "user's call": ([USER | {"tool_calls": [CALL]}], [f"{FIRST} has `tool_calls`", "assistant"]),
}


def test_functions_are_read_as_tools_with_data_columns() -> None:
    """As the message about them suggests."""
    row = {"messages": [USER, BOT], "functions": [WEATHER["function"]]}
    assert "{tools: functions}" in row_error(row).fix
    assert chat(row, columns={"tools": "functions"}).tools == (WEATHER,)


def test_a_message_is_passed_to_the_template_unchanged() -> None:
    """Fields that are null are removed; everything else is passed on."""
    user = USER | {"role": "developer", "name": "Ann", "tool_calls": None, "weight": None}
    bot = BOT | {"reasoning_content": "r", "thinking": "r", "tool_calls": []}
    tool = {"role": "tool", "content": "18", "tool_call_id": "c1", "name": "weather"}
    example = conversation(user, tool, bot)
    assert example.messages == (
        {"role": "developer", "content": "a", "name": "Ann"},
        tool,
        BOT | {"reasoning_content": "r", "thinking": "r"},
    )


def test_parts_of_text_are_joined_unchanged() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    assert conversation(USER | {"content": parts}, BOT).messages[0] == {"role": "user", "content": "a b"}


def test_weight_selects_the_supervised_turns() -> None:
    turns = [USER, BOT | {"weight": 0}, USER | {"weight": 0}, BOT | {"weight": 1}, USER, BOT | {"weight": None}]
    example = conversation(*turns)
    assert (example.messages, example.zero_weight) == ((USER, BOT) * 3, {1})
    assert example.supervised_turns("completion") == example.supervised_turns("assistant") == (3, 5)
    assert no_loss_reason(conversation(USER, BOT | {"weight": 0}), "completion") == "no assistant turn has weight"


def test_a_weight_of_zero_contradicts_a_loss_on_all() -> None:
    error = row_error({"messages": [USER, BOT | {"weight": 0}]}, {"messages": [USER, BOT]}, loss_on="all")
    check_row_error(error, "data.loss_on: all")


def test_loss_on_assistant_includes_turns_of_the_prompt() -> None:
    example = chat({"prompt": [USER, BOT, USER], "completion": [BOT]})
    assert (example.supervised_turns("completion"), example.supervised_turns("assistant")) == ((3,), (1, 3))


CALLED = {
    "openai": {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    "object": CALL | {"index": 0, "extra": None},
    "bare": {"id": "c1", "name": "weather", "arguments": {"city": "Rome"}},
}


@pytest.mark.parametrize("call", CALLED.values(), ids=CALLED)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_tool_calls_are_normalized(call: dict[str, Any], content: dict[str, Any]) -> None:
    example = conversation(USER, {"role": "assistant", "tool_calls": [call]} | content)
    assert example.messages[1] == CALLS
    assert no_loss_reason(example, "completion") is None


def test_tool_calls_may_accompany_text_and_lack_arguments() -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ("", None, "{}", {})]
    message = conversation(USER, BOT | {"tool_calls": calls}).messages[1]
    assert message["content"] == "b"
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}] * 4


PLACE = "of message 2 of `messages`"
BAD_CALLS: dict[str, tuple[Any, list[str]]] = {
    "text": ("f()", [f"`tool_calls` {PLACE} must be a list, got text"]),
    "number": ([3], [f"tool call 1 {PLACE}", "got a number"]),
    "nameless": ([CALL, {"arguments": {}}], [f"`name` of tool call 2 {PLACE}", "got null"]),
    "empty name": ([{"name": ""}], [f"tool call 1 {PLACE} names no function"]),
    "cut off": ([{"name": "f", "arguments": '{"a"'}], [f"`arguments` of tool call 1 {PLACE}"]),
    "a list": ([{"name": "f", "arguments": "[1]"}], [f"`arguments` of tool call 1 {PLACE}", "an object"]),
    "empty list": ([{"name": "f", "arguments": []}], [f"`arguments` of tool call 1 {PLACE}", "an object"]),
    "parameters": ([{"name": "f", "parameters": {}}], [f"tool call 1 {PLACE} has `parameters`"]),
    "surrogate": ([{"name": "f", "arguments": {"a": "\ud800"}}], [f"`arguments` of tool call 1 {PLACE}"]),
}


TALK = {"messages": [USER, BOT]}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any] | None, list[str]]] = {
    **{f"row, {name}": (row, PAIR, details) for name, (row, details) in BAD_ROWS.items()},
    **{f"ids, {name}": ({"input_ids": ids, "labels": to}, None, what) for name, (ids, to, what) in BAD_IDS.items()},
    **{f"chat, {name}": ({"messages": turns}, TALK, details) for name, (turns, details) in BAD_CHATS.items()},
    **{f"call, {name}": ({"messages": [USER, CALLS | {"tool_calls": calls}]}, None, details)
       for name, (calls, details) in BAD_CALLS.items()},
}  # fmt: skip


@pytest.mark.parametrize(("values", "first", "details"), BAD.values(), ids=BAD)
def test_invalid_conversations_are_refused(
    values: dict[str, Any], first: dict[str, Any] | None, details: list[str]
) -> None:
    check_row_error(row_error(values, first), *details)


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER],
        json.dumps([WEATHER]),
        [json.dumps(WEATHER)],
        [WEATHER["function"]],
        [WEATHER | {"extra": None}],
        json.dumps([WEATHER["function"]]),
    ],
)
def test_tools_are_normalized(tools: Any) -> None:
    lists = {"prompt": [USER], "completion": [BOT]}
    rows = ({"messages": [USER, BOT]}, lists, {"conversations": [HUMAN, GPT]}, {"instruction": "a", "output": "b"})
    assert [chat(row | {"tools": tools}).tools for row in rows] == [(WEATHER,)] * 4


def test_nulls_of_a_table_are_removed_from_tools_but_meaningful_ones_kept() -> None:
    columns = {"x": {"type": "string", "enum": ["a", None], "default": None}, "y": None}
    tool = {"name": "f", "description": None, "parameters": {"properties": columns}}
    (schema,) = conversation(USER, BOT, tools=[tool]).tools
    assert schema["function"] == {
        "name": "f",
        "parameters": {"properties": {"x": {"type": "string", "enum": ["a", None], "default": None}}},
    }


@pytest.mark.parametrize("none", [None, [], "", "[]", "null"])
def test_empty_tools_mean_no_tools(none: Any) -> None:
    assert conversation(USER, BOT, tools=none).tools == ()


@pytest.mark.parametrize("row", [{"messages": [USER, BOT]}, {"conversations": [HUMAN, GPT]}])
def test_the_system_field_becomes_the_first_message(row: dict[str, Any]) -> None:
    assert chat(row | {"system": "s"}).messages == (SYSTEM, USER, BOT)
    assert chat(row | {"system": ""}).messages == chat(row | {"system": None}).messages == (USER, BOT)
    assert conversation(SYSTEM, USER, BOT, system="s").messages == (SYSTEM, USER, BOT)


SPEAKERS = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "model", "bot"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "observation"),
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in SPEAKERS.items() for name in names])
@pytest.mark.parametrize("fields", [("from", "value"), ("role", "content")])
def test_sharegpt_speakers_map_to_roles(role: str, name: str, fields: tuple[str, str]) -> None:
    turn = dict(zip(fields, (name, "x"), strict=True)) | {"weight": None}
    assert chat({"conversations": [turn, GPT]}).messages == ({"role": role, "content": "x"}, BOT)


def test_sharegpt_function_calls() -> None:
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'}
    seen = {"from": "observation", "value": "18"}
    example = chat({"conversations": [HUMAN, call, seen, GPT | {"weight": 0}]})
    expected = {"type": "function", "function": CALL["function"]}
    assert example.messages[1:3] == (CALLS | {"tool_calls": [expected]}, {"role": "tool", "content": "18"})
    assert example.supervised_turns("completion") == (1,)
    both = chat({"conversations": [HUMAN, call | {"value": f"[{call['value']}, {call['value']}]"}]})
    assert both.messages[1]["tool_calls"] == [expected] * 2


@pytest.mark.parametrize(
    ("turn", "details"),
    [
        ({"from": "robot", "value": "b"}, ["message 2 of", "has the role 'robot', not one of system, "]),
        ({"from": "gpt", "value": None}, ["`value` of message 2 of", "got null"]),
        ({"from": "gpt", "value": "b", "content": "c"}, ["message 2", "`from`", "`content`"]),
        ({"from": "gpt", "value": "b", "image": "x"}, ["message 2 of", "`image`"]),
        ({"from": "function_call", "value": "f()"}, ["the function call of message 2 of"]),
        ({"from": "function_call", "value": "3"}, ["the function call of message 2 of"]),
        ({"from": "function_call", "value": '{"name": "f"}'}, ["the function call of message 2 of"]),
        ("b", ["message 2 of", "must be an object"]),
    ],
)
def test_invalid_sharegpt_turns_are_refused(turn: Any, details: list[str]) -> None:
    check_row_error(row_error({"conversations": [HUMAN, turn]}), "`conversations`", *details)


def test_alpaca_with_all_fields() -> None:
    row = {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["q", "w"], ("e", "")]}
    example = chat(row)
    texts = [(message["role"], message["content"]) for message in example.messages]
    assert texts == [
        ("system", "s"), ("user", "q"), ("assistant", "w"), ("user", "e"), ("assistant", ""), ("user", "a\ni"),
        ("assistant", "b"),
    ]  # fmt: skip
    assert (example.supervised_turns("completion"), example.supervised_turns("assistant")) == ((6,), (2, 6))
    assert example.selected_turns("assistant") == (2, 4, 6)  # the empty turn in between


@pytest.mark.parametrize("blank", [{}, {"input": ""}, {"input": None, "system": None, "history": None}])
def test_alpaca_without_optional_fields(blank: dict[str, Any]) -> None:
    assert chat({"instruction": "a", "output": "b"} | blank).messages == (USER, BOT)


def test_keys_that_match_no_format_are_refused() -> None:
    (problem,) = refused({"question": "a", "answer": "b"})
    assert (problem.code, problem.where, problem.key) == (Code.DATA_FORMAT, "f:1", "")
    assert "`answer`, `question`" in problem.what
    assert "data.format" in problem.fix and "data.columns" in problem.fix
    assert all(form.name in problem.fix for form in FORMATS)


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ({"text": "c"}, "prompt_completion, text"),
        ({"input_ids": [1], "labels": [1]}, "input_ids, prompt_completion"),
        ({"instruction": "a", "output": "b"}, "prompt_completion, alpaca"),
        ({"messages": [], "conversations": []}, "prompt_completion, messages, conversations"),
    ],
)
def test_ambiguous_keys_are_refused_unless_the_format_is_set(others: dict[str, Any], names: str) -> None:
    keys = ", ".join(f"`{key}`" for key in sorted(PAIR | others))
    (problem,) = refused(PAIR | others)
    assert (problem.code, problem.where, problem.key) == (Code.DATA_FORMAT, "f:1", "data.format")
    assert keys in problem.what and problem.fix == f"set data.format to one of {names}"
    assert parse(PAIR | others, format="prompt_completion") == Plain("f:1", "a", "b")


CHAT_PAIR = PreferencePair("f:1", Conversation("f:1", (USER, BOT), 1), Conversation("f:1", (USER, OTHER), 1))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}, {}),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, {}),
        ({"prompt": json.dumps([USER]), "chosen": json.dumps([BOT]), "rejected": "c"}, {}),  # as in cells of CSV
        ({"prompt": [USER], "chosen": BOT, "rejected": OTHER}, {}),
        ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, {}),
        ({"prompt": "a", "chosen": [USER, BOT], "rejected": [USER, OTHER], "messages": [USER, BOT], "score": 1.0}, {}),
        ({"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]}, {}),
        (
            {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "c"}},
            {"prompt": "conversations"},
        ),
        ({"question": "a", "good": [BOT], "bad": [OTHER]}, {"prompt": "question", "chosen": "good", "rejected": "bad"}),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "c"}}, {}),
        ({"conversations": [HUMAN], "chosen": "b", "rejected": "c"}, {}),
        ({"messages": [USER], "chosen": [BOT], "rejected": [OTHER]}, {}),
        ({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, {}),
        ({"instruction": "a", "prompt": None, "chosen": [BOT], "rejected": OTHER}, {}),
        ({"question": "a", "chosen": "b", "rejected": "c"}, {"instruction": "question"}),
        ({"instruction": "x", "chosen": [USER, BOT], "rejected": [USER, OTHER], "conversations": [HUMAN]}, {}),
    ],
)
def test_pairs_of_messages_in_all_shapes(row: dict[str, Any], columns: dict[str, str]) -> None:
    found = parser(row, columns=columns)
    assert found(Row("f:1", row)) == CHAT_PAIR and found.format_name == "preference_messages"


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "a ", ("b", "c")),
        ({"chosen": "It is red", "rejected": "It is rust"}, "It is", (" red", " rust")),
        ({"chosen": "red", "rejected": "rust"}, "", ("red", "rust")),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: we can", "rejected": "\n\nHuman: q\n\nAssistant: we cannot"},
            "\n\nHuman: q\n\nAssistant:", (" we can", " we cannot"),
        ),
    ],
)  # fmt: skip
def test_pairs_of_texts(row: dict[str, Any], prompt: str, answers: tuple[str, str]) -> None:
    """Without a prompt, the prompt is the shared prefix, up to a whole word; in HH-RLHF's dialogues, up to the last
    answer."""
    assert parse(row) == PreferencePair("f:1", *(Plain("f:1", prompt, answer) for answer in answers))


@pytest.mark.parametrize("answer", ["[1] says so", "[]", "[1, 2]", '[{"name": "x"}]', "[", "[" * 9999])
def test_an_answer_in_brackets_is_text(answer: str) -> None:
    """An answer does not have to be a list of messages where the prompt is one."""
    pair = parse({"prompt": [USER], "chosen": answer, "rejected": "c"})
    assert isinstance(pair, PreferencePair) and isinstance(pair.chosen, Conversation)
    assert pair.chosen.messages[-1]["content"] == answer
    assert parse({"prompt": "a", "chosen": answer, "rejected": "c"}) == PreferencePair(
        "f:1", Plain("f:1", "a", answer), Plain("f:1", "a", "c")
    )


def test_a_pair_with_an_alpaca_instruction() -> None:
    """As in LLaMA-Factory: system message, earlier turns, and the input below the instruction."""
    fields = {"system": "s", "history": [["u", "v"]], "instruction": "a", "input": "i", "chosen": "b", "rejected": "c"}
    pair = parse(fields)
    assert isinstance(pair, PreferencePair) and isinstance(pair.chosen, Conversation)
    contents = [(message["role"], message["content"]) for message in pair.chosen.messages]
    assert contents == [("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "a\ni"), ("assistant", "b")]
    assert pair.chosen.first_supervised == 4


@pytest.mark.parametrize("name", ["question", "Input", "query"])
def test_a_pair_whose_prompt_would_be_ignored_is_refused(name: str) -> None:
    """Two answers without their prompt are not accepted as a pair, unless they contain it, or the format is set."""
    row = {name: "Why?", "chosen": "b", "rejected": "c"}
    (problem,) = refused(row)
    assert (problem.code, problem.where, problem.key) == (Code.DATA_FORMAT, "f:1", "data.columns")
    assert f"`{name}` is not read" in problem.what and f"{{instruction: {name}}}" in problem.fix
    assert parse(row, format="preference") == PreferencePair("f:1", Plain("f:1", "", "b"), Plain("f:1", "", "c"))
    whole = {name: "Why?", "chosen": "Why? b", "rejected": "Why? c"}
    assert parse(whole) == PreferencePair("f:1", Plain("f:1", "Why?", " b"), Plain("f:1", "Why?", " c"))
    dialogue = {name: "x", "chosen": "\n\nHuman: q\n\nAssistant: b", "rejected": "\n\nHuman: q\n\nAssistant: c"}
    assert isinstance(parse(dialogue), PreferencePair)


def test_a_pair_with_an_implicit_prompt_of_several_turns_and_tools() -> None:
    turns = [SYSTEM, USER, BOT, USER]
    pair = parse({"chosen": [*turns, BOT], "rejected": [*turns, OTHER], "tools": [WEATHER]})
    assert isinstance(pair, PreferencePair) and isinstance(pair.rejected, Conversation)
    assert pair.rejected.first_supervised == 4 and pair.rejected.tools == (WEATHER,)


@pytest.mark.parametrize(
    ("label", "desirable"), [(True, True), (False, False), (1, True), (0.0, False), ("True", True), ("0", False)]
)
def test_unpaired_preferences(label: Any, desirable: bool) -> None:
    section = {"format": "unpaired_preference"}
    assert parse(PAIR | {"label": label}, **section) == UnpairedPreference("f:1", Plain("f:1", "a", "b"), desirable)
    chats = parse({"prompt": [USER], "completion": [BOT], "label": label}, **section)
    assert chats == UnpairedPreference("f:1", Conversation("f:1", (USER, BOT), 1), desirable)


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [SYSTEM, USER, BOT]}, (SYSTEM, USER, BOT)),
        ({"messages": [USER, BOT, USER, OTHER], "system": "s"}, (SYSTEM, USER, BOT, USER, OTHER)),
        ({"conversations": [HUMAN, GPT]}, (USER, BOT)),
        ({"instruction": "a", "input": "", "output": "b"}, (USER, BOT)),
    ],
)
def test_a_label_beside_conversation_turns(label: str, row: dict[str, Any], messages: tuple[Any, ...]) -> None:
    """As in LLaMA-Factory's rows, the label refers to the last turn."""
    first = len(messages) - 1
    assert parse(row | {label: False}) == UnpairedPreference(
        "f:1", Conversation("f:1", messages, first), desirable=False
    )
    plain = "alpaca" if "output" in row else next(iter(row))
    assert isinstance(parse(row | {label: True}, format=plain), Conversation)


def test_labels_that_do_not_mark_preferences_are_ignored() -> None:
    assert parse(PAIR | {"label": "pos"}) == parse(PAIR | {"label": 1}) == Plain("f:1", "a", "b")
    assert isinstance(parse(PAIR | {"label": False}), UnpairedPreference)
    assert parse(PAIR | {"label": True}, format="prompt_completion") == Plain("f:1", "a", "b")
    check_row_error(row_error(PAIR | {"label": "x"}, PAIR | {"label": True}), "`label` must be true or false")


def test_a_pair_in_a_file_of_another_format_is_refused() -> None:
    error = row_error(PAIR | {"chosen": "b", "rejected": "c"}, PAIR)
    check_row_error(error, "a pair of answers, in a file of the format prompt_completion")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("b", "c", None),
        ("bc", "b", None),
        (" ", "c", "the chosen answer is empty"),
        ("b", "", "the rejected answer is empty"),
        ("b", "b", "the chosen and the rejected answer are the same"),
        ("b", "bc", "the rejected answer begins with the chosen one"),
    ],
)
def test_pairs_with_empty_or_contained_answers_are_dropped(chosen: str, rejected: str, reason: str | None) -> None:
    texts = parse({"prompt": "a", "chosen": chosen, "rejected": rejected})
    chats = parse({"prompt": [USER], "chosen": chosen, "rejected": rejected})
    assert isinstance(texts, PreferencePair) and isinstance(chats, PreferencePair)
    assert drop_reason(texts, "completion") == drop_reason(chats, "completion") == reason


def test_content_keys_of_pairs() -> None:
    """The same answers in reverse order have another content key, and the same prompt key."""
    one, other = (parse({"prompt": "a", "chosen": first, "rejected": last}) for first, last in ("bc", "cb"))
    assert content_key(one) != content_key(other) and completion_key(one, "all") != completion_key(other, "all")
    assert prompt_key(one, "all") == prompt_key(other, "all") == prompt_key(parse(PAIR), "completion")
    good, bad = (parse(PAIR | {"label": label}) for label in (True, False))
    assert content_key(good) != content_key(bad) and prompt_key(good, "all") == prompt_key(one, "all")


@pytest.mark.parametrize("others", [{}, {"prompt": "x"}, {"completion": "y"}])
def test_mapped_columns_win_over_standard_names(others: dict[str, str]) -> None:
    """A mapped field wins over one that happens to have the standard name, in either order."""
    row = {"question": "a", "answer": "b"}
    straight, crossed = {"prompt": "question", "completion": "answer"}, {"completion": "question", "prompt": "answer"}
    for values in (row | others, others | row):
        assert parse(values, columns=straight) == Plain("f:1", "a", "b")
        assert parse(values, columns=crossed) == Plain("f:1", "b", "a")


def test_a_mapped_field_is_not_read_under_its_own_name() -> None:
    assert parse({"text": "a", "completion": "b"}, columns={"prompt": "text"}) == Plain("f:1", "a", "b")
    columns = {"completion": "prompt", "prompt": "completion"}
    assert parse(PAIR, columns=columns) == Plain("f:1", "b", "a")


def test_a_later_row_without_a_mapped_field_is_refused() -> None:
    first = {"question": "a", "completion": "b"}
    error = row_error(PAIR, first, columns={"prompt": "question"})
    details = ("no field `question`", "prompt_completion", "fields are `completion`, `prompt`")
    check_row_error(error, *details)


def test_mapping_a_missing_field_is_refused() -> None:
    (problem,) = refused(PAIR, columns={"prompt": "question"})
    assert (problem.code, problem.where, problem.key) == (Code.DATA_FORMAT, "f:1", "data.columns")
    assert problem.what == "no field `question`; the fields are `completion`, `prompt`"
    assert "all files of train and validation" in problem.fix
    (problem,) = refused({"instruction": "a", "output": "b"}, columns={"input": "context"})
    assert (problem.code, problem.key) == (Code.DATA_FORMAT, "data.columns")
    assert problem.what == "no field `context`; the fields are `instruction`, `output`"
    assert "first row too, as null" in problem.fix
    row = {"instruction": "a", "output": "b", "context": None}
    assert chat(row, columns={"input": "context"}).messages == (USER, BOT)


def test_settings_that_do_not_apply_to_the_rows_are_refused() -> None:
    problems = refused(PAIR | {"s": "x"}, columns={"system": "s"}, chat_template="t.jinja", loss_on="assistant")
    assert [(problem.code, problem.where, problem.key) for problem in problems] == [
        (Code.DATA_FORMAT, "f:1", "data.columns"),
        (Code.DATA_FORMAT, "f:1", "data.chat_template"),
        (Code.DATA_FORMAT, "f:1", "data.loss_on"),
    ]
    assert "`system`" in problems[0].what and "has prompt, completion" in problems[0].what
    assert all("prompt_completion" in problem.what for problem in problems)
    assert "completion or all" in problems[2].fix


@pytest.mark.parametrize("row", [{"text": "a"}, {"input_ids": [1, 2]}, {"instruction": "a", "output": "b"}])
def test_loss_on_assistant_and_templates_require_conversations(row: dict[str, Any]) -> None:
    for section in ({"loss_on": "assistant"}, {"chat_template": "t.jinja"}):
        if "output" in row:
            assert parser(row, **section).format_name == "alpaca"
        else:
            assert [problem.code for problem in refused(row, **section)] == [Code.DATA_FORMAT]


def test_labels_replace_whole_answers() -> None:
    """White space around them stays, unless an entry has it; earlier answers of a conversation are no labels."""
    labels = {"b": "B", "b c": "c", "d ": "d"}
    for answer, expected in {
        "d ": "d",
        "d": "d",
        "b": "B",
        " b\n": " B\n",
        "b c": "c",
        "bb": "bb",
        "B": "B",
        "": "",
    }.items():
        assert parse(PAIR | {"completion": answer}, labels=labels) == Plain("f:1", "a", expected)
        found = chat({"messages": [USER, BOT, USER, BOT | {"content": answer}]}, labels=labels).messages
        assert [message["content"] for message in found] == ["a", "b", "a", expected]
        assert chat({"instruction": "a", "output": answer}, labels=labels).messages[-1]["content"] == expected
    assert chat({"messages": [BOT, USER]}, labels=labels).messages == (BOT | {"content": "B"}, USER)
    assert chat({"messages": [USER, CALLS]}, labels=labels).messages == (USER, CALLS)


def test_labels_without_effect_are_named() -> None:
    read = parser(PAIR, labels={"b": "B", "x": "y"})
    read(Row("f:1", PAIR))
    assert read.unseen_labels == {"x"}
    assert parser(PAIR, labels={"a": "b, c"}).identity != parser(PAIR, labels={"a, b": "c"}).identity
    assert parser(PAIR, labels={"a": "b → c"}).identity != parser(PAIR, labels={"a → b": "c"}).identity
    assert read.identity != parser(PAIR).identity != parser(PAIR, labels={"b": "c"}).identity
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for row in ({"text": "a"}, {"input_ids": [1, 2]}, pair, pair | {"chosen": [BOT], "rejected": [OTHER]}):
        (problem,) = refused(row, labels={"b": "c"})
        assert (problem.code, problem.key) == (Code.DATA_FORMAT, "data.labels")


def test_unused_fields_are_reported() -> None:
    assert unused_fields(PAIR, PAIR | {"id": 1}, PAIR | {"system": "s"}) == {"id", "system"}
    assert unused_fields({"q": "a", "completion": "b", "prompt": "x"}, columns={"prompt": "q"}) == set()
    assert unused_fields({"messages": [USER, BOT], "tools": None, "id": 1}) == {"id"}


def unused_fields(*rows: dict[str, Any], **section: Any) -> set[str]:
    """The unused fields, after all rows were parsed."""
    parse_row = parser(rows[0], **section)
    for number, values in enumerate(rows, start=1):
        parse_row(Row(f"f:{number}", values))
    return parse_row.unused_fields


NO_LOSS = {
    "plain": (Plain("", "a", ""), "completion", "the completion is empty"),
    "plain, blank": (Plain("", "a", " \n"), "completion", "the completion is empty"),
    "plain, all": (Plain("", "a", ""), "all", None),
    "plain, nothing": (Plain("", "", ""), "all", "the completion is empty"),
    "chat": (Conversation("", (USER, BOT)), "completion", None),
    "chat, blank": (Conversation("", (USER, BOT | {"content": " \n"})), "completion", "the completion is empty"),
    "chat, blank, all": (Conversation("", (USER, BOT | {"content": ""})), "all", None),
    "chat, earlier": (Conversation("", (USER, BOT, USER, BOT | {"content": ""}), 3), "assistant", None),
    "chat, last": (Conversation("", (USER, BOT, USER, BOT | {"content": ""}), 3), "completion", "the completion is"),
    "call": (Conversation("", (USER, CALLS)), "completion", None),
    "zero_weight": (
        Conversation("", (USER, BOT), zero_weight=frozenset({1})),
        "assistant",
        "no assistant turn has weight",
    ),
    "ids": (Ids("", (1, 2)), "completion", None),
    "one id": (Ids("", (1,)), "completion", "only the first token"),
    "first label": (Ids("", (1, 2), (1, -100)), "completion", "only the first token"),
    "second label": (Ids("", (1, 2), (-100, 2)), "completion", None),
}


@pytest.mark.parametrize(("example", "loss_on", "expected"), NO_LOSS.values(), ids=NO_LOSS)
def test_reasons_for_rows_without_loss(example: Example, loss_on: str, expected: str | None) -> None:
    reason = no_loss_reason(example, loss_on)
    assert reason is None if expected is None else reason is not None and reason.startswith(expected)


DIFFERENT: list[Example] = [
    Plain("x", "a", "bc"),
    Plain("x", "ab", "c"),
    Plain("x", "", "abc"),
    Plain("x", "assistant", "b"),
    Plain("x", "(1, 2)", ""),
    Conversation("x", (USER, BOT)),
    Conversation("x", (USER, BOT, USER, BOT)),
    Conversation("x", (USER | {"content": "b"}, BOT | {"content": "a"})),
    Conversation("x", (USER | {"name": "Ann"}, BOT)),
    Conversation("x", (USER, BOT), tools=(WEATHER,)),
    Conversation("x", (USER, CALLS)),
    Conversation("x", (USER, CALLS | {"tool_calls": []})),
    Conversation("x", (BOT,)),
    Ids("x", (1, 2)),
    Ids("x", (12,)),
]


def test_content_keys_distinguish_exactly_the_contents() -> None:
    for folded in (False, True):
        assert len({content_key(example, folded) for example in DIFFERENT}) == len(DIFFERENT)
    assert content_key(Plain("x", "a", "b")) == content_key(Plain("y", "a", "b"))
    assert content_key(Conversation("x", (USER, BOT), 1)) == content_key(
        Conversation("y", (USER, BOT), 0, zero_weight=frozenset({1}))
    )
    assert content_key(Ids("x", (1, 2), (-100, 2))) == content_key(Ids("x", (1, 2)))


def test_folded_content_keys_ignore_white_space() -> None:
    some, same = Plain("x", "a  b\n", "c"), Plain("x", " a\u00a0b", "c ")
    assert content_key(some) != content_key(same)
    assert (
        content_key(some, folded=True)
        == content_key(same, folded=True)
        != content_key(Plain("x", "ab", "c"), folded=True)
    )
    spaced = Conversation("x", (USER | {"content": "a \n"}, BOT))
    assert content_key(spaced, folded=True) == content_key(Conversation("x", (USER, BOT)), folded=True)


QUESTIONS = {
    "prompt": (PAIR, "a", ()),
    "prompt with tools": ({"prompt": "a", "tools": [WEATHER]}, "a", (WEATHER,)),
    "lists": ({"prompt": [USER], "tools": [WEATHER]}, [USER], (WEATHER,)),
    "messages": ({"messages": [SYSTEM, USER, BOT]}, [SYSTEM, USER], ()),
    "unanswered": ({"messages": [USER, BOT, USER]}, [USER, BOT, USER], ()),
    "sharegpt": ({"conversations": [HUMAN, GPT], "system": "s", "tools": [WEATHER]}, [SYSTEM, USER], (WEATHER,)),
    "alpaca": ({"instruction": "a", "input": "i", "text": "x"}, [USER | {"content": "a\ni"}], ()),
    "history": ({"instruction": "a", "history": [["a", "b"]], "system": "s"}, [SYSTEM, USER, BOT, USER], ()),
    "text": ({"text": "a"}, "a", ()),
}  # fmt: skip


@pytest.mark.parametrize(("values", "prompt", "tools"), QUESTIONS.values(), ids=QUESTIONS)
def test_the_prompt_of_a_row(values: dict[str, Any], prompt: Any, tools: tuple[Any, ...]) -> None:
    question = parse_question(Row("f:1", values), ANY)
    assert (question.prompt, question.tools) == (prompt, tools)


@pytest.mark.parametrize("values", [values for values, name, _ in READ.values() if name in CHAT_FORMATS])
def test_the_prompt_is_the_beginning_of_the_training_row(values: dict[str, Any]) -> None:
    question, example = parse_question(Row("f:1", values), ANY), chat(values)
    assert (*question.prompt, BOT) == example.messages


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"question": "a"}, "fields are `question`"),
        ({"prompt": None}, "`prompt` must be text, got null"),
        ({"messages": []}, "`messages` must be a list of messages, got an empty list"),
        ({"messages": [BOT]}, "before the answer"),
        ({"conversations": [GPT]}, "before the answer"),
        ({"instruction": 3}, "`instruction` must be text, got a number"),
    ],
)
def test_rows_without_a_prompt_are_refused(row: dict[str, Any], detail: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_question(Row("f:1", row), ANY)
    assert meanings(caught.value) == [(Code.DATA_FIELD, "f:1", "")]
    (problem,) = caught.value.problems
    assert detail in problem.what and "prompt, messages, conversations" in problem.fix


def test_the_prompt_is_read_in_the_format_of_training() -> None:
    """A prompt beside messages, as in ultrachat, is one of the unused fields."""
    row = {"prompt": "x", "messages": [USER, BOT]}
    assert parse_question(Row("f:1", row), ANY).prompt == [USER]
    by_hand = ANY.model_copy(update={"format": "text"})
    assert parse_question(Row("f:1", row | {"text": "t"}), by_hand).prompt == "t"


def test_the_prompt_is_read_from_mapped_columns() -> None:
    section = ANY.model_copy(update={"columns": {"prompt": "q", "completion": "r"}})
    assert parse_question(Row("f:1", {"q": "a", "prompt": "x"}), section).prompt == "a"


def test_lists_may_be_given_as_json_text() -> None:
    """As in cells of CSV, where lists have to be JSON. An empty cell is an empty history."""
    assert chat({"messages": json.dumps([USER, BOT])}).messages == (USER, BOT)
    assert parse({"input_ids": "[1, 2]"}) == Ids("f:1", (1, 2))
    assert chat({"instruction": "a", "output": "b", "history": ""}).messages == (USER, BOT)
    check_row_error(row_error({"messages": "[{"}), "`messages`")
