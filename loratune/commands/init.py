"""`loratune init`: rows and a model's name become a commented config that can be trained. No weights are loaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune import config, data, memory
from loratune.commands import init_choices, init_rows
from loratune.commands.init_choices import Fit, Room
from loratune.commands.init_rows import MeasuredRows
from loratune.commands.init_start import SOURCE
from loratune.commands.plan import unit_parameters
from loratune.config import AUTO, Draft, RunConfig
from loratune.data import ProgressFactory
from loratune.data.rendering import Renderer
from loratune.lora import attach
from loratune.lora.attach import PeftModel
from loratune.lora.parameters import Count
from loratune.model import checks, load, quantization
from loratune.training import auto
from loratune.training.duration import Costs, seconds_per_operation

_SHOWN = ("training.learning_rate", "training.num_train_epochs")
"""Keys whose `auto` is written, with what it comes to."""
_TITLE = (
    "Written by `loratune init`, with the reason for each choice; all else has its default. Paths are those of the "
    "directory where loratune is started. `loratune explain KEY` says what a key does."
)


@dataclass(frozen=True)
class Started:
    """A config, and what is known of the run that it describes.

    Attributes:
        text: The config as YAML.
        run: The same, validated.
        rows: The rows.
        cut: Lines on what `max_length` cuts.
        fit: How training fits into the memory.
        count: Parameters of adapter and model.
        machine: What computes.
        context: How many tokens the model was built for, if that is known.
        steps: Optimizer steps.
        seconds: About how long training takes, with its evaluations.
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


def init(run: RunConfig, draft: Draft, watch: ProgressFactory, log: Callable[[str], None]) -> Started:
    """Choose what a config leaves open.

    Args:
        run: The config so far, see `init_start.checked`.
        draft: The same in the making; nothing that is set in it is changed.
        watch: Shows the passes over the rows.
        log: Takes lines that the user should see.

    Raises:
        ModelError: As `load.load_config`, `load.load_tokenizer`, `checks.check_present` and `attach.adapt`; a quantized
            base lacks its packages.
        DataError: As `init_rows.measure` and `init_rows.check_length`.
        ConfigError: A key needs validation rows, and there are too few rows to hold any out.
    """
    tokenizer = load.load_tokenizer(run.model, run.data.chat_template)
    model_config = load.load_config(run.model)
    quantization.loading_config(run.model, model_config, load.compute_dtype(run.model))  # or its packages are missing
    checks.check_present(run.model)
    vocabulary, context = model_config.get_text_config().vocab_size, load.context_length(model_config)
    renderer = Renderer(tokenizer, vocabulary)
    rows = init_rows.measure(run.data, renderer, vocabulary, watch)
    held_out = _choose_data(draft, run, rows, context, log)
    draft.choose("lora.r", run.lora.r, "rank of the update")
    draft.choose("lora.target_modules", auto.TARGETS, auto.WHY_TARGETS)
    run = config.from_draft(draft)
    trained, facts = _facts(run, rows, held_out, model_config)
    lora, _ = auto.decide_lora(run.lora, facts)
    cut = init_rows.check_length(rows, run.data, renderer, vocabulary, watch)
    model, targets = attach.adapt(load.build_meta(model_config, run.model), lora, seed=0)
    for line in (*(f"rows: {remark}" for remark in rows.remarks), *targets.notes):
        log(line)
    step = init_choices.rows_per_step(trained)
    machine, device = load.this_machine(), load.device()
    quantizable = not machine.bitsandbytes and _is_quantizable(run, model_config)
    fitting = init_choices.fit(model, run, draft, rows, step, Room(device, memory.available(device), quantizable))
    _choose_training(draft, run, step, fitting)
    training, choices = auto.decide_training(config.from_draft(draft).model_copy(update={"lora": lora}), facts)
    for key, (value, why) in choices.items():
        if key in _SHOWN:
            draft.choose(key, AUTO, f"here {value:g}: {why}")
    text = draft.text(_TITLE)
    run = config.parse(text, SOURCE)
    steps, seconds = _duration(run.model_copy(update={"training": training}), rows, trained, model)
    adapter = attach.count(model, attach.initialize_adapter(model, lora))
    cores = len(os.sched_getaffinity(0))
    hardware = f"{cores} core{'s' if cores > 1 else ''}, {machine.gpu or 'no GPU'}"
    return Started(text, run, rows, cut, fitting, adapter, hardware, context, steps, seconds)


