"""`loratune init`: chooses a config for rows and a model, with a comment on each choice. No weights are loaded."""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune import config, memory
from loratune.config import AUTO, Draft, RunConfig
from loratune.data.measured_rows import OBJECTIVES, MeasuredRows, fit_length, measure
from loratune.data.packing import BatchLayout
from loratune.data.rendering import Renderer
from loratune.lora import adapter_files, creation, initialize
from loratune.lora.attach import PeftModel
from loratune.lora.parameters import Count
from loratune.memory import Estimate
from loratune.model import checks, load, quantization, tensor_files
from loratune.statistics import LEAST_ROWS
from loratune.system import platforms
from loratune.training import auto
from loratune.training.batching import tree_sizes, would_share
from loratune.training.duration import Costs, seconds_per_operation
from loratune.training.init_start import SOURCE
from loratune.training.plan import unit_parameters
from loratune.training.retention import step_tokens, typical_texts

_SHOWN = ("training.learning_rate", "training.num_train_epochs")
"""Keys that are written as `auto`, with a comment on the resulting value."""
_TITLE = (
    "Written by `loratune init`, with the reason for each choice; all else has its default. Paths are those of the "
    "directory where loratune is started. `loratune explain KEY` says what a key does."
)
_SCARCE = "half of the memory would not suffice without"
_COVERED, _TAIL, _MULTIPLE = 0.99, 2, 64
"""`max_length`: this share of the rows stays whole in any case, and all do if the longest row is at most twice as
long; it is a multiple of 64."""
_WANTED_SHARE, _LEAST_SHARE_ROWS, _MOST_SHARE, _MOST_HELD_OUT, _LEAST_ROWS = 0.1, 100, 0.2, 500, 50
"""A tenth of the rows is held out; up to a fifth, to get 100; at most 500; and of fewer than 50 rows none."""
_BLOCK = 1024
"""The most tokens of the blocks into which longer texts are split."""


@dataclass(frozen=True)
class Fit:
    """Memory-related settings, and their estimated memory.

    Attributes:
        batch: Rows of a micro-batch.
        quantization: As `model.quantization`.
        checkpointed: As `training.activation_checkpointing`.
        estimate: The estimated memory for training.
        free: The free memory, in bytes.
    """

    batch: int
    quantization: memory.WeightFormat
    checkpointed: bool
    estimate: Estimate
    free: int

    @property
    def is_roomy(self) -> bool:
        """Whether training needs at most half of the free memory, which leaves a margin for errors of the estimate."""
        return self.estimate.total <= self.free // 2


@dataclass(frozen=True)
class InitialConfig:
    """A config, and estimates for its run.

    Attributes:
        text: The config as YAML.
        run: The validated config.
        rows: The rows.
        cut: Lines on rows that `max_length` truncates or drops.
        fit: The memory-related settings and their estimated memory.
        count: Parameters of adapter and model.
        machine: The cores and the GPU.
        context: The number of positions of the model, if known.
        steps: Optimizer steps of training.
        seconds: The estimated time of training, with evaluations.
        remarks: Lines for the user on the rows, the model and what is held out.
    """

    text: str
    run: RunConfig
    rows: MeasuredRows
    cut: list[str]
    fit: Fit
    count: Count
    machine: str
    context: int | None
    steps: int
    seconds: float
    remarks: list[str]


