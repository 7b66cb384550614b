"""Objectives on models that scale or cap logits, or run rows one by one, against a reference in plain torch."""

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_refused, config_in, once, write_rows
from families import small
from running import WEIGHTS
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loratune import data, kernels
from loratune.codes import Code
from loratune.compare.preferences import ComparedRows
from loratune.config import DataSection, LoraSection
from loratune.data.batches import pad, put_rows
from loratune.data.rendering import Renderer
from loratune.kernels.loss import LossHead, Scaling, output_layer
from loratune.kernels.parity_check import relative_rms
from loratune.lora import creation, targets

CAP = {"final_logit_softcapping": 2.0}
SCALED: dict[str, tuple[dict[str, Any], Scaling | None]] = {
    "llama": ({}, Scaling()), "cohere": ({}, Scaling(1 / 16)), "cohere2": ({}, Scaling(1 / 16)),
    "cohere2_moe": ({}, Scaling(1 / 16)), "granite": ({"logits_scaling": 7.0}, Scaling(divisor=7.0)),
    "granitemoe": ({"logits_scaling": 6.0}, Scaling(divisor=6.0)), "gemma2": (CAP, Scaling(cap=2.0)),
    "gemma3_text": (CAP, Scaling(cap=2.0)), "gemma4_text": (CAP, Scaling(cap=2.0)), "nanochat": (CAP, Scaling(cap=2.0)),
    "vaultgemma": (CAP, Scaling(cap=2.0)), "beam": (CAP, Scaling(cap=2.0)),
    "hyperclovax": ({"logits_scaling": 8.0}, None),
}  # fmt: skip
"""Model families → configuration changes that make their logit scaling visible, and that scaling. None: unsupported."""
ALONE: dict[str, dict[str, Any]] = {
    "cpmant": {"init_std": 0.1},
    "prophetnet": {
        "num_decoder_layers": 2, "max_position_embeddings": 256, "dropout": 0.0, "activation_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}  # fmt: skip
"""Families that compute something else for padded rows in transformers."""
OBJECTIVES: dict[str, dict[str, float]] = {
    "sft": {}, "dpo": {"label_smoothing": 0.1, "sft_weight": 0.2}, "simpo": {"simpo_gamma": 0.5}, "orpo": {},
    "kto": {"desirable_weight": 1.5},
}  # fmt: skip
BETA = {"dpo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
STEPS, RATE, NORM = 3, 0.5, 1.0
LORA = LoraSection(r=4, lora_alpha=16, target_modules=["q", "v", "o"])


def model_dir(factory: pytest.TempPathFactory, family: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    def make(path: Path) -> None:
        changes = ALONE[family] if family in ALONE else SCALED[family][0]
        small(family, vocab_size=264, **changes).save_pretrained(path)
        tokenizer.save_pretrained(path)

    return once(factory, f"scaled-{family}", make)


def compared(objective: str) -> list[dict[str, Any]]:
    pairs = [(f"{n} and {n} make", f" {2 * n}", f" {2 * n + 1} or so") for n in range(8)]
    if objective == "kto":
        sides = [(prompt, (good, bad)[n % 2], n % 2 == 0) for n, (prompt, good, bad) in enumerate(pairs)]
        return [{"prompt": prompt, "completion": answer, "label": label} for prompt, answer, label in sides]
    if objective == "sft":
        return [{"prompt": prompt, "completion": good} for prompt, good, _ in pairs]
    return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in pairs]


def sums(model: Any, given: list[dict[str, Any]]) -> Tensor:
    """The summed log-probability of each answer, with rows computed one by one."""
    found = []
    for row in given:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].double()
        found.append(-cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum"))
    return torch.stack(found)


def loss_by_hand(
    objective: str, model: Any, given: list[dict[str, Any]], reference: Tensor, others: Tensor | None
) -> Tensor:
    """The mean over tokens, pairs or answers. others: the reference values of prompts with answers to other prompts."""
    logs, beta = sums(model, given), BETA.get(objective, 0.0)
    tokens = torch.tensor([sum(label >= 0 for label in row["labels"]) for row in given])
    if objective == "sft":
        return -logs.sum() / tokens.sum()
    if objective == "kto":
        with torch.no_grad():
            z = (sums(model, [row["mismatched"] for row in given]) - others).mean().clamp(min=0)
        good = torch.tensor([row["side"] > 0 for row in given])
        reward = beta * (logs - reference - z)
        return torch.where(good, 1.5 * (1 - reward.sigmoid()), 1 - (-reward).sigmoid()).mean()
    (good, bad), (means, worse) = (x.view(-1, 2).T for x in (logs - reference, logs / tokens))
    if objective == "dpo":
        margin = beta * (good - bad)
        return (-0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin) - 0.2 * means).mean()
    if objective == "simpo":
        return -logsigmoid(beta * (means - worse) - 0.5).mean()
    odds = means - (1 - means.exp()).log() - worse + (1 - worse.exp()).log()
    return (-means - beta * logsigmoid(odds)).mean()


def by_hand(
    objective: str, base: Path, path: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """The losses before each step and after the last, and the weights before the first step and after the last."""
    section = DataSection.model_validate({"train": str(path)})
    dataset = data.prepare(data.read_datasets(section, 42).train, Renderer(tokenizer), section, 264)
    items = ComparedRows(dataset, section.max_length, 42) if objective != "sft" else dataset.rows
    given = [items[number] for number in range(len(items))]
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = creation.attach(stock, LORA, targets.find(stock, LORA).peft(), seed=42).eval()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    with torch.no_grad():
        reference = sums(model, given) if objective in ("dpo", "kto") else torch.zeros(len(given))
        others = sums(model, [row["mismatched"] for row in given]) if objective == "kto" else None
    optimizer, losses = torch.optim.SGD(trained.values(), lr=RATE), []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        loss = loss_by_hand(objective, model, given, reference, others)
        losses.append(loss.item())
        if step == STEPS:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), NORM)
        optimizer.step()
    return losses, before, {name: weight.detach() for name, weight in trained.items()}


ALWAYS = [("dpo", "cohere"), ("orpo", "gemma2")]


@pytest.mark.parametrize(
    ("objective", "family"),
    [
        pytest.param(*one, marks=() if one in ALWAYS else pytest.mark.slow)
        for one in [*product(OBJECTIVES, ("cohere", "granite", "gemma2")), *product(("sft", "kto"), ALONE)]
    ],
)
def test_training_matches_a_reference_implementation(
    objective: str,
    family: str,
    cli: Callable[..., Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    base = model_dir(tmp_path_factory, family, tokenizer)
    path = write_rows(tmp_path / "compared.jsonl", compared(objective))
    losses, before, after = by_hand(objective, base, path, tokenizer)
    training = {
        "objective": objective, "max_steps": STEPS, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": NORM,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }  # fmt: skip
    sections: dict[str, Any] = {"lora": LORA.model_dump(include={"r", "lora_alpha", "target_modules"})}
    if OBJECTIVES[objective]:
        sections["preferences"] = OBJECTIVES[objective]
    make = partial(config_in(tmp_path, base), data={"train": str(path)}, **sections)
    if family in ALONE:
        expected = (Code.MODEL_UNSUPPORTED, "", "training.per_device_train_batch_size")
        check_refused(cli("train", make(training=training), "--dry-run"), 3, expected)
        training |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    ran = cli("train", make(training=training), "--allow-worse")
    assert ran.code == 0 and (family in ALONE or "the output layer" not in ran.err), ran.err
    recorded = json.loads((tmp_path / "out" / "loratune.json").read_text())
    found = [entry["loss"] for entry in recorded["curve"] if "loss" in entry]
    gain = recorded["metrics"]["gain"]
    assert found == pytest.approx(losses[:-1], rel=1e-5)
    assert (gain["base"], gain["adapter"]) == pytest.approx((losses[0], losses[-1]), rel=1e-5)
    weights = load_file(tmp_path / "out" / WEIGHTS)
    moved = sum((after[name] - before[name]).square().sum() for name in after).sqrt()
    apart = sum((weights[name.replace(".default", "")] - after[name]).square().sum() for name in after).sqrt()
    assert moved > (0.002 if family in ALONE else 0.01) and apart < 1e-4 * moved, (float(apart), float(moved))
    if family in ALONE:
        ran = cli("evaluate", "--adapter", tmp_path / "out", "--data", path, "--json")
        assert ran.code == 0, ran.err
        values = json.loads(ran.out)
        found = [values[which]["loss"] for which in ("base", "adapter")]
        assert found == pytest.approx([losses[0], losses[-1]], rel=1e-5)


def test_preference_pairs_need_batches_of_more_than_one_row(
    cli: Callable[..., Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    base = model_dir(tmp_path_factory, "prophetnet", tokenizer)
    path = write_rows(tmp_path / "compared.jsonl", compared("dpo"))
    training = {"objective": "dpo", "per_device_train_batch_size": 1}
    ran = cli("train", config_in(tmp_path, base)(data={"train": str(path)}, training=training), "--dry-run")
    check_refused(ran, 3, (Code.MODEL_UNSUPPORTED, "", "training.per_device_train_batch_size"))
    assert "another objective" in ran.err


@pytest.mark.parametrize("family", SCALED)
def test_loss_head_matches_the_logits_of_the_model_family(family: str) -> None:
    """Row sums and their weighted gradients match those from the model's own logits."""
    changes, scaling = SCALED[family]
    model = small(family, **changes).eval().requires_grad_(False)
    trained = [one.requires_grad_() for name, one in model.get_decoder().named_parameters() if "layers." in name]
    drawn = torch.Generator().manual_seed(0)
    given = [torch.randint(8, 300, (length,), generator=drawn).tolist() for length in (7, 12, 4)]
    batch = put_rows(lambda rows: pad(rows, 0), [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in given])
    labels, lengths, weights = batch.pop("labels"), batch.pop("lengths"), torch.tensor([1.0, -2.0, 0.5]).double()
    found = output_layer(model)
    assert (found and found[2]) == scaling
    if found is None:
        return
    outcomes, (name, head, scaling) = [], found
    for layer in (head, LossHead(head, scaling)):
        model.set_submodule(name, layer)
        kernels.set_loss_targets(model, labels, lengths=lengths)
        sums = kernels.row_sums(model, model(**batch, use_cache=False).logits, labels, lengths)
        assert type(sums) is Tensor
        gradients = torch.autograd.grad((sums.square() * weights).sum(), trained, allow_unused=True)
        outcomes.append([sums.detach(), torch.cat([one.flatten() for one in gradients if one is not None])])
    assert all(relative_rms(*pair) < 1e-5 for pair in zip(*outcomes, strict=True))
    kernels.set_loss_targets(model, labels)
    logits = model(**batch, use_cache=False).logits
    assert not logits.isfinite().any()
    total, _ = kernels.next_token_loss(model, logits, labels)
    assert total.item() == pytest.approx(float(outcomes[0][0].sum()), rel=1e-5)
    assert model(**batch, use_cache=False).logits.isfinite().all()
