"""Merges saved adapters: each into the parameters of its base, and several into one that is their weighted sum.

Into a base: in float32, one parameter or block at a time. The adapter is attached to the base on the meta device, so
PEFT determines which parameters it changes and by which factor, whatever the size of the base. Plain LoRA and DoRA on
linear layers are computed by their formulas on blocks of rows; every other case by PEFT's own `merge` of the layer, on
its whole weight.

Into one adapter: as plain LoRA, i.e. only A and B of single layers, without scales. Scales and weights are multiplied
into B, and all modules have the same rank, padded with zeros. With weights w, the sum of w·s·B·A is one product of
stacked matrices, so the result is exact. Programs that read only `r` and `lora_alpha` can read this form.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.lora import adapter_files, attach, tensors, upstream
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.module_names import WRAPPER_PREFIX, join_first
from loratune.lora.tensors import FROM_FIRST, PARAMETERS, Weights, not_finite, obstacles, read_adapter

ADAPTER = "default"
_WRAPPERS = (".base_layer", ".original_module")


@dataclass(frozen=True)
class Change:
    """The change that an adapter makes to one parameter.

    Attributes:
        apply: Function of the parameter in float32, or a block of its rows, and the index of the first row. Returns
            the changed values, which may share memory with the input.
        key: Equal for changes with the same effect on the same parameter.
        is_whole: Whether `apply` needs all rows at once.
    """

    apply: Callable[[Tensor, int], Tensor]
    key: object
    is_whole: bool = False


def _replacement(values: Tensor) -> Change:
    """A trained copy replaces the parameter: `modules_to_save`, biases."""

    def apply(weight: Tensor, start: int) -> Tensor:
        return (values[start : start + len(weight)] if weight.dim() else values).float()

    return Change(apply, (values.data_ptr(), values.shape))


def _token_rows(indices: Sequence[int], values: Tensor) -> Change:
    """Some rows of an embedding are replaced."""

    def apply(weight: Tensor, start: int) -> Tensor:
        inside = [place for place, token in enumerate(indices) if start <= token < start + len(weight)]
        rows = torch.tensor([indices[place] - start for place in inside], dtype=torch.int64)
        changed: Tensor = weight.index_copy(0, rows, values[inside].float())
        return changed

    return Change(apply, (tuple(indices), values.data_ptr()))


def _low_rank(left: Tensor, right: Tensor, scaling: float, magnitude: Tensor | None = None) -> Change:
    """LoRA, or DoRA, on a weight.

    Args:
        left: The factor whose rows correspond to rows of the stored weight: B, or A transposed if the weight is.
        right: The other factor.
        scaling: The factor of their product.
        magnitude: DoRA's norms of the rows; None for LoRA.
    """

    def apply(weight: Tensor, start: int) -> Tensor:
        rows = slice(start, start + len(weight))
        changed = torch.addmm(weight, left[rows].float(), right.float(), alpha=scaling)
        if magnitude is None:
            return changed
        factors: Tensor = magnitude[rows].float() / torch.linalg.norm(changed, dim=1)
        return changed * factors[:, None]

    return Change(apply, (left.data_ptr(), right.data_ptr(), left.shape, scaling))


def _experts(layer: ParamWrapper) -> Change:
    """LoRA on a parameter that holds the weights of several experts; a row is an expert."""
    a, b = layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data
    up, down = b.reshape(len(b), -1, layer.num_experts), a.reshape(layer.num_experts, -1, a.shape[-1])
    # As PEFT decides it: (experts, outputs, inputs), or (experts, inputs, outputs).
    is_transposed = getattr(layer.get_base_layer(), "is_transposed", False)
    equation = "ore,eri->eio" if is_transposed else "ore,eri->eoi"

    def apply(weight: Tensor, start: int) -> Tensor:
        rows = slice(start, start + len(weight))
        changed: Tensor = weight + torch.einsum(equation, up[:, :, rows], down[rows]) * layer.scaling[ADAPTER]
        return changed

    return Change(apply, id(layer))


def _whole_layer(layer: Any, init: str) -> Change:
    """PEFT's own `merge` of a layer, whose base is on the meta device.

    Args:
        layer: The layer.
        init: The initialization of the adapter, if PEFT subtracts a part from the base again; otherwise empty.
    """

    def apply(weight: Tensor, _: int) -> Tensor:
        base = layer.get_base_layer()
        placeholder = base.weight
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        try:
            if init:
                trained = {name: value.clone() for name, value in layer.state_dict().items() if "lora_" in name}
                layer.olora_init(ADAPTER) if init == "olora" else layer.pissa_init(ADAPTER, init)
                layer.load_state_dict(trained, strict=False)
            layer.merge(adapter_names=[ADAPTER])
            merged: Tensor = base.weight.data
            return merged
        finally:
            layer.merged_adapters.clear()
            base.weight = placeholder

    return Change(apply, id(layer), is_whole=True)


@torch.no_grad()
def changes(base: nn.Module, files: AdapterFiles) -> dict[str, tuple[Change, ...]]:
    """Parameter of a base that an adapter changes → the changes, in order.

    Args:
        base: The base on the meta device, which PEFT modifies.
        files: The adapter.

    Raises:
        AdapterError: As `attach.load`; the adapter is of a variant that cannot be merged.
    """
    if files.config.get("layer_replication"):
        raise _unsupported(files, "layer_replication repeats layers of the base")
    model = _attach(base, files)
    inner = model.get_base_model()
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.float()
    found: dict[str, list[Change]] = {}
    for name, parameter in _base_parameters(inner):
        if not parameter.is_meta:
            found.setdefault(name, []).append(_replacement(parameter.data))
    for path, module in inner.named_modules():
        for name, change in _module_changes(_plain(path), module, files):
            found.setdefault(name, []).append(change)
    return {name: tuple(made) for name, made in found.items()}


def _attach(base: nn.Module, files: AdapterFiles) -> Any:
    """The base on the meta device with the adapter's tensors, which are in memory."""
    model, renamed = attach.attach_saved(base, files), {}

    def keep(_: nn.Module, state: dict[str, Tensor], *__: Any) -> None:
        renamed.update(state)

    hook = model.register_load_state_dict_pre_hook(keep)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op.*")
        tensors.fill(model, files)  # PEFT renames the tensors, and copies them to the device of the base: nowhere
    hook.remove()
    model.load_state_dict(renamed, strict=False, assign=True)
    return model


