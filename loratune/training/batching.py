"""The rows of a run: tokenized once for all of its processes, and laid out in batches that its model can take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratune import data, kernels, memory
from loratune.codes import Code
from loratune.compare.engine import WORTH_SHARING, Engine, NextToken, Objective, ScoringPass, check_positions
from loratune.compare.objectives import ComparedRows, Formula
from loratune.config import AUTO, DataSection, PreferenceSection, RunConfig, TrainingSection
from loratune.data import DatasetSplit, TokenizedDataset
from loratune.data.packing import BatchLayout, Packing, flatten
from loratune.data.packing_check import packing_refusal, padding_is_cheaper, padding_refusal
from loratune.data.prefix_tree import PrefixTree
from loratune.data.rendering import Renderer
from loratune.errors import ConfigError, DataError, ModelError, Problem, ResourceError
from loratune.events import progress
from loratune.lora import attach
from loratune.lora.attach import PeftModel
from loratune.model import load
from loratune.system import launcher
from loratune.system.launcher import Group, host
from loratune.training.evaluations import EvaluationSteps, evaluation_steps
from loratune.training.preferences import PreferenceObjective
from loratune.training.preflight import ValidatedRun

_FEWEST_UNRELATED_TOKENS, _UNRELATED_TOKENS = 16, 128
"""The tokens of a passage of unrelated text, at least and at most. It has no more than a row may have."""


@dataclass(frozen=True)
class UnrelatedText:
    """Text that no rows are about. rows: None where it cannot be read; unknown: then why not."""

    rows: TokenizedDataset | None
    unknown: str = ""


@dataclass(frozen=True)
class TokenizedDatasets:
    """The rows of a run as tokens.

    Attributes:
        train: The training rows.
        validation: The validation rows, if there are any.
        remarks: For each split by its name, lines on how it was read. Known to the main process only.
        leaks: Lines on validation and test rows that are also in another split. Known to the main process only.
        max_length: The number of tokens to which rows were cut.
        test: The test rows, if there are any.
        unrelated: Text that no rows are about, on which is measured what is forgotten. It is no split of the rows.
    """

    train: TokenizedDataset
    validation: TokenizedDataset | None
    remarks: dict[str, list[str]]
    leaks: list[str]
    max_length: int
    test: TokenizedDataset | None
    unrelated: UnrelatedText

    @property
    def splits(self) -> dict[str, TokenizedDataset]:
        """Those that there are, by their names."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split}

    @property
    def compared(self) -> dict[str, TokenizedDataset]:
        """The splits on which an adapter may be compared with its base, by name, in order of preference."""
        named = {"validation": self.validation, "training": self.train}
        return {name: split for name, split in named.items() if split}


def tokenize(ready: ValidatedRun, tokenizer: Any, group: Group) -> TokenizedDatasets:
    """Tokenize the rows, or take them from the cache.

    The main process does it for all processes that see its cache. On a machine that does not see it, one process does
    it for the others there.

    Args:
        ready: The run.
        tokenizer: Its tokenizer.
        group: The processes of the run.

    Raises:
        DataError: See `data.prepare`; or the files of another machine hold other rows.
        ConfigError: Rows are longer than the context of the model.
    """
    section, model_config = ready.config.data, load.load_config(ready.config.model)
    vocabulary, context = model_config.get_text_config().vocab_size, load.context_length(model_config)
    renderer = Renderer(tokenizer, vocabulary)

    def prepare(name: str) -> TokenizedDataset:
        raw = ready.rows or data.read_datasets(section, ready.config.training.seed)
        return data.prepare(raw.splits[name], renderer, section, vocabulary)

    values = {"train": section.train, "validation": section.validation, "test": section.test}
    splits = {
        name: shared_rows(partial(prepare, name), group) for name, sources in values.items() if sources is not None
    }
    for rows in splits.values():
        check_positions(rows, section, context)
    remarks: dict[str, list[str]] = {name: [] for name in splits}
    leaks: list[str] = []
    if ready.rows is not None:
        for name, split in ready.rows.splits.items():
            remarks[name] += [*split.remarks(), *([splits[name].rows.remark] if splits[name].rows.remark else [])]
        remarks["train"] += _remarks_on_rendering(ready.rows.train, splits["train"], renderer, section)
        leaks = [line for one in data.find_leaks(ready.rows) for line in one.remarks()]
    train, validation, test = (splits.get(name) for name in values)
    assert train is not None
    longest = min(_UNRELATED_TOKENS, section.max_length, context or _UNRELATED_TOKENS)
    unrelated = _unrelated(renderer, vocabulary, longest, group)
    return TokenizedDatasets(train, validation, remarks, leaks, section.max_length, test, unrelated)


