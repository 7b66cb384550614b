"""What `loratune env --self-test` found on this machine, and thus what is not used here.

The results hold for a processor or GPU, and for the versions of the libraries and of loratune; other results are kept
beside them, as machines may share a home directory.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from loratune import __version__
from loratune.system import accelerator, environment
from loratune.system.kept_results import NOTHING_KEPT, KeptResults, elsewhere

PASSED, FAILED = "passed", "failed"
OPERATIONS = "compiled operations, {}"
"""The name of the check of the compiled operations in a dtype."""
PADDED, PACKED, SHARED = "padded rows, {}", "packed rows, {}", "sft with shared prefixes, {}"
"""Those of accelerated layers on rows that are put together in these ways, in a dtype."""
LAYERS = "accelerated layers, {}"
"""That of all kinds of accelerated layers, by their losses, gradients and logits, in a dtype."""
SHARED_ON_GPU, GENERATE, FLASH = "shared prefixes on a GPU", "generate", "FlashAttention 2"
LIGER, LIGER_FASTER = "Liger's kernels", "Liger's kernels: faster"
"""The name of the check of Liger's kernels; and what is kept as passed beside it where they were faster."""


def record(results: dict[str, str]) -> str:
    """Keep results of this machine: check → result. A failure is kept until its check passes. Returns why that is not
    possible, or an empty text."""
    kept = kept_here("self-test")
    known = kept.load()
    known |= {name: one for name, one in results.items() if one in (PASSED, FAILED) or known.get(name) != FAILED}
    problem = kept.store(known)
    _known.cache_clear()
    return problem


def turn_off(processes: Sequence[Sequence[str]]) -> None:
    """Count checks as failed in this process that failed in any process of a run. processes: the `failed` of each."""
    _known(elsewhere()).update(dict.fromkeys(chain(*processes), FAILED))


def failed() -> list[str]:
    """The names of the checks that failed on this machine; empty if it was not tested."""
    return [name for name, result in _known(elsewhere()).items() if result == FAILED]


def passed() -> list[str]:
    """The names of the checks that passed on this machine; empty if it was not tested."""
    return [name for name, result in _known(elsewhere()).items() if result == PASSED]


def refusal(*checks: str, dtype: Any = None) -> str:
    """That a check failed on this machine, as the rest of a sentence; empty if none did. dtype: that of the checks in
    torch, if there is one for each."""
    has_failed = any(check.format(str(dtype).removeprefix("torch.")) in failed() for check in checks)
    return "failed the self-test on this machine (loratune env --self-test repeats it)" if has_failed else ""


def attention(name: str | None) -> tuple[str | None, str]:
    """`model.attn_implementation` as it may be used on this machine, and the `refusal` if that is another."""
    failed = refusal(FLASH) if name == "flash_attention_2" else ""
    return None if failed else name, failed


@cache
def _known(_folder: Path | None) -> dict[str, Any]:
    return kept_here("self-test").load()


def kept_here(*parts: Any) -> KeptResults:
    """Results that hold on this machine, for these versions of the libraries and of loratune, and for `parts`, which
    are plain values. Nothing is kept if a package is installed without its metadata."""
    try:
        return KeptResults([_machine(), *parts])
    except importlib.metadata.PackageNotFoundError:
        return NOTHING_KEPT


@cache
def _machine() -> str:
    """A hash of what the results depend on."""
    names = ["torch", "transformers", "peft", "bitsandbytes", *(["liger-kernel"] if find_spec("liger_kernel") else [])]
    stack = [importlib.metadata.version(name) for name in names]
    parts = [environment.processor_name(), sorted(environment.features()), accelerator.names(), stack, __version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
