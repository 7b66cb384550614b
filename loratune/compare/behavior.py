"""What a model writes by itself, and how far an adapter changes it on the base's answers to everyday instructions.

The base answers each instruction by its most probable tokens. At each token of these answers, the distributions of
base and adapter are compared: their Kullback-Leibler divergence, over the whole vocabulary, and whether both would
choose the same token. An adapter that has learned a task and nothing else has a divergence near 0 here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, StoppingCriteria

from loratune import data, kernels
from loratune.adapter import padding
from loratune.adapter.padding import NO_STOP, pad_left
from loratune.codes import Code
from loratune.compare.base_results import Base, BaseResults, Numbers
from loratune.compare.engine import Engine, ScoringLayout
from loratune.data.rendering import Renderer
from loratune.errors import DataError, LoratuneError, ModelError, Problem, is_out_of_memory
from loratune.events import Advance, counting, progress
from loratune.model.load import context_length
from loratune.statistics import Interval, finite, mean_ratio_interval, median_interval, positive_ratio_interval
from loratune.system import accelerator
from loratune.text import plural

INSTRUCTIONS = Path(data.__file__).with_name("instructions.txt")
"""Everyday instructions, one per line."""
ANSWER_TOKENS = 48
"""The maximum number of tokens of an answer."""
SHOWN = 6
"""The number of instructions whose answers are kept, to be shown side by side."""
_WRITTEN_AT_ONCE = 24
"""The number of texts that are written in one batch."""
_BATCH_TOKENS = 128
"""Tokens per batch; the logits of base and adapter for its answers are in memory at once."""
_WORTH_TELLING = 0.8
"""An agreement that is significantly below this share is reported."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Sample:
    """An instruction, and the answers of base and adapter."""

    instruction: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Behavior:
    """How an adapter changes the base's answers to everyday instructions.

    Attributes:
        texts: The number of answers of the base that were compared; 0 if none were.
        tokens: Their tokens.
        divergence: KL(base ‖ adapter), in nats per token: the mean over all tokens, to which one text can add most.
        divergence_interval: Its 95 % interval over texts; None for too few.
        agreement: The share of tokens for which both would choose the same.
        agreement_interval: Its 95 % interval over texts; None for too few.
        median: The median over texts of the divergence, in nats per token of each text.
        median_interval: Its 95 % interval; None for too few texts.
        samples: Some of the instructions with both answers.
        unknown: Why nothing was compared, or empty.
    """

    texts: int = 0
    tokens: int = 0
    divergence: float = 0.0
    divergence_interval: Interval | None = None
    agreement: float = 1.0
    agreement_interval: Interval | None = None
    median: float = 0.0
    median_interval: Interval | None = None
    samples: tuple[Sample, ...] = ()
    unknown: str = ""

    @classmethod
    def of(
        cls,
        divergences: NDArray[np.float64],
        equal: NDArray[np.float64],
        tokens: NDArray[np.float64],
        samples: Sequence[Sample] = (),
    ) -> "Behavior":
        """Create it from what `compare_tokens` returns."""
        total, same, each = float(tokens.sum()), mean_ratio_interval(equal, tokens), divergences.clip(min=0) / tokens
        return cls(
            len(tokens), int(total),
            float(divergences.sum()) / total, positive_ratio_interval(divergences.clip(min=0), tokens),
            float(equal.sum()) / total, same and Interval(max(same.low, 0.0), min(same.high, 1.0)),
            float(np.median(each)), median_interval(each), tuple(samples),
        )  # fmt: skip

    def __str__(self) -> str:
        """A line with the median and the agreement. The mean is in the record only: a single text can make it, and the
        upper end of its interval, very large."""
        if self.unknown:
            return f"not measured: {self.unknown}"
        same, middle = self.agreement_interval, self.median_interval
        return (
            f"median KL {self.median:.3f} nats per token"
            f"{f' (95 % interval {middle.low:.3f} to {middle.high:.3f})' if middle else ''}"
            f" on its answers to {plural(self.texts, 'instruction')}; the same next token for {self.agreement:.0%}"
            f"{f' (95 % interval {same.low:.0%} to {same.high:.0%})' if same else ''}"
        )

    @property
    def has_suffered(self) -> bool:
        """Whether the model does not answer as its base any more, for sure."""
        return self.agreement_interval is not None and self.agreement_interval.high < _WORTH_TELLING

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        if self.unknown:
            return {"not_measured": self.unknown}
        intervals = {"divergence_interval": self.divergence_interval, "agreement_interval": self.agreement_interval}
        intervals["median_divergence_interval"] = self.median_interval
        values: dict[str, Any] = {"texts": self.texts, "tokens": self.tokens}
        values |= finite({"divergence": self.divergence, "agreement": self.agreement, "median_divergence": self.median})
        values |= {name: finite(interval and interval.to_dict()) for name, interval in intervals.items()}
        return values | {"samples": [vars(sample) for sample in self.samples]}


