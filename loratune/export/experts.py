"""Adapters of stacked experts, in the form that a program reads.

transformers keeps the experts of a layer in tensors of three dimensions. PEFT stores A of such a tensor as (experts ·
rank, in) and B as (out, rank · experts), under names that do not contain the tensor's: `experts.base_layer` and
`experts`. vLLM reads the same for some classes. For other classes, and in SGLang and llama.cpp, each projection of each
expert has its own A and B, as in checkpoints: `experts.0.gate_proj`. Gate and up then have copies of one A, and
projections without an adapter are zeros, because servers expect all of them. B·A of each expert in the file is compared
with the adapter. What a program is not known to read is refused: adapters of routers, of a single expert, of tensors
under other names, and for llama.cpp of GPT-OSS.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loratune.adapter.clients import CLIENTS
from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.lora import attach, tensors
from loratune.lora.adapter_config import factors_in
from loratune.lora.adapter_files import AdapterFiles
from loratune.lora.merging import PlainAdapter, by_expert
from loratune.lora.module_names import WRAPPER_PREFIX, join_first, last, parent
from loratune.lora.parameters import wrapped_parameters
from loratune.lora.served import reads_stacked_experts
from loratune.lora.tensors import PARAMETERS, Weights
from loratune.model.upstream import CheckpointLayout

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""Parameter of an experts module → the projections that it holds, named as in checkpoints of most models."""


@dataclass(frozen=True)
class Placement:
    """Where the A and B of a module, or of one or all experts of a parameter, are in the written file.

    Attributes:
        source: The module or the parameter that they adapt.
        target: The path of A and B in the written file.
        experts: The number of experts of the parameter; 1 for a module.
        expert: The expert; None: all of them, as PEFT stores them.
        rows: The rows of B.
    """

    source: str
    target: str
    experts: int = 1
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))


def adapted_parameters(files: AdapterFiles, base: Any) -> dict[str, str]:
    """Path of A and B → the parameter that they adapt; empty if the adapter has modules only.

    Args:
        files: The adapter.
        base: The base on the meta device.

    Raises:
        AdapterError: As `attach.attach_saved`.
    """
    if not files.config.get(PARAMETERS):
        return {}
    model = attach.attach_saved(base, files)
    names = wrapped_parameters(model)
    tensors.detached(model)
    return names


def place(
    files: AdapterFiles, base: Any, parameters: Mapping[str, str], client: str, architecture: str
) -> list[Placement]:
    """Where a program looks for the A and B of an adapter.

    Args:
        files: The adapter.
        base: The base on the meta device.
        parameters: See `adapted_parameters`.
        client: The program, a key of `CLIENTS`.
        architecture: The class of the base, by its config.json.

    Raises:
        AdapterError: The program is not known to read adapters of one of the parameters.
    """
    paths, shapes = [*files.factors], {name: base.get_parameter(name).shape for name in parameters.values()}
    if client == "peft":
        experts = {path: shapes[name][0] for path, name in parameters.items() if len(shapes[name]) == 3}
        return [Placement(parameters.get(path, path), path, experts.get(path, 1)) for path in paths]
    found = [Placement(path, path) for path in paths if path not in parameters]
    layout, problems = CheckpointLayout(base) if client != "sglang" else None, []
    for owner in dict.fromkeys(map(parent, shapes)):
        names, module = [name for name in shapes if parent(name) == owner], base.get_submodule(owner)
        leaves = _leaves(owner, module, {*map(last, names)})
        if not leaves or (client == "gguf" and not module.is_concatenated):
            problems += names
            continue
        for leaf, path in zip(leaves, (f"{owner}.base_layer", owner), strict=True):
            whole = Placement(f"{owner}.{leaf}", path, len(module.down_proj))
            is_stacked = client == "vllm" and reads_stacked_experts(architecture)
            found += [whole] if is_stacked else _each(whole, owner, module, layout)
    if problems:
        what = f"it adapts {join_first(problems, 2)}, which {CLIENTS[client]} is not known to read"
        fix = "`loratune merge` makes a model of it"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, str(files.path), PARAMETERS, fix))
    return found


def _leaves(owner: str, module: Any, adapted: set[str]) -> tuple[str, ...]:
    """The parameters of an experts module in the order in which PEFT wraps them; empty for another module."""
    leaves = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    is_known = last(owner) == "experts" and hasattr(module, "is_concatenated") and adapted <= {*leaves}
    return leaves if is_known and len(module.down_proj) > 1 else ()