def _unrelated(renderer: Renderer, vocabulary: int, longest: int, group: Group) -> UnrelatedText:
    """See `TokenizedDatasets`. No run fails because of it. longest: the most tokens of a passage."""
    prepare = partial(data.prepare_unrelated_text, renderer, vocabulary, longest)
    own, unknown = None, ""
    if longest < _FEWEST_UNRELATED_TOKENS:
        unknown = f"rows of {longest} tokens are too short for it"
    elif group.main:
        try:
            own, unknown = prepare()
        except (DataError, ModelError, ResourceError) as error:
            unknown = error.problems[0].what
    if unknown := group.broadcast(unknown):
        return UnrelatedText(None, unknown)
    return UnrelatedText(shared_rows(lambda: own or prepare()[0], group))


def _remarks_on_rendering(
    split: DatasetSplit, rows: TokenizedDataset, renderer: Renderer, section: DataSection
) -> list[str]:
    """Lines on what the tokenizer does to rows that may not be intended."""
    remarks = [
        renderer.remark_on_bos(rows.rows.row(0).ids),
        data.remark_on_lost_characters(split, rows, renderer, section),
    ]
    return [remark for remark in remarks if remark]


def shared_rows(prepare: Callable[[], TokenizedDataset], group: Group) -> TokenizedDataset:
    """The rows that the main process prepares, in all processes.

    Raises:
        DataError: See `tokenize`.
    """
    own = prepare() if group.main else None
    directory, fingerprint = group.broadcast([str(own.rows.directory), own.fingerprint] if own else ["", ""])
    main_directory = Path(directory)
    rows = own or data.open_tokenized(main_directory)
    hosts_without = {name for name, has_rows in group.all_gather([host(), rows is not None]) if not has_rows}
    if host() in hosts_without and group.leads_machine:
        rows = own or prepare()
    directories = group.all_gather([host(), str(rows.rows.directory if rows else main_directory)])
    if rows is None:
        other = (Path(path) for name, path in directories if name == host() and path != directory)
        rows = data.open_tokenized(next(other, main_directory))
    if rows is None or rows.fingerprint != fingerprint:
        what = f"the rows on {host()} are not those of the main process"
        fix = "give all machines the same files"
        raise DataError(Problem(Code.DISTRIBUTED_SETTING, what, key="data.train", fix=fix))
    return rows


