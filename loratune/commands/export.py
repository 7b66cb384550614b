"""`loratune export`: writes an adapter as another program reads it, reads it back, and compares.

For PEFT and vLLM it is a plain LoRA directory, compared as stock PEFT reads it. For llama.cpp and Ollama it is a GGUF
file by llama.cpp's own converters, run in llama.cpp.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratune import escaping, memory
from loratune.adapter import loading
from loratune.adapter.directory import RUN_FILE, AdapterDirectory
from loratune.config import patterns
from loratune.console import format_size, progress
from loratune.data import DatasetSplit, ProgressFactory, no_progress
from loratune.errors import AdapterError
from loratune.export import clients, gguf, llama_cpp, ollama, output, plain
from loratune.export.clients import CLIENTS, ExportOptions
from loratune.export.texts import scored_answers, texts
from loratune.lora import tensors
from loratune.lora.mixture import PlainAdapter
from loratune.lora.parameters import file_bytes
from loratune.model import fingerprints, load
from loratune.model.source import local_or_hub
from loratune.training.run_dir import RunDirectory

_MOST_LOGITS = 1 << 24
"""Logits that are kept to be compared, of 4 bytes each."""
_TEMPLATE = "chat_template.jinja"
Log = Callable[[str], None]


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
    directory: RunDirectory,
    options: ExportOptions,
    *,
    mix: Mapping[str, float] | None = None,
    split: DatasetSplit | None = None,
    watch: ProgressFactory = no_progress,
    log: Log = lambda _: None,
) -> Exported:
    """Write an adapter for one program.

    Args:
        source: The adapter.
        directory: The output, see `output.check`.
        options: The program, and how the adapter is written for it.
        mix: Name → weight of the adapters whose sum it is, for the record.
        split: The rows that the user wants it compared on.
        watch: Shows progress.
        log: Takes lines about the adapter.

    Raises:
        AdapterError: The program cannot read the adapter, the base is another one, or what was written does not compute
            what the adapter computes.
        ConfigError: llama.cpp's converters are not installed.
        ModelError, DataError: The base or the rows cannot be used.
        ResourceError: The disk is full.
    """
    exact = replace(source, base=source.base.model_copy(update={"dtype": "float32"}))  # rounding hides differences
    if options.uses_llama_cpp:
        made: _GgufExport | _PlainExport = _GgufExport(exact, directory, options, split, log)
    else:
        made = _PlainExport(exact, directory, options, mix or {})
        made.compute_logits(split, watch, log)
    made.write()
    client = CLIENTS[options.to]
    return Exported(directory.output, client, made.lines, made.metrics, made.commands())


def _base_without_weights(source: AdapterDirectory) -> Any:
    with loading.finding_base(source):
        return load.build_meta(load.load_config(source.base), source.base)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _PlainExport:
    """A plain LoRA directory, for PEFT and vLLM."""

    def __init__(
        self, source: AdapterDirectory, directory: RunDirectory, options: ExportOptions, mix: Mapping[str, float]
    ):
        plain.check_plain(source.files, options.to)
        self.source, self.directory, self.options, self.mix = source, directory, options, mix
        meta = _base_without_weights(source)
        self.adapter = plain.fold(source.files, [path for path, _ in meta.named_modules()])
        self.metrics: dict[str, Any] = {"rank": self.adapter.rank, "modules": len(self.adapter.tensors) // 2}
        self.lines: list[tuple[str, str]] = []
        self.ids: list[Sequence[int]] = []
        self.expected: list[torch.Tensor] = []
        needed, free = 5 * _count(meta), memory.available(load.device())
        too_large = f"the base in float32 needs {format_size(needed)}, {format_size(free)} are free"
        self.not_compared = options.why_not_verified or (too_large if needed > free else "")
        self.base: Any = None

    def compute_logits(self, split: DatasetSplit | None, watch: ProgressFactory, log: Log) -> None:
        """The logits of base and adapter, if they are to be compared."""
        if self.not_compared:
            return
        loaded = loading.load(self.source, log)
        size = loaded.model.config.get_text_config().vocab_size
        compared = texts(self.source, loaded.renderer, size, split, watch)
        left = _MOST_LOGITS // size
        for text in compared.ids:
            self.ids += [text[: min(256, left)]] if text and left else []
            left = max(0, left - len(text[:256]))
        self.expected, self.metrics["texts"] = _logits(loaded.model, self.ids), compared.origin
        self.base = tensors.detached(loaded.model)

    def write(self) -> None:
        """Write the directory, read it back, and compare."""
        files, fingerprint = self.source.files, self.source.files.base_fingerprint
        size = file_bytes(self.adapter.tensors) + (1 << 20)
        with output.staged(self.directory, size, "the adapter") as staging:
            self.adapter.write(staging)
            self.source.copy_tokenizer(staging, RUN_FILE)
            self.metrics["tensors"] = plain.check_tensors(files, staging)
            result, self.metrics["logits"] = f"not compared: {self.not_compared}", None
            if not self.not_compared:
                fingerprint = fingerprint or fingerprints.fingerprint(self.base)
                found = _logits(tensors.stock(self.base, staging), self.ids)
                self.metrics["logits"] = plain.check_logits(files, self.expected, found)
                difference = _difference(self.metrics["logits"], "the largest")
                result = f"logits {difference}, on {self.metrics['texts']}"
            details = {"comparison": self.metrics, "chat": self.source.chat, "mix": {**self.mix}}
            kind = f"plain LoRA for {CLIENTS[self.options.to]}"
            self.source.write_record(staging, kind, {**details, "fingerprints": {"base": fingerprint}})
        each = f"{_difference(self.metrics['tensors'], 'its norm')}, {self.metrics['modules']} modules"
        rank = f"{self.adapter.rank}, lora_alpha {self.adapter.rank}"
        self.lines = [("each ΔW", each), ("in PEFT", result), ("rank", rank)]
        self.lines += [("note", note) for note in self.adapter.notes]

    def commands(self) -> list[str]:
        """The command that serves it with vLLM, which would take the chat template of the base."""
        if self.options.to != "vllm":
            return []
        place, template = self.directory.output, self.directory.output / _TEMPLATE
        rendering = str(template) if self.source.chat and template.is_file() else None
        base, name = self.source.base.name_or_path, clients.name_of(place.name)
        return [clients.vllm(base, name, str(place), self.adapter.rank, rendering)]


def _difference(share: float, whole: str) -> str:
    return f"equal to within {share:.0e} of {whole}" if share else "equal"


@torch.inference_mode()
@progress("computing logits")
def _logits(model: Any, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits of each text."""
    rows = (torch.tensor([text], device=model.device) for text in ids)
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows]


