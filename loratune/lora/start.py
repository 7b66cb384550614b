"""Starting from another adapter: its values as those of a new one, so that both compute the same before the first step.

The scale of B·A may differ, by lora_alpha, r, rsLoRA or patterns: B is multiplied by the old scale over the new one. A
larger rank keeps the fresh values of the added rows of A and columns of B, of which PEFT initializes one to zero and
the other at random: their product is zero, and they can learn. Modules that are adapted for the first time start fresh.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError

from loratune.codes import Code
from loratune.config import AUTO, LoraSection
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.lora import adapter_config
from loratune.lora.adapter_config import adapted_modules, module_settings, parameters_of
from loratune.lora.adapter_files import CONFIG_FILE, AdapterFiles
from loratune.lora.initialize import WRAPPER_PREFIX
from loratune.lora.mixture import effective_keys
from loratune.lora.module_names import ends_in, join_counts, join_first, short, without_wrappers
from loratune.lora.parameters import experts_of, wrapped_parameters
from loratune.lora.tensors import Weights, read_adapter

KEY = "lora.start_from"

_FACTOR = re.compile(
    rf"^{re.escape(WRAPPER_PREFIX)}(?P<path>.*)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?$"
)
_COMPARED = {"use_dora", "bias", "modules_to_save", "trainable_token_indices", "target_parameters"}
"""Keys of an adapter's configuration that may be set, and are compared with those of the run."""


def settings(files: AdapterFiles) -> dict[str, Any]:
    """Rank, lora_alpha and targets of a saved adapter, as far as they are values of these keys in the section `lora`.

    The rank is the highest of its tensors, as those of a run may not be lower; of tensors of several experts, it is the
    one in the configuration. Whatever else is in its configuration is a stranger's, and left out.
    """
    ranks = adapted_modules(files.tensors)
    of_modules = [rank for path, rank in ranks.items() if not parameters_of(files.config, path)]
    of_parameters = [files.config["r"], *(files.config.get("rank_pattern") or {}).values()]
    highest = max(of_modules if len(of_modules) == len(ranks) else [*of_modules, *of_parameters], default=0)
    found = {"r": highest, "lora_alpha": files.config["lora_alpha"], "target_modules": files.config["target_modules"]}
    if isinstance(alpha := found["lora_alpha"], float) and alpha.is_integer():
        found["lora_alpha"] = int(alpha)
    beside = {"target_parameters": files.config.get("target_parameters") or None}  # then there may be no modules
    return {key: value for key, value in found.items() if _is_value({key: value} | beside, value)}


def _is_value(section: dict[str, Any], value: Any) -> bool:
    try:
        LoraSection.model_validate(section)
    except ValidationError:
        return False
    return bool(value != AUTO)


def start_values(
    model: PeftModel, section: LoraSection, files: AdapterFiles, fresh: Mapping[str, torch.Tensor]
) -> Weights:
    """The values with which a fresh adapter computes what a saved one computes.

    Args:
        model: The base with the fresh adapter, which may be on the meta device; then only the fit is checked.
        section: The settings of the fresh adapter.
        files: The saved one.
        fresh: The tensors of the fresh one.

    Returns:
        The tensors of the fresh one with the values of the saved one.

    Raises:
        ConfigError: The settings contradict those of the saved adapter, or would lose a part of it.
        AdapterError: As `adapter_config.checked_settings` and `tensors.read_adapter`; the saved adapter does not fit
            the base, or is of a kind that is not trained further.
    """
    _check_kind(files)
    adapter_config.checked_settings(files.config, files.tensors, str(files.path / CONFIG_FILE))
    problems = [*_setting_problems(section, files), *_parameter_problems(model, files), *_target_problems(fresh, files)]
    if problems := problems or [*_rank_problems(model, files)]:
        raise ConfigError(problems)
    _check_shapes(fresh, files)
    if next(iter(fresh.values())).is_meta:
        return dict(fresh)
    scales, saved, layers = _scales(model, files), read_adapter(files), _layers(model)
    return {
        name: _grown(name, tensor, saved[name], scales, layers) if name in saved else tensor
        for name, tensor in fresh.items()
    }


