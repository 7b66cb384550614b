"""Runs what a GPU would run, without a GPU, to find what would wait for it, fail there, or waste its memory.

    make gpu-dry                                        # in an environment of its own, with torch for CUDA; minutes
    python scripts/gpu_dry.py [llama qwen3 ...]         # in this environment; only these families
    python scripts/gpu_dry.py liger                     # only Liger's kernels; needs liger-kernel and torch for CUDA

Tensors have shapes and devices (`cuda:0`), but no data. Torch's autograd engine needs a real device, so the backward
pass calls one function after the other. For every family with accelerated layers, the accelerated model
in bfloat16, the loss and its gradient, the check of both, the optimizer and the scores of an evaluation run; for Llama,
all kinds of batches, objectives and quantizations.

It prints a table, and exits with 1 if there is anything that is not allowed:

- An operation between tensors on different devices, or any other error.
- More than one wait for the GPU in a step, and more than one for a batch that is scored. A value that is read back, an
  output whose shape depends on values, and a copy from memory that is not pinned all wait until the GPU has done all
  work before. Waits in code of transformers are counted and shown, but allowed.
- Tensors that are made on the CPU while the decoder runs, other than once a batch.
- Copies of activations in float32 that are kept for the backward pass, but for those of transformers' own layers.
- A kernel of Liger that Triton cannot compile for one of `GPUS` at the widths of real models, forward and backward, or
  that computes something else than the layer of transformers, in Triton's interpreter. The interpreter cannot multiply
  in bfloat16, so float16 stands for it there.
"""

import copy
import os
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
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
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from loratune import kernels
from loratune.compare.engine import SFT, Objective, WeightedObjective
from loratune.compare.objectives import Formula
from loratune.compare.preferences import PreferenceObjective
from loratune.config import LoraSection, ModelSection, PreferenceSection
from loratune.data.batches import flatten, pad, put_rows
from loratune.data.packing import share_prefixes
from loratune.errors import ModelError
from loratune.kernels import gpu
from loratune.kernels.parity_check import relative_rms
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
from loratune.training.callbacks import StepLoss
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