def init(run: RunConfig, draft: Draft) -> InitialConfig:
    """Choose the keys that a config leaves open.

    Args:
        run, draft: The config so far, see `init_start.start`; values set in the draft do not change.

    Raises:
        ModelError: As `load.load_config`, `load.load_tokenizer`, `checks.check_present` and `creation.adapt`.
        DataError: As `measure` and `data.prepare`.
        ConfigError: A key needs validation rows, and there are too few rows to hold any out.
    """
    tokenizer = load.load_tokenizer(run.model, run.data.chat_template)
    model_config = load.load_config(run.model)
    released = tensor_files.notes(run.model, model_config)
    checks.check_present(run.model)
    vocabulary, context = model_config.get_text_config().vocab_size, load.context_length(model_config)
    renderer = Renderer(tokenizer, vocabulary, run.data.chat_template_kwargs)
    rows, remarks = measure(run.data, renderer, vocabulary)
    held_out, on_holding_out = _choose_data(draft, run, rows, context)
    if run.lora.start_from is None:
        draft.choose("lora.r", run.lora.r, "rank of the update")
        draft.choose("lora.target_modules", run.lora.target_modules, "the default; all-linear adapts the MLP as well")
    else:
        draft.choose("lora.r", AUTO, "that of the adapter it starts from")
        draft.choose("lora.target_modules", AUTO, "those of the adapter it starts from")
    run = config.from_draft(draft)
    rows, cut = fit_length(rows, run.data, renderer, vocabulary)
    trained, facts = _facts(run, rows, held_out, model_config)
    lora, _ = auto.decide_lora(run.lora, facts)
    model, targets = creation.adapt(load.build_meta(model_config, run.model), lora, seed=0)
    machine, free = load.this_machine(), memory.available(load.device())
    quantizable = not machine.bitsandbytes and run.model.gguf_file is None
    quantizable &= quantization.record_of(model_config.to_dict()) is None or bool(released)
    step = auto.rows_per_step(trained)
    fitting = fit(model, run, draft, rows, step, free, quantizable=quantizable)
    _choose_training(draft, run, step, fitting)
    training, choices = auto.decide_training(config.from_draft(draft).model_copy(update={"lora": lora}), facts)
    for key in _SHOWN:
        if key in choices:
            draft.choose(key, AUTO, f"here {choices[key][0]:g}: {choices[key][1]}")
    text = draft.text(_TITLE)
    run = config.parse(text, SOURCE)
    steps, seconds = _duration(run.model_copy(update={"training": training}), rows, trained, model)
    count = creation.count(model, creation.initialize_adapter(model, lora))
    cores = platforms.processor_count()
    hardware = f"{cores} core{'s' if cores > 1 else ''}, {machine.gpu or 'no GPU'}"
    remarks = [*remarks, *on_holding_out, *released, *targets.notes]
    return InitialConfig(text, run, rows, cut, fitting, count, hardware, context, steps, seconds, remarks)


def _choose_data(
    draft: Draft, config: RunConfig, rows: MeasuredRows, context: int | None
) -> tuple[int, tuple[str, ...]]:
    """Choose the section `data`. Returns the number of training rows that are held out, and lines on how."""
    if rows.choice.columns:
        draft.choose("data.columns", rows.choice.columns, rows.choice.why)
    chat = ", through the model's chat template" if rows.train.chat else ""
    count = f"{len(rows.train):,} row{'s' if len(rows.train) > 1 else ''}"
    draft.reasons["data.train"] = f"{count}: {rows.train.described}{chat}"
    if labels := rows.classes.joined():
        draft.propose("data.labels", labels, "for classes that look alike: the first are learned as the second")
    paired, split = rows.rows_per_example > 1, config.data.truncation_of(is_text=rows.is_text) == "split"
    blocks = int(rows.all_lengths.sum()) // _BLOCK if split else 0
    held_out, remarks = _choose_validation(draft, config, rows, blocks)
    if "test" in draft.values["data"]:
        draft.reasons["data.test"] = "scored once, at the end"
    length, why = max_length(rows.all_lengths, context, paired=paired, split=split)
    drawn = f", among {len(rows.all_lengths):,} that were drawn" if rows.is_sample else ""
    draft.choose("data.max_length", length, why + drawn)
    if (kind := rows.train.kind) is not None:
        draft.choose("training.objective", OBJECTIVES[kind], f"the rows are {kind}")
    draft.choose("data.packing", "batch", "the rows of a batch end to end, without padding")
    return held_out, remarks


def _choose_validation(draft: Draft, config: RunConfig, rows: MeasuredRows, blocks: int) -> tuple[int, tuple[str, ...]]:
    """Choose the fraction of held-out rows, unless there are validation files. Returns as `_choose_data`."""
    best = "they measure the gain, and choose the step if there are several evaluations"
    fraction = config.data.validation if draft.has("data.validation") else validation(len(rows.train), blocks)
    if rows.held_out:
        draft.reasons["data.validation"] = f"{rows.held_out:,} rows; {best}"
    elif isinstance(fraction, float):
        _, apart = rows.train.hold_out(fraction, config.training.seed)
        held_out = len(apart)
        if held_out < len(rows.train) or draft.has("data.validation"):
            labels = ", stratified by label" if rows.classes.labels else ""
            draft.choose("data.validation", fraction, f"{held_out:,} rows are held out{labels}; {best}")
            return held_out, apart.notes
        why = "all of them belong together, as copies, or by their prompts, so that none can be held out"
        draft.reasons["data.train"] += f"; {why}"
    elif not draft.has("data.validation"):
        draft.reasons["data.train"] += "; too few to hold out some for data.validation"
    return 0, ()