class _GgufExport:
    """A GGUF file, for llama.cpp and Ollama: of the adapter, or of base and adapter as one model."""

    def __init__(
        self,
        source: AdapterDirectory,
        directory: RunDirectory,
        options: ExportOptions,
        split: DatasetSplit | None,
        log: Log,
    ):
        self.source, self.directory, self.options = source, directory, options
        self.converters = gguf.find_converters(options.llama_cpp)
        self.not_run = options.why_not_verified
        if self.not_run:
            log(f"llama.cpp will not be run: {self.not_run}")
        self.adapter = None if options.merged_type else self._fold()
        self.loaded = loading.load(source, log)
        self.name = clients.name_of(directory.output.name)
        self.modelfile = None
        if options.to == "ollama":
            self.modelfile = ollama.modelfile(self.loaded.renderer, f"{self.name}.gguf", chat=source.chat)
        self.answers = [] if self.not_run else scored_answers(self.loaded, source, split)
        self.lines: list[tuple[str, str]] = []
        self.metrics: dict[str, Any] = {}

    def _fold(self) -> PlainAdapter:
        files = self.source.files
        plain.check_plain(files, "gguf")
        meta = _base_without_weights(self.source)
        adapter = plain.fold(files, [path for path, _ in meta.named_modules()])
        gguf.check_layers(meta, patterns.adapted_modules(files.tensors), str(files.path))
        return adapter

    def write(self) -> None:
        """Convert, read the file back, and compare."""
        converts_model = self.adapter is None or not (self.not_run or self._base_gguf())
        size = (2 * file_bytes(self.adapter.tensors) if self.adapter else 0) + (
            8 * _count(self.loaded.model) if converts_model else 0  # the model and its GGUF file
        )
        with output.staged(self.directory, size, "the GGUF file") as staging:
            work, file = staging / "work", staging / f"{self.name}.gguf"
            work.mkdir()
            if self.adapter:
                self._write_adapter(self.adapter, file, work)
            else:
                self._write_model(file, work)
            shutil.rmtree(work)
            kind = "GGUF adapter" if self.adapter else "GGUF model"
            if self.modelfile:
                kind, self.metrics["conversations"] = "Ollama model", self.modelfile.compared
                (staging / "Modelfile").write_text(self.modelfile.text, encoding="utf-8")
            self.source.write_record(staging, kind, {"comparison": self.metrics, "chat": self.source.chat})
        if self.modelfile:
            count = self.modelfile.compared
            rendered = f"{count} conversations rendered as by the chat template" if self.source.chat else "raw text"
            notes = [("note", note) for note in self.modelfile.notes]
            self.lines += [("template", rendered), *notes, ("Ollama", "itself was not run")]

    def _write_adapter(self, adapter: PlainAdapter, file: Path, work: Path) -> None:
        """Convert the adapter alone. It is tried on a GGUF file of its base, which may have to be made."""
        plain_directory, base = work / "adapter", work / "base"
        plain_directory.mkdir()
        adapter.write(plain_directory)
        self.loaded.model.config.save_pretrained(base)
        gguf.convert_adapter(self.converters, plain_directory, base, file)
        self.metrics |= {"rank": adapter.rank, "modules": gguf.check_adapter(file, adapter)}
        self.lines.append(("tensors", f"{self.metrics['modules']} modules, of the norms that the adapter has"))
        template = self._write_template(file.parent)
        model = self._base_gguf()
        if not self.not_run and model is None:
            model = work / "base.gguf"
            try:
                dense = tensors.unloaded(self.loaded.model, str(self.source.path))
                self._convert(dense, work / "model", model, "f32")
            except AdapterError as error:
                reasons = "; ".join(problem.what for problem in error.problems)
                self.not_run = f"no GGUF file of the base can be made ({reasons}); name one with --base-gguf"
        self._run(model, file, template)

    def _write_model(self, file: Path, work: Path) -> None:
        """Merge, and convert the merged model."""
        tokenizer, outtype = self._base_gguf(), self.options.merged_type or ""
        if tokenizer:
            gguf.check_tokenizer(tokenizer, self.loaded.model.config.get_text_config().vocab_size)
        with progress("merging"):
            merged = tensors.merged(self.loaded.model, str(self.source.path))
        self._convert(merged, work / "model", file, outtype, tokenizer)
        self.metrics |= {"type": outtype, "tensors": gguf.check_model(file, _count(merged))}
        self.lines.append(("weights", outtype))
        self._run(file, None, None)

    def _run(self, model: Path | None, adapter: Path | None, template: str | None) -> None:
        """Run llama.cpp, and compare its answers with those of the adapter."""
        result = None
        if model and not self.not_run:
            result = llama_cpp.compare(model, adapter, template, self.answers, self.loaded.renderer.end_ids)
        self.lines.append(("llama.cpp", str(result) if result else f"not run: {self.not_run}"))
        self.metrics["llama.cpp"] = result.as_json() if result else None

    def _convert(self, model: Any, directory: Path, file: Path, outtype: str, tokenizer: Path | None = None) -> None:
        """Convert a model, after writing it to a directory with its tokenizer."""
        model.save_pretrained(directory)
        self.loaded.tokenizer.save_pretrained(directory)
        self._write_template(directory)
        vocabulary = Path(local_or_hub(self.source.base.name_or_path)) / "tokenizer.model"
        if vocabulary.is_file() and not (directory / vocabulary.name).exists():  # some converters need it
            shutil.copyfile(vocabulary, directory / vocabulary.name)
        gguf.convert_model(self.converters, directory, file, outtype, tokenizer)
        shutil.rmtree(directory)

    def _write_template(self, directory: Path) -> str | None:
        """Write the chat template, if there is one, as a file of its own."""
        template = self.loaded.tokenizer.chat_template
        if not isinstance(template, str):
            return None
        (directory / _TEMPLATE).write_text(template, encoding="utf-8")
        return template

    def _base_gguf(self) -> Path | None:
        """The GGUF file that the user names, or that the base was loaded from, if any."""
        base = self.source.base
        if self.options.base_gguf is not None or base.gguf_file is None:
            return self.options.base_gguf
        file = Path(local_or_hub(base.name_or_path)) / base.gguf_file
        return file if file.is_file() else None

    def commands(self) -> list[str]:
        """The commands that run it."""
        directory = self.directory.output
        file = str(directory / f"{self.name}.gguf")
        if self.modelfile:
            name = escaping.shell(self.name)
            created = f"ollama create {name} -f {escaping.shell(str(directory / 'Modelfile'))}"
            return [created, f"ollama run {name}"]
        if self.adapter:
            template = str(directory / _TEMPLATE) if isinstance(self.loaded.tokenizer.chat_template, str) else None
            return [clients.llama_server(str(self._base_gguf() or "BASE.gguf"), file, template)]
        return [f"llama-server --jinja -m {escaping.shell(file)}"]
