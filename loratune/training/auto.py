"""Chooses values for `auto`: learning rate, schedule and length of a run, and the shape of its adapter.

The choices are based on the experiments of scripts/learn.py (tables in scripts/learning/README.md), otherwise on the
sources given with each number. They depend only on config, rows and base, so they are the same in every process and on
every machine; a resumed run keeps its choices.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratune.codes import Code
from loratune.config import AUTO, LoraSection, RunConfig, TrainingSection, decided, from_values
from loratune.config.keys import DECIDED_BY_RUN, yaml_flow
from loratune.errors import ConfigError, Problem
from loratune.text import plural
from loratune.training.schedule import Schedule

_RATE, _RATE_WIDTH, _RATE_EXPONENT, _RATE_ALPHA = 5e-4, 2000, 0.78, 32
"""Learning rate at a reference hidden size, its exponent, and the lora_alpha. Source: the sweep of 35 models
in https://thinkingmachines.ai/blog/lora/ and tinker_cookbook.hyperparam_utils."""
_RATE_ROWS, _MOST_RATE = 8, 5e-3
"""Rows of an optimizer step at which the rate holds (it grows with the square root), and the highest rate."""
_RATE_LAYERS = 30
"""Layers below which the rate grows, with the root of how many times fewer there are: each adapter has to do more.

SmolLM2-135M (scripts/README.md): with adapters on 8 of its 30 layers, and on a model of 8 of them, 6.4e-3 is better
than the 2.6e-3 that suits all 30, on two tasks of three and on four of five. Deeper models keep the source's rate."""
_SMOOTH_ROWS = 32
"""Rows of a step beyond which the rate does not grow further."""
_COMPARED_RATE, _ORPO_RATE = 1 / 10, 1 / 5
"""Factor of the rate for preference objectives, and for ORPO, whose loss includes the chosen answer's likelihood.

SmolLM2-135M, 128 pairs, 30 steps (scripts/README.md): of 1/20, 1/10, 1/5 and 2/5 the second makes the chosen answers of
DPO likeliest, and higher ones make them less likely again; KTO and ORPO gain beyond. LLaMA-Factory's examples of LoRA
take 1/20 for DPO and KTO (examples/train_lora, 0.9), on more pairs."""
_CONTINUED_RATE = 1 / 2
"""Factor of the rate for `sft` that starts from an adapter.

SmolLM2-135M, 100 rows after 100 others, two passes (scripts/learning/README.md): half of the rate had 2.2 % less, 0.8 %
more and 0.1 % less loss on the new rows than the whole in three pairs of tasks, and about half as much was forgotten:
+0.09 instead of +0.20, and +0.19 instead of +0.37 nats on unseen rows of the earlier task. A quarter forgets less
again, but had 2.6 and 5.3 % more loss on rows of another task. Objectives that compare answers are not multiplied by
it: theirs is a tenth or a fifth already, and DPO after `sft`, over four passes at its own rate, forgot 0.02 nats."""
_RATE_OF_MORE = 0.77
"""Factor of the rate with adapters on more than q, k, v and o.

SmolLM2-135M, all linear layers (scripts/learning/README.md): of 1.6e-3 and 2.6e-3 neither is better on all tasks, and
the lower one keeps more of the base; this is between them."""
_ATTENTION = frozenset("qkvo")
_FEW_STEPS, _SOME_STEPS = 100, 500
"""The most steps of a run that reads its rows four times, and of one that reads them twice, which is for adapters on q,
k, v and o alone; with more steps they are read once.

SmolLM2-135M, r = 8, q, k, v and o, with retention (scripts/learning/length.md, Few rows), four passes at half of the
rate against two at the whole one, five tasks: over 50 and 100 rows 15 to 39 % less loss on the quickstart's rows, 1 %
less to 3 % more on the others; over 400 rows 0.5 to 12 % more on four of them. With 250 steps two passes over 1,000
rows are better than one by 2 % or more; with 1,000 over 4,000 rows of classes by 22 %, from 0.12 to 0.09 nats; with
1,250 over 5,000 rows of spelling by nothing. They take twice the time, so where the limit of two lies is a choice, and
that of four is between 100 and 400 rows. With all linear layers, two passes over 200 to 1,000 rows had more loss than
one on six sets of rows of eight; over 96 rows of the quickstart four at a quarter of the rate had 25 % less."""
_TARGETS, _WHY_TARGETS = "all-linear", "2 to 4 % less loss than q, k, v and o on four of five tasks, more parameters"
"""SmolLM2-135M, r = 8, each at the better of two rates (scripts/learning/README.md, Targets and rank): 2.1 to 3.7 %
less. On the fifth task, classes, the difference is within its interval. The MLP holds most of the parameters."""
_RANKS = (8, 16, 32, 64)
"""Ranks that `auto` chooses from: the first with as many parameters as there are supervised tokens. An adapter holds
about two bits a parameter, and a token of instructions teaches about one (https://thinkingmachines.ai/blog/lora/)."""
_ALPHA = 16
"""With it the best learning rate hardly depends on the rank, as the update is scaled by lora_alpha / r."""
_ADAPTIVE = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor")
"""Optimizers whose steps have the size of the rate, so that one formula holds for them."""
_STEPS, _LEAST_STEP, _MOST_STEP = 200, 8, 32
"""About the number of optimizer steps of a pass over the rows, and the fewest and the most rows of a step."""
WHY_ROWS_PER_STEP = f"{_LEAST_STEP} to {_MOST_STEP}, so that a pass has about {_STEPS} steps where the rows allow it"