def _choose_data(
    draft: Draft, run: RunConfig, rows: MeasuredRows, context: int | None, log: Callable[[str], None]
) -> int:
    """The section `data`. Returns how many of the training rows are held out."""
    if rows.columns:
        draft.choose("data.columns", rows.columns, rows.why_columns)
    chat = ", through the model's chat template" if rows.train.chat else ""
    draft.reasons["data.train"] = (
        f"{len(rows.train):,} row{'s' if len(rows.train) > 1 else ''}, {' and '.join(rows.train.formats)}{chat}"
    )
    held_out = _choose_validation(draft, run, rows, log)
    if "test" in draft.values["data"]:
        draft.reasons["data.test"] = "scored once, at the end"
    length, why = init_choices.max_length(rows.all_lengths, context, paired=rows.together > 1)
    drawn = f", among {len(rows.all_lengths):,} that were drawn" if rows.is_sample else ""
    draft.choose("data.max_length", length, why + drawn)
    if (kind := rows.train.kind) is not None:
        draft.choose("training.objective", init_rows.OBJECTIVES[kind], f"the rows are {kind}")
    draft.choose("data.packing", "batch", "the rows of a batch end to end, without padding")
    return held_out


def _choose_validation(draft: Draft, run: RunConfig, rows: MeasuredRows, log: Callable[[str], None]) -> int:
    """The fraction of the rows that is held out, unless there are files of them. Returns how many rows that is."""
    best = "the step with the lowest loss on them is kept"
    fraction = run.data.validation if draft.has("data.validation") else init_choices.validation(len(rows.train))
    if rows.held_out:
        draft.reasons["data.validation"] = f"{rows.held_out:,} rows; {best}"
    elif isinstance(fraction, float):
        _, mask, remarks = data.divide(rows.train, fraction, run.data.group_by, run.training.seed)
        held_out, labels = (
            int(mask.sum()),
            f", stratified by {rows.classes.labels} labels" if rows.classes.labels else "",
        )
        if held_out < len(rows.train) or draft.has("data.validation"):
            draft.choose("data.validation", fraction, f"{held_out:,} rows are held out{labels}; {best}")
            for remark in remarks:
                log(f"data.validation: {remark}")
            return held_out
        why = "all of them belong together, as copies, or by their prompts, so that none can be held out"
        draft.reasons["data.train"] += f"; {why}"
    elif not draft.has("data.validation"):
        draft.reasons["data.train"] += "; too few to hold out some for data.validation"
    return 0


def _choose_training(draft: Draft, run: RunConfig, step: int, fitting: Fit) -> None:
    """The batch, what memory asks for, and why the length is as it is."""
    if run.training.max_minutes is not None:
        draft.reasons["training.max_minutes"] = "the number of steps is fixed from it before the first one"
    size, gibibytes = fitting.batch, f"{fitting.estimate.total / (1 << 30):.1f} of {fitting.free / (1 << 30):.1f} GiB"
    why = "all rows of a step at once" if size == step else "the most that leave half of the free memory free"
    why = f"{why}; takes about {gibibytes} that are free"
    draft.choose("training.per_device_train_batch_size", size, why)
    accumulation = max(1, step // size)
    why = f"{size} x {accumulation} rows a step: {init_choices.WHY_STEP}"
    draft.choose("training.gradient_accumulation_steps", accumulation, why)
    if fitting.checkpointed:
        draft.choose("training.activation_checkpointing", True, "half of the memory would not suffice without")
    if fitting.quantization != "none":
        draft.choose("model.quantization", fitting.quantization, "half of the memory would not suffice without")


def _facts(run: RunConfig, rows: MeasuredRows, held_out: int, model_config: Any) -> tuple[int, auto.Facts]:
    """How many rows are trained on when some are held out, and what `auto` is decided by."""
    trained = max(1, len(rows.train) - held_out)
    lengths = rows.lengths.clip(max=run.data.max_length * rows.together)
    share = trained / len(rows.train)
    packs = -(-round(share * int(lengths.sum())) // run.data.max_length)
    return trained, auto.Facts(
        hidden_size=load.hidden_size(model_config),
        layers=load.layers(model_config),
        rows=packs if run.data.packing == "full" else trained,
        supervised=round(share * int(rows.supervised.clip(max=lengths).sum())),
        processes=1,
        unit_parameters=partial(unit_parameters, run.model, model_config),
        start={},
        rows_in_pack=trained / packs if run.data.packing == "full" else 1.0,
    )


def _is_quantizable(run: RunConfig, model_config: Any) -> bool:
    """Whether the base is neither quantized already nor a GGUF file."""
    return run.model.gguf_file is None and quantization.record_of(model_config.to_dict()) is None


def _duration(run: RunConfig, rows: MeasuredRows, trained: int, model: PeftModel) -> tuple[int, float]:
    """The optimizer steps of the run, and about how many seconds they take, with evaluations."""
    lengths = rows.lengths.clip(max=run.data.max_length * rows.together)
    supervised = rows.supervised.clip(max=lengths)
    held_out = rows.held_out or len(rows.train) - trained
    costs = Costs.of_run(model, run, lengths, supervised, rows.saved, rows.together)
    work = costs.work(run.training, round(float(lengths.mean()) * held_out), share=trained / len(lengths))
    seconds = work.operations * seconds_per_operation(model, run.model, costs, work.operations)
    budget = 60 * (run.training.max_minutes or 0.0)
    if not budget or budget >= seconds:
        return work.steps, seconds
    return max(1, int(work.steps * budget / seconds)), budget
