"""Generation with an adapter on its base. Prompts for several adapters may share a batch.

A prefix that all prompts of a batch share is computed once: its keys and values are copied for each row. In a causal
model the states of a prefix do not depend on what follows it. Rows that are shorter than others are padded between the
prefix and the rest, where masks and positions have to be right; whether a model gets that right is tried before the
first batch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, TextStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from loratune import kernels
from loratune.adapter.options import GREEDY, Sampling
from loratune.codes import Code
from loratune.config import DataSection
from loratune.data.batches import pad, padding_refusal
from loratune.data.formats import Message
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, Problem
from loratune.lora import attach
from loratune.lora.attach import PeftModel
from loratune.lora.tensors import BaseSnapshot
from loratune.model.fingerprints import Sampled

_WORTHWHILE, _FEWEST = 0.05, 64
"""The share of a batch's tokens that must be saved, and the number: the prefix costs a pass of its own."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How much logits may differ from those of the rows alone, relative to the largest."""

_log = logging.getLogger(__name__)

Ids = Sequence[int]


class SharedPrompts:
    """Batches of one adapter whose rows may share a prefix.

    Attributes:
        padding: The id of the token for padding.
    """

    def __init__(self, model: PeftModel, padding: int):
        """Arguments as the attributes."""
        self._model, self.padding = model, padding
        self._tried: bool | None = None

    @cached_property
    def mixes_padding(self) -> bool:
        """Whether padding changes what the model computes for a row; tried once."""
        return padding_refusal(self._model, self.padding) is not None

    def batch(self, rows: Sequence[Ids], more: int) -> dict[str, Any]:
        """The keywords with which `generate` is called for a batch. The adapter must be active.

        Args:
            rows: The ids of each row.
            more: How many tokens will be generated.

        Returns:
            input_ids and attention_mask, padded on the left, and, where all rows share a prefix, the `cache` of it.
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
        batch = pad([{"input_ids": ids} for ids in rows], self.padding, "left")
        return {name: tensor.to(self._model.device) for name, tensor in batch.items()}

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
        """Whether the cache holds the keys and values of all positions of rows of this length, and nothing else."""
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
        """Whether the model computes the same with a prefix of a row in its cache; tried once."""
        if self._tried is None:
            short, padded_to = longest[: length + 1], [*longest, longest[-1]]
            try:
                found = [self._next_logits(self._with_cache([short, padded_to], length))]
                found += [self._next_logits(self.plain([short]))]
            except (AssertionError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                _log.debug("prefixes are not shared", exc_info=error)
                found = [torch.zeros(1), torch.ones(1)]
            difference = float((found[0] - found[1]).abs().max() / found[1].abs().max())
            self._tried = difference <= _TOLERANCE.get(self._model.dtype, 0.0)
            _log.debug("shared prefixes: logits differ by %.1e", difference)
        return self._tried

    def _next_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The logits that follow the first row."""
        settings = GenerationConfig(
            max_new_tokens=1, output_logits=True, return_dict_in_generate=True, pad_token_id=self.padding
        )
        found: Any = self._model.generate(**batch, generation_config=settings)
        return found.logits[0][0].float()  # type: ignore[no-any-return]