def _no_parameters(lora: LoraSection) -> int:
    return 0


@dataclass(frozen=True)
class Facts:
    """The facts that `auto` is decided by. The default is that of a check or a count without rows, in which a rank that
    depends on rows becomes the lowest choice.

    Attributes:
        hidden_size: The width of the model; None if its configuration does not define it.
        layers: The depth of the model; None if its configuration does not define it.
        items: The number of training rows, or of packs.
        supervised: Supervised tokens of one pass over the rows.
        processes: The number of processes.
        unit_parameters: Function that counts the parameters per unit of `r`; `r` of the section is higher than the
            ranks of its patterns.
        start: Settings of the adapter that the run starts from, see `initialize.start_settings`; empty without one.
        rows_in_pack: The average number of rows of a pack, each of which is a micro-step; None if rows are not packed.
    """

    hidden_size: int | None = None
    layers: int | None = None
    items: int = 0
    supervised: int = 0
    processes: int = 1
    unit_parameters: Callable[[LoraSection], int] = _no_parameters
    start: Mapping[str, Any] = field(default_factory=dict)
    rows_in_pack: float | None = None

    def schedule(self, training: TrainingSection) -> Schedule:
        """The steps of a section without `auto` for the number of passes."""
        size = training.per_device_train_batch_size if self.rows_in_pack is None else 1
        return Schedule.of(training, self.items, size, self.processes)


Choices = dict[str, tuple[Any, str]]
"""Full key → its value, and the reason."""


def decide(config: RunConfig, facts: Facts) -> tuple[RunConfig, Choices]:
    """Give each `auto` of `lora` and `training` its value. Raises ConfigError: as `decide_training`."""
    lora, choices = decide_lora(config.lora, facts)
    config = config.model_copy(update={"lora": lora})
    training, more = decide_training(config, facts)
    return config.model_copy(update={"training": training}), choices | more


def lines(choices: Choices) -> Iterator[str]:
    """The choices as lines for the user."""
    yield from (f"auto: {key} is {shown(value)} ({why})" for key, (value, why) in choices.items())
    if choices:
        yield "auto: each can be set instead, in the config or by --set KEY=VALUE"


def shown(value: Any) -> str:
    """A value of a key as the user would write it."""
    return f"{value:g}" if isinstance(value, float) else yaml_flow(value)


def decide_lora(lora: LoraSection, facts: Facts) -> tuple[LoraSection, Choices]:
    """The shape of the adapter, which has to be known before there are batches."""
    found: Choices = {}

    def choose(key: str, value: Any, why: str) -> None:
        nonlocal lora
        if lora.model_dump()[key] == AUTO:
            known = facts.start.get(key)
            value, why = (known, "that of the adapter it starts from") if known is not None else (value, why)
            lora = lora.model_copy(update={key: value})
            found[f"lora.{key}"] = value, why

    choose("target_modules", _TARGETS, _WHY_TARGETS)
    r, why = None, ""
    if lora.r == AUTO and "r" not in facts.start:
        even_and_highest = 2 * max([1, *lora.rank_pattern.values()])
        unit = facts.unit_parameters(lora.model_copy(update={"r": even_and_highest, "lora_alpha": 1}))
        r = next((r for r in _RANKS if r * unit >= facts.supervised), _RANKS[-1] if unit else _RANKS[0])
        why = f"A and B of {r * unit:,} values for {facts.supervised:,} supervised tokens"
    choose("r", r, why)
    choose("lora_alpha", _ALPHA, "the best learning rate hardly depends on the rank then")
    return lora, found


