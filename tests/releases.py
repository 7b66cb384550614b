"""Tiny quantized releases with the tensors and configurations of real ones, and the weights that they stand for.

Codes and scales are drawn at random. They are packed bit by bit and decoded by the definitions of their number formats,
block by block, without the code under test and without torch's 8-bit types.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Array = NDArray[Any]
Packed = tuple[dict[str, torch.Tensor], Array]
"""Tensors by the ends of their names, and the weight (outputs, inputs) in float32."""


def bits_of(codes: Array, bits: int) -> Array:
    """Codes packed along the last dimension, the lowest bit first, as bytes."""
    single = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(single.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def words(codes: Array, bits: int) -> torch.Tensor:
    """The same as 32-bit words."""
    return torch.from_numpy(bits_of(codes, bits).view("<i4").copy())


def small_float(codes: Array, exponent: int, mantissa: int, bias: int) -> Array:
    """The values of floating-point numbers of few bits: sign, exponent, mantissa."""
    sign, power = codes >> (exponent + mantissa), codes >> mantissa & (1 << exponent) - 1
    fraction = (codes & (1 << mantissa) - 1) / (1 << mantissa)
    size = np.where(power == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (power - float(bias)))
    return np.where(sign == 1, -size, size).astype(np.float32)


def e4m3(codes: Array) -> torch.Tensor:
    return torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)


def spread(values: Array, rows: int, columns: int, size: tuple[int, int]) -> Array:
    """One value for each block of rows and columns."""
    whole = np.empty((rows, columns), np.float32)
    for row in range(0, rows, size[0]):
        for column in range(0, columns, size[1]):
            whole[row : row + size[0], column : column + size[1]] = values[row // size[0], column // size[1]]
    return whole


def grid(rows: int, columns: int, size: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // size[0]), -(-columns // size[1])


def drawn(draw: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Scales of weights of about the given size."""
    return (draw.uniform(0.5, 1.5, shape) * scale).astype(np.float32)


def float8(draw: np.random.Generator, rows: int, columns: int) -> Array:
    """Codes of E4M3 that are not NaN, up to 8."""
    return draw.integers(0, 80, (rows, columns)) + 128 * draw.integers(0, 2, (rows, columns))


def by_fp8(size: tuple[int, int], end: str, *, byte: bool = False, flat: bool = False, kept: str = "") -> Any:
    def pack(draw: np.random.Generator, rows: int, columns: int) -> Packed:
        codes, block = float8(draw, rows, columns), (size[0] or rows, size[1] or columns)
        shape = grid(rows, columns, block)
        scales = drawn(draw, shape, 0.02)
        stored = torch.from_numpy(scales)
        if byte:
            exponents = draw.integers(120, 123, shape)
            scales, stored = (2.0 ** (exponents - 127)).astype(np.float32), torch.from_numpy(exponents.astype(np.uint8))
        parts = {"weight": e4m3(codes), end: stored[0, 0] if flat else stored}
        parts |= {kept: torch.ones(())} if kept else {}
        return parts, small_float(codes, 4, 3, 7) * spread(scales, rows, columns, block)

    return pack


