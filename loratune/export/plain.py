"""Plain LoRA directories for other programs: what they can hold, and whether the written files hold the adapter.

Older releases of vLLM, and llama.cpp, ignore `rank_pattern`, `alpha_pattern` and `use_rslora` without a warning.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.events import progress
from loratune.export.clients import CLIENTS
from loratune.export.comparison import logits
from loratune.lora import adapter_config, mixture
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.mixture import PlainAdapter
from loratune.lora.module_names import endings, join_first
from loratune.lora.tensors import read_adapter, read_weights

CLOSENESS = 1e-5
"""The largest difference from the adapter, of logits to the largest logit, and of a module's change to itself."""
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
"""The dtypes that all programs read."""


def check_plain(files: AdapterFiles, client: str) -> None:
    """Check that plain LoRA can hold an adapter. No weights are read.

    Args:
        files: The adapter.
        client: A key of `CLIENTS`.

    Raises:
        AdapterError: It holds more than A and B of layers, or PEFT changes the base as it loads it.
    """
    reasons = dict.fromkeys(mixture.obstacles(files).values())
    if client != "peft" and any(".lora_embedding_" in name for name in files.tensors):
        reasons[f"it adapts embeddings, and {CLIENTS[client]} reads that for few models only"] = None
    if reasons:
        fix = "`loratune merge` makes a model of it" + (", and PEFT reads the adapter itself" * (client == "peft"))
        what = f"cannot be plain LoRA for {CLIENTS[client]}: {'; '.join(reasons)}"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, str(files.path), fix=fix))


def fold(files: AdapterFiles, paths: Collection[str]) -> PlainAdapter:
    """One adapter as plain LoRA, in the dtype of its file where that holds the scaled values exactly.

    Args:
        files: The adapter.
        paths: The modules of its base.

    Raises:
        AdapterError: See `weighted_sum`; the adapter names modules that the base has under another name.
    """
    plain = mixture.weighted_sum([(files, 1.0)])
    chosen = plain.config["target_modules"]
    if renamed := sorted(set(chosen) - set(paths)):
        what = f"names {join_first(renamed, 2)}, which the base calls otherwise, and only PEFT renames them as it loads"
        fix = "merge it: loratune merge"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, str(files.path), fix=fix))
    names, rest = endings(chosen, paths)
    plain = replace(plain, config={**plain.config, "target_modules": sorted({*names, *rest})})
    dtypes = {tensor.dtype for tensor in read_adapter(files).values()}
    if dtypes == {torch.float32}:
        return plain
    if len(dtypes) == 1 and dtypes <= _DTYPES:
        (dtype,) = dtypes
        tensors = {name: tensor.to(dtype) for name, tensor in plain.tensors.items()}
        if all(torch.equal(tensor.float(), plain.tensors[name]) for name, tensor in tensors.items()):
            return replace(plain, tensors=tensors)
    named = ", ".join(sorted(str(one).removeprefix("torch.") for one in dtypes))
    note = f"stored in float32, as {named} does not hold the folded scales exactly, or is not read everywhere"
    return replace(plain, notes=(note,))


def check_tensors(files: AdapterFiles, directory: Path) -> float:
    """Compare the change that the written files make to each module with that of the adapter.

    Returns:
        The largest difference of a module's ΔW, as a share of the norm of ΔW.

    Raises:
        AdapterError: It is larger than `CLOSENESS`, or not finite.
    """
    settings = adapter_config.module_settings(files.config, files.tensors, str(files.path / CONFIG_FILE))
    stored, written = read_adapter(files), read_weights(directory / WEIGHTS_FILE)
    names = mixture.factors(stored)
    errors = {}
    for path, setting in settings.items():
        down, up = names[path]["A"], names[path]["B"]
        change = setting.scaling * (stored[up].double() @ stored[down].double())
        difference = float((written[up].double() @ written[down].double() - change).norm())
        errors[path] = difference / (float(change.norm()) or 1.0)
    return _largest(errors, "the change of {} differs by {:.1e} of itself from the adapter's", files)


@progress("comparing logits in PEFT")
def check_logits(files: AdapterFiles, model: Any, directory: Path, texts: Sequence[Sequence[int]]) -> float:
    """Compare the logits of an adapter with those of the written files, which PEFT loads onto the same base.

    Args:
        files: The adapter.
        model: The base with the adapter, as PEFT's `PeftModel`. It has the written one too afterwards.
        directory: The written files.
        texts: The token ids of each text, of which the first 256 are compared.

    Returns:
        The largest difference, as a share of the largest logit.

    Raises:
        AdapterError: It is larger than `CLOSENESS`, or not finite.
    """
    own, scale, errors = model.active_adapter, 0.0, {}
    model.load_adapter(str(directory), "exported")
    for number, ids in enumerate(filter(None, texts), 1):
        model.set_adapter(own)
        expected = logits(model, ids[:256])
        model.set_adapter("exported")
        errors[f"text {number}"] = float((expected - logits(model, ids[:256])).abs().max())
        scale = max(scale, float(expected.abs().max()))
    shares = {name: error / scale for name, error in errors.items()}
    return _largest(shares, "read by PEFT, the logits of {} differ by {:.1e} of the largest from the adapter's", files)


def _largest(errors: Mapping[str, float], message: str, files: AdapterFiles) -> float:
    """The largest error. Raises AdapterError: it is larger than `CLOSENESS`, or not finite."""
    name = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    if not errors[name] <= CLOSENESS:
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, message.format(name, errors[name]), str(files.path)))
    return errors[name]
