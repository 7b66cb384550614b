"""Runs what a GPU would run, without a GPU, to find what would wait for it, fail there, or waste its memory.

    make gpu-dry                                        # in an environment of its own, with torch for CUDA; minutes
    python scripts/gpu_dry.py [llama qwen3 ...]         # in this environment; only these families

Tensors have shapes and devices (`cuda:0`), but no data. Torch's autograd engine needs a real device, so the backward
pass calls one function after the other. For every family with layers in `checked_layers.json`, the accelerated model
in bfloat16, the loss and its gradient, the check of both, the optimizer and the scores of an evaluation run; for Llama,
all kinds of batches, objectives and quantizations.

It prints a table, and exits with 1 if there is anything that is not allowed:

- An operation between tensors on different devices, or any other error.
- More than one wait for the GPU in a step, and more than one for a batch that is scored. A value that is read back, an
  output whose shape depends on values, and a copy from memory that is not pinned all wait until the GPU has done all
  work before. Waits in code of transformers are counted and shown, but allowed.
- Tensors that are made on the CPU while the decoder runs, other than once a batch.
- Copies of activations in float32 that are kept for the backward pass, but for those of transformers' own layers.
"""

import copy
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from families import small
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from loratune import kernels
from loratune.compare.engine import SFT, Objective, WeightedObjective
from loratune.compare.objectives import Formula
from loratune.compare.preferences import PreferenceObjective
from loratune.config import LoraSection, ModelSection, PreferenceSection
from loratune.data.batches import flatten, pad, put_rows
from loratune.data.packing import share_prefixes
from loratune.errors import ModelError
from loratune.kernels import gpu
from loratune.kernels.upstream import (
    FAKE_TENSOR_LOG,
    FakeTensorMode,
    TorchDispatchMode,
    storage_id,
    tree_leaves,
    unset_fake_temporarily,
)
from loratune.lora import attach, creation
from loratune.model import load, upstream
from loratune.system.launcher import SINGLE_PROCESS
from loratune.training.callbacks import NonFiniteGuard
from loratune.training.checkpoints.store import StepLosses
from loratune.training.retention import RetentionTerm

DEVICE = torch.device("cuda", 0)
TABLE = Path(__file__).parent.parent / "tests" / "golden_kernels.txt"
LENGTHS = (40, 7, 1, 64)
"""Tokens of the rows."""
ONCE_A_BATCH = ("loratune/kernels/layout.py", "loratune/kernels/transfer.py", "loratune/kernels/gpu.py")
"""Code that computes on the CPU where rows begin, once a batch."""
aten = torch.ops.aten
UNKNOWN_SHAPE = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip
"""Operations whose results have shapes that depend on values."""
OUTLIERS = "bitsandbytes::int8_vectorwise_quant"
"""With a threshold, it finds the columns with outliers, whose number is a shape."""

MIXED_PRODUCT = "bitsandbytes::int8_mixed_scaled_mm"
"""The product with a weight in 8 bit, with the columns with outliers apart."""


