"""Tokenizing and masking: turns an Example into `input_ids` and `labels`, for training, evaluation and generation.

A prompt is rendered identically in `generate` and in training, and its ids are a prefix of the ids of the training row.
If the tokenizer merges characters across that boundary, prompt and answer are encoded separately.
"""

import datetime
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import jinja2
import tokenizers
import transformers

from loratune.codes import Code
from loratune.data.formats import Conversation, Example, Ids, Message, Plain, Span
from loratune.data.rendering.chat_template import ChatTemplate, TemplateInput
from loratune.data.rendering.spans import RenderedText, TokenizedRow, check_tools_are_shown, render_conversation
from loratune.data.sources.rows import reported
from loratune.data.upstream import tokenizer_settings
from loratune.errors import DataError, ModelError, Problem, is_rust_panic

_BATCH = 2**18
"""Characters that are encoded in one call: the tokenizer needs a few hundred bytes of memory per character."""
LONG = 2**20
"""A text of more characters, such as a file of one document, is encoded in pieces of at most `_BATCH`."""

_TAIL = 160  # characters at the end of a prompt that are encoded once more together with what follows it
_PROBE = " Ünder 12 345\n\n\tx()  🙂 don't"
_WORD_BORDER = re.compile(r"(?<=\w)(?= \w)")
_LINE_BORDER = re.compile(r"(?<=\S)\n(?=\S)")


class TokenizerFailure(Exception):
    """The tokenizer fails on a text."""

    def __init__(self, text: str, reason: str):
        super().__init__(f"fails: {reason}")
        self.text = text


