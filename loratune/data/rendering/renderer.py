"""Examples → rows of ids. Train, evaluate and generate render with the same methods."""

import datetime
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import jinja2
import tokenizers
import transformers

from loratune.data.formats import Conversation, Example, Ids, Message, Plain
from loratune.data.rendering.drafts import Draft, Drafting, plain
from loratune.data.rendering.dropped import dropped
from loratune.data.rendering.encoding import Encoder, Unencodable
from loratune.data.rendering.template import KEY, Chat
from loratune.data.rendering.tokens import Span, Tokens, given
from loratune.data.sources import MAX_PROBLEMS
from loratune.errors import DataError, LoratuneError, ModelError, Problem
from loratune.system.sandbox import MEMORY, LimitExceededError, Sandbox, run_with_time_limit

T = TypeVar("T")
P = ParamSpec("P")

_COPIES = 64
"""Bytes that rendering may take for each character of the messages: some texts of them at once, four bytes each."""


class Renderer:
    """Renders examples with one tokenizer; `end_ids` are the ids that end an answer."""

    def __init__(self, tokenizer: Any, vocabulary_size: int | None = None):
        """vocabulary_size: how many tokens the model has embeddings for; None if there is no model to hold ids against.

        Raises ModelError: the tokenizer has no end of sequence, or fails; its template never ends, or takes too much
        memory; its special tokens are more than the model has.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError(Problem("the tokenizer has no end-of-sequence token", tokenizer.name_or_path))
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self._size = vocabulary_size
        try:
            self._encode = Encoder(tokenizer)
            self._drafting = Sandbox(lambda timer: Drafting(tokenizer, timer))
            turn_ids = [id for end in self._templating(Drafting.ends, []) for id in self._encode.one(end)[-1:]]
            self._starts_with_bos = self._begins()
        except Unencodable as error:
            raise self._failed(error, "") from None
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos, *turn_ids]))
        self._bos = tokenizer.bos_token_id
        special = [self.eos, *turn_ids, tokenizer.pad_token_id or 0]
        self._check_sizes([("", special)])

    def _begins(self) -> bool:
        """Whether the tokenizer itself begins a text with the BOS."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(run_with_time_limit(lambda: self.tokenizer("a").input_ids[:1])) == [bos]

    @cached_property
    def _beyond(self) -> bool:
        """Whether the tokenizer knows ids that the model has no embedding for, so that rows must be looked through."""
        return self._size is not None and max(self.tokenizer.get_vocab().values()) >= self._size

    def _check_sizes(self, rows: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Raises ModelError: ids that the model has no embedding for. rows: places and ids."""
        if not self._beyond or self._size is None:
            return
        found: dict[int, list[str]] = {}
        for where, ids in rows:
            for id in {id for id in ids if id >= self._size}:
                found.setdefault(id, []).append(where or self.tokenizer.name_or_path)
        problems = []
        for id, places in [*found.items()][:MAX_PROBLEMS]:
            token = self.tokenizer.convert_ids_to_tokens(id)
            what = f"the token {token!r} has the id {id}, but the model has {self._size} embeddings, from 0 on"
            known = f"the tokenizer has {max(self.tokenizer.get_vocab().values()) + 1} tokens"
            more = f"; {len(places) - 1} more rows have it" if len(places) > 2 else ""
            more = "; 1 more row has it" if len(places) == 2 else more
            fix = "take the tokenizer that belongs to the model"
            problems.append(Problem(f"{what}; {known}{more}", places[0], fix=fix))
        if problems:
            raise ModelError(problems)

    def _templating(
        self,
        work: Callable[Concatenate[Drafting, Sequence[Any], P], T],
        chats: Sequence[Chat | Conversation],
        *more: P.args,
        **named: P.kwargs,
    ) -> T:
        """What work with the template returns for some messages.

        Raises ModelError: it goes on for ever, or takes too much memory. Raises what the work raises.
        """
        longest = max((sum(len(message["content"]) for message in chat.messages) for chat in chats), default=0)
        memory = MEMORY + _COPIES * longest
        try:
            return self._drafting(work, memory, chats, *more, **named)
        except LimitExceededError as error:
            where = chats[error.at].where if 0 <= error.at < len(chats) else ""
            fix = "set data.chat_template to another Jinja file"
            raise ModelError(Problem(f"the chat template {error}", where, KEY, fix)) from None

    def _failed(self, error: Unencodable, where: str) -> LoratuneError:
        """What to raise where the tokenizer fails on the text of a row; where: empty for any text."""
        if error.broken:
            return ModelError(Problem(f"the tokenizer {error}", where or self.tokenizer.name_or_path))
        return DataError(Problem(f"the tokenizer {error}", where, fix="take the row out, or take another tokenizer"))

    def rows(self, examples: Sequence[Example], loss_on: str = "completion") -> list[Tokens]:
        """Whole rows, in order, encoded as one batch. loss_on: as in the configuration; rows of ids come as they are.

        Raises DataError, with the first 10 rows that cannot be rendered: no learnt turn; the chat template refuses the
        messages, leaves out what is to be learnt, or hides where an answer lies; the tokenizer fails on a row. Raises
        ModelError: no chat template, or one without an end; ids that the model has no embedding for.
        """
        made = self._drafts(examples, loss_on)
        drafts = [one for one in made if isinstance(one, Draft)]
        try:
            encoded = self._encoded(drafts, loss_on)
        except Unencodable as error:
            raise self._failed(error, next((one.where for one in drafts if error.text in one.text), "")) from None
        self._check_sizes([(row.where, row.ids) for row in encoded])
        rows = iter(encoded)
        return [next(rows) if isinstance(one, Draft) else one for one in made]

    def dropped(self, examples: Sequence[Example], loss_on: str = "completion") -> str | None:
        """A line about what the tokenizer drops of the answers of some rows; see `dropped`. Raises as `rows` does."""
        drafts = [one for one in self._drafts(examples, loss_on) if isinstance(one, Draft)]
        answers = []
        for draft, row in zip(drafts, self._encoded(drafts, "completion"), strict=True):
            said = "".join(draft.text[start:end] for start, end in draft.spans)
            answers.append((draft.where, said, [id for start, end in row.spans for id in row.ids[start:end]]))
        return dropped(self.tokenizer, answers)

    def _drafts(self, examples: Sequence[Example], loss_on: str) -> list[Draft | Tokens]:
        """The texts of examples, and the rows of those that are ids. Raises DataError."""
        chats = [one for one in examples if isinstance(one, Conversation)]
        conversations = iter(self._templating(Drafting.drafts, chats, loss_on) if chats else [])
        made: list[Draft | Tokens] = []
        for example in examples:
            if isinstance(example, Ids):
                made.append(given(example.where, example.ids, example.labels))
            else:
                made.append(plain(example) if isinstance(example, Plain) else next(conversations))
        return made

    def row(self, example: Example, loss_on: str = "completion") -> Tokens:
        """One whole row; see `rows`."""
        return self.rows([example], loss_on)[0]

    def prompt(
        self, prompt: str | Sequence[Message], where: str = "prompt", tools: Sequence[Any] = ()
    ) -> tuple[int, ...]:
        """The ids that an answer follows: of raw text, or of messages through the chat template.

        Raises ModelError, DataError: see `rows`.
        """
        try:
            if isinstance(prompt, str):
                ids = self._encode.one(prompt)
                ids = [*self._before(ids), *ids]
            else:
                ids = self._encode.one(self._templating(Drafting.asked, [Chat(prompt, tools, where)]))
        except Unencodable as error:
            raise self._failed(error, where) from None
        self._check_sizes([(where, ids)])
        return tuple(ids)

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
            inner = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
        date = datetime.date.today().isoformat() if "strftime_now" in template else ""
        versions = (transformers.__version__, tokenizers.__version__, jinja2.__version__)
        parts = (inner, template, date, repr(sorted(tokenizer.special_tokens_map.items())), repr(versions))
        return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()

    def _encoded(self, drafts: Sequence[Draft], loss_on: str) -> list[Tokens]:
        """Rows of drafts; every border of a span is a border of tokens."""
        pairs = self._encode.continued([(draft.text[: draft.prompt], draft.text[draft.prompt :]) for draft in drafts])
        inner = [_inner_pieces(draft) for draft in drafts]
        found = iter(self._encode([piece for pieces in inner for piece in pieces]))
        rows = []
        for draft, (prompt, ids), pieces in zip(drafts, pairs, inner, strict=True):
            apart = [next(found) for _ in pieces]
            places = self._places(draft, pieces, apart, ids) if pieces else {}
            places |= {draft.prompt: prompt, len(draft.text): len(ids)}
            spans = [(places[start], places[end]) for start, end in draft.spans]
            rows.append(self._finished(draft, ids, spans, prompt, loss_on))
        return rows

    def _places(
        self, draft: Draft, pieces: Sequence[str], apart: Sequence[Sequence[int]], ids: list[int]
    ) -> dict[int, int]:
        """Border in the text → border in the ids, for the borders between the pieces.

        Where a token reaches over the border, the place is after the token where a span begins, before it where one
        ends.
        """
        characters = [*accumulate(map(len, pieces))][:-1]
        borders = [*accumulate(map(len, apart))][:-1]
        if [number for part in apart for number in part] == ids:
            return dict(zip(characters, borders, strict=True))
        starts = {start for start, _ in draft.spans}
        places = {}
        for character, grown in zip(characters, self._encode([draft.text[:end] for end in characters]), strict=True):
            pairs = zip(grown, ids, strict=False)
            alike = next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(grown), len(ids)))
            places[character] = alike + (alike < len(grown) and character in starts)
        return places

    def _finished(self, draft: Draft, ids: list[int], spans: list[Span], prompt: int, loss_on: str) -> Tokens:
        """The row with its BOS and its end, and without spans of no token."""
        before = () if draft.templated else self._before(ids)
        spans = [(start + len(before), end + len(before)) for start, end in spans]
        ended = {self.eos, *(self.end_ids if draft.templated else ())}.intersection((*before, *ids[-1:])[-1:])
        whole = tuple(chain(before, ids, () if ended else (self.eos,)))  # one copy: a row may be very long
        if not ended:
            spans[-1] = (spans[-1][0], len(whole))
        if loss_on == "all":
            spans = [(0, len(whole))]
        answer = prompt + len(before) if draft.asked else None
        return Tokens(draft.where, whole, tuple(span for span in spans if span[0] < span[1]), answer)

    def remark_on_ends(self) -> str | None:
        """What is odd about how the chat template ends answers; see `Template.remark`."""
        return self._templating(Drafting.remark, [])

    def remark(self, ids: Sequence[int]) -> str | None:
        """What is odd about the beginning of a row, where the tokenizer puts one BOS before a text."""
        count = next((place for place, id in enumerate(ids) if id != self._bos), len(ids))
        if not self._starts_with_bos or count == 1:
            return None
        name = self.tokenizer.bos_token
        return (
            f"rows begin with {count} x {name}" if count else f"rows begin without {name}, which the tokenizer writes"
        )

    def _before(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The BOS, where the tokenizer begins with one and these do not."""
        return (self._bos,) if self._starts_with_bos and [*ids[:1]] != [self._bos] else ()


def _inner_pieces(draft: Draft) -> list[str]:
    """The text cut at every border, where it has others than the prompt's and its own."""
    borders = {border for span in draft.spans for border in span} | {draft.prompt, len(draft.text)}
    if borders == {draft.prompt, len(draft.text)}:
        return []
    return [draft.text[start:end] for start, end in pairwise(sorted(borders | {0}))]
