"""Keys → formats → examples: what every common shape of a row becomes, and what is refused and how it is said."""

import json
import pickle
from typing import Any

import pytest

from loratune.config import DataSection
from loratune.data import formats
from loratune.data.formats import Conversation, Example, Ids, Parser, Plain, RowError, key, parse_question
from loratune.data.formats.examples import no_loss_reason
from loratune.data.sources import Row
from loratune.errors import DataError

PAIR = {"prompt": "a", "completion": "b"}
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
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


def said(*messages: dict[str, Any], **row: Any) -> Conversation:
    return chat({"messages": list(messages)} | row)


def refused(values: dict[str, Any], **section: Any) -> list[str]:
    """What is said of a file that begins like this."""
    with pytest.raises(DataError) as caught:
        parser(values, **section)
    return [str(problem) for problem in caught.value.problems]


def bad(values: dict[str, Any], first: dict[str, Any] | None = None, **section: Any) -> str:
    """What is said of this row in a file that begins with another, or with itself."""
    made = parser(first or values, **section)
    with pytest.raises(RowError) as caught:
        made(Row("f:2", values))
    return str(caught.value)


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
    "messages": ({"messages": [USER, BOT]}, "messages", Conversation("f:1", (USER, BOT))),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, "conversations", Conversation("f:1", (USER, BOT))),
    "alpaca": ({"instruction": "a", "output": "b"}, "alpaca", Conversation("f:1", (USER, BOT), 1)),
    "text": ({"text": "a", "label": "x"}, "text", Plain("f:1", "", "a", whole=True)),
    "NUL": ({"text": "a\0"}, "text", Plain("f:1", "", "a\0", whole=True)),
}


@pytest.mark.parametrize(("values", "form", "expected"), READ.values(), ids=READ)
def test_every_format_by_itself_and_by_hand(values: dict[str, Any], form: str, expected: Example) -> None:
    made = pickle.loads(pickle.dumps(parser(values)))
    assert (made.form, made(Row("f:1", values))) == (form, expected)
    assert parse(values, format=form) == expected
    assert (made.form in formats.CHATS) == isinstance(expected, Conversation)


def test_message_lists_are_read_under_either_name() -> None:
    lists = {"prompt": [USER], "completion": [BOT]}
    assert [parser(lists, format=form).form for form in ("messages", "prompt_completion")] == ["messages"] * 2
    assert parse(lists, format="prompt_completion") == parse(lists)


BAD_ROWS = {
    "missing": (
        {"prompt": "a", "n": 1},
        "no field `completion` for the format prompt_completion; its fields are `n`, ",
    ),
    "null": ({"prompt": None, "completion": "b"}, "`prompt` must be text, got null"),
    "number": ({"prompt": "a", "completion": 3}, "`completion` must be text, got a number"),
    "bool": ({"prompt": "a", "completion": True}, "`completion` must be text, got true or false"),
    "list": ({"prompt": "a", "completion": ["b"]}, "`completion` must be text, got a list"),
    "object": ({"prompt": {}, "completion": "b"}, "`prompt` must be text, got an object"),
    "surrogate": ({"prompt": "a\ud800", "completion": "b"}, "`prompt` holds a lone surrogate"),
}