LIGER = "liger"
"""The argument with which only Liger's kernels are tried."""
GPUS = {80: "ampere_ada", 90: "hopper", 100: "blackwell"}
"""Compute capability (A100, H100, B200) → its name in Liger, which has other kernels for some."""
WIDTHS = {
    "SmolLM2-135M": (576, 1536, 9, 3, 64), "Llama-3.2-1B": (2048, 8192, 32, 8, 64),
    "Qwen3-4B": (2560, 9728, 32, 8, 128), "Llama-3.1-8B": (4096, 14336, 32, 8, 128),
    "Gemma-7B": (3072, 24576, 16, 16, 256), "Llama-3.1-70B": (8192, 28672, 64, 8, 128),
}  # fmt: skip
"""Model → hidden size, size of the feed-forward layers, heads, heads of keys, size of a head."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
"""The largest relative difference of Liger's kernels from transformers' layers."""


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
    methods = {one: str(vars(one)["forward"].__module__) for one in modules if "forward" in vars(one)}
    patched = [type(one).__name__ for one, module in methods.items() if not module.startswith("liger")]
    norms = sum("norm" in name.lower() for name in patched)
    counts = {
        "LoRA": len(patched) - norms,
        "norms": norms + sum(type(one).__name__ == "FastNorm" for one in modules),
        "attention": int(kernels.attends_by_rows(model)),
        "loss": int(isinstance(model.get_output_embeddings(), kernels.LossHead)),
        "of Liger": len(methods) - len(patched),
    }
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items() if count)


def _step(dry: DryRun, model: Any, case: Case, batch: dict[str, Any], line: Line) -> None:
    """An optimizer step as the trainer takes it."""
    decoder, objective = model.get_base_model().get_decoder(), case.objective()
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: setattr(dry, "inside", True)),
        decoder.register_forward_hook(lambda *_: setattr(dry, "inside", False)),
    ]
    guard = StepLoss(None, SINGLE_PROCESS, StepLosses(), objective)  # type: ignore[arg-type]
    trained = [one for one in model.parameters() if one.requires_grad]
    guard.norm = lambda: kernels.global_norm([one.grad for one in trained if one.grad is not None])
    optimizer = torch.optim.AdamW(trained, foreach=True)
    count = objective.begin_step(model, [batch], (batch["labels"][:, 1:] >= 0).sum(), SINGLE_PROCESS)
    if "teacher" in batch:
        guard.retention = RetentionTerm(SINGLE_PROCESS, StepLosses())
        guard.retention.begin_step([batch], float(count != 0))
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


# Liger's kernels


class Driver:
    """In place of Triton's driver, which needs a GPU: kernels are compiled for one with this compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        """The GPU that is compiled for."""
        return import_module("triton.backends.compiler").GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device."""
        return self._capability

    def get_current_stream(self, _device: int) -> int:
        """The stream, which nothing is launched on."""
        return 0


@dataclass(frozen=True)
class Layers:
    """Functions that Liger has kernels for: RMS norms without and with 1 added, rotary embeddings, and the gate."""

    norms: Sequence[Callable[[Tensor, Tensor], Tensor]]
    rope: Callable[..., tuple[Tensor, Tensor]] = apply_rotary_pos_emb
    gate: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: functional.silu(gate) * up

    def compute(self, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """The results for five tokens, and the gradients of all inputs but the weights of norms, which are frozen.

        sizes: see `WIDTHS`.
        """
        hidden, inner, heads, groups, size = sizes
        shapes = (1, 5, hidden), (1, 5, heads, size), (1, 5, groups, size), (1, 5, inner), (1, 5, inner)
        drawn = torch.Generator().manual_seed(0)
        angles = torch.randn(1, 5, size // 2, generator=drawn).repeat(1, 1, 2)
        weight = torch.randn(hidden, generator=drawn).to(dtype)
        inputs = [torch.randn(*shape, generator=drawn).to(dtype).requires_grad_() for shape in shapes]
        states, query, key, gate, up = inputs
        turned = self.rope(query.transpose(1, 2), key.transpose(1, 2), angles.cos().to(dtype), angles.sin().to(dtype))
        outputs = [*(norm(states, weight) for norm in self.norms), *turned, self.gate(gate, up)]
        gradients = [torch.randn(one.shape, generator=drawn).to(dtype) for one in outputs]
        return [*(one.detach() for one in outputs), *torch.autograd.grad(outputs, inputs, gradients)]


def layers_of_transformers() -> Layers:
    """Those that Liger replaces."""

    def norm(kind: Any, states: Tensor, weight: Tensor) -> Tensor:
        layer = kind(len(weight), 1e-5)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        result: Tensor = layer(states)
        return result

    return Layers([partial(norm, LlamaRMSNorm), partial(norm, GemmaRMSNorm)])


def layers_of_liger() -> Layers:
    """Liger's own, with the arguments that it uses in Llama and in Gemma 2."""
    ops = import_module("liger_kernel.ops")

    def norm(states: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        result: Tensor = ops.LigerRMSNormFunction.apply(states, weight, 1e-5, *settings, None)
        return result

    norms = [lambda *given: norm(*given, 0.0, "llama", True), lambda *given: norm(*given, 1.0, "gemma", False)]
    return Layers(norms, ops.LigerRopeFunction.apply, ops.LigerSiLUMulFunction.apply)


def compile_liger() -> str:
    """Compile Liger's kernels for all of `GPUS`, without launching them. Returns what was compiled."""
    jit, own = import_module("triton.runtime.jit"), import_module("triton.runtime.jit").JITFunction.run
    names, made = set[str](), set[str]()

    def run(function: Any, *given: Any, **named: Any) -> None:
        kernel = own(function, *given, **named | {"warmup": True})
        names.add(kernel.name)
        made.update([kernel.hash] * bool(kernel.asm["cubin"]))

    with mock.patch.object(jit.JITFunction, "run", run):
        for capability, name in GPUS.items():
            jit.driver.set_active(Driver(capability))
            with mock.patch("liger_kernel.ops.swiglu.infer_device_arch", return_value=name):
                for sizes, dtype in product(WIDTHS.values(), (torch.float32, torch.bfloat16)):
                    layers_of_liger().compute(sizes, dtype)
    jit.driver.set_active(None)
    targets = ", ".join(f"sm_{capability}" for capability in GPUS)
    return f"{len(names)} kernels compiled for {targets} and {len(WIDTHS)} models: {len(made)} binaries"


def liger_in_interpreter() -> int:
    """Compare Liger's kernels with transformers' layers in Triton's interpreter. Returns the exit code."""
    language, interpreter, norms = (
        import_module(name) for name in ("triton.language", "triton.runtime.interpreter", "liger_kernel.ops.rms_norm")
    )
    own = vars(interpreter)["_implicit_cvt"]

    def convert(value: Any) -> Any:
        """An argument; compiled kernels get numbers in float32, the interpreter leaves them as Python's."""
        if not isinstance(value, float):
            return own(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), language.float32)
        return language.tensor(handle, language.float32)

    vars(interpreter)["_implicit_cvt"] = convert
    vars(norms)["rsqrt"] = lambda x: language.math.rsqrt(x)  # instead of that of libdevice
    worst, both = dict.fromkeys(TOLERANCE, 0.0), (layers_of_transformers(), layers_of_liger())
    for sizes, dtype in product(WIDTHS.values(), TOLERANCE):
        pairs = zip(*(layers.compute(sizes, dtype) for layers in both), strict=True)
        worst[dtype] = float(np.max([worst[dtype], *(relative_rms(*pair) for pair in pairs)]))  # also if it is NaN
    found = ", ".join(f"{worst[dtype]:.1e} in {str(dtype).removeprefix('torch.')}" for dtype in worst)
    wrong = not all(worst[dtype] <= allowed for dtype, allowed in TOLERANCE.items())
    print(f"liger, numbers | largest difference from transformers' layers {found} | {'WRONG' if wrong else 'ok'}")
    return int(wrong)


