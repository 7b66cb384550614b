"""`loratune env --self-test`: whether this machine computes what stock transformers and PEFT compute.

Small models with random weights are trained, loaded and run on the device of this machine, through the functions that
users call, and the results are compared with those of plain loops over the stock model. The results are reported, and
kept for the page of `loratune env`; what a run uses is decided by its own checks, see `kernels.accelerate`.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from loratune import kernels
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.api import self_test_operations as checked
from loratune.api.adapter import Adapter
from loratune.api.config import load_config
from loratune.api.machine import FAILED, NOT_AVAILABLE, PASSED, Check, known_results
from loratune.api.self_test_operations import DifferenceError, NotAvailableError
from loratune.api.train import train_now
from loratune.config import LoraSection, ModelSection, RunConfig
from loratune.data.batches import flatten, pad
from loratune.errors import LoratuneError, ResourceError, is_disk_full, is_out_of_memory
from loratune.events import Event, StepEvent, listening, note, progress
from loratune.kernels.compiled import fused_ops
from loratune.lora import attach, creation
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.model import load
from loratune.model.upstream import bitsandbytes_lacks, quiet_transformers
from loratune.system import turns
from loratune.system.cache import keeping_in
from loratune.system.files import explain_full_disk

CURVE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""The largest difference of a loss from that of the stock loop, relative to the first loss, by dtype of the base."""
LONG_SECONDS = 60.0
"""Seconds after which a self-test that does not get the processor says so."""
STEPS, COMPARED_STEPS, NEW_TOKENS = 20, 5, 12
"""Steps of sft, and of dpo and of other comparisons; tokens of an answer."""
SHAPE = checked.SHAPE | {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "max_grad_norm": 0.0, "logging_steps": 1, "seed": 1,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
PADDED, PACKED, SHARED = "padded rows, {}", "packed rows, {}", "sft with shared prefixes, {}"
LAYOUTS: dict[str, dict[str, Any]] = {
    PADDED: {"packing": "none"}, PACKED: {"packing": "batch", "share_prefixes": False}, SHARED: {},
}  # fmt: skip
"""The checks of how rows are put together → the settings for it."""
ROWS = [{"prompt": f"Add the numbers. {n} + {3 * n} =", "completion": f" {4 * n}"} for n in range(1, 9)]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" {n} or so"} for n, row in enumerate(ROWS)
]


class _StoppedError(Exception):
    """Ends a run that is then resumed."""


def run() -> list[Check]:
    """Run all checks, keep their results, and return them in order. It takes about half a minute on two cores.

    The checks know nothing of earlier runs, whose failures would not be tested again; nor do runs know of the checks'
    rows and models.

    Raises:
        ResourceError: There is no room for the models.
    """
    found, is_slow = list[Check](), False
    began, computed = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="loratune-self-test-") as folder:
        with explain_full_disk("the models of the self-test", 4 << 20, Path(folder), "set TMPDIR to another disk"):
            tests = _SelfTest(Path(folder))
        for name, check in tests.checks():
            start = time.monotonic()
            with progress(f"self-test: {name}"), listening(_ignored), keeping_in(Path(folder, "kept")):
                result, detail = _outcome(check)
            found.append(Check(name, result, detail, round(time.monotonic() - start, 2)))
            took, used = time.monotonic() - began, time.process_time() - computed
            if not is_slow and took > LONG_SECONDS and used < took / 2:
                is_slow = True
                note(f"the self-test waits for the processor: other programs left it {used:.0f} of {took:.0f} s so far")
    if why := known_results().store({check.name: check.result for check in found}):
        note(f"the results of the self-test are not kept: {why}")
    return found


def _ignored(event: Event) -> None:
    """The events of the runs of a check are not shown."""