@pytest.mark.parametrize(("values", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(values: dict[str, Any], expected: str) -> None:
    assert bad(values, PAIR).startswith(expected)


BAD_IDS = {
    "text": ("1 2", None, "`input_ids` must be a list of whole numbers, got text"),
    "empty": ([], None, "`input_ids` must be a list of whole numbers, got an empty list"),
    "negative": ([1, -1], None, "entry 2 of `input_ids` is -1, and ids are not negative"),
    "bool": ([1, True], None, "entry 2 of `input_ids` must be a whole number, got true or false"),
    "float": ([1, 2.0], None, "entry 2 of `input_ids` must be a whole number, got the number 2.0"),
    "null": ([None, 1], None, "entry 1 of `input_ids` must be a whole number, got null"),
    "batch": ([[1, 2]], None, "entry 1 of `input_ids` must be a whole number, got a list"),
    "short": ([1, 2, 3], [2, 3], "`labels` has 2 entries, but `input_ids` has 3"),
    "silent": ([1, 2], [-100, -100], "nothing to learn: all `labels` are -100"),
    "float label": ([1, 2], [1, 2.0], "entry 2 of `labels` must be a whole number"),
    "shifted": (
        [1, 2, 3],
        [2, 3, -100],
        "entry 1 of `labels` is 2, but that of `input_ids` is 1; a label is the id at",
    ),
}


@pytest.mark.parametrize(("ids", "labels", "expected"), BAD_IDS.values(), ids=BAD_IDS)
def test_bad_ids(ids: Any, labels: Any, expected: str) -> None:
    assert bad({"input_ids": ids, "labels": labels}).startswith(expected)


def test_padding_in_the_data_is_not_trained_on() -> None:
    assert bad({"input_ids": [1, 0], "attention_mask": [1, 0]}).startswith("`attention_mask` leaves tokens out")
    for mask, found in (([1], "1 entries"), ([1, 1, 1], "3 entries"), (1, "a number")):
        told = f"`attention_mask` must have 2 entries, as `input_ids` has, and is {found}"
        assert bad({"input_ids": [1, 0], "attention_mask": mask}) == told


def test_ids_are_held_against_the_vocabulary() -> None:
    formats.check_ids(Ids("f:1", (0, 263)), 264)
    with pytest.raises(RowError, match="entry 2 of `input_ids` is 264, but the vocabulary has 264 tokens"):
        formats.check_ids(Ids("f:1", (0, 264)), 264)


BAD_CHATS: dict[str, tuple[Any, str]] = {
    "role": ([USER, BOT | {"role": "bot"}], "message 2 of `messages` has the role 'bot', not one of system, "),
    "no role": ([{"content": "a"}], "message 1 of `messages` has the role None"),
    "odd role": ([BOT | {"role": ["user"]}], "message 1 of `messages` has the role ['user']"),
    "no content": ([USER, {"role": "assistant"}], "`content` of message 2 of `messages` must be text, got null"),
    "no calls": ([USER, {"role": "assistant", "tool_calls": []}], "`content` of message 2 of `messages` must be"),
    "no parts": ([USER | {"content": []}], "`content` of message 1 of `messages` must be text, got an empty list"),
    "part without text": (
        [USER | {"content": [{"type": "text"}]}],
        "`text` of a part of message 1 of `messages` must be",
    ),
    "image": (
        [USER | {"content": [{"type": "image_url"}]}],
        "message 1 of `messages` has a part of the type 'image_url'",
    ),
    "string part": ([USER | {"content": ["a"]}], "message 1 of `messages` has text as a part, and only parts of the"),
    "text": ("hello", "`messages` must be a list of messages, got text"),
    "null": (None, "`messages` must be a list of messages, got null"),
    "empty": ([], "`messages` must be a list of messages, got an empty list"),
    "strings": (["a"], "message 1 of `messages` must be an object"),
    "unknown": (
        [USER, BOT | {"function_call": {}}],
        "message 2 of `messages` has `function_call`, which would be left",
    ),
    "unanswered": ([USER], "no assistant message"),
    "surrogate": ([USER | {"name": "\udc00"}], "`name` of message 1 of `messages` holds a lone surrogate"),
    "weight": ([USER, BOT | {"weight": 0.5}], "message 2 of `messages` has the weight 0.5, not 0 or 1"),
    "user's weight": (
        [USER | {"weight": 1}, BOT],
        "message 1 of `messages` has the weight 1, but only assistant turns",
    ),
    "user's call": (
        [USER | {"tool_calls": [CALL]}],
        "message 1 of `messages` has `tool_calls`, but only the assistant",
    ),
}


@pytest.mark.parametrize(("messages", "expected"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_chat(messages: Any, expected: str) -> None:
    assert bad({"messages": messages}, {"messages": [USER, BOT]}).startswith(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": [USER], "completion": [USER]}, "no assistant message"),
        ({"prompt": [USER, BOT], "completion": [USER]}, "no assistant message"),
        ({"prompt": [USER], "completion": "b"}, "`completion` must be a list of messages, got text"),
        ({"messages": [USER, BOT], "functions": [{"name": "f"}]}, "the row has `functions`, which would not be learnt"),
        ({"messages": [SYSTEM, USER, BOT], "system": "t"}, "`system` and the system message differ"),
        ({"messages": [USER, BOT], "system": 3}, "`system` must be text, got a number"),
    ],
)
def test_bad_conversation(values: dict[str, Any], expected: str) -> None:
    assert bad(values).startswith(expected)


def test_a_message_reaches_the_template_whole() -> None:
    """What is null is as if it were not there; everything else is handed on."""
    user = USER | {"role": "developer", "name": "Ann", "tool_calls": None, "weight": None}
    bot = BOT | {"reasoning_content": "r", "thinking": "t", "tool_calls": []}
    tool = {"role": "tool", "content": "18", "tool_call_id": "c1", "name": "weather"}
    example = said(user, tool, bot)
    assert example.messages == (
        {"role": "developer", "content": "a", "name": "Ann"},
        tool,
        BOT | {"reasoning_content": "r", "thinking": "t"},
    )


def test_parts_of_text_are_joined_as_they_stand() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    assert said(USER | {"content": parts}, BOT).messages[0] == {"role": "user", "content": "a b"}


def test_weight_says_which_turns_are_learnt() -> None:
    turns = [USER, BOT | {"weight": 0}, USER | {"weight": 0}, BOT | {"weight": 1}, USER, BOT | {"weight": None}]
    example = said(*turns)
    assert (example.messages, example.zero_weight) == ((USER, BOT) * 3, {1})
    assert example.supervised_turns("completion") == example.supervised_turns("assistant") == (3, 5)
    assert no_loss_reason(said(USER, BOT | {"weight": 0}), "completion") == "no assistant turn has weight"


def test_loss_on_assistant_reaches_into_the_prompt() -> None:
    example = chat({"prompt": [USER, BOT, USER], "completion": [BOT]})
    assert (example.supervised_turns("completion"), example.supervised_turns("assistant")) == ((3,), (1, 3))


CALLED = {
    "openai": {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    "object": CALL | {"index": 0, "extra": None},
    "bare": {"id": "c1", "name": "weather", "arguments": {"city": "Rome"}},
}


@pytest.mark.parametrize("call", CALLED.values(), ids=CALLED)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_tool_calls_come_in_one_shape(call: dict[str, Any], content: dict[str, Any]) -> None:
    example = said(USER, {"role": "assistant", "tool_calls": [call]} | content)
    assert example.messages[1] == CALLS
    assert no_loss_reason(example, "completion") is None


def test_a_call_may_stand_beside_text_and_without_arguments() -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ("", None, "{}", {})]
    message = said(USER, BOT | {"tool_calls": calls}).messages[1]
    assert message["content"] == "b"
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}] * 4


BAD_CALLS: dict[str, tuple[Any, str]] = {
    "text": ("f()", "`tool_calls` of message 2 of `messages` must be a list, got text"),
    "number": ([3], "tool call 1 of message 2 of `messages` must be an object with a function, got a number"),
    "nameless": ([CALL, {"arguments": {}}], "`name` of tool call 2 of message 2 of `messages` must be text, got null"),
    "empty name": ([{"name": ""}], "tool call 1 of message 2 of `messages` names no function"),
    "cut off": (
        [{"name": "f", "arguments": '{"a"'}],
        "`arguments` of tool call 1 of message 2 of `messages` must be val",
    ),
    "a list": (
        [{"name": "f", "arguments": "[1]"}],
        "`arguments` of tool call 1 of message 2 of `messages` must be an ob",
    ),
    "empty list": (
        [{"name": "f", "arguments": []}],
        "`arguments` of tool call 1 of message 2 of `messages` must be an",
    ),
    "parameters": ([{"name": "f", "parameters": {}}], "tool call 1 of message 2 of `messages` has `parameters`, which"),
    "surrogate": (
        [{"name": "f", "arguments": {"a": "\ud800"}}],
        "`arguments` of tool call 1 of message 2 of `messages` h",
    ),
}


@pytest.mark.parametrize(("calls", "expected"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(calls: Any, expected: str) -> None:
    assert bad({"messages": [USER, {"role": "assistant", "tool_calls": calls}]}).startswith(expected)


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
def test_tools_come_in_one_shape(tools: Any) -> None:
    lists = {"prompt": [USER], "completion": [BOT]}
    rows = ({"messages": [USER, BOT]}, lists, {"conversations": [HUMAN, GPT]}, {"instruction": "a", "output": "b"})
    assert [chat(row | {"tools": tools}).tools for row in rows] == [(WEATHER,)] * 4


def test_nulls_of_a_table_leave_the_schemas_but_a_null_that_means_something_stays() -> None:
    columns = {"x": {"type": "string", "enum": ["a", None], "default": None}, "y": None}
    tool = {"name": "f", "description": None, "parameters": {"properties": columns}}
    (made,) = said(USER, BOT, tools=[tool]).tools
    assert made["function"] == {
        "name": "f",
        "parameters": {"properties": {"x": {"type": "string", "enum": ["a", None], "default": None}}},
    }


@pytest.mark.parametrize("none", [None, [], "", "[]", "null"])
def test_no_tools(none: Any) -> None:
    assert said(USER, BOT, tools=none).tools == ()


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("{", "`tools` must be valid JSON"),
        ("[" * 100_000, "`tools` must be valid JSON"),
        ({"name": "f"}, "`tools` must be a list of JSON schemas, got an object"),
        ([3], "entry 1 of `tools` must be a JSON schema, got a number"),
        (["x"], "entry 1 of `tools` must be valid JSON"),
        ([{"name": "\ud800"}], "`tools` holds a lone surrogate"),
        ([{"name": b"f"}], "`tools` cannot be written as JSON"),
    ],
)
def test_bad_tools(tools: Any, expected: str) -> None:
    assert bad({"messages": [USER, BOT], "tools": tools}).startswith(expected)


@pytest.mark.parametrize("row", [{"messages": [USER, BOT]}, {"conversations": [HUMAN, GPT]}])
def test_system_of_the_row_comes_first(row: dict[str, Any]) -> None:
    assert chat(row | {"system": "s"}).messages == (SYSTEM, USER, BOT)
    assert chat(row | {"system": ""}).messages == chat(row | {"system": None}).messages == (USER, BOT)
    assert said(SYSTEM, USER, BOT, system="s").messages == (SYSTEM, USER, BOT)


SPEAKERS = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "model", "bot"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "observation"),
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in SPEAKERS.items() for name in names])
@pytest.mark.parametrize("fields", [("from", "value"), ("role", "content")])
def test_speakers(role: str, name: str, fields: tuple[str, str]) -> None:
    turn = dict(zip(fields, (name, "x"), strict=True)) | {"weight": None}
    assert chat({"conversations": [turn, GPT]}).messages == ({"role": role, "content": "x"}, BOT)


