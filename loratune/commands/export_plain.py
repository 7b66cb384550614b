"""`loratune export --to peft` and `--to vllm`: a plain LoRA directory, compared as stock PEFT reads it."""

import gc
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from loratune import escaping, memory
from loratune.commands import inference
from loratune.commands.export_order import Exported, Log, Order, in_float32
from loratune.console import format_size
from loratune.data import DatasetSplit, ProgressFactory
from loratune.export import output, plain
from loratune.export.texts import texts
from loratune.lora import tensors
from loratune.lora.parameters import file_bytes
from loratune.model import fingerprints, load
from loratune.training.preflight import AdapterInfo
from loratune.training.run_dir import RunDirectory

_LOGITS = 1 << 24
"""Logits that are kept to be compared, of 4 bytes each."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank of vLLM can be (vllm/config/lora.py)."""


def export_plain(
    source: AdapterInfo,
    directory: RunDirectory,
    order: Order,
    split: DatasetSplit | None,
    watch: ProgressFactory,
    log: Log,
) -> Exported:
    """A plain LoRA directory."""
    files = source.files
    plain.check_plain(files, order.to)
    meta = load.build_meta(load.load_config(source.base), source.base)
    adapter = plain.fold(files, [path for path, _ in meta.named_modules()])
    exact = in_float32(source)
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
    most = next((most for most in VLLM_RANKS if rank <= most), rank)
    return f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {module}"


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
