"""What of a run comes before its first step: `loratune train --dry-run` shows it, and `train` carries it out."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loratune import kernels, memory
from loratune.adapter import card
from loratune.codes import Code
from loratune.compare import objectives
from loratune.config import LoraSection, ModelSection, RunConfig, TrainingSection, decided
from loratune.data import DatasetSplit
from loratune.data.rendering import CHOSEN, DESIRABLE, REJECTED, UNDESIRABLE
from loratune.errors import ConfigError, Problem
from loratune.events import PlanEvent
from loratune.lora import attach, initialize, parameters
from loratune.lora.attach import PeftModel
from loratune.lora.module_names import shared_module
from loratune.lora.parameters import Count
from loratune.lora.targets import Targets
from loratune.lora.tensors import AdapterInit
from loratune.model import load, stored
from loratune.model.load import Base
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.text import align, plural
from loratune.training import auto, batching, continuing
from loratune.training.batching import BatchedDatasets, TokenizedDatasets
from loratune.training.continuing import EarlierRun
from loratune.training.evaluations import EvaluationSteps, optimizer_steps
from loratune.training.preflight import ValidatedRun
from loratune.training.run_context import TrainingJob

_SIDES = {CHOSEN: ", chosen", REJECTED: ", rejected", DESIRABLE: ", desirable", UNDESIRABLE: ", undesirable"}


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step.

    Attributes:
        config: The configuration, with absolute paths.
        processes: How many processes the run has.
        train_split: The training rows as read; None in a process that did not read them.
        tokenizer: The tokenizer of the base.
        base: The base, whose files must not change.
        model: The base with the adapter attached.
        targets: The modules that the adapter is attached to.
        adapter_init: The adapter before its first step.
        count: Trainable parameters, and all parameters.
        datasets: The rows as tokens.
        batches: The same rows in batches, and which layers the kernels compute.
        memory: The estimate of the memory that training needs.
        evaluations: When the run is evaluated; None without validation rows.
        earlier: The run that made the adapter of `lora.start_from`; None where the run starts from none.
        notes: Lines that the user should see.
        lower_rate: A learning rate to try should that of the run spoil the model.
    """

    config: RunConfig
    processes: int
    train_split: DatasetSplit | None
    tokenizer: Any
    base: Base
    model: PeftModel
    targets: Targets
    adapter_init: AdapterInit
    count: Count
    datasets: TokenizedDatasets
    batches: BatchedDatasets
    memory: memory.Estimate
    evaluations: EvaluationSteps | None
    earlier: EarlierRun | None
    notes: list[str]
    lower_rate: float

    @property
    def example_prompt(self) -> str:
        """A prompt to try the adapter with, quoted for a shell; empty in a process that did not read the rows."""
        return card.example_prompt(self.train_split) if self.train_split else ""

    @property
    def context(self) -> int | None:
        """How many tokens the model was built for, if that is known."""
        return load.context_length(self.model.config)

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Of all that the run reads, see `resume.CONTENTS`."""
        datasets = self.datasets
        validation = datasets.validation.fingerprint if datasets.validation else None
        others = {"test": datasets.test.fingerprint} if datasets.test else {}
        others |= {"template": template} if (template := template_fingerprint(self.config, self.tokenizer)) else {}
        others |= {"start": self.earlier.start.digest} if self.earlier else {}
        return {"base": self.base.fingerprint, "data": datasets.train.fingerprint, "validation": validation, **others}

    @property
    def training(self) -> TrainingSection:
        """The section, with what it leaves to the rows: the steps between evaluations, and which step is kept."""
        steps = {"eval_steps": self.evaluations.interval} if self.evaluations else {}
        return self.config.training.model_copy(update={**steps, "keep": "best" if self.config.keeps_best else "last"})

    @property
    def job(self) -> TrainingJob:
        """What the training loop is given."""
        batches = self.batches
        model, objective = self.model, batches.objective
        return TrainingJob(self.training, self.config.lora, model, batches.train, batches.held_out, objective)

    def event(self) -> PlanEvent:
        """The plan as users see it before the first step."""
        titles = [f"first row{self.side_name(number)}, supervised text marked:" for number in self._first_example()]
        texts = [tuple(_shortened(self.row_text(number))) for number in self._first_example()]
        shared = [
            shared_module(module_pattern, self.targets.fused[module_pattern], roles)
            for module_pattern, roles in self.targets.shared_roles().items()
            if roles
        ]
        return PlanEvent(
            rows=tuple(self.dataset_lines()),
            examples=tuple(zip(titles, texts, strict=True)),
            notes=(*shared, *self.all_notes()),
            summary=str(self.count),
            trainable=self.count.trainable,
            memory=self.memory.total,
        )

    def _first_example(self) -> range:
        return range(self.datasets.train.rows_per_example)

    def dataset_lines(self) -> Iterator[str]:
        """A table of how many rows of each split are used, truncated or dropped, and remarks on them."""
        datasets = self.datasets
        cells = [[name, *split.report.cells()] for name, split in datasets.splits.items()]
        yield from align(["", *datasets.train.report.COLUMNS], cells)
        for name, split in datasets.splits.items():
            lines = [*datasets.remarks[name], *split.report.remarks(datasets.max_length, self.context)]
            yield from (f"  {name}: {line}" for line in lines)
        yield from (f"  {line}" for line in datasets.leaks)

    def all_notes(self) -> Iterator[str]:
        """What is allowed but may not be intended, and what was chosen."""
        training = self.config.training
        batch_size, accumulation = self.batches.train.size, training.gradient_accumulation_steps
        batch = auto.rows_of_step(training, self.processes)
        if self.processes > 1:
            kinds = "packs of rows" if self.config.data.packing == "full" and self.batches.train.flat else "rows"
            yield f"{self.processes} processes: {self.processes} x {batch_size} x {accumulation} {kinds} a step"
        if (items := self.datasets.train.items) < batch and batch_size > 1:
            yield f"rows: {items}, fewer than a batch of {batch}: each epoch is one step on all of them"
        if self.evaluations is not None:
            kept = "; the weights of the one with the lowest loss become the adapter" if self.config.keeps_best else ""
            yield f"{self.evaluations}{kept if self.evaluations.count > 1 else ''}"
            if training.patience is not None and training.patience + 1 >= self.evaluations.count:
                yield f"training.patience: {training.patience} has no effect with so few evaluations"
        yield from self.notes

    def side_name(self, number: int) -> str:
        """`, chosen` and the like behind the place of a training row that is an answer to be compared; else empty."""
        return _SIDES.get(self.datasets.train.rows.side(number), "")

    def row_text(self, number: int = 0) -> Iterator[tuple[str, bool]]:
        """A training row as pieces of text, each with whether it is supervised."""
        row, start = self.datasets.train.rows.row(number), 0
        spans = [(max(first, 1), end) for first, end in row.spans]  # The first token has no token before it.
        for span in [*spans, (len(row.ids), len(row.ids))]:
            for ids, supervised in ((row.ids[start : span[0]], False), (row.ids[slice(*span)], True)):
                if ids:
                    yield self.tokenizer.decode(ids), supervised
            start = span[1]


def _shortened(pieces: Iterable[tuple[str, bool]], limit: int = 600) -> Iterator[tuple[str, bool]]:
    """Pieces of text, with the middle of long ones left out."""
    for text, supervised in pieces:
        is_long = len(text) > limit
        yield f"{text[: limit // 2]} [...] {text[-limit // 2 :]}" if is_long else text, supervised


@dataclass(frozen=True)
class LoadedRun:
    """What of a run is loaded, and stays the same for whatever adapter is put on it.

    Attributes:
        tokenizer: The tokenizer of the base.
        datasets: The rows as tokens, with those that are replayed.
        earlier: The run that made the adapter of `lora.start_from`; None where the run starts from none.
        base: The base.
    """

    tokenizer: Any
    datasets: TokenizedDatasets
    earlier: EarlierRun | None
    base: Base


Planner = Callable[[ValidatedRun, Group], Plan]
"""Makes the plan of a run, as `make_plan` does."""


def template_fingerprint(run: RunConfig, tokenizer: Any) -> str:
    """That of the chat template that the config names; empty where it is the tokenizer's own."""
    return hashlib.sha256(tokenizer.chat_template.encode()).hexdigest() if run.data.chat_template else ""