def liger() -> int:
    """Try Liger's kernels, and print a line for each way. Returns how many failed."""
    try:
        print(f"liger, compiled | {compile_liger()} | ok", flush=True)
        failed = 0
    except Exception as error:
        print(f"liger, compiled | {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        failed = 1
    command = [sys.executable, "-W", "ignore", __file__, LIGER]
    return failed + bool(subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode)


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


def with_liger() -> Any:
    """A Llama with an adapter and Liger's kernels. Later ones have its rotary embeddings as well."""
    kernels.use_liger(model := llama())
    return model


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
    if find_spec("liger_kernel"):
        yield Case("llama, Liger", with_liger)


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
        if find_spec("liger_kernel"):  # its kernels are not launched
            jit, properties = import_module("triton.runtime.jit"), SimpleNamespace(multi_processor_count=132)
            patches.enter_context(mock.patch.object(jit.JITFunction, "run", lambda *_, **__: None))
            patches.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
            patches.enter_context(mock.patch.object(torch.cuda, "device", nullcontext))
        patches.enter_context(mock.patch.object(gpu, "_flex_attention", lambda: attend))
        patches.enter_context(mock.patch.object(gpu, "ParityCheck", DryCheck))
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        yield


def main(chosen: Sequence[str]) -> int:
    """Run everything, print the table, and return the exit code."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    FAKE_TENSOR_LOG.disabled = True
    if chosen == [LIGER]:
        return liger_in_interpreter() if os.environ.get("TRITON_INTERPRET") == "1" else int(liger() > 0)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}. Numbers: in loratune + in libraries")
    print(" | ".join(["what", "accelerated", "waits", "waits, scoring", "on the CPU", "float32", "result"]), flush=True)
    failed = 0
    with without_a_device():
        for case in cases(chosen):
            line = run(case)
            failed += bool(line.problems)
            print(" | ".join(line.cells()), flush=True)
    failed += liger() if not chosen else 0
    print(f"{failed} failed" if failed else "all as it should be")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
