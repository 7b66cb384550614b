"""What this package uses of other libraries although their documentation does not mention it.

Each such name stands here once, with the reason why no documented one serves. tests/test_upstream_memory.py names those
that a release takes away.
"""

import logging

from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from transformers.quantizers.base import get_keys_to_not_convert as get_keys_to_not_convert

# FakeTensorMode, unset_fake_temporarily: operations on tensors without data, and one with data in between. torch
# documents them for authors of compilers, under these underscored names only.
# TorchDispatchMode: sees every operation, those of the backward included; hooks of modules see only calls of modules.
# tree_leaves: the tensors in the results of an operation.
# get_keys_to_not_convert: the modules that transformers leaves out when it quantizes a model. What is documented takes
# their names and does not return them.

FAKE_TENSOR_LOG = logging.getLogger(FakeTensorMode.__module__)
"""Where torch logs an operation that fails without data, as an error of its own."""