def place() -> str:
    """Where the innermost code of loratune or of a library on top of torch is that runs now: file and line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for root in ("/loratune/", "/transformers/", "/peft/", "/bitsandbytes/"):
            if root in name and not name.endswith("gpu_dry.py"):
                return f"{root[1:]}{name.rpartition(root)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "scripts/gpu_dry.py"


class DryRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations of fake tensors on a GPU, and real ones on the CPU, and notes what happens where.

    Attributes:
        waits: Places where code waits for the GPU.
        on_cpu: Places that make tensors on the CPU while `inside`.
        inside: Whether the decoder runs.
    """

    def __init__(self, wide: int) -> None:
        """wide: the elements from which on a tensor has the size of activations."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.on_cpu: list[str] = []
        self.inside, self._wide, self._floats = False, wide, dict[int, str]()

    @property
    def floats(self) -> list[str]:
        """Places that made tensors in float32, of the size of activations, that exist now; without logits."""
        return [one for one in self._floats.values() if not one.startswith("loratune/kernels/loss.py")]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        given = kwargs.get("device")
        to_gpu = given is not None and torch.device(given).type == "cuda"
        if not to_gpu and not any(one.device.type == "cuda" for one in tensors):
            if self.inside and not place().startswith(ONCE_A_BATCH):
                self.on_cpu.append(place())
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = self._on_gpu(func, args, kwargs, tensors)
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.dtype == torch.float32 and one.numel() >= self._wide:
                self._note(one.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage_id(storage)
        if key not in self._floats:
            self._floats[key] = place()
            weakref.finalize(storage, self._floats.pop, key, "")

    def _on_gpu(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        name, first = func.name().partition(".")[0], tensors[0] if tensors else None
        if name == "aten::_local_scalar_dense":
            self._wait()
            return True if first.dtype == torch.bool else 1 if not first.is_floating_point() else 1.0  # type: ignore[union-attr]
        if name == "aten::equal":
            self._wait()
            return True
        if name == OUTLIERS and len(args) > 1 and args[1]:
            self._wait()
            return (*func(args[0], 0.0)[:2], torch.empty(2, dtype=torch.int64, device=DEVICE))
        if name == MIXED_PRODUCT:
            states, weight = args[0], args[2]
            product = torch.empty(*states.shape[:-1], len(weight), dtype=states.dtype, device=DEVICE)
            return product, torch.empty(len(states), 2, dtype=states.dtype, device=DEVICE)
        if name in UNKNOWN_SHAPE and not kwargs.get("output_size"):
            self._wait()
            if name == "aten::nonzero":
                return torch.empty(min(4, first.numel()), first.dim(), dtype=torch.int64, device=DEVICE)  # type: ignore[union-attr]
        if name == "aten::index" and any(one is not None and one.dtype == torch.bool for one in args[1]):
            self._wait()
            args = (args[0], [part for one in args[1] for part in _indices(one)])
        if name in ("aten::_to_copy", "aten::copy_"):
            return self._copy(func, args, kwargs)
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        source = args[-1] if func.name().startswith("aten::copy_") else args[0]
        given = kwargs.get("device")
        target = args[0].device if func.name().startswith("aten::copy_") else torch.device(given or source.device)
        if source.device.type != target.type and not (target.type == "cuda" and kwargs.get("non_blocking")):
            self._wait()
        if target.type == "cpu":
            with unset_fake_temporarily():
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)

    def _wait(self) -> None:
        if not self.waits or self.waits[-1] != place():  # a list is read value by value
            self.waits.append(place())


def _indices(mask: Tensor | None) -> Sequence[Tensor | None]:
    """A mask as indices of all of its elements."""
    if mask is None or mask.dtype != torch.bool:
        return [mask]
    return [torch.empty(mask.numel(), dtype=torch.int64, device=DEVICE) for _ in range(mask.dim())]


def backward(loss: Tensor) -> None:
    """The backward pass without torch's engine: gradients are added to `grad`."""
    order: list[Any] = []
    seen, stack = set[Any](), [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(one, False) for one, _ in node.next_functions]
    given: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            gradients = given.pop(node, {})
            if hasattr(node, "variable"):
                for value in gradients.values():
                    own = node.variable
                    own.grad = value if own.grad is None else own.grad + value
                continue
            values = [gradients.get(number) for number in range(len(node._input_metadata))]
            found = (node.apply if hasattr(node, "apply") else node)(*values) if gradients else ()
            found = found if isinstance(found, tuple) else (found,)
            for (following, number), value in zip(node.next_functions, found, strict=False):
                if following is not None and value is not None:
                    wanted, own = following._input_metadata[number], given.setdefault(following, {})
                    value = value.sum_to_size(wanted.shape).to(wanted.dtype)  # as the engine does
                    own[number] = own[number] + value if number in own else value


