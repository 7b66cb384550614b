"""What the kernels for GPUs compute: `python -m first_gpu.kernels DEVICE`.

Prints a line of JSON for each kernel of `loratune/kernels/gpu.py` and case: the largest relative differences of results
and gradients in bfloat16 from a reference in float32, the same for what stock transformers and PEFT use, and
milliseconds of both, forward and backward. Exits with 1 if a kernel is wrong.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loratune.kernels import gpu, lora_linear
from loratune.kernels.parity_check import relative_rms
from loratune.kernels.transfer import send

LENGTHS = (512, 37, 1, 300, 129, 450, 64, 256)
"""Tokens of the rows."""
REPEATED = 10
ALLOWED = 0.02
"""The largest difference from the reference, relative to its RMS; bfloat16 has 8 bits."""
Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A kernel with inputs.

    Attributes:
        name: What is compared.
        inputs: Tensors in float32; gradients of all of them are compared.
        fast: The kernel of these in bfloat16.
        stock: What stock transformers and PEFT compute from the same; in float32 it is the reference.
        only_gpu: Whether a CPU has no such kernel, or no gradient of it.
    """

    name: str
    inputs: Sequence[Tensor]
    fast: Compute
    stock: Compute
    only_gpu: bool = False


def computed(compute: Compute, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients of the inputs, for a gradient of the result that is the same in every call."""
    own = [one.to(dtype).detach().requires_grad_() for one in inputs]
    result = compute(*own)
    generator = torch.Generator(result.device).manual_seed(1)
    given = torch.randn(result.shape, generator=generator, device=result.device)
    return [result.detach(), *torch.autograd.grad(result, own, given.to(result.dtype))]


def milliseconds(compute: Compute, inputs: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The median time of a forward and a backward pass."""
    times = list[float]()
    for number in range(REPEATED + 3):
        start = time.perf_counter()
        computed(compute, inputs, dtype)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        if number >= 3:
            times.append(1000 * (time.perf_counter() - start))
    return round(median(times), 3)


def compared(case: Case) -> dict[str, Any]:
    """A case's result as plain values."""
    half = torch.bfloat16
    if case.only_gpu and not case.inputs[0].is_cuda:
        return {"kernel": case.name, "skipped": "needs a GPU"}
    exact = computed(case.stock, [one.to(half) for one in case.inputs], torch.float32)
    differences = {
        name: max(
            relative_rms(one, other) for one, other in zip(exact, computed(compute, case.inputs, half), strict=True)
        )
        for name, compute in (("difference", case.fast), ("stock_difference", case.stock))
    }
    return {
        "kernel": case.name, **{name: round(float(value), 6) for name, value in differences.items()},
        "ms": milliseconds(case.fast, case.inputs, half), "stock_ms": milliseconds(case.stock, case.inputs, half),
        "right": differences["difference"] <= max(ALLOWED, 2 * differences["stock_difference"]),
    }  # fmt: skip


def by_rows(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Attention by torch's own function, row by row. (1, heads, tokens, size) → (1, tokens, heads, size)."""
    results, start = [], 0
    for length in LENGTHS:
        part = slice(start, start + length)
        at = torch.arange(length, device=query.device)
        seen = (at[:, None] >= at) & (at[:, None] - at < (window or length))
        own = query[:, :, part], key[:, :, part], value[:, :, part]
        results.append(
            functional.scaled_dot_product_attention(
                *own, attn_mask=seen if window else None, is_causal=not window, enable_gqa=True
            )
        )
        start += length
    return torch.cat(results, 2).transpose(1, 2)


def attention(device: torch.device) -> Iterator[Case]:
    """Attention over packed rows, in the shapes of Llama 2 7B, SmolLM2 and Llama 3 8B, and with a window."""
    positions = send(torch.cat([torch.arange(length) for length in LENGTHS])[None], device)
    for heads, keys, size, window in ((32, 32, 128, None), (9, 3, 64, None), (32, 8, 128, None), (32, 8, 128, 100)):
        inputs = [torch.randn(1, count, positions.shape[1], size, device=device) for count in (heads, keys, keys)]
        stock = partial(by_rows, window=window)
        for name, kernel in (("rows", gpu.RowAttention()), ("FlexAttention", gpu.TreeAttention())):
            told = f"attention by {name}, {heads}/{keys} heads of {size}{f', window {window}' if window else ''}"
            yield Case(told, inputs, partial(attended, kernel, positions, window), stock, only_gpu=True)


def attended(
    kernel: gpu.RowAttention, positions: Tensor, window: int | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """The result of a kernel of loratune."""
    return kernel.attend(query, key, value, positions, window, None)


def norms(device: torch.device) -> Iterator[Case]:
    """RMS norms."""
    for width in (576, 4096):
        norm = LlamaRMSNorm(width, 1e-5).to(device, torch.bfloat16)
        exact = LlamaRMSNorm(width, 1e-5).to(device)
        yield Case(
            f"RMS norm of {width}", [torch.randn(1, sum(LENGTHS), width, device=device)], gpu.fast_norm(norm, 1e-5),
            lambda x, norm=norm, exact=exact: (norm if x.dtype == torch.bfloat16 else exact)(x),
        )  # fmt: skip


def linears(device: torch.device) -> Iterator[Case]:
    """LoRA on quantized layers of 4096 x 4096; gradients also of A and B."""
    import bitsandbytes  # noqa: PLC0415  a machine may lack it

    weight = torch.randn(4096, 4096) / 64
    for bits in ("8bit", "4bit"):
        layer: Any = (
            bitsandbytes.nn.Linear8bitLt(4096, 4096, bias=False, has_fp16_weights=False)
            if bits == "8bit"
            else bitsandbytes.nn.Linear4bit(4096, 4096, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        )
        layer.load_state_dict({"weight": weight})
        layer = layer.requires_grad_(False).to(device)
        inputs = [torch.randn(1, sum(LENGTHS), 4096), torch.randn(8, 4096) / 64, torch.randn(4096, 8) / 8]
        yield Case(
            f"LoRA on a layer in {bits}", [one.to(device) for one in inputs], partial(with_kernel, layer),
            partial(as_peft, layer), only_gpu=True,
        )  # fmt: skip


def with_kernel(layer: nn.Linear, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The result of loratune's layer."""
    a, b = nn.Parameter(down.float()), nn.Parameter(up.float())
    result: Tensor = gpu.quantized_linear(layer, lora_linear.Adapted(layer, a, b, 2.0), down, up)(x)
    return result


def as_peft(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What PEFT computes: LoRA in float32 beside the layer of bitsandbytes, which takes inputs in bfloat16."""
    y: Tensor = layer(x.bfloat16())
    return y + 2 * functional.linear(functional.linear(x.float(), down.float()), up.float()).to(y.dtype)


def kernels(device: torch.device) -> Iterator[dict[str, Any]]:
    """The result of every case. An error is one, too, so that the others are still tried."""
    for cases in (norms, linears, attention):
        torch.manual_seed(0)
        try:
            for case in cases(device):
                try:
                    yield compared(case)
                except Exception as error:
                    yield wrong(case.name, error)
        except Exception as error:
            yield wrong(cases.__name__, error)


def wrong(name: str, error: Exception) -> dict[str, Any]:
    """The result of an error."""
    return {"kernel": name, "right": False, "error": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    """Print lines of JSON."""
    failed = list[str]()
    for found in kernels(torch.device(sys.argv[1])):
        print(json.dumps(found), flush=True)
        failed += [] if found.get("right", True) else [found["kernel"]]
    if failed:
        sys.exit(f"wrong: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
