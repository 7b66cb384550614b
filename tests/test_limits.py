"""Chat templates and tokenizers that run for ever, take all memory, give up, or know more tokens than the model."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from conftest import Ran, check_refused, meanings, write_rows
from running import MakeConfig
from test_rendering import changed
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.commands.boundary import boundary
from loratune.config import ModelSection
from loratune.data.formats import Conversation, Plain
from loratune.data.rendering import Renderer
from loratune.errors import DataError, ModelError
from loratune.model.load import load_tokenizer
from loratune.system import sandbox
from loratune.system.sandbox import LimitExceededError, Sandbox, run_with_time_limit

LOOP = "{% for m in messages %}"
CHAT = Conversation("rows:3", ({"role": "user", "content": "aaaa"}, {"role": "assistant", "content": "b"}))

PLACES = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "scripts")]
# Each of these leaves a thread behind that works until the process ends, so they have a process of their own.
FOREVER = """
import sys
sys.path[:0] = PLACES
from loratune.system import sandbox
sandbox.SECONDS = 1
from test_limits import CHAT, LOOP, splitting
from test_rendering import changed
from fuzz import byte_level
from loratune.data.formats import Plain
from loratune.data.rendering import Renderer
tokenizer = byte_level()
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
FOREVER += "{% endfor %}"
def report(work):
    try:
        work()
    except Exception as error:
        (problem,) = error.problems
        print(type(error).__name__, problem.code, problem.where, problem.key, problem.what, sep="|", flush=True)
always = changed(tokenizer, chat_template=LOOP + "{{ m.content }}{% endfor %}" + FOREVER)
report(lambda: Renderer(always))
once = LOOP + "{% if m.content == 'aaaa' %}" + FOREVER + "{% endif %}{{ m.content }}{% endfor %}"
report(lambda: Renderer(changed(tokenizer, chat_template=once)).row(CHAT))
report(lambda: Renderer(changed(tokenizer, chat_template=once)).prompt(CHAT.messages[:1], "asked:1"))
slow = splitting(tokenizer, r"\\w+?(?<=b)")
report(lambda: Renderer(slow).rows([Plain("rows:1", "a", "b"), Plain("rows:2", "a" * 60_000, "b")]))
sys.exit()
""".replace("PLACES", repr(PLACES))


def splitting(tokenizer: PreTrainedTokenizerFast, pattern: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, which splits at a pattern first."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), inner.pre_tokenizer]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def test_what_runs_for_ever(forked: Callable[..., Ran]) -> None:
    """Row 87: named with the row, whether a template or a regular expression."""
    done = forked(first=FOREVER)
    assert done.code == 0, done.err
    always, once, asked, slow = done.out.splitlines()
    endless = "data.chat_template|the chat template takes longer than 1 s"
    assert always == f"ModelError|{Code.TEMPLATE_BEYOND_LIMIT}||{endless}"
    assert once == f"ModelError|{Code.TEMPLATE_BEYOND_LIMIT}|rows:3|{endless}"
    assert asked == f"ModelError|{Code.TEMPLATE_BEYOND_LIMIT}|asked:1|{endless}"
    assert slow.startswith(f"ModelError|{Code.TOKENIZER_FAILS}|rows:2||the tokenizer takes longer than ")


def test_a_template_that_takes_all_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows 63 and 87: the template is named, and no batch size; for any messages, or for those of one row."""
    grown = "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    with pytest.raises(ModelError, match=r"needs more than 2.0 GiB of memory") as caught:
        Renderer(changed(tokenizer, chat_template=f"{LOOP}{{{{ m.content }}}}{{% endfor %}}{grown}"))
    assert meanings(caught.value) == [(Code.TEMPLATE_BEYOND_LIMIT, "", "data.chat_template")]
    once = f"{LOOP}{{% if m.content == 'aaaa' %}}{grown}{{% endif %}}{{{{ m.content }}}}{{% endfor %}}"
    with pytest.raises(ModelError, match=r"needs more than 2.0 GiB of memory") as caught:
        Renderer(changed(tokenizer, chat_template=once)).row(CHAT)
    assert meanings(caught.value) == [(Code.TEMPLATE_BEYOND_LIMIT, "rows:3", "data.chat_template")]


