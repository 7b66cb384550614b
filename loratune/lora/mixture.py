"""Several adapters added to one: with weights w, the sum of w·s·B·A over them is one product of stacked matrices.

A of the mixture is all A one below the other, and B is all w·s·B side by side, so that nothing is approximated; the
rank is the sum of the ranks.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from loratune.codes import Code
from loratune.config import patterns
from loratune.errors import AdapterError, Problem
from loratune.lora import adapter_files
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.tensors import Weights, not_finite, read_adapter

_FACTOR = re.compile(r"^base_model\.model\.(?P<path>.*)\.lora_(?P<kind>(embedding_)?)(?P<factor>[AB])(\.weight)?$")
_UNUSED = ("", "none", "None")
_REASONS = {
    "use_dora": "DoRA rescales each column of the adapted weight, so that two of them have no sum that is one LoRA",
    "lora_bias": "the biases of its B have no place in a plain LoRA",
    "bias": "it trains biases of the base, which a plain LoRA does not hold",
    "modules_to_save": "it replaces whole modules, which have no sum",
    "trainable_token_indices": "it trains embeddings of single tokens, which a plain LoRA does not hold",
    "target_parameters": "its LoRA of stacked experts cannot be joined with another one",
    "layer_replication": "it repeats layers of the base",
}
"""Key of the configuration → why an adapter that sets it cannot be mixed."""
_ALLOWED = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config", "megatron_core",
}  # fmt: skip
"""Keys of the configuration that say where LoRA is and how it is scaled, or that count in training only."""


@dataclass(frozen=True)
class _Pair:
    """A and B of one module, with what they are multiplied by folded into B, in float32. kind: as PEFT names them."""

    kind: str
    down: torch.Tensor
    up: torch.Tensor


def mix(weighted: Sequence[tuple[AdapterFiles, float]]) -> tuple[dict[str, Any], Weights]:
    """Add adapters of one base, each with its weight, to a plain LoRA.

    Whether they are of one base is not checked beyond the shapes of their tensors.

    Returns:
        The content of an adapter_config.json, and the tensors under their names in adapter_model.safetensors, in
        float32. Every module is scaled by 1: its `lora_alpha` is its rank.

    Raises:
        AdapterError: An adapter is more than LoRA of single modules; adapters have other shapes for one module; the
            sum is not finite.
    """
    if problems := [problem for files, _ in weighted for problem in _obstacles(files)]:
        raise AdapterError(problems)
    pairs: dict[str, list[_Pair]] = {}
    for files, weight in weighted:
        for path, pair in _pairs(files, weight).items():
            others = pairs.setdefault(path, [])
            if others and _outer(others[0]) != _outer(pair):
                what = f"{path} is {_outer(pair)} here and {_outer(others[0])} in {weighted[0][0].path}"
                raise AdapterError(
                    Problem(Code.ADAPTER_MIX_SHAPES, what, str(files.path), fix="mix adapters of one base")
                )
            others.append(pair)
    tensors: Weights = {}
    for path, parts in pairs.items():
        ending = "" if parts[0].kind else ".weight"
        name = f"base_model.model.{path}.lora_{parts[0].kind}"
        tensors[f"{name}A{ending}"] = torch.cat([pair.down for pair in parts])
        tensors[f"{name}B{ending}"] = torch.cat([pair.up for pair in parts], 1)
    if bad := not_finite(tensors):
        what = f"the weighted sum is NaN or inf in {len(bad)} tensors, among them {bad[0]}"
        raise AdapterError(
            Problem(Code.ADAPTER_NOT_FINITE, what, str(weighted[0][0].path), "--mix", "lower the weights")
        )
    ranks = {path: sum(len(pair.down) for pair in parts) for path, parts in pairs.items()}
    return _config([files for files, _ in weighted], ranks), tensors


def write(directory: Path, config: Mapping[str, Any], tensors: Weights) -> AdapterFiles:
    """Write what `mix` returned as an adapter directory, which exists, and open it."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS_FILE, {"format": "pt"})
    return adapter_files.inspect(directory)


def _obstacles(files: AdapterFiles) -> Iterator[Problem]:
    """Why an adapter cannot be mixed, if so."""
    where, config = str(files.path / CONFIG_FILE), files.config
    for field in fields(LoraConfig):
        value = config.get(field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name in _ALLOWED or not value or value in (*_UNUSED, default):
            continue
        reason = _REASONS.get(field.name, "a plain LoRA has no such setting")
        yield Problem(Code.ADAPTER_MIX_UNSUPPORTED, f"cannot be mixed: {reason}", where, field.name)
    if files.changes_base:
        what = "cannot be mixed: it changes the base's own weights as it is loaded"
        yield Problem(Code.ADAPTER_MIX_UNSUPPORTED, what, where, "init_lora_weights")
    others = [name for name, shape in files.tensors.items() if not _FACTOR.match(name) or len(shape) != 2]
    if others and not any(config.get(key) not in (None, False, [], {}, *_UNUSED) for key in _REASONS):
        what = f"cannot be mixed: {others[0]} is not A or B of a layer"
        yield Problem(Code.ADAPTER_MIX_UNSUPPORTED, what, str(files.path / WEIGHTS_FILE))


def _pairs(files: AdapterFiles, weight: float) -> dict[str, _Pair]:
    """Path of each module → its A and B. Raises AdapterError: one is missing, of another rank, or not finite."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    kinds: dict[str, str] = {}
    for name, tensor in read_adapter(files).items():
        match = _FACTOR.match(name)
        assert match is not None  # see `_obstacles`
        factors.setdefault(match["path"], {})[match["factor"]] = tensor.float()
        kinds[match["path"]] = match["kind"]
    if missing := [path for path, found in factors.items() if len(found) < 2]:
        what = f"{len(missing)} modules have only one of A and B, among them {missing[0]}"
        raise AdapterError(Problem(Code.ADAPTER_TENSORS_MISSING, what, str(files.path / WEIGHTS_FILE)))
    settings = patterns.checked_settings(files.config, files.tensors, str(files.path / CONFIG_FILE))
    return {
        path: _Pair(kinds[path], found["A"], found["B"] * (weight * settings[path].scaling))
        for path, found in factors.items()
    }


def _outer(pair: _Pair) -> tuple[str, int, int]:
    """What the pairs of one module have in common: kind, inputs and outputs."""
    return pair.kind, pair.down.shape[1], pair.up.shape[0]


def _config(files: Sequence[AdapterFiles], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of a plain LoRA with these ranks, path → rank."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    own = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=files[0].base,
        revision=files[0].config.get("revision"),
        inference_mode=True,
        r=common,
        lora_alpha=common,
        rank_pattern=own,
        alpha_pattern=dict(own),
        target_modules=sorted(ranks),
        fan_in_fan_out=any(one.config.get("fan_in_fan_out") for one in files),
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
