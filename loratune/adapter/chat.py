"""`loratune chat`: a conversation with adapters. Each turn is rendered as in training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loratune.adapter import generation
from loratune.adapter.generation import LoadedAdapter, TextPieces
from loratune.adapter.loading import LoadedAdapters
from loratune.adapter.options import GREEDY, Sampling
from loratune.codes import Code
from loratune.config.arguments import checked
from loratune.data.formats import Message
from loratune.errors import ConfigError, Problem
from loratune.model import load
from loratune.system import turns
from loratune.system.accelerator import default_modes

RAW_NOTE = (
    "was trained on raw prompts, which have no turns: it completes each line by itself, as in training, without the "
    "lines before and without a system message"
)


@dataclass(frozen=True)
class Exchange:
    """A user turn and the answer.

    Attributes:
        question: The turn.
        answer: The answer without its reasoning.
        is_whole: Whether it was not cut off.
        reasoning: The reasoning; may be empty.
    """

    question: str
    answer: str
    is_whole: bool
    reasoning: str = ""


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: The answer with its reasoning, as it was written.
        cut: Why it was cut off; empty if it is complete.
        reasoning: The reasoning, as the chat template tells it; may be empty.
        content: The answer without it.
    """

    text: str
    cut: str
    reasoning: str
    content: str


class Chat:
    """A conversation.

    Attributes:
        name: The name of the adapter that answers.
        exchanges: The conversation so far, with the answers of all adapters.
    """

    def __init__(
        self,
        loaded: LoadedAdapters,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
    ):
        """Raises ConfigError: a system message is given for an adapter that was trained on raw prompts."""
        self._loaded, self._new_tokens, self._sampling = loaded, max_new_tokens, sampling
        self.name, self.exchanges, self._system = loaded.label, list[Exchange](), system
        if system is not None:
            self.set_system(system)

    @property
    def adapter(self) -> LoadedAdapter:
        """The adapter that answers."""
        return self._loaded.by_name.get(self.name, self._loaded.default)

    @property
    def system(self) -> str:
        """The system message, empty for none: the one that was set, or that of all training rows of the adapter."""
        return self.adapter.system if self._system is None else self._system

    @property
    def names(self) -> list[str]:
        """The names of all adapters; empty for a single adapter without a name."""
        return list(self._loaded.by_name)

    def notes(self) -> list[str]:
        """A line for each adapter that was trained on raw prompts, or whose system message is used."""
        adapters = self._loaded.by_name.values() or [self._loaded.default]
        raw = [f"{adapter.where}: {RAW_NOTE}" for adapter in adapters if not adapter.chat]
        known = [adapter for adapter in adapters if adapter.system and self._system is None]
        return raw + [f"{one.where}: {one.system_note}" if len(self.names) > 1 else one.system_note for one in known]

    @checked
    def use(self, name: str) -> None:
        """Use another adapter from now on. Raises ConfigError: there is no adapter with this name."""
        if name not in self._loaded.by_name:
            fix = f"the adapters are {', '.join(self.names)}" if self.names else "start with `adapters=['NAME=DIR']`"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"there is no adapter {name!r}", key="/adapter", fix=fix))
        self.name = name

    @checked
    def set_system(self, text: str) -> None:
        """Set the system message from now on; an empty text removes it. Raises ConfigError: the adapter was trained on
        raw prompts."""
        if text and not self.adapter.chat:
            what = f"{self.adapter.where} {RAW_NOTE}"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, fix="leave the system message out"))
        self._system = text

    def reset(self) -> None:
        """Clear the conversation; the system message and the adapter stay."""
        self.exchanges.clear()

    @checked
    def ask(
        self, question: str, on_text: Callable[[str], None] | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Reply:
        """Answer a turn. A non-empty answer becomes part of the conversation, even if it was cut off.

        Args:
            question: The user's turn.
            on_text: Receives the answer piece by piece.
            stopped: Called after each token; returns whether to stop.

        Raises:
            ConfigError: The turn is empty, or the conversation fills the context.
            DataError, ModelError: The conversation cannot be rendered.
        """
        if not question:
            raise ConfigError(Problem(Code.USAGE_NO_PROMPT, "the prompt is empty", key="question"))
        with turns.turn(), default_modes():
            reply = self._answer(self.exchanges, question, on_text, stopped)
        if reply.text:
            self.exchanges.append(Exchange(question, reply.content, not reply.cut, reply.reasoning))
        return reply

    @checked
    def ask_base(
        self, on_text: Callable[[str], None] | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Reply:
        """Answer the last turn without the adapter; the conversation is unchanged.

        Raises:
            AdapterError: PEFT has changed the base for this adapter.
            ConfigError: There is no turn yet; or as `ask`.
        """
        if not self.exchanges:
            what, fix = "there is no turn to answer yet", "ask something first"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="/base", fix=fix))
        with turns.turn(), default_modes(), self.adapter.without_adapter():
            return self._answer(self.exchanges[:-1], self.exchanges[-1].question, on_text, stopped)

    def rows(self) -> list[dict[str, Any]]:
        """The conversation as training rows: one row of messages, or for raw prompts one row per prompt and completion.

        Answers that were cut off are excluded from training: they have weight 0 in messages, and no row as raw prompts.

        Raises:
            ConfigError: No answer is complete.
        """
        whole = [exchange for exchange in self.exchanges if exchange.is_whole]
        if not whole:
            what, fix = "there is no whole answer to train on", "ask something first"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="/save", fix=fix))
        if not self.adapter.chat:
            return [{"prompt": exchange.question, "completion": exchange.answer} for exchange in whole]
        messages = self._messages(self.exchanges)
        answers = [message for message in messages if message["role"] == "assistant"]
        for message, exchange in zip(answers, self.exchanges, strict=True):
            message |= {} if exchange.is_whole else {"weight": 0}
        return [{"messages": messages}]

    def _answer(
        self, before: list[Exchange], question: str, on_text: Callable[[str], None] | None, stopped: Callable[[], bool]
    ) -> Reply:
        adapter = self.adapter
        prompt = [*self._messages(before), {"role": "user", "content": question}] if adapter.chat else question
        ids = adapter.renderer.prompt(prompt, "the conversation")
        limit = load.context_length(adapter.model.config)
        room = self._new_tokens if limit is None else min(self._new_tokens, limit - len(ids))
        if room < 1:
            what = f"the context is full: the conversation has {len(ids)} tokens, and the model's context {limit}"
            raise ConfigError(Problem(Code.DATA_TOO_LONG, what, fix="begin anew with /reset"))
        streamer = TextPieces(adapter.tokenizer, on_text) if on_text else None
        (new,) = generation.complete([(adapter, ids)], room, self._sampling, streamer, stopped)
        cut = ""
        if new[-1] not in adapter.renderer.end_ids:
            full = f"the model's context of {limit} tokens is full; /reset begins anew"
            cut = full if room < self._new_tokens else f"`max_new_tokens=...` is {self._new_tokens}"
            cut = "stopped" if len(new) < room or stopped() else cut
        return Reply(adapter.text(new), cut, *adapter.split_reasoning(new))

    def _messages(self, exchanges: list[Exchange]) -> list[Message]:
        """The system message and the exchanges as messages."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in exchanges:
            reasoning = {"reasoning_content": exchange.reasoning} if exchange.reasoning else {}
            messages += [
                {"role": "user", "content": exchange.question},
                {"role": "assistant", "content": exchange.answer, **reasoning},
            ]
        return messages
