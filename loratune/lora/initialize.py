"""How an adapter is initialized: from the base (PiSSA, OLoRA), from the data (EVA), from the quantization error of 4
bits (LoftQ), or from another adapter.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) move a part of the base into
the adapter; on saving, this is undone. With W = R + s·B0·A0 at the start, the trained weight R + s·B·A equals
W + s·[B, -B0]·[A; A0], so the file holds a plain LoRA of rank 2r that fits the unchanged base.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from itertools import count
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.codes import Code
from loratune.config import AUTO, LoraSection
from loratune.errors import AdapterError, ConfigError, DataError, ModelError, Problem
from loratune.lora import upstream
from loratune.lora.adapter_config import FACTOR, ranks_of
from loratune.lora.adapter_files import AdapterFiles
from loratune.lora.module_names import WRAPPER_PREFIX, ends_in, join_counts, join_first, without_wrappers
from loratune.lora.parameters import experts_of, lora_layers, wrapped_parameters
from loratune.lora.tensors import Weights, effective_keys, read_adapter

KEY = "lora.init_lora_weights"

_MOST_FORWARDS = 1000
"""`get_eva_state_dict` repeats its batches until the directions converge, without a limit."""


def becomes_plain_lora(section: LoraSection) -> bool:
    """Whether this initialization subtracts a part from the base; the adapter is then saved as plain LoRA."""
    return str(section.init_lora_weights).startswith(("pissa", "olora"))


def check_layers(base: nn.Module, section: LoraSection, endings: tuple[str, ...]) -> None:
    """Check that the initialization and LoRA-FA support the kind and the weights of the targets.

    Args:
        base: The base model.
        section: The settings of LoRA.
        endings: Endings of the targets' paths.

    Raises:
        ModelError: They do not.
    """
    init, problems = section.init_lora_weights, {}
    reads_base = becomes_plain_lora(section) or init == "orthogonal"
    owners = Counter(id(weight) for _, module in base.named_modules() for weight in module.parameters(recurse=False))
    for path, layer in base.named_modules():
        if not f".{path}".endswith(endings):
            continue
        kind = type(layer).__name__
        if reads_base and not (isinstance(layer, nn.Linear | Conv1D) and layer.weight.is_floating_point()):
            what = f"{init} starts from the weights of linear layers that are not quantized; {path} is a {kind}"
            problems[KEY] = what
        elif becomes_plain_lora(section) and owners[id(layer.weight)] > 1:
            what = f"{init} changes the weights it starts from, and {path} shares its weight with other modules"
            problems[KEY] = what
        elif init == "olora" and isinstance(layer, Conv1D):
            what = f"PEFT's olora does not support the transposed weights of a Conv1D such as {path}"
            problems[KEY] = what
        elif section.use_lorafa and isinstance(layer, nn.Embedding):
            what = f"LoRA-FA adapts linear layers; {path} is an {kind}"
            problems["lora.use_lorafa"] = what
    if problems:
        fix = "use another initialization, or other targets"
        raise ModelError([Problem(Code.LORA_UNSUPPORTED, what, key=key, fix=fix) for key, what in problems.items()])


def check_ranks(model: PeftModel, section: LoraSection) -> None:
    """Check that no rank exceeds the smaller dimension of its layer, if the initialization needs that.

    Raises:
        ModelError: A layer is too small.
    """
    if section.init_lora_weights in (True, "gaussian"):
        return
    for path, layer in lora_layers(model):
        rank, most = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > most:
            what = f"{section.init_lora_weights} needs {rank} directions of each layer, and {path} has only {most}"
            raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix=f"lower lora.r to {most}"))


def eva(model: PeftModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Set every A to the principal directions of its layer's inputs at the supervised tokens, in place.

    Ranks do not change (rho = 1). Paischer et al. 2024, arXiv:2410.07170. PEFT's `initialize_lora_eva_weights` would
    also write whole paths into the configuration, and draw layers anew that EVA does not support.

    Args:
        model: The model with the fresh adapter.
        batches: Collated training rows. Those with more than r supervised tokens are used.

    Raises:
        DataError: No batch has enough supervised tokens.
        ModelError: The directions do not converge.
    """
    config: LoraConfig = copy(model.peft_config["default"])
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    supervised = [int((batch["labels"] != -100).sum()) for batch in batches]
    large = [batch for batch, tokens in zip(batches, supervised, strict=True) if tokens > config.r]
    if not large:
        what = f"eva needs a batch with more supervised tokens than r = {config.r}; the first batches have at most "
        what += f"{max(supervised)}"
        fix = "raise training.per_device_train_batch_size, or lower lora.r"
        raise DataError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix=fix))
    forwards, inner = count(1), model.get_base_model()
    was_training = inner.training

    def forward(wrapped: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        if next(forwards) > _MOST_FORWARDS:
            what = f"eva's directions did not settle in {_MOST_FORWARDS} batches"
            fix = "lower lora.r, or use another initialization"
            raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY, fix=fix))
        wrapped(**{name: tensor for name, tensor in inputs.items() if name != "labels"}, use_cache=False)

    with torch.no_grad():
        options = {"show_progress_bar": False, "gather_distributed_inputs": False}  # each process has all batches
        directions = get_eva_state_dict(model, large, peft_config=config, forward_fn=forward, **options)
        for name, values in directions.items():
            model.get_submodule(name).lora_A["default"].weight.copy_(values)
    inner.train(was_training)  # PEFT has set it to the mode of the wrapper


