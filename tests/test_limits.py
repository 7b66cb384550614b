"""Tokenizers that fail on a text, or that have more tokens than the model."""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from conftest import Ran, check_refused, meanings, write_rows
from running import MakeConfig
from test_rendering import changed
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loratune.cli.boundary import boundary
from loratune.codes import Code
from loratune.config import ModelSection
from loratune.data.formats import Conversation, Plain
from loratune.data.rendering import Renderer, sandbox
from loratune.errors import DataError, ModelError
from loratune.model.load import load_tokenizer

LOOP = "{% for m in messages %}"
CHAT = Conversation("rows:3", ({"role": "user", "content": "aaaa"}, {"role": "assistant", "content": "b"}))


def splitting(tokenizer: PreTrainedTokenizerFast, pattern: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, with a regular-expression pre-tokenizer in front."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), inner.pre_tokenizer]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def test_template_that_runs_out_of_memory_is_a_row_error(tokenizer: PreTrainedTokenizerFast) -> None:
    template = (
        LOOP + "{{ m.content }}{% if m.content == 'aaaa' %}{{ (m.content * 10 ** 16)|length }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError) as caught:
        Renderer(changed(tokenizer, chat_template=template)).row(CHAT)
    assert meanings(caught.value) == [(Code.TEMPLATE_INVALID, "rows:3", "")]


def test_an_error_without_a_message_has_a_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ROW_3.format("{{ '{:>99999999999999}'.format(m.content) }}")
    with pytest.raises(DataError, match="it needs more memory than there is"):
        Renderer(changed(tokenizer, chat_template=template)).row(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ m.content.__class__.__mro__ }}", "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ messages.append(m) }}", "{{ ('a'|attr('__class__'))() }}", "{{ range(10 ** 9)|list }}",
    ],
)  # fmt: skip
def test_templates_cannot_access_python_internals(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Nor can they change the messages. The error names the row."""
    once = f"{LOOP}{{{{ m.content }}}}{{% if m.content == 'aaaa' %}}{template}{{% endif %}}{{% endfor %}}"
    with pytest.raises(DataError, match="the chat template refuses these messages") as caught:
        Renderer(changed(tokenizer, chat_template=once)).row(CHAT)
    assert meanings(caught.value) == [(Code.TEMPLATE_INVALID, "rows:3", "")]


ROW_3 = "{{% for m in messages %}}{{{{ m.content }}}}{{% if m.content == 'aaaa' %}}{}{{% endif %}}{{% endfor %}}"
"""A template that does something for a row only."""


@pytest.mark.parametrize(
    "template",
    [
        "{{ (m.content * 6000000000)|length }}", "{{ 25001 * m.content }}", "{{ [m] * 10 ** 9 }}",
        "{{ m.content|length ** 1000000 }}", "{% set n = 2 ** 40000 %}{{ n * n * n }}",
    ],
)  # fmt: skip
def test_products_and_powers_of_templates_are_bounded(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """As `range` is: an operation cannot be interrupted. Memory for the largest of them would be there."""
    renderer = Renderer(changed(tokenizer, chat_template=ROW_3.format(template)))
    with pytest.raises(DataError, match=r"the chat template refuses these messages: .* too large") as caught:
        renderer.prompt(CHAT.messages, where="rows:3")
    assert meanings(caught.value) == [(Code.TEMPLATE_INVALID, "rows:3", "")]
    with pytest.raises(DataError, match="too large"):
        renderer.row(CHAT)


@pytest.mark.parametrize(
    "template", ["{{ 'x' * 6000000000 }}", "{{ ('x' * 6000000000)|length }}", "{% set n = 9 ** 99999 %}"]
)
def test_large_constants_of_templates_are_refused(
    template: str, tiny_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Jinja computes them as it compiles a template, also where no row does."""
    source = ROW_3.replace("aaaa", "no row").format(template)
    (tmp_path / "large.jinja").write_text(source)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_dir)), str(tmp_path / "large.jinja"))
    with pytest.raises(ModelError, match="too large") as caught:
        Renderer(tokenizer).row(CHAT)
    assert meanings(caught.value) == [(Code.TEMPLATE_INVALID, str(tiny_dir), "data.chat_template")]


