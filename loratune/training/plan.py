"""The plan of a run: everything before its first step. `train --dry-run` shows it, and `train` executes it."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from loratune import memory
from loratune.codes import Code
from loratune.compare import behavior, preferences
from loratune.compare.base_results import conditions
from loratune.config import AUTO, LoraSection, ModelSection, RunConfig, TrainingSection, decided
from loratune.data.rendering.spans import CHOSEN, DESIRABLE, REJECTED, UNDESIRABLE
from loratune.errors import AdapterError, ConfigError, DataError, ModelError, Problem, ResumeError
from loratune.events import PlanEvent
from loratune.lora import creation, parameters, served, tensors
from loratune.lora.attach import PeftModel
from loratune.lora.initialize import START_KEY, start_settings
from loratune.lora.parameters import Count
from loratune.lora.targets import Targets
from loratune.lora.tensors import AdapterInit
from loratune.model import fingerprints, load, stored
from loratune.model.load import Base
from loratune.system import accelerator, environment, launcher
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.text import align, plural
from loratune.training import auto, batching, comparisons
from loratune.training.batching import BatchedDatasets
from loratune.training.checkpoints.resume import ResumePoint
from loratune.training.checkpoints.store import BestRecord, CheckpointRecord, Checkpoints
from loratune.training.comparisons import Comparisons
from loratune.training.preflight import Run
from loratune.training.retention import Retention
from loratune.training.rows import TokenizedDatasets, tokenize
from loratune.training.schedule import Evaluations, Schedule

_SIDES = {CHOSEN: ", chosen", REJECTED: ", rejected", DESIRABLE: ", desirable", UNDESIRABLE: ", undesirable"}
_CHECKPOINT_OVERHEAD = 40_000
"""Bytes of a checkpoint besides weights and optimizer: random states, the trainer's own state, and a model card."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step.

    Attributes:
        run: The checked run: its directory, resume point and raw rows.
        config: The configuration, with absolute paths, and with the values that the run has decided for `auto`. Where
            the rows or the machine decide anew each time, it stays: `model.dtype`, `data.format`, `data.truncation`,
            `data.share_prefixes`, `data.sample_by`.
        group: The processes of the run.
        datasets: The rows as tokens.
        base: The base, whose files must not change.
        model: The base with the adapter attached.
        targets: The modules that the adapter is attached to.
        adapter_init: The adapter before its first step.
        count: Trainable parameters, and all parameters.
        batches: The rows in batches, and which layers the kernels compute.
        memory: The estimate of the memory that training needs.
        checkpoints: The checkpoints of the run, with its record.
        choices: What the run has decided for `auto` and a time budget, each with its reason.
        notes: Lines that the user should see.
        lower_rate: A learning rate to suggest if the rate of the run is too high.
    """

    run: Run
    config: RunConfig
    group: Group
    datasets: TokenizedDatasets
    base: Base
    model: PeftModel
    targets: Targets
    adapter_init: AdapterInit
    count: Count
    batches: BatchedDatasets
    memory: memory.Estimate
    checkpoints: Checkpoints
    choices: auto.Choices
    notes: list[str]
    lower_rate: float

    def decides(self, key: str) -> bool:
        """Whether the run has decided the value of a key that the user gives as `auto`."""
        section, _, name = key.partition(".")
        decided = self.resume_point.decided if self.resume_point is not None else {}
        return key in decided or self.run.config.model_dump()[section][name] == AUTO

    def with_values(
        self, values: Mapping[str, Any], choices: auto.Choices | None = None, notes: Sequence[str] = ()
    ) -> "Plan":
        """The plan with values that its model has decided, by full key. The record of its checkpoints has them too.
        choices, notes: further ones."""
        sections = dict(self.config)
        for key, value in values.items():
            section, name = key.split(".")
            sections[section] = sections[section].model_copy(update={name: value})
        config = self.config.model_copy(update=sections)
        record, minutes = self.checkpoints.record, self.config.training.max_minutes
        update = {
            "config": config.resolved(),
            "decided": auto.decided_values(config),
            "max_minutes": record.max_minutes if minutes is None else minutes,
        }
        checkpoints = replace(self.checkpoints, record=record.model_copy(update=update))
        choices, notes = self.choices | (choices or {}), [*self.notes, *notes]
        return replace(self, config=config, checkpoints=checkpoints, choices=choices, notes=notes)

    @property
    def device(self) -> str:
        """What this process computes on, and in which dtype."""
        return accelerator.describe(self.model.dtype, spread=self.config.model.device_map is not None)

    @property
    def retention(self) -> Retention | None:
        """What keeps the model near what it was; None without a weight."""
        return self.batches.retention if self.config.has_retention else None

    @property
    def resume_point(self) -> ResumePoint | None:
        """Where the run continues, if it is resumed."""
        return self.run.resume_point

    @property
    def best(self) -> BestRecord | None:
        """The record of the evaluations before an interruption; None if there were none, or they do not count."""
        if self.resume_point is None:
            return None
        return self.resume_point.evaluations(self.checkpoints.record, keep=self.config.keeps_best)[0]

    @property
    def training(self) -> TrainingSection:
        """The section, with values that depend on the rows: the steps between evaluations, and which step is kept."""
        steps = {"eval_steps": evaluations.interval} if (evaluations := self.evaluations) else {}
        return self.config.training.model_copy(update={**steps, "keep": "best" if self.config.keeps_best else "last"})

    @property
    def schedule(self) -> Schedule:
        """The steps of the run."""
        batches = self.batches.train
        return Schedule.of(self.config.training, len(batches.items), batches.size, self.group.count)

    @property
    def evaluations(self) -> Evaluations | None:
        """When the run is evaluated; None without validation rows."""
        return self.evaluations_of(self.schedule)

    def evaluations_of(self, schedule: Schedule) -> Evaluations | None:
        """When the run would be evaluated with other steps; None without validation rows."""
        if (held_out := self.datasets.validation) is None:
            return None
        trained, tokens = (int(split.rows.lengths.sum()) for split in (self.datasets.train, held_out))
        if self.batches.chooses:
            tokens = tokens * len(self.batches.chooses) // held_out.items
        return schedule.evaluations(self.config.training.eval_steps, trained, tokens)

    @property
    def tokens(self) -> int:
        """Tokens that the run reads, if it takes all its steps."""
        return round(self.schedule.passes * int(self.datasets.train.rows.lengths.sum()))

    @cached_property
    def comparisons(self) -> Comparisons:
        """What is compared after the last step."""
        evaluations = self.evaluations
        stops = self.config.keeps_best or self.training.patience is not None
        selects = stops and evaluations is not None and evaluations.count > 1
        instructions: list[behavior.Ids] = []
        with suppress(DataError, ModelError):  # then it is not measured
            instructions = behavior.prompts(self.datasets.renderer, load.context_length(self.model.config))[1]
        costs = comparisons.costs(self.datasets.unrelated.rows, instructions, reasons=self.datasets.can_reason)
        least = comparisons.affordable(self.count.total, on_accelerator=self.model.device.type != "cpu")
        return comparisons.choose_comparisons(
            self.datasets.compared, self.batches.chooses, self.tokens, costs, least=least, selects=selects
        )

    @cached_property
    def servers(self) -> dict[str, served.Served | str]:
        """The servers that apply the adapter, and those that do not, see `served.servers`."""
        return served.servers(self.base.config, type(self.base.model).__name__, parameters.layers_of(self.model))

    def event(self, seconds: tuple[float, float] | None = None) -> PlanEvent:
        """The plan as users see it before the first step. seconds: see `PlanEvent`."""
        examples = [
            (f"first row{self.side_name(number)}, supervised text marked:", tuple(_shortened(self.row_text(number))))
            for number in range(self.datasets.train.rows_per_example)
        ]
        examples += [(f"{title}:", pieces) for title, pieces in self.other_rows()]
        return PlanEvent(
            rows=tuple(self.dataset_lines()),
            examples=tuple(examples),
            notes=(*self.targets.shared_lines(), *self.all_notes()),
            summary=str(self.count),
            trainable=self.count.trainable,
            memory=self.memory.total,
            device=self.device,
            plan=self,
            seconds=seconds,
        )

    def dataset_lines(self) -> Iterator[str]:
        """A table of how many rows of each split are used, truncated or dropped, and remarks on them."""
        datasets, context = self.datasets, load.context_length(self.model.config)
        cells = [[name, *split.report.cells()] for name, split in datasets.splits.items()]
        yield from align(["", *datasets.train.report.COLUMNS], cells)
        for name, split in datasets.splits.items():
            lines = [*datasets.remarks[name], *split.report.remarks(datasets.max_length, context)]
            yield from (f"  {name}: {line}" for line in lines)
        yield from (f"  {line}" for lines in datasets.leaks.values() for line in lines)

    def all_notes(self) -> Iterator[str]:
        """Lines on settings that may not be intended, and on choices."""
        training = self.config.training
        batch_size, accumulation = self.batches.train.size, training.gradient_accumulation_steps
        batch = self.group.count * batch_size * accumulation
        if self.group.count > 1:
            kinds = "packs of rows" if self.config.data.packing == "full" and self.batches.train.flat else "rows"
            yield f"{self.group.count} processes: {self.group.count} x {batch_size} x {accumulation} {kinds} a step"
        if (items := self.datasets.train.items) < batch and batch_size > 1:
            yield f"rows: {items}, fewer than a batch of {batch}: each epoch is one step on all of them"
        if (evaluations := self.evaluations) is not None:
            kept = "; the weights of the one with the lowest loss become the adapter" if self.config.keeps_best else ""
            yield f"{evaluations}{kept if evaluations.count > 1 else ''}"
            if training.patience is not None and training.patience + 1 >= evaluations.count:
                yield f"training.patience: {training.patience} has no effect with so few evaluations"
        yield from auto.lines(self.choices)
        yield from (*self.notes, *self.comparisons.notes(), *served.remarks(self.servers))

    def side_name(self, number: int) -> str:
        """`, chosen` and the like behind the place of a training row that is an answer to be compared; else empty."""
        return _SIDES.get(self.datasets.train.rows.side(number), "")

    def other_rows(self, shown: int = 1) -> Iterator[tuple[str, tuple[tuple[str, bool], ...]]]:
        """A title and the end of the first training row of each kind of conversations (with reasoning, tools, a system
        message) that is not among the first rows. shown: how many rows are shown already."""
        first = {kind: number for kind, (_, number) in self.datasets.train.report.kinds.items()}
        seen = max(shown, min(first.values(), default=0) + 1)
        for kind, number in first.items():
            if number >= seen:
                title = f"first row with {kind or 'messages alone'}, supervised text marked"
                yield title, tuple(_shortened(self.row_text(number), 200, 12))

    def row_text(self, number: int = 0) -> Iterator[tuple[str, bool]]:
        """A training row as pieces of text, each with whether it is supervised."""
        row, start = self.datasets.train.rows.row(number), 0
        spans = [(max(first, 1), end) for first, end in row.spans]  # The first token has no token before it.
        for span in [*spans, (len(row.ids), len(row.ids))]:
            for ids, supervised in ((row.ids[start : span[0]], False), (row.ids[slice(*span)], True)):
                if ids:
                    yield self.datasets.tokenizer.decode(ids), supervised
            start = span[1]


def _shortened(
    pieces: Iterable[tuple[str, bool]], limit: int = 600, most: int | None = None
) -> Iterator[tuple[str, bool]]:
    """Pieces of text, with the middle of long ones left out. most: how many of the last pieces are shown."""
    for text, supervised in [*pieces][-(most or 0) :]:
        is_long = len(text) > limit
        yield f"{text[: limit // 2]} [...] {text[-limit // 2 :]}" if is_long else text, supervised


def load_rows(run: Run, group: Group = SINGLE_PROCESS) -> TokenizedDatasets:
    """Load the tokenizer and tokenize the rows. Raises ModelError, ConfigError: this machine cannot hold the base;
    and as `tokenize`."""
    load.check_machine(run.config.model)
    load.check_kernels(run.config.model, gpu=load.device().type != "cpu")
    environment.keep_pages()
    return tokenize(run, load.load_tokenizer(run.config.model, run.config.data.chat_template), group)


def load_base(run: Run, group: Group = SINGLE_PROCESS) -> Base:
    """Load the base.

    Raises:
        ModelError: See `load.load_base`.
        AdapterError: The adapter that the run starts from was trained on another base, or records a fingerprint that
            this release cannot compute; as `tensors.check_copies`.
    """
    base = load.load_for_run(run.config.model, group)
    if run.start is None:
        return base
    info = run.start.info
    tensors.check_copies(info.files, base.model)
    recorded, where = info.files.base_fingerprint, str(info.files.path)
    if recorded is not None and (reason := fingerprints.incomparable(recorded, base.fingerprint)):
        raise AdapterError(Problem(Code.ADAPTER_MISMATCH, reason[0], where, START_KEY, reason[1]))
    if recorded not in (None, base.fingerprint):
        held = f" in {info.base.quantization}, dtype {info.base.dtype}" if info.base.quantization != "none" else ""
        what = f"was trained on another base, by its settings and weights: {info.files.base}{held}"
        raise AdapterError(Problem(Code.LORA_START, what, where, START_KEY, "set model to that base"))
    return base


def make_plan(
    run: Run, group: Group = SINGLE_PROCESS, *, datasets: TokenizedDatasets | None = None, base: Base | None = None
) -> Plan:
    """Decide the values of `auto`, attach the adapter, and lay out the batches.

    Args:
        run: The run.
        group: Its processes.
        datasets: Its rows, if they are loaded.
        base: Its base, if that is loaded.

    Raises:
        ModelError, DataError, AdapterError, ConfigError: As `load_rows` and `load_base`; or they do not fit the config.
        ResumeError: Something that the run reads has changed since it was interrupted.
    """
    datasets, base = datasets or load_rows(run, group), base or load_base(run, group)
    settings = run.config.data.model_copy(update={"empty_reasoning": datasets.empty_reasoning})
    config, known = run.config.model_copy(update={"data": settings}), facts(run, datasets, group)
    lora, choices = auto.decide_lora(config.lora, known)
    dense, origin = load.dense_model(base.model, config.model), (config.model.name_or_path, config.model.revision)
    model, targets = creation.adapt(base.model, lora, dense=dense, seed=config.training.seed, origin=origin)
    config, liger = batching.decide_kernels(config, model, group)
    batches = batching.batch(model, load.pad_id(datasets.tokenizer), datasets.splits, config, group, base.fingerprint)
    is_packed, items = config.data.packing == "full" and batches.train.flat, len(batches.train.items)
    known = replace(known, items=items, rows_in_pack=datasets.train.items / items if is_packed else None)
    config, more = auto.decide(config.model_copy(update={"lora": lora}), known)
    config, batches, kept = batching.with_retention(config, batches, run, datasets.tokenizer, model.config, group)
    _check_warmup(config.training, batches, group.count)
    adapter_init = creation.initialize_adapter(
        model,
        config.lora,
        batches=batches.first(),
        originals=partial(stored.original_weights, config.model, base.model, base.config),
        start_from=run.start.info.files if run.start else None,
    )
    record = _record(run, config, datasets, base, conditions(model, batches.engine.acceleration.fallbacks), batches)
    packed, tokens = batches.train.flat, batches.train.total_tokens(config.training.max_steps).tolist()
    estimate = memory.estimate(model, *batches.largest(), config.training, packed=packed, batch_tokens=tokens)
    size = (2 + config.keeps_best) * estimate.adapter + estimate.optimizer + _CHECKPOINT_OVERHEAD
    described = preferences.described(config)
    notes = [f"training.objective: {described}", *datasets.notes_on_sides()] if described else []
    notes += [*liger, *base.notes, *batches.notes, *targets.notes]
    return Plan(
        run=run,
        config=config,
        group=group,
        datasets=datasets,
        base=base,
        model=model,
        targets=targets,
        adapter_init=adapter_init,
        count=creation.count(model, adapter_init),
        batches=batches,
        memory=estimate,
        checkpoints=Checkpoints(run.directory.checkpoints, record, size, is_writer=group.main),
        choices=choices | more | kept,
        notes=[*notes, *datasets.notes],
        lower_rate=auto.lower_rate(config, known),
    )


def _record(
    run: Run,
    config: RunConfig,
    datasets: TokenizedDatasets,
    base: Base,
    computed_with: dict[str, str],
    batches: BatchedDatasets,
) -> CheckpointRecord:
    """What checkpoints record of the run. Raises ResumeError: it differs from the run that was interrupted."""
    point, template = run.resume_point, template_fingerprint(config, datasets.tokenizer)
    found = {
        "base": base.fingerprint,
        "data": datasets.train.fingerprint,
        "validation": datasets.validation.fingerprint if datasets.validation else None,
        **({"test": datasets.test.fingerprint} if datasets.test else {}),
        **({"template": template} if template else {}),
        **({"start": run.start.digest} if run.start else {}),
        **({"retention": batches.retention.fingerprint} if batches.retention else {}),
    }
    record = CheckpointRecord(
        config=config.resolved(),
        fingerprints=found,
        rows=datasets.train.report.counts(),
        conditions=computed_with,
        processes=launcher.world_size(),
        sharding=launcher.sharding(),
        changes=[],
        decided=auto.decided_values(config),
        max_minutes=point.record.max_minutes if point else None,
    )
    if point is None:
        return record
    if reason := fingerprints.incomparable(str(point.record.fingerprints["base"]), base.fingerprint):
        what, fix = f"the checkpoint {reason[0]}", "start afresh with `overwrite=True`"
        raise ResumeError(Problem(Code.RESUME_CHANGED, what, key="model.name_or_path", fix=fix))
    point.check_same(record, base.fingerprint)
    changes = [*point.record.changes, *point.changes, *point.record.changed_conditions(computed_with, point.step)]
    return record.model_copy(update={"changes": changes})


def template_fingerprint(config: RunConfig, tokenizer: Any) -> str:
    """The fingerprint of the chat template in the config; empty if the tokenizer's own is used."""
    return hashlib.sha256(tokenizer.chat_template.encode()).hexdigest() if config.data.chat_template else ""