class DryCheck:
    """In place of `ParityCheck`: whether a forward pass over packed rows raises no error. There are no values."""

    runs = True

    def __init__(self, base: Any) -> None:
        self._base = base

    def passes(self) -> bool:
        """Run the decoder."""
        positions = torch.cat([torch.arange(length, device=DEVICE) for length in LENGTHS])[None]
        try:
            with torch.no_grad():
                self._base.get_decoder()(torch.ones_like(positions), position_ids=positions, use_cache=False)
        except (KeyError, TypeError, ValueError):  # of an attention function
            return False
        return True


def on_gpu(model: Any, fake: Any) -> Any:
    """A copy of a `PeftModel` whose tensors are fake and on the GPU; the base is in bfloat16."""

    def empty(one: Tensor, dtype: torch.dtype) -> Tensor:
        with fake:
            return torch.empty(one.shape, dtype=dtype, device=DEVICE)

    memo: dict[int, Any] = {}
    for name, one in model.named_parameters():
        is_base = one.dtype == torch.float32 and "lora_" not in name
        memo[id(one)] = nn.Parameter(empty(one, torch.bfloat16 if is_base else one.dtype), one.requires_grad)
        for attribute in ("CB", "SCB"):
            if getattr(one, attribute, None) is not None:
                value = getattr(one, attribute)
                setattr(memo[id(one)], attribute, empty(value, value.dtype))
        if upstream.is_4bit(one):
            state = copy.copy(one.quant_state)
            state.absmax, state.code = (empty(part, part.dtype) for part in (state.absmax, state.code))
            if state.nested:
                state.offset = empty(state.offset, state.offset.dtype)
                state.state2 = copy.copy(state.state2)
                state.state2.absmax, state.state2.code = (
                    empty(part, part.dtype) for part in (state.state2.absmax, state.state2.code)
                )
            memo[id(one)].quant_state = state
    memo |= {id(one): empty(one, one.dtype) for one in model.buffers()}
    return copy.deepcopy(model, memo).train()


# What is run


