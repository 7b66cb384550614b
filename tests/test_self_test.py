"""`loratune env --self-test` finds kernels that are wrong by a factor, and so does the check before training."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mainly, tiny_llama
from peft import LoraConfig, get_peft_model

from loratune import kernels
from loratune.api import self_test, self_test_operations
from loratune.api.self_test_operations import DifferenceError
from loratune.kernels import gpu, lora_linear, loss, predictions, quantized, rowwise, sublayers, upstream
from loratune.kernels.compiled.fused_ops import CompiledOps
from loratune.lora import attach
from loratune.model import load

pytestmark = pytest.mark.usefixtures("own_layers")
Changed = Callable[..., Any]
"""Function of the original function and its arguments."""


def times(factor: float, *, where: Callable[..., Any] = lambda *_: True, which: int = 0) -> Changed:
    """The result, or one of several, times a factor. where: whether that is done, from the arguments."""

    def changed(original: Any, *given: Any, **named: Any) -> Any:
        result = original(*given, **named)
        if not where(*given, *named.values()):
            return result
        if not isinstance(result, tuple):
            return result * factor
        return tuple(one * factor if place == which else one for place, one in enumerate(result))

    return changed


def of_bfloat16(ops: Any, *_: Any) -> bool:
    return bool(ops._dtype == torch.bfloat16)


def of_tokens(count: int) -> Callable[..., Any]:
    return lambda _, x, *others: len(x) == count


def last(value: Any) -> Callable[..., Any]:
    return lambda *given: given[-1] != value


def capped(*given: Any) -> bool:
    return bool(given[5].cap)


def weighted(original: Any, ops: Any, logits: Any, targets: Any, weights: Any = None) -> Any:
    losses = original(ops, logits, targets, weights)
    if weights is not None:
        logits.mul_(1.5)
    return losses


def whole_rows(original: Any, rows: Any, results: Any, *others: Any) -> None:
    original(rows, results, *others)
    for first, end in rows:
        results[0][first:end] *= 1.5


def whole_rows_backward(original: Any, rows: Any, gradients: Any, *others: Any) -> None:
    original(rows, gradients, *others)
    if rows:
        gradients[1].mul_(1.5)


def gradients(side: int, factor: float) -> Changed:
    """The gradients of all A (0) or of all B (1) times a factor."""

    def changed(original: Any, *given: Any, **named: Any) -> Any:
        dx, found = original(*given, **named)
        return dx, [one * factor if place % 2 == side else one for place, one in enumerate(found)]

    return changed


def of_lora(factor: float) -> Changed:
    """What LoRA adds times a factor."""

    def changed(original: Any, *given: Any) -> Any:
        saved = original(*given)
        saved.ups = [up * factor for up in saved.ups]
        return saved

    return changed


def without_lora(original: Any, self: Any, dy: Any, dinner: Any, saved: Any) -> Any:
    return dy @ self.weight


def of_inference(original: Any, self: Any, x: Any) -> Any:
    alone = torch.nn.functional.linear(x, self._weight, self._bias)
    return alone + 0.9 * (original(self, x) - alone)


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
OF_OPERATIONS: dict[str, tuple[str, Changed, torch.dtype]] = {
    "the gate by GELU": ("swiglu", times(1.5, where=last(0.0)), FLOAT32),
    "the gradient of the gate by GELU": ("swiglu_backward", times(1.5, where=last(0.0)), FLOAT32),
    "the norm that adds 1": ("rms_norm", times(1.5, where=last(0.0)), FLOAT32),
    "the gradient of the norm that adds 1": ("rms_norm_backward", times(1.5, where=last(0.0)), FLOAT32),
    "attention with caps": ("attend", times(1.5, where=capped), FLOAT32),
    "sinks": ("attend", times(1.01, where=capped, which=1), FLOAT32),
    "the gradient of attention with caps": ("attend_backward", times(1.5, where=capped, which=2), FLOAT32),
    "the gradient of weighted losses": ("cross_entropy", weighted, FLOAT32),
    "the gate, slightly": ("swiglu", times(1.001), FLOAT32),
    "the norm in bfloat16": ("rms_norm", times(1.015, where=of_bfloat16), BFLOAT16),
    "the gate in bfloat16": ("swiglu", times(1.015, where=of_bfloat16), BFLOAT16),
    "attention in bfloat16": ("attend", times(1.015, where=of_bfloat16), BFLOAT16),
    "the loss in bfloat16": ("cross_entropy", times(1.015, where=of_bfloat16), BFLOAT16),
    "rotary embeddings": ("split_heads", times(1.001, which=1), FLOAT32),
    "two tokens times an 8-bit weight": ("linear_8bit", times(1.001, where=of_tokens(2)), FLOAT32),
    "three tokens times a 4-bit weight": ("linear_4bit", times(1.001, where=of_tokens(3)), FLOAT32),
}  # fmt: skip
OF_LAYERS: dict[str, tuple[str, Any, str, Changed]] = {
    "experts": ("Qwen3 with experts", sublayers.ExpertLayers, "__call__", times(1.5)),
    "attention that is not replaced": ("GPT-OSS", rowwise, "attend_in_tiles", times(1.5)),
    "LoRA in layers that are not replaced": ("GPT-OSS", lora_linear._ProjectionFunction, "backward", times(1.5)),
    "norms of heads": ("Qwen3 with experts", sublayers.HeadNorms, "forward", times(1.5)),
    "the gradient of norms of heads": ("Qwen3 with experts", sublayers.HeadNorms, "backward", times(1.5)),
    "dropout": ("Llama with dropout", upstream, "dropout", times(1.5)),
    "whole rows": ("Llama", sublayers, "attend_whole_rows", whole_rows),
    "the gradient of whole rows": ("Llama", sublayers, "attend_whole_rows_backward", whole_rows_backward),
    "the gradient of the loss": ("Gemma 2", loss._HeadLoss, "backward", times(2.0)),
    "the gradient of the losses of rows": ("Gemma 2", loss._RowSums, "backward", times(2.0)),
    "logits with caps": ("Gemma 2", loss.Scaling, "backward", times(1.5)),
    "the gradient of A": ("Llama with dropout", lora_linear.Projection, "backward", gradients(0, 2.0)),
    "what LoRA adds": ("Llama with dropout", lora_linear.Projection, "_lora", of_lora(1.02)),
    "LoRA in inference": ("Llama with dropout", lora_linear.InferenceLinear, "forward", of_inference),
}  # fmt: skip
OF_LORA: dict[str, tuple[str, Changed]] = {
    "the gradient of A": ("backward", gradients(0, 2.0)),
    "no gradient of A": ("backward", gradients(0, 0.0)),
    "the gradient of B": ("backward", gradients(1, 2.0)),
    "the gradient of the input": ("_input_gradient", without_lora),
    "what LoRA adds": ("_lora", of_lora(3.0)),
}  # fmt: skip


def change(patch: pytest.MonkeyPatch, owner: Any, name: str, changed: Changed) -> None:
    """Replace a function or a method, which may be static."""
    held = vars(owner)[name]
    original = held.__func__ if isinstance(held, staticmethod) else held

    def replacement(*given: Any, **named: Any) -> Any:
        return changed(original, *given, **named)

    patch.setattr(owner, name, staticmethod(replacement) if isinstance(held, staticmethod) else replacement)


@pytest.mark.parametrize("name", OF_OPERATIONS)
def test_an_operation_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, changed, dtype = OF_OPERATIONS[name]
    change(monkeypatch, CompiledOps, function, changed)
    with pytest.raises(DifferenceError, match="is allowed"):
        self_test_operations.operations(dtype)


def test_a_scale_of_the_wrong_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_scales(original: Any, ops: Any, x: Any, weight: Any, scales: Any, code: Any) -> Any:
        rows = scales.view(len(weight), -1)
        return original(ops, x, weight, rows[:, :1].expand_as(rows).reshape(-1), code)

    change(monkeypatch, CompiledOps, "linear_4bit", first_scales)
    with pytest.raises(DifferenceError, match="4-bit weight"):
        self_test_operations.operations(FLOAT32)


def test_a_divergence_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, predictions._Divergence, "backward", times(1.02))
    with pytest.raises(DifferenceError, match="divergence"):
        self_test_operations.operations(FLOAT32)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    mainly([("8bit", FLOAT32), ("4bit", BFLOAT16)], product(("8bit", "4bit"), (FLOAT32, BFLOAT16))),
    ids=str,
)
def test_quantized_layers_that_are_wrong(
    bits: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "automatic_dtype", lambda: dtype)
    checks = self_test._SelfTest(tmp_path)
    assert "largest difference" in checks._quantized(bits)
    change(monkeypatch, quantized, f"_of_{bits}", times(1.5, where=lambda like, *_: like.dtype == dtype))
    with pytest.raises(DifferenceError, match="is allowed"):
        checks._quantized(bits)


def test_attention_of_a_gpu_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, gpu.TreeAttention, "attend", times(1.5))
    with pytest.raises(DifferenceError, match="attention of a GPU"):
        self_test_operations.operations(FLOAT32)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_layer_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, owner, function, changed = OF_LAYERS[name]
    monkeypatch.setattr(self_test_operations, "MODELS", {model: self_test_operations.MODELS[model]})
    change(monkeypatch, owner, function, changed)
    with pytest.raises(DifferenceError):
        self_test_operations.layers(FLOAT32, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    told = self_test_operations.layers(dtype, torch.device("cpu"))
    assert told.startswith("5 models" if dtype == FLOAT32 else "4 models")


def fresh() -> Any:
    """A model whose B is zero."""
    return get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


@pytest.mark.parametrize("name", OF_LORA)
def test_the_check_before_training_sees_lora_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although B is zero then, with which A has no gradient."""
    model = fresh()
    assert not kernels.accelerate(model, attach.adapted_linear).fallbacks
    change(monkeypatch, lora_linear.Projection, OF_LORA[name][0], OF_LORA[name][1])
    refused = kernels.accelerate(model, attach.adapted_linear).fallbacks
    assert {"attention", "feed-forward layers"} <= refused.keys()  # also where its own attention goes by rows


