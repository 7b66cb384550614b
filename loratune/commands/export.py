"""`loratune export`: writes an adapter as another program reads it, reads it back, and compares."""

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratune import escaping, memory
from loratune.commands import inference
from loratune.console import format_size
from loratune.data import DatasetSplit, ProgressFactory
from loratune.export import gguf, ollama, output, plain
from loratune.export.texts import texts
from loratune.lora import tensors
from loratune.lora.parameters import file_bytes
from loratune.model import fingerprints, load
from loratune.training.preflight import AdapterInfo
from loratune.training.run_dir import RunDirectory

_LOGITS = 1 << 24
"""Logits that are kept to be compared, of 4 bytes each."""
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank of vLLM can be (vllm/config/lora.py)."""
_Log = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What the user wants.

    Attributes:
        to: The client: peft, vllm, gguf or ollama.
        name: What the client is to call the adapter.
        outtype: The type of the weights of a GGUF file of a whole model.
        llama_cpp: A checkout of llama.cpp.
        base_gguf: A GGUF file of the base.
        merged: Whether a GGUF file is to hold base and adapter.
    """

    to: str
    name: str
    outtype: str = "f16"
    llama_cpp: Path | None = None
    base_gguf: Path | None = None
    merged: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        directory: Where.
        client: The program that it is for.
        lines: What was compared and how it came out, as names and texts.
        figures: The same by name, for JSON.
        commands: What to type to use it.
    """

    directory: Path
    client: str
    lines: Sequence[tuple[str, str]]
    figures: dict[str, Any]
    commands: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "directory": str(self.directory), "client": self.client, "comparison": self.figures,
            "commands": list(self.commands),
        }  # fmt: skip


def export(
    source: AdapterInfo,
    directory: RunDirectory,
    order: Order,
    split: DatasetSplit | None,
    watch: ProgressFactory,
    log: _Log,
) -> Exported:
    """Write an adapter for one client.

    Args:
        source: The adapter.
        directory: Where to, see `output.check`.
        order: What the user wants.
        split: The rows that the user wants it compared on.
        watch: Shows progress.
        log: Takes lines about the adapter.

    Raises:
        AdapterError: The adapter does not fit the client or its base, or what was written is not the adapter.
        ConfigError: There are no converters of llama.cpp.
        ModelError, DataError: The base or the rows cannot be used.
        ResourceError: The disk is full.
    """
    if order.to in ("peft", "vllm"):
        return _plain(source, directory, order, split, watch, log)
    raise NotImplementedError


def _plain(
    source: AdapterInfo,
    directory: RunDirectory,
    order: Order,
    split: DatasetSplit | None,
    watch: ProgressFactory,
    log: _Log,
) -> Exported:
    """A plain LoRA directory."""
    files = source.files
    plain.check_plain(files, order.to)
    meta = load.build_meta(load.load_config(source.base), source.base)
    adapter = plain.fold(files, [path for path, _ in meta.named_modules()])
    exact = _in_float32(source)
    needed, free = 5 * sum(p.numel() for p in meta.parameters()), memory.available(load.device())
    figures: dict[str, Any] = {"rank": adapter.rank, "modules": len(adapter.tensors) // 2}
    expected = []
    if needed <= free:
        loaded = inference.load(exact, log)
        compared = texts(source, loaded.renderer, meta.config.get_text_config().vocab_size, split, watch)
        ids = _within(compared.ids, meta.config.get_text_config().vocab_size)
        expected = _logits(loaded.model, ids)
        del loaded
        gc.collect()
    with output.staged(directory, file_bytes(adapter.tensors) + (1 << 20), "the adapter") as staging:
        adapter.write(staging)
        for path in (*output.tokenizer_files(source), *files.path.glob("run.yaml")):
            (staging / path.relative_to(files.path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / path.relative_to(files.path))
        figures["tensors"] = plain.check_tensors(files, staging)
        lines = [("each ΔW", f"equal to {figures['tensors']:.0e} of itself, {figures['modules']} modules")]
        fingerprint = files.base_fingerprint
        if expected:
            base = load.load_base(exact.base)
            fingerprint = fingerprint or fingerprints.fingerprint(base)
            found = _logits(tensors.stock(base, staging), ids)
            figures |= {"texts": compared.origin, "logits": plain.check_logits(files, expected, found)}
            lines.append(("in PEFT", f"logits equal to {figures['logits']:.0e} of the largest, {compared.origin}"))
        else:
            figures["logits"] = None
            need = f"the base in float32 needs {format_size(needed)}, {format_size(free)} are free"
            lines.append(("in PEFT", f"not compared: {need}"))
        details = {"comparison": figures, "chat": source.chat, "fingerprints": {"base": fingerprint}}
        output.write_record(staging, f"plain LoRA for {plain.CLIENTS[order.to]}", source, details)
    lines += [("rank", f"{adapter.rank}, lora_alpha {adapter.rank}"), *(("note", note) for note in adapter.notes)]
    commands = [_serve(source, directory, order, adapter.rank)] if order.to == "vllm" else []
    return Exported(directory.output, plain.CLIENTS[order.to], lines, figures, commands)


def _serve(source: AdapterInfo, directory: RunDirectory, order: Order, rank: int) -> str:
    """The line that serves it with vLLM."""
    base, module = escaping.shell(source.base.name_or_path), escaping.shell(f"{order.name}={directory.output}")
    most = next((most for most in _VLLM_RANKS if rank <= most), rank)
    return f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {module}"


def _in_float32(source: AdapterInfo) -> AdapterInfo:
    """The adapter on its base in float32, where rounding does not hide a difference."""
    return replace(source, base=source.base.model_copy(update={"dtype": "float32"}))


def _within(ids: Sequence[Sequence[int]], vocabulary_size: int) -> list[Sequence[int]]:
    """The beginnings of some texts, so many that their logits can be kept."""
    budget, kept = _LOGITS // vocabulary_size, []
    for text in ids:
        kept.append(text[: min(256, budget)])
        budget -= len(kept[-1])
        if budget <= 0:
            break
    return [text for text in kept if text]


@torch.inference_mode()
def _logits(model: Any, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits of each text."""
    rows = (torch.tensor([text], device=model.device) for text in ids)
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows]
