"""Optimizers that treat A and B differently, in the form that `transformers.Trainer` takes them.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A by a fixed ratio. LoRA-FA (Zhang et al. 2023,
arXiv:2308.03303): A stays as it starts, and the gradient of B is corrected for it.
"""

from typing import Any

from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import Optimizer

from loratune.config import LoraSection

Choice = tuple[type[Optimizer], dict[str, Any]]
"""A class of optimizers and its keywords, as `Trainer(optimizer_cls_and_kwargs=...)` takes them."""


def freeze_a(model: PeftModel) -> None:
    """Leave every A as it is."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def split(model: PeftModel, section: LoraSection, plain: Choice, weight_decay: float) -> Choice:
    """The optimizer that a run's LoRA variant asks for; `plain` is what it would be without one.

    plain: class and keywords, `lr` among them, that the training section stands for. The parameters are grouped by
    PEFT, and handed over as `params`, which Trainer takes instead of its own groups.
    """
    kind, keywords = plain
    if section.use_lorafa:
        made = create_lorafa_optimizer(
            model, section.r, section.lora_alpha, lr=keywords["lr"], weight_decay=weight_decay
        )
        return type(made), {"params": [_trained(group) for group in made.param_groups], "lr": keywords["lr"]}
    if section.loraplus_lr_ratio is not None:
        made = create_loraplus_optimizer(
            model,
            kind,
            loraplus_lr_ratio=section.loraplus_lr_ratio,
            loraplus_lr_embedding=keywords["lr"],  # PEFT's own default, 1e-6, would leave embeddings as they are
            loraplus_weight_decay=weight_decay,
            **keywords,
        )
        return kind, keywords | {"params": [group for group in made.param_groups if group["params"]]}
    return plain


def _trained(group: dict[str, Any]) -> dict[str, Any]:
    """LoRA-FA's group without the frozen base, whose parameters it would only pass over."""
    kept = [
        place
        for place, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True))
        if parameter.requires_grad or "lora_A" in name
    ]
    columns = ("params", "names", "scaling_factors")
    return group | {column: [group[column][place] for place in kept] for column in columns}