def _each(whole: Placement, owner: str, module: Any, layout: CheckpointLayout | None) -> Iterator[Placement]:
    """The placements of each projection of each expert.

    Args:
        whole: The placement of all of them.
        owner: The path of the experts.
        module: The experts.
        layout: Names them as in checkpoints; None: they are named as SGLang names them in all models.
    """
    leaf, experts = last(whole.source), whole.experts
    parts = ("gate_proj",) if layout is None and leaf == "up_proj" else PARTS[leaf]  # SGLang keeps it as the gate
    names = [f"{owner}.{expert}.{part}" for expert in range(experts) for part in parts]
    if layout is not None:
        numbers = torch.arange(len(names)).reshape(experts, len(parts), 1)
        stored = layout.saved({whole.source: numbers}).items()
        numbered = {int(value): parent(name) for name, value in stored if value.numel() == 1}
        names = [numbered.get(number, name) for number, name in enumerate(names)]
    half = getattr(module, leaf).shape[2 if module.is_transposed else 1] // len(parts)
    for number, name in enumerate(names):
        expert, part = divmod(number, len(parts))
        rows = slice(part * half, (part + 1) * half) if module.is_concatenated else slice(part, None, len(parts))
        yield replace(whole, target=name, expert=expert, rows=rows)


def placed(
    adapter: PlainAdapter, base: Any, parameters: Mapping[str, str], places: Sequence[Placement]
) -> PlainAdapter:
    """A plain adapter with its A and B where a program looks for them. Those of parameters that it lacks are zero.

    Args:
        adapter: The adapter, with the paths that PEFT gives it.
        base: The base on the meta device.
        parameters: See `adapted_parameters`.
        places: See `place`.
    """
    if not parameters:
        return adapter
    held = {parameters.get(path, path): (path, names) for path, names in factors_in(adapter.tensors).items()}
    made: Weights = {}
    dtype = next(iter(adapter.tensors.values())).dtype
    for one in places:
        path, names = held.get(one.source, ("", {kind: f"{WRAPPER_PREFIX}.lora_{kind}.weight" for kind in "AB"}))
        if path:
            down, up = adapter.tensors[names["A"]], adapter.tensors[names["B"]]
        else:
            down, up = _zeros(base, one.source, adapter.rank, dtype)
        if one.expert is not None:
            downs, ups = by_expert(down, up, one.experts)
            down, up = downs[one.expert].clone(), ups[one.expert][one.rows].clone(memory_format=torch.contiguous_format)
        for kind, tensor in (("A", down), ("B", up)):
            made[WRAPPER_PREFIX + one.target + names[kind].removeprefix(WRAPPER_PREFIX + path)] = tensor
    config = dict(adapter.config)
    if all(one.expert is None for one in places):
        config[PARAMETERS] = [*config[PARAMETERS], *(one.source for one in places if one.source not in held)]
        return replace(adapter, tensors=made, config=config)
    modules = {last(one.target) for one in places if one.expert is not None}
    config |= {"target_modules": sorted({*config["target_modules"], *modules}), PARAMETERS: None}
    return replace(adapter, tensors=made, config=config, notes=(*adapter.notes, "each expert has its own A and B"))


def _zeros(base: Any, name: str, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of a parameter that is not adapted, as PEFT would store them."""
    experts, *sizes = base.get_parameter(name).shape
    inputs, outputs = sizes if base.get_submodule(parent(name)).is_transposed else sizes[::-1]
    return torch.zeros(experts * rank, inputs, dtype=dtype), torch.zeros(outputs, rank * experts, dtype=dtype)


def products(factors: Sequence[Tensor], one: Placement, *, written: bool) -> Iterator[Tensor]:
    """The product B·A of each expert of a placement, or of a module, in float64.

    Args:
        factors: A and B.
        one: The placement.
        written: Whether A and B are those that were written, and not as PEFT stores them.
    """
    down, up = factors
    if one.experts == 1 or (written and one.expert is not None):
        yield up.double() @ down.double()
        return
    downs, ups = by_expert(down, up, one.experts)
    for expert in range(one.experts) if one.expert is None else (one.expert,):
        yield ups[expert][one.rows].double() @ downs[expert].double()