def test_templates_may_use_small_sizes(tokenizer: PreTrainedTokenizerFast) -> None:
    source = ROW_3.format(
        "{{ '-' * 80 }}{{ [1, 2] * 3 }}{{ '%5d|%s 100%%' % (3, m.content) }}{{ 'a'.ljust(3) ~ 'b'|center(5) }}"
        "{{ 2.5 * 4 }}{{ 7 % 4 }}{{ 2 ** 0.5 }}{{ 2 ** -1 }}{{ 1234567 * 7654321 }}{{ '%s'|format('x') }}"
        "{{ {'n': 1}|tojson(indent=2) }}{{ 2.345|round(2) }}{{ '{:>4}'.format(1000000) }}"
    )
    renderer = Renderer(changed(tokenizer, chat_template=source))
    expected = renderer.tokenizer.apply_chat_template([*CHAT.messages], tokenize=False)
    assert "-" * 80 in expected and renderer.prompt_text(CHAT.messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
    ],
    ids=["loops", "macros"],
)
def test_a_long_rendering_is_noted_and_interrupted(
    template: str, tmp_path: Path, cli: Callable[..., Ran], run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "PATIENCE", 0.3)
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("a", "aaaa")]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "b"})
    (tmp_path / "endless.jinja").write_text(ROW_3.format(template))
    data = {"train": str(write_rows(tmp_path / "chats.jsonl", rows)), "chat_template": str(tmp_path / "endless.jinja")}
    config, over = run_config(data=data), threading.Event()
    main = threading.main_thread().ident or 0

    def interrupt() -> None:
        """Send a Ctrl-C after the template has been running for two seconds."""
        started = 0.0
        while not over.wait(0.05):
            names = {frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._current_frames()[main])}
            started = (started or time.monotonic()) if "<template>" in names else 0.0
            if started and time.monotonic() > started + 2:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    ran = cli("train", config, "--dry-run")
    over.set()
    watcher.join(60)
    assert ran.code == 130
    lines = [line for line in ran.err.splitlines() if "is still rendering" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'chats.jsonl'}:2: the chat template of ")


def test_filters_take_large_numbers_as_values(tokenizer: PreTrainedTokenizerFast) -> None:
    template = LOOP + "<|{{ m.role }}|>{{ m.content }}{{ 1500000|tojson }}{{ m.number|tojson }}<|end|>{% endfor %}"
    messages = tuple(message | {"number": 10**9} for message in CHAT.messages)
    rendered = Renderer(changed(tokenizer, chat_template=template)).row(Conversation("rows:3", messages))
    assert tokenizer.decode(rendered.ids).count("15000001000000000") == 2


def test_templates_may_use_small_powers(tokenizer: PreTrainedTokenizerFast) -> None:
    template = LOOP + "<|{{ m.role }}|>{{ m.content }}{{ 2 ** 10 }}<|end|>{% endfor %}"
    row = Renderer(changed(tokenizer, chat_template=template)).row(CHAT)
    assert "b1024" in tokenizer.decode(row.completion)


