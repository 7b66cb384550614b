"""`loratune export --to gguf` and `--to ollama`: by llama.cpp's own converters, and run in llama.cpp."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratune import escaping
from loratune.commands import inference
from loratune.commands.export_order import Exported, Log, Order, in_float32, questions
from loratune.commands.inference import LoadedAdapter
from loratune.config import patterns
from loratune.data import DatasetSplit
from loratune.errors import AdapterError
from loratune.export import converter, gguf, llama_cpp, ollama, output, plain
from loratune.export.llama_cpp import Question
from loratune.lora import tensors
from loratune.lora.parameters import file_bytes
from loratune.model import load
from loratune.model.source import local_or_hub
from loratune.training.preflight import AdapterInfo
from loratune.training.run_dir import RunDirectory

_TYPE = "f16"
"""The type of the weights of a merged GGUF file, if the user names none."""


def export_adapter(
    source: AdapterInfo, directory: RunDirectory, order: Order, split: DatasetSplit | None, log: Log, converters: Path
) -> Exported:
    """The adapter as a GGUF file, for a GGUF file of its base."""
    files = source.files
    plain.check_plain(files, "gguf")
    meta = load.build_meta(load.load_config(source.base), source.base)
    adapter = plain.fold(files, [path for path, _ in meta.named_modules()])
    gguf.check_layers(meta, patterns.adapted_modules(files.tensors), str(files.path))
    loaded = inference.load(in_float32(source), log)
    asked = questions(loaded, source, split) if llama_cpp.is_installed() else []
    own_base = llama_cpp.is_installed() and not _base_gguf(source, order)
    size = 2 * file_bytes(adapter.tensors) + (8 * _count(meta) if own_base else 0)
    with output.staged(directory, size, "the GGUF file") as staging, _work(staging) as work:
        adapter.write(_made(work / "adapter"))
        meta.config.save_pretrained(_made(work / "base"))
        file = staging / f"{order.name}.gguf"
        converter.adapter(converters, work / "adapter", work / "base", file)
        figures: dict[str, Any] = {"rank": adapter.rank, "modules": gguf.check_adapter(file, adapter)}
        lines = [("tensors", f"{figures['modules']} modules, of the norms that the adapter has")]
        template = _write_template(staging, loaded.tokenizer)
        reason, base = _base_for_llama_cpp(loaded, source, order, work, converters)
        compared = None
        if base is not None:
            compared = llama_cpp.compare(base, file, template, asked, loaded.renderer.end_ids)
        lines.append(("llama.cpp", str(compared) if compared else f"not run: {reason}"))
        figures["llama.cpp"] = compared.as_json() if compared else None
        output.write_record(staging, "GGUF adapter", source, {"comparison": figures, "chat": source.chat})
    options = [f"-m {escaping.shell(str(_base_gguf(source, order) or 'BASE.gguf'))}"]
    options.append(f"--lora {escaping.shell(str(directory.output / file.name))}")
    if template:
        options.append(f"--jinja --chat-template-file {escaping.shell(str(directory.output / gguf.TEMPLATE))}")
    return Exported(directory.output, "llama.cpp", lines, figures, [f"llama-server {' '.join(options)}"])


def export_merged(
    source: AdapterInfo, directory: RunDirectory, order: Order, split: DatasetSplit | None, log: Log, converters: Path
) -> Exported:
    """Base and adapter as one GGUF file."""
    loaded = inference.load(in_float32(source), log)
    asked = questions(loaded, source, split) if llama_cpp.is_installed() else []
    with output.staged(directory, _merged_size(loaded), "the GGUF file") as staging:
        file, lines, figures = _convert_merged(loaded, source, order, asked, staging, converters)
        output.write_record(staging, "GGUF model", source, {"comparison": figures, "chat": source.chat})
    command = f"llama-server --jinja -m {escaping.shell(str(directory.output / file.name))}"
    return Exported(directory.output, "llama.cpp", lines, figures, [command])


def export_ollama(
    source: AdapterInfo, directory: RunDirectory, order: Order, split: DatasetSplit | None, log: Log, converters: Path
) -> Exported:
    """Base and adapter as one GGUF file, with a Modelfile."""
    loaded = inference.load(in_float32(source), log)
    modelfile = ollama.modelfile(loaded.renderer, f"{order.name}.gguf", chat=source.chat)
    asked = questions(loaded, source, split) if llama_cpp.is_installed() else []
    with output.staged(directory, _merged_size(loaded), "the GGUF file") as staging:
        _, lines, figures = _convert_merged(loaded, source, order, asked, staging, converters)
        (staging / "Modelfile").write_text(modelfile.text, encoding="utf-8")
        figures["conversations"] = modelfile.compared
        output.write_record(staging, "Ollama model", source, {"comparison": figures, "chat": source.chat})
    rendered = f"{modelfile.compared} conversations rendered as by the chat template" if source.chat else "raw text"
    lines += [("template", rendered), *(("note", note) for note in modelfile.notes), ("Ollama", "itself was not run")]
    name, path = escaping.shell(order.name), escaping.shell(str(directory.output / "Modelfile"))
    commands = [f"ollama create {name} -f {path}", f"ollama run {name}"]
    return Exported(directory.output, "Ollama", lines, figures, commands)


def _convert_merged(
    loaded: LoadedAdapter,
    source: AdapterInfo,
    order: Order,
    asked: Sequence[Question],
    staging: Path,
    converters: Path,
) -> tuple[Path, list[tuple[str, str]], dict[str, Any]]:
    """Merge in float32, convert, and compare. Returns the file, and what was compared. The adapter is used up."""
    file, tokenizer = staging / f"{order.name}.gguf", _base_gguf(source, order)
    if tokenizer:
        gguf.check_tokenizer(tokenizer, loaded.model.config.get_text_config().vocab_size)
    with _work(staging) as work:
        tensors.merged(loaded.model, str(source.files.path)).save_pretrained(work)
        _write_tokenizer(work, loaded.tokenizer, source)
        converter.model(converters, work, file, order.merged or _TYPE, tokenizer)
    compared = None
    if llama_cpp.is_installed():
        compared = llama_cpp.compare(file, None, None, asked, loaded.renderer.end_ids)
    text = str(compared) if compared else f"not run: {llama_cpp.INSTALL}"
    figures = {"type": order.merged or _TYPE, "llama.cpp": compared.as_json() if compared else None}
    return file, [("weights", order.merged or _TYPE), ("llama.cpp", text)], figures


def _base_for_llama_cpp(
    loaded: LoadedAdapter, source: AdapterInfo, order: Order, work: Path, converters: Path
) -> tuple[str, Path | None]:
    """A GGUF file of the base; or None, and why there is none. The adapter is used up."""
    if not llama_cpp.is_installed():
        return llama_cpp.INSTALL, None
    if base := _base_gguf(source, order):
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


def _base_gguf(source: AdapterInfo, order: Order) -> Path | None:
    """The GGUF file that the user names, or that the base was loaded from; None if there is neither."""
    if order.base_gguf is not None or source.base.gguf_file is None:
        return order.base_gguf
    file = Path(local_or_hub(source.base.name_or_path)) / source.base.gguf_file
    return file if file.is_file() else None


def _write_tokenizer(directory: Path, tokenizer: Any, source: AdapterInfo) -> None:
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
