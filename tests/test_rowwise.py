"""Torch attention row by row: the same numbers as with the whole mask, at the cost of the rows."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import mainly
from test_kernels import (
    CAPPED,
    EXPERTS,
    MIXED,
    SHAPE,
    WINDOWED_BY_MASK,
    WITHOUT_POSITIONS,
    adapted,
    relative_rms,
    rows,
    step,
)  # fmt: skip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from loratune import kernels
from loratune.data.batches import flatten, pad
from loratune.kernels import rowwise
from loratune.lora import attach

UNDROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "mistral with a window": ("mistral", {"sliding_window": 25}),
    "mistral with a window longer than a tile": ("mistral", {"sliding_window": 280}),
    "mistral that sees one token": ("mistral", {"sliding_window": 1}),
    "gemma3, with windows and without": ("gemma3_text", {"sliding_window": 40, **MIXED}),
    "cohere2, with windows and without": ("cohere2", {"sliding_window": 40, **MIXED}),
    "qwen2_moe, whose window is known from the mask alone": ("qwen2_moe", WINDOWED_BY_MASK),
    "granite, which hands no positions on": ("granitemoehybrid", WITHOUT_POSITIONS),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, **UNDROPPED}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "gemma2, which caps its scores": ("gemma2", CAPPED),
    "gpt_oss, which has sinks": ("gpt_oss", {**EXPERTS, "sliding_window": 40, **MIXED}),
}  # fmt: skip
OF_A_KIND = [
    "llama", "mistral that sees one token", "gemma3, with windows and without",
    "qwen2_moe, whose window is known from the mask alone", "granite, which hands no positions on", "gpt2",
    "gemma2, which caps its scores", "gpt_oss, which has sinks",
]  # fmt: skip
TARGETS = {
    "phi3": ["qkv_proj", "o_proj"], "gpt_neox": ["query_key_value", "dense"], "gpt2": ["c_attn"],
    "opt": ["q_proj", "out_proj"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_NATIVE", "0")


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and "alias" not in str(func):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", mainly(OF_A_KIND, FAMILIES))
def test_row_wise_attention_gives_the_same_loss_and_gradients(name: str) -> None:
    """With rows longer than the attention window, packed and padded."""
    kind, changes = FAMILIES[name]
    model = adapted(kind, targets=TARGETS.get(kind, ["q_proj", "v_proj"]), changes=changes)
    for batch in (flatten(rows()), dict(pad(rows(), 0)), flatten(rows()[:1])):
        loss, gradients = step(model, batch)
        with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
            assert "attention" in fallbacks and kernels.attends_by_rows(model)
            again, others = step(model, batch)
        assert not kernels.attends_by_rows(model)
        assert again == pytest.approx(loss, abs=1e-6)
        assert relative_rms(gradients, others) < 1e-5


@pytest.mark.parametrize("name", mainly(OF_A_KIND, FAMILIES))
def test_tiled_attention_gives_the_same_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel, which gets the rows from the masks."""
    monkeypatch.setenv("LORATUNE_NATIVE", "1")
    kind, changes = FAMILIES[name]
    model = adapted(kind, targets=TARGETS.get(kind, ["q_proj", "v_proj"]), changes=changes)
    base, tiles = model.get_base_model(), Mock(wraps=rowwise.attend_in_tiles)
    monkeypatch.setattr(rowwise, "attend_in_tiles", tiles)
    own = base.config._attn_implementation
    for batch in (flatten(rows()), dict(pad(rows(), 0)), flatten(rows()[:1])):
        loss, gradients = step(model, batch)
        rowwise.register(base, own)
        again, others = step(model, batch)
        base.set_attn_implementation(own)
        assert again == pytest.approx(loss, abs=1e-6) and relative_rms(gradients, others) < 1e-5
    assert tiles.call_count == 3 * base.config.num_hidden_layers


@pytest.mark.parametrize("name", ["gemma2, which caps its scores", "gpt_oss, which has sinks"])
def test_attention_with_dropout_uses_the_models_own_function(name: str) -> None:
    """Row by row, as torch has no equivalent attention with dropout."""
    kind, changes = FAMILIES[name]
    model = adapted(kind, targets=["q_proj", "v_proj"], changes={**changes, "attention_dropout": 1e-9})
    for batch in (flatten(rows()), dict(pad(rows(), 0))):
        loss, gradients = step(model, batch)
        with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
            assert "attention" in fallbacks and kernels.attends_by_rows(model)
            again, others = step(model, batch)
        assert again == pytest.approx(loss, abs=1e-6) and relative_rms(gradients, others) < 1e-5


CHUNKED = {
    "attention_chunk_size": 48, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
    "num_local_experts": 2, "intermediate_size_mlp": 64,
}  # fmt: skip


def test_attention_chunks_are_treated_as_rows() -> None:
    model = adapted("llama4_text", targets=["q_proj", "v_proj"], changes=CHUNKED)
    loss, gradients = step(model, flatten(rows()))
    assert rowwise.attend_by_rows(model.get_base_model(), lambda: True)
    again, others = step(model, flatten(rows()))
    assert again == pytest.approx(loss, abs=1e-6) and relative_rms(gradients, others) < 1e-5
    model.get_base_model().set_attn_implementation("sdpa")
    model.config.attention_chunk_size = 400
    assert abs(step(model, flatten(rows()))[0] - loss) > 1e-5


