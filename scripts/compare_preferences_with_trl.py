"""Compare losses and gradients of the objectives that compare answers with those of TRL's trainers.

    python -m venv /tmp/trlvenv
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/trlvenv/lib/python3.11/site-packages/loratune.pth
    /tmp/trlvenv/bin/pip install --no-deps trl==1.16.0
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 /tmp/trlvenv/bin/python scripts/compare_preferences_with_trl.py [ROWS]

ROWS: pairs, or answers for KTO (208). A tiny Llama in float32 with an adapter whose values are drawn, so that it is not
its base, reads batches of four; for each objective TRL's trainer computes its loss on the same tokens, and both go
backward. Losses and gradients of all values of the adapter must be within 1e-5, with the batches of loratune packed as
trees.

TRL's ORPO differs in one thing, which is checked by itself: the loss of the chosen answer is over the prompt too, and a
mean over all tokens of the batch. Its loss with that part taken over each answer, from its own log-probabilities, is
compared; and what it computes in its place is compared with the same from loratune's sums.

KTO's estimate is of prompts with answers to others. TRL turns the answers of a batch round by one; it is given those
that loratune has drawn, which are of the whole data.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from compare_with_trl import WORDS
from conftest import byte_tokenizer, tiny_llama, write_rows  # type: ignore[import-not-found]
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # type: ignore[import-not-found]
from trl.experimental.cpo import CPOConfig, CPOTrainer  # type: ignore[import-not-found]
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # type: ignore[import-not-found]

from loratune import data, kernels
from loratune.config import DataSection, LoraSection
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout
from loratune.data.rendering import Renderer
from loratune.lora import attach
from loratune.system.launcher import SINGLE_PROCESS
from loratune.training.objectives import Formula
from loratune.training.preferences import ComparedRows, Comparing

BATCH, BOUND = 4, 1e-5
FORMULAS = {
    "dpo": Formula("dpo", 0.1),
    "dpo, label smoothing": Formula("dpo", 0.1, label_smoothing=0.1),
    "simpo": Formula("simpo", 2.0, simpo_gamma=1.0),
    "simpo, label smoothing": Formula("simpo", 2.0, simpo_gamma=1.0, label_smoothing=0.1),
    "orpo": Formula("orpo", 0.1),
    "kto": Formula("kto", 0.1, desirable_weight=1.2),
}
Gradients = dict[str, torch.Tensor]


def rows(folder: Path, count: int, judged: bool, renderer: Renderer) -> TokenizedDataset:
    """Random prompts with answers, as loratune reads them."""
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, most)))

    pairs = [{"prompt": words(30), "chosen": f" {words(20)}", "rejected": f" {words(20)}"} for _ in range(count)]
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": rng.random() < 0.5} for pair in pairs]
    path = write_rows(folder / f"{judged}.jsonl", answers if judged else pairs)
    section = DataSection.model_validate({"train": str(path)})
    split = data.read_datasets(section, 0).train
    return data.prepare(split, renderer, section, len(renderer.tokenizer))


def adapted() -> Any:
    """A tiny model with an adapter that is not zero."""
    section = LoraSection.model_validate({"r": 4, "lora_alpha": 16, "target_modules": "all-linear"})
    model, _ = attach.adapt(tiny_llama(max_position_embeddings=1024), section, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def gradients(model: Any) -> Gradients:
    """Of the adapter, by the names of its values; they are taken out of the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def batches(count: int) -> Iterator[list[int]]:
    """The numbers of items, four at a time."""
    return (list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH))