def test_sharegpt_calls_a_function() -> None:
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'}
    seen = {"from": "observation", "value": "18"}
    example = chat({"conversations": [HUMAN, call, seen, GPT | {"weight": 0}]})
    expected = {"type": "function", "function": CALL["function"]}
    assert example.messages[1:3] == (CALLS | {"tool_calls": [expected]}, {"role": "tool", "content": "18"})
    assert example.supervised_turns("completion") == (1,)
    both = chat({"conversations": [HUMAN, call | {"value": f"[{call['value']}, {call['value']}]"}]})
    assert both.messages[1]["tool_calls"] == [expected] * 2


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"from": "robot", "value": "b"}, "message 2 of `conversations` has the role 'robot', not one of system, "),
        ({"from": "gpt", "value": None}, "`value` of message 2 of `conversations` must be text, got null"),
        ({"from": "gpt", "value": "b", "content": "c"}, "message 2 of `conversations` has both `from` and `content`"),
        ({"from": "gpt", "value": "b", "image": "x"}, "message 2 of `conversations` has `image`, which would be left"),
        ({"from": "function_call", "value": "f()"}, "the function call of message 2 of `conversations` must be valid"),
        (
            {"from": "function_call", "value": "3"},
            "the function call of message 2 of `conversations` must be JSON with",
        ),
        ({"from": "function_call", "value": '{"name": "f"}'}, "the function call of message 2 of `conversations` must"),
        ("b", "message 2 of `conversations` must be an object"),
    ],
)
def test_bad_sharegpt(turn: Any, expected: str) -> None:
    assert bad({"conversations": [HUMAN, turn]}).startswith(expected)