def make_plan(validated_run: ValidatedRun, group: Group = SINGLE_PROCESS) -> Plan:
    """Load what the run needs, attach the adapter, and lay out the batches. Raises as `load_run` and `adapted`."""
    return adapted(validated_run, load_run(validated_run, group), group)


def load_run(validated_run: ValidatedRun, group: Group = SINGLE_PROCESS) -> LoadedRun:
    """Load the tokenizer and tokenize the rows; then load the base.

    Raises ModelError, DataError; and AdapterError, ConfigError: the adapter to start from is of another base.
    """
    run = validated_run.config
    load.check_machine(run.model)
    load.check_kernels(run.model, gpu=load.device().type != "cpu")
    kernels.keep_pages()
    tokenizer = load.load_tokenizer(run.model, run.data.chat_template)
    datasets, earlier = load_rows(validated_run, tokenizer, group)
    base = load.load_for_run(run.model, group)
    continuing.check_base(validated_run.start, base)
    return LoadedRun(tokenizer, datasets, earlier, base)


def load_rows(
    validated_run: ValidatedRun, tokenizer: Any, group: Group = SINGLE_PROCESS
) -> tuple[TokenizedDatasets, EarlierRun | None]:
    """The rows as tokens, with those of the earlier run that are replayed, and that run. Raises ModelError, DataError,
    ConfigError."""
    datasets = batching.tokenize(validated_run, tokenizer, group)
    return continuing.earlier_run(validated_run, tokenizer, datasets, group)