def ours(model: Any, dataset: TokenizedDataset, formula: Formula) -> tuple[Comparing, list[tuple[float, Gradients]]]:
    """Loss and gradients of each batch by loratune, with its kernels, in trees."""
    compared = ComparedRows(dataset, 1024, seed=0)
    objective = Comparing(formula, {"train": compared})
    acceleration = kernels.accelerate(model, attach.adapted_linear)
    rows, together = objective.items(dataset)
    layout = BatchLayout(rows, dataset.rows.lengths, "batch", BATCH, 1024, 0, together).sharing(0.1)
    with model.disable_adapter(), acceleration.applied(model):
        read = objective.read(model, layout, [*batches(dataset.items)])
    compared.reference = read.answers.log_probabilities.numpy()
    compared.mismatched = read.mismatched.log_probabilities.numpy() if len(read.mismatched.tokens) else None
    found = []
    model.train()
    with acceleration.applied(model):
        for group in batches(dataset.items):
            batch = layout.collate([layout.items[number] for number in group])
            count = objective.begin_step(model, [batch], None, SINGLE_PROCESS)
            objective.expect(model, batch)
            labels = batch.pop("labels")
            total, _ = objective.total(model, model(**batch, use_cache=False).logits, labels)
            (total / count).backward()
            found.append(((total / count).item(), gradients(model)))
    return objective, found


def parts(dataset: TokenizedDataset, compared: ComparedRows) -> list[dict[str, Any]]:
    """Prompt and answers of each item as TRL keeps them."""
    found = []
    for number in range(dataset.items):
        sides = dataset.item(number)
        start = sides[0].spans[0][0]
        item: dict[str, Any] = {"prompt_ids": list(sides[0].ids[:start])}
        if dataset.judged:
            mismatched = compared[number]["mismatched"]["input_ids"]
            item |= {"completion_ids": list(sides[0].ids[start:]), "label": sides[0].side > 0}
            item["KL_completion_ids"] = mismatched[start:]
        else:
            item |= {"chosen_ids": list(sides[0].ids[start:]), "rejected_ids": list(sides[1].ids[start:])}
        found.append(item)
    return found


class _WithIds:
    """Trainers whose rows are tokens already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class OfDpo(_WithIds, DPOTrainer):
    """DPO."""


class OfKto(_WithIds, KTOTrainer):
    """KTO."""


def _side(prompt: Sequence[int], answer: Sequence[int], name: str) -> dict[str, list[int]]:
    ids = [*prompt, *answer]
    labels = [-100] * len(prompt) + [*answer]
    return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}


class _WithRows:
    """Trainers of the experimental package, whose rows are tokens already."""

    given: list[dict[str, Any]]

    def tokenize_row(self, feature: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        item = self.given[feature["number"]]
        prompt = item["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        return row | _side(prompt, item["chosen_ids"], "chosen") | _side(prompt, item["rejected_ids"], "rejected")


class OfOrpo(_WithRows, ORPOTrainer):
    """ORPO."""


class OfCpo(_WithRows, CPOTrainer):
    """SimPO."""


def trainer_of(formula: Formula, model: Any, items: list[dict[str, Any]], tokenizer: Any, folder: str) -> Any:
    """TRL's trainer of an objective, on the base of a model, with an adapter of its shape."""
    common: dict[str, Any] = {
        "output_dir": folder, "beta": formula.beta, "max_length": 1024, "use_cpu": True, "bf16": False,
        "report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": BATCH,
    }  # fmt: skip
    base = tiny_llama(max_position_embeddings=1024)
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c", "number": number} for number in range(len(items))]
    given: dict[str, Any] = {"model": base, "processing_class": tokenizer, "peft_config": adapter}
    if formula.name == "dpo":
        return OfDpo(args=DPOConfig(**common), train_dataset=datasets.Dataset.from_list(items), **given)
    if formula.name == "kto":
        weights = {"desirable_weight": formula.desirable_weight, "undesirable_weight": formula.undesirable_weight}
        args = KTOConfig(**common, **weights, train_sampling_strategy="sequential")
        return OfKto(args=args, train_dataset=datasets.Dataset.from_list(items), **given)
    _WithRows.given = items
    if formula.name == "orpo":
        return OfOrpo(args=ORPOConfig(**common), train_dataset=datasets.Dataset.from_list(texts), **given)
    numbers = {"simpo_gamma": formula.simpo_gamma, "label_smoothing": formula.label_smoothing}
    args = CPOConfig(**common, **numbers, loss_type="simpo", cpo_alpha=0.0)
    return OfCpo(args=args, train_dataset=datasets.Dataset.from_list(texts), **given)