def decide_training(config: RunConfig, facts: Facts) -> tuple[TrainingSection, Choices]:
    """Rate, schedule and length of a run whose adapter shape is decided.

    Raises:
        ConfigError: There is no rate for the optimizer, or for a model of unknown width.
    """
    training, found, is_continued = config.training, Choices(), config.lora.start_from is not None

    def choose(key: str, value: Any, why: str) -> None:
        nonlocal training
        if training.model_dump()[key] == AUTO:
            training = training.model_copy(update={key: value})
            found[f"training.{key}"] = value, why

    steps = facts.schedule(training.model_copy(update={"num_train_epochs": 1.0, "max_steps": -1})).steps_of_pass
    is_attention, passes = _is_attention(config.lora), 1.0
    if 4 * steps <= _FEW_STEPS:
        passes = 4.0
    elif 2 * steps <= _SOME_STEPS and is_attention:
        passes = 2.0
    if training.max_minutes is not None and training.num_train_epochs == AUTO:
        most = max(_full_rate_passes(config.lora), passes)
        training = training.model_copy(update={"num_train_epochs": most})
    elif training.max_steps < 0:
        why = f"{steps:,} step{'s' if steps > 1 else ''} in each"
        if passes > 1:
            why += f", as there are few rows; if it has not learned enough, try {2 * passes:g}"
        choose("num_train_epochs", passes, why)
    if training.learning_rate == AUTO:
        choose("learning_rate", *_rate_of_run(training, config.lora, facts))
    choose("lr_scheduler_type", "linear", "down to zero")
    grows = "as for a new adapter" if is_continued else "the update starts at zero and grows by itself"
    choose("warmup_steps", 0.0, grows)
    return training, found


def _rate_of_run(training: TrainingSection, lora: LoraSection, facts: Facts) -> tuple[float, str]:
    """The learning rate of a run whose length is decided, and why. Raises as `decide_training`."""
    unknown = "a model whose configuration has no hidden_size" if facts.hidden_size is None else ""
    if training.optim not in _ADAPTIVE or facts.hidden_size is None:
        what, key = f"auto knows no rate for {unknown or training.optim}", "training.learning_rate"
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, key=key, fix="give it as a number"))
    schedule = facts.schedule(training)
    rows = round((facts.rows_in_pack or 1.0) * schedule.items_of_step)
    rate, why = learning_rate(lora, facts.hidden_size, facts.layers, rows)
    part, of = 1.0, ""
    if training.objective != "sft":
        part, of = _ORPO_RATE if training.objective == "orpo" else _COMPARED_RATE, "of the rate of sft"
    elif lora.start_from is not None:
        part, of = _CONTINUED_RATE, "of the rate of a new adapter, to lose less of the one it continues from"
    if part < 1:
        rate, why = float(f"{rate * part:.2g}"), f"{part:g} {of}; {why}"
    if training.max_minutes is not None:  # the steps are not known yet, see `time_budget`
        return rate, why
    passes = schedule.passes if training.max_steps > 0 else decided(training.num_train_epochs)
    return over_passes(rate, why, passes, lora)


def lower_rate(config: RunConfig, facts: Facts) -> float:
    """A learning rate to suggest if the rate of a run was too high: the choice of `auto`, if that is at most half of
    it, otherwise a tenth of it. config: without `auto`."""
    rate = decided(config.training.learning_rate)
    training = config.training.model_copy(update={"learning_rate": AUTO})
    try:
        found = decided(decide_training(config.model_copy(update={"training": training}), facts)[0].learning_rate)
    except ConfigError:
        found = rate
    return found if found <= rate / 2 else rate / 10