GREEDY = {
    "a product": "{% set n = namespace(s=9999999) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "a power": "{% set n = namespace(s=10) %}{% for i in range(9) %}{% set n.s = n.s ** 10 %}{% endfor %}",
    "a constant power": "{{ 10 ** (10 ** 10) }}",
    "a division": "{% set n = namespace(s=9) %}{% for i in range(27) %}{% set n.s = n.s * n.s %}{% endfor %}"
    "{% set x = (n.s * n.s + 1) // n.s %}",
    "a comparison": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "a text of lists": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}",
    "repetition": "{{ ('a' * 10 ** 10)|length }}",
    "a filter": "{{ 'a'|center(10 ** 10) }}",
    "a format": "{{ '%10000000000d'|format(1) }}",
    "a method": "{{ '{:>10000000000}'.format('a') }}",
    "replacement": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s|replace('a', 'a' * 99) %}"
    "{% endfor %}",
    "a list": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a list repeated": "{{ ([1] * 10 ** 10)|length }}",
    "joining": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = [n.s, n.s, n.s]|join %}{% endfor %}",
    "tuples": "{% set n = namespace(a=(1,)) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}{% endfor %}"
    "{{ {n.a: 1} }}",
}
"""What C code does without giving another thread, or a handler of signals, a turn."""


