"""Generation with an adapter on its base. Prompts for several adapters may share a batch.

A prefix shared by all prompts of a batch is computed once: its keys and values are copied for each row. In a causal
model the states of a prefix do not depend on the tokens after it. Shorter rows are padded between the prefix and the
rest, which requires correct masks and positions; before the first batch, a test checks that the model handles this.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, TextStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from loratune import kernels
from loratune.adapter.options import GREEDY, Sampling
from loratune.adapter.padding import pad_left, same_logits, write, writes_padded
from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.batch_check import padding_refusal
from loratune.data.formats import Message
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, Problem
from loratune.lora import attach
from loratune.lora.attach import PeftModel
from loratune.lora.tensors import BaseSnapshot
from loratune.model.fingerprints import Sampled
from loratune.text import beginning

_WORTHWHILE, _FEWEST = 0.05, 64
"""The fraction and the number of a batch's tokens that must be saved: the prefix costs an extra forward pass."""

_log = logging.getLogger(__name__)

Ids = Sequence[int]


class SharedPrompts:
    """Batches of one adapter whose rows may share a prefix.

    Attributes:
        padding: The id of the padding token.
    """

    def __init__(self, model: PeftModel, padding: int):
        """Args as the attributes."""
        self._model, self.padding = model, padding
        self._tried: bool | None = None

    @cached_property
    def mixes_padding(self) -> bool:
        """Whether padding changes what the model computes or writes for a row; tested once."""
        given = self._model, self.padding, kernels.sample_layers(self._model)
        return padding_refusal(*given) is not None or not writes_padded(*given)

    def batch(self, rows: Sequence[Ids], more: int) -> dict[str, Any]:
        """The keyword arguments of `generate` for a batch. The adapter must be active.

        Args:
            rows: The ids of each row.
            more: The maximum number of new tokens.

        Returns:
            input_ids and attention_mask, left-padded, and the `cache` of the prefix if all rows share one.
        """
        lowest, highest, shortest = min(map(tuple, rows)), max(map(tuple, rows)), min(map(len, rows)) - 1
        length = next((at for at in range(shortest) if lowest[at] != highest[at]), shortest)
        saved = length * (len(rows) - 1)
        is_worthwhile = saved >= _FEWEST and saved > _WORTHWHILE * sum(map(len, rows))
        if is_worthwhile and self._supported(max(map(len, rows)) + more) and self._is_right(max(rows, key=len), length):
            return self._with_cache(rows, length)
        return self.plain(rows)

    def plain(self, rows: Sequence[Ids]) -> dict[str, Any]:
        """Like `batch`, without a shared prefix."""
        return pad_left(self._model, rows, self.padding)

    def _with_cache(self, rows: Sequence[Ids], length: int) -> dict[str, Any]:
        prefix = torch.tensor([list(rows[0][:length])], device=self._model.device)
        cache = self._cache()
        self._model(input_ids=prefix, cache=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(rows))
        batch = self.plain([row[length:] for row in rows])
        prefixes = prefix.expand(len(rows), -1)
        batch["attention_mask"] = torch.cat([torch.ones_like(prefixes), batch["attention_mask"]], dim=1)
        return {**batch, "input_ids": torch.cat([prefixes, batch["input_ids"]], dim=1), "cache": cache}

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.get_base_model().config)

    def _supported(self, longest: int) -> bool:
        """Whether the cache consists of the keys and values of all positions, for rows of this length, and these do not
        depend on the length."""
        if any(longest > limit for limit in kernels.length_limits(self._model.config)):
            return False
        try:
            layers = self._cache().layers
        except (AttributeError, KeyError, TypeError, ValueError):
            return False
        return all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and longest <= layer.sliding_window)
            for layer in layers
        )

    def _is_right(self, longest: Ids, length: int) -> bool:
        """Whether the model gives the same logits with a cached prefix; tested once."""
        if self._tried is None:
            short, padded_to = longest[: length + 1], [*longest, longest[-1]]
            try:
                batches = self._with_cache([short, padded_to], length), self.plain([short])
                self._tried = same_logits(self._model, *batches, self.padding, new=1)
            except (AssertionError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                _log.debug("prefixes are not shared", exc_info=error)
                self._tried = False
        return self._tried


BATCH = 32
"""The number of prompts that commands pass to `complete` at once."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its base, which may have other adapters too, and the settings for rendering its prompts.

    Attributes:
        chat: Whether the training rows were rendered with the chat template.
        base_sample: A sample of the base's weights, and the parts of the base that PEFT may change, both taken before
            the adapter was attached.
        where: The path of the adapter, for messages.
        key: The adapter's name in PEFT.
        layers: Inference layers that use this adapter alone.
        mixes: Whether a batch may contain rows of this adapter and of other adapters with `mixes`.
        is_enough: Whether applying `layers` selects this adapter; if not, it must also be PEFT's active adapter.
        prompts: Makes batches of prompts for the model.
        fingerprint: That of the base.
        system: The system message that all training rows had; empty if there was none.
    """

    model: PeftModel
    tokenizer: Any
    renderer: Renderer
    data: DataSection
    chat: bool
    base_sample: tuple[Sampled, BaseSnapshot]
    where: str
    key: str
    layers: kernels.InferenceLayers
    mixes: bool
    is_enough: bool
    prompts: SharedPrompts
    fingerprint: str = ""
    system: str = ""

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Disable the adapter inside. Raises AdapterError: PEFT has changed the base."""
        sample, snapshot = self.base_sample
        with snapshot.alone(self.model, self.where):
            if not sample.is_in(self.model):
                what = "cannot be compared with its base: PEFT has changed the base's own weights for this adapter"
                raise AdapterError(Problem(Code.ADAPTER_NOT_REPRODUCIBLE, what, self.where))
            yield

    def activate(self) -> None:
        """Make this the active adapter of the PEFT model."""
        if self.model.active_adapter != self.key:
            self.model.set_adapter(self.key)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the model with this adapter inside."""
        with adapters_of_rows([self]):
            yield

    @contextmanager
    def scaled(self, factor: float) -> "Iterator[LoadedAdapter]":
        """Yields the same adapter with its update multiplied by a factor; this one must not be used inside."""
        with attach.scaled(self.model, self.key, factor):
            yield replace(self, layers=kernels.InferenceLayers(self.model, reader(self.key)))

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[list[int]]:
        """Complete a batch of prompts with this adapter, see the function `complete`."""
        return complete([(self, ids) for ids in prompts], max_new_tokens, sampling)

    def turns(self, prompt: str | list[Message], system: str) -> str | list[Message]:
        """The prompt to render: text becomes a user turn if the adapter was trained on conversations, and messages
        begin with a system message, unless they have one. system: it; empty for none."""
        if isinstance(prompt, str):
            if not self.chat:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        has_own = any(message["role"] in ("system", "developer") for message in prompt)
        return prompt if has_own or not system else [{"role": "system", "content": system}, *prompt]

    @property
    def system_note(self) -> str:
        """A line that says that the system message of the training rows is used."""
        return f"system message of the training rows: {beginning(self.system)}; `system=''` leaves it out"

    def text(self, ids: Sequence[int]) -> str:
        """A completion as text, without the end token."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def split_reasoning(self, ids: Sequence[int]) -> tuple[str, str]:
        """The reasoning of a completion, which may be empty, and the rest as text."""
        if not self.chat or (parts := self.renderer.template().split_reasoning(self.tokenizer.decode(ids))) is None:
            return "", self.text(ids)
        reasoning, content = parts
        for token in self.tokenizer.all_special_tokens:
            content = content.replace(token, "")
        return reasoning, content

    def until_end(self, ids: list[int]) -> list[int]:
        """The ids up to the first end token; what follows it is padding."""
        ends = [position for position, token in enumerate(ids) if token in self.renderer.end_ids]
        return ids[: ends[0] + 1] if ends else ids


Request = tuple[LoadedAdapter, Sequence[int]]
"""An adapter, and the ids of a prompt for it."""


class TextPieces(TextStreamer):
    """A streamer that passes a completion to a function as text, piece by piece, followed by a line break."""

    def __init__(self, tokenizer: Any, receive: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._receive = receive

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece."""
        self._receive(f"{text}\n" if stream_end else text)


class _Ends(StoppingCriteria):
    """Ends a completion that contains a stop text, and all completions once `stopped` returns True."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int, stopped: Callable[[], bool]):
        self._tokenizer, self._stop, self._start, self._stopped = tokenizer, stop, start, stopped
        self._tokens = 4 * max(map(len, stop), default=0) + 8  # a token may be a single byte of a character

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ended = [bool(self._stopped())] * len(input_ids)
        if self._stop:
            new = input_ids[:, self._start :][:, -self._tokens :]
            texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
            ended = [ended[0] or any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def complete(
    requests: Sequence[Request],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    streamer: Any = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Complete prompts, each with its adapter; all adapters are on the same model.

    Prompts of different adapters share a batch if each adapter is plain LoRA of linear layers, and if they have the
    same end tokens. If padding changes the model's output, prompts are completed one by one, and so is a prompt that
    passes a limit of `kernels.length_limits` as it is completed.

    Args:
        requests: Adapters and prompts.
        max_new_tokens: The maximum number of new tokens per prompt.
        sampling: The sampling settings.
        streamer: A streamer of transformers, for a single prompt.
        stopped: Called after each token; returns whether to stop.

    Returns:
        The new ids of each prompt, including the end token or the tokens of the stop text.
    """
    batches: dict[Any, list[int]] = {}
    limits = kernels.length_limits(requests[0][0].model.config)
    for number, (adapter, ids) in enumerate(requests):
        alone = None
        if len(requests) > 1:
            is_alone = kernels.crosses(limits, len(ids), max_new_tokens) or adapter.prompts.mixes_padding
            alone = number if is_alone else None
        key = (adapter.renderer.end_ids, None if adapter.mixes else adapter.key, alone)
        batches.setdefault(key, []).append(number)
    answers: dict[int, list[int]] = {}
    with torch.random.fork_rng(enabled=sampling.seed is not None):  # afterwards random numbers continue as before
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        for numbers in batches.values():
            batch = [requests[number] for number in numbers]
            answers |= zip(numbers, _complete(batch, max_new_tokens, sampling, streamer, stopped), strict=True)
    return [answers[number] for number in range(len(requests))]


def complete_as_text(
    requests: Sequence[Request], max_new_tokens: int, sampling: Sampling = GREEDY, streamer: Any = None
) -> list[str]:
    """The completions of one batch as text, without end tokens and stop texts. Args as for `complete`."""
    completions = complete(requests, max_new_tokens, sampling, streamer)
    return [sampling.cut(adapter.text(ids)) for (adapter, _), ids in zip(requests, completions, strict=True)]


@torch.inference_mode()
def _complete(
    requests: Sequence[Request], max_new_tokens: int, sampling: Sampling, streamer: Any, stopped: Callable[[], bool]
) -> Iterator[list[int]]:
    """The completions of one batch."""
    first = requests[0][0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=float(sampling.temperature) or None,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        eos_token_id=list(first.renderer.end_ids),
        pad_token_id=first.prompts.padding,
        use_cache=True,
    )
    shares = all(adapter is first for adapter, _ in requests)
    with adapters_of_rows([adapter for adapter, _ in requests]):
        prompts = [ids for _, ids in requests]
        batch = first.prompts.batch(prompts, max_new_tokens) if shares else first.prompts.plain(prompts)
        start = batch["input_ids"].shape[1]
        ends = _Ends(first.tokenizer, sampling.stop, start, stopped)
        ids = write(first.model, batch, settings, ends, streamer)
    rows = ids[:, start:].tolist()
    return (adapter.until_end(row) for (adapter, _), row in zip(requests, rows, strict=True))


@contextmanager
def adapters_of_rows(adapters: Sequence[LoadedAdapter]) -> Iterator[None]:
    """Compute each row of a batch inside with its adapter; several adapters must all have `mixes`."""
    first, keys = adapters[0], list(dict.fromkeys(adapter.key for adapter in adapters))
    if not first.is_enough:
        first.activate()
    layers = first.layers
    if len(keys) > 1:
        rows = [keys.index(adapter.key) for adapter in adapters]
        layers = kernels.InferenceLayers(first.model, *map(reader, keys), rows=rows)
    with layers.applied(), kernels.dense_states(first.model):
        yield


def reader(key: str) -> kernels.Reader:
    """A function that reads the layers of one adapter, by its name in the model."""
    return partial(attach.adapted_linear, name=key)