def _choose_training(draft: Draft, config: RunConfig, step: int, fitting: Fit) -> None:
    """Choose the batch size, and settings that save memory if needed."""
    if config.training.max_minutes is not None:
        draft.reasons["training.max_minutes"] = "the number of steps is fixed from it before the first one"
    size, (total, free) = fitting.batch, (count / (1 << 30) for count in (fitting.estimate.total, fitting.free))
    why = "all rows of a step at once" if size == step else "the most that leave half of the free memory free"
    why = f"{why}; takes about {total:.1f} of {free:.1f} GiB that are free"
    draft.choose("training.per_device_train_batch_size", size, why)
    accumulation = max(1, step // size)
    why = f"{size} x {accumulation} rows a step: {auto.WHY_ROWS_PER_STEP}"
    draft.choose("training.gradient_accumulation_steps", accumulation, why)
    if fitting.checkpointed:
        draft.choose("training.activation_checkpointing", True, _SCARCE)
    if fitting.quantization != "none":
        draft.choose("model.quantization", fitting.quantization, _SCARCE)


def fit(
    model: Any, config: RunConfig, draft: Draft, rows: MeasuredRows, step: int, free: int, *, quantizable: bool
) -> Fit:
    """The largest micro-batch that uses at most half of the free memory. Activation checkpointing and quantization are
    used only if no batch fits without them; if none fits at all, the smallest is returned.

    Args:
        model: A `PeftModel` on the meta device.
        run, draft: The config so far; values set in the draft do not change.
        rows: The rows.
        step: Rows of an optimizer step, a power of two.
        free: Free memory, in bytes.
        quantizable: Whether the base can be quantized on this machine.
    """
    batches = [step >> shift for shift in range(step.bit_length())]
    if draft.has("training.per_device_train_batch_size"):
        batches = [config.training.per_device_train_batch_size]
    formats: list[memory.WeightFormat] = ["none", "4bit"] if quantizable else ["none"]
    formats = [config.model.quantization] if draft.has("model.quantization") else formats
    is_set = draft.has("training.activation_checkpointing")
    checkpointing = [config.training.activation_checkpointing] if is_set else [False, True]

    def fitted(batch: int, weights: memory.WeightFormat, checkpointed: bool) -> Fit:
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": max(1, step // batch)}
        training = config.training.model_copy(update={**changes, "activation_checkpointing": checkpointed})
        estimate = estimate_rows(model, config.model_copy(update={"training": training}), rows, weights)
        return Fit(batch, weights, checkpointed, estimate, free)

    for savings in itertools.product(formats, checkpointing):
        smallest = fitted(batches[-1], *savings)
        if smallest.is_roomy:
            larger = (fitted(batch, *savings) for batch in batches[:-1])
            return next((found for found in larger if found.is_roomy), smallest)
    return smallest


def estimate_rows(
    model: Any, config: RunConfig, rows: MeasuredRows, weights: memory.WeightFormat, *, with_texts: bool = False
) -> Estimate:
    """The memory estimate of `train --dry-run`, for batches of the measured rows.

    Args:
        model: A `PeftModel` on the meta device.
        config: The config.
        rows: The rows.
        weights: How the base is quantized.
        with_texts: Whether to include the texts of retention.
    """
    batch, length, packing = config.training.per_device_train_batch_size, config.data.max_length, config.data.packing
    each, device, tokens = rows.rows_per_example, load.device(), np.minimum(rows.tokenized.lengths, length)
    layout = BatchLayout(_CutRows(rows.tokenized, length), tokens, packing, batch, length, 0, each - 1 and each)
    if device.type == "cpu" and would_share(config, rows.saved):
        layout = layout.sharing(rows.saved)
        largest, _ = tree_sizes(layout.rows(layout.heaviest()))
    elif packing == "full":
        largest = [(length, length - 1)] * min(batch, len(rows.train)) * each
    else:
        heaviest = layout.rows(layout.heaviest())
        largest = [(len(row["labels"]), sum(label >= 0 for label in row["labels"][1:])) for row in heaviest]
    items = min(len(layout.items), layout.size * config.training.gradient_accumulation_steps)
    of_step = step_tokens(tokens, layout, items, layout.saved or 0.0)
    largest = [*largest, *(typical_texts(config, of_step) if with_texts else ())]
    return memory.estimate(
        model, largest, len(largest), config.training, packed=layout.flat, planned=memory.Planned(weights, device),
        batch_tokens=layout.total_tokens(config.training.max_steps).tolist(),
    )  # fmt: skip


@dataclass(frozen=True)
class _CutRows:
    """Rows truncated from the left, which approximates `data.truncation`."""

    rows: Any
    length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        row = self.rows[number]
        return {name: row[name][-self.length :] for name in ("input_ids", "labels")}


def _facts(config: RunConfig, rows: MeasuredRows, held_out: int, model_config: Any) -> tuple[int, auto.Facts]:
    """The number of training rows, or blocks, without held-out ones, and the facts that `auto` values depend on."""
    trained = max(1, len(rows.train) - held_out)
    share, (lengths, supervised) = trained / len(rows.train), rows.cut(config.data.max_length)
    trained = round(trained * rows.items_per_row)
    start = config.lora.start_from
    is_packed = config.data.packing == "full"
    of_pack = config.training.per_device_train_batch_size * config.data.max_length
    items = -(-round(share * int(lengths.sum())) // of_pack) if is_packed else trained
    return trained, auto.Facts(
        hidden_size=load.hidden_size(model_config),
        layers=load.layers(model_config),
        items=items,
        supervised=round(share * int(supervised.sum())),
        unit_parameters=partial(unit_parameters, config.model, model_config),
        start=initialize.start_settings(adapter_files.inspect(Path(start).expanduser())) if start else {},
        rows_in_pack=trained / items if is_packed else None,
    )


def _duration(config: RunConfig, rows: MeasuredRows, trained: int, model: PeftModel) -> tuple[int, float]:
    """The optimizer steps of the run, and their estimated seconds, with evaluations."""
    lengths, supervised = rows.cut(config.data.max_length)
    held_out = rows.held_out * rows.items_per_row or len(rows.train) * rows.items_per_row - trained
    costs = Costs.of_run(model, config, lengths, supervised, rows.saved, rows.rows_per_example)
    tokens = round(float(lengths.mean()) * held_out)
    steps, operations = costs.work(config.training, tokens, share=trained / len(lengths))
    seconds = operations * seconds_per_operation(model, config.model, costs, operations)
    budget = 60 * (config.training.max_minutes or 0.0)
    if not budget or budget >= seconds:
        return steps, seconds
    return max(1, int(steps * budget / seconds)), budget


def validation(rows: int, blocks: int = 0) -> float | None:
    """The fraction to hold out of a number of rows; None for too few rows. blocks: those of texts that are split."""
    rows = max(rows, blocks) if rows >= LEAST_ROWS else rows
    share = max(_WANTED_SHARE, min(_MOST_SHARE, _LEAST_SHARE_ROWS / max(1, rows)))
    return float(f"{min(share, _MOST_HELD_OUT / rows):.2g}") if rows >= _LEAST_ROWS else None


def max_length(
    lengths: NDArray[np.int64], context: int | None, *, paired: bool = False, split: bool = False
) -> tuple[int, str]:
    """`data.max_length`, and why.

    Args:
        lengths: (rows,), in tokens; for pairs (answers,), each with its prompt.
        context: The number of positions of the model, if known.
        paired: Whether the rows are pairs.
        split: Whether longer rows are split into blocks.
    """
    longest, covered = int(lengths.max()), int(np.quantile(lengths, _COVERED, method="inverted_cdf"))
    wanted = min(longest, _BLOCK) if split else longest if longest <= _TAIL * covered else covered
    rounded = max(_MULTIPLE, -(-wanted // _MULTIPLE) * _MULTIPLE)
    length = min(rounded, context or rounded)
    what, tokens = ("answer", f"{longest:,} tokens with its prompt") if paired else ("row", f"{longest:,} tokens")
    if not (cut := int(np.count_nonzero(lengths > length))):
        return length, f"the longest {what} has {tokens}"
    limit = f"the model has {length:,} positions; " if length < wanted else ""
    return (
        length,
        f"{limit}{cut:,} of {len(lengths):,} {what}s are longer, up to {tokens}, and are {'split' if split else 'cut'}",
    )