SOME = ("a product", "a constant power", "repetition")
"""One for each way to reach a limit: time, while compiling and while rendering, and memory."""


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in GREEDY if name not in SOME)]
)
def test_what_keeps_the_interpreter(
    name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any messages, and for those of one row; the rows before and after are as they were."""
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    limit = r"takes longer than 1 s|needs more than 2.0 GiB of memory"
    shows = f"{LOOP}{{{{ m.content }}}}{{% endfor %}}"
    with pytest.raises(ModelError, match=limit) as caught:
        Renderer(changed(tokenizer, chat_template=shows + GREEDY[name]))
    assert meanings(caught.value) == [(Code.TEMPLATE_BEYOND_LIMIT, "", "data.chat_template")]
    once = f"{{% if messages[0].content == 'aaaa' %}}{GREEDY[name]}{{% endif %}}{shows}"
    if "constant" in name:  # jinja2 computes it as it compiles
        return
    renderer = Renderer(changed(tokenizer, chat_template=once))
    other = Conversation("rows:2", ({"role": "user", "content": "c"}, *CHAT.messages[1:]))
    before = renderer.row(other)
    with pytest.raises(ModelError, match=limit) as caught:
        renderer.rows([other, CHAT, other])
    assert meanings(caught.value) == [(Code.TEMPLATE_BEYOND_LIMIT, "rows:3", "data.chat_template")]
    assert renderer.row(other) == before


STOPPED = """
import os, signal, sys, threading
sys.path[:0] = PLACES
from test_limits import GREEDY, LOOP
from test_rendering import changed
from fuzz import byte_level
from loratune.system import sandbox
from loratune.commands.boundary import boundary
from loratune.config import ModelSection
from loratune.data.rendering import Renderer
threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
with boundary(False):
    Renderer(changed(byte_level(), chat_template=LOOP + "{% endfor %}" + GREEDY["a product"]))
""".replace("PLACES", repr(PLACES))


def test_a_template_without_end_is_stopped(forked: Callable[..., Ran]) -> None:
    """A signal ends the command at once, and no process stays behind."""
    done = forked(first=STOPPED)
    assert "error: terminated" in done.err and "longer" not in done.err, done.err


def test_a_template_may_raise_to_powers(tokenizer: PreTrainedTokenizerFast) -> None:
    template = LOOP + "<|{{ m.role }}|>{{ m.content }}{{ 2 ** 10 }}<|end|>{% endfor %}"
    row = Renderer(changed(tokenizer, chat_template=template)).row(CHAT)
    assert "b1024" in tokenizer.decode(row.completion)


def deep(pids: object) -> None:
    """Ends the process in which it is called."""
    os.kill(os.getpid(), signal.SIGSEGV)


def big(pids: object, count: int) -> int:
    """The size of a text of so many bytes."""
    return len(bytearray(count))


def test_work_in_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returns and raises; processes that end with work and without; none are left."""
    box = Sandbox(lambda timer: [os.getpid()])
    first = box(list.copy, 1 << 30)
    assert first == box(list.copy, 1 << 30) != [os.getpid()]
    with pytest.raises(IndexError):
        box(list.__getitem__, 1 << 30, 5)
    with pytest.raises(LimitExceededError, match=r"needs more than 1\.0 GiB of memory"):
        box(big, 1 << 30, 2 << 30)
    assert box(big, 3 << 30, 2 << 30) == 2 << 30
    with pytest.raises(LimitExceededError, match=r"ends its process \(SIGSEGV\)"):
        box(deep, 1 << 30)
    monkeypatch.setattr(sandbox, "_IDLE", 0.1)
    idle = box(list.copy, 1 << 30)
    time.sleep(1)
    again = box(list.copy, 1 << 30)  # it has ended, and another one is started
    assert len({*first, *idle, *again}) == 3
    other = Sandbox(lambda timer: [os.getpid()])
    again = other(list.copy, 1 << 30)
    del other
    with pytest.raises(ProcessLookupError):
        os.kill(again[0], 0)


def test_a_tokenizer_that_gives_up_on_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its error is no Exception; the row is named."""
    renderer = Renderer(splitting(tokenizer, "(a+)+$"))
    rows = [Plain("rows:1", "a", "b"), Plain("rows:2", "c", "a" * 40 + "b")]
    with pytest.raises(DataError, match=r"retry-limit-in-match over") as caught:
        renderer.rows(rows)
    assert meanings(caught.value) == [(Code.TOKENIZER_FAILS_ON_ROW, "rows:2", "")]
    with pytest.raises(DataError) as caught:
        renderer.prompt("a" * 40 + "b", "asked:1")
    assert meanings(caught.value) == [(Code.TOKENIZER_FAILS_ON_ROW, "asked:1", "")]
    assert len(renderer.rows(rows[:1])) == 1


def test_what_the_work_raises_is_raised() -> None:
    def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_with_time_limit(work)
    assert run_with_time_limit(lambda: 3) == 3


def test_a_template_without_end_in_train(forked: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path) -> None:
    """As the user sees it: exit code 3, one line."""
    template = tmp_path / "endless.jinja"
    nested = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    template.write_text(f"{LOOP}{{{{ m.content }}}}{{% if m.role == 'assistant' %}}{nested}{{% endif %}}{{% endfor %}}")
    rows = write_rows(tmp_path / "chat.jsonl", [{"messages": list(CHAT.messages)}])
    config = run_config(data={"train": str(rows), "chat_template": str(template)})
    assert sandbox.SECONDS == 20
    done = forked("train", config, first="from loratune.system import sandbox\nsandbox.SECONDS = 1")
    check_refused(done, 3, (Code.TEMPLATE_BEYOND_LIMIT, "", "data.chat_template"))
    assert "takes longer than 1 s" in done.err.splitlines()[-1] and "Traceback" not in done.err


@pytest.fixture
def larger(tiny_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """A model directory whose tokenizer has more tokens than the model: `larger(special)` → its path."""

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


def test_a_row_with_a_token_beyond_the_embedding(
    larger: Callable[..., Path], run_config: MakeConfig, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """Row 85: row and token are named, in train, generate and evaluate."""
    path = larger()
    config = run_config(model={"name_or_path": str(path)}, training={"max_steps": 1})
    assert cli("train", config).code == 0  # the rows have none of those tokens
    prompts = ("a", "a <more5>")
    rows = write_rows(tmp_path / "beyond.jsonl", [{"prompt": prompt, "completion": "b"} for prompt in prompts])
    message = (
        "the token '<more5>' has the id 266, but the model has 264 embeddings, from 0 on; the tokenizer has 267 tokens"
    )
    other = run_config(
        "b.yaml", model={"name_or_path": str(path)}, data={"train": str(rows)}, output_dir=str(path / "b")
    )
    done = cli("train", other)
    check_refused(done, 3, (Code.TOKENIZER_ID_BEYOND_MODEL, f"{rows}:2", ""))
    assert message in done.err
    done = cli("generate", "--adapter", tmp_path / "out", "a <more5>")
    check_refused(done, 3, (Code.TOKENIZER_ID_BEYOND_MODEL, "", ""))
    assert message in done.err
    done = cli("evaluate", "--adapter", tmp_path / "out", "--data", rows)
    check_refused(done, 3, (Code.TOKENIZER_ID_BEYOND_MODEL, f"{rows}:2", ""))
    assert message in done.err


def test_a_token_beyond_the_embedding_is_reported_once(larger: Callable[..., Path]) -> None:
    renderer = Renderer(load_tokenizer(ModelSection(name_or_path=str(larger()))), 264)
    rows = [Plain(f"rows:{number}", "a <more5>", "b") for number in range(1, 13)]
    with pytest.raises(ModelError) as caught:
        renderer.rows([*rows, Plain("rows:13", "", "<more4>")])
    first, second = caught.value.problems
    assert meanings(caught.value) == [
        (Code.TOKENIZER_ID_BEYOND_MODEL, "rows:1", ""), (Code.TOKENIZER_ID_BEYOND_MODEL, "rows:13", "")
    ]  # fmt: skip
    assert first.what.startswith("the token '<more5>'") and first.what.endswith("; 11 more rows have it")
    assert second.what.startswith("the token '<more4>'") and second.what.endswith("has 267 tokens")


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_special_token_beyond_the_embedding(
    name: str, larger: Callable[..., Path], run_config: MakeConfig, cli: Callable[..., Ran]
) -> None:
    path = larger(**{name: "<more5>"})
    done = cli("train", run_config(model={"name_or_path": str(path)}))
    check_refused(done, 3, (Code.TOKENIZER_ID_BEYOND_MODEL, str(path), ""))
    assert "the token '<more5>' has the id 266, but the model has 264 embeddings" in done.err


def test_a_tokenizer_that_gives_up_on_any_text(
    tiny_dir: Path, run_config: MakeConfig, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """Its error is no Exception, and the fault is the tokenizer's: exit code 3."""
    path = tmp_path / "broken"
    shutil.copytree(tiny_dir, path)
    definition = json.loads((path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"(.|\s|\S)+[^\s\S]"}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, definition["pre_tokenizer"]]}
    (path / "tokenizer.json").write_text(json.dumps(definition))
    done = cli("train", run_config(model={"name_or_path": str(path)}))
    check_refused(done, 3, (Code.TOKENIZER_FAILS, str(path), ""))
    assert "the tokenizer fails: Onig" in done.err and "Traceback" not in done.err


