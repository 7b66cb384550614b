"""How long a step takes on this CPU where attention is torch's: stock PEFT against what `loratune train` does.

    python scripts/measure_attention.py [--steps 3] [--dtype bfloat16] [--threads 1]

Random weights of real shapes. The ways of one case take turns, so that a machine that is busy is so for all of them.
"""

import argparse
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from loratune import kernels
from loratune.data.packing import flatten, pad
from loratune.lora import attach

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
GEMMA3 = Gemma3TextConfig(
    vocab_size=49152, hidden_size=640, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, sliding_window=512, layer_types=["sliding_attention"] * 3 + ["full_attention"],
)  # fmt: skip


def rows(lengths: list[int]) -> list[dict[str, list[int]]]:
    drawn = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 40_000, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": one, "labels": one} for one in ids]


def timed(model: Any, batch: dict[str, torch.Tensor], *, fast: bool) -> float:
    """CPU seconds of a forward and backward pass; what is done once for a run does not count."""
    with kernels.accelerated(model, attach.adapted_linear) if fast else nullcontext():
        inputs = dict(batch)
        labels = inputs.pop("labels")
        start = time.process_time()
        if fast:
            kernels.expect(model, labels)
        total, count = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
        torch.autograd.backward(total / count)
        return time.process_time() - start


def compared(
    title: str, model: Any, ways: Mapping[str, tuple[dict[str, torch.Tensor], bool]], steps: int, tokens: int
) -> None:
    """Print the median of each way: a batch, and whether the model is accelerated. The first pass does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(steps + 1):
        for way, (batch, fast) in ways.items():
            seconds[way].append(timed(model, batch, fast=fast))
    print(title)
    for way, times in seconds.items():
        median = sorted(times[1:])[len(times[1:]) // 2]
        print(f"  {way:<28}{median:7.2f} s  {tokens / median:7.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["LORATUNE_NATIVE"] = "0"
    for title, config, lengths in (
        ("Llama of SmolLM2-135M's shape, 1 x 1,024, no compiler", SMOLLM2, [1024]),
        ("Gemma 3, 4 layers, 8 x 1,024, no compiler", GEMMA3, [1024] * 8),
        ("Gemma 3, 4 layers, 8 x 1,024, compiled", GEMMA3, [1024] * 8),
    ):
        if title.endswith("compiled"):
            del os.environ["LORATUNE_NATIVE"]
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
        lora = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
        batches = {"padded": dict(pad(rows(lengths), 0)), "packed": flatten(rows(lengths))}
        ways = {
            f"{who}, {how}": (batch, fast)
            for how, batch in batches.items()
            for who, fast in (("stock PEFT", False), ("loratune", True))
            if len(lengths) > 1 or how == "padded"
        }
        compared(f"{title}, {options.dtype}", model, ways, options.steps, sum(lengths))


if __name__ == "__main__":
    main()
