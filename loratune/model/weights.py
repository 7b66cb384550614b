"""Whether the weights that were found are the weights that config.json asks for."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from loratune.errors import ModelError, Problem

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ONE_MODEL = "are weights and config.json of one model?"


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Look at every weight once. Raises ModelError: one is NaN or inf."""
    summed = (torch.float16, torch.bfloat16, torch.float32)  # the sum of a tensor with NaN or inf is one of them
    bad = [
        path
        for path, weight in model.named_parameters()
        if weight.dtype in summed
        and not hasattr(weight, "quant_state")  # bits of 4-bit numbers, in whatever type they are kept
        and not weight.detach().sum(dtype=torch.float32).isfinite()
    ]
    if bad:
        what = f"{len(bad)} of its tensors hold NaN or inf, among them {', '.join(bad[:3])}"
        raise ModelError(Problem(what, name, fix="fetch it again"))


def check_complete(model: PreTrainedModel, info: Any, name: str) -> None:
    """Insist that weights and model agree, by what `from_pretrained(output_loading_info=True)` says.

    Raises ModelError: tensors that are missing, of another shape, or left over although the model has their like.
    """
    problems = []
    if missing := sorted(info["missing_keys"]):
        what = f"the weights lack {len(missing)} tensors of the model, among them {', '.join(missing[:3])}"
        problems.append(Problem(what, name, fix="they would be random; get the whole model"))
    if wrong := sorted(info["mismatched_keys"]):
        listed = ", ".join(f"{key} {tuple(has)} for {tuple(asks)}" for key, has, asks in wrong[:3])
        what = f"{len(wrong)} tensors have another shape than config.json asks for, among them {listed}"
        problems.append(Problem(what, name, fix=_ONE_MODEL))
    if left_over := sorted(_left_over(model, info["unexpected_keys"])):
        what = f"the weights hold {len(left_over)} tensors more than config.json asks for, among them "
        problems.append(Problem(what + ", ".join(left_over[:3]), name, fix=_ONE_MODEL))
    if problems:
        raise ModelError(problems)


def _left_over(model: PreTrainedModel, unexpected: Iterable[str]) -> Iterator[str]:
    """The unexpected tensors that matter: of a further layer or expert like those of the model, and biases.

    Others are harmless: buffers of other versions, heads of other tasks. What a model class passes over on purpose,
    transformers has taken out by _keys_to_ignore_on_load_unexpected; layers that predict further tokens only where
    they have the number of the released model.
    """
    config = model.config.get_text_config().to_dict()
    layers, ahead = config.get("num_hidden_layers") or 0, config.get("num_nextn_predict_layers") or 0
    on_purpose = {str(layers + number) for number in range(ahead)}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    alike = {_NUMBER.sub("*", name) for name in known}
    for name in unexpected:
        module, _, last = name.rpartition(".")
        first = _NUMBER.search(name)
        further = first is not None and first.group() not in on_purpose and _NUMBER.sub("*", name) in alike
        if further or (last == "bias" and f"{module}.weight" in known):
            yield name