def test_a_panic_anywhere_is_one_line(tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing else catches it, the program's boundary does."""
    with pytest.raises(typer.Exit) as caught, boundary(False):
        splitting(tokenizer, "(a+)+$").backend_tokenizer.encode("a" * 40 + "b")
    assert caught.value.exit_code == 1
    assert "error: unexpected PanicException: Onig: " in capsys.readouterr().err


def replacing(pattern: str, content: str, kind: str = "String") -> dict[str, object]:
    """A step of a tokenizer that replaces a text, or what an expression matches."""
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def in_order(kind: str, *steps: object) -> dict[str, object]:
    """Steps one after another. kind: under which name they stand."""
    return {"type": "Sequence", kind: steps}


PIECE = {"SpecialToken": {"id": "A", "type_id": 0}}
GROWING = {
    "a long text": (
        {"normalizer": replacing("a", "b" * 2_000_000)},
        "the normalizer Replace of the tokenizer makes up to 2,000,000 characters of one",
    ),
    "an expression": ({"normalizer": replacing("", "b" * 20_000, "Regex")}, "up to 20,001 characters of one"),
    "many": ({"normalizer": in_order("normalizers", *[replacing("a", "aa")] * 40)}, "(Replace) together make up to"),
    "bytes": ({"normalizer": in_order("normalizers", *[{"type": "ByteLevel"}] * 40)}, "(ByteLevel) together make"),
    "before": ({"normalizer": {"type": "Prepend", "prepend": "x" * 5000}}, "adds up to 5,000 characters"),
    "decoder": (
        {"decoder": in_order("decoders", replacing("a", "b" * 20_000))},
        "the decoder Replace of the tokenizer",
    ),
    "post-processor": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [PIECE] * 5000,
                "pair": [],
                "special_tokens": {"A": {"id": "A", "ids": [1] * 5000, "tokens": ["x"] * 5000}},
            }
        },
        "the post-processor TemplateProcessing of the tokenizer adds up to 25,000,000 characters",
    ),
}


@pytest.mark.parametrize(("parts", "message"), GROWING.values(), ids=GROWING)
def test_a_tokenizer_that_makes_texts_grow(
    parts: dict[str, object], message: str, tiny_dir: Path, tmp_path: Path
) -> None:
    """Before any text is given to it: the library takes all memory, or aborts, which nothing can catch."""
    path = tmp_path / "growing"
    shutil.copytree(tiny_dir, path)
    definition = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(definition | parts))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelSection(name_or_path=str(path)))
    assert meanings(caught.value) == [(Code.MODEL_TOKENIZER_GROWTH, str(path), "")]
    assert message in str(caught.value)


def test_a_vocabulary_with_a_huge_id(tiny_dir: Path, tmp_path: Path) -> None:
    """Nothing is made for each id below it; the token is named where a row has it."""
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
