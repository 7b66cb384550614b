"""Quantized releases: how the weights of the dense model follow from the tensors in their files.

They are computed here for every format, so that they are the same on all machines, need no further packages, and can be
read one after another, which `merge` does. transformers 5.24 dequantizes FP8 and MXFP4 on a CPU without a package, but
only as it loads a whole model, which it cannot quantize again then. It refuses FP8 whose blocks are cut off at an edge,
as in DeepSeek's `kv_a_proj_with_mqa`, and takes 4.6 times the memory of MXFP4 experts in bfloat16 (here 1.9 times).

Weights have the shape (outputs, inputs), or (experts, outputs, inputs).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loratune.codes import Code
from loratune.errors import ModelError, Problem
from loratune.model.quantization import method

Parts = Mapping[str, Tensor]
"""The tensors of one quantized weight, by the ends of their names."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of 4-bit floating-point numbers (OCP Microscaling Formats 1.0)."""
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""The bit at which AWQ packs each of eight neighbouring columns (github.com/casper-hansen/AutoAWQ, WQLinear_GEMM)."""
_EXPONENT_BIAS = 127
"""Scales that are exponents in a byte are 2 ** (byte - bias)."""
_FLOATS, _FP8, _EXPONENTS, _WORDS = ("F32", "BF16", "F16"), ("F8_E4M3",), ("U8", "F8_E8M0"), ("I32",)
"""Dtypes, as safetensors names them: of scales, of 8-bit values, of scales that are exponents, of packed integers."""
_TRANSFORMED = re.compile("transform|rotat|hadamard", re.IGNORECASE)
"""Settings by which a release computes with weights other than those in its files."""


@dataclass(frozen=True, eq=False)
class PackedFormat:
    """How the files of a release hold a quantized weight: in several tensors, whose names begin alike.

    Attributes:
        weight: The end of the name of the dense weight.
        dtypes: The end of the name of each tensor → the dtypes that it may have.
        optional: The ends of the names of tensors that not every weight has.
        dequantize: Computes the weight, or several at once, in float32.
    """

    weight: str
    dtypes: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...]
    dequantize: Callable[[Parts], Tensor]


def packed_format(record: Mapping[str, Any] | None, name: str) -> PackedFormat | None:
    """The format of a release; None if it is not quantized, or by a method that only transformers reads.

    Args:
        record: What the configuration of the base records of its quantization.
        name: The name of the base.

    Raises:
        ModelError: A variant of the method that is not read here, or a record with invalid values.
    """
    if record is None or (read := _METHODS.get(method(record))) is None:
        return None
    try:
        if found := [key for key, value in record.items() if value and _TRANSFORMED.search(key)]:
            raise ValueError(f"{found[0]}: its weights are transformed")
        return read(record)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        what = f"the base is quantized ({method(record)}) in a way that is not supported: {reason}"
        fix = "use the release that is not quantized, or one that the user guide lists under Bases"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, name, "quantization_config", fix)) from None


# --- Values and scales


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unsigned integers of 2, 4 or 8 bits, which are packed along the last dimension, the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.contiguous().view(torch.uint8).unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)


def _fp4(packed: Tensor) -> Tensor:
    """4-bit floating-point values, two in a byte."""
    return torch.tensor(_E2M1, device=packed.device)[_unpacked(packed, 4).int()]


def _number(scales: Tensor) -> Tensor:
    """Scales in float32; those in bytes are exponents."""
    return scales.float() if scales.dtype != torch.uint8 else torch.exp2(scales.float() - _EXPONENT_BIAS)


def _scaled(values: Tensor, scales: Tensor, block: tuple[int, int], zeros: Tensor | None = None) -> Tensor:
    """(values - zeros) * scales, where each block of rows and columns has one scale and zero; 0: all in the weight."""
    return (values if zeros is None else values - _spread(zeros, values, block)) * _spread(scales, values, block)


def _spread(scales: Tensor, values: Tensor, block: tuple[int, int]) -> Tensor:
    """The scale of each value, in a shape that broadcasts to it. Blocks at the edges may be smaller."""
    grid = scales.reshape(*scales.shape, *[1] * (2 - scales.dim())) if scales.dim() < 2 else scales
    for axis in (-2, -1):
        size, step = values.shape[axis], block[axis] or values.shape[axis]
        if grid.dim() != values.dim() or grid.shape[axis] != -(-size // step):
            what = f"scales of shape {tuple(scales.shape)} for a weight of shape {tuple(values.shape)}"
            raise ValueError(f"{what} in blocks of {step} along dimension {axis}")
        if step < size:
            grid = grid.repeat_interleave(step, axis).narrow(axis, 0, size)
    return grid


# --- Weights


def _by_block(parts: Parts, packed: str, scale: str, block: tuple[int, int]) -> Tensor:
    zeros = parts.get(".weight_zero_point")
    return _scaled(parts[packed].float(), _number(parts[scale]), block, zeros if zeros is None else zeros.float())


def _by_fp4(parts: Parts, packed: str, block: tuple[int, int]) -> Tensor:
    scales, one = _number(parts[".weight_scale"]), torch.ones((), device=parts[packed].device)
    scales = scales * parts.get(".weight_scale_2", one).float()
    scales = scales / parts.get(".weight_global_scale", one).float()  # by which compressed-tensors has multiplied them
    return _scaled(_fp4(parts[packed]), scales, block)


def _by_gpt_oss(parts: Parts) -> Tensor:
    """Experts, which the model holds transposed: (experts, inputs, outputs)."""
    return _scaled(_fp4(parts["_blocks"]).flatten(-2), _number(parts["_scales"]), (1, 32)).transpose(-2, -1)


def _by_integers(parts: Parts, bits: int, block: tuple[int, int]) -> Tensor:
    """compressed-tensors: values are packed along the inputs, zeros along the outputs."""
    values, zeros = _unpacked(parts[".weight_packed"], bits).float(), parts.get(".weight_zero_point")
    if zeros is None:
        return _scaled(values - (1 << bits - 1), parts[".weight_scale"].float(), block)
    zeros = _unpacked(zeros.transpose(-2, -1), bits)[..., : values.shape[-2]].transpose(-2, -1)
    return _scaled(values, parts[".weight_scale"].float(), block, zeros.float())


def _by_gptq(parts: Parts, bits: int, group: int, offset: int) -> Tensor:
    """Values are packed along the inputs, which are rows here; zeros, less `offset`, along the outputs. Inputs that
    were ordered by activation have a list of their groups."""
    values, scales = _unpacked(parts[".qweight"].T, bits).float(), parts[".scales"].float().T
    zeros = ((_unpacked(parts[".qzeros"], bits) + offset) & (1 << bits) - 1).float().T
    if ".g_idx" not in parts:
        return _scaled(values, scales, (1, group), zeros)
    if len(groups := parts[".g_idx"].int()) != values.shape[1]:
        raise ValueError(f"g_idx of {len(groups)} inputs for a weight of {values.shape[1]} at {bits} bits")
    if not groups.is_meta and not 0 <= int(groups.min()) <= int(groups.max()) < scales.shape[1]:
        raise ValueError(f"g_idx from {groups.min()} to {groups.max()} for {scales.shape[1]} groups of scales")
    return (values - zeros[:, groups]) * scales[:, groups]


def _by_awq(parts: Parts, group: int) -> Tensor:
    """Values and zeros are packed along the outputs, which are columns here."""
    packed = parts[".qweight"], parts[".qzeros"]
    shifts = torch.tensor(_AWQ_SHIFTS, dtype=torch.int32, device=packed[0].device)
    values, zeros = ((part.unsqueeze(-1) >> shifts & 15).flatten(-2).float().T for part in packed)
    return _scaled(values, parts[".scales"].float().T, (1, group), zeros)


# --- Formats: what config.json records


def _one_of(values: Mapping[str, Any], key: str, *known: Any) -> Any:
    """A setting that has to have one of these values, the first of which is the default."""
    value = values.get(key, known[0])
    if not any(type(value) is type(one) and value == one for one in known):  # 4.0 and True are no numbers of bits
        raise ValueError(f"{key}: {value}")
    return value


def _size(value: Any) -> int:
    """The size of a block; 0 stands for all values, as -1 and null do in configurations."""
    if value not in (None, -1) and (type(value) is not int or value < 1):
        raise ValueError(f"a block size of {value}")
    return max(value or 0, 0)


def _sizes(value: Any) -> tuple[int, int]:
    rows, columns = (None, None) if value is None else value
    return _size(rows), _size(columns)


def _fp8(record: Mapping[str, Any]) -> PackedFormat:
    _one_of(record, "expert_dtype", "fp8")
    block = _sizes(record.get("weight_block_size", (1, 32) if method(record) == "mxfp8" else (128, 128)))
    dequantize = partial(_by_block, packed="", scale="_scale_inv", block=block)
    return PackedFormat("", {"": _FP8, "_scale_inv": _FLOATS + _EXPONENTS}, (), dequantize)


def _compressed_tensors(record: Mapping[str, Any]) -> PackedFormat:
    weights, *others = [group["weights"] for group in record["config_groups"].values()]
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
    if any(weights.get(key) != other.get(key) for other in others for key in keys):
        raise ValueError("its layers are quantized in different ways (config_groups)")
    _one_of(record.get("sparsity_config") or {}, "format", "dense")
    _one_of(weights, "actorder", None, "weight", "static", False)
    kind = _one_of(record, "format", None, *_COMPRESSED)
    blocks = {"tensor": (0, 0), "channel": (1, 0), "group": (1, _size(weights.get("group_size")))}
    blocks |= {"tensor_group": blocks["group"], "block": _sizes(weights.get("block_structure"))}
    block, bits = blocks[_one_of(weights, "strategy", *blocks)], _one_of(weights, "num_bits", 8, 4, 2)
    values = {"int": ("I8",), "float": _FP8}[_one_of(weights, "type", *_COMPRESSED[kind])]
    is_symmetric, zero = _one_of(weights, "symmetric", True, False), ".weight_zero_point"
    if kind in ("float-quantized", "int-quantized", "naive-quantized"):
        dtypes: dict[str, tuple[str, ...]] = {".weight": values, ".weight_scale": _FLOATS, zero: (*values, "I8")}
        dequantize = partial(_by_block, packed=".weight", scale=".weight_scale", block=block)
        return PackedFormat(".weight", dtypes, (zero,) if is_symmetric else (), dequantize)
    dtypes = {".weight_packed": ("U8",), ".weight_scale": _EXPONENTS, ".weight_shape": ("I64", "I32")}
    dequantize = partial(_by_fp4, packed=".weight_packed", block=block)
    if kind == "nvfp4-pack-quantized":
        dtypes |= {".weight_scale": _FP8, ".weight_global_scale": _FLOATS}
    if kind == "pack-quantized":
        dtypes |= {".weight_packed": _WORDS, ".weight_scale": _FLOATS}
        dtypes |= {} if is_symmetric else {zero: _WORDS}
        dequantize = partial(_by_integers, bits=bits, block=block)
    return PackedFormat(".weight", dtypes, (".weight_shape",), dequantize)


def _modelopt(record: Mapping[str, Any]) -> PackedFormat:
    if _one_of(record, "quant_algo", "NVFP4", "W4A16_NVFP4", "FP8") == "FP8":
        dequantize = partial(_by_block, packed=".weight", scale=".weight_scale", block=(0, 0))
        return PackedFormat(".weight", {".weight": _FP8, ".weight_scale": _FLOATS}, (), dequantize)
    sizes = {group["weights"].get("group_size", 16) for group in (record.get("config_groups") or {}).values()} or {16}
    dequantize = partial(_by_fp4, packed=".weight", block=(1, _size(*sizes)))
    dtypes = {".weight": ("U8",), ".weight_scale": _FP8, ".weight_scale_2": _FLOATS}
    return PackedFormat(".weight", dtypes, (), dequantize)


def _gptq(record: Mapping[str, Any]) -> PackedFormat:
    kind, bits = _one_of(record, "checkpoint_format", "gptq", "gptq_v2"), _one_of(record, "bits", 4, 2, 8)
    offset = 1 if _one_of(record, "format", kind) == "gptq" else 0
    dequantize = partial(_by_gptq, bits=bits, group=_size(record["group_size"]), offset=offset)
    dtypes = {".qweight": _WORDS, ".qzeros": _WORDS, ".scales": _FLOATS, ".g_idx": ("I32", "I64")}
    return PackedFormat(".weight", dtypes, (".g_idx",), dequantize)


def _awq(record: Mapping[str, Any]) -> PackedFormat:
    _one_of(record, "bits", 4)
    _one_of(record, "version", _one_of(record, "format", "gemm"), "GEMM")
    dequantize = partial(_by_awq, group=_size(record["group_size"]))
    dtypes = {".qweight": _WORDS, ".qzeros": _WORDS, ".scales": _FLOATS}
    return PackedFormat(".weight", dtypes, (), dequantize)


_COMPRESSED = {
    "float-quantized": ("float",), "int-quantized": ("int",), "naive-quantized": ("int", "float"),
    "pack-quantized": ("int",), "nvfp4-pack-quantized": ("float",), "mxfp4-pack-quantized": ("float",),
}  # fmt: skip
"""The formats of compressed-tensors, and the types of values that each may have."""
_METHODS: dict[str, Callable[[Mapping[str, Any]], PackedFormat]] = {
    "awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8, "gptq": _gptq, "modelopt": _modelopt,
    "mxfp4": lambda _: PackedFormat("", {"_blocks": ("U8",), "_scales": _EXPONENTS}, (), _by_gpt_oss), "mxfp8": _fp8,
}  # fmt: skip
