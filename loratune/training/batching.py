"""The batches of a run: how rows are packed or padded for its model, and which rows each process gets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from loratune import kernels
from loratune.codes import Code
from loratune.compare import behavior
from loratune.compare.engine import SFT, WORTH_SHARING, Engine, Objective, ScoringPass, WeightedObjective
from loratune.compare.objectives import Formula
from loratune.compare.preferences import ComparedRows, PreferenceObjective
from loratune.config import AUTO, DataSection, RunConfig, TrainingSection
from loratune.data import TokenizedDataset
from loratune.data.batch_check import BatchCheck, padding_is_cheaper
from loratune.data.batches import flatten
from loratune.data.packing import BatchLayout, Packing, PrefixTree
from loratune.data.rendering import Renderer
from loratune.errors import ConfigError, DataError, ModelError, Problem
from loratune.events import progress
from loratune.kernels import Acceleration
from loratune.lora import attach
from loratune.model import load
from loratune.system import launcher
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.training import auto
from loratune.training.comparisons import choosing
from loratune.training.preflight import Run
from loratune.training.retention import (
    Retention,
    auto_weight,
    is_text,
    prompts,
    sample_count,
    step_tokens,
)
from loratune.training.schedule import Schedule


@dataclass(frozen=True)
class BatchedDatasets:
    """The batches of a run.

    Attributes:
        layouts: Split name → batches, except for test rows.
        train_rows: The training rows.
        engine: Computes the losses of rows: validation rows during training, and all rows at its end.
        held_out: The pass over the validation rows in an evaluation, if there are any.
        chooses: The numbers of their items, if the others judge the adapter, see `comparisons.choosing`.
        notes: Lines on why rows could not be packed, and on what is not accelerated.
        objective: What is lowered.
        items_of_step: The items of an optimizer step, in all its micro-steps and processes.
        tokens_of_step: The mean number of their tokens, with those of shared prefixes once: for a step as a whole, so
            it does not depend on how it is divided.
        retention: What keeps the model near what it was; None without a weight.
        counts_prompts: Whether tokens that are not supervised count in the training loss as well.
    """

    layouts: dict[str, BatchLayout]
    train_rows: TokenizedDataset
    engine: Engine
    held_out: ScoringPass | None
    chooses: frozenset[int]
    notes: list[str]
    objective: Objective
    items_of_step: int
    tokens_of_step: float
    retention: Retention | None = None
    counts_prompts: bool = False

    @property
    def train(self) -> BatchLayout:
        """The training batches."""
        return self.layouts["train"]

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
        lengths, rows = self._largest_of_rows()
        if self.retention is None:
            return lengths, rows
        texts = [self.retention.size] * self.retention.of_batch
        return [*lengths, *texts], rows + len(texts)

    def _largest_of_rows(self) -> tuple[list[tuple[int, int]], int]:
        heaviest = self.train.heaviest()
        if not self.train.flat and not isinstance(self.objective, PreferenceObjective):
            cached = self.train_rows.rows
            supervised = cached.lengths if self.counts_prompts else cached.supervised
            return [(self.train.tokens(number), int(supervised[number])) for number in heaviest], self.train.size
        rows = self.train.rows(heaviest)
        if self.train.saved is not None:
            return tree_sizes(rows)
        lengths = [(len(row["labels"]), sum(label >= 0 for label in row["labels"][1:])) for row in rows]
        return lengths, len(lengths)


@progress("trying batches on the base")
def batch(
    model: Any,
    pad_id: int,
    splits: Mapping[str, TokenizedDataset],
    config: RunConfig,
    group: Group = SINGLE_PROCESS,
    fingerprint: str = "",
) -> BatchedDatasets:
    """Batch rows as configured; rows are padded instead if the model would mix packed rows.

    Args:
        model: A `PeftModel` with its weights, which is not changed.
        pad_id: The token for padding.
        splits: Split name → rows.
        config: The config, with packing, batch size and objective.
        group: The processes of the run.
        fingerprint: That of the base, see `kernels.accelerate`.

    Raises:
        ModelError: Rows cannot be packed, and padding would change the results of the model.
    """
    section, training, train = config.data, config.training, splits["train"]
    sharded, shares = bool(launcher.sharding()), section.share_prefixes is True
    acceleration = kernels.accelerate(
        model, attach.adapted_linear, sharded=sharded, trees=shares, fingerprint=fingerprint
    )
    objective = objective_of(splits, config)
    with acceleration.applied(model):
        mixed = not kernels.attends_by_rows(model)
        packing, notes = _packing(model, train, section, training, acceleration, mixed=mixed)
        if "none" in group.all_gather(packing):  # Processes with other batches would wait for each other for ever.
            packing = "none"
            _check_padding(model, pad_id, training, train.rows_per_example, acceleration)
        layouts = {}
        for name, split in splits.items():
            if name != "test":
                items, together = objective.items(split)
                items = objective.training_items(split) if name == "train" else items
                size, longest = training.per_device_train_batch_size, section.max_length
                layouts[name] = BatchLayout(items, split.rows.lengths, packing, size, longest, pad_id, together)
        saved, more = sharing(model, layouts["train"], section, acceleration)
        saved = None if None in group.all_gather(saved) else saved
        layout = layouts["train"]
        count = min(len(layout.items), group.count * layout.size * training.gradient_accumulation_steps)
        is_same = count == layout.size or not config.has_retention
        of_step = saved if is_same else sharing(model, layout, section, acceleration, count)[0]
        tokens = step_tokens(train.rows.lengths, layout, count, of_step or 0.0)
    if saved is not None:
        limits = kernels.length_limits(model.config)
        layouts = {name: layout.sharing(saved, limits) for name, layout in layouts.items()}
    notes += [*more, *acceleration.notes(), *kernels.notes(model.get_input_embeddings().weight)]
    flat, trees = None if mixed else packing != "none", None if saved is None else True
    engine = Engine(model, section, pad_id, acceleration, flat=flat, trees=trees, group=group)
    held_out, chooses = None, frozenset[int]()
    if (validation := splits.get("validation")) is not None:
        copies = objective.copies(validation)
        if chooses := choosing(validation, config):
            copies = {number: count for number, count in copies.items() if number in chooses}
        held_out = engine.plan(validation, copies, objective)
    counts_prompts = section.prompt_loss_weight > 0
    if counts_prompts:
        notes.append(f"data.prompt_loss_weight: a token of a prompt counts {section.prompt_loss_weight:g} in the loss")
    return BatchedDatasets(
        layouts, train, engine, held_out, chooses, notes, objective, count, tokens, counts_prompts=counts_prompts
    )


def decide_kernels(config: RunConfig, model: Any, group: Group = SINGLE_PROCESS) -> tuple[RunConfig, list[str]]:
    """The config with a decided `model.use_liger_kernel`, and lines for the user. model: see `batch`."""
    used, notes = kernels.uses_liger(config.model.use_liger_kernel, model)
    used = all(group.all_gather(used))
    section = config.model.model_copy(update={"use_liger_kernel": used})
    return config.model_copy(update={"model": section}), notes


def objective_of(splits: Mapping[str, TokenizedDataset], config: RunConfig) -> Objective:
    """The objective of a run; for preferences with the rows of each split."""
    if config.training.objective == "sft":
        is_weighted = config.data.prompt_loss_weight > 0 or any(
            split.rows.weights is not None for split in splits.values()
        )
        return WeightedObjective(config.data.prompt_loss_weight) if is_weighted else SFT
    compared = {
        name: ComparedRows(split, config.data.max_length, config.training.seed) for name, split in splits.items()
    }
    return PreferenceObjective(Formula.of(config.training.objective, config.preferences), compared)


def sharing(
    model: Any, batches: BatchLayout, section: DataSection, acceleration: Acceleration, items: int | None = None
) -> tuple[float | None, list[str]]:
    """The share of tokens that shared prefixes save, None if batches do not share prefixes; and lines about it.

    items: those of a batch, by default as the layout has it.

    Raises:
        ConfigError: Sharing is required by the config, but not possible.
    """
    saved = batches.saving(items) if section.share_prefixes is not False else 0.0
    if not is_sharing_asked(section, saved):
        return None, []
    refusal = acceleration.tree_refusal(model) if batches.flat else "is trained on rows that are padded"
    if refusal is None:
        line = f"data.share_prefixes: shared prefixes are computed once: {saved:.0%} fewer tokens"
        return saved, [line]
    what = f"{model.config.model_type} {refusal}"
    if section.share_prefixes is True:
        fix = "leave it at auto"
        raise ConfigError(Problem(Code.MODEL_UNSUPPORTED, what, key="data.share_prefixes", fix=fix))
    return None, [f"data.share_prefixes: off, as {what}; else it would save {saved:.0%} of the tokens"]


def is_sharing_asked(section: DataSection, saved: float) -> bool:
    """Whether the config asks for shared prefixes, given the share of tokens that this saves."""
    return section.share_prefixes is True or (section.share_prefixes == AUTO and saved >= WORTH_SHARING)


def would_share(config: RunConfig, saved: float) -> bool:
    """Whether batches of a run on a CPU would share prefixes, judged by its config. saved: the result of `saving`."""
    return config.data.packing != "none" and not config.lora.lora_dropout and is_sharing_asked(config.data, saved)


def tree_sizes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, int]], int]:
    """(tokens, supervised tokens) that each row adds to a prefix tree; and the number of rows that add any."""
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
    model: Any,
    rows: TokenizedDataset,
    section: DataSection,
    training: TrainingSection,
    acceleration: Acceleration,
    *,
    mixed: bool,
) -> tuple[Packing, list[str]]:
    """How rows are packed, with a line on the reason if it differs from the config.

    mixed: whether attention is computed over all rows of a batch by the model itself. Then a batch is tried at full
    size, and rows are padded if that costs less. Full packs are kept, as other batches would change the steps.
    """
    if section.packing == "none":
        return "none", []
    lengths, size = np.sort(rows.rows.lengths), training.per_device_train_batch_size * rows.rows_per_example
    hidden_size = int(model.get_input_embeddings().weight.shape[1])
    if mixed and section.packing == "batch" and padding_is_cheaper(lengths, size, hidden_size):
        name = model.config.model_type
        return "none", [f"data.packing: {name} attends to all rows of a batch at once, which costs more than padding"]
    most_tokens = lengths[-size:].sum() if section.packing == "batch" else min(lengths.sum(), size * section.max_length)
    asked = int(lengths[-1]), int(most_tokens) if mixed else 0
    if (reason := BatchCheck(model, acceleration).packing(*asked)) is None:
        return section.packing, []
    return "none", [f"data.{reason}; rows are {'padded' if size > 1 else 'computed one by one'} instead"]


def _check_padding(
    model: Any, pad_id: int, training: TrainingSection, rows_per_example: int, acceleration: Acceleration
) -> None:
    """Check that a model supports padded rows, if batches have several. Raises ModelError: it does not."""
    size = training.per_device_train_batch_size
    if size * rows_per_example == 1 or (reason := BatchCheck(model, acceleration).padding(pad_id)) is None:
        return
    fix = "pairs are always padded, so use another objective or another model"
    if rows_per_example == 1:
        fix = f"set it to 1, and gradient_accumulation_steps to {size * training.gradient_accumulation_steps}"
    raise ModelError(Problem(Code.MODEL_UNSUPPORTED, reason, key="training.per_device_train_batch_size", fix=fix))


# The rows of each process in each micro-step


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a batch on the CPU, without padding; 0 for the placeholder batch of `Loader`."""
    if not (batch["labels"] >= 0).any():
        return 0
    mask = batch.get("attention_mask")
    return batch["labels"].numel() if mask is None else int(mask.sum())


