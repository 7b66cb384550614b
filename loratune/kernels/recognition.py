"""Finds the layers that kernels may replace, by what they compute: the first step of the safeguard.

A layer of transformers that has the structure of a replacement is compared with it, in float32, before the first step
of a run: a copy with random weights of the same shapes, on inputs of several sizes with and without a mean, in training
and evaluation mode, at near and at distant positions, forward and backward. Layers of one kind, which differ in nothing
but their weights and their number, are compared once. What random numbers cannot show, such as a clamp that no sample
reaches, is looked for in the code of the layer (`layer_source`).

The replacement computes with the reference of its operations in torch, so the result does not depend on the machine;
the compiled operations are compared with the reference elsewhere (`compiled.operations`), and the whole model with
itself (`parity_check`). Results are kept with the digest of the code, the settings, and the versions of the libraries.
"""

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from loratune.errors import is_out_of_memory
from loratune.kernels import layer_source, replacements
from loratune.kernels.compiled import reference
from loratune.kernels.compiled.operations import relative_rms
from loratune.kernels.layer_sample import NUMBERS, described
from loratune.kernels.layer_source import NotReadableError, is_linear
from loratune.kernels.layout import Layout, PerBatch
from loratune.kernels.lora_linear import Reader
from loratune.kernels.masks import AttentionSpec, AttentionSurvey
from loratune.kernels.upstream import attn_implementation, has_hooks
from loratune.system import cache
from loratune.system.accelerator import same_random_numbers
from loratune.system.machine_results import kept_here

_log = logging.getLogger(__name__)

ATTENTION: dict[str, dict[str, Any]] = {
    "attention": {}, "attention whose norms add 1": {"added": 1.0}, "attention without positions": {"rotary": False},
}  # fmt: skip
GATED: dict[str, dict[str, Any]] = {"gated": {}, "gated by GELU": {"activation": reference.GELU}}
EXPERTS: dict[str, dict[str, Any]] = {"experts": {}, "experts gated by GELU": {"activation": reference.GELU}}
NORM: dict[str, dict[str, Any]] = {"norm": {}, "norm that adds 1": {"added": 1.0}}
"""Form of a replacement → keyword arguments of its factory."""
SIZES = ((1.0, 0.0), (10.0, 0.0), (30.0, 0.0), (1.0, 3.0), (10.0, -20.0), (1e-3, 0.0), (1000.0, 300.0))
"""Standard deviation and mean of inputs. The last is not for attention, whose softmax would be that of a single key."""
TOLERANCE = 2e-4
"""The largest relative difference of an output or gradient; in float32, rounding makes less than a tenth of it."""
ROW_TOLERANCE = 0.2
"""The largest typical difference in size between rows of two norms in 16 bits, in units of the dtype's epsilon. It is
below 0.17 where both compute in float32 before they round, for rows of 16 to 4,096 numbers, and at least 0.23 where one
rounds the mean as well."""
TOKENS, DISTANCE, WINDOW = 16, 1 << 20, 5
"""Tokens of a row of attention, the first of its distant positions, and the window in place of a longer one."""
OF_SCORES = ("q_proj.", "k_proj.", "qkv_proj.")
"""Projections whose weights are small: with large scores, rounding alone decides which key a token attends to."""
_BLOCK = 1_000_003
"""Random numbers that are drawn for a large tensor, and repeated. A prime, so that its rows differ."""

Call = Callable[[nn.Module, Tensor], Any]
"""Calls a layer with an input, (sizes, tokens, size)."""


@dataclass(frozen=True)
class Recognized:
    """What is known of a layer.

    Attributes:
        form: The form of the replacement that computes the same; empty if none does.
        reason: Why none does, as the rest of a sentence about its class.
    """

    form: str = ""
    reason: str = ""


UNEQUAL = "computes something else than its kernel"
"""The reason where a comparison has found a difference."""
UNKNOWN = Recognized(reason="has another structure than the layers that kernels compute")


def recognize(base: Any, reader: Reader, survey: AttentionSurvey | None) -> dict[nn.Module, Recognized]:
    """Compare the layers of a model with the replacements whose structure they have.

    Args:
        base: A causal language model of transformers. Its tensors may be fake; only their shapes are used.
        reader: Function that returns the linear layer and LoRA of a module.
        survey: The attention layers of the base; None: only norms are of interest.

    Returns:
        What is known of each layer that has such a structure.
    """
    found: dict[nn.Module, Recognized] = {}
    by_kind: dict[str, Recognized] = {}
    own, settings = attn_implementation(base), base.config.to_json_string(use_diff=False)
    with same_random_numbers(base.device):
        try:
            for module in base.modules():
                candidate = _candidate(module, reader, survey) if survey is not None else _norm(module)
                if candidate is None:
                    continue
                if "forward" in vars(module) or any(map(has_hooks, module.modules())):
                    found[module] = Recognized(reason="was changed while the program ran")
                    continue
                kind = candidate.description(reader)
                if kind not in by_kind:
                    if candidate.spec is not None and (candidate.spec.cap or own not in ("eager", "sdpa")):
                        base.set_attn_implementation("eager")  # The only one that has caps.
                    by_kind[kind] = _known(candidate, reader, kind, settings)
                found[module] = by_kind[kind]
        finally:
            if attn_implementation(base) != own:
                base.set_attn_implementation(own)
    return found