def facts(run: Run, datasets: TokenizedDatasets, group: Group = SINGLE_PROCESS) -> auto.Facts:
    """The facts that `auto` is decided by, as far as known before batching; the number of full packs is estimated."""
    config, rows, items = run.config, datasets.train.rows, datasets.train.items
    model_config = load.load_config(config.model)
    is_packed = config.data.packing == "full"
    of_pack = config.training.per_device_train_batch_size * config.data.max_length
    packs = -(-int(rows.lengths.sum()) // of_pack) if is_packed else items
    return auto.Facts(
        hidden_size=load.hidden_size(model_config),
        layers=load.layers(model_config),
        items=packs,
        supervised=int(rows.supervised.sum()),
        processes=group.count,
        rows_in_pack=items / packs if is_packed else None,
        unit_parameters=partial(unit_parameters, config.model, model_config),
        start=start_settings(run.start.info.files) if run.start else {},
    )


def unit_parameters(section: ModelSection, model_config: Any, lora: LoraSection) -> int:
    """The number of parameters per unit of `r`, see `auto.Facts`. No weights are loaded."""
    return parameters.per_rank(creation.adapt(load.build_meta(model_config, section), lora, seed=0)[0])


def _check_warmup(training: TrainingSection, batches: BatchedDatasets, processes: int) -> None:
    """Raises ConfigError: the warmup is longer than the run. A time budget has its own check."""
    steps = Schedule.of(training, len(batches.train.items), batches.train.size, processes).steps
    if training.max_minutes is None and decided(training.warmup_steps) > steps:
        what = f"the run has {plural(steps, 'step')}, fewer than its warmup, so the rate would never reach its peak"
        fix = "lower it, set a fraction of the steps, or set more epochs or steps"
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, key="training.warmup_steps", fix=fix))