@dataclass(frozen=True)
class BatchedDatasets:
    """The batches of a run.

    Attributes:
        train: The training batches.
        train_rows: Their rows.
        validation: The validation batches, if there are validation rows.
        pad_id: The token for padding.
        engine: Computes the losses of rows: of validation rows while training, and of all rows at its end.
        held_out: The pass over the validation rows, if there are any.
        notes: Lines on why rows could not be packed, and on what is not accelerated.
        objective: What is lowered.
    """

    train: BatchLayout
    train_rows: TokenizedDataset
    validation: BatchLayout | None
    pad_id: int
    engine: Engine
    held_out: ScoringPass | None
    notes: list[str]
    objective: Objective

    @property
    def acceleration(self) -> kernels.Acceleration:
        """What of the model the kernels compute."""
        return self.engine.acceleration

    @property
    def layouts(self) -> dict[str, BatchLayout]:
        """The batches by the name of their split."""
        return {"train": self.train, **({"validation": self.validation} if self.validation else {})}

    def first(self, most: int = 64) -> list[Mapping[str, Any]]:
        """The first batches of the training rows, in their order."""
        count, size = len(self.train.items), self.train.size
        starts = range(0, min(count, most * size), size)
        collate = flatten if self.train.flat else self.train.put  # Prefixes are shared by accelerated layers alone.
        return [collate(self.train.rows(range(start, min(start + size, count)))) for start in starts]

    def largest(self) -> tuple[list[tuple[int, int]], int]:
        """The size of the largest training batch.

        Returns:
            (length, supervised tokens) of its rows, and how many rows there are.
        """
        heaviest = self.train.heaviest()
        if not self.train.flat and not isinstance(self.objective, PreferenceObjective):
            supervised = self.train_rows.rows.supervised
            return [(self.train.tokens(number), int(supervised[number])) for number in heaviest], self.train.size
        rows = self.train.rows(heaviest)
        if self.train.saved is not None:
            return tree_sizes(rows)
        lengths = [(len(row["labels"]), sum(label >= 0 for label in row["labels"][1:])) for row in rows]
        return lengths, len(lengths)

    def memory(self, model: PeftModel, training: TrainingSection) -> memory.Estimate:
        """The estimate of the memory that training the model on these batches needs."""
        tokens = self.train.total_tokens(training.max_steps).tolist()
        return memory.estimate(model, *self.largest(), training, packed=self.train.flat, batch_tokens=tokens)

    def evaluation_steps(
        self, validation: TokenizedDataset | None, training: TrainingSection, processes: int
    ) -> EvaluationSteps | None:
        """When a run of so many processes is evaluated on some rows; None without any."""
        if validation is None:
            return None
        trained, held_out = (int(split.rows.lengths.sum()) for split in (self.train_rows, validation))
        return evaluation_steps(training, len(self.train.items), self.train.size, processes, trained, held_out)

    def savings(self, model: PeftModel, training: TrainingSection) -> list[tuple[str, int]]:
        """Settings that would save memory, each with about how many bytes."""
        return [*memory.savings(model, *self.largest(), training, packed=self.train.flat)]


@progress("trying batches on the base")
def batch(
    model: Any,
    pad_id: int,
    datasets: TokenizedDatasets,
    data_section: DataSection,
    training: TrainingSection,
    preferences: PreferenceSection = PreferenceSection(),  # noqa: B008  it is frozen
) -> BatchedDatasets:
    """Lay out rows as the configuration says; or padded, where the model would mix packed rows.

    Args:
        model: A `PeftModel` with its weights, which stays as it is.
        pad_id: The token for padding.
        datasets: The rows.
        data_section: How rows are to be packed.
        training: How many rows a batch has, and what is lowered.
        preferences: The numbers of objectives that compare answers.

    Raises:
        ModelError: Rows cannot be packed, and the model would compute something else for padded ones.
    """
    acceleration = kernels.accelerate(model, attach.adapted_linear, sharded=bool(launcher.sharding()))
    size, length = training.per_device_train_batch_size, data_section.max_length
    objective = objective_of(datasets.splits, data_section, training, preferences)
    with acceleration.applied(model):
        mixed = not kernels.attends_by_rows(model)
        packing, notes = _packing(model, datasets.train, data_section, training, mixed=mixed)
        if packing == "none":
            _check_padding(model, pad_id, training, datasets.train.rows_per_example)
        layouts = {
            name: BatchLayout(rows, split.rows.lengths, packing, size, length, pad_id, rows_per_example)
            for name, split in datasets.splits.items()
            if name != "test"
            for rows, rows_per_example in [objective.items(split)]
        }
        saved, more = sharing(model, layouts["train"], data_section)
    if saved is not None:
        layouts = {name: layout.sharing(saved) for name, layout in layouts.items()}
    notes += [*more, *acceleration.notes(), *kernels.notes(model.get_input_embeddings().weight)]
    train, validation = layouts["train"], layouts.get("validation")
    trees = None if saved is None else True
    engine = Engine(model, data_section, pad_id, acceleration, flat=None if mixed else packing != "none", trees=trees)
    held_out = objective.held_out(engine, datasets.validation) if datasets.validation else None
    return BatchedDatasets(train, datasets.train, validation, pad_id, engine, held_out, notes, objective)


def objective_of(
    datasets: Mapping[str, TokenizedDataset],
    section: DataSection,
    training: TrainingSection,
    preferences: PreferenceSection,
) -> Objective:
    """The objective of a run; for preferences with the rows of each split."""
    if training.objective == "sft":
        return NextToken()
    splits = {name: ComparedRows(split, section.max_length, training.seed) for name, split in datasets.items()}
    return PreferenceObjective(Formula.of(training.objective, preferences), splits)