def rows_per_step(rows: int) -> int:
    """Rows of an optimizer step for a number of training rows: a power of two."""
    return 1 << (min(max(rows // _STEPS, _LEAST_STEP), _MOST_STEP).bit_length() - 1)


def learning_rate(lora: LoraSection, hidden_size: int, layers: int | None, rows: int) -> tuple[float, str]:
    """The rate for an adapter on a model of this width and depth, and why.

    AdamW moves each value by about the rate, so that B·A at first grows with rate, scale and rank.

    Args:
        lora: The section, without `auto`.
        hidden_size: Width of the model.
        layers: Depth of the model; None if unknown. Only the layers in `layers_to_transform` count, if it is set.
        rows: Rows of an optimizer step.
    """
    r, alpha = decided(lora.r), decided(lora.lora_alpha)
    strength = alpha * r**0.5 if lora.use_rslora else float(alpha)
    rate = _RATE * (_RATE_WIDTH / hidden_size) ** _RATE_EXPONENT * _RATE_ALPHA / strength
    rate *= (min(rows, _SMOOTH_ROWS) / _RATE_ROWS) ** 0.5
    adapted = len(set(lora.layers_to_transform)) if lora.layers_to_transform else layers
    rate *= max(1.0, _RATE_LAYERS / (adapted or _RATE_LAYERS)) ** 0.5
    rate /= (lora.loraplus_lr_ratio or 1.0) ** 0.5
    rate *= 1.0 if _is_attention(lora) else _RATE_OF_MORE
    targets = "adapters on q, k, v and o" if _is_attention(lora) else "adapters on more than q, k, v and o"
    variants = (", rsLoRA" if lora.use_rslora else "") + (", LoRA+" if lora.loraplus_lr_ratio else "")
    depth = f"{adapted:,} layers, " if adapted else ""
    why = f"for a hidden size of {hidden_size:,}, {depth}{targets}, lora_alpha {alpha}{variants}, "
    why += f"and {plural(rows, 'row')} a step"
    if rate > _MOST_RATE:
        why = f"the highest that auto takes, {why}"
    return float(f"{min(rate, _MOST_RATE):.2g}"), why


def _is_attention(lora: LoraSection) -> bool:
    """Whether only q, k, v and o get adapters. lora: a section without `auto`."""
    names = lora.target_modules if isinstance(lora.target_modules, list) else [""]
    return not lora.target_parameters and all(name.removesuffix("_proj") in _ATTENTION for name in names)


def _full_rate_passes(lora: LoraSection) -> float:
    """The passes over which the rate is that of one. lora: a section without `auto`."""
    return 2.0 if _is_attention(lora) else 1.0


def over_passes(rate: float, why: str, passes: float, lora: LoraSection) -> tuple[float, str]:
    """The rate for rows that are read several times, and why: it falls with the number of passes. With q, k, v and o
    alone it is that of one for two passes, and half of it for four, see `_FEW_STEPS`.

    Args:
        rate: The rate for one pass.
        why: The reason for it.
        passes: The number of passes over the rows.
        lora: A section without `auto`.
    """
    share = min(1.0, _full_rate_passes(lora) / passes)
    if share == 1:
        return rate, why
    return float(f"{rate * share:.2g}"), f"{rate:g}, less for {passes:.3g} passes; {why}"


def writing_notes(passes: int, steps: int, training: TrainingSection) -> Iterator[str]:
    """A line if writing the texts of `retention` may take longer than half of the training, which has three passes a
    micro-step: a pass takes as long as reading the weights where the model is large and rows are short."""
    of_training = 3 * steps * training.gradient_accumulation_steps
    if training.max_minutes is None and 2 * passes > of_training:
        yield (
            f"retention: writing takes {passes:,} passes of the base, once for these settings, and training "
            f"{of_training:,}; retention.kl_weight: 0 leaves it out"
        )


_OTHER_RECORDED = ("data.truncation", "data.empty_reasoning", "model.use_liger_kernel")
_RECORDED = [
    key
    for key, value in DECIDED_BY_RUN.items()
    if value == AUTO and (key.startswith(("lora.", "training.", "retention.")) or key in _OTHER_RECORDED)
]
"""Full keys that can be `auto` in a config, and that a resumed run takes as they were decided. `data.truncation` is
among them since an earlier release had no `auto`, and cut texts."""


def decided_values(config: RunConfig) -> dict[str, Any]:
    """Full key → value, of all that can be `auto`; a checkpoint records them. config: one without `auto`."""
    return recorded_values(config.resolved())


def recorded_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `decided_values`, of a config as JSON values; a release without a section did what its 0 does."""
    values, found = {"retention": {"kl_weight": 0.0}, **config}, dict[str, Any]()
    for key in [*_RECORDED, "training.max_steps"]:
        section, name = key.split(".")
        if isinstance(values.get(section), dict) and values[section].get(name) not in (None, AUTO):
            found[key] = values[section][name]
    return found


def with_decided(config: RunConfig, recorded: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The config with `auto` and a time budget replaced by what was decided before an interruption; and the values
    that replace `auto`, by their full keys.

    recorded: the result of `decided_values`.

    Raises:
        ConfigError: The decided values contradict the current config.
    """
    values, taken = config.model_dump(), dict[str, Any]()
    training = values["training"]
    is_length_set = training["max_steps"] > 0 or training["max_minutes"] is not None
    for key in _RECORDED:
        section, name = key.split(".")
        if values[section][name] == AUTO and key in recorded and not (name == "num_train_epochs" and is_length_set):
            values[section][name] = taken[key] = recorded[key]
    if training["max_minutes"] is not None:
        training |= {"max_minutes": None, "max_steps": recorded["training.max_steps"]}
    if training["max_steps"] > 0:
        training["num_train_epochs"] = AUTO
    return from_values(values, "the config, with what was decided before the interruption"), taken
