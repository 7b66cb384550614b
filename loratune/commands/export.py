"""`loratune export`: writes an adapter as another program reads it, reads it back, and compares.

For PEFT and vLLM it is a plain LoRA directory, compared as stock PEFT reads it. For llama.cpp and Ollama it is a GGUF
file by llama.cpp's own converters, run in llama.cpp.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune import escaping, memory
from loratune.adapter import loading
from loratune.adapter.directory import RUN_FILE, AdapterDirectory
from loratune.data import DatasetSplit
from loratune.errors import AdapterError
from loratune.events import note, progress
from loratune.export import clients, gguf, llama_cpp, ollama, output, plain
from loratune.export.clients import CLIENTS, ExportOptions
from loratune.export.comparison import scored_answers, texts
from loratune.lora import tensors
from loratune.lora.mixture import PlainAdapter
from loratune.lora.parameters import file_bytes
from loratune.model import fingerprints, load
from loratune.model.source import local_or_hub
from loratune.system.output_dir import OutputDirectory
from loratune.text import format_size

_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        directory: Where.
        client: The program that it is for.
        lines: The results of the comparison, as names and texts.
        metrics: The same by name, for JSON.
        commands: The commands that use it.
    """

    directory: Path
    client: str
    lines: Sequence[tuple[str, str]]
    metrics: dict[str, Any]
    commands: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "directory": str(self.directory), "client": self.client, "comparison": self.metrics,
            "commands": [*self.commands],
        }  # fmt: skip


def export(
    source: AdapterDirectory,
    directory: OutputDirectory,
    options: ExportOptions,
    *,
    mix: Mapping[str, float] | None = None,
    split: DatasetSplit | None = None,
) -> Exported:
    """Write an adapter for one program.

    Args:
        source: The adapter.
        directory: The output, see `output.check`.
        options: The program, and how the adapter is written for it.
        mix: Name → weight of the adapters whose sum it is, for the record.
        split: The rows that the user wants it compared on.

    Raises:
        AdapterError: The program cannot read the adapter, the base is another one, or what was written does not compute
            what the adapter computes.
        ConfigError: llama.cpp's converters are not installed.
        ModelError, DataError: The base or the rows cannot be used.
        ResourceError: The disk is full.
    """
    exact = replace(source, base=source.base.model_copy(update={"dtype": "float32"}))  # rounding hides differences
    if options.uses_llama_cpp:
        return _GgufExport(exact, directory, options).write(split)
    return _export_plain(exact, directory, options, {"mix": dict(mix or {})}, split)


