"""A plain LoRA directory, for clients that know of an adapter only `r` and `lora_alpha`, and add B·A·alpha/r.

Older releases of vLLM, and llama.cpp, ignore `rank_pattern`, `alpha_pattern` and `use_rslora` in silence. Here the
scale of each module stands in its B, A and B are padded with zeros to one rank, and `lora_alpha` equals `r`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loratune.codes import Code
from loratune.config import patterns
from loratune.errors import AdapterError, Problem
from loratune.lora import upstream
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import endings, join_first
from loratune.lora.tensors import read_adapter

CLIENTS = {"peft": "PEFT", "vllm": "vLLM", "gguf": "llama.cpp"}
"""The programs that a plain directory is made for."""
CLOSENESS = 1e-5
"""The largest difference from the adapter, of logits to the largest logit, and of a module's change to itself."""

_PREFIX = "base_model.model."
_LAYER_PARTS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_FOLDED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_KEPT = ("peft_type", "task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "lora_dropout")
_INERT = (
    "auto_mapping", "inference_mode", "peft_version", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip
"""Keys without effect once the adapter is trained, or where what they belong to is off."""
_FOREIGN = {
    "use_dora": "DoRA scales each row of the merged weight, and no B·A can do that",
    "modules_to_save": "it holds modules that were trained whole",
    "trainable_token_indices": "it holds embeddings of tokens that were trained whole",
    "target_parameters": "it adapts stacked parameters, such as experts, and no linear layers",
    "layer_replication": "it repeats layers of the base",
}
"""Keys of parts that plain LoRA does not have → why."""

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
"""The dtypes that all clients read."""


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter as plain LoRA.

    Attributes:
        tensors: Those of its file.
        config: Its adapter_config.json.
        notes: What a user should know of it.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The one rank."""
        return int(self.config["r"])

    def write(self, directory: Path) -> None:
        """Write the two files that PEFT reads."""
        (directory / CONFIG_FILE).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        save_file(dict(self.tensors), directory / WEIGHTS_FILE, {"format": "pt"})


def check_plain(files: AdapterFiles, client: str) -> None:
    """Check that plain LoRA can hold an adapter. No weights are read.

    Args:
        files: The adapter.
        client: A key of `CLIENTS`.

    Raises:
        AdapterError: It holds more than A and B of layers, or its base is changed as PEFT loads it.
    """
    config, where = files.config, str(files.path)
    reasons = [reason for key, reason in _FOREIGN.items() if config.get(key)]
    if config.get("bias") not in (None, "none") or config.get("lora_bias"):
        reasons.append("it holds trained biases")
    if files.changes_base:
        reasons.append(f"PEFT changes the base's own weights as it loads it (init_lora_weights: {files.init})")
    known = {*_FOLDED, *_SELECTING, *_KEPT, *_INERT, *_FOREIGN, "bias", "lora_bias"}
    defaults = {field.name: field.default for field in fields(upstream.LoraConfig)}
    reasons += [
        f"{key} is set, which belongs to a variant of LoRA"
        for key, value in config.items()
        if key not in known and value not in (None, False, {}, [], defaults.get(key))
    ]
    ends = tuple(end for pair in _LAYER_PARTS for end in pair)
    if not reasons and (others := [name for name in files.tensors if not name.endswith(ends)]):
        reasons.append(f"it also holds {join_first(others, 2)}")
    if not reasons and any(len(shape) != 2 for shape in files.tensors.values()):
        reasons.append("it adapts convolutions")
    if client != "peft" and any(".lora_embedding_" in name for name in files.tensors):
        reasons.append(f"it adapts embeddings, and {CLIENTS[client]} reads that for few models only")
    if reasons:
        fix = (
            f"`loratune merge` makes a model of it{', and PEFT reads the adapter as it is' if client == 'peft' else ''}"
        )
        what = f"cannot be plain LoRA for {CLIENTS[client]}: {'; '.join(reasons)}"
        raise AdapterError(Problem(Code.EXPORT_NOT_PLAIN, what, where, fix=fix))


def fold(files: AdapterFiles, paths: Collection[str]) -> PlainAdapter:
    """An adapter that `check_plain` has passed, as plain LoRA.

    Scales are multiplied in float32. Where that is not exact in the dtype of the file, all tensors become float32.

    Args:
        files: The adapter.
        paths: The modules of its base.

    Raises:
        AdapterError: A or B of a module is missing, or of another rank; values are not finite; it names modules that
            the base has under another name.
    """
    settings = patterns.checked_settings(files.config, files.tensors, str(files.path / CONFIG_FILE))
    if renamed := sorted(settings.keys() - set(paths)):
        what = f"names {join_first(renamed, 2)}, which the base calls otherwise, and only PEFT renames them as it loads"
        raise AdapterError(Problem(Code.EXPORT_NOT_PLAIN, what, str(files.path), fix="merge it: loratune merge"))
    stored = read_adapter(files)
    known = {name for path in settings for name in _names(path, stored)}
    if unpaired := sorted(known ^ stored.keys()):
        what = f"{len(unpaired)} A or B are without the other, among them those of {join_first(unpaired, 2)}"
        raise AdapterError(Problem(Code.ADAPTER_TENSORS_MISSING, what, str(files.path)))
    rank = max(int(setting.rank) for setting in settings.values())
    tensors, exact, dtypes = {}, True, {tensor.dtype for tensor in stored.values()}
    for path, setting in settings.items():
        down, up = _names(path, stored)
        scaled = stored[up].float() * setting.scaling
        exact = exact and torch.equal(scaled.to(stored[up].dtype).float(), scaled)
        tensors[down] = nn.functional.pad(stored[down].float(), (0, 0, 0, rank - stored[down].shape[0]))
        tensors[up] = nn.functional.pad(scaled, (0, rank - scaled.shape[1]))
    notes = []
    if exact and len(dtypes) == 1 and dtypes <= _DTYPES:
        tensors = {name: tensor.to(stored[name].dtype) for name, tensor in tensors.items()}
    elif dtypes != {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        reason = "the folded scales are not exact in" if dtypes <= _DTYPES else "clients do not read"
        notes.append(f"stored in float32: {reason} {names}")
    config = {key: files.config.get(key) for key in _KEPT} | {
        "r": rank, "lora_alpha": rank, "target_modules": _targets(tuple(settings), paths), "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
        "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    return PlainAdapter({name: tensor.contiguous() for name, tensor in tensors.items()}, config, tuple(notes))


def check_tensors(files: AdapterFiles, directory: Path) -> float:
    """Compare the change that the written files make to each module with that of the adapter.

    Returns:
        The largest difference of a module's ΔW, as a share of the norm of ΔW.

    Raises:
        AdapterError: It is larger than `CLOSENESS`, or not finite.
    """
    settings = patterns.module_settings(files.config, files.tensors, str(files.path / CONFIG_FILE))
    stored, written = load_file(files.path / WEIGHTS_FILE), load_file(directory / WEIGHTS_FILE)
    largest, where = 0.0, ""
    for path, setting in settings.items():
        down, up = _names(path, stored)
        change = setting.scaling * (stored[up].double() @ stored[down].double())
        norm = float(change.norm())
        other = float((written[up].double() @ written[down].double() - change).norm())
        error = other / norm if norm else other
        if not error <= largest:
            largest, where = error, path
    if not largest <= CLOSENESS:
        what = f"the change of {where} differs by {largest:.1e} of itself from the adapter's"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(files.path)))
    return largest


def check_logits(files: AdapterFiles, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Compare logits of base and adapter with those of the same base and the written files.

    Returns:
        The largest difference, as a share of the largest logit.

    Raises:
        AdapterError: It is larger than `CLOSENESS`, or not finite.
    """
    scale = max(float(logits.abs().max()) for logits in expected)
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        error = float((one - other).abs().max()) / scale
        largest = largest if error <= largest else error
    if not largest <= CLOSENESS:
        what = f"read by PEFT, the logits differ by {largest:.1e} of the largest from the adapter's"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(files.path)))
    return largest


def _names(path: str, tensors: Collection[str]) -> tuple[str, str]:
    """The names of A and B of a module."""
    pairs = ((f"{_PREFIX}{path}{down}", f"{_PREFIX}{path}{up}") for down, up in _LAYER_PARTS)
    return next((down, up) for down, up in pairs if down in tensors)


def _targets(chosen: Sequence[str], paths: Collection[str]) -> list[str]:
    """Names by which PEFT selects exactly these modules."""
    names, rest = endings(chosen, paths)
    return sorted({*names, *rest})