def by_nvfp4(*, modelopt: bool) -> Any:
    def pack(draw: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = draw.integers(0, 16, (rows, columns))
        scales, whole = float8(draw, rows, columns // 16) & 127, np.float32(0.01 if modelopt else 100.0)
        blocks = small_float(scales, 4, 3, 7) * whole if modelopt else small_float(scales, 4, 3, 7) / whole
        weight = small_float(codes, 2, 1, 1) * spread(blocks, rows, columns, (1, 16))
        packed, one = torch.from_numpy(bits_of(codes, 4)), torch.tensor(whole)
        if modelopt:
            return {
                "weight": packed,
                "weight_scale": e4m3(scales),
                "weight_scale_2": one,
                "input_scale": torch.ones(()),
            }, weight
        return {
            "weight_packed": packed,
            "weight_scale": e4m3(scales),
            "weight_global_scale": one[None],
            "input_global_scale": torch.ones(1),
        }, weight

    return pack


def by_integers(bits: int, group: int, *, zeros: bool = False, packed: bool = True) -> Any:
    def pack(draw: np.random.Generator, rows: int, columns: int) -> Packed:
        middle, block = 1 << bits - 1, (1, group or columns)
        codes, shape = draw.integers(0, 1 << bits, (rows, columns)), grid(rows, columns, block)
        zero, scales = np.full(shape, middle), drawn(draw, shape, 0.4 / (1 << bits))
        if zeros:
            zero = draw.integers(0, 1 << bits, shape)
        weight = (codes - spread(zero, rows, columns, block)) * spread(scales, rows, columns, block)
        scale = torch.from_numpy(scales)
        if not packed:
            return {"weight": torch.from_numpy((codes - middle).astype(np.int8)), "weight_scale": scale}, weight
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        return parts | ({"weight_zero_point": words(zero.T, bits).T.contiguous()} if zeros else {}), weight

    return pack


def by_gptq(bits: int, group: int, *, ordered: bool = False, stored_less: int = 1) -> Any:
    def pack(draw: np.random.Generator, rows: int, columns: int) -> Packed:
        codes, groups = draw.integers(0, 1 << bits, (rows, columns)), np.arange(columns) // group
        if ordered:
            groups = draw.permutation(groups)
        zero = draw.integers(1, 1 << bits, (columns // group, rows))
        scales = drawn(draw, zero.shape, 0.4 / (1 << bits)).astype(np.float16)
        weight = np.empty((rows, columns), np.float32)
        for column, its in enumerate(groups):
            weight[:, column] = (codes[:, column] - zero[its]) * scales[its].astype(np.float32)
        return {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words(zero - stored_less, bits),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }, weight

    return pack


def by_awq(draw: np.random.Generator, rows: int, columns: int) -> Packed:
    def in_order(codes: Array) -> Array:  # eight columns of outputs are stored as 0 2 4 6 1 3 5 7
        return codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape)

    codes, zero = draw.integers(0, 16, (columns, rows)), draw.integers(0, 16, (columns // 64, rows))
    scales = drawn(draw, zero.shape, 0.02).astype(np.float16)
    weight = (codes - spread(zero, columns, rows, (64, 1))) * spread(scales.astype(np.float32), columns, rows, (64, 1))
    return {
        "qweight": words(in_order(codes), 4),
        "qzeros": words(in_order(zero), 4),
        "scales": torch.from_numpy(scales),
    }, weight.T


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "actorder": None,
            "dynamic": False,
            "group_size": None,
            "block_structure": None,
            "symmetric": True,
            "observer": "minmax",
            "observer_kwargs": {},
            "num_bits": 8,
            "type": "int",
        }
        | weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": kind,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def by_modelopt(algorithm: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "type": "float"} | weights}
    return {
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quant_algo": algorithm,
        "quant_method": "modelopt",
        "producer": {"name": "modelopt", "version": "0.37.0"},
    }


@dataclass(frozen=True)
class Format:
    """A format of quantized releases: its configuration, and how a weight is packed."""

    config: dict[str, Any]
    pack: Callable[[np.random.Generator, int, int], Packed]
    dtype: torch.dtype = torch.bfloat16
    shape: dict[str, Any] = field(default_factory=dict)


GPTQ = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.1,
    "desc_act": False,
    "sym": False,
    "true_sequential": True,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}
AWQ = {
    "bits": 4,
    "group_size": 64,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
FORMATS = {
    "fp8": Format(FP8, by_fp8((128, 128), "weight_scale_inv")),
    "fp8 of one scale": Format(
        FP8 | {"activation_scheme": "static", "weight_block_size": None},
        by_fp8((0, 0), "weight_scale_inv", flat=True, kept="activation_scale"),
    ),
    "mxfp8": Format(
        {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, by_fp8((1, 32), "weight_scale_inv", byte=True)
    ),
    "compressed fp8": Format(
        compressed("float-quantized", type="float", strategy="channel"), by_fp8((1, 0), "weight_scale")
    ),
    "compressed fp8 blocks": Format(
        compressed("float-quantized", type="float", strategy="block", block_structure=[128, 128]),
        by_fp8((128, 128), "weight_scale"),
    ),
    "compressed int8": Format(compressed("int-quantized", strategy="channel"), by_integers(8, 0, packed=False)),
    "compressed int4": Format(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=64), by_integers(4, 64)
    ),
    "compressed int4 zeros": Format(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False),
        by_integers(4, 64, zeros=True),
    ),
    "compressed nvfp4": Format(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        by_nvfp4(modelopt=False),
    ),
    "modelopt nvfp4": Format(by_modelopt("NVFP4", num_bits=4, group_size=16), by_nvfp4(modelopt=True)),
    "modelopt fp8": Format(by_modelopt("FP8", num_bits=8), by_fp8((0, 0), "weight_scale", flat=True, kept="k_scale")),
    "awq": Format(AWQ, by_awq, torch.float16),
    "gptq": Format(GPTQ, by_gptq(4, 32), torch.float16),
    "gptq in another order": Format(GPTQ | {"desc_act": True}, by_gptq(4, 32, ordered=True), torch.float16),
    "gptq v2 of 8 bits": Format(
        GPTQ | {"bits": 8, "group_size": 64, "checkpoint_format": "gptq_v2"},
        by_gptq(8, 64, stored_less=0),
        torch.float16,
    ),
}
"""The formats of linear layers. Some weights have no whole number of blocks."""


def tiny(kind: str) -> PreTrainedModel:
    """A random model: `llama`, `deepseek` with experts, or `gpt-oss`."""
    torch.manual_seed(0)
    shared = {
        "vocab_size": 264,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if kind == "gpt-oss":
        return GptOssForCausalLM(
            GptOssConfig(
                **shared,
                hidden_size=64,
                intermediate_size=96,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=32,
            )
        )
    if kind == "deepseek":
        return DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **shared,
                hidden_size=192,
                intermediate_size=320,
                moe_intermediate_size=160,
                num_attention_heads=4,
                num_key_value_heads=4,
                n_routed_experts=4,
                n_shared_experts=1,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                q_lora_rank=32,
                kv_lora_rank=32,
                qk_rope_head_dim=16,
                qk_nope_head_dim=32,
                v_head_dim=32,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(**shared, hidden_size=192, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2)
    )


PLAIN = "embed", "lm_head", "norm", "gate.weight", "router", "conv", "vision", "visual", "projector"
"""Parts of the names of tensors that releases do not quantize."""


def write(path: Path, tokenizer: PreTrainedTokenizerFast, form: str, kind: str = "llama") -> dict[str, torch.Tensor]:
    """Write a release in one of `FORMATS`; GPT-OSS in MXFP4.

    Args:
        kind: A model of `tiny`, or the type of a model of text and images.

    Returns: The tensors of the dense release that it stands for, in its dtype.
    """
    one = MXFP4 if kind == "gpt-oss" else FORMATS[form]
    if kind in ("llama", "gpt-oss", "deepseek"):
        model = tiny(kind)
    else:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(families.small_config(kind))
    model.to(one.dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    draw, dense, stored = np.random.default_rng(0), load_file(path / "model.safetensors"), {}
    for name in sorted(dense):
        tensor = dense[name]
        if tensor.dim() not in (2, 3) or any(part in name for part in PLAIN) or name.endswith("bias"):
            stored[name] = tensor
            continue
        if kind == "gpt-oss" and tensor.dim() == 3:
            parts, weight = by_mxfp4(draw, *tensor.shape)
        elif kind == "gpt-oss":
            stored[name] = tensor
            continue
        elif tensor.dim() == 3:
            each = [one.pack(draw, *tensor.shape[1:]) for _ in tensor]
            parts = {end: torch.stack([its[end] for its, _ in each]) for end in each[0][0]}
            weight = np.stack([its for _, its in each])
        else:
            parts, weight = one.pack(draw, *tensor.shape)
        whole = name.removesuffix("weight")  # experts have no such end
        stored |= {whole + (end if whole != name else end.removeprefix("weight")): its for end, its in parts.items()}
        dense[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(one.dtype)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    configure(path, quantization_config=one.config, **({"dtype": None} if kind == "gpt-oss" else {}))  # as released
    return dense


def by_mxfp4(draw: np.random.Generator, experts: int, inputs: int, outputs: int) -> Packed:
    """Experts of GPT-OSS: stored as (experts, outputs, blocks, bytes), in the model (experts, inputs, outputs)."""
    codes, exponents = (
        draw.integers(0, 16, (experts, outputs, inputs)),
        draw.integers(118, 123, (experts, outputs, inputs // 32)),
    )
    weight = np.stack(
        [
            small_float(one, 2, 1, 1) * spread((2.0 ** (two - 127.0)), outputs, inputs, (1, 32))
            for one, two in zip(codes, exponents, strict=True)
        ]
    )
    packed = bits_of(codes.reshape(experts, outputs, -1, 32), 4)
    return {
        "_blocks": torch.from_numpy(packed),
        "_scales": torch.from_numpy(exponents.astype(np.uint8)),
    }, weight.transpose(0, 2, 1)


MXFP4 = Format(
    {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
    by_awq,
)


def configure(path: Path, **values: Any) -> None:
    """Change values of a model's config.json; None removes one."""
    known = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
