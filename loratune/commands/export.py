"""`loratune export`: writes an adapter as another program reads it, reads it back, and compares.

For PEFT and vLLM it is a plain LoRA directory, compared as stock PEFT reads it. For llama.cpp and Ollama it is a GGUF
file by llama.cpp's own converters, run in llama.cpp.
"""

import gc
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loratune import escaping, memory
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.commands import clients
from loratune.commands.export_request import Exported, ExportRequest, Log, in_float32, questions
from loratune.config import patterns
from loratune.console import format_size, progress
from loratune.data import DatasetSplit, ProgressFactory
from loratune.errors import AdapterError
from loratune.export import converter, gguf, llama_cpp, ollama, output, plain
from loratune.export.llama_cpp import ScoredAnswer
from loratune.export.texts import texts
from loratune.lora import tensors
from loratune.lora.parameters import file_bytes
from loratune.model import fingerprints, load
from loratune.model.source import local_or_hub
from loratune.training.run_dir import RunDirectory

NOT_WANTED = "--no-verify"
_LOGITS = 1 << 24
"""Logits that are kept to be compared, of 4 bytes each."""


def export_plain(
    source: AdapterDirectory,
    directory: RunDirectory,
    request: ExportRequest,
    split: DatasetSplit | None,
    watch: ProgressFactory,
    log: Log,
) -> Exported:
    """A plain LoRA directory."""
    files = source.files
    plain.check_plain(files, request.to)
    meta = _meta(source)
    adapter = plain.fold(files, [path for path, _ in meta.named_modules()])
    exact = in_float32(source)
    needed, free = 5 * sum(p.numel() for p in meta.parameters()), memory.available(load.device())
    figures: dict[str, Any] = {"rank": adapter.rank, "modules": len(adapter.tensors) // 2}
    expected = []
    if request.verify and needed <= free:
        loaded = loading.load(exact, log)
        compared = texts(source, loaded.renderer, meta.config.get_text_config().vocab_size, split, watch)
        ids = _within(compared.ids, meta.config.get_text_config().vocab_size)
        expected = _logits(loaded.model, ids)
        del loaded
        gc.collect()
    with output.staged(directory, file_bytes(adapter.tensors) + (1 << 20), "the adapter") as staging:
        adapter.write(staging)
        source.copy_tokenizer(staging, "run.yaml")
        figures["tensors"] = plain.check_tensors(files, staging)
        lines = [("each ΔW", f"{_difference(figures['tensors'], 'its norm')}, {figures['modules']} modules")]
        fingerprint = files.base_fingerprint
        if expected:
            base = load.load_base(exact.base)
            fingerprint = fingerprint or fingerprints.fingerprint(base)
            found = _logits(tensors.stock(base, staging), ids)
            figures |= {"texts": compared.origin, "logits": plain.check_logits(files, expected, found)}
            difference = _difference(figures["logits"], "the largest")
            lines.append(("in PEFT", f"logits {difference}, on {compared.origin}"))
        else:
            figures["logits"] = None
            need = f"the base in float32 needs {format_size(needed)}, {format_size(free)} are free"
            lines.append(("in PEFT", f"not compared: {need if request.verify else NOT_WANTED}"))
        details = {"comparison": figures, "chat": source.chat, "mix": dict(request.mix)}
        details["fingerprints"] = {"base": fingerprint}
        source.write_record(staging, f"plain LoRA for {plain.CLIENTS[request.to]}", details)
    lines += [("rank", f"{adapter.rank}, lora_alpha {adapter.rank}"), *(("note", note) for note in adapter.notes)]
    commands = [_serve(source, directory, request, adapter.rank)] if request.to == "vllm" else []
    return Exported(directory.output, plain.CLIENTS[request.to], lines, figures, commands)


def _meta(source: AdapterDirectory) -> Any:
    """The base without its weights."""
    with loading.finding_base(source):
        return load.build_meta(load.load_config(source.base), source.base)


def _difference(share: float, whole: str) -> str:
    """How far two things differ, for the user. share: of the whole."""
    return f"equal to within {share:.0e} of {whole}" if share else "equal"


def _serve(source: AdapterDirectory, directory: RunDirectory, request: ExportRequest, rank: int) -> str:
    """The line that serves it with vLLM."""
    template = directory.output / gguf.TEMPLATE  # vLLM would take that of the base
    rendering = str(template) if source.chat and template.is_file() else None
    return clients.vllm(source.base.name_or_path, request.name, str(directory.output), rank, rendering)


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
@progress("computing logits")
def _logits(model: Any, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits of each text."""
    rows = (torch.tensor([text], device=model.device) for text in ids)
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows]


_TYPE = "f16"
"""The type of the weights of a merged GGUF file, if the user names none."""


def export_adapter(
    source: AdapterDirectory,
    directory: RunDirectory,
    request: ExportRequest,
    split: DatasetSplit | None,
    log: Log,
    converters: Path,
) -> Exported:
    """The adapter as a GGUF file, for a GGUF file of its base."""
    files = source.files
    plain.check_plain(files, "gguf")
    meta = _meta(source)
    adapter = plain.fold(files, [path for path, _ in meta.named_modules()])
    gguf.check_layers(meta, patterns.adapted_modules(files.tensors), str(files.path))
    loaded = loading.load(in_float32(source), log)
    asked = _questions(loaded, source, request, split)
    own_base = request.verify and not _base_gguf(source, request)
    size = 2 * file_bytes(adapter.tensors) + (8 * _count(meta) if own_base else 0)
    with output.staged(directory, size, "the GGUF file") as staging, _work(staging) as work:
        adapter.write(_made(work / "adapter"))
        meta.config.save_pretrained(_made(work / "base"))
        file = staging / f"{request.name}.gguf"
        converter.adapter(converters, work / "adapter", work / "base", file)
        figures: dict[str, Any] = {"rank": adapter.rank, "modules": gguf.check_adapter(file, adapter)}
        lines = [("tensors", f"{figures['modules']} modules, of the norms that the adapter has")]
        template = _write_template(staging, loaded.tokenizer)
        reason, base = _base_for_llama_cpp(loaded, source, request, work, converters)
        compared = None
        if base is not None:
            compared = llama_cpp.compare(base, file, template, asked, loaded.renderer.end_ids)
        lines.append(("llama.cpp", str(compared) if compared else f"not run: {reason}"))
        figures["llama.cpp"] = compared.as_json() if compared else None
        source.write_record(staging, "GGUF adapter", {"comparison": figures, "chat": source.chat})
    model, rendering = str(_base_gguf(source, request) or "BASE.gguf"), str(directory.output / gguf.TEMPLATE)
    command = clients.llama_server(model, str(directory.output / file.name), rendering if template else None)
    return Exported(directory.output, "llama.cpp", lines, figures, [command])


def export_merged(
    source: AdapterDirectory,
    directory: RunDirectory,
    request: ExportRequest,
    split: DatasetSplit | None,
    log: Log,
    converters: Path,
) -> Exported:
    """Base and adapter as one GGUF file."""
    loaded = loading.load(in_float32(source), log)
    asked = _questions(loaded, source, request, split)
    with output.staged(directory, _merged_size(loaded), "the GGUF file") as staging:
        file, lines, figures = _convert_merged(loaded, source, request, asked, staging, converters)
        source.write_record(staging, "GGUF model", {"comparison": figures, "chat": source.chat})
    command = f"llama-server --jinja -m {escaping.shell(str(directory.output / file.name))}"
    return Exported(directory.output, "llama.cpp", lines, figures, [command])


def export_ollama(
    source: AdapterDirectory,
    directory: RunDirectory,
    request: ExportRequest,
    split: DatasetSplit | None,
    log: Log,
    converters: Path,
) -> Exported:
    """Base and adapter as one GGUF file, with a Modelfile."""
    loaded = loading.load(in_float32(source), log)
    modelfile = ollama.modelfile(loaded.renderer, f"{request.name}.gguf", chat=source.chat)
    asked = _questions(loaded, source, request, split)
    with output.staged(directory, _merged_size(loaded), "the GGUF file") as staging:
        _, lines, figures = _convert_merged(loaded, source, request, asked, staging, converters)
        (staging / "Modelfile").write_text(modelfile.text, encoding="utf-8")
        figures["conversations"] = modelfile.compared
        source.write_record(staging, "Ollama model", {"comparison": figures, "chat": source.chat})
    rendered = f"{modelfile.compared} conversations rendered as by the chat template" if source.chat else "raw text"
    lines += [("template", rendered), *(("note", note) for note in modelfile.notes), ("Ollama", "itself was not run")]
    name, path = escaping.shell(request.name), escaping.shell(str(directory.output / "Modelfile"))
    commands = [f"ollama create {name} -f {path}", f"ollama run {name}"]
    return Exported(directory.output, "Ollama", lines, figures, commands)


def _questions(
    loaded: LoadedAdapter, source: AdapterDirectory, request: ExportRequest, split: DatasetSplit | None
) -> list[ScoredAnswer]:
    """What llama.cpp is asked; nothing where it is not run."""
    return questions(loaded, source, split) if request.verify else []


def _why_not_run() -> str:
    """Why llama.cpp is not run where it is not."""
    return NOT_WANTED if llama_cpp.is_installed() else llama_cpp.INSTALL


def _convert_merged(
    loaded: LoadedAdapter,
    source: AdapterDirectory,
    request: ExportRequest,
    asked: Sequence[ScoredAnswer],
    staging: Path,
    converters: Path,
) -> tuple[Path, list[tuple[str, str]], dict[str, Any]]:
    """Merge in float32, convert, and compare. Returns the file, and what was compared. The adapter is used up."""
    file, tokenizer = staging / f"{request.name}.gguf", _base_gguf(source, request)
    if tokenizer:
        gguf.check_tokenizer(tokenizer, loaded.model.config.get_text_config().vocab_size)
    with _work(staging) as work, progress("merging"):
        merged = tensors.merged(loaded.model, str(source.files.path))
        merged.save_pretrained(work)
        _write_tokenizer(work, loaded.tokenizer, source)
        converter.model(converters, work, file, request.merged or _TYPE, tokenizer)
    figures: dict[str, Any] = {"type": request.merged or _TYPE, "tensors": gguf.check_model(file, _count(merged))}
    compared = None
    if request.verify:
        compared = llama_cpp.compare(file, None, None, asked, loaded.renderer.end_ids)
    text = str(compared) if compared else f"not run: {_why_not_run()}"
    figures["llama.cpp"] = compared.as_json() if compared else None
    return file, [("weights", request.merged or _TYPE), ("llama.cpp", text)], figures


def _base_for_llama_cpp(
    loaded: LoadedAdapter, source: AdapterDirectory, request: ExportRequest, work: Path, converters: Path
) -> tuple[str, Path | None]:
    """A GGUF file of the base; or None, and why there is none. The adapter is used up."""
    if not request.verify:
        return _why_not_run(), None
    if base := _base_gguf(source, request):
        return "", base
    try:
        directory, file = _made(work / "model"), work / "base.gguf"
        tensors.unloaded(loaded.model, str(source.files.path)).save_pretrained(directory)
        _write_tokenizer(directory, loaded.tokenizer, source)
        converter.model(converters, directory, file, "f32")
    except AdapterError as error:
        reasons = "; ".join(problem.what for problem in error.problems)
        return f"there is no GGUF file of the base, and one cannot be made: {reasons}; name one with --base-gguf", None
    return "", file


def _base_gguf(source: AdapterDirectory, request: ExportRequest) -> Path | None:
    """The GGUF file that the user names, or that the base was loaded from; None if there is neither."""
    if request.base_gguf is not None or source.base.gguf_file is None:
        return request.base_gguf
    file = Path(local_or_hub(source.base.name_or_path)) / source.base.gguf_file
    return file if file.is_file() else None


def _write_tokenizer(directory: Path, tokenizer: Any, source: AdapterDirectory) -> None:
    """Write a tokenizer, with the template as a file, and with SentencePiece's model, which some converters ask for."""
    tokenizer.save_pretrained(directory)
    _write_template(directory, tokenizer)
    model = Path(local_or_hub(source.base.name_or_path)) / "tokenizer.model"
    if model.is_file() and not (directory / model.name).exists():
        shutil.copyfile(model, directory / model.name)


def _write_template(directory: Path, tokenizer: Any) -> str | None:
    """Write the chat template as a file of its own, if there is one."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    (directory / gguf.TEMPLATE).write_text(template, encoding="utf-8")
    return template


def _merged_size(loaded: LoadedAdapter) -> int:
    """About how many bytes the merged model and its GGUF file have, both of which are on the disk for a while."""
    return 8 * _count(loaded.model)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@contextmanager
def _work(staging: Path) -> Iterator[Path]:
    """A directory for what is on the way to the output, and no part of it."""
    work = _made(staging / "work")
    yield work
    shutil.rmtree(work)


def export(
    source: AdapterDirectory,
    directory: RunDirectory,
    request: ExportRequest,
    split: DatasetSplit | None,
    watch: ProgressFactory,
    log: Log,
) -> Exported:
    """Write an adapter for one client.

    Args:
        source: The adapter.
        directory: Where to, see `output.check`.
        request: What the user wants.
        split: The rows that the user wants it compared on.
        watch: Shows progress.
        log: Takes lines about the adapter.

    Raises:
        AdapterError: The adapter does not fit the client or its base, or what was written is not the adapter.
        ConfigError: There are no converters of llama.cpp.
        ModelError, DataError: The base or the rows cannot be used.
        ResourceError: The disk is full.
    """
    if request.to in ("peft", "vllm"):
        return export_plain(source, directory, request, split, watch, log)
    converters = converter.find(request.llama_cpp)
    gguf.check_package()
    if not request.verify:
        log(f"llama.cpp will not be run: {_why_not_run()}")
    if request.to == "ollama":
        return export_ollama(source, directory, request, split, log, converters)
    make = export_merged if request.merged else export_adapter
    return make(source, directory, request, split, log, converters)