@dataclass(frozen=True)
class _Candidate:
    """A layer that may have the structure of a replacement.

    Attributes:
        module: The layer.
        family: Forms of replacements, one of `ATTENTION`, `GATED`, `EXPERTS`, `NORM`.
        size: Of its inputs.
        spec: How it attends, with a short window in place of a longer one; None for other layers.
        angles: The size of rotary angles that it receives; 0 if it receives none.
    """

    module: nn.Module
    family: Mapping[str, Mapping[str, Any]]
    size: int
    spec: AttentionSpec | None = None
    angles: int = 0

    def description(self, reader: Reader) -> str:
        """A text that is equal for layers of one kind, in all processes."""
        parts = [(name, _described(part, reader)) for name, part in _own_modules(self.module)]
        spec = asdict(self.spec) if self.spec is not None else None
        return repr((parts, spec, self.angles))


def _candidate(module: nn.Module, reader: Reader, survey: AttentionSurvey) -> _Candidate | None:
    """What a layer may be, by the names of its parts; None for any other module."""
    names, takes_more = dict(module.named_children()), survey.arguments.get(module, _parameters(module)) > 1
    if (
        module in survey.specs
        and module in survey.angles
        and "o_proj" in names
        and _are_linear(names, reader, {"o_proj"})
    ):
        spec = survey.specs[module]
        spec = replace(spec, window=WINDOW if spec.window is not None else None, placed=False)
        return _Candidate(module, ATTENTION, _inputs(names, reader), spec, survey.angles[module])
    if "down_proj" in names and not takes_more and _are_linear(names, reader, {"down_proj"}):
        return _Candidate(module, GATED, _inputs(names, reader))
    tensors = dict(module.named_parameters(recurse=False))
    if tensors.keys() == {"gate_up_proj", "down_proj"} and tensors["down_proj"].dim() == 3:
        return _Candidate(module, EXPERTS, tensors["down_proj"].shape[1])
    return None if takes_more else _norm(module, called=module in survey.arguments)


def _norm(module: nn.Module, *, called: bool = False) -> _Candidate | None:
    """A norm. called: whether it is known to be called with states alone."""
    weight, tensors = getattr(module, "weight", None), dict(module.named_parameters())
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or tensors.keys() != {"weight"}:
        return None
    return _Candidate(module, NORM, len(weight)) if called or _parameters(module) == 1 else None


def _parameters(module: nn.Module) -> int:
    """How many arguments a layer can take: some norms take a gate besides states."""
    return len(inspect.signature(module.forward).parameters)


def _are_linear(children: Mapping[str, nn.Module], reader: Reader, needed: set[str]) -> bool:
    """Whether all projections of a layer can be read, and those that it reads its input with exist."""
    projections = {name: child for name, child in children.items() if is_linear(child)}
    return projections.keys() > needed and all(reader(child) is not None for child in projections.values())


def _inputs(children: Mapping[str, nn.Module], reader: Reader) -> int:
    names = ("q_proj", "qkv_proj", "gate_proj", "gate_up_proj")
    parts = (reader(children[name]) for name in names if name in children)
    return next((part.layer.in_features for part in parts if part is not None), 0)