def test_alpaca_in_full() -> None:
    row = {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["q", "w"], ("e", "")]}
    example = chat(row)
    texts = [(message["role"], message["content"]) for message in example.messages]
    assert texts == [
        ("system", "s"), ("user", "q"), ("assistant", "w"), ("user", "e"), ("assistant", ""), ("user", "a\ni"),
        ("assistant", "b"),
    ]  # fmt: skip
    assert (example.supervised_turns("completion"), example.supervised_turns("assistant")) == ((6,), (2, 6))
    assert example.selected_turns("assistant") == (2, 4, 6)  # the one in between is empty


@pytest.mark.parametrize("blank", [{}, {"input": ""}, {"input": None, "system": None, "history": None}])
def test_alpaca_without_its_options(blank: dict[str, Any]) -> None:
    assert chat({"instruction": "a", "output": "b"} | blank).messages == (USER, BOT)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": None}, "`instruction` must be text, got null"),
        ({"output": 3}, "`output` must be text, got a number"),
        ({"input": ["i"]}, "`input` must be text, got a list"),
        ({"history": "q"}, "`history` must be a list of pairs of question and answer, got text"),
        ({"history": [["q"]]}, "entry 1 of `history` must be a pair of question and answer"),
        ({"history": [["q", None]]}, "`answer` must be text, got null"),
    ],
)
def test_bad_alpaca(fields: dict[str, Any], expected: str) -> None:
    assert bad({"instruction": "a", "output": "b"} | fields).startswith(expected)