def test_no_tensor_is_quadratic_in_the_batch() -> None:
    """The control: with stock attention there is one."""
    model = adapted("gemma3_text", changes={"sliding_window": 40, "vocab_size": 300, **MIXED})
    many = [{name: one[name][:60] for name in one} for one in rows() * 8 if len(one["labels"]) >= 60]
    batch = flatten(many)
    square = batch["input_ids"].numel() ** 2
    with Largest() as stock:
        step(model, batch)
    with kernels.accelerated(model, attach.adapted_linear), Largest() as by_rows:
        step(model, batch)
    assert stock.elements >= square > 2 * by_rows.elements


def test_left_padding_and_irregular_masks_use_torch() -> None:
    """They get the same mask as without row-wise attention."""
    model = adapted()
    batch = dict(pad(rows(), 0, side="left"))
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    holes = dict(pad(rows(), 0))
    holes["attention_mask"][0, 5] = 0
    for odd in (batch, holes):
        loss, gradients = step(model, odd)
        with kernels.accelerated(model, attach.adapted_linear):
            again, others = step(model, odd)
        assert again == pytest.approx(loss, abs=1e-6) and relative_rms(gradients, others) < 1e-5


def test_rows_are_isolated_from_padding_and_other_rows() -> None:
    model = adapted()
    with kernels.accelerated(model, attach.adapted_linear):
        losses = [step(model, dict(pad(rows()[:n], 0)))[0] for n in (1, 1)]
        assert losses[0] == losses[1]
        broken = flatten(rows()[:3])
        whole = model(**{name: broken[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.index_fill(1, torch.arange(40, 47), float("nan"))
        )
        changed = model(**{name: broken[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits
        hook.remove()
    assert changed[:, 40:47].isnan().all()
    assert torch.equal(whole[:, :40], changed[:, :40]) and torch.equal(whole[:, 47:], changed[:, 47:])


def test_attention_dropout_has_the_configured_probability() -> None:
    """Over many draws, the mean gradient matches that of stock attention, which differs from that without dropout."""
    model = adapted(changes={"attention_dropout": 0.4})
    batch = flatten(rows()[:2])

    def mean(draws: int = 60) -> Tensor:
        total = []
        for number in range(draws):
            inputs = dict(batch)
            labels = inputs.pop("labels")
            kernels.set_loss_targets(model, labels)
            torch.manual_seed(number)
            total.append(kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)[0].detach())
        return torch.stack(total)

    stock, (still, _) = mean(), step(model.eval(), batch)
    model.train()
    with kernels.accelerated(model, attach.adapted_linear):
        assert kernels.attends_by_rows(model)
        by_rows = mean()
    error = (stock.var() / 60 + by_rows.var() / 60).sqrt()
    assert by_rows.std() > 0 and abs(float(stock.mean() - by_rows.mean())) < 4 * float(error)
    assert 0.5 < float(by_rows.std() / stock.std()) < 2 and still > 0


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom, which has biases": ("bloom", {"n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_implementations_are_not_replaced(name: str) -> None:
    kind, changes = REFUSED[name]
    model = adapted(kind, targets=["query_key_value"] if kind == "bloom" else ["q_proj", "v_proj"], changes=changes)
    own = model.config._attn_implementation
    with kernels.accelerated(model, attach.adapted_linear):
        assert model.config._attn_implementation == own and not kernels.attends_by_rows(model)


def test_attention_is_restored_if_the_check_fails() -> None:
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    assert not rowwise.attend_by_rows(base, lambda: False) and base.config._attn_implementation == "sdpa"


def windows(sequence: int, head: int, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 300)


MASKS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[list[int], int | None] | None]] = {
    "causal": (lambda s, h, q, k: k <= q, {}, ([500], None)),
    "rows": (lambda s, h, q, k: (k <= q) & ((k < 200) == (q < 200)), {}, ([200, 300], None)),
    "a window": (windows, {"local_size": 300}, ([500], 300)),
    "chunks": (lambda s, h, q, k: (k <= q) & (k // 300 == q // 300), {"local_size": 300}, ([300, 200], 300)),
    "a window of another size": (windows, {"local_size": 301}, None),
    "a window that is not an argument": (windows, {}, None),
    "both ways": (lambda s, h, q, k: k >= 0 * q, {}, None),
    "both ways in a block": (lambda s, h, q, k: (k <= q) | (torch.minimum(q, k) > 400), {}, None),
    "a hole in the middle": (lambda s, h, q, k: (k <= q) & ((k != 7) | (q == 7)), {"length": 200}, None),
    "rows that differ": (lambda s, h, q, k: (k <= q) & ((k < 200 + s) == (q < 200 + s)), {"batch_size": 2}, None),
    "made one by one": (lambda s, h, q, k: k <= q, {"use_vmap": True}, None),
    "with an argument that is not known": (lambda s, h, q, k: k <= q, {"blocks": 4}, None),
    "with a cache": (lambda s, h, q, k: k <= q, {"kv_length": 600, "q_offset": 100}, None),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read_as_rows_only_if_they_are_equivalent(name: str) -> None:
    function, arguments, expected = MASKS[name]
    length = arguments.pop("length", 500)
    sizes = {"batch_size": 1, "q_length": length, "kv_length": length, "allow_is_causal_skip": False}
    row_mask = rowwise.mask(mask_function=function, **sizes | arguments)
    assert isinstance(row_mask, rowwise.RowMask) == (expected is not None)
    if expected is not None:
        assert (row_mask.lengths, row_mask.window) == expected