def with_retention(
    config: RunConfig, batches: BatchedDatasets, run: Run, tokenizer: Any, model_config: Any, group: Group
) -> tuple[RunConfig, BatchedDatasets, auto.Choices]:
    """The config without `auto` in `retention`, the batches with its texts if it has a weight, and what was chosen.

    Raises:
        DataError, ConfigError: As `retention.prompts`, unless the weight was `auto`; then it is 0.
    """
    section, choices = config.retention, auto.Choices()
    if section.kl_weight == AUTO:
        choices["retention.kl_weight"] = auto_weight(config)
    weight = choices["retention.kl_weight"][0] if choices else section.kl_weight
    train, training = batches.train, config.training
    steps = Schedule.of(training, len(train.items), train.size, group.count).steps
    tokens = int(steps * batches.tokens_of_step) if training.max_minutes is None else None
    count, why = sample_count(tokens, section.max_new_tokens)
    if section.num_samples != AUTO:
        count = section.num_samples
    elif weight:
        choices["retention.num_samples"] = count, why
    section = section.model_copy(update={"kl_weight": weight, "num_samples": count})
    given, unusable = list[Any](), ""
    if weight and group.main:
        arguments = config.data.chat_template_kwargs
        renderer = Renderer(tokenizer, model_config.get_text_config().vocab_size, arguments)
        chat = run.rows is not None and run.rows.train.chat
        context = load.context_length(model_config)
        try:
            asked = config.model_copy(update={"retention": section})
            given = [*map(list, prompts(renderer, asked, chat, context))]
        except (DataError, ModelError, ConfigError) as error:
            if "retention.kl_weight" not in choices or section.prompts is not None:
                raise
            unusable = error.problems[0].what
    if unusable := group.broadcast(unusable):
        section = section.model_copy(update={"kl_weight": 0.0})
        choices = {"retention.kl_weight": (0.0, unusable)}
    elif weight:
        items, of_micro_step = batches.items_of_step, train.size * group.count
        in_all = group.count * -(-items // of_micro_step)
        texts = Retention.of(section, group.broadcast(given), batches.tokens_of_step, items, in_all)
        passes = behavior.passes(batches.engine, len(texts.given), texts.of_step.tokens)
        notes = [str(texts), *auto.writing_notes(passes, steps, training)]
        batches = replace(batches, retention=texts, notes=[*batches.notes, *notes])
    return config.model_copy(update={"retention": section}), batches, choices


class DistributedBatchSampler(Sampler[list[int]]):
    """The batches of one process.

    A micro-step takes the next `size` items for each process, in an order that is shuffled for each epoch. So the
    number of processes, the batch size and the accumulation only divide the same steps differently. At the end of an
    epoch, fewer items may remain; they are distributed evenly, and a process may get none. The texts of a step are
    distributed evenly too, from its last batch on, which may have the fewest items.

    Args:
        items: The number of items.
        size: Items of a micro-step for each process.
        seed: Random seed of the order; the number of the epoch is added.
        group: The processes of the run.
        accumulation: Micro-steps of an optimizer step.
        texts: Function of the number of an optimizer step and of its items that returns its texts of retention.
    """

    def __init__(
        self, items: int, size: int, seed: int, group: Group = SINGLE_PROCESS, accumulation: int = 1,
        texts: Callable[[int, int], Sequence[int]] | None = None,
    ):  # fmt: skip
        self.items, self.size, self.seed, self.epoch = items, size, seed, 0
        self.rank, self.processes, self.accumulation, self.texts = group.rank, group.count, accumulation, texts

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-steps of an epoch, the same for every process."""
        return -(-self.items // (self.size * self.processes))

    def order(self) -> list[int]:
        """The items in the order of this epoch, for all processes."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # as accelerate's SeedableRandomSampler
        order: list[int] = torch.randperm(self.items, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for number, start in enumerate(range(0, self.items, self.size * self.processes)):
            own = self._share(order[start : start + self.size * self.processes])
            yield [*own, *self._texts(number)]

    def _texts(self, micro_step: int) -> list[int]:
        """The texts that this process takes in a micro-step of the epoch, with the numbers after those of the items."""
        if self.texts is None:
            return []
        step, inside = divmod(micro_step, self.accumulation)
        before, of_micro_step = step * self.accumulation, self.size * self.processes
        batches = min(self.accumulation, len(self) - before) * self.processes
        items = min(self.accumulation * of_micro_step, self.items - before * of_micro_step)
        step += self.epoch * -(-len(self) // self.accumulation)
        own = batches - 1 - (inside * self.processes + self.rank)
        return [self.items + number for number in self.texts(step, items)[own::batches]]

    def _share(self, numbers: list[int]) -> list[int]:
        """The part of a micro-step's items that this process takes."""
        least, more = divmod(len(numbers), self.processes)
        start = self.rank * least + min(self.rank, more)
        return numbers[start : start + least + (self.rank < more)]


class Loader(DataLoader[Any]):
    """Loads the batches of a `DistributedBatchSampler`. Trainer sets its epoch; accelerate does not split it again.

    If a micro-step has no items for this process, it gets a placeholder batch of the first row without supervision, as
    all processes must take every step.
    """

    def __init__(
        self,
        items: Any,
        sampler: DistributedBatchSampler,
        collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
        *,
        pin_memory: bool,
    ):
        def batch(selected: Sequence[Any]) -> dict[str, torch.Tensor]:
            if not all(map(is_text, selected)):
                return collate(selected)
            idle = collate([items[0], *selected])
            return idle | {"labels": torch.full_like(idle["labels"], -100)}

        self.rows_sampler = sampler
        super().__init__(items, batch_sampler=sampler, collate_fn=batch, pin_memory=pin_memory)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.rows_sampler.set_epoch(epoch)