def _unsupported(files: AdapterFiles, reason: str) -> AdapterError:
    what = f"cannot be merged: {reason}"
    return AdapterError(Problem(Code.ADAPTER_UNSUPPORTED, what, str(files.path), fix="use the adapter with PEFT"))


def _plain(path: str) -> str:
    """The path of a module in the base, without PEFT's wrappers."""
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper, "")
    return path


def _base_parameters(inner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base itself, with their names without PEFT's wrappers."""
    for path, module in inner.named_modules():
        if any(part.startswith("lora_") or part in ("modules_to_save", "token_adapter") for part in path.split(".")):
            continue
        if not isinstance(module, LoraLayer | AuxiliaryTrainingWrapper | TrainableTokensLayer):
            for name, parameter in module.named_parameters(recurse=False):
                yield _plain(f"{path}.{name}"), parameter


def _module_changes(path: str, module: nn.Module, files: AdapterFiles) -> Iterator[tuple[str, Change]]:
    """The changes that a PEFT module makes to parameters of the base."""
    if isinstance(module, ModulesToSaveWrapper):
        saved = module.modules_to_save[ADAPTER]
        for name, tensor in (*saved.named_parameters(), *saved.named_buffers()):
            yield f"{path}.{name}", _replacement(tensor.data)
    elif isinstance(module, TrainableTokensLayer):
        values = module.trainable_tokens_delta[ADAPTER].data
        yield f"{path.removesuffix('.token_adapter')}.weight", _token_rows(module.token_indices[ADAPTER], values)
    elif isinstance(module, ParamWrapper):
        a, b = module.lora_A[ADAPTER].weight.data, module.lora_B[ADAPTER].weight.data
        is_stacked = module.get_param().dim() == 3
        change = _experts(module) if is_stacked else _low_rank(b, a, module.scaling[ADAPTER])
        yield f"{path}.{module.parameter_name}", change
    elif isinstance(module, LoraLayer):
        yield from _layer_changes(path, module, files)


def _layer_changes(path: str, layer: Any, files: AdapterFiles) -> Iterator[tuple[str, Change]]:
    """The changes that LoRA on a linear layer or an embedding makes to its weight and bias."""
    variant = layer.lora_variant.get(ADAPTER)
    if type(layer) not in (Linear, Embedding):
        raise _unsupported(files, f"{path} is a {type(layer).__name__}, and only linear layers and embeddings can be")
    if variant is not None and not isinstance(variant, DoraLinearVariant | DoraEmbeddingVariant):
        raise _unsupported(files, f"{path} has a variant of LoRA that is not a change of its weight")
    if layer.lora_bias[ADAPTER]:
        if layer.get_base_layer().bias is None:
            raise _unsupported(files, f"the adapter has a bias for {path}, and the base has none there")
        bias = layer.lora_B[ADAPTER].bias.data * layer.scaling[ADAPTER]
        yield f"{path}.bias", Change(lambda weight, start: weight + bias[start : start + len(weight)], bias.data_ptr())
        layer.lora_bias[ADAPTER] = False  # or PEFT's `merge` of the layer would add it as well
    yield f"{path}.weight", _weight_change(layer, variant, files.init if files.changes_base else "")


def _weight_change(layer: Any, variant: Any, init: str) -> Change:
    is_embedding = isinstance(layer, Embedding)
    is_transposed = is_embedding or layer.fan_in_fan_out
    if init or (variant is not None and is_transposed):
        return _whole_layer(layer, init)
    if is_embedding:
        a, b = layer.lora_embedding_A[ADAPTER].data, layer.lora_embedding_B[ADAPTER].data
    else:
        a, b = layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data
    left, right = (a.T, b.T) if is_transposed else (b, a)
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight.data if variant is not None else None
    return _low_rank(left, right, layer.scaling[ADAPTER], magnitude)


@torch.no_grad()
def dense(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a loaded base on the CPU; a quantized weight in its dequantized form."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    tensor: Any = getattr(module, attribute, None)
    if attribute == "weight" and type(tensor).__name__ in ("Params4bit", "Int8Params"):
        tensor = upstream.dequantize_module_weight(module)
    elif attribute == "weight" and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
        # GPTQ, AWQ and the like: what the layer computes for each unit vector is a column of its weight.
        layer: Any = module
        device = next(value.device for value in (*module.parameters(), *module.buffers()))
        columns = layer(torch.eye(layer.in_features, device=device, dtype=torch.float16)).float()
        bias = getattr(layer, "bias", None)
        tensor = (columns - bias.float() if bias is not None else columns).T
    values: Tensor = tensor.detach().cpu()
    return values


# --- Several adapters as one


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

    @property
    def modules(self) -> list[str]:
        """The adapted modules."""
        return sorted({name.removeprefix(WRAPPER_PREFIX).rpartition(".lora_")[0] for name in self.tensors})

    def write(self, directory: Path) -> AdapterFiles:
        """Write the two files that PEFT reads to an existing directory, and open it."""
        (directory / CONFIG_FILE).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(self.tensors, directory / WEIGHTS_FILE, {"format": "pt"})
        return adapter_files.inspect(directory)


_Factors = tuple[tuple[str, str], Tensor, Tensor]
"""The names of A and B of one module in the adapter file; A; B with all scales multiplied into it; both in float32."""


def weighted_sum(
    weighted: Sequence[tuple[AdapterFiles, float]], parameters: Mapping[str, str] | None = None
) -> PlainAdapter:
    """The weighted sum of adapters of one base, in float32. The rank is the sum of the ranks.

    That they belong to the same base is only checked by the shapes of their tensors.

    Args:
        weighted: The adapters with their weights.
        parameters: Path of A and B → the parameter that they adapt. Without it, adapters of parameters are refused.

    Raises:
        AdapterError: An adapter is not plain LoRA, see `obstacles`; adapters have different shapes for one module; A or
            B is missing or has another rank; the sum is not finite.
    """
    if problems := [
        Problem(Code.ADAPTER_UNSUPPORTED, f"cannot be mixed: {reason}", files.where, key)
        for files, _ in weighted
        for key, reason in obstacles(files).items()
        if key != PARAMETERS or parameters is None
    ]:
        raise AdapterError(problems)
    added: dict[str, list[_Factors]] = {}
    for files, weight in weighted:
        for path, (names, down, up) in _layers(files, weight, parameters or {}).items():
            others = added.setdefault(path, [(names, down, up)])
            expected, first, last = others[0]
            if (names, down.shape[-1], up.shape[:-1]) != (expected, first.shape[-1], last.shape[:-1]):
                what, fix = f"{path} has another shape than in {weighted[0][0].path}", "mix adapters of one base"
                raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path), fix=fix))
            others += [(names, down, up)] if down is not first else []
    plain = _stacked(added, [files for files, _ in weighted], parameters or {})
    if bad := not_finite(plain.tensors):
        what = f"the weighted sum is NaN or inf in {len(bad)} tensors, among them {join_first(bad, 2)}"
        where, fix = str(weighted[0][0].path), "lower the weights"
        raise AdapterError(Problem(Code.ADAPTER_NOT_FINITE, what, where, "mix", fix))
    return plain


