"""What would make training faster still, and is not done: LoRA's A in the product of the base, prepacked weights, int8,
a shorter last layer, and keeping what layers below all adapters give.

    OMP_NUM_THREADS=1 python scripts/measure_untaken.py [--model models/SmolLM2-135M-Instruct] [--repeats 7]

Each is measured beside what is done, in turn, by the processor's time of one thread, so that it can run on a machine
that does something else too. scripts/README.md says why they are left out.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.packing import flatten
from loratune.lora import attach, targets

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((480, 576, 576), (480, 1536, 576), (480, 576, 1536), (512, 4096, 4096), (2048, 2048, 2048))
"""Tokens, outputs and inputs: SmolLM2-135M's, and larger ones."""
OPERATIONS = 1e10
"""Of one measurement, about."""
RANK = 8
OUTLIERS, SIZE = 4, 20
"""As many features of the inputs are so many times as large as the others, as in trained models."""


def ratio(done: Callable[[], Any], other: Callable[[], Any], times: int, repeats: int) -> float:
    """How many times as fast the other is, in the median."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.process_time()
        for _ in range(times):
            function()
        return time.process_time() - start

    done(), other()
    return median(seconds(done) / seconds(other) for _ in range(repeats))


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in int8, and the scale of each."""
    scales = values.abs().amax(1, keepdim=True).float() / 127
    return (values.float() / scales).round_().to(torch.int8), scales


def products(repeats: int) -> None:
    """A table of products."""
    torch.manual_seed(0)
    pack: Any = torch.ops.mkldnn._reorder_linear_weight
    linear: Any = torch.ops.mkldnn._linear_pointwise
    columns = ("tokens, outputs, inputs", "with A", "prepacked, forward", "backward", "int8", "with scaling")
    print(f"| {' | '.join([*columns, 'error of bf16', 'of int8'])} |\n|{'---|' * (len(columns) + 2)}")
    for tokens, outputs, inputs in SHAPES:
        exact = torch.randn(outputs, inputs) / inputs**0.5
        weight, x, gradient = exact.bfloat16(), torch.randn(tokens, inputs), torch.randn(tokens, outputs).bfloat16()
        x[:, :OUTLIERS] *= SIZE
        x = x.bfloat16()
        ahead, back = pack(weight, tokens), pack(weight.t().contiguous(), tokens)
        (x8, _), (w8, w_scales) = quantized(x), quantized(weight)
        w8 = w8.t().contiguous()

        def scaled(x: Tensor = x, w8: Tensor = w8, w_scales: Tensor = w_scales) -> Tensor:
            x8, x_scales = quantized(x)
            return (torch._int_mm(x8, w8).float() * x_scales * w_scales.t()).bfloat16()

        def plain(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return functional.linear(x, weight)

        down = torch.randn(RANK, inputs).bfloat16()
        both = torch.cat([weight, down])

        def apart(x: Tensor = x, weight: Tensor = weight, down: Tensor = down) -> tuple[Tensor, Tensor]:
            return functional.linear(x, weight), functional.linear(x, down)

        times = max(3, min(40, int(OPERATIONS / (2 * tokens * outputs * inputs))))
        others: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
            (apart, partial(functional.linear, x, both)),
            (plain, partial(linear, x, ahead, None, "none", [], "")),
            (partial(torch.mm, gradient, weight), partial(linear, gradient, back, None, "none", [], "")),
            (plain, partial(torch._int_mm, x8, w8)),
            (plain, scaled),
        ]
        ratios = [f"{ratio(done, other, times, repeats):.2f}" for done, other in others]
        truth = x.double() @ weight.double().t()
        errors = [f"{(y.double() - truth).norm() / truth.norm():.2%}" for y in (plain(), scaled())]
        print(f"| {tokens}, {outputs}, {inputs} | {' | '.join([*ratios, *errors])} |", flush=True)


def quickstart(path: Path, **lora: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """The base, the model with adapters, and a batch of the quickstart. lora: settings."""
    tokenizer, base = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")
    section = LoraSection(r=8, lora_alpha=16, **lora)
    model = attach.attach(base, section, targets.find(base, section).peft(), seed=0).train()
    lines = (ROOT / "configs" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines[:8]]
    batch = flatten([{"input_ids": one, "labels": [-100] * (len(one) - 2) + one[-2:]} for one in ids])
    return base, model, batch


def last_layer(path: Path, repeats: int) -> None:
    """How much faster steps are whose last feed-forward layer is computed at supervised positions alone."""
    base, model, batch = quickstart(path)
    with kernels.accelerated(model, attach.adapted_linear):
        layer = base.model.layers[-1].mlp
        whole, places = layer.forward, (batch["labels"][:, 1:] >= 0).flatten().nonzero()[:, 0]

        def short(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, 1)
            found = whole(flat.index_select(0, places).unsqueeze(0))[0]
            return torch.zeros_like(flat).index_copy(0, places, found).view_as(hidden)

        def step(forward: Callable[[Tensor], Tensor]) -> Tensor:
            layer.forward = forward
            return gradients(model, batch)

        same = torch.equal(step(whole), step(short))
        faster = ratio(lambda: step(whole), lambda: step(short), 1, repeats)
    print(f"last feed-forward layer at supervised positions alone: {faster:.3f} times as fast, same gradients: {same}")


def lower_layers(path: Path, repeats: int) -> None:
    """How much faster steps are where what the layers below all adapters give, half of them, is known."""
    count = AutoConfig.from_pretrained(path).num_hidden_layers
    base, model, batch = quickstart(path, layers_to_transform=[*range(count // 2, count)])
    with kernels.accelerated(model, attach.adapted_linear):
        layers, kept = base.model.layers, []
        handle = layers[count // 2].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
        gradients(model, batch)
        handle.remove()
        whole = [layer.forward for layer in layers[: count // 2]]

        def step(forwards: Sequence[Callable[..., Tensor]]) -> Tensor:
            for layer, forward in zip(layers, forwards, strict=False):
                layer.forward = forward
            return gradients(model, batch)

        known = [lambda *_, **__: kept[0]] * len(whole)
        same = torch.equal(step(whole), step(known))
        faster = ratio(lambda: step(whole), lambda: step(known), 1, repeats)
    print(f"adapters on the upper half, with what the lower half gives kept: {faster:.2f} times as fast, same: {same}")


def gradients(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Those of one step, one after the other."""
    labels = batch["labels"]
    kernels.expect(model, labels)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    total, _ = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
    total.backward()  # type: ignore[no-untyped-call]
    found = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
    model.zero_grad()
    return found


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    last_layer(given.model, given.repeats)
    lower_layers(given.model, given.repeats)
    products(given.repeats)


if __name__ == "__main__":
    main()