def _grown(
    name: str, fresh: torch.Tensor, saved: torch.Tensor, scales: Mapping[str, float], layers: Mapping[str, LoraLayer]
) -> torch.Tensor:
    """A fresh tensor with the values of a saved one, whose rank may be lower.

    Args:
        name: Its name.
        fresh: The fresh one.
        saved: The saved one.
        scales: Path → factor of B.
        layers: Path → the adapted layer.
    """
    match = _FACTOR.match(name)
    values = fresh.clone()
    if match and match["kind"].endswith("B"):
        scaled = saved.double() * scales[match["path"]] if scales[match["path"]] != 1 else saved
        values[:, : saved.shape[1]] = scaled.to(fresh)
    elif match and match["kind"].endswith("A"):
        experts = experts_of(layers[match["path"]])  # whose rows follow each other; the columns of B are by rank
        by_expert, old = values.view(experts, -1, fresh.shape[-1]), saved.to(fresh)
        by_expert[:, : len(saved) // experts] = old.reshape(experts, -1, fresh.shape[-1])
    else:
        values.copy_(saved)
    return values


def _scales(model: PeftModel, files: AdapterFiles) -> dict[str, float]:
    """Path → the scale of B·A in the saved adapter over that in the fresh one."""
    layers, where = _layers(model), str(files.path / CONFIG_FILE)
    settings = module_settings(files.config, files.tensors, where, wrapped_parameters(model))
    return {path: setting.scaling / float(layers[path].scaling["default"]) for path, setting in settings.items()}


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Path in the base → the adapted layer."""
    modules = model.named_modules()
    return {name.removeprefix(WRAPPER_PREFIX): layer for name, layer in modules if isinstance(layer, LoraLayer)}


def _check_kind(files: AdapterFiles) -> None:
    """Raises AdapterError: the saved adapter changes its base, or uses what this package does not train."""
    where = str(files.path / CONFIG_FILE)
    problems = [
        Problem(Code.LORA_START, "changes what the adapter computes, and is not trained here", where, key)
        for key in sorted({*effective_keys(files)} - _COMPARED)
    ]
    if files.changes_base:
        what = f"{files.init} changes the base as PEFT loads the adapter, so it is no plain LoRA of its base"
        problems.append(Problem(Code.LORA_START, what, where, "init_lora_weights"))
    if problems:
        raise AdapterError(problems)


def _setting_problems(section: LoraSection, files: AdapterFiles) -> Iterator[Problem]:
    """Settings that have to be those of the saved adapter."""
    old = files.config
    pairs: list[tuple[str, Any, Any]] = [
        ("use_dora", bool(old.get("use_dora")), section.use_dora),
        ("bias", old.get("bias") or "none", section.bias),
        ("modules_to_save", _names(old.get("modules_to_save")), _names(section.modules_to_save)),
        ("trainable_token_indices", old.get("trainable_token_indices"), section.trainable_token_indices),
    ]
    for key, was, now in pairs:
        if key == "modules_to_save" and bool(was) == bool(now):
            continue  # roles and names are compared by the tensors that they lead to
        if was != now:
            old_value, new_value = json.dumps(was), json.dumps(now)
            what = f"the adapter has {key} {old_value} and this run {new_value}, so it would not start as the adapter"
            yield Problem(Code.LORA_START, what, str(files.path), KEY, f"set lora.{key} to {old_value}")


def _names(value: Any) -> list[str]:
    return sorted([value] if isinstance(value, str) else value or [])


def _parameter_problems(model: PeftModel, files: AdapterFiles) -> Iterator[Problem]:
    """Parameters that only one of the two adapts: which tensors are whose follows from all of them together."""
    entries, now = files.config.get("target_parameters") or [], {*wrapped_parameters(model).values()}
    names = (without_wrappers(name) for name, _ in model.get_base_model().named_parameters())
    was = {name for name in names if any(ends_in(name, entry) for entry in entries)}
    if was != now:
        what = f"only one of the adapter and this run adapts {join_counts(sorted(was ^ now), 4)}"
        fix = f"set lora.target_parameters to {json.dumps(sorted(entries) or None)}"
        yield Problem(Code.LORA_START, what, str(files.path), KEY, fix)


def _target_problems(fresh: Mapping[str, torch.Tensor], files: AdapterFiles) -> Iterator[Problem]:
    """What the saved adapter adapts and this run does not, or trains whole and the other does not."""
    where, targets = str(files.path), adapted_modules({name: tuple(tensor.shape) for name, tensor in fresh.items()})
    saved = [path for path in adapted_modules(files.tensors) if not parameters_of(files.config, path)]
    if lost := [path for path in saved if path not in targets]:
        what = f"the adapter also adapts {join_counts([*dict.fromkeys(lost)], 4)}, which this run does not"
        fix = "name them in lora.target_modules, and leave out lora.layers_to_transform if it excludes them"
        yield Problem(Code.LORA_START, what, where, KEY, fix)
    old, new = ({name for name in names if not _FACTOR.match(name)} for names in (files.tensors, fresh))
    new -= {name for name in new if name.endswith("bias")}  # those of modules that are adapted for the first time
    if other := sorted((old - {*fresh}) | (new - old)):
        what = f"one of the adapter and this run trains {join_first([short(_plain(name)) for name in other], 3)} whole"
        fix = "set lora.modules_to_save, lora.bias and lora.trainable_token_indices as they were"
        yield Problem(Code.LORA_START, what, where, KEY, fix)


def _plain(name: str) -> str:
    return name.removeprefix(WRAPPER_PREFIX)


def _rank_problems(model: PeftModel, files: AdapterFiles) -> Iterator[Problem]:
    """Modules whose rank would become smaller."""
    layers = _layers(model)
    saved = adapted_modules(files.tensors)
    ranks = {path: (rank // experts_of(layers[path]), int(layers[path].r["default"])) for path, rank in saved.items()}
    if lower := [path for path, (old, new) in ranks.items() if new < old]:
        old, new = ranks[lower[0]]
        most = max(ranks[path][0] for path in lower)
        what = f"the adapter has rank {old}, and this run {new}, on {join_counts(lower, 4)}: a part of it would be lost"
        yield Problem(Code.LORA_START, what, str(files.path), KEY, f"raise lora.r, or its rank_pattern, to {most}")


def _check_shapes(fresh: Mapping[str, torch.Tensor], files: AdapterFiles) -> None:
    """Raises AdapterError: tensors are missing, or have another shape than this base needs, ranks left aside."""
    adapted = adapted_modules(files.tensors)
    missing, differing = [], []
    for name, tensor in fresh.items():
        match = _FACTOR.match(name)
        if name not in files.tensors:
            missing += [name] if match and match["path"] in adapted else []
            continue
        old, new = list(files.tensors[name]), list(tensor.shape)
        if match and match["kind"].endswith(("A", "B")) and len(old) == len(new) == 2:
            side = 0 if match["kind"].endswith("A") else 1
            if old[side] != adapted[match["path"]]:
                missing.append(name)
            old[side] = new[side]
        if old != new:
            differing.append(f"{name} {tuple(old)} where the base needs {tuple(new)}")
    fix = f"is {files.base} the base it was trained on?"
    code, where = Code.ADAPTER_MISMATCH, str(files.path)
    if problems := [
        Problem(code, f"{len(names)} tensors {kind}, among them {join_first(names, 3)}", where, KEY, fix)
        for kind, names in (("are missing", missing), ("have another shape", differing))
        if names
    ]:
        raise AdapterError(problems)
