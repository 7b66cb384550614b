"""Tokenizing and masking: turns an Example into `input_ids` and `labels`, for training, evaluation and generation.

A prompt is rendered identically in `generate` and in training, and its ids are a prefix of the ids of the training row.
If the tokenizer merges characters across that boundary, prompt and answer are encoded separately.
"""

import copy
import datetime
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise
from types import MappingProxyType
from typing import Any

import jinja2
import tokenizers
import transformers

from loratune.codes import Code
from loratune.config.template_variables import unread
from loratune.data.formats import Conversation, Example, Ids, Message, Plain, Span
from loratune.data.formats.reasoning import EMPTY_REASONING, FIELDS, kind_of
from loratune.data.rendering import samples
from loratune.data.rendering.chat_template import ChatTemplate, TemplateInput, with_closed_reasoning
from loratune.data.rendering.encoder import Encoder, TokenizerFailure
from loratune.data.rendering.spans import (
    RenderedText,
    TokenizedRow,
    check_tools_are_shown,
    render_conversation,
    without_reasoning,
)
from loratune.data.sources.rows import reported
from loratune.data.upstream import tokenizer_settings
from loratune.errors import DataError, ModelError, Problem

Arguments = Mapping[str, Any]
_NONE: Arguments = MappingProxyType({})


