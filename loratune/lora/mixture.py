"""Plain LoRA: only A and B of single layers, without scales. Weighted sums of adapters are computed in this form.

Scales and weights are multiplied into B, and all modules have one rank, padded with zeros. In this form adapters are
added to each other: with weights w, the sum of w·s·B·A is one product of stacked matrices, so nothing is approximated.
Programs that read only `r` and `lora_alpha` of an adapter can read this form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.lora import adapter_files, upstream
from loratune.lora.adapter_config import FACTOR
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import join_first
from loratune.lora.tensors import Weights, not_finite, read_adapter

_KEPT = ("peft_type", "task_type", "base_model_name_or_path", "revision", "lora_dropout")
_HARMLESS = {
    *_KEPT, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping", "inference_mode", "peft_version",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Keys of a configuration that say where LoRA is and how it is scaled, or that have an effect in training only."""
_REASONS = {
    "use_dora": "DoRA scales each row of the merged weight, which no sum of B·A does",
    "bias": "it holds trained biases",
    "lora_bias": "it holds trained biases",
    "modules_to_save": "it holds modules that were trained whole",
    "trainable_token_indices": "it holds embeddings of tokens that were trained whole",
    "target_parameters": "it adapts stacked parameters, such as experts, instead of linear layers",
    "layer_replication": "it repeats layers of the base",
    "ensure_weight_tying": "it ties the adapters of the embeddings and of the output layer",
}
"""Key of the configuration → why an adapter that sets it is not plain LoRA."""


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter as plain LoRA.

    Attributes:
        tensors: Name in the adapter file → tensor.
        config: Content of its adapter_config.json.
        notes: Lines for the user.
    """

    tensors: Weights
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The rank of all modules."""
        return int(self.config["r"])

    def write(self, directory: Path) -> AdapterFiles:
        """Write the two files that PEFT reads to an existing directory, and open it."""
        (directory / CONFIG_FILE).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(self.tensors, directory / WEIGHTS_FILE, {"format": "pt"})
        return adapter_files.inspect(directory)


def effective_keys(files: AdapterFiles) -> list[str]:
    """The keys of an adapter's configuration by which it computes something else than plain LoRA does."""
    defaults = {field.name: field.default for field in fields(upstream.LoraConfig)}
    harmless = _HARMLESS
    if all(".lora_A." in name or ".lora_B." in name for name in files.tensors):
        harmless = _HARMLESS | {"ensure_weight_tying"}  # no embeddings are adapted, or trained whole
    return [k for k, value in files.config.items() if k not in harmless and value and value != defaults.get(k)]


def obstacles(files: AdapterFiles) -> dict[str, str]:
    """Why an adapter is not plain LoRA of layers: key of its configuration → reason; empty if it is.

    A reason that no key gives has the key "". No weights are read.
    """
    keys = effective_keys(files)
    found = {key: _REASONS.get(key, f"{key} is set, which belongs to a variant of LoRA") for key in keys}
    if files.changes_base:
        found["init_lora_weights"] = f"PEFT changes the base's own weights as it loads it ({files.init})"
    others = [name for name, shape in files.tensors.items() if not FACTOR.match(name) or len(shape) != 2]
    if others and not found:
        found[""] = f"it holds {join_first(others, 2)}, which are not A or B of a linear layer"
    return found


_Factors = tuple[tuple[str, str], torch.Tensor, torch.Tensor]
"""The names of A and B of one module in the adapter file; A; B with all scales multiplied into it; both in float32."""


def weighted_sum(weighted: Sequence[tuple[AdapterFiles, float]]) -> PlainAdapter:
    """The sum of adapters of one base, each with its weight, in float32. The rank is the sum of the ranks.

    Whether they are of one base is not checked beyond the shapes of their tensors.

    Raises:
        AdapterError: An adapter is not plain LoRA, see `obstacles`; adapters have different shapes for one module; A or
            B is missing or has another rank; the sum is not finite.
    """
    if problems := [
        Problem(Code.ADAPTER_UNSUPPORTED, f"cannot be mixed: {reason}", files.where, key)
        for files, _ in weighted
        for key, reason in obstacles(files).items()
    ]:
        raise AdapterError(problems)
    added: dict[str, list[_Factors]] = {}
    for files, weight in weighted:
        for path, (names, down, up) in _layers(files, weight).items():
            others = added.setdefault(path, [(names, down, up)])
            expected, first, last = others[0]
            if (names, down.shape[1], up.shape[0]) != (expected, first.shape[1], last.shape[0]):
                what, fix = f"{path} has another shape than in {weighted[0][0].path}", "mix adapters of one base"
                raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path), fix=fix))
            others += [(names, down, up)] if down is not first else []
    plain = _stacked(added, [files for files, _ in weighted])
    if bad := not_finite(plain.tensors):
        what = f"the weighted sum is NaN or inf in {len(bad)} tensors, among them {join_first(bad, 2)}"
        where, fix = str(weighted[0][0].path), "lower the weights"
        raise AdapterError(Problem(Code.ADAPTER_NOT_FINITE, what, where, "--mix", fix))
    return plain


def _layers(files: AdapterFiles, weight: float) -> dict[str, _Factors]:
    """Path of each module → its A and B. Raises AdapterError: one is missing, of another rank, or not finite."""
    settings, tensors, layers = files.checked_settings(), read_adapter(files), {}
    for path, names in files.factors.items():
        if len(names) < 2:
            what = f"{path} has only one of A and B"
            raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path / WEIGHTS_FILE)))
        a, b = names["A"], names["B"]
        layers[path] = (a, b), tensors[a].float(), tensors[b].float() * (weight * settings[path].scaling)
    return layers


def _stacked(layers: Mapping[str, Sequence[_Factors]], files: Sequence[AdapterFiles]) -> PlainAdapter:
    """Path → the layers that are added there, as one adapter."""
    rank = max(sum(len(down) for _, down, _ in added) for added in layers.values())
    tensors: Weights = {}
    for added in layers.values():
        names, downs, ups = zip(*added, strict=True)
        down, up = torch.cat(downs), torch.cat(ups, 1)
        tensors[names[0][0]] = pad(down, (0, 0, 0, rank - len(down))).contiguous()
        tensors[names[0][1]] = pad(up, (0, rank - len(down))).contiguous()
    config = {key: files[0].config.get(key) for key in _KEPT} | {
        "r": rank, "lora_alpha": rank, "target_modules": sorted(layers), "bias": "none", "rank_pattern": {},
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
        "fan_in_fan_out": any(one.config.get("fan_in_fan_out") for one in files), "inference_mode": True,
    }  # fmt: skip
    return PlainAdapter(tensors, config)