def loftq(model: PeftModel, original: Callable[[str], torch.Tensor]) -> None:
    """Set A and B to the best rank-r approximation of the 4-bit quantization error of each weight, in place.

    One step of Li et al. 2023, arXiv:2310.08659, as in `peft.replace_lora_weights_loftq`, which needs a GPU and ignores
    the scaling.

    Args:
        model: The model with the fresh adapter.
        original: Path of a linear layer in the base → its weight before quantization, (out, in).

    Raises:
        ModelError: A target is not a 4-bit layer.
    """
    for path, layer in lora_layers(model):
        if not isinstance(layer, upstream.Linear4bit):
            kind = type(layer.get_base_layer()).__name__
            what = f"loftq starts from 4-bit layers; {path} is a {kind}"
            raise ModelError(Problem(Code.LORA_UNSUPPORTED, what, key=KEY))
        quantized = upstream.dequantize_module_weight(layer.get_base_layer()).float()
        error = original(path).to(quantized) - quantized
        rank, scale = layer.r["default"], layer.scaling["default"]
        u, singular, v = torch.svd_lowrank(error, q=min(rank + 8, *error.shape), niter=8)
        root = (singular[:rank] / scale).sqrt()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * v.T[:rank])
            layer.lora_B["default"].weight.copy_(u[:, :rank] * root)


# --- Starting from another adapter
#
# The scale of B·A may differ, by lora_alpha, r, rsLoRA or patterns: B is multiplied by the old scale over the new one.
# If the rank grows, the added rows of A and columns of B keep their fresh values: PEFT initializes one of them to zero
# and the other at random, so their product is zero and can be trained. Newly adapted modules start fresh.

START_KEY = "lora.start_from"

_COMPARED = {"use_dora", "bias", "modules_to_save", "trainable_token_indices", "target_parameters"}
"""Keys of an adapter's configuration that may be set, and are compared with those of the run."""


def start_settings(files: AdapterFiles) -> dict[str, Any]:
    """Rank, lora_alpha and targets of a saved adapter, if they are valid for the section `lora`.

    The rank is the highest rank of its tensors, as ranks of a run may not be lower; for tensors of several experts, it
    is the rank in the configuration. Other keys of the configuration are untrusted and ignored.
    """
    ranks = [rank for path, rank in files.ranks.items() if not files.parameters_of(path)]
    if len(ranks) < len(files.ranks):
        ranks += [files.config["r"], *(files.config.get("rank_pattern") or {}).values()]
    highest = max(ranks, default=0)
    found = {"r": highest, "lora_alpha": files.config["lora_alpha"], "target_modules": files.config["target_modules"]}
    if isinstance(alpha := found["lora_alpha"], float) and alpha.is_integer():
        found["lora_alpha"] = int(alpha)
    others = {"target_parameters": files.config.get("target_parameters") or None}  # then there may be no modules
    return {key: value for key, value in found.items() if _is_value({key: value} | others, value)}


def _is_value(section: dict[str, Any], value: Any) -> bool:
    try:
        LoraSection.model_validate(section)
    except ValidationError:
        return False
    return bool(value != AUTO)


def start_values(
    model: PeftModel, section: LoraSection, files: AdapterFiles, fresh: Mapping[str, torch.Tensor]
) -> Weights:
    """The values with which a fresh adapter is equivalent to a saved one.

    Args:
        model: The base with the fresh adapter. On the meta device, only compatibility is checked.
        section: The settings of the fresh adapter.
        files: The saved adapter.
        fresh: The tensors of the fresh adapter.

    Returns:
        The tensors of the fresh adapter with the values of the saved one.

    Raises:
        ConfigError: The settings contradict those of the saved adapter, or would lose a part of it.
        AdapterError: As `adapter_config.checked_settings` and `tensors.read_adapter`; the saved adapter does not fit
            the base, or is of a kind that is not trained further.
    """
    unknown = {key: "is not trained here" for key in {*effective_keys(files)} - _COMPARED}
    unknown |= {"init_lora_weights": f"{files.init} changes the base itself"} if files.changes_base else {}
    if unknown:
        raise AdapterError([Problem(Code.LORA_START, what, files.where, key) for key, what in sorted(unknown.items())])
    files.checked_settings()
    layers = dict(lora_layers(model))
    if problems := [*_contradictions(model, section, files, fresh)] or [*_lost_ranks(layers, files)]:
        raise ConfigError(problems)
    _check_shapes(fresh, files)
    if next(iter(fresh.values())).is_meta:
        return dict(fresh)
    settings = files.settings(wrapped_parameters(model))
    scales = {path: old.scaling / float(layers[path].scaling["default"]) for path, old in settings.items()}
    saved = read_adapter(files)
    return {
        name: _grown(name, tensor, saved[name], scales, layers) if name in saved else tensor
        for name, tensor in fresh.items()
    }


