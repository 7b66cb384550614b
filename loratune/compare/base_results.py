"""What a base computes by itself, on texts that are not those of a run: computed once on a machine, and kept there."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from loratune import kernels
from loratune.compare.engine import Copies, Engine
from loratune.compare.metrics import RowLosses
from loratune.data import TokenizedDataset
from loratune.data.token_cache import ROWS
from loratune.kernels.upstream import attn_implementation
from loratune.system import accelerator, environment, release
from loratune.system.cache import EntryKind, source_digest
from loratune.system.launcher import SINGLE_PROCESS, Group

COMPUTING_PACKAGES = ("loratune", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""The packages that affect computations. Others only read data, which has fingerprints."""

NUMBERS = EntryKind(ROWS.place, ".values", days=30, most=10_000)
"""Numbers of a base, as many as it has rows or tokens, and thus beside tokenized rows in the cache."""

Numbers = NDArray[np.float64]
Base = Callable[[], AbstractContextManager[None]]
"""Returns a context in which a model computes as its base."""


def conditions(model: PreTrainedModel, fallbacks: Iterable[str]) -> dict[str, str]:
    """The software and hardware that a model is computed with. Any of it may change the last bits of a result.

    Args:
        model: The model on the device on which it is computed.
        fallbacks: The kinds of layers that are not accelerated, see `kernels.Acceleration`.

    Returns:
        Names and values. Both are shown to the user: "NAME was VALUE up to step 5, and is VALUE from there".
    """
    on_gpu = model.device.type in accelerator.USED
    return {
        **release.versions(COMPUTING_PACKAGES),
        "the processor": environment.processor_name() or platform.processor() or platform.machine(),
        "the device": accelerator.name(model.device) if on_gpu else model.device.type,
        "the number of threads": str(torch.get_num_threads()),
        "the compiled CPU code": kernels.variant(model.get_input_embeddings().weight),
        "what PyTorch computes instead of fast code": ", ".join(fallbacks) or "nothing",
    }


@dataclass(frozen=True)
class BaseResults:
    """The results of the base of an adapter, from the cache if they are in it.

    Attributes:
        engine: Computes the model, whose adapter is active.
        alone: See `Base`.
        identity: What decides the results beside the texts, as plain values; None: they are not kept.
        group: The processes that compute results alike, beside losses: all if weights are sharded, or this one alone.
    """

    engine: Engine
    alone: Base
    identity: Mapping[str, Any] | None
    group: Group = SINGLE_PROCESS

    @classmethod
    def of(cls, engine: Engine, alone: Base, fingerprint: str, group: Group = SINGLE_PROCESS) -> "BaseResults":
        """The results of the base with a fingerprint; if that is empty, they are not kept."""
        with engine.acceleration.applied(engine.model) as layers:  # fewer for DoRA, for example
            accelerated = [attn_implementation(engine.model), *layers]
        identity = {
            "base": fingerprint, "conditions": conditions(engine.model, engine.acceleration.fallbacks),
            "source": source_digest(), "computed by": engine.computed_by, "writes padded": engine.writes_padded,
            "attention": attn_implementation(engine.model), "accelerated": accelerated,
        }  # fmt: skip
        return cls(engine, alone, identity if fingerprint else None, group)

    def once(self, about: Any, compute: Callable[[], Numbers]) -> Numbers:
        """Numbers that a function computes within `alone`. about: what else decides them, as plain values."""

        def as_base() -> Numbers:
            with self.alone():
                return compute()

        return as_base() if self.identity is None else kept([about, dict(self.identity)], as_base, self.group)

    def losses(self, rows: TokenizedDataset, copies: Copies) -> RowLosses:
        """The losses of some rows, whose batches all processes share. copies: see `ScoringPass`."""
        planned = self.engine.plan(rows, copies)
        batches = [[*map(int, batch)] for batch in planned.batches]
        times = [(number, float(count)) for number, count in copies.items()]
        about = ["losses", rows.rows.fingerprint, times, batches, planned.layout.saved is not None]

        def compute() -> Numbers:
            found = self.engine.losses(rows, copies)
            return np.concatenate([found.nats, found.tokens, found.copies])

        return RowLosses(*np.split(replace(self, group=self.engine.group).once(about, compute), 3))


def kept(about: Any, compute: Callable[[], Numbers], group: Group = SINGLE_PROCESS) -> Numbers:
    """Numbers from the cache, or else from a function; they are kept if all are finite.

    Args:
        about: What decides them, as plain values.
        compute: Computes them. All processes of the group call it, or none.
        group: The processes, of which the main one reads and writes.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    known = NUMBERS.read(key) if group.main else None
    if (values := group.broadcast(None if known is None else np.frombuffer(known, np.float64).tolist())) is not None:
        return np.array(values, np.float64)
    found = compute()
    if group.main and np.isfinite(found).all():
        NUMBERS.write(key, found.tobytes())
    return found
