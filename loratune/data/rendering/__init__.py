"""Tokenizing and masking: turns an Example into `input_ids` and `labels`, for training, evaluation and generation.

The prompt that `generate` feeds is rendered by the same function as the prompt inside a training row, and its ids are
verified to be the beginning of the ids of the row. Where the tokenizer merges characters across that boundary, prompt
and answer are encoded separately.
"""

import datetime
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import jinja2
import tokenizers
import transformers

from loratune.codes import Code
from loratune.data.formats import Conversation, Example, Ids, Message, Plain
from loratune.data.rendering.answer_spans import RenderedText, check_tools_are_shown, render_conversation
from loratune.data.rendering.chat_template import ChatTemplate, TemplateInput
from loratune.data.rendering.encoding import (
    CHOSEN,
    DESIRABLE,
    IGNORED,
    REJECTED,
    UNDESIRABLE,
    Encoder,
    Span,
    TokenizedRow,
    TokenizerFailure,
    truncate,
    truncate_sides,
)
from loratune.data.sources.rows import reported
from loratune.data.upstream import tokenizer_settings
from loratune.errors import DataError, ModelError, Problem

__all__ = [
    "CHOSEN", "DESIRABLE", "IGNORED", "REJECTED", "UNDESIRABLE", "Renderer", "Span", "TokenizedRow", "truncate",
    "truncate_sides",
]  # fmt: skip

_SHOWN_CHARACTERS = 40


class Renderer:
    """Renders examples with one tokenizer; `end_ids` are the ids that end an answer."""

    def __init__(self, tokenizer: Any, vocabulary_size: int | None = None):
        """Try the tokenizer and its chat template.

        Args:
            tokenizer: A tokenizer of transformers, fast or slow.
            vocabulary_size: How many tokens the model has embeddings for; None if there is no model to compare with.

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
            self.starts_with_bos = self._adds_bos()
        except TokenizerFailure as error:
            raise ModelError(Problem(Code.TOKENIZER_UNUSABLE, f"the tokenizer {error}", name)) from None
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos, *turn_ids]))
        self._bos = tokenizer.bos_token_id
        special = [self.eos, *turn_ids, tokenizer.pad_token_id or 0]
        self._check_ids([("", special)])

    def rows(self, examples: Sequence[Example], loss_on: str = "completion") -> list[TokenizedRow]:
        """Render examples whole, in order, encoded as one batch.

        Args:
            examples: Texts, conversations, and ids, which stay as they are.
            loss_on: As in the configuration.

        Raises:
            DataError: With the first 10 rows that cannot be rendered: there is no supervised turn; the chat template
                refuses the messages, leaves out what is supervised, or hides where an answer lies; the tokenizer fails
                on a row.
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
        """Render a prompt, of raw text or of messages, to the ids that an answer follows.

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
        """A prompt of messages as the chat template renders it. Raises DataError: it refuses it, or omits the tools."""
        chat = TemplateInput(messages, tools, where)
        check_tools_are_shown(self._template, chat)
        return self._template.text(chat, prompt=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the ids beside the code: tokenizer, special tokens, template, libraries.

        A template that asks for the day's date renders other rows on another day, and has another digest.
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
        """Returns a line about the beginning of a row without one BOS, where the tokenizer puts one before a text."""
        count = next((place for place, id in enumerate(ids) if id != self._bos), len(ids))
        if not self.starts_with_bos or count == 1:
            return None
        name = self.tokenizer.bos_token
        return (
            f"rows begin with {count} x {name}" if count else f"rows begin without {name}, which the tokenizer writes"
        )

    def remark_on_lost_characters(self, examples: Sequence[Example], loss_on: str = "completion") -> str | None:
        """Returns a line about letters and digits of answers that their ids do not give back; None if all are there.

        What a tokenizer normalises is no loss: upper case, accents, compatibility forms, white space, punctuation.
        Raises as `rows` does.
        """
        texts = [text for text in self._texts(examples, loss_on) if isinstance(text, RenderedText)]
        special = [*zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)]
        count = lost = 0
        example = ""
        for text, row in zip(texts, self._encode_texts(texts, "completion"), strict=True):
            answer = "".join(text.text[start:end] for start, end in text.spans)
            ids = [id for start, end in row.spans for id in row.ids[start:end]]
            added = {id for token, id in special if token not in answer}  # the end of sequence, the unknown token
            decoded = self.tokenizer.decode([id for id in ids if id not in added], skip_special_tokens=False)
            characters = _letters_and_digits(answer)
            missing = (characters - _letters_and_digits(decoded)).total()
            count, lost = count + characters.total(), lost + missing
            if missing and not example:
                example = f"{text.where}: {answer[:_SHOWN_CHARACTERS]!r} -> {decoded[:_SHOWN_CHARACTERS]!r}"
        if not lost:
            return None
        share = f"{lost / count:.0%}" if lost / count >= 0.01 else "less than 1%"
        return f"the tokenizer drops {share} of the letters and digits of answers, e.g. {example}"

    def _adds_bos(self) -> bool:
        """Whether the tokenizer itself begins a text with the BOS."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer("a").input_ids[:1]) == [bos]

    def _bos_before(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Returns the BOS, where the tokenizer begins with one and these ids do not."""
        return (self._bos,) if self.starts_with_bos and [*ids[:1]] != [self._bos] else ()

    @cached_property
    def _has_ids_beyond_model(self) -> bool:
        """Whether the tokenizer has ids that the model has no embedding for, so that every row must be checked."""
        return self._size is not None and max(self.tokenizer.get_vocab().values()) >= self._size

    def _check_ids(self, rows: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Raises ModelError: ids that the model has no embedding for. rows: places and ids."""
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
        """Encode texts so that every border of a span is a border of tokens."""
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
        """Returns border in the text → border in the ids, for the borders between the pieces.

        Where a token reaches over the border, its border is after the token where a span begins, and before it where a
        span ends.
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
        """Returns the row with its BOS and its end, and without spans of no token."""
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


def _letters_and_digits(text: str) -> Counter[str]:
    """Returns how often a text has each letter and digit, without case, accents and compatibility forms."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    return Counter(character for character in decomposed if character.isalnum())


def _inner_pieces(text: RenderedText) -> list[str]:
    """Returns the text cut at every border of a span; empty where there are no borders but the prompt's and its own."""
    borders = {border for span in text.spans for border in span} | {text.prompt, len(text.text)}
    if borders == {text.prompt, len(text.text)}:
        return []
    return [text.text[start:end] for start, end in pairwise(sorted(borders | {0}))]