class Renderer:
    """Renders examples with one tokenizer; `end_ids` are the ids that end an answer."""

    def __init__(self, tokenizer: Any, vocabulary_size: int | None = None):
        """Test the tokenizer and its chat template.

        Args:
            tokenizer: A tokenizer of transformers, fast or slow.
            vocabulary_size: The number of embeddings of the model; None if there is no model to compare with.

        Raises:
            ModelError: The tokenizer has no end of sequence, or fails; it has more special tokens than the model.
        """
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise ModelError(Problem(Code.TOKENIZER_UNUSABLE, "the tokenizer has no end-of-sequence token", name))
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self._size = vocabulary_size
        try:
            self._encode = Encoder(tokenizer)
            self._template = ChatTemplate(tokenizer)
            turn_ids = [id for token in self._template.end_tokens for id in self._encode.one(token)[-1:]]
            bos = self._bos = tokenizer.bos_token_id
            self.starts_with_bos = bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]
        except TokenizerFailure as error:
            raise ModelError(Problem(Code.TOKENIZER_UNUSABLE, f"the tokenizer {error}", name)) from None
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos, *turn_ids]))
        special = [self.eos, *turn_ids, tokenizer.pad_token_id or 0]
        self._check_ids([("", special)])

    def rows(self, examples: Sequence[Example], loss_on: str = "completion") -> list[TokenizedRow]:
        """Render examples in order, without truncation, encoded as one batch.

        Args:
            examples: Texts, conversations, and ids, which are not changed.
            loss_on: As in the configuration.

        Raises:
            DataError: Lists the first 10 rows that cannot be rendered: there is no supervised turn; the chat template
                refuses the messages, omits a supervised answer, or does not show where an answer begins and ends; the
                tokenizer fails on a row.
            ModelError: There is no chat template; an id has no embedding in the model.
        """
        rendered = self._texts(examples, loss_on)
        texts = [text for text in rendered if isinstance(text, RenderedText)]
        try:
            encoded = self._encode_texts(texts, loss_on)
        except TokenizerFailure as error:
            where = next((text.where for text in texts if error.text in text.text), "")
            raise _tokenizer_error(error, where) from None
        self._check_ids([(row.where, row.ids) for row in encoded])
        rows = iter(encoded)
        return [next(rows) if isinstance(row, RenderedText) else row for row in rendered]

    def row(self, example: Example, loss_on: str = "completion") -> TokenizedRow:
        """Render one example; see `rows`."""
        return self.rows([example], loss_on)[0]

    def prompt(
        self, prompt: str | Sequence[Message], where: str = "prompt", tools: Sequence[Any] = ()
    ) -> tuple[int, ...]:
        """Render a prompt, raw text or messages, to the ids that precede an answer.

        Raises:
            ModelError, DataError: As in `rows`.
        """
        try:
            if isinstance(prompt, str):
                ids = self._encode.one(prompt)
                ids = [*self._bos_before(ids), *ids]
            else:
                ids = self._encode.one(self.prompt_text(prompt, tools, where))
        except TokenizerFailure as error:
            raise _tokenizer_error(error, where) from None
        self._check_ids([(where, ids)])
        return tuple(ids)

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Any] = (), where: str = "messages") -> str:
        """The text of a prompt of messages. Raises DataError: the chat template refuses it, or omits the tools."""
        chat = TemplateInput(messages, tools, where)
        check_tools_are_shown(self._template, chat)
        return self._template.text(chat, prompt=True)

    def user_header(self) -> tuple[int, ...]:
        """The ids after which a chat model writes a user's turn; of a model without a template, its first token."""
        return tuple(self._encode.one(self._template.user_header())) or (self.eos if self._bos is None else self._bos,)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what determines the ids apart from the code: tokenizer, special tokens, template, libraries.

        It includes the date if the template writes the date.
        """
        tokenizer, template = self.tokenizer, str(self.tokenizer.chat_template)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            inner = tokenizer.backend_tokenizer.to_str()
        else:
            inner = repr(
                (type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer_settings(tokenizer))
            )
        date = datetime.date.today().isoformat() if "strftime_now" in template else ""
        versions = (transformers.__version__, tokenizers.__version__, jinja2.__version__)
        parts = (inner, template, date, repr(sorted(tokenizer.special_tokens_map.items())), repr(versions))
        return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()

    def remark_on_bos(self, ids: Sequence[int]) -> str | None:
        """Returns a line if a row does not begin with exactly one BOS, although the tokenizer adds one; else None."""
        count = next((place for place, id in enumerate(ids) if id != self._bos), len(ids))
        if not self.starts_with_bos or count == 1:
            return None
        name = self.tokenizer.bos_token
        return f"rows begin with{f' {count} x {name}' if count else f'out {name}, which the tokenizer writes'}"

    def _bos_before(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Returns the BOS to prepend, if the tokenizer adds one and these ids do not begin with it."""
        return (self._bos,) if self.starts_with_bos and [*ids[:1]] != [self._bos] else ()

    @cached_property
    def _has_ids_beyond_model(self) -> bool:
        """Whether the tokenizer has ids without an embedding in the model, so every row must be checked."""
        return self._size is not None and max(self.tokenizer.get_vocab().values()) >= self._size

    def _check_ids(self, rows: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Raises ModelError: an id has no embedding in the model. rows: places and ids."""
        if not self._has_ids_beyond_model or self._size is None:
            return
        for where, ids in rows:
            if (beyond := next((id for id in ids if id >= self._size), None)) is not None:
                token = self.tokenizer.convert_ids_to_tokens(beyond)
                what = f"the token {token!r} has the id {beyond}, but the model has {self._size} embeddings, from 0 on"
                where, fix = where or self.tokenizer.name_or_path, "use the tokenizer that belongs to the model"
                raise ModelError(Problem(Code.TOKENIZER_UNUSABLE, what, where, fix=fix))

    def _texts(self, examples: Sequence[Example], loss_on: str) -> list[RenderedText | TokenizedRow]:
        """Returns the texts of examples, and the rows of those that are ids already. Raises DataError."""
        texts: list[RenderedText | TokenizedRow] = []
        problems: list[Problem] = []
        for example in examples:
            if isinstance(example, Ids):
                texts.append(TokenizedRow.from_ids(example.where, example.ids, example.labels))
            elif isinstance(example, Plain):
                text, border = example.prompt + example.completion, len(example.prompt)
                spans, has_prompt = ((border, len(text)),), not example.whole
                texts.append(RenderedText(example.where, text, border, spans, templated=False, has_prompt=has_prompt))
            elif isinstance(example, Conversation):
                try:
                    texts.append(self._conversation(example, loss_on))
                except DataError as error:
                    problems += error.problems
        if problems:
            raise DataError(reported(problems))
        return texts

    def _conversation(self, chat: Conversation, loss_on: str) -> RenderedText:
        """Render a conversation. Raises DataError."""
        supervised: Sequence[int] = chat.supervised_turns(loss_on)
        if loss_on == "all":
            answers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
            supervised = answers[-1:]
        if not supervised:
            what = "no assistant turn is supervised"
            raise DataError(Problem(Code.DATA_FIELD, what, chat.where))
        return render_conversation(self._template, TemplateInput(chat.messages, chat.tools, chat.where), supervised)

    def _encode_texts(self, texts: Sequence[RenderedText], loss_on: str) -> list[TokenizedRow]:
        """Encode texts so that span boundaries are token boundaries."""
        pairs = self._encode.pairs([(text.text[: text.prompt], text.text[text.prompt :]) for text in texts])
        pieces_of = [_inner_pieces(text) for text in texts]
        encoded = iter(self._encode([piece for pieces in pieces_of for piece in pieces]))
        rows = []
        for text, (prompt, ids), pieces in zip(texts, pairs, pieces_of, strict=True):
            ids_of_pieces = [next(encoded) for _ in pieces]
            places = self._token_borders(text, pieces, ids_of_pieces, ids) if pieces else {}
            places |= {text.prompt: prompt, len(text.text): len(ids)}
            spans = [(places[start], places[end]) for start, end in text.spans]
            rows.append(self._finish(text, ids, spans, prompt, loss_on))
        return rows

    def _token_borders(
        self, text: RenderedText, pieces: Sequence[str], ids_of_pieces: Sequence[Sequence[int]], ids: list[int]
    ) -> dict[int, int]:
        """Returns the character offset → token offset of each boundary between the pieces.

        If a token crosses a boundary, the offset is after the token at the start of a span, and before it at the end.
        """
        characters = [*accumulate(map(len, pieces))][:-1]
        borders = [*accumulate(map(len, ids_of_pieces))][:-1]
        if [number for piece in ids_of_pieces for number in piece] == ids:
            return dict(zip(characters, borders, strict=True))
        starts = {start for start, _ in text.spans}
        places = {}
        for character, part in zip(characters, self._encode([text.text[:end] for end in characters]), strict=True):
            pairs = zip(part, ids, strict=False)
            common = next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(part), len(ids)))
            places[character] = common + (common < len(part) and character in starts)
        return places

    def _finish(self, text: RenderedText, ids: list[int], spans: list[Span], prompt: int, loss_on: str) -> TokenizedRow:
        """Returns the row with BOS and end of sequence, and without empty spans."""
        before = () if text.templated else self._bos_before(ids)
        spans = [(start + len(before), end + len(before)) for start, end in spans]
        end_ids = {self.eos, *(self.end_ids if text.templated else ())}
        has_end = not end_ids.isdisjoint((*before, *ids[-1:])[-1:])
        whole = tuple(chain(before, ids, () if has_end else (self.eos,)))  # copied once only: a row may be very long
        if not has_end:
            spans[-1] = (spans[-1][0], len(whole))
        if loss_on == "all":
            spans = [(0, len(whole))]
        answer = prompt + len(before) if text.has_prompt else None
        return TokenizedRow(text.where, whole, tuple(span for span in spans if span[0] < span[1]), answer)


def _tokenizer_error(error: TokenizerFailure, where: str) -> DataError:
    fix = "take the row out, or use another tokenizer"
    return DataError(Problem(Code.TOKENIZER_UNUSABLE, f"the tokenizer {error}", where, fix=fix))


def _inner_pieces(text: RenderedText) -> list[str]:
    """Returns the text split at every span boundary; empty if the only boundaries are the ends of prompt and text."""
    borders = {border for span in text.spans for border in span} | {text.prompt, len(text.text)}
    if borders == {text.prompt, len(text.text)}:
        return []
    return [text.text[start:end] for start, end in pairwise(sorted(borders | {0}))]


# Encoding


class Encoder:
    """Encodes texts with one tokenizer. No special tokens are added; those written in a text become their ids."""

    def __init__(self, tokenizer: Any):
        """Test the tokenizer on a few texts. Raises TokenizerFailure."""
        self._tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        probe, self._newline, newline_letter, letter = (
            self._encode_one(text, self._encode_slowly) for text in (_PROBE, "\n", "\na", "a")
        )
        if self._backend is not None and self._encode_one(_PROBE, self._encode_fast) != probe:
            self._backend = None
        count = len(self._newline)
        self._adds_space = newline_letter[:count] == self._newline and newline_letter[count:] != letter

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts, very long ones in pieces that end at words or lines. Raises TokenizerFailure."""
        ids_of: dict[str, list[int]] = {"": []}
        for batch in _batches([text for text in dict.fromkeys(texts) if 0 < len(text) <= LONG]):
            ids_of.update(zip(batch, self._encode_batch(batch), strict=True))
        for text in texts:
            if text not in ids_of:
                pieces = _pieces(text, without_space=self._adds_space)
                ids_of[text] = [*chain.from_iterable(self._encode_batch([piece])[0] for piece in pieces)]
        return [ids_of[text] for text in texts]

    def one(self, text: str) -> list[int]:
        """Encode one text."""
        return self([text])[0]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, list[int]]]:
        """Encode prompts with the text after each: jointly if the joint ids begin with the ids of the prompt, otherwise
        separately. Only the last words of a long prompt are encoded a second time, because words do not change the ids
        of the words before them.

        Returns:
            For each pair the number of ids of the prompt, and the ids of both.
        """
        tails = [(prompt, self._last_words(prompt), rest) for prompt, rest in pairs]
        encoded = iter(self([text for prompt, tail, rest in tails for text in (prompt, tail, tail + rest)]))
        results: list[tuple[int, list[int]]] = []
        for prompt, rest in pairs:
            ids, tail_ids, joint_ids = next(encoded), next(encoded), next(encoded)
            if ids[len(ids) - len(tail_ids) :] != tail_ids:
                tail_ids, joint_ids = ids, self.one(prompt + rest)
            joint = joint_ids[: len(tail_ids)] == tail_ids
            results.append((len(ids), ids + (joint_ids[len(tail_ids) :] if joint else self._continuation(rest))))
        return results

    def _continuation(self, text: str) -> list[int]:
        """Encode a text that follows another, without the space that some tokenizers put before every text."""
        if self._adds_space:
            ids = self.one(f"\n{text}")
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self.one(text)

    def _last_words(self, prompt: str) -> str:
        """Returns the end of a prompt, starting at a word boundary; all of it if there are no words near its end."""
        borders = [
            border.end() for border in _WORD_BORDER.finditer(prompt, max(0, len(prompt) - _TAIL), len(prompt) - 8)
        ]
        return prompt[borders[-1] + self._adds_space :] if borders else prompt

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        encode = self._encode_slowly if self._backend is None else self._encode_fast
        try:
            return encode(texts)
        except BaseException as error:
            _check_is_failure(error)
            return [self._encode_one(text, encode) for text in texts]

    def _encode_fast(self, texts: list[str]) -> list[list[int]]:
        self._backend.no_truncation()
        self._backend.no_padding()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_slowly(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    def _encode_one(self, text: str, encode: Callable[[list[str]], list[list[int]]]) -> list[int]:
        """Raises TokenizerFailure."""
        try:
            return encode([text])[0]
        except BaseException as error:
            _check_is_failure(error)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise TokenizerFailure(text, reason) from None


def _check_is_failure(error: BaseException) -> None:
    """Re-raises anything that is not an error of the tokenizer, such as KeyboardInterrupt."""
    if not isinstance(error, Exception) and not is_rust_panic(error):
        raise error


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Yields batches of texts of at most `_BATCH` characters in total, or of a single longer text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _pieces(text: str, *, without_space: bool) -> Iterator[str]:
    """Yields the pieces of a text; each ends at the last word or line that fits.

    without_space: drop the leading space of later pieces, as the tokenizer adds a space before every text.
    """
    start = 0
    while len(text) - start > _BATCH:
        window = start + _BATCH // 2, start + _BATCH
        words = [border.end() for border in _WORD_BORDER.finditer(text, *window)]
        lines = [] if words else [border.end() for border in _LINE_BORDER.finditer(text, *window)]
        end = [window[1], *lines, *words][-1]
        yield text[start:end].removeprefix(" " if start and without_space else "")
        start = end
    yield text[start:].removeprefix(" " if start and without_space else "")