def test_tokenizer_failure_on_a_row_is_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its error is not a subclass of Exception. The error names the row."""
    renderer = Renderer(splitting(tokenizer, "(a+)+$"))
    rows = [Plain("rows:1", "a", "b"), Plain("rows:2", "c", "a" * 40 + "b")]
    with pytest.raises(DataError, match=r"retry-limit-in-match over") as caught:
        renderer.rows(rows)
    assert meanings(caught.value) == [(Code.TOKENIZER_UNUSABLE, "rows:2", "")]
    with pytest.raises(DataError) as caught:
        renderer.prompt("a" * 40 + "b", "asked:1")
    assert meanings(caught.value) == [(Code.TOKENIZER_UNUSABLE, "asked:1", "")]
    assert len(renderer.rows(rows[:1])) == 1


@pytest.fixture
def larger(tiny_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """A model directory whose tokenizer has more tokens than the model: `larger(special)` returns its path."""

    def make(**special: str) -> Path:
        path = tmp_path / "larger"
        shutil.copytree(tiny_dir, path)
        more = changed(tokenizer, chat_template=tokenizer.chat_template)
        more.add_tokens([f"<more{number}>" for number in range(6)])
        if special:
            more.add_special_tokens(special)
        more.save_pretrained(path)
        return path

    return make


def test_row_with_a_token_id_beyond_the_embedding_is_refused(
    larger: Callable[..., Path], run_config: MakeConfig, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """Train, generate and evaluate name the row and the token."""
    path = larger()
    config = run_config(model={"name_or_path": str(path)}, training={"max_steps": 1})
    assert cli("train", config).code == 0  # the rows have none of those tokens
    prompts = ("a", "a <more5>")
    rows = write_rows(tmp_path / "beyond.jsonl", [{"prompt": prompt, "completion": "b"} for prompt in prompts])
    message = "the token '<more5>' has the id 266, but the model has 264 embeddings, from 0 on"
    other = run_config(
        "b.yaml", model={"name_or_path": str(path)}, data={"train": str(rows)}, output_dir=str(path / "b")
    )
    done = cli("train", other)
    check_refused(done, 3, (Code.TOKENIZER_UNUSABLE, f"{rows}:2", ""))
    assert message in done.err
    done = cli("generate", "--adapter", tmp_path / "out", "a <more5>")
    check_refused(done, 3, (Code.TOKENIZER_UNUSABLE, "", ""))
    assert message in done.err
    done = cli("evaluate", "--adapter", tmp_path / "out", "--data", rows)
    check_refused(done, 3, (Code.TOKENIZER_UNUSABLE, f"{rows}:2", ""))
    assert message in done.err


def test_only_the_first_token_id_beyond_the_embedding_is_reported(larger: Callable[..., Path]) -> None:
    renderer = Renderer(load_tokenizer(ModelSection(name_or_path=str(larger()))), 264)
    rows = [Plain(f"rows:{number}", "a <more5>", "b") for number in range(1, 13)]
    with pytest.raises(ModelError) as caught:
        renderer.rows([*rows, Plain("rows:13", "", "<more4>")])
    assert meanings(caught.value) == [(Code.TOKENIZER_UNUSABLE, "rows:1", "")]
    (first,) = caught.value.problems
    assert first.what.startswith("the token '<more5>'")


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_special_token_id_beyond_the_embedding_is_refused(
    name: str, larger: Callable[..., Path], run_config: MakeConfig, cli: Callable[..., Ran]
) -> None:
    path = larger(**{name: "<more5>"})
    done = cli("train", run_config(model={"name_or_path": str(path)}))
    check_refused(done, 3, (Code.TOKENIZER_UNUSABLE, str(path), ""))
    assert "the token '<more5>' has the id 266, but the model has 264 embeddings" in done.err


def test_tokenizer_that_fails_on_every_text_is_a_model_error(
    tiny_dir: Path, run_config: MakeConfig, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """Its error is not a subclass of Exception. Exit code 3, as the tokenizer is at fault."""
    path = tmp_path / "broken"
    shutil.copytree(tiny_dir, path)
    definition = json.loads((path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"(.|\s|\S)+[^\s\S]"}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, definition["pre_tokenizer"]]}
    (path / "tokenizer.json").write_text(json.dumps(definition))
    done = cli("train", run_config(model={"name_or_path": str(path)}))
    check_refused(done, 3, (Code.TOKENIZER_UNUSABLE, str(path), ""))
    assert "the tokenizer fails: Onig" in done.err and "Traceback" not in done.err


def test_rust_panic_is_reported_in_one_line(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """An uncaught panic is handled at the program's top level."""
    with pytest.raises(typer.Exit) as caught, boundary(False):
        splitting(tokenizer, "(a+)+$").backend_tokenizer.encode("a" * 40 + "b")
    assert caught.value.exit_code == 1
    assert "error: unexpected PanicException: Onig: " in capsys.readouterr().err


def test_vocabulary_with_a_huge_token_id_needs_little_memory(tiny_dir: Path, tmp_path: Path) -> None:
    """Nothing is allocated per id below it. The token is reported if a row contains it."""
    path = tmp_path / "huge"
    shutil.copytree(tiny_dir, path)
    definition = json.loads((path / "tokenizer.json").read_text())
    definition["model"]["vocab"]["z"] = 2**32 - 1
    (path / "tokenizer.json").write_text(json.dumps(definition))
    renderer = Renderer(load_tokenizer(ModelSection(name_or_path=str(path))), 264)
    before = Path("/proc/self/statm").read_text().split()[0]
    row = renderer.row(Plain("rows:1", "", "ab " * 100_000))
    assert len(row.ids) == 300_001
    assert (int(Path("/proc/self/statm").read_text().split()[0]) - int(before)) * 4096 < 1 << 30
    with pytest.raises(ModelError, match=r"^rows:2: the token 'z' has the id 4294967295, but the model has 264"):
        renderer.row(Plain("rows:2", "", "az" * 100_000))