def by_expert(down: Tensor, up: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A and B of each expert, (experts, rank, in) and (experts, out, rank).

    Args:
        down: A as PEFT stores it for a stacked parameter, (experts · rank, in).
        up: B likewise, (out, rank · experts). The ranks are in another order than in A.
        experts: The number of experts.
    """
    return down.reshape(experts, -1, down.shape[-1]), up.reshape(len(up), -1, experts).permute(2, 0, 1)


def _layers(files: AdapterFiles, weight: float, parameters: Mapping[str, str]) -> dict[str, _Factors]:
    """Path of each module → its A and B. Raises AdapterError: one is missing, of another rank, or not finite."""
    settings, tensors, layers = files.checked_settings(parameters), read_adapter(files), {}
    for path, names in files.factors.items():
        if len(names) < 2:
            what = f"{path} has only one of A and B"
            raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(files.path / WEIGHTS_FILE)))
        a, b = names["A"], names["B"]
        down, up = tensors[a].float(), tensors[b].float() * (weight * settings[path].scaling)
        if (experts := len(down) // int(settings[path].rank)) > 1:
            down, up = by_expert(down, up, experts)
        layers[path] = (a, b), down, up
    return layers


def _stacked(
    layers: Mapping[str, Sequence[_Factors]], files: Sequence[AdapterFiles], parameters: Mapping[str, str]
) -> PlainAdapter:
    """One adapter from path → the layers that are added there."""
    rank = max(sum(down.shape[-2] for _, down, _ in added) for added in layers.values())
    tensors: Weights = {}
    for added in layers.values():
        names, downs, ups = zip(*added, strict=True)
        down, up = torch.cat(downs, -2), torch.cat(ups, -1)
        missing = rank - down.shape[-2]
        down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
        if down.dim() > 2:
            down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        tensors[names[0][0]], tensors[names[0][1]] = down.contiguous(), up.contiguous()
    config = {key: files[0].config.get(key) for key in (*FROM_FIRST, *([PARAMETERS] if parameters else []))} | {
        "r": rank, "lora_alpha": rank, "target_modules": sorted(layers.keys() - parameters.keys()), "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
        "modules_to_save": None, "inference_mode": True,
        "fan_in_fan_out": any(one.config.get("fan_in_fan_out") for one in files),
    }  # fmt: skip
    return PlainAdapter(tensors, config)