def adapted(validated_run: ValidatedRun, loaded: LoadedRun, group: Group = SINGLE_PROCESS) -> Plan:
    """Decide what the config leaves to the rows and the base, attach the adapter to the base, and lay out the batches.

    Raises ModelError, DataError; and AdapterError, ConfigError: the adapter to start from does not fit.
    """
    tokenizer, datasets, earlier, base = loaded.tokenizer, loaded.datasets, loaded.earlier, loaded.base
    run, known = validated_run.config, facts(validated_run, datasets, group)
    lora, choices = auto.decide_lora(run.lora, known)
    dense, origin = load.dense_model(base.model, run.model), (run.model.name_or_path, run.model.revision)
    model, targets = attach.adapt(base.model, lora, dense=dense, seed=run.training.seed, origin=origin)
    batches = batching.batch(model, load.pad_id(tokenizer), datasets, run.data, run.training, run.preferences)
    items = len(batches.train.items)
    known = replace(known, rows=items, rows_in_pack=datasets.train.items / items)
    run, more = auto.decide(run.model_copy(update={"lora": lora}), known)
    _check_warmup(run.training, batches, group.count)
    originals = partial(stored.original_weights, run.model, base.model)
    start_from = earlier.start.info.files if earlier else None
    adapter_init = attach.initialize_adapter(
        model, run.lora, batches=batches.first(), originals=originals, start_from=start_from
    )
    described = objectives.described(run)
    notes = [f"training.objective: {described}", *_unpaired_note(datasets)] if described else []
    notes += [*auto.lines(choices | more), *load.machine_notes(run.model), *batches.notes, *targets.notes]
    return Plan(
        config=run,
        processes=group.count,
        train_split=validated_run.rows.train if validated_run.rows else None,
        tokenizer=tokenizer,
        base=base,
        model=model,
        targets=targets,
        adapter_init=adapter_init,
        count=attach.count(model, adapter_init),
        datasets=datasets,
        batches=batches,
        memory=batches.memory(model, run.training),
        evaluations=batches.evaluation_steps(datasets.validation, run.training, group.count),
        earlier=earlier,
        notes=[*notes, *(earlier.notes() if earlier else ())],
        lower_rate=auto.lower_rate(run, known),
    )


def facts(validated_run: ValidatedRun, datasets: TokenizedDatasets, group: Group = SINGLE_PROCESS) -> auto.Facts:
    """What `auto` is decided by, as far as it is known before the rows are in batches; full packs are estimated."""
    run, rows, items = validated_run.config, datasets.train.rows, datasets.train.items
    model_config = load.load_config(run.model)
    packs = -(-int(rows.lengths.sum()) // run.data.max_length) if run.data.packing == "full" else items
    return auto.Facts(
        hidden_size=load.hidden_size(model_config),
        layers=load.layers(model_config),
        rows=packs,
        supervised=int(rows.supervised.sum()),
        processes=group.count,
        rows_in_pack=items / packs,
        unit_parameters=partial(unit_parameters, run.model, model_config),
        start=initialize.start_settings(validated_run.start.info.files) if validated_run.start else {},
    )


def unit_parameters(section: ModelSection, model_config: Any, lora: LoraSection) -> int:
    """The parameters that each unit of `r` brings, see `auto.Facts`. No weights are loaded."""
    return parameters.per_rank(attach.adapt(load.build_meta(model_config, section), lora, seed=0)[0])


def _unpaired_note(datasets: TokenizedDatasets) -> Iterator[str]:
    """How many answers are desirable, for unpaired preferences."""
    if (sides := datasets.train.rows.sides) is not None and datasets.train.is_unpaired:
        good = int((sides == DESIRABLE).sum())
        bad = len(sides) - good
        absent = "" if good and bad else f": {'good' if bad else 'bad'} answers are shown by none of them"
        yield f"{good:,} of the answers are desirable, {bad:,} undesirable{absent}"


def _check_warmup(training: TrainingSection, batches: BatchedDatasets, processes: int) -> None:
    """Raises ConfigError: the warmup is longer than the run. A time budget has a check of its own."""
    steps = optimizer_steps(training, len(batches.train.items), batches.train.size, processes)[0]
    if training.max_minutes is None and decided(training.warmup_steps) > steps:
        what = f"the run has {plural(steps, 'step')}, fewer than its warmup, so the rate would never reach its peak"
        fix = "lower it, set a fraction of the steps, or set more epochs or steps"
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, key="training.warmup_steps", fix=fix))