def test_keys_that_fit_no_format() -> None:
    (problem,) = refused({"question": "a", "answer": "b"})
    assert problem.startswith("f:1: the keys `answer`, `question` fit no format; set data.format to one of input_ids, ")
    assert problem.endswith("alpaca, text, and data.columns to map its keys to yours")


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ({"text": "c"}, "prompt_completion, text"),
        ({"input_ids": [1], "labels": [1]}, "input_ids, prompt_completion"),
        ({"instruction": "a", "output": "b"}, "prompt_completion, alpaca"),
        ({"messages": [], "conversations": []}, "prompt_completion, messages, conversations"),
    ],
)
def test_ambiguous_keys_and_the_setting_that_decides(others: dict[str, Any], names: str) -> None:
    keys = ", ".join(f"`{key}`" for key in sorted(PAIR | others))
    expected = f"f:1: the keys {keys} fit more than one format; set data.format to one of {names}"
    assert refused(PAIR | others) == [expected]
    assert parse(PAIR | others, format="prompt_completion") == Plain("f:1", "a", "b")


@pytest.mark.parametrize(
    ("row", "ours", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "completion", Plain("f:1", "a", "b")),
        ({"chosen": "ab", "rejected": "ac"}, "text", Plain("f:1", "", "ab", whole=True)),
        ({"prompt": "a", "chosen": [USER, BOT], "rejected": [USER]}, "messages", Conversation("f:1", (USER, BOT))),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}, "completion", Conversation("f:1", (USER, BOT), 1)),
    ],
)
def test_preferences_are_refused_and_what_would_do(row: dict[str, Any], ours: str, expected: Example) -> None:
    (problem,) = refused(row)
    assert problem.startswith("f:1: `chosen` and `rejected` are preference data")
    assert problem.endswith(f"set data.columns to {{{ours}: chosen}}")
    assert parse(row, columns={ours: "chosen"}) == expected


