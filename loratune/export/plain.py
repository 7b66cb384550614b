"""Plain LoRA directories for other programs: what they can hold, and whether the written files hold the adapter.

Older releases of vLLM, and llama.cpp, ignore `rank_pattern`, `alpha_pattern` and `use_rslora` without a warning.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loratune.codes import Code
from loratune.config import patterns
from loratune.errors import AdapterError, Problem
from loratune.export.clients import CLIENTS
from loratune.lora import mixture
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
    if len(dtypes) == 1 and dtypes <= _DTYPES:
        (dtype,) = dtypes
        tensors = {name: tensor.to(dtype) for name, tensor in plain.tensors.items()}
        if all(torch.equal(tensor.float(), plain.tensors[name]) for name, tensor in tensors.items()):
            return replace(plain, tensors=tensors)
    named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    reason = "the folded scales are not exact in" if dtypes <= _DTYPES else "clients do not read"
    return plain if dtypes == {torch.float32} else replace(plain, notes=(f"stored in float32: {reason} {named}",))


def check_tensors(files: AdapterFiles, directory: Path) -> float:
    """Compare the change that the written files make to each module with that of the adapter.

    Returns:
        The largest difference of a module's ΔW, as a share of the norm of ΔW.

    Raises:
        AdapterError: It is larger than `CLOSENESS`, or not finite.
    """
    settings = patterns.module_settings(files.config, files.tensors, str(files.path / CONFIG_FILE))
    stored, written = read_adapter(files), read_weights(directory / WEIGHTS_FILE)
    names = mixture.factors(stored)
    errors = {}
    for path, setting in settings.items():
        down, up = names[path]["A"], names[path]["B"]
        change = setting.scaling * (stored[up].double() @ stored[down].double())
        difference = float((written[up].double() @ written[down].double() - change).norm())
        errors[path] = difference / (float(change.norm()) or 1.0)
    return _checked(errors, "the change of {} differs by {:.1e} of itself from the adapter's", files)


def check_logits(files: AdapterFiles, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Compare logits of base and adapter with those of the same base and the written files.

    Returns:
        The largest difference, as a share of the largest logit.

    Raises:
        AdapterError: It is larger than `CLOSENESS`, or not finite.
    """
    scale = max(float(logits.abs().max()) for logits in expected)
    pairs = enumerate(zip(expected, found, strict=True))
    errors = {f"text {number}": float((one - other).abs().max()) / scale for number, (one, other) in pairs}
    return _checked(errors, "read by PEFT, the logits of {} differ by {:.1e} of the largest from the adapter's", files)


def _checked(errors: dict[str, float], message: str, files: AdapterFiles) -> float:
    """The largest error. Raises AdapterError: it is larger than `CLOSENESS`, or not finite."""
    where = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN first
    if not errors[where] <= CLOSENESS:
        what = message.format(where, errors[where])
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(files.path)))
    return errors[where]