class Renderer:
    """Renders examples with one tokenizer; `end_ids` are the ids that end an answer."""

    def __init__(self, tokenizer: Any, vocabulary_size: int | None = None, arguments: Arguments = _NONE):
        """Test the tokenizer and its chat template.

        Args:
            tokenizer: A tokenizer of transformers, fast or slow.
            vocabulary_size: The number of embeddings of the model; None if there is no model to compare with.
            arguments: Arguments of the chat template, to which those of a row are added.

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
            self._template = ChatTemplate(tokenizer, arguments)
            turn_ids = [id for token in self._template.end_tokens for id in self._encode.one(token)[-1:]]
            bos = self._bos = tokenizer.bos_token_id
            self.starts_with_bos = bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]
        except TokenizerFailure as error:
            raise ModelError(Problem(Code.TOKENIZER_UNUSABLE, f"the tokenizer {error}", name)) from None
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos, *turn_ids]))
        special = [self.eos, *turn_ids, tokenizer.pad_token_id or 0]
        self._check_ids([("", special)])
        self.arguments = dict(arguments)
        self._templates = lru_cache(16)(lambda own: ChatTemplate(tokenizer, self.arguments | json.loads(own)))
        self._rewrites = lru_cache(128)(self._rewrites_answers)

    def template(self, arguments: Arguments = _NONE) -> ChatTemplate:
        """The chat template with the arguments of a row."""
        return self._templates(_as_key(arguments)) if arguments else self._template

    def closing_reasoning(self) -> "Renderer | None":
        """A renderer whose template writes the empty block of reasoning, with which answers without reasoning begin,
        into prompts by default; None if there is no such block, or the arguments decide."""
        block = ""
        if self._template.empties_reasoning:
            with suppress(DataError):
                found = self._conversation(Conversation("", (samples.QUESTION, samples.ANSWER)), "completion")
                block = found.text[found.prompt : found.bare_starts[-1]]
        if not EMPTY_REASONING.fullmatch(block):
            return None
        tokenizer, source = copy.copy(self.tokenizer), self.tokenizer.chat_template
        tokenizer.chat_template = (
            {name: with_closed_reasoning(one, block) for name, one in source.items()}
            if isinstance(source, dict)
            else with_closed_reasoning(source, block)
        )
        renderer = Renderer(tokenizer, self._size, self.arguments)
        return None if renderer.template().empties_reasoning else renderer

    def remark_on_header(self) -> str | None:
        """A line if the chat template ignores `add_generation_prompt`, and the model has to write the header of its
        answers itself; else None."""
        if not (header := self._template.unprompted_header):
            return None
        what = f"the chat template ignores add_generation_prompt, so that answers begin with {header!r}"
        return f"{what}, which the adapter learns and shows; set data.chat_template to a template with it in the prompt"

    def unread(self, arguments: Collection[str]) -> str:
        """A line if the chat template does not read some of these arguments; otherwise empty."""
        return unread(self._template.sources, arguments) if arguments else ""

    def rows(
        self, examples: Sequence[Example], loss_on: str = "completion", *, masks_reasoning: bool = False
    ) -> list[TokenizedRow]:
        """Render examples in order, without truncation, encoded as one batch.

        Args:
            examples: Texts, conversations, and ids, which are not changed.
            loss_on: As in the configuration.
            masks_reasoning: Whether the reasoning of answers is not supervised.

        Raises:
            DataError: Lists the first 10 rows that cannot be rendered: there is no supervised turn; the chat template
                refuses the messages, omits a supervised answer, or does not show where an answer begins and ends; the
                tokenizer fails on a row.
            ModelError: There is no chat template; an id has no embedding in the model.
        """
        rendered = self._texts(examples, loss_on, masks_reasoning)
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

    def parts(self, chat: Conversation, loss_on: str) -> list[Conversation]:
        """The conversations that are trained on for one: itself and, before it, the beginning up to each supervised
        answer that the chat template renders otherwise once other messages follow, such as without its reasoning. In
        the conversation itself, those answers are not supervised, so that each is trained as it is generated.

        Raises ModelError: There is no chat template.
        """
        earlier = chat.supervised_turns(loss_on)[:-1] if loss_on != "all" else ()
        in_fields = any(message.keys() & FIELDS for message in chat.messages)
        if not earlier or not self._rewrites(_as_key(chat.arguments), kind_of(chat), in_fields):
            return [chat]
        with suppress(DataError):  # reported when the row is rendered
            parts = self._rewritten(chat, earlier, loss_on)
            hidden = (len(part.messages) - 1 for part in parts)
            return [*parts, replace(chat, zero_weight=chat.zero_weight.union(hidden))]
        return [chat]

    def _rewrites_answers(self, arguments: str, kind: str, in_fields: bool) -> bool:
        """Whether the template renders earlier answers of such conversations otherwise than last ones; true if it
        refuses them. arguments: as JSON; the others: see `samples.conversation`."""
        messages, tools = samples.conversation(kind, in_fields=in_fields)
        chat = Conversation("", messages, tools=tools, arguments=json.loads(arguments))
        try:
            return bool(self._rewritten(chat, chat.supervised_turns("assistant")[:-1], "assistant"))
        except DataError:
            return True

    def _rewritten(self, chat: Conversation, earlier: Sequence[int], loss_on: str) -> list[Conversation]:
        """Returns the beginnings of a conversation up to each of these answers that is rendered otherwise there."""
        others, found = chat.zero_weight.union(earlier), list[Conversation]()
        whole = self._conversation(replace(chat, zero_weight=others), loss_on).text
        for number in earlier:
            part = replace(chat, messages=chat.messages[: number + 1], zero_weight=others - {number})
            try:
                is_other = not whole.startswith(self._conversation(part, loss_on).text)
            except DataError as error:  # some templates refuse calls without results; what else is wrong is reported
                is_other = error.problems[0].code != Code.TEMPLATE_INVALID
            found += [part] if is_other else []
        return found

    def prompt(
        self,
        prompt: str | Sequence[Message],
        where: str = "prompt",
        tools: Sequence[Any] = (),
        arguments: Arguments = _NONE,
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
                ids = self._encode.one(self.prompt_text(prompt, tools, where, arguments))
        except TokenizerFailure as error:
            raise _tokenizer_error(error, where) from None
        self._check_ids([(where, ids)])
        return tuple(ids)

    def prompt_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        where: str = "messages",
        arguments: Arguments = _NONE,
    ) -> str:
        """The text of a prompt of messages. Raises DataError: the chat template refuses it, or omits the tools."""
        chat, template = TemplateInput(messages, tools, where), self.template(arguments)
        check_tools_are_shown(template, chat)
        return template.text(chat, prompt=True)

    def user_header(self) -> tuple[int, ...]:
        """The ids after which a chat model writes a user's turn; of a model without a template, its first token."""
        return tuple(self._encode.one(self._template.user_header())) or (self.eos if self._bos is None else self._bos,)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what determines the ids apart from the code: tokenizer, special tokens, template, its arguments,
        libraries.

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
        special, own = sorted(tokenizer.special_tokens_map.items()), json.dumps(self.arguments, sort_keys=True)
        parts = (inner, template, own, date, repr(special), repr(versions))
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

    def _texts(
        self, examples: Sequence[Example], loss_on: str, masks_reasoning: bool
    ) -> list[RenderedText | TokenizedRow]:
        """Returns the texts of examples, and the rows of those that are ids already. Raises DataError."""
        texts: list[RenderedText | TokenizedRow] = []
        problems: list[Problem] = []
        for example in examples:
            if isinstance(example, Ids):
                texts.append(TokenizedRow.from_ids(example.where, example.ids, example.labels))
            elif isinstance(example, Plain):
                text, border = example.prompt + example.completion, len(example.prompt)
                spans, has_prompt = ((border, len(text)),), not example.whole
                plain = RenderedText(example.where, text, border, spans, templated=False, has_prompt=has_prompt)
                texts.append(plain)
            elif isinstance(example, Conversation):
                try:
                    found = self._conversation(example, loss_on)
                    texts.append(without_reasoning(found) if masks_reasoning else found)
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
        found = TemplateInput(chat.messages, chat.tools, chat.where)
        return render_conversation(self.template(chat.arguments), found, supervised)

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


def _as_key(arguments: Arguments) -> str:
    return json.dumps(dict(arguments), sort_keys=True)


def _tokenizer_error(error: TokenizerFailure, where: str) -> DataError:
    fix = "take the row out, or use another tokenizer"
    return DataError(Problem(Code.TOKENIZER_UNUSABLE, f"the tokenizer {error}", where, fix=fix))


def _inner_pieces(text: RenderedText) -> list[str]:
    """Returns the text split at every span boundary; empty if the only boundaries are the ends of prompt and text."""
    borders = {border for span in text.spans for border in span} | {text.prompt, len(text.text)}
    if borders == {text.prompt, len(text.text)}:
        return []
    return [text.text[start:end] for start, end in pairwise(sorted(borders | {0}))]