def test_answers_marked_good_or_bad_are_refused() -> None:
    (problem,) = refused(PAIR | {"label": False})
    assert problem.startswith("f:1: `label` is true or false beside a completion: preference data")
    assert parse(PAIR | {"label": True}, format="prompt_completion") == Plain("f:1", "a", "b")
    assert parse(PAIR | {"label": "pos"}) == Plain("f:1", "a", "b")


@pytest.mark.parametrize("others", [{}, {"prompt": "x"}, {"completion": "y"}])
def test_columns(others: dict[str, str]) -> None:
    """A mapped field wins over one that has our name by chance, whichever comes first."""
    row = {"question": "a", "answer": "b"}
    there, back = {"prompt": "question", "completion": "answer"}, {"completion": "question", "prompt": "answer"}
    for values in (row | others, others | row):
        assert parse(values, columns=there) == Plain("f:1", "a", "b")
        assert parse(values, columns=back) == Plain("f:1", "b", "a")


def test_a_mapped_field_no_longer_counts_under_its_own_name() -> None:
    assert parse({"text": "a", "completion": "b"}, columns={"prompt": "text"}) == Plain("f:1", "a", "b")
    columns = {"completion": "prompt", "prompt": "completion"}
    assert parse(PAIR, columns=columns) == Plain("f:1", "b", "a")


def test_a_later_row_without_a_mapped_field() -> None:
    first = {"question": "a", "completion": "b"}
    expected = "no field `question` for the format prompt_completion; its fields are `completion`, `prompt`"
    assert bad(PAIR, first, columns={"prompt": "question"}) == expected


def test_columns_of_a_field_that_is_not_there() -> None:
    expected = "f:1: data.columns: no field `question`; the fields are `completion`, `prompt`; "
    expected += "it holds for all files of train and validation"
    assert refused(PAIR, columns={"prompt": "question"}) == [expected]
    (problem,) = refused({"instruction": "a", "output": "b"}, columns={"input": "context"})
    assert problem.endswith("no field `context`; the fields are `instruction`, `output`; "
                            "where only some rows have it, put it into the first one too, as null")  # fmt: skip
    row = {"instruction": "a", "output": "b", "context": None}
    assert chat(row, columns={"input": "context"}).messages == (USER, BOT)


def test_settings_that_do_not_go_with_the_rows() -> None:
    found = refused(PAIR | {"s": "x"}, columns={"system": "s"}, chat_template="t.jinja", loss_on="assistant")
    columns = (
        "`system` is not read from rows of the format prompt_completion, which has prompt, completion; leave it out"
    )
    assert found == [
        f"f:1: data.columns: {columns}",
        "f:1: data.chat_template: the rows are prompt_completion, which go through no chat template; leave it out",
        "f:1: data.loss_on: the rows are prompt_completion, which have no assistant turns; set it to completion or all",
    ]


@pytest.mark.parametrize("row", [{"text": "a"}, {"input_ids": [1, 2]}, {"instruction": "a", "output": "b"}])
def test_assistant_turns_and_templates_are_for_conversations(row: dict[str, Any]) -> None:
    for section in ({"loss_on": "assistant"}, {"chat_template": "t.jinja"}):
        if "output" in row:
            assert parser(row, **section).form == "alpaca"
        else:
            assert len(refused(row, **section)) == 1


def test_fields_that_are_not_read() -> None:
    assert unread(PAIR, PAIR | {"id": 1}, PAIR | {"system": "s"}) == {"id", "system"}
    assert unread({"q": "a", "completion": "b", "prompt": "x"}, columns={"prompt": "q"}) == set()
    assert unread({"messages": [USER, BOT], "tools": None, "id": 1}) == {"id"}


def unread(*rows: dict[str, Any], **section: Any) -> set[str]:
    """The fields that are read nowhere, once all rows were parsed."""
    made = parser(rows[0], **section)
    for number, values in enumerate(rows, start=1):
        made(Row(f"f:{number}", values))
    return made.unread