def compare_on_base_answers(base: BaseResults, renderer: Renderer) -> Behavior:
    """Compare the active adapter of a model with its base on the base's answers; `Behavior.unknown` says why they
    cannot be compared. renderer: renders the instructions."""
    try:
        instructions, given = prompts(renderer, context_length(base.engine.model.config))
        with progress("comparing the adapter with its base on everyday instructions"):
            answers = base_answers(base, given, renderer.end_ids)
            texts = [(ids, new) for ids, new in zip(given, answers, strict=True) if not {*new} <= {*renderer.end_ids}]
            if not texts:
                return Behavior(unknown="the base answers nothing but its end token")
            found = compare_tokens(base.engine.model, base.engine, base.alone, texts)
            own = _answers(base.engine, given[:SHOWN], renderer.end_ids)
    except (DataError, ModelError) as error:
        return Behavior(unknown=error.problems[0].what)
    pairs = zip(instructions[:SHOWN], answers, own, strict=False)
    return Behavior.of(*found, [Sample(text, *(text_of(renderer, ids) for ids in both)) for text, *both in pairs])


def text_of(renderer: Renderer, ids: Ids) -> str:
    """The text of an answer, without special tokens."""
    text: str = renderer.tokenizer.decode([*ids], skip_special_tokens=True)
    return text.strip()


def _answers(engine: Engine, given: Sequence[Ids], end_ids: Sequence[int]) -> list[list[int]]:
    return [*write(engine.model, engine, given, ANSWER_TOKENS, end_ids=end_ids)]


def base_answers(base: BaseResults, given: Sequence[Ids], end_ids: Sequence[int]) -> list[Ids]:
    """The most probable answers of a base to prompts, of at most `ANSWER_TOKENS` tokens each."""

    def compute() -> Numbers:
        found = _answers(base.engine, given, end_ids)
        return np.array([*map(len, found), *(id for ids in found for id in ids)], np.float64)

    about = ["answers", ANSWER_TOKENS, _WRITTEN_AT_ONCE, [*end_ids], [[*ids] for ids in given]]
    lengths, ids = np.split(base.once(about, compute).astype(np.int64), [len(given)])
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def prompts(
    renderer: Renderer, context: int | None, arguments: Mapping[str, Any] = MappingProxyType({})
) -> tuple[list[str], list[Ids]]:
    """The instructions and their ids: as a user's turn of the chat template, or as text if there is none. arguments: of
    the template, beside those of the renderer.

    Raises:
        DataError: The chat template refuses them.
        ModelError: The context of the model has no room for them.
    """
    texts, found = list[str](), list[Ids]()
    for text in INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
        asked = [{"role": "user", "content": text}] if renderer.tokenizer.chat_template else f"{text}\n"
        ids = renderer.prompt(asked, arguments=arguments)
        if context is None or len(ids) + ANSWER_TOKENS <= context:
            texts.append(text)
            found.append(ids)
    if not found:
        what = f"the instructions and their answers are too long for the {context:,} positions of the model"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what))
    return texts, found


def batches(
    engine: Engine, texts: Sequence[tuple[Ids, Ids]]
) -> Iterator[tuple[Sequence[int], dict[str, Any], torch.Tensor]]:
    """The texts in batches, as their numbers, the inputs of the model, and where `kernels.logits_at` gives the logits
    of their answers. texts: prompt and answer of each."""
    rows = [{"input_ids": [*ids, *answer], "labels": [-100] * len(ids) + [*answer]} for ids, answer in texts]
    scoring = ScoringLayout(engine.flat, None, engine.pad_id, _BATCH_TOKENS if engine.padded else 0)
    layout = scoring.layout(rows, np.array([len(row["input_ids"]) for row in rows]))
    for numbers in scoring.batches(layout, range(len(rows))):
        batch = layout.collate([rows[number] for number in numbers])
        labels, _ = batch.pop("labels"), batch.pop("lengths")
        places = (labels[:, 1:] >= 0).nonzero()
        yield numbers, batch, places[:, 0] * labels.shape[1] + places[:, 1]