def trl_loss(trainer: Any, formula: Formula, batch: Any) -> torch.Tensor:
    """What TRL computes; of ORPO the parts, with the loss of the chosen answer over the answer alone."""
    if formula.name == "dpo" and formula.label_smoothing:
        return _smoothed(trainer, batch, formula)
    if formula.name != "orpo":
        loss: torch.Tensor = trainer.compute_loss(trainer.model, batch)
        return loss
    chosen, rejected, _, _, own = trainer.concatenated_forward(trainer.model, batch)[:5]
    odds = trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    whole = trainer.compute_loss(trainer.model, batch)
    assert abs(float(whole) - float(own - odds)) < BOUND
    check_prompt_part(trainer, batch, float(own))
    expected: torch.Tensor = -chosen.mean() - odds
    return expected


def _smoothed(trainer: Any, batch: Any, formula: Formula) -> torch.Tensor:
    """The conservative DPO loss, which TRL has for DPO only of sorted log-ratios: both orders of its own loss."""
    loss: torch.Tensor = trainer.compute_loss(trainer.model, batch)
    turned = {name: torch.cat(list(reversed(value.chunk(2)))) for name, value in batch.items()}
    other: torch.Tensor = trainer.compute_loss(trainer.model, turned)
    return (1 - formula.label_smoothing) * loss + formula.label_smoothing * other


@torch.no_grad()
def check_prompt_part(trainer: Any, batch: Any, own: float) -> None:
    """Check that TRL's loss of chosen answers is that of all tokens of their rows, prompts too, in one mean."""
    ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    logits = trainer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    lengths = mask.sum(1)
    mean = kernels.row_sums(trainer.model, logits, labels, lengths).sum() / kernels.row_counts(labels, lengths).sum()
    assert abs(float(mean) - own) < BOUND, (float(mean), own)


def compare(name: str, formula: Formula, model: Any, dataset: TokenizedDataset, tokenizer: Any) -> bool:
    """Print how far TRL is from loratune. Returns whether that is within the bound."""
    objective, found = ours(model, dataset, formula)
    items = parts(dataset, objective.splits["train"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(formula, model, items, tokenizer, folder)
        own = dict(trainer.model.named_parameters())
        for key, parameter in model.named_parameters():
            own[key].data.copy_(parameter.data)
        trainer.model.train()
        worst, steepest, largest = 0.0, 0.0, 0.0
        for group, (loss, gradient) in zip(batches(dataset.items), found, strict=True):
            batch = trainer.data_collator([trainer.train_dataset[number] for number in group])
            theirs = trl_loss(trainer, formula, batch)
            theirs.backward()  # type: ignore[no-untyped-call]
            other = gradients(trainer.model)
            assert other.keys() == gradient.keys()
            worst = max(worst, abs(theirs.item() - loss))
            steepest = max(steepest, *(float((other[key] - gradient[key]).abs().max()) for key in gradient))
            largest = max(largest, *(float(value.abs().max()) for value in gradient.values()))
    within = max(worst, steepest) <= BOUND
    print(
        f"{name}: {dataset.items} items, loss within {worst:.1e}, gradients within {steepest:.1e} "
        f"of at most {largest:.1e}{'' if within else '  DIFFERENT'}"
    )
    return within


def main() -> None:
    """Compare all objectives. Ends with 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=208)
    arguments = parser.parse_args()
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    renderer = Renderer(tokenizer)
    model = adapted()
    with tempfile.TemporaryDirectory() as folder:
        pairs, answers = (rows(Path(folder), arguments.rows, judged, renderer) for judged in (False, True))
        results = [
            compare(name, formula, model, answers if formula.name == "kto" else pairs, tokenizer)
            for name, formula in FORMULAS.items()
        ]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
