"""The verbs of adapters that write: `generate`, `answers` and `chat`."""

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Unpack

import loratune
from loratune.adapter.options import Sampling, SamplingOptions
from loratune.api import Messages, Rows, computing, libraries
from loratune.api.rows import read_prompts
from loratune.codes import Code
from loratune.config.arguments import checked
from loratune.errors import ConfigError, Problem
from loratune.events import Listener, listening

if TYPE_CHECKING:
    from loratune.adapter.answering import Answer
    from loratune.adapter.chat import Chat


@checked
def generate(
    adapter: "loratune.Adapter",
    prompts: str | Sequence[str | list[dict[str, Any]]],
    *,
    max_new_tokens: int = 256,
    system: str | None = None,
    on_event: Listener | None = None,
    **options: Unpack[SamplingOptions],
) -> list[str]:
    """Complete prompts.

    Args:
        prompts: A text, or a list of texts or conversations (lists of messages); rendered as in training.
        max_new_tokens: The maximum length of a completion, in tokens.
        system: The system message of conversations without one; empty for none; by default the one that all rows
            had which the adapter was trained on.
        on_event: Receives events.
        options: `temperature`: 0, the default, is greedy decoding; above 0, tokens are sampled. `top_p`: sample
            from the most likely tokens with this total probability. `top_k`: sample from this many of the most
            likely tokens. `seed`: random seed; the same seed and prompts give the same texts. `stop`: stop texts,
            before which completions end.

    Returns:
        The completions, in order.

    Raises:
        AdapterError, ModelError: The adapter or its base cannot be used.
        ConfigError: A setting is out of range; a prompt with its new tokens exceeds the model's context; a system
            message is given for a raw prompt.
        DataError: A prompt cannot be rendered.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    with listening(on_event):
        sampling = Sampling(**options)
        found = answers(adapter, prompts, sampling=sampling, max_new_tokens=max_new_tokens, system=system)
        return [answer.completion for answer in found]


@checked
def stream(
    adapter: "loratune.Adapter",
    prompt: str | list[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    system: str | None = None,
    **options: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Complete one prompt piece by piece: whole words, in a thread of its own, which stops if the iterator is closed.

    Args and errors as for `generate`; what cannot be used is reported before the first piece.
    """
    sampling, pieces, is_closed = Sampling(**options), SimpleQueue[str | BaseException | None](), Event()

    def receive(piece: str) -> None:
        if is_closed.is_set():
            raise _StreamClosed
        pieces.put(piece)

    written = answers(
        adapter, [prompt], sampling=sampling, max_new_tokens=max_new_tokens, system=system, on_text=receive,
        progress=False,
    )  # fmt: skip
    return _read(pieces, Thread(target=_write, args=(written, pieces), daemon=True), is_closed, sampling)


_Pieces: TypeAlias = "SimpleQueue[str | BaseException | None]"
"""What was written, piece by piece, then None or what went wrong."""


class _StreamClosed(Exception):
    """The reader of a stream wants no more of it."""


def _write(answered: "Iterator[Answer]", pieces: _Pieces) -> None:
    try:
        for _ in answered:
            pass
        pieces.put(None)
    except BaseException as error:
        pieces.put(error)


def _read(pieces: _Pieces, writer: Thread, is_closed: Event, sampling: Sampling) -> Iterator[str]:
    """What a thread writes, without stop texts and the line break at the end. It ends the thread."""
    text, given, held_back = "", 0, max([0, *(len(stop) - 1 for stop in sampling.stop)])
    writer.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            until = sampling.cut(text)
            until = until if len(until) < len(text) else text[: max(0, len(text) - held_back)]
            if more := until.removesuffix("\n")[given:]:
                given += len(more)
                yield more
        if more := sampling.cut(text).removesuffix("\n")[given:]:
            yield more
    finally:
        is_closed.set()
        writer.join()


@checked
def answers(
    adapters: "loratune.Adapter | loratune.Adapters",
    rows: Rows | Sequence[str | Messages] | BinaryIO,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),  # noqa: B008  it is frozen
    system: str | None = None,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
    progress: bool = True,
) -> "Iterator[Answer]":
    """Complete the prompts of rows. Everything is checked before the first completion.

    Args:
        rows: Rows, texts or conversations, or a binary file of JSON lines. The field `adapter` of a row names the
            adapter that answers it.
        max_new_tokens: The maximum length of a completion, in tokens.
        sampling: The sampling settings.
        system: The system message of conversations without one; empty for none; by default the one that all rows
            had which the adapter was trained on.
        base: Also complete with the base alone.
        on_text: Receives the completion of a single prompt piece by piece.
        progress: Emit progress events.

    Raises:
        AdapterError, ModelError, DataError: An adapter, the base or the rows cannot be used.
        ConfigError: As `Adapter.generate`.
    """
    sampling.check()
    _check_new_tokens(max_new_tokens)
    read = read_prompts(rows)
    opened = adapters.opened
    _ = opened.directories  # they are verified before anything is loaded
    with libraries():
        from loratune.adapter import answering

    names = answering.names(opened.selection, read)
    with computing():
        return answering.answers(
            opened.loaded, names, read, sampling, max_new_tokens, system=system, base=base, on_text=on_text,
            shows_progress=progress,
        )  # fmt: skip


@checked
def chat(
    adapters: "loratune.Adapter | loratune.Adapters",
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> "Chat":
    """Begin a conversation; its method `ask` answers a turn.

    Args:
        system: The system message; empty for none; by default the one that all rows had which the adapter was
            trained on.
        max_new_tokens: The maximum length of an answer, in tokens.
        temperature: 0 for greedy decoding; above 0, tokens are sampled.

    Raises:
        AdapterError, ModelError: An adapter or the base cannot be used.
        ConfigError: The temperature is out of range; a system message is given to an adapter that was trained on
            raw prompts.
    """
    sampling = Sampling(temperature)
    sampling.check()
    _check_new_tokens(max_new_tokens)
    _ = adapters.opened.directories
    with libraries():
        from loratune.adapter.chat import Chat

    with computing():
        return Chat(adapters.opened.loaded, system=system, max_new_tokens=max_new_tokens, sampling=sampling)


def _check_new_tokens(most: int) -> None:
    if most < 1:
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"{most} is less than 1", key="max_new_tokens"))
