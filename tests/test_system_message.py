"""The system message that all training rows had: it is recorded, and what answers prompts uses it."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, Ran, check_refused, config_in, write_rows
from running import Cli, MakeConfig
from typer.testing import CliRunner

import loratune
from loratune import data
from loratune.cli import app
from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data.formats import system_message
from loratune.data.rendering import Renderer
from loratune.errors import ConfigError
from loratune.export import ollama
from loratune.text import beginning

pytestmark = pytest.mark.usefixtures("untraced_module")

TEXT = "You are Max.\nBe brief."
SYSTEM = {"role": "system", "content": TEXT}
SHOWN = 'system message of the training rows: "You are Max. Be brief."; --no-system leaves it out'
NEW = ("--max-new-tokens", 4)
TOO_MANY = ("--max-new-tokens", 600)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
MERGING = (  # as Gemma 3 does
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content ~ '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ s if loop.first else '' }}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows(system: dict[str, str] | None = SYSTEM) -> list[dict[str, Any]]:
    first = [system] if system else []
    answers = [{"role": "assistant", "content": "xyz"[number % 3]} for number in range(12)]
    return [{"messages": [*first, user(f"{number}:"), answer]} for number, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """Trained on conversations that all have the same system message."""
    folder = tmp_path_factory.mktemp("max")
    section = {"train": str(write_rows(folder / "max.jsonl", rows()))}
    path = config_in(folder, tiny_dir)(data=section, training={"learning_rate": 2e-2, "max_steps": 60})
    ran = CliRunner().invoke(app, ["train", str(path)])
    assert ran.exit_code == 0, ran.stderr
    assert f'all rows have the system message "{TEXT.replace(chr(10), " ")}"' in ran.stderr
    return folder / "out"


def recorded(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "loratune.json").read_text())
    return found


def changed(adapter: Path, folder: Path, **values: Any) -> Path:
    """A copy of an adapter with other values in its record, as a stranger may publish it."""
    copy = folder / "stranger"
    shutil.copytree(adapter, copy, dirs_exist_ok=True)
    (copy / "loratune.json").write_text(json.dumps(recorded(adapter) | values))
    return copy


def asked(cli: Cli, adapter: Path, folder: Path, row: dict[str, Any], *options: object) -> Ran:
    """What `generate` answers to a row of a file."""
    source = write_rows(folder / "asked.jsonl", [row])
    return cli("generate", "--adapter", adapter, "--input", source, *(options or NEW))


def length(ran: Ran) -> int:
    """The tokens of a prompt that leaves no room for the new ones."""
    (line,) = ran.errors
    return int(line.partition(" prompt tokens")[0].split()[-1])


# Recording

CHOSEN = [{"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
REJECTED = [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, user("q"), *CHOSEN]},
        {"messages": [user("q"), *CHOSEN], "system": TEXT},
        {"instruction": "q", "output": "a", "system": TEXT},
        {"conversations": [{"from": "system", "value": TEXT}, *SHAREGPT]},
        {"prompt": [SYSTEM, user("q")], "completion": CHOSEN},
        {"prompt": [SYSTEM, user("q")], "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": [SYSTEM, user("q")], "completion": CHOSEN, "label": True},
    ],
    ids=["messages", "system", "alpaca", "sharegpt", "two lists", "pairs", "unpaired"],
)  # fmt: skip
def test_shared_system_message_is_found_in_every_format(row: dict[str, Any], tmp_path: Path) -> None:
    """In any format, and only if no row has another one, or none."""
    source = str(write_rows(tmp_path / "rows.jsonl", [row] * 3))
    split = data.read_source(Source(path=source), DataSection(train=Source(path=source)))
    assert split.system == TEXT and split.rows_without_system == 0
    first = json.dumps(row)
    for other, without in ((first.replace("Max", "Bob"), 0), (first.replace('"system"', '"user"'), 1)):
        if other.count("user") < 2 and without:  # not a message, but a field
            continue
        write_rows(tmp_path / "rows.jsonl", [row, json.loads(other), row])
        split = data.read_source(Source(path=source), DataSection(train=Source(path=source)))
        assert (split.system, split.rows_without_system) == ("", without)


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": "a"}, {"text": TEXT}, {"input_ids": [1, 2, 3]}])
def test_raw_rows_have_no_system_message(row: dict[str, Any], tmp_path: Path) -> None:
    source = Source(path=str(write_rows(tmp_path / "rows.jsonl", [row] * 2)))
    split = data.read_source(source, DataSection(train=source))
    assert split.system == "" and split.rows_without_system == 2
    assert system_message(next(split.examples())) == ""


def test_only_training_rows_decide(run_config: MakeConfig, tmp_path: Path) -> None:
    """Validation rows do not, whether they are in a file or held out."""
    first, other = ({"messages": [one, user("q"), *CHOSEN]} for one in (SYSTEM, SYSTEM | {"content": "Other."}))
    grouped = [first | {"g": "a"}] * 9 + [other | {"g": "b"}]
    path = write_rows(tmp_path / "grouped.jsonl", grouped)
    for seed in range(20):  # until the other row is held out
        section = {"train": {"path": str(path)}, "validation": 0.1, "group_by": "g"}
        found = data.read_datasets(DataSection.model_validate(section), seed)
        held_out = {example.messages[0]["content"] for example in found.validation.examples()}  # type: ignore[union-attr]
        assert (found.train.system == TEXT) == (held_out == {"Other."})
        if found.train.system:
            return
    raise AssertionError("never held out")


@pytest.mark.parametrize(("second", "expected"), [(SYSTEM, TEXT), (SYSTEM | {"content": "Other."}, None), (None, None)])
def test_replayed_rows_count(
    adapter: Path, second: dict[str, str] | None, expected: str | None, run_config: MakeConfig, tmp_path: Path, cli: Cli
) -> None:
    """With rows of the earlier run, all rows share a message only if it is that of both; without, the new one is."""
    train = str(write_rows(tmp_path / "more.jsonl", rows(second)))
    start = {"lora": {"start_from": str(adapter)}, "training": {"max_steps": 1}}
    for replay, system in ((0.5, expected), (None, second and second["content"])):
        section = {"train": train} | ({"replay": replay} if replay else {})
        ran = cli("train", run_config(data=section, **start), "--overwrite", "--allow-worse")
        assert ran.code == 0, ran.err
        assert recorded(tmp_path / "out").get("system") == system


# Use


def test_prompts_without_a_system_message_get_it(adapter: Path, cli: Cli, tmp_path: Path) -> None:
    """The prompt is that of training: as many tokens, and the answer to it."""
    assert recorded(adapter)["system"] == TEXT
    trained_as = {"messages": [SYSTEM, user("5:")]}
    expected, tokens = (
        asked(cli, adapter, tmp_path, trained_as),
        length(asked(cli, adapter, tmp_path, trained_as, *TOO_MANY)),
    )
    assert expected.code == 0 and "system message" not in expected.err
    plain = cli("generate", "--adapter", adapter, "5:", *NEW)
    assert (plain.out, plain.err.splitlines()) == (expected.out, [SHOWN])
    assert length(cli("generate", "--adapter", adapter, "5:", *TOO_MANY)) == tokens
    for row in (
        {"prompt": "5:"},
        {"instruction": "5:"},
        {"messages": [user("5:")]},
        {"messages": [user("5:")], "system": ""},
    ):
        ran = asked(cli, adapter, tmp_path, row)
        assert (ran.out, ran.err.count(SHOWN)) == (expected.out, 1)
        assert length(asked(cli, adapter, tmp_path, row, *TOO_MANY)) == tokens
    own = {"messages": [SYSTEM | {"content": "Other."}, user("5:")]}
    for row in (own, {"messages": [user("5:")], "system": "Other."}):
        ran = asked(cli, adapter, tmp_path, row, *TOO_MANY)
        assert length(ran) == tokens - len(TEXT) + len("Other.") and SHOWN not in ran.err


def test_another_system_message_or_none(adapter: Path, cli: Cli, tmp_path: Path) -> None:
    tokens = length(cli("generate", "--adapter", adapter, "5:", *TOO_MANY))
    other = cli("generate", "--adapter", adapter, "--system", "Other.", "5:", *TOO_MANY)
    assert length(other) == tokens - len(TEXT) + len("Other.") and SHOWN not in other.err
    none = [cli("generate", "--adapter", adapter, *how, "5:", *TOO_MANY) for how in (["--no-system"], ["--system", ""])]
    turn = len(TEXT) + 3  # the role, the end and the line break are one token each
    assert [length(ran) for ran in none] == [tokens - turn] * 2 and SHOWN not in none[0].err
    own = asked(cli, adapter, tmp_path, {"messages": [SYSTEM, user("5:")]}, "--no-system", *TOO_MANY)
    assert length(own) == tokens, "a row keeps its own"
    both = cli("generate", "--adapter", adapter, "--no-system", "--system", "x", "5:")
    assert both.code == 2 and "give --system or --no-system, not both" in both.err
    lone = cli("chat", "--adapter", adapter, "--no-system", "--system", "x", stdin="")
    assert lone.code == 2


def test_the_api_uses_it(adapter: Path) -> None:
    opened = loratune.Adapter(adapter)

    def tokens(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            opened.generate("5:", max_new_tokens=600, **options)
        return error.value.problems[0].what.partition(" ")[0]

    assert tokens() == tokens(system=None) == tokens(system=TEXT)
    assert int(tokens()) - int(tokens(system="")) == len(TEXT) + 3
    assert (
        opened.chat().system == TEXT and opened.chat(system="").system == "" and opened.chat(system="x").system == "x"
    )


def test_a_chat_begins_with_it(adapter: Path, cli: Cli, tmp_path: Path) -> None:
    expected, saved = asked(cli, adapter, tmp_path, {"messages": [SYSTEM, user("5:")]}), tmp_path / "chat.jsonl"
    ran = cli(
        "chat", "--adapter", adapter, *NEW, stdin=f"5:\n/save {saved}\n/system Other.\n/save --overwrite {saved}2\n"
    )
    assert ran.out == expected.out and ran.err.count(SHOWN) == 1
    assert json.loads(saved.read_text())["messages"][0] == SYSTEM
    assert json.loads(Path(f"{saved}2").read_text())["messages"][0] == SYSTEM | {"content": "Other."}
    without = cli("generate", "--adapter", adapter, "--no-system", "5:", *NEW)
    for arguments, lines in ((["--no-system"], ""), ([], "/system\n")):
        ran = cli("chat", "--adapter", adapter, *NEW, *arguments, stdin=f"{lines}5:\n")
        assert ran.out == without.out != expected.out and (SHOWN in ran.err) == (not arguments)


def test_several_adapters_have_their_own(adapter: Path, tmp_path: Path, cli: Cli) -> None:
    """A mixture has that of its first one, which is said."""
    other, named = changed(adapter, tmp_path, system="Other."), {}
    options = ("--adapter", f"a={adapter}", "--adapter", f"b={other}")
    for name in "ab":
        row = {"prompt": "5:", "adapter": name}
        named[name] = cli("generate", *options, "--input", write_rows(tmp_path / "one.jsonl", [row]), *TOO_MANY)
    assert length(named["a"]) - length(named["b"]) == len(TEXT) - len("Other.")
    assert SHOWN in named["a"].err and '"Other."' in named["b"].err
    mixed = cli("generate", *options, "--mix", "a:0.5,b:0.5", "5:", *TOO_MANY)
    assert length(mixed) == length(named["a"]) and f"{other}: had another system message" in mixed.err
    talk = loratune.Adapters({"a": adapter, "b": other}).chat()
    assert talk.system == TEXT and len(talk.notes()) == 2
    talk.use("b")
    assert talk.system == "Other."


def test_raw_prompts_refuse_one(run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    assert cli("train", run_config(training={"max_steps": 1}), "--allow-worse").code == 0
    raw = tmp_path / "out"
    assert "system" not in recorded(raw)
    ran = cli("generate", "--adapter", raw, "--system", "x", "5:")
    check_refused(ran, 2, (Code.USAGE_CONFLICT, "prompt 1", "--system"))
    assert cli("generate", "--adapter", raw, "--no-system", "5:", *NEW).code == 0
    claimed = changed(raw, tmp_path, system=TEXT)
    assert cli("generate", "--adapter", claimed, "5:", *NEW).out == cli("generate", "--adapter", raw, "5:", *NEW).out


def test_evaluation_says_which_rows_lack_it(adapter: Path, tmp_path: Path, cli: Cli) -> None:
    """They are scored as they are."""
    both = write_rows(tmp_path / "held-out.jsonl", [*rows()[:2], *rows(None)[:1]])
    ran = cli("evaluate", "--adapter", adapter, "--data", both)
    assert ran.code == 0 and "1 of 3 rows have no system message" in ran.err, ran.err
    assert "no system message" not in cli("evaluate", "--adapter", adapter, "--data", write_rows(both, rows())).err


# Templates


def test_a_template_that_refuses_system_messages_trains_no_such_rows(
    run_config: MakeConfig, tmp_path: Path, cli: Cli
) -> None:
    """As Gemma 2's; and an adapter of other rows refuses one later."""
    template = tmp_path / "refusing.jinja"
    template.write_text(REFUSING + CHAT_TEMPLATE)
    for system, code in ((SYSTEM, 4), (None, 0)):
        train = str(write_rows(tmp_path / "max.jsonl", rows(system)))
        section = {"train": train, "chat_template": str(template)}
        ran = cli("train", run_config(data=section, training={"max_steps": 1}), "--allow-worse")
        assert ran.code == code and ("System role not supported" in ran.err) == bool(code), ran.err
    assert cli("generate", "--adapter", tmp_path / "out", "5:", *NEW).code == 0
    ran = cli("generate", "--adapter", tmp_path / "out", "--system", "x", "5:")
    assert ran.code == 4 and "System role not supported" in ran.err