def _outcome(check: Callable[[], str]) -> tuple[str, str]:
    """The result of a check, and a line on it. An error of any kind is a failure, unless memory or disk ran out."""
    try:
        return PASSED, check()
    except NotAvailableError as reason:
        return NOT_AVAILABLE, str(reason)
    except Exception as error:
        lacks = isinstance(error, ResourceError) or is_disk_full(error) or is_out_of_memory(error)
        detail = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
        detail = error.problems[0].what if isinstance(error, LoratuneError) else detail
        return NOT_AVAILABLE if lacks else FAILED, detail


@dataclass
class _SelfTest:
    """The checks.

    Attributes:
        folder: An empty directory for models and adapters.
    """

    folder: Path

    def __post_init__(self) -> None:
        self._dtype, self._device = load.automatic_dtype(), load.device()
        self._tokenizer = byte_tokenizer()
        self._base = self.folder / "base"
        torch.manual_seed(0)
        with quiet_transformers():
            LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1)).save_pretrained(self._base)
        self._tokenizer.save_pretrained(self._base)
        self._curves: dict[torch.dtype, list[float]] = {}
        self._seconds: dict[str, float] = {}

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Name and function of each check. The function returns a line on what it found."""
        for dtype in fused_ops.DEFINES:
            yield f"compiled operations, {_name(dtype)}", partial(checked.operations, dtype)
        for dtype in dict.fromkeys((torch.float32, self._dtype)):
            yield f"accelerated layers, {_name(dtype)}", partial(checked.layers, dtype, self._device)
            for layout in LAYOUTS:
                yield layout.format(_name(dtype)), partial(self._sft, layout, dtype)
        yield "dpo, float32", self._dpo
        yield "resume", self._resume
        yield "generate", self._generate
        for bits in ("8bit", "4bit"):
            yield f"quantization: {bits}", partial(self._quantized, bits)
        yield "shared prefixes on a GPU", partial(self._on_gpu, "trees", "", data={"share_prefixes": True})
        lacks = "" if is_flash_attn_2_available() else "the package flash-attn is not installed"
        chosen = {"attn_implementation": "flash_attention_2"}
        yield "FlashAttention 2", partial(self._on_gpu, "flash", lacks, model=chosen)
        yield "speed", self._speed
        yield "Liger's kernels", self._liger

    def _config(self, name: str, rows: Sequence[dict[str, str]], **sections: dict[str, Any]) -> RunConfig:
        """A config. sections: what differs from the constants above."""
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(self._base), "dtype": "float32"}, "data": {"train": str(file)},
            "training": {**TRAINING, "max_steps": COMPARED_STEPS}, "lora": LORA, "retention": {"kl_weight": 0.0},
        }  # fmt: skip
        merged = {key: value | sections.pop(key, {}) for key, value in values.items()}
        return load_config({**merged, **sections, "output_dir": str(self.folder / name)})

    def _trained(self, name: str, rows: Sequence[dict[str, str]], **sections: dict[str, Any]) -> list[float]:
        """The loss of each step of a run, whose adapter is then in the directory of that name."""
        train_now(self._config(name, rows, **sections), allow_worse=True)
        curve = json.loads((self.folder / name / "loratune.json").read_text())["curve"]
        return [float(step["loss"]) for step in curve]

    def _stock(
        self, dtype: torch.dtype, steps: int, loss: Callable[[Any], Callable[[], Tensor]],
        base: Any = None,
    ) -> list[float]:  # fmt: skip
        """The loss of each step of a plain loop over PEFT's model.

        Args:
            dtype: Of the base.
            steps: The number of steps.
            loss: Returns the loss of a model as a function.
            base: Another base than that of the files.
        """
        base = self._dense_base(dtype) if base is None else base
        model = creation.adapt(base, LoraSection(**LORA), seed=TRAINING["seed"])[0]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], weight_decay=0.0)
        losses, compute = [], loss(model)
        for _ in range(steps):
            value = compute()
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            losses.append(float(value.detach()))
        return losses

    def _dense_base(self, dtype: torch.dtype) -> Any:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(self._base, dtype=dtype, use_kernels=False).to(self._device)

    def _quantized_base(self, section: ModelSection) -> Any:
        """What stock PEFT computes with: the layers of bitsandbytes on a GPU, which round activations too; dequantized
        weights on a CPU, as in training there."""
        quantized = load.load_base(section)
        if self._device.type != "cpu":
            return quantized
        base = self._dense_base(quantized.dtype)
        for name, weight in checked.dequantized(quantized).items():
            base.get_submodule(name).weight.data = weight.to(base.dtype)
        return base

    def _log_probability(self, model: Any, prompt: str, answer: str) -> tuple[Tensor, int]:
        """That of an answer with its end token, and its tokens; the row alone, without a mask."""
        before, after = (self._tokenizer(text).input_ids for text in (prompt, answer))
        ids = torch.tensor([[*before, *after, SHAPE["eos_token_id"]]], device=self._device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].float()
        return -functional.cross_entropy(logits, ids[0, len(before) :], reduction="sum"), len(after) + 1

    def _sft_loss(self, model: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            found = [self._log_probability(model, row["prompt"], row["completion"]) for row in ROWS]
            return -sum((value for value, _ in found), torch.zeros((), device=self._device)) / sum(n for _, n in found)

        return loss

    def _stock_curve(self, dtype: torch.dtype) -> list[float]:
        if dtype not in self._curves:
            self._curves[dtype] = self._stock(dtype, STEPS, self._sft_loss)
        return self._curves[dtype]

    def _adapter(self, layout: str) -> Path:
        """The adapter that a check in float32 has trained. Raises NotAvailableError: it did not get that far."""
        check = layout.format(_name(torch.float32))
        if not (path := self.folder / check).is_dir():
            raise NotAvailableError(f"it needs the adapter of the check of {check}, which wrote none")
        return path

    def _sft(self, layout: str, dtype: torch.dtype) -> str:
        name, model = layout.format(_name(dtype)), {"dtype": _name(dtype)}
        steps = STEPS if layout == SHARED else COMPARED_STEPS
        ours = self._trained(name, ROWS, model=model, data=LAYOUTS[layout], training={"max_steps": steps})
        stock = self._stock_curve(dtype)[:steps]
        return f"{steps} steps, loss {stock[0]:.3f} to {stock[-1]:.3f}; {_compared(ours, stock, CURVE[dtype])}"

    def _dpo(self) -> str:
        def loss(model: Any) -> Callable[[], Tensor]:
            def margins() -> Tensor:
                chosen, rejected = (
                    torch.stack([self._log_probability(model, row["prompt"], row[side])[0] for row in PAIRS])
                    for side in ("chosen", "rejected")
                )
                return chosen - rejected

            with torch.no_grad():
                before = margins()
            return lambda: -functional.logsigmoid(0.1 * (margins() - before)).mean()

        ours = self._trained("dpo", PAIRS, training={"objective": "dpo"}, preferences={"beta": 0.1})
        return _compared(ours, self._stock(torch.float32, COMPARED_STEPS, loss), CURVE[torch.float32])

    def _resume(self) -> str:
        def stop(event: Event) -> None:
            if isinstance(event, StepEvent) and event.step == 3:
                raise _StoppedError

        whole = self._adapter(PACKED)
        config = self._config("resumed", ROWS, data=LAYOUTS[PACKED], training={"save_steps": 2})
        with suppress(_StoppedError):
            with listening(stop):
                train_now(config, allow_worse=True)
            raise DifferenceError("the run was not stopped")
        train_now(config, resume=True, allow_worse=True)
        if (whole / WEIGHTS_FILE).read_bytes() != (self.folder / "resumed" / WEIGHTS_FILE).read_bytes():
            raise DifferenceError("a run that was resumed from its second step ends with other weights")
        return f"from step 2 of {COMPARED_STEPS}: the same bytes"

    def _generate(self) -> str:
        loaded = loading.load(AdapterDirectory.open(self._adapter(SHARED)))
        prompts = [self._tokenizer(row["prompt"]).input_ids for row in ROWS]
        written = [*map(loaded.until_end, loaded.complete(prompts, NEW_TOKENS))]
        for prompt, answer in zip(prompts, written, strict=True):
            ids = [*prompt]
            for _ in answer:
                with torch.inference_mode():
                    inputs = torch.tensor([ids], device=self._device)
                    ids.append(int(loaded.model(input_ids=inputs, use_cache=False).logits[0, -1].argmax()))
            if ids[len(prompt) :] != answer:
                alone = loaded.text(ids[len(prompt) :])
                raise DifferenceError(f"{loaded.text(answer)!r} with a cache in a batch, {alone!r} without and alone")
        return f"{len(prompts)} prompts, with and without a cache: the same text, such as {loaded.text(written[0])!r}"

    def _quantized(self, bits: str) -> str:
        if lacks := bitsandbytes_lacks():
            raise NotAvailableError(lacks)
        detail = dict[str, str]()
        for dtype in dict.fromkeys((torch.float32, self._dtype) if self._device.type == "cpu" else (self._dtype,)):
            model: dict[str, Any] = {"quantization": bits, "dtype": _name(dtype)}
            losses = self._trained(bits, ROWS, model=model)
            base = self._quantized_base(ModelSection(name_or_path=str(self._base), **model))
            stock = self._stock(dtype, len(losses), self._sft_loss, base)
            detail[_name(dtype)] = _compared(losses, stock, CURVE[dtype])
            with turns.passed_on():
                answer = Adapter(self.folder / bits).generate([ROWS[0]["prompt"]], max_new_tokens=4)[0]
            shutil.rmtree(self.folder / bits)
        lines = "; ".join(f"{name}: {line}" for name, line in detail.items())
        return f"{lines}; saved, loaded, answers {answer!r}"

    def _on_gpu(self, name: str, lacks: str, **sections: dict[str, Any]) -> str:
        """A run on a GPU with other settings against stock PEFT. lacks: what is missing for it; empty if nothing is."""
        if self._device.type == "cpu" or lacks:
            raise NotAvailableError(lacks if self._device.type != "cpu" else "there is no GPU")
        sections["model"] = {"dtype": _name(self._dtype)} | sections.pop("model", {})
        return _compared(self._trained(name, ROWS, **sections), self._stock_curve(self._dtype), CURVE[self._dtype])

    def _speed(self) -> str:
        model, own = self._wide_model(), self._seconds
        own["stock"] = checked.step_seconds(model, partial(pad, pad_id=0))
        with kernels.accelerated(model, attach.adapted_linear):
            own["accelerated"] = checked.step_seconds(model, flatten)
        return f"{own['stock'] / own['accelerated']:.2f} times as fast as stock PEFT with padded rows"

    def _liger(self) -> str:
        lacks = "" if is_liger_kernel_available() else "the package liger-kernel is not installed"
        detail, model = self._on_gpu("liger", lacks, model={"use_liger_kernel": True}), self._wide_model()
        if "accelerated" not in self._seconds:
            raise NotAvailableError("the time of a step without them is not known")
        kernels.use_liger(model)
        with kernels.accelerated(model, attach.adapted_linear):
            factor = self._seconds["accelerated"] / checked.step_seconds(model, flatten)
        return f"{detail}; {factor:.2f} times as fast as without"

    def _wide_model(self) -> Any:
        """A PEFT model in training mode, large enough for its speed to be measured."""
        size = 256 if self._device.type == "cpu" else 1024
        base = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": size, "intermediate_size": 3 * size}))
        return creation.adapt(base.to(self._device, self._dtype), LoraSection(**LORA), seed=1)[0].train()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compared(ours: Sequence[float], stock: Sequence[float], allowed: float) -> str:
    """The largest difference of two curves, relative to the first loss. Raises DifferenceError: it is not allowed."""
    worst = max(abs(one - other) for one, other in zip(ours, stock, strict=False)) / abs(stock[0])
    detail = f"largest difference from stock PEFT {worst:.1e} of the first loss"
    if not worst <= allowed:
        raise DifferenceError(f"{detail}, {allowed:g} is allowed")
    return detail


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