def _own_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A layer and what is in it, except for the parts of linear layers."""
    yield "", module
    for name, child in module.named_children():
        nested = [("", child)] if is_linear(child) else _own_modules(child)
        yield from ((f"{name}.{inner}", part) for inner, part in nested)


def _described(module: nn.Module, reader: Reader) -> Any:
    """What determines what a module computes, apart from its children and the values of its tensors."""
    if is_linear(module) and (part := reader(module)) is not None:
        rank = len(part.down) if part.down is not None else 0
        return "linear", part.layer.in_features, part.layer.out_features, part.layer.bias is not None, rank
    of_torch = vars(nn.Module()).keys()
    own = {name: one for name, one in vars(module).items() if name not in NUMBERS and name not in of_torch}
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return (
        f"{type(module).__module__}.{type(module).__qualname__}",
        [(name, described(value, identity=lambda _: "")) for name, value in sorted(own.items())],
        [(name, [*one.shape], str(one.dtype), one.requires_grad) for name, one in tensors],
    )


def _known(candidate: _Candidate, reader: Reader, kind: str, settings: str) -> Recognized:
    """What is known of a kind of layers; it is compared if nothing is."""
    try:
        digest = layer_source.read(candidate.module)
    except NotReadableError as error:
        return Recognized(reason=str(error))
    kept = kept_here("layer", digest, kind, settings, cache.source_digest(), of=cache.LAYERS)
    return Recognized(*kept.once("recognized", list, partial(_compare, candidate, reader)))


def _compare(candidate: _Candidate, reader: Reader) -> tuple[str, str]:
    """The form that computes the same as a layer, or the reason."""
    with torch.enable_grad():
        copied = _copied(candidate.module)
        candidates = _candidates(candidate, copied, reader)
        if not candidates:
            return "", UNKNOWN.reason
        calls = [*_calls(candidate)]
        try:
            expected = [_results(copied, *call) for call in calls]
        except Exception as error:  # Families raise all kinds of errors where they need other inputs.
            _reraise_if_out_of_memory(error)
            return "", "does not run alone"
        for form, fast in candidates.items():
            if _agrees(fast, calls, expected) and _rounds_alike(candidate, form):
                return form, ""
    return "", UNEQUAL


def _reraise_if_out_of_memory(error: Exception) -> None:
    if is_out_of_memory(error):
        raise error
    _log.debug("a layer does not run alone", exc_info=True)


def _candidates(candidate: _Candidate, copied: nn.Module, reader: Reader) -> dict[str, nn.Module]:
    """Forms, and the replacement of each whose structure a layer has."""
    made: dict[str, nn.Module | None] = {}
    layouts: PerBatch[Layout] = PerBatch(Layout.of)
    for form, options in candidate.family.items():
        if candidate.spec is not None:
            of_heads = [part for name, part in candidate.module.named_children() if name in ("q_norm", "k_norm")]
            added = options.get("added", 0.0)
            if (added and not of_heads) or not all(_is_norm(one, added, reader) for one in of_heads):
                continue
            attention = replacements.replace_attention(
                copied, reader, candidate.spec, layouts, ops=reference, **options
            )
            made[form] = attention
        elif candidate.family is GATED:
            made[form] = replacements.replace_gated(copied, reader, ops=reference, **options)
        elif candidate.family is EXPERTS:
            made[form] = replacements.replace_experts(copied, ops=reference, **options)
        else:
            made[form] = replacements.replace_norm(copied, ops=reference, **options)
    return {form: fast for form, fast in made.items() if fast is not None}


def _is_norm(module: nn.Module, added: float, reader: Reader) -> bool:
    """Whether the norm of heads is one that adds this to its weight."""
    candidate = _norm(module, called=True)
    form = _compare(candidate, reader)[0] if candidate is not None else ""
    return form != "" and NORM[form].get("added", 0.0) == added


# Inputs


def _copied(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a layer on the CPU with random weights, without dropout in LoRA."""
    drawn, memo = torch.Generator().manual_seed(4), dict[int, Any]()
    for path, tensor in module.named_parameters():
        values = _weights(path, tensor.shape, drawn).to(dtype)
        memo[id(tensor)] = nn.Parameter(values, requires_grad=tensor.requires_grad)
    memo |= {id(buffer): torch.zeros(buffer.shape, dtype=buffer.dtype) for buffer in module.buffers()}
    for part in module.modules():
        memo |= {id(value): value for value in vars(part).values() if isinstance(value, PreTrainedConfig)}
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for dropout in part.modules() if is_linear(part) else ():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0
    return copied