def _fold(source: AdapterDirectory, options: ExportOptions) -> tuple[PlainAdapter, Any]:
    """The adapter as plain LoRA, and its base without weights."""
    plain.check_plain(source.files, options.to)
    with loading.finding_base(source):
        base = load.build_meta(load.load_config(source.base), source.base)
    return plain.fold(source.files, [path for path, _ in base.named_modules()]), base


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _export_plain(
    source: AdapterDirectory,
    directory: OutputDirectory,
    options: ExportOptions,
    details: dict[str, Any],
    split: DatasetSplit | None,
) -> Exported:
    """A plain LoRA directory, for PEFT and vLLM. details: what its record also holds."""
    adapter, meta = _fold(source, options)
    needed, free = 5 * _count(meta), memory.available(load.device())
    not_compared = options.why_not_verified
    if needed > free and not not_compared:
        not_compared = f"the base in float32 needs {format_size(needed)}, {format_size(free)} are free"
    loaded = None if not_compared else loading.load(source)
    size = meta.config.get_text_config().vocab_size
    compared = texts(source, loaded.renderer, size, split) if loaded else None
    metrics: dict[str, Any] = {"rank": adapter.rank, "modules": len(adapter.tensors) // 2, "logits": None}
    fingerprint, in_peft = source.files.base_fingerprint, f"not compared: {not_compared}"
    client = CLIENTS[options.to]
    with output.staged(directory, file_bytes(adapter.tensors) + (1 << 20), "the adapter") as staging:
        adapter.write(staging)
        source.copy_tokenizer(staging, RUN_FILE)
        metrics["tensors"] = plain.check_tensors(source.files, staging)
        if loaded and compared:
            metrics |= {
                "texts": compared.origin,
                "logits": plain.check_logits(source.files, loaded.model, staging, compared.ids),
            }
            in_peft = f"logits {_difference(metrics['logits'], 'the largest')}, on {compared.origin}"
            fingerprint = fingerprint or fingerprints.fingerprint(tensors.detached(loaded.model))
        details |= {"comparison": metrics, "chat": source.chat, "fingerprints": {"base": fingerprint}}
        source.write_record(staging, f"plain LoRA for {client}", details)
    lines = [
        ("each ΔW", f"{_difference(metrics['tensors'], 'its norm')}, {metrics['modules']} modules"),
        ("in PEFT", in_peft),
        ("rank", f"{adapter.rank}, lora_alpha {adapter.rank}"),
        *(("note", note) for note in adapter.notes),
    ]
    commands = []
    if options.to == "vllm":
        place, template = directory.output, directory.output / _TEMPLATE  # vLLM would take that of the base
        rendering = str(template) if source.chat and template.is_file() else None
        base, name = source.base.name_or_path, clients.name_of(place.name)
        commands = [clients.vllm(base, name, str(place), adapter.rank, rendering)]
    return Exported(directory.output, client, lines, metrics, commands)


def _difference(share: float, whole: str) -> str:
    return f"equal to within {share:.0e} of {whole}" if share else "equal"


class _GgufExport:
    """A GGUF file, for llama.cpp and Ollama: of the adapter, or of base and adapter as one model."""

    def __init__(self, source: AdapterDirectory, directory: OutputDirectory, options: ExportOptions):
        self.source, self.directory, self.options = source, directory, options
        self.converters = gguf.find_converters(options.llama_cpp)
        self.not_run = options.why_not_verified
        if self.not_run:
            note(f"llama.cpp will not be run: {self.not_run}")
        self.adapter: PlainAdapter | None = None
        if not options.merged_type:
            self.adapter, _ = _fold(source, options)
        self.loaded = loading.load(source)
        if self.adapter:
            gguf.check_layers(self.loaded.model, str(source.path))
        template = self.loaded.tokenizer.chat_template
        self.template = template if isinstance(template, str) else None
        self.base_gguf = options.base_gguf
        if source.base.gguf_file and not self.base_gguf:
            file = Path(local_or_hub(source.base.name_or_path)) / source.base.gguf_file
            self.base_gguf = file if file.is_file() else None
        self.metrics: dict[str, Any] = {}
        self.lines: list[tuple[str, str]] = []

    def write(self, split: DatasetSplit | None) -> Exported:
        """Convert, read the file back, and compare. split: the rows that the user wants it compared on."""
        name, modelfile = clients.name_of(self.directory.output.name), None
        if self.options.to == "ollama":
            modelfile = ollama.modelfile(self.loaded.renderer, f"{name}.gguf", chat=self.source.chat)
        answers = [] if self.not_run else scored_answers(self.loaded, self.source, split)
        alone = self.adapter and (self.not_run or self.base_gguf)
        size = 2 * file_bytes(self.adapter.tensors) if self.adapter and alone else 8 * _count(self.loaded.model)
        with output.staged(self.directory, size, "the GGUF file") as staging:
            file, work = staging / f"{name}.gguf", staging / "work"
            work.mkdir()
            run = self._write_adapter(self.adapter, file, work) if self.adapter else self._write_model(file, work)
            result = None if self.not_run else llama_cpp.compare(*run, answers, self.loaded.renderer.end_ids)
            shutil.rmtree(work)
            self.lines.append(("llama.cpp", str(result) if result else f"not run: {self.not_run}"))
            self.metrics["llama.cpp"] = result.as_json() if result else None
            kind = "GGUF adapter" if self.adapter else "GGUF model"
            if modelfile:
                kind, self.metrics["conversations"] = "Ollama model", modelfile.compared
                (staging / "Modelfile").write_text(modelfile.text, encoding="utf-8")
                self.lines += [*modelfile.lines(), ("Ollama", "itself was not run")]
            self.source.write_record(staging, kind, {"comparison": self.metrics, "chat": self.source.chat})
        client, place = CLIENTS[self.options.to], self.directory.output
        return Exported(place, client, self.lines, self.metrics, self._commands(name))

    def _write_adapter(self, adapter: PlainAdapter, file: Path, work: Path) -> tuple[Path, Path | None, str | None]:
        """Convert the adapter alone. Returns what llama.cpp is run with: model, adapter and template."""
        (work / "adapter").mkdir()
        adapter.write(work / "adapter")
        self.loaded.model.config.save_pretrained(work / "base")
        gguf.convert_adapter(self.converters, work / "adapter", work / "base", file)
        self.metrics |= {"rank": adapter.rank, "modules": gguf.check_adapter(file, adapter)}
        self.lines.append(("tensors", f"{self.metrics['modules']} modules, of the norms that the adapter has"))
        self._write_template(file.parent)
        model = self.base_gguf or work / "base.gguf"
        if not self.not_run and not self.base_gguf:
            try:
                self._convert(tensors.unloaded(self.loaded.model, str(self.source.path)), work / "model", model, "f32")
            except AdapterError as error:
                reasons = "; ".join(problem.what for problem in error.problems)
                self.not_run = f"no GGUF file of the base can be made ({reasons}); name one with --base-gguf"
        return model, file, self.template

    def _write_model(self, file: Path, work: Path) -> tuple[Path, Path | None, str | None]:
        """Merge, and convert the merged model. Returns what llama.cpp is run with."""
        outtype = self.options.merged_type or ""
        if self.base_gguf:
            gguf.check_tokenizer(self.base_gguf, self.loaded.model.config.get_text_config().vocab_size)
        with progress("merging"):
            merged = tensors.merged(self.loaded.model, str(self.source.path))
        self._convert(merged, work / "model", file, outtype, self.base_gguf)
        self.metrics |= {"type": outtype, "tensors": gguf.check_model(file, _count(merged))}
        self.lines.append(("weights", outtype))
        return file, None, None

    def _convert(self, model: Any, directory: Path, file: Path, outtype: str, tokenizer: Path | None = None) -> None:
        """Convert a model, after writing it to a directory with its tokenizer."""
        model.save_pretrained(directory)
        self.loaded.tokenizer.save_pretrained(directory)
        self._write_template(directory)
        vocabulary = Path(local_or_hub(self.source.base.name_or_path)) / "tokenizer.model"
        if vocabulary.is_file() and not (directory / vocabulary.name).exists():  # some converters need it
            shutil.copyfile(vocabulary, directory / vocabulary.name)
        gguf.convert_model(self.converters, directory, file, outtype, tokenizer)

    def _write_template(self, directory: Path) -> None:
        if self.template:
            (directory / _TEMPLATE).write_text(self.template, encoding="utf-8")

    def _commands(self, name: str) -> list[str]:
        """The commands that run it."""
        directory, shell = self.directory.output, escaping.shell
        file = str(directory / f"{name}.gguf")
        if self.options.to == "ollama":
            return [
                f"ollama create {shell(name)} -f {shell(str(directory / 'Modelfile'))}", f"ollama run {shell(name)}"
            ]  # fmt: skip
        if self.adapter:
            template = str(directory / _TEMPLATE) if self.template else None
            return [clients.llama_server(str(self.base_gguf or "BASE.gguf"), file, template)]
        return [f"llama-server --jinja -m {shell(file)}"]
