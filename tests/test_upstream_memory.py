"""What loratune/memory/upstream.py uses of other libraries is still there, and still means what it did."""

from typing import Any

import pytest
import torch
from conftest import tiny_llama

from loratune.memory import upstream


def test_fake_tensor_mode() -> None:
    with upstream.FakeTensorMode(allow_non_fake_inputs=True):
        product = torch.empty(1 << 20, 1 << 20) @ torch.ones(1 << 20, 3)
    assert product.shape == (1 << 20, 3)


def test_unset_fake_temporarily() -> None:
    with upstream.FakeTensorMode(), upstream.unset_fake_temporarily():
        assert torch.ones(3).nonzero().shape == (3, 1)


def test_fake_tensor_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation on data that a fake tensor lacks is logged there, whether torch's loggers propagate or not."""
    monkeypatch.setattr(upstream.FAKE_TENSOR_LOG, "handlers", [caplog.handler])
    mode = upstream.FakeTensorMode()
    with mode:
        weight = torch.empty(2, 2)
    with mode, pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.empty(2, 3), weight)
    assert upstream.FAKE_TENSOR_LOG.name in {record.name for record in caplog.records}


def test_torch_dispatch_mode() -> None:
    """Operations of the backward are seen, too."""
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
