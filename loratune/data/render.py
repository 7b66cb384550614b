"""Tokenising and masking: an Example → `input_ids` and `labels`. Train, evaluate and generate share it.

The prompt that `generate` feeds is rendered by the same function as the prompt inside a training row, and its ids
are verified to be the beginning of the row's ids. Where the tokenizer merges characters across that border, prompt
and answer are encoded apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

from jinja2 import TemplateError

from loratune.data.formats import Conversation, Example, Message, Plain
from loratune.errors import DataError, ModelError, Problem

IGNORED = -100

Span = tuple[int, int]
"""Half-open range of token positions that are learnt."""


@dataclass(frozen=True)
class Tokens:
    """A rendered row. ids: token ids; spans: the ranges that are learnt, in order, none of them empty."""

    where: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def labels(self) -> list[int]:
        """One label per token: its own id where it is learnt, else -100. The first token follows nothing, so never."""
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        labels[0] = IGNORED
        return labels

    @property
    def supervised(self) -> int:
        """How many tokens are learnt."""
        return sum(end - max(start, 1) for start, end in self.spans)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the last span: what `generate` would be given."""
        return self.ids[: self.spans[-1][0]]

    @property
    def completion(self) -> tuple[int, ...]:
        """The ids of the last span, its end included: what should be generated."""
        return self.ids[self.spans[-1][0] : self.spans[-1][1]]


def shorten(tokens: Tokens, max_length: int, bos: int | None) -> Tokens | None:
    """Bring a row down to `max_length` tokens, or None if nothing learnable is left.

    A prompt is cut at its left, after the BOS; answers are kept whole or, the earliest first, not at all.
    A row that is learnt from its first token on has no prompt, and is cut at its end.
    """
    excess = len(tokens.ids) - max_length
    if excess <= 0:
        return tokens
    keep = 1 if tokens.ids[0] == bos else 0
    if tokens.spans[0][0] <= keep:
        spans = tuple((start, min(end, max_length)) for start, end in tokens.spans if start < max_length)
        return replace(tokens, ids=tokens.ids[:max_length], spans=spans)
    spans = tuple((start - excess, end - excess) for start, end in tokens.spans if start >= keep + excess)
    ids = tokens.ids[:keep] + tokens.ids[keep + excess :]
    return replace(tokens, ids=ids, spans=spans) if spans else None


class Renderer:
    """Renders examples with one tokenizer; `end_ids` are the ids that end an answer."""

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise ModelError(Problem("the tokenizer has no end-of-sequence token", tokenizer.name_or_path))
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.turn_end = self._turn_end() if tokenizer.chat_template else ""
        turn_ids = self._encode(self.turn_end) if self.turn_end else []
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos, *turn_ids]))
        self._starts_with_bos = tokenizer.bos_token_id is not None and (
            tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        )

    def row(self, example: Example, *, learn_all: bool = False) -> Tokens:
        """A whole row. learn_all: every token is learnt, the prompt too.

        Raises DataError: the chat template cannot render the messages, or hides where an answer lies.
        """
        tokens = self._plain(example) if isinstance(example, Plain) else self._conversation(example)
        return replace(tokens, spans=((0, len(tokens.ids)),)) if learn_all else tokens

    def prompt(self, prompt: str | Sequence[Message], where: str = "prompt") -> tuple[int, ...]:
        """The ids that an answer follows: of raw text, or of messages through the chat template."""
        if isinstance(prompt, str):
            return tuple(self._with_bos(self._encode(prompt)))
        return tuple(self._encode(self._template(prompt, where, add_generation_prompt=True)))

    def _plain(self, example: Plain) -> Tokens:
        prompt = self._with_bos(self._encode(example.prompt))
        ids = self._with_bos(self._encode(example.prompt + example.completion))
        if ids[: len(prompt)] != prompt:
            ids = prompt + self._encode(example.completion)
        ids.append(self.eos)
        return Tokens(example.where, tuple(ids), ((len(prompt), len(ids)),))

    def _conversation(self, example: Conversation) -> Tokens:
        """Cut the template's text at the borders of the learnt turns, so that every cut is a token border."""
        text = self._template(example.messages, example.where)
        cuts = [0]
        for number, message in enumerate(example.messages):
            if number >= example.first_learnt and message["role"] == "assistant":
                cuts += self._answer_in(text, example, number)
        pieces = [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
        ids, borders = self._encode_pieces(pieces)
        ids = ids[: borders[-2]]  # what the template puts after the last answer teaches nothing
        if not self.turn_end:
            ids.append(self.eos)
            borders[-2] += 1
        learnt = zip(borders[0:-1:2], borders[1:-1:2], strict=False)
        return Tokens(example.where, tuple(ids), tuple(span for span in learnt if span[0] < span[1]))

    def _answer_in(self, text: str, example: Conversation, number: int) -> Span:
        """Where assistant turn `number` lies in the rendered text: from after its header to the end of its turn."""
        content = example.messages[number]["content"].strip()
        before = text[: text.find(content)]  # of an answer that nothing comes before
        if number:
            before = self._template(example.messages[:number], example.where, add_generation_prompt=True)
        start = len(before)
        found = text.find(content, start)
        end = found + len(content)
        if self.turn_end:
            end = text.find(self.turn_end, end) + len(self.turn_end)
        if not text.startswith(before) or found < 0 or end <= start:
            what = f"the chat template does not show where the answer of message {number + 1} begins and ends"
            raise DataError(Problem(what, example.where, "data.chat_template", "give a template that appends turns"))
        return start, end

    def _encode_pieces(self, pieces: list[str]) -> tuple[list[int], list[int]]:
        """Ids of the joined text, and the border after each piece; encoded apart where one falls inside a token."""
        joined = self._encode("".join(pieces))
        apart = [self._encode(piece) for piece in pieces]
        borders = list(accumulate(map(len, apart)))
        if joined == (flat := [*chain.from_iterable(apart)]):
            return joined, borders
        grown = [self._encode("".join(pieces[: count + 1])) for count in range(len(pieces))]
        if all(joined[: len(ids)] == ids for ids in grown):
            return joined, [len(ids) for ids in grown]
        return flat, borders

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self._starts_with_bos and ids[:1] != [bos] else ids

    def _template(self, messages: Sequence[Message], where: str, *, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            fix = "set data.chat_template to a Jinja file, or use prompt and completion as text"
            raise ModelError(Problem("the tokenizer has no chat template", self.tokenizer.name_or_path, fix=fix))
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(Problem(f"the chat template refuses these messages: {error}", where)) from None
        return text

    def _turn_end(self) -> str:
        """The special token that the template puts after an answer, e.g. `<|im_end|>`; empty if it puts none."""
        answer = "loratune"
        question = [{"role": "user", "content": "?"}]
        try:
            text: str = self.tokenizer.apply_chat_template(
                [*question, {"role": "assistant", "content": answer}], tokenize=False
            )
        except (TemplateError, TypeError, ValueError, KeyError):
            return ""
        tail = text.rpartition(answer)[2].strip() if answer in text else ""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return next((token for token in sorted(special, key=len, reverse=True) if tail.startswith(token)), "")