def test_a_template_that_merges_it_with_the_question(run_config: MakeConfig, tmp_path: Path, cli: Cli) -> None:
    template = tmp_path / "merging.jinja"
    template.write_text(MERGING)
    section = {"train": str(write_rows(tmp_path / "max.jsonl", rows())), "chat_template": str(template)}
    assert cli("train", run_config(data=section, training={"max_steps": 1}), "--allow-worse").code == 0
    found = [
        length(cli("generate", "--adapter", tmp_path / "out", *how, "5:", *TOO_MANY)) for how in ([], ["--no-system"])
    ]
    assert found[0] - found[1] == len(TEXT) + 2


# The card and what is shown


def test_commands_that_are_shown_run_as_they_are(
    run_config: MakeConfig, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ask a question of the rows; and the card does not contain the system message."""
    monkeypatch.chdir(tmp_path)
    train = str(write_rows(tmp_path / "max.jsonl", rows()))
    ran = cli("train", run_config(data={"train": train}, training={"max_steps": 1}), "--allow-worse")
    (command,) = (line.partition("loratune ")[2] for line in ran.out.splitlines() if "try it" in line)
    card = (tmp_path / "out" / "README.md").read_text()
    assert shlex.split(command) == ["generate", "--adapter", str(tmp_path / "out"), "0:"]
    assert "`loratune generate --adapter out 0:`" in card
    assert "Max" not in card and "All training rows had the same system message" in card
    again = cli(*shlex.split(command), *NEW)
    assert again.code == 0 and SHOWN in again.err
    row = {"messages": [user("a"), user("b"), {"role": "assistant", "content": "y"}]}
    train = str(write_rows(tmp_path / "turns.jsonl", [row] * 8))
    ran = cli("train", run_config(data={"train": train}, training={"max_steps": 1}), "--overwrite", "--allow-worse")
    (command,) = (line.partition("loratune ")[2] for line in ran.out.splitlines() if "try it" in line)
    assert command == f"chat --adapter {tmp_path / 'out'}" and cli(*shlex.split(command), *NEW, stdin="a\n").code == 0
    assert "system message" not in (tmp_path / "out" / "README.md").read_text()


# Strangers' adapters


@pytest.mark.parametrize(
    "value", [3, ["x"], {"a": 1}, True, "x" * ((1 << 20) + 1), "\ud800"], ids=lambda value: repr(value)[:9]
)
def test_a_recorded_value_that_is_no_text_is_refused(value: Any, adapter: Path, tmp_path: Path, cli: Cli) -> None:
    copy = changed(adapter, tmp_path, system=value)
    ran = cli("generate", "--adapter", copy, "5:")
    check_refused(ran, 5, (Code.ADAPTER_INVALID, str(copy / "loratune.json"), "system"))
    assert len(ran.err) < 1000
    for none in (None, ""):
        assert (
            "system message"
            not in cli("generate", "--adapter", changed(adapter, tmp_path, system=none), "5:", *NEW).err
        )


def test_a_recorded_text_is_shortened_and_escaped(adapter: Path, tmp_path: Path, cli: Cli) -> None:
    copy = changed(adapter, tmp_path, system="\x1b]0;title\x07https://me:secret@host/ \u202e" + "long " * 30)
    for ran in (
        cli("generate", "--adapter", copy, "5:", *NEW),
        cli("chat", "--adapter", copy, *NEW, stdin="5:"),
    ):
        (line,) = (line for line in ran.err.splitlines() if "system message" in line)
        assert ran.err.replace("\n", "").isprintable()
        assert line.isprintable() and len(line) < 150 and "secret" not in line and "…" in line
    huge = changed(adapter, tmp_path, system="x" * (1 << 20))
    ran = cli("generate", "--adapter", huge, "5:", *NEW)
    assert ran.code == 2 and "exceed the model's context" in ran.err


def test_the_beginning_of_a_text() -> None:
    assert (
        beginning(" a\n\tb ") == '"a b"' and beginning("a" * 70) == f'"{"a" * 60}…"' and beginning("\x1b") == '"\\x1b"'
    )


# Other programs


@pytest.mark.parametrize("system", [TEXT, 'He said "hi"', '"', " x\n", "{{ .System }} {x} 'y' \\n ünï"])
def test_the_modelfile_has_it(tokenizer: Any, system: str) -> None:
    from go_template import ollama_prompt, parse_modelfile  # noqa: PLC0415

    made = ollama.modelfile(Renderer(tokenizer), "model.gguf", chat=True, system=system)
    assert dict(parse_modelfile(made.text))["SYSTEM"] == system and "is in the Modelfile" in made.notes[-1]
    messages = [{"role": "system", "content": system}, user("q")]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ollama_prompt(made.text, messages[1:]) == expected


@pytest.mark.parametrize("system", ['a """quoted""" word', "a\u200db", "a\x07b"], ids=["quotes", "joiner", "bell"])
def test_what_a_modelfile_cannot_hold_is_said(tokenizer: Any, system: str) -> None:
    made = ollama.modelfile(Renderer(tokenizer), "model.gguf", chat=True, system=system)
    assert "SYSTEM" not in made.text and "not in the Modelfile" in made.notes[-1]


def test_the_modelfile_and_templates_that_change_it(tokenizer: Any) -> None:
    """One that strips it gets it stripped, and one that refuses it is given none."""
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message.content", "message.content | trim")
    made = ollama.modelfile(Renderer(tokenizer), "model.gguf", chat=True, system=" x\n")
    assert 'SYSTEM """x"""\n' in made.text
    tokenizer.chat_template = REFUSING + CHAT_TEMPLATE
    made = ollama.modelfile(Renderer(tokenizer), "model.gguf", chat=True, system="x")
    assert "SYSTEM" not in made.text and "not in the Modelfile" in made.notes[-1]


def test_other_exports_say_that_requests_need_it(adapter: Path, tmp_path: Path, cli: Cli) -> None:
    """The plain LoRA directory keeps it, so that loratune uses it there as well."""
    what = 'all training rows had the system message "You are Max. Be brief."; requests to the result need it too'
    ran = cli("export", "--adapter", adapter, "--to", "vllm", "--output", tmp_path / "vllm", "--no-verify")
    assert ran.code == 0 and what in ran.err, ran.err
    assert SHOWN in cli("generate", "--adapter", tmp_path / "vllm", "5:", *NEW).err
    assert what in cli("merge", "--adapter", adapter, "--output", tmp_path / "merged").err