def _weights(path: str, shape: torch.Size, drawn: torch.Generator) -> Tensor:
    """Random weights: none is zero or one, whatever it is at first, so that it has an effect. path: in its layer."""
    count = math.prod(shape)
    if len(shape) == 3 and count > _BLOCK:  # Experts, which begin at different numbers of what one of them needs.
        experts, rows, columns = shape
        flat = _weights(path, torch.Size([rows * columns + 997 * experts, 1]), drawn).flatten() / math.sqrt(columns)
        return flat.as_strided(shape, (997, columns, 1))
    block = torch.randn(min(count, _BLOCK), generator=drawn, dtype=torch.float32)
    block *= (0.2 if len(shape) < 2 else 1 / math.sqrt(shape[-1])) * (0.1 if path.startswith(OF_SCORES) else 1.0)
    values = block.repeat(-(-count // max(1, len(block))))[:count].view(shape)
    return values + 1 if path == "weight" else values


def _calls(candidate: _Candidate) -> Iterator[tuple[Call, Tensor, bool]]:
    """Calls of a layer: how, the input, and whether in training mode."""
    drawn, sizes = torch.Generator().manual_seed(2), SIZES[:-1] if candidate.spec is not None else SIZES
    tokens = TOKENS if candidate.spec is not None else 4
    noise = torch.randn(len(sizes), tokens, candidate.size, generator=drawn, dtype=torch.float32)
    scales, means = torch.tensor(sizes, dtype=torch.float32).T
    x = noise * scales[:, None, None] + means[:, None, None]
    if candidate.family is EXPERTS:
        call = partial(_call_experts, torch.Generator().manual_seed(6))
        yield call, x, True
        yield partial(_call_experts, torch.Generator().manual_seed(6)), x[:2], False
        return
    if candidate.spec is None:
        yield _call, x, True
        yield _call, x[:2], False
        return
    near, distant = torch.arange(tokens)[None], torch.arange(DISTANCE, DISTANCE + tokens)[None]
    yield partial(_call_attention, candidate, near), x, True
    yield partial(_call_attention, candidate, near), x[:2], False
    yield partial(_call_attention, candidate, distant), x[:1], True
    yield partial(_call_attention, candidate, near[:, :1]), x[:1, :1], True


def _call(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def _call_experts(drawn: torch.Generator, module: nn.Module, x: Tensor) -> Any:
    """Each token goes to two experts, if there are as many."""
    count = len(module.get_parameter("down_proj"))
    shares = torch.rand(x.shape[0] * x.shape[1], count, generator=drawn.manual_seed(6), dtype=torch.float32)
    weights, chosen = shares.topk(min(2, count))
    return module(x.flatten(0, 1), chosen, weights).view(x.shape)


def _call_attention(candidate: _Candidate, positions: Tensor, module: nn.Module, x: Tensor) -> Any:
    """positions: (1, tokens). Rotary angles are the same for all layers of a model, so any will do."""
    spec, angles = candidate.spec, None
    assert spec is not None
    if half := candidate.angles // 2:
        frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float32) / half)
        both = (positions[..., None] * frequencies).repeat(1, 1, 2)
        angles = 1.05 * both.cos(), 1.05 * both.sin()  # Some families scale them.
    distance = positions[0][:, None] - positions[0][None]
    visible = (distance >= 0) & (distance < (spec.window or len(distance)))
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(distance.shape, dtype=torch.float32).masked_fill(~visible, lowest)[None, None]
    return module(hidden_states=x, position_embeddings=angles, attention_mask=mask, position_ids=positions)


# Results


def _results(module: nn.Module, call: Call, x: Tensor, training: bool) -> list[Tensor]:
    """The output and the gradient of the input, each for every size, and the gradient of each adapter."""
    x = x.clone().requires_grad_()
    output = call(module.train(training), x)
    output = output[0] if isinstance(output, tuple) else output
    # Among one key, there is nothing to choose: gradients of queries are nothing but rounding.
    weights = [one for one in module.parameters() if one.requires_grad and x.shape[1] > 1]
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    target /= x.detach().square().mean((1, 2), keepdim=True).sqrt()  # Else large inputs would hide small ones.
    dx, *gradients = torch.autograd.grad((output * target).sum(), [x, *weights])
    return [*output.detach(), *dx, *gradients]


def _agrees(fast: nn.Module, calls: list[tuple[Call, Tensor, bool]], expected: list[list[Tensor]]) -> bool:
    """Whether a replacement gives the expected results."""
    for call, old in zip(calls, expected, strict=True):
        try:
            new = _results(fast, *call)
        except Exception as error:
            _reraise_if_out_of_memory(error)
            return False
        if not all(relative_rms(*pair) <= TOLERANCE for pair in zip(old, new, strict=True)):
            return False
    return True


def _rounds_alike(candidate: _Candidate, form: str) -> bool:
    """Whether a norm of 16 bits computes in float32 before it rounds, as the replacement does. Each row is compared in
    its size, in which the rounding of single numbers cancels."""
    dtype = next(candidate.module.parameters()).dtype
    if candidate.family is not NORM or dtype not in (torch.bfloat16, torch.float16):
        return True
    own = _copied(candidate.module, dtype)
    fast = replacements.replace_norm(own, ops=reference, **NORM[form])
    assert fast is not None
    x = torch.randn(256, candidate.size, generator=torch.Generator().manual_seed(5), dtype=torch.float32).to(dtype)
    with torch.no_grad():
        old, new = own(x).double(), fast(x).double()
    sizes = (old * new).sum(-1) / new.square().sum(-1) - 1
    return float(sizes.square().mean().sqrt()) <= ROW_TOLERANCE * torch.finfo(dtype).eps