@torch.no_grad()  # weights that are gathered from other processes must not be tensors of inference mode
def compare_tokens(
    model: Any, engine: Engine, base: Base, texts: Sequence[tuple[Ids, Ids]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Compare an adapter with its base at each token of some answers.

    Args:
        model: A `PeftModel`, whose adapter is active.
        engine: Computes its logits.
        base: See `Base`.
        texts: Prompt and answer of each text; answers have at least one token.

    Returns:
        For each text: the summed divergence in nats, at how many tokens both would choose the same, and the tokens of
        the answer. (texts,) each.
    """
    values = np.zeros((len(texts), 2))
    was_training = model.training
    model.eval()
    with counting("comparing everyday answers with those of the base", len(texts)) as advance:
        for numbers, batch, at in batches(engine, texts):
            with engine.acceleration.applied(model):
                ours = kernels.logits_at(model, batch, at).float().log_softmax(-1)
            with base(), engine.acceleration.applied(model):
                its = kernels.logits_at(model, batch, at).float().log_softmax(-1)
            same = (ours.argmax(-1) == its.argmax(-1)).double()
            nats = its.sub(ours).mul_(its.exp_()).sum(-1, dtype=torch.float64)
            counts = [len(texts[number][1]) for number in numbers]
            for column, part in enumerate((nats, same)):
                values[[*numbers], column] = [float(one.sum()) for one in torch.split(part.cpu(), counts)]
            advance(len(numbers))
    model.train(was_training)
    return values[:, 0], values[:, 1], np.array([len(answer) for _, answer in texts], np.float64)


def write(
    model: Any, engine: Engine, given: Sequence[Ids], max_new_tokens: int, *, end_ids: Sequence[int],
    seed: int | None = None,
) -> Iterator[list[int]]:  # fmt: skip
    """Continue prompts by the most probable tokens, or by tokens drawn with their probabilities.

    Args:
        model: A `PeftModel`.
        engine: Says whether prompts can be padded, and with which token.
        given: The prompts.
        max_new_tokens: The maximum number of tokens per text.
        end_ids: Tokens that end a text; none for texts that all have `max_new_tokens`.
        seed: The seed of the draws; None for the most probable tokens.

    Returns:
        The new tokens of each text, including the one that ends it.

    Raises:
        ModelError: The model cannot write.
    """
    draw = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if seed is not None else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=[*end_ids] or [NO_STOP], pad_token_id=engine.pad_id, **draw
    )
    limits, was_training = kernels.length_limits(model.config), model.training
    one_by_one = any(kernels.crosses(limits, len(ids), max_new_tokens) for ids in given)
    each = _WRITTEN_AT_ONCE if engine.writes_padded and not one_by_one else 1
    writing = counting("writing answers", -(-len(given) // each) * max_new_tokens)
    model.eval()
    try:
        with writing as advance, accelerator.same_random_numbers(model.device), torch.no_grad():
            if seed is not None:
                torch.manual_seed(seed)
            for start in range(0, len(given), each):
                inputs = pad_left(model, given[start : start + each], engine.pad_id)
                with _as_unsupported(), kernels.dense_states(model):
                    ids = padding.write(model, inputs, settings, _Counted(advance))
                    written = ids[:, inputs["input_ids"].shape[1] :]
                for ids in written.tolist():
                    end = next((place + 1 for place, token in enumerate(ids) if token in end_ids), len(ids))
                    yield ids[:end]
    finally:
        model.train(was_training)


def passes(engine: Engine, texts: int, max_new_tokens: int) -> int:
    """How many forward passes it takes to write texts, at most: one for each token of the texts in a batch."""
    return -(-texts // (_WRITTEN_AT_ONCE if engine.writes_padded else 1)) * max_new_tokens


class _Counted(StoppingCriteria):
    """Stops nothing, and counts the tokens."""

    def __init__(self, advance: Advance):
        self._advance = advance

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._advance(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _as_unsupported() -> Iterator[None]:
    """Translates errors of a model that writes, but for a lack of memory: families raise all kinds of errors where
    their cache of keys and values does not fit them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LoratuneError) or is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, f"the model cannot write: {reason}")) from None