SILENT = {
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
    "one id": (Ids("", (1,)), "completion", "no token comes before"),
    "first label": (Ids("", (1, 2), (1, -100)), "completion", "no token comes before"),
    "second label": (Ids("", (1, 2), (-100, 2)), "completion", None),
}


@pytest.mark.parametrize(("example", "loss_on", "expected"), SILENT.values(), ids=SILENT)
def test_silent(example: Example, loss_on: str, expected: str | None) -> None:
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


def test_keys_tell_contents_apart_and_nothing_else() -> None:
    for folded in (False, True):
        assert len({key(example, folded) for example in DIFFERENT}) == len(DIFFERENT)
    assert key(Plain("x", "a", "b")) == key(Plain("y", "a", "b"))
    assert key(Conversation("x", (USER, BOT), 1)) == key(Conversation("y", (USER, BOT), 0, zero_weight=frozenset({1})))
    assert key(Ids("x", (1, 2), (-100, 2))) == key(Ids("x", (1, 2)))


def test_keys_fold_white_space() -> None:
    one, other = Plain("x", "a  b\n", "c"), Plain("x", " a\u00a0b", "c ")
    assert key(one) != key(other)
    assert key(one, folded=True) == key(other, folded=True) != key(Plain("x", "ab", "c"), folded=True)
    spaced = Conversation("x", (USER | {"content": "a \n"}, BOT))
    assert key(spaced, folded=True) == key(Conversation("x", (USER, BOT)), folded=True)


ASKED = {
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


@pytest.mark.parametrize(("values", "prompt", "tools"), ASKED.values(), ids=ASKED)
def test_question(values: dict[str, Any], prompt: Any, tools: tuple[Any, ...]) -> None:
    asked = parse_question(Row("f:1", values), ANY)
    assert (asked.prompt, asked.tools) == (prompt, tools)


@pytest.mark.parametrize("values", [values for values, form, _ in READ.values() if form in formats.CHATS])
def test_a_question_is_the_beginning_of_the_row_that_is_trained_on(values: dict[str, Any]) -> None:
    asked, example = parse_question(Row("f:1", values), ANY), chat(values)
    assert (*asked.prompt, BOT) == example.messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "a"}, "nothing is asked; the fields are `question`"),
        ({"prompt": None}, "`prompt` must be text, got null"),
        ({"messages": []}, "`messages` must be a list of messages, got an empty list"),
        ({"messages": [BOT]}, "no message comes before the answer"),
        ({"conversations": [GPT]}, "no message comes before the answer"),
        ({"instruction": 3}, "`instruction` must be text, got a number"),
    ],
)
def test_rows_that_ask_nothing(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_question(Row("f:1", row), ANY)
    assert str(caught.value).startswith(f"f:1: {expected}; give a prompt, messages, ")


def test_a_question_is_asked_in_the_format_that_is_trained_on() -> None:
    """A prompt beside messages, as in ultrachat, is one of the fields that are not read."""
    row = {"prompt": "x", "messages": [USER, BOT]}
    assert parse_question(Row("f:1", row), ANY).prompt == [USER]
    by_hand = ANY.model_copy(update={"format": "text"})
    assert parse_question(Row("f:1", row | {"text": "t"}), by_hand).prompt == "t"


def test_question_by_columns() -> None:
    section = ANY.model_copy(update={"columns": {"prompt": "q", "completion": "r"}})
    assert parse_question(Row("f:1", {"q": "a", "prompt": "x"}), section).prompt == "a"


def test_lists_may_stand_as_json_in_text() -> None:
    """As they must in a cell of CSV; an empty cell is no history."""
    assert chat({"messages": json.dumps([USER, BOT])}).messages == (USER, BOT)
    assert parse({"input_ids": "[1, 2]"}) == Ids("f:1", (1, 2))
    assert chat({"instruction": "a", "output": "b", "history": ""}).messages == (USER, BOT)
    assert bad({"messages": "[{"}) == "`messages` must be valid JSON"
