"""Undocumented names of other libraries that kernels and the memory estimate use.

Each name is used only here, with the reason why no documented one is sufficient. tests/test_upstream_kernels.py fails
if a release removes one.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from transformers.integrations.liger import apply_liger_kernel as apply_liger_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.masking_utils import eager_mask as eager_mask
from transformers.masking_utils import sdpa_mask as sdpa_mask
from transformers.quantizers.base import get_keys_to_not_convert as get_keys_to_not_convert

# apply_liger_kernel: Liger's documented functions patch a class before a model is built; this one patches a model.
# sdpa_attention_forward, sdpa_mask, eager_mask: the stock attention and its masks. They are documented only as
# registered under the names "sdpa" and "eager", where others may have replaced them.
# FakeTensorMode, unset_fake_temporarily: operations on tensors without data, and one with data in between. torch
# documents them for authors of compilers, under these underscored names only.
# TorchDispatchMode: sees every operation, including the backward pass; module hooks see only calls of modules.
# tree_leaves: the tensors in the results of an operation.
# get_keys_to_not_convert: the modules that transformers does not quantize. The documented functions accept their names
# but do not return them.

FAKE_TENSOR_LOG = logging.getLogger(FakeTensorMode.__module__)
"""The logger to which torch logs an operation that fails without data, as an error."""


def attn_implementation(model: Any) -> str:
    """The attention implementation of a model. transformers documents how to set it, but not how to read it."""
    return str(model.config._attn_implementation)


def kept_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Part of the names of weights → the dtype that they keep in a model of another one. transformers documents only
    the attributes of classes that this depends on."""
    return dict(model._get_dtype_plan(dtype))


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a dtype but no data, as in the memory estimate.

    torch documents fake tensors for authors of compilers, under this underscored name only.
    """
    return isinstance(tensor, FakeTensor)


def storage_id(storage: torch.UntypedStorage) -> int:
    """The identity of a storage. The documented address of its data is the same for all fake tensors."""
    return int(storage._cdata)


def has_hooks(module: nn.Module, besides: type | None = None) -> bool:
    """Whether forward or backward hooks are registered with a module, other than methods of the class `besides`. torch
    documents only how they are registered."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(module, name).values()]
    return any(besides is None or not isinstance(getattr(hook, "__self__", None), besides) for hook in hooks)


def rotary_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that compute rotary angles from positions. transformers documents the parameters of a configuration,
    but not the modules, which keep its `rope_type`."""
    return [module for module in model.modules() if hasattr(module, "rope_type")]


def dropout(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Dropout, and the mask of kept values, which no documented function of torch returns.

    Both have the shape of x.
    """
    result, mask = torch.native_dropout(x, probability, True)
    return result, mask


def attend_to_rows(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention on a CPU, with the logarithms of the sums of exponentials, which no documented function returns.

    query, key, value: (rows, heads, length, size). Returns the same, and (rows, heads, length).
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result, totals = attend(query, key, value, is_causal=True, scale=scale)
    return result, totals


def attend_to_rows_backward(gradient: Tensor, *attended: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value.

    attended: the inputs and outputs of `attend_to_rows`.
    """
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    query, key, value = backward(gradient, *attended, 0.0, True, scale=scale)
    return query, key, value