def _grown(
    name: str, fresh: torch.Tensor, saved: torch.Tensor, scales: Mapping[str, float], layers: Mapping[str, LoraLayer]
) -> torch.Tensor:
    """A fresh tensor with the values of a saved one, whose rank may be lower.

    Args:
        name: The name of the tensor.
        fresh: The fresh tensor.
        saved: The saved tensor.
        scales: Path → factor of B.
        layers: Path → the adapted layer.
    """
    match = FACTOR.match(name)
    values = fresh.clone()
    if match and match["kind"] == "B":
        scaled = saved.double() * scales[match["path"]] if scales[match["path"]] != 1 else saved
        values[:, : saved.shape[1]] = scaled.to(fresh)
    elif match and match["kind"] == "A":
        experts = experts_of(layers[match["path"]])  # whose rows follow each other; the columns of B are by rank
        by_expert, old = values.view(experts, -1, fresh.shape[-1]), saved.to(fresh)
        by_expert[:, : len(saved) // experts] = old.reshape(experts, -1, fresh.shape[-1])
    else:
        values.copy_(saved)
    return values


def _contradictions(
    model: PeftModel, section: LoraSection, files: AdapterFiles, fresh: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    """Settings that must equal those of the saved adapter, and modules that only one of the two trains."""
    old, where = files.config, str(files.path)
    was = {"use_dora": bool(old.get("use_dora")), "bias": old.get("bias") or "none"}
    was |= {"trainable_token_indices": old.get("trainable_token_indices")}
    now = section.model_dump(include={*was})
    changed = [key for key in was if was[key] != now[key]]
    for key in changed:
        value = json.dumps(was[key])
        what = (
            f"the adapter has {key} {value} and this run {json.dumps(now[key])}, so it would not start as the adapter"
        )
        yield Problem(Code.LORA_START, what, where, START_KEY, f"set lora.{key} to {value}")
    # The assignment of tensors to stacked parameters depends on all adapted parameters of their module.
    entries, stacked = old.get("target_parameters") or [], {*wrapped_parameters(model).values()}
    names = (without_wrappers(name) for name, _ in model.get_base_model().named_parameters())
    only = stacked ^ {name for name in names if any(ends_in(name, entry) for entry in entries)}
    targets = ranks_of({name: tuple(tensor.shape) for name, tensor in fresh.items()})
    only |= {path for path in files.ranks if not files.parameters_of(path) and path not in targets}
    if not changed:
        new = {name for name in fresh if not FACTOR.match(name) and not name.endswith("bias")}
        only |= new - {*files.tensors}  # biases are also those of modules that are adapted for the first time
        only |= {name for name in files.tensors if not FACTOR.match(name) and name not in fresh}
    if only:
        shown = join_counts(sorted(name.removeprefix(WRAPPER_PREFIX) for name in only), 4)
        what = f"only one of the adapter and this run trains {shown}"
        fix = (
            "set lora.target_modules to auto, which takes the adapter's, and target_parameters, layers_to_transform "
            "and modules_to_save as they were"
        )
        yield Problem(Code.LORA_START, what, where, START_KEY, fix)


def _lost_ranks(layers: Mapping[str, LoraLayer], files: AdapterFiles) -> Iterator[Problem]:
    """Problems for modules whose rank would decrease."""
    ranks = {
        path: (rank // experts_of(layers[path]), int(layers[path].r["default"])) for path, rank in files.ranks.items()
    }
    if lower := [path for path, (old, new) in ranks.items() if new < old]:
        what = (
            f"a part of the adapter would be lost on {join_counts(lower, 4)}: its rank is higher than that of this run"
        )
        fix = f"raise lora.r, or its rank_pattern, to {max(ranks[path][0] for path in lower)}"
        yield Problem(Code.LORA_START, what, str(files.path), START_KEY, fix)


def _check_shapes(fresh: Mapping[str, torch.Tensor], files: AdapterFiles) -> None:
    """Raises AdapterError: tensors are missing, or have another shape than this base needs, apart from the rank."""
    ranks, wrong = files.ranks, []
    for name, tensor in fresh.items():
        match, shape = FACTOR.match(name), list(tensor.shape)
        if name not in files.tensors and not (match and match["path"] in ranks):
            continue  # of a module that is adapted for the first time
        if match and match["kind"] in "AB":
            shape[0 if match["kind"] == "A" else 1] = ranks[match["path"]]
        if shape != [*files.tensors.get(name, ())]:
            wrong.append(f"{name}, where the base needs {tuple(shape)}")
    if wrong:
        what = f"{len(wrong)} tensors are missing or have another shape, among them {join_first(wrong, 3)}"
        fix = f"is {files.base} the base it was trained on?"
        raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path), START_KEY, fix))
