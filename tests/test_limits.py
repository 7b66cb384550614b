"""Tokenizers that fail on a text, or that have more tokens than the model."""

import json
import shutil
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
from loratune.data.rendering import Renderer
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
    template = LOOP + "{{ m.content }}{% if m.content == 'aaaa' %}{{ ('a' * 10 ** 16)|length }}{% endif %}{% endfor %}"
    with pytest.raises(DataError) as caught:
        Renderer(changed(tokenizer, chat_template=template)).row(CHAT)
    assert meanings(caught.value) == [(Code.TEMPLATE_INVALID, "rows:3", "")]


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