BATCH = 32
"""How many prompts the commands hand to `complete` at once."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its base, which may have other adapters too, and how prompts are rendered for it.

    Attributes:
        chat: Whether the rows of training went through the chat template.
        base_sample: A sample of the base's weights, and the parts of the base that PEFT may change, both taken before
            the adapter was attached.
        where: The path of the adapter, for messages.
        key: PEFT's name of the adapter.
        layers: The layers that compute with this adapter alone.
        mixes: Whether a batch may hold rows of this adapter and of others that mix.
        is_enough: Whether applying `layers` is all it takes to compute with this adapter; if not, PEFT
            has to make it the active one.
        prompts: Makes batches of prompts for the model.
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

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model computes as the base alone. Raises AdapterError: PEFT has changed the base."""
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
        """Inside, the model computes with this adapter."""
        with adapters_of_rows([self]):
            yield

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[list[int]]:
        """Complete a batch of prompts with this adapter, see `complete`."""
        return complete([(self, ids) for ids in prompts], max_new_tokens, sampling)

    def turns(self, prompt: str | list[Message]) -> str | list[Message]:
        """The prompt as it is rendered: text is the user's turn if the adapter was trained on conversations."""
        return [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt

    def text(self, ids: Sequence[int]) -> str:
        """A completion as text, without the token that ends it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def until_end(self, ids: list[int]) -> list[int]:
        """The ids up to the first end token; what follows it is padding."""
        ends = [position for position, token in enumerate(ids) if token in self.renderer.end_ids]
        return ids[: ends[0] + 1] if ends else ids


Request = tuple[LoadedAdapter, Sequence[int]]
"""An adapter, and the ids of the prompt that it completes."""


class TextPieces(TextStreamer):
    """Hands a completion on as text, piece by piece, and a line break at its end."""

    def __init__(self, tokenizer: Any, receive: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._receive = receive

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece."""
        self._receive(f"{text}\n" if stream_end else text)


class _Ends(StoppingCriteria):
    """Ends each completion that holds one of some texts, and all as soon as a function says so."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int, stopped: Callable[[], bool]):
        self._tokenizer, self._stop, self._start, self._stopped = tokenizer, stop, start, stopped
        self._tokens = 4 * max(map(len, stop), default=0) + 8  # a token may be a single byte of a character

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ended = [self._stopped()] * len(input_ids)
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

    Prompts of different adapters are computed as one batch where that is possible: where each of the adapters is plain
    LoRA of linear layers, and the same tokens end their answers. A model that computes something else for padded rows
    gets its prompts one by one.

    Args:
        requests: Adapters and prompts.
        max_new_tokens: The longest completion.
        sampling: How tokens are chosen.
        streamer: A streamer of transformers, for a single prompt.
        stopped: Asked after each token whether to stop here.

    Returns:
        The new ids of each prompt, with the token, or the tokens of the stop text, that end the completion.
    """
    batches: dict[Any, list[int]] = {}
    for number, (adapter, _) in enumerate(requests):
        alone = number if len(requests) > 1 and adapter.prompts.mixes_padding else None
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
    """The completions of one batch as text, without what ends them. Arguments as of `complete`."""
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
        temperature=sampling.temperature or None,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        eos_token_id=list(first.renderer.end_ids),
        pad_token_id=first.prompts.padding,
    )
    shares = all(adapter is first for adapter, _ in requests)
    with adapters_of_rows([adapter for adapter, _ in requests]):
        prompts = [ids for _, ids in requests]
        batch = first.prompts.batch(prompts, max_new_tokens) if shares else first.prompts.plain(prompts)
        start = batch["input_ids"].shape[1]
        ends = [_Ends(first.tokenizer, sampling.stop, start, stopped)]
        ids = first.model.generate(**batch, generation_config=settings, streamer=streamer, stopping_criteria=ends)
    rows = ids[:, start:].tolist()
    return (adapter.until_end(row) for (adapter, _), row in zip(requests, rows, strict=True))


@contextmanager
def adapters_of_rows(adapters: Sequence[LoadedAdapter]) -> Iterator[None]:
    """Inside, each row of a batch is computed with its adapter; several adapters must be ones that mix."""
    first, keys = adapters[0], list(dict.fromkeys(adapter.key for adapter in adapters))
    if not first.is_enough:
        first.activate()
    layers = first.layers
    if len(keys) > 1:
        rows = [keys.index(adapter.key) for adapter in adapters]
        layers = kernels.InferenceLayers(first.model, *map(reader, keys), rows=rows)
    with layers.applied():
        yield


def reader(key: str) -> kernels.Reader:
    """A function that reads the layers of one adapter, by its name in the model."""
    return partial(attach.adapted_linear, name=key)
