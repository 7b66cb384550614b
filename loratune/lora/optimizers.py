"""Optimizers that treat A and B differently, in the form in which `transformers.Trainer` accepts them.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the learning rate of B is a fixed multiple of that of A. LoRA-FA (Zhang et
al. 2023, arXiv:2308.03303): A keeps its initial values, and the gradient of B is corrected for it.
"""

from typing import Any

from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import Optimizer

from loratune.config import LoraSection

Choice = tuple[type[Optimizer], dict[str, Any]]
"""A class of optimizers and its keywords, for `Trainer(optimizer_cls_and_kwargs=...)`."""


def freeze_a(model: PeftModel) -> None:
    """Exclude every A from training."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def split(model: PeftModel, section: LoraSection, plain: Choice, weight_decay: float) -> Choice:
    """The optimizer of the run's LoRA variant.

    Args:
        model: The model with the adapter.
        section: The settings of LoRA.
        plain: Class and keywords, `lr` among them, of the optimizer without a variant.
        weight_decay: Weight decay of the run.

    Returns:
        Class and keywords. PEFT groups the parameters; as the keyword `params` they replace Trainer's own groups.
    """
    kind, keywords = plain
    if section.use_lorafa:
        optimizer = create_lorafa_optimizer(
            model, section.r, section.lora_alpha, lr=keywords["lr"], weight_decay=weight_decay
        )
        groups = [_without_base(group) for group in optimizer.param_groups]
        return type(optimizer), {"params": groups, "lr": keywords["lr"]}
    if section.loraplus_lr_ratio is not None:
        optimizer = create_loraplus_optimizer(
            model,
            kind,
            loraplus_lr_ratio=section.loraplus_lr_ratio,
            loraplus_lr_embedding=keywords["lr"],  # PEFT's own default, 1e-6, would hardly train embeddings
            loraplus_weight_decay=weight_decay,
            **keywords,
        )
        return kind, keywords | {"params": [group for group in optimizer.param_groups if group["params"]]}
    return plain


def _without_base(group: dict[str, Any]) -> dict[str, Any]:
    """LoRA-FA's group without the frozen base, whose parameters it would only skip."""
    indices = [
        index
        for index, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True))
        if parameter.requires_grad or "lora_A" in name
    ]
    columns = ("params", "names", "scaling_factors")
    return group | {column: [group[column][index] for index in indices] for column in columns}