def rows() -> list[dict[str, Any]]:
    """Rows whose first half is not supervised."""
    return [
        {"input_ids": ids, "labels": [-100 if at < len(ids) // 2 else one for at, one in enumerate(ids)]}
        for ids in ([8 + (at * 7) % 200 for at in range(length)] for length in LENGTHS)
    ]


def text() -> dict[str, Any]:
    """A row that a teacher has predicted."""
    ids, count = [*range(8, 40)], 31
    predicted = np.zeros((count, 5), np.int64), np.full((count, 5), -2.0, np.float32)
    return {"input_ids": ids, "labels": [-100] * len(ids), "teacher": (0, *predicted)}


def compared() -> list[dict[str, Any]]:
    """Chosen and rejected answers in turn."""
    return [row | {"side": side, "reference": -3.0} for row, side in zip(rows(), (1, -1, 1, -1), strict=True)]


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        name: What it is, for the table.
        model: Makes a model with an adapter, on the CPU.
        put: Collates rows.
        rows: Makes the rows.
        objective: Makes the objective.
        allowed: Waits in a step beside the one that is always allowed, and why.
        trees: Whether rows share prefixes.
    """

    name: str
    model: Callable[[], Any]
    put: Callable[..., Any] = flatten
    rows: Callable[[], list[dict[str, Any]]] = rows
    objective: Callable[[], Objective] = lambda: SFT
    trees: bool = False


@dataclass
class Line:
    """A line of the table."""

    name: str
    layers: str = ""
    waits: list[str] = field(default_factory=list)
    scoring: list[str] = field(default_factory=list)
    on_cpu: list[str] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def problems(self) -> list[str]:
        """What is not allowed."""
        found = [self.error] if self.error else []
        found += [f"waits in a step: {', '.join(own)}"] if len(own := _own(self.waits)) > 1 else []
        found += [f"waits in scoring: {', '.join(own)}"] if len(own := _own(self.scoring)) > 1 else []
        found += [f"made on the CPU: {_counted(own)}"] if (own := _own(self.on_cpu)) else []
        found += [f"float32 is kept: {_counted(own)}"] if (own := _own(self.floats)) else []
        return found

    def cells(self) -> list[str]:
        """The cells."""
        counts = [f"{len(_own(one))} + {len(one) - len(_own(one))}" for one in (self.waits, self.scoring)]
        others = [f"{len(_own(one))} + {len(one) - len(_own(one))}" for one in (self.on_cpu, self.floats)]
        return [self.name, self.layers, *counts, *others, "; ".join(self.problems) or "ok"]


def _own(places: Sequence[str]) -> list[str]:
    """Those in loratune."""
    return [one for one in places if one.startswith(("loratune/", "scripts/"))]


def _counted(places: Sequence[str]) -> str:
    return ", ".join(f"{one} ({count})" for one, count in Counter(places).items())


def run(case: Case) -> Line:
    """Run a case."""
    line = Line(case.name)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    batch, dry = put_rows(case.put, case.rows()), DryRun(1 << 60)
    try:
        real = case.model()
        dry = DryRun(batch["input_ids"].numel() * real.get_input_embeddings().weight.shape[1])
        model = on_gpu(real, fake)
        with fake, dry:
            acceleration = kernels.accelerate(model, attach.adapted_linear, trees=case.trees)
            with acceleration.applied(model):
                line.layers = _layers(model, acceleration)
                dry.waits.clear()
                _step(dry, model, case, batch, line)
                dry.waits.clear()
                with torch.no_grad():
                    case.objective().scores(model, {name: one for name, one in batch.items() if name != "teacher"})
                line.scoring = [*dry.waits]
    except ModelError as error:
        line.layers = f"no adapter: {error.problems[0].what[:60]}"
    except Exception as error:
        where = place_of(error)
        if dry.waits and "loratune" not in where:  # it has read values, which are all 1
            line.layers = f"ends in code of a library that depends on values, {where}"
        else:
            line.error = f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:160]}"
    return line


def place_of(error: BaseException) -> str:
    """Where an error was raised: the innermost place outside of torch and of this script."""
    trace, found = error.__traceback__, "scripts/gpu_dry.py"
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if any(root in name for root in ("/loratune/", "/transformers/", "/peft/", "/bitsandbytes/")):
            found = f"{'/'.join(Path(name).parts[-3:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _layers(model: Any, acceleration: Any) -> str:
    """What is accelerated, with numbers."""
    modules = [*model.modules()]
    patched = [type(one).__name__ for one in modules if "forward" in vars(one)]
    norms = sum("norm" in name.lower() for name in patched)
    counts = {
        "LoRA": len(patched) - norms,
        "norms": norms + sum(type(one).__name__ == "FastNorm" for one in modules),
        "attention": int(kernels.attends_by_rows(model)),
        "loss": int(isinstance(model.get_output_embeddings(), kernels.LossHead)),
    }
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items() if count)


def _step(dry: DryRun, model: Any, case: Case, batch: dict[str, Any], line: Line) -> None:
    """An optimizer step as the trainer takes it."""
    decoder, objective = model.get_base_model().get_decoder(), case.objective()
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: setattr(dry, "inside", True)),
        decoder.register_forward_hook(lambda *_: setattr(dry, "inside", False)),
    ]
    guard = NonFiniteGuard(None, SINGLE_PROCESS, StepLosses(), objective)  # type: ignore[arg-type]
    trained = [one for one in model.parameters() if one.requires_grad]
    guard.norm = lambda: kernels.global_norm([one.grad for one in trained if one.grad is not None])
    optimizer = torch.optim.AdamW(trained, foreach=True)
    count = objective.begin_step(model, [batch], (batch["labels"][:, 1:] >= 0).sum(), SINGLE_PROCESS)
    if "teacher" in batch:
        guard.retention = RetentionTerm(SimpleNamespace(weight=1.0), SINGLE_PROCESS, StepLosses())  # type: ignore[arg-type]
        guard.retention.begin_step([batch], applies=bool(count != 0))
    prepared = kernels.to_device(batch, DEVICE)
    objective.set_loss_targets(model, prepared)
    if guard.retention is not None:
        guard.retention.set_teacher(model, prepared)
    labels = prepared.pop("labels")
    loss = guard.loss(model, model(**prepared, use_cache=False), labels, count)
    line.floats, line.on_cpu = dry.floats, [*dry.on_cpu]
    for hook in hooks:
        hook.remove()
    backward(loss)
    guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=1, num_input_tokens_seen=0), None)
    optimizer.step()
    line.waits = [*dry.waits]


def adapted(base: Any) -> Any:
    """A base with an adapter on all linear layers."""
    return creation.adapt(base, LoraSection(r=4, target_modules="all-linear"), seed=0)[0]


def family(name: str) -> Any:
    """A small model of a family with an adapter, made as from a file in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        base = small(name)
    finally:
        torch.set_default_dtype(torch.float32)
    return adapted(base)


LLAMA = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    """A Llama with an adapter."""
    return adapted(LlamaForCausalLM(LlamaConfig(**LLAMA)))


def quantized(bits: str) -> Any:
    """A Llama that bitsandbytes has quantized, with an adapter."""
    with TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
        section = ModelSection(name_or_path=folder, quantization=bits, dtype="bfloat16")  # type: ignore[arg-type]
        return adapted(load.load_base(section))


def cases(chosen: Sequence[str]) -> Iterator[Case]:
    """The families, then what only Llama runs. chosen: the families; all if none."""
    lines = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines()]
    listed = [name for name, dtype, parts, *_ in lines if dtype == "float32" and any(
        kind in parts for kind in ("attention", "feed-forward", "norms")
    )]  # fmt: skip
    for name in chosen or listed:
        yield Case(name, partial(family, name))
    if chosen:
        return
    yield Case("llama, padded rows", llama, put=partial(pad, pad_id=0))
    yield Case("llama, retention", llama, rows=lambda: [*rows(), text()])
    yield Case("llama, weights of prompts", llama, rows=_weighted, objective=lambda: WeightedObjective(0.5))
    for name in ("dpo", "orpo", "simpo"):
        formula = Formula.of(name, PreferenceSection())
        yield Case(f"llama, {name}", llama, rows=compared, objective=partial(PreferenceObjective, formula, {}))
    yield Case("llama, shared prefixes", llama, put=share_prefixes, trees=True)
    yield Case("llama, 8bit", partial(quantized, "8bit"))
    yield Case("llama, 4bit", partial(quantized, "4bit"))


def _weighted() -> list[dict[str, Any]]:
    return [row | {"weights": [1.0] * len(row["labels"])} for row in rows()]


@contextmanager
def without_a_device() -> Iterator[None]:
    """Inside, torch takes the device for an H100; and as FlexAttention cannot be compiled without a device, its block
    masks are made, and something with the same shape stands in for it."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: Any, enable_gqa: bool) -> Tensor:
        assert block_mask.kv_num_blocks.device == query.device and scale
        return query + (key if enable_gqa else key * 1).mean() + value.mean()

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(gpu, "_flex_attention", lambda: attend))
        patches.enter_context(mock.patch.object(gpu, "ParityCheck", DryCheck))
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        yield


def main(chosen: Sequence[str]) -> int:
    """Run everything, print the table, and return the exit code."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    FAKE_TENSOR_LOG.disabled = True
    print(f"torch {torch.__version__}, transformers {transformers.__version__}. Numbers: in loratune + in libraries")
    print(" | ".join(["what", "accelerated", "waits", "waits, scoring", "on the CPU", "float32", "result"]), flush=True)
    failed = 0
    with without_a_device():
        for case in cases(chosen):
            line = run(case)
            failed += bool(line.problems)
            print(" | ".join(line.cells()), flush=True)
    print(f"{failed} failed" if failed else "all as it should be")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
