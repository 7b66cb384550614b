"""How fast this machine multiplies bf16 matrices of a model's shapes: `python -P -m peers.probe MODEL DEVICE`.

Prints JSON: FLOP/s over the frozen GEMMs of one step on 2,048 tokens (forward, and the gradient of the input), outputs
allocated once; FLOP of a supervised and of any token without attention; FLOP of a token per token of its row's length.
The count is that of LoRA training: 4 per weight of the body, and of the head where a token is supervised, 6 per LoRA
weight.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers

from peers.common import Job

TOKENS = 2048
SECONDS = 4.0


def gemms(config: Any) -> list[tuple[int, int, int]]:
    """(in, out, how many) of the model's linears, the head last."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    return [
        (width, queries, layers),
        (width, keys, 2 * layers),
        (queries, width, layers),
        (width, inner, 2 * layers),
        (inner, width, layers),
        (width, config.vocab_size, 1),
    ]


def measured(shapes: list[tuple[int, int, int]], device: str) -> float:
    """FLOP/s over the shapes, each weighted by its number, forwards and backwards."""
    spent = work = 0.0
    share = SECONDS / (2 * len(shapes))
    for one, other, count in shapes:
        for into, out in ((one, other), (other, one)):
            weight = torch.randn(into, out, device=device, dtype=torch.bfloat16)
            rows = torch.randn(TOKENS, into, device=device, dtype=torch.bfloat16)
            made = torch.empty(TOKENS, out, device=device, dtype=torch.bfloat16)
            spent += count * seconds(rows, weight, made, share)
            work += count * 2.0 * TOKENS * into * out
    return work / spent


def seconds(rows: torch.Tensor, weight: torch.Tensor, made: torch.Tensor, enough: float) -> float:
    """The median time of one product."""
    times: list[float] = []
    torch.mm(rows, weight, out=made)
    while sum(times) < enough or len(times) < 3:
        start = time.perf_counter()
        torch.mm(rows, weight, out=made)
        if made.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Measure, and print."""
    config = transformers.AutoConfig.from_pretrained(sys.argv[1])
    shapes = gemms(config)
    body = sum(one * other * count for one, other, count in shapes[:-1])
    rank = Job.r * sum((one + other) * count for one, other, count in shapes[:3])
    answer = {
        "flops": measured(shapes, sys.argv[2]),
        "per_token": 4 * body + 6 * rank,
        "per_supervised": 4 * shapes[-1][0] * shapes[-1][1],
        "per_length": 7 * shapes[0][1] * config.num_hidden_layers,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if sys.argv[2] == "cuda" else "",
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