def sharing(model: Any, batches: BatchLayout, section: DataSection) -> tuple[float | None, list[str]]:
    """The share of the tokens that is saved where batches share prefixes, None where they do not; and lines on it.

    Raises:
        ConfigError: They are to share prefixes, and cannot.
    """
    saved = batches.saving() if section.share_prefixes is not False else 0.0
    if not is_sharing_asked(section, saved):
        return None, []
    refusal = kernels.tree_refusal(model) if batches.flat else "is trained on rows that are padded"
    if refusal is None:
        line = f"data.share_prefixes: shared prefixes are computed once: {saved:.0%} fewer tokens"
        return saved, [line]
    what = f"{model.config.model_type} {refusal}"
    if section.share_prefixes is True:
        fix = "leave it at auto"
        raise ConfigError(Problem(Code.MODEL_UNSUPPORTED, what, key="data.share_prefixes", fix=fix))
    return None, [f"data.share_prefixes: off, as {what}; else it would save {saved:.0%} of the tokens"]


def is_sharing_asked(section: DataSection, saved: float) -> bool:
    """Whether batches are to share prefixes where that saves a part of their tokens, and where it is possible."""
    return section.share_prefixes is True or (section.share_prefixes == AUTO and saved >= WORTH_SHARING)


def would_share(run: RunConfig, saved: float) -> bool:
    """Whether batches of a run on a CPU would share prefixes, as far as its config tells. saved: as of `saving`."""
    return run.data.packing != "none" and not run.lora.lora_dropout and is_sharing_asked(run.data, saved)


def tree_sizes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, int]], int]:
    """What of each row is computed in a tree of them, as tokens and supervised ones; and how many rows there are."""
    tree = PrefixTree.of([row["input_ids"] for row in rows])
    is_new = np.ones(len(tree.ids), bool)
    lengths = []
    for row, places in zip(rows, tree.places, strict=True):
        supervised = np.asarray(row["labels"])[is_new[places]] >= 0
        is_new[places] = False
        lengths.append((len(supervised), int(supervised.sum())))
    lengths = [(length, supervised) for length, supervised in lengths if length]
    return lengths, len(lengths)


def _packing(
    model: Any, rows: TokenizedDataset, section: DataSection, training: TrainingSection, *, mixed: bool
) -> tuple[Packing, list[str]]:
    """How rows are packed, with a line on the reason where that is not as the configuration says.

    mixed: whether attention is the model's own, and goes over all rows of a batch. Then a batch is tried in its full
    size, and rows are padded where that costs less. Packs that the user asked for stay, as other batches would mean
    other steps.
    """
    if section.packing == "none":
        return "none", []
    lengths, size = np.sort(rows.rows.lengths), training.per_device_train_batch_size * rows.rows_per_example
    hidden_size = int(model.get_input_embeddings().weight.shape[1])
    if mixed and section.packing == "batch" and padding_is_cheaper(lengths, size, hidden_size):
        name = model.config.model_type
        return "none", [f"data.packing: {name} attends to all rows of a batch at once, which costs more than padding"]
    most_tokens = lengths[-size:].sum() if section.packing == "batch" else min(lengths.sum(), size * section.max_length)
    if (reason := packing_refusal(model, int(lengths[-1]), int(most_tokens) if mixed else 0)) is None:
        return section.packing, []
    return "none", [f"data.{reason}; rows are {'padded' if size > 1 else 'computed one by one'} instead"]


def _check_padding(model: Any, pad_id: int, training: TrainingSection, rows_per_example: int) -> None:
    """Check that a model may be given padded rows, where batches have several. Raises ModelError: it may not."""
    size = training.per_device_train_batch_size
    if size * rows_per_example == 1 or (reason := padding_refusal(model, pad_id)) is None:
        return
    fix = "pairs are always padded, so use another objective or another model"
    if rows_per_example == 1:
        fix = f"set it to 1, and gradient_accumulation_steps to {size * training.gradient_accumulation_steps}"
    raise ModelError(Problem(Code.MODEL_UNSUPPORTED, reason, key="training.per_device_train_batch_size", fix=fix))
