"""Merges a saved adapter into each parameter of its base, in float32, one parameter or block at a time.

The adapter is attached to the base on the meta device, so that PEFT decides which parameters it changes and by which
factor, whatever the size of the base. Plain LoRA and DoRA on linear layers are computed by their formulas, on blocks of
rows; every other case by PEFT's own `merge` of the layer, which then gets its whole weight.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.lora import attach, tensors, upstream
from loratune.lora.adapter_files import AdapterFiles

ADAPTER = "default"
_WRAPPERS = (".base_layer", ".original_module")


@dataclass(frozen=True)
class Change:
    """What an adapter does to one parameter.

    Attributes:
        apply: Takes the parameter in float32, or a block of its rows, and the number of the first row. Returns the
            changed values, which may share memory with the given ones.
        key: Equal for changes that make the same of the same parameter.
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
        left: The factor whose rows belong to those of the stored weight: B, or A transposed where the weight is.
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
        init: How the adapter was initialized, where PEFT takes a part out of the base again; else empty.
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
    """The parameters of a base that an adapter changes, with the changes in their order.

    Args:
        base: The base on the meta device, which PEFT then has changed.
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
    """The path of a module in the base without what PEFT has put around it."""
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper, "")
    return path


def _base_parameters(inner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base itself, by their names without PEFT."""
    for path, module in inner.named_modules():
        if any(part.startswith("lora_") or part in ("modules_to_save", "token_adapter") for part in path.split(".")):
            continue
        if not isinstance(module, LoraLayer | AuxiliaryTrainingWrapper | TrainableTokensLayer):
            for name, parameter in module.named_parameters(recurse=False):
                yield _plain(f"{path}.{name}"), parameter


def _module_changes(path: str, module: nn.Module, files: AdapterFiles) -> Iterator[tuple[str, Change]]:
    """What a module of PEFT does to parameters of the base."""
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
    """What LoRA on a linear layer or an embedding does to its weight and its bias."""
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
