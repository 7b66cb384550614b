"""What loratune/kernels/upstream.py uses of other libraries still exists and behaves as expected."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    T5Config,
    T5ForConditionalGeneration,
)

from loratune.kernels import upstream


def test_attn_implementation() -> None:
    model = tiny_llama()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert upstream.attn_implementation(model) == name


def test_sdpa_attention_forward() -> None:
    assert AttentionInterface()["sdpa"] is upstream.sdpa_attention_forward


def test_sdpa_mask() -> None:
    assert AttentionMaskInterface()["sdpa"] is upstream.sdpa_mask
    mask = upstream.sdpa_mask(
        batch_size=1, q_length=3, kv_length=3, mask_function=lambda row, head, query, key: key <= query,
        allow_is_causal_skip=False,
    )  # fmt: skip
    assert torch.equal(mask, torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())


def test_attend_to_rows() -> None:
    """Compared with torch's documented attention and its gradients. Heads may share keys without a copy."""
    drawn = torch.Generator().manual_seed(0)
    query, gradient = (torch.randn(2, 3, 70, 8, generator=drawn) for _ in range(2))
    key, value = (torch.randn(2, 1, 70, 8, generator=drawn).expand(2, 3, 70, 8) for _ in range(2))
    tensors = [one.clone().requires_grad_() for one in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, scale=0.3)
    expected.backward(gradient)
    result, totals = upstream.attend_to_rows(query, key, value, 0.3)
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
    scores = (0.3 * query @ key.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    assert torch.allclose(result, expected, atol=1e-6) and torch.allclose(totals, scores.logsumexp(-1), atol=1e-5)
    gradients = upstream.attend_to_rows_backward(gradient, query, key, value, result, totals, scale=0.3)
    assert all(torch.allclose(one, x.grad, atol=1e-5) for one, x in zip(gradients, tensors, strict=True))


def test_apply_liger_kernel() -> None:
    """Liger is not installed here. The function must take a model and the selection of kernels."""
    assert [*inspect.signature(upstream.apply_liger_kernel).parameters] == ["model", "kernel_config"]


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre"],
)
def test_has_hooks(register: object) -> None:
    module = nn.Linear(2, 2)
    assert not upstream.has_hooks(module)
    hook = register(module)  # type: ignore[operator]
    assert upstream.has_hooks(module)
    assert upstream.has_hooks(module, besides=Hooks)
    hook.remove()
    assert not upstream.has_hooks(module)


class Hooks:
    def forward(self, *_: object) -> None:
        """A hook."""


def test_has_hooks_besides_those_of_a_class() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(Hooks().forward)
    assert upstream.has_hooks(module) and not upstream.has_hooks(module, besides=Hooks)


def test_rotary_embeddings() -> None:
    (found,) = upstream.rotary_embeddings(tiny_llama())
    positions = torch.arange(3)[None]
    cosine, sine = found(torch.zeros(1, 3, 32), position_ids=positions)
    assert "position_ids" in inspect.signature(found.forward).parameters and cosine.shape == sine.shape == (1, 3, 8)


def fakes() -> tuple[torch.Tensor, torch.Tensor]:
    with upstream.FakeTensorMode():
        return torch.empty(3), torch.empty(3)


def test_is_fake() -> None:
    first, _ = fakes()
    assert upstream.is_fake(first) and upstream.is_fake(nn.Parameter(first))
    assert not upstream.is_fake(torch.empty(3))


@pytest.mark.parametrize("make", [lambda: (torch.ones(3), torch.ones(3)), fakes], ids=["with data", "fake"])
def test_storage_id(make: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
    first, second = (tensor.untyped_storage() for tensor in make())
    tensor, _ = make()
    assert upstream.storage_id(tensor[1:].untyped_storage()) == upstream.storage_id(tensor.untyped_storage())
    assert upstream.storage_id(first) != upstream.storage_id(second)


def test_dropout() -> None:
    x = torch.randn(50, 50)
    result, mask = upstream.dropout(x, 0.25)
    assert mask.dtype == torch.bool and 0.6 < float(mask.float().mean()) < 0.9
    assert torch.allclose(result, x * mask / 0.75)


def test_fake_tensor_mode() -> None:
    with upstream.FakeTensorMode(allow_non_fake_inputs=True):
        product = torch.empty(1 << 20, 1 << 20) @ torch.ones(1 << 20, 3)
    assert product.shape == (1 << 20, 3)


def test_unset_fake_temporarily() -> None:
    with upstream.FakeTensorMode(), upstream.unset_fake_temporarily():
        assert torch.ones(3).nonzero().shape == (3, 1)


def test_fake_tensor_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation on missing data of a fake tensor is logged there, whether or not torch's loggers propagate."""
    monkeypatch.setattr(upstream.FAKE_TENSOR_LOG, "handlers", [caplog.handler])
    mode = upstream.FakeTensorMode()
    with mode:
        weight = torch.empty(2, 2)
    with mode, pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.empty(2, 3), weight)
    assert upstream.FAKE_TENSOR_LOG.name in {record.name for record in caplog.records}


def test_torch_dispatch_mode() -> None:
    """Operations of the backward pass are also observed."""
    names: list[str] = []

    class Recorder(upstream.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Recorder():
        y = x.exp()
        forward = len(names)
        y.sum().backward()
    assert "aten.exp.default" in names[:forward]
    assert "aten.mul.Tensor" in names[forward:]


def test_tree_leaves() -> None:
    assert upstream.tree_leaves((1, [2, {"key": 3}])) == [1, 2, 3]


def test_get_keys_to_not_convert() -> None:
    assert upstream.get_keys_to_not_convert(tiny_llama()) == ["lm_head"]


def test_kept_dtypes() -> None:
    """T5's wo is kept in float32 in half precision, and nothing of Llama."""
    with torch.device("meta"):
        kept = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, vocab_size=8))
        other = tiny_llama()
    assert upstream.kept_dtypes(kept, torch.float16) == {"wo": torch.float32}
    assert upstream.kept_dtypes(other, torch.float16) == upstream.kept_dtypes(kept, torch.float32) == {}