@pytest.mark.parametrize("fails", [False, True])
def test_the_check_before_training_leaves_b_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    before = {name: (weight, weight.data_ptr(), weight._version) for name, weight in model.named_parameters()}
    values = {name: weight.clone() for name, weight in model.named_parameters()}
    seen = list[bool]()

    def forward(original: Any, *given: Any, **named: Any) -> Any:
        seen.append(all(bool(weight.any()) for weight in given[3]))
        if fails:
            raise ValueError("this layer does not run")
        return original(*given, **named)

    change(monkeypatch, lora_linear.Projection, "forward", forward)
    random = torch.get_rng_state()
    assert bool(kernels.accelerate(model, attach.adapted_linear).fallbacks) == fails
    assert torch.equal(torch.get_rng_state(), random) and any(seen)  # not where the scale of logits is found
    for name, weight in model.named_parameters():
        # A projection makes the weights of the base views of one tensor.
        assert "base_layer" in name or before[name] == (weight, weight.data_ptr(), weight._version)
        assert torch.equal(weight, values[name]) and weight.grad is None


@pytest.mark.parametrize("name", ["the gradient of the loss", "the gradient of the losses of rows"])
def test_the_check_before_training_sees_a_loss_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, owner, function, changed = OF_LAYERS[name]
    change(monkeypatch, owner, function, changed)
    found = kernels.accelerate(fresh(), attach.adapted_linear)
    assert found.fallbacks == {"loss": "its kernel does not compute the same"}
