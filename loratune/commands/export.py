"""`loratune export`: writes an adapter in the format of another program, reads it back, and compares it.

For PEFT and vLLM, the output is a plain LoRA directory, which is loaded in stock PEFT for the comparison. For llama.cpp
and Ollama, it is a GGUF file, written by llama.cpp's converters and compared in llama.cpp.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratune import memory
from loratune.adapter import loading
from loratune.adapter.directory import RUN_FILE, AdapterDirectory
from loratune.data import DatasetSplit
from loratune.errors import AdapterError
from loratune.events import note
from loratune.export import clients, experts, gguf, ollama
from loratune.export.clients import CLIENTS, ExportOptions
from loratune.export.comparison import check_logits, check_plain, check_tensors, fold, scored_answers, texts
from loratune.export.experts import Placement
from loratune.export.gguf import TEMPLATE, Conversion, LlamaCppResult, ScoredAnswer
from loratune.lora import tensors
from loratune.lora.merging import PlainAdapter
from loratune.lora.parameters import file_bytes
from loratune.lora.tensors import PARAMETERS
from loratune.model import fingerprints, load
from loratune.model.source import local_or_hub
from loratune.model.upstream import quiet_transformers
from loratune.system.output_dir import OutputDirectory
from loratune.text import format_size


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        directory: The output directory.
        client: The target program.
        lines: The results of the comparison, as names and texts.
        metrics: The results of the comparison by name, for JSON.
        commands: Commands that use the export.
    """

    directory: Path
    client: str
    lines: Sequence[tuple[str, str]]
    metrics: dict[str, Any]
    commands: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return {
            "directory": str(self.directory), "client": self.client, "comparison": self.metrics,
            "commands": [*self.commands],
        }  # fmt: skip


@quiet_transformers()
def export(
    source: AdapterDirectory,
    directory: OutputDirectory,
    options: ExportOptions,
    made_of: Mapping[str, Any],
    *,
    split: DatasetSplit | None = None,
) -> Exported:
    """Write an adapter for another program.

    Args:
        source: The adapter.
        directory: The output, see `OutputDirectory.check`.
        options: The program, and how the adapter is written for it.
        made_of: `mix`, name → weight of the adapters whose sum it is; `adapter_scale`; for the record.
        split: The rows that the user wants it compared on.

    Raises:
        AdapterError: The program cannot read the adapter, the base is another one, or the results of the export differ
            from those of the adapter.
        ConfigError: llama.cpp's converters are not installed.
        ModelError, DataError: The base or the rows cannot be used.
        ResourceError: The disk is full.
    """
    exact = replace(source, base=source.base.model_copy(update={"dtype": "float32"}))  # rounding hides differences
    if options.uses_llama_cpp:
        return _export_gguf(exact, directory, options, split)
    return _export_plain(exact, directory, options, dict(made_of), split)


def _fold(
    source: AdapterDirectory, options: ExportOptions
) -> tuple[PlainAdapter, Any, Mapping[str, str], Sequence[Placement]]:
    """The adapter as plain LoRA, its base without weights, the parameters that it adapts, and where its A and B are."""
    check_plain(source.files, options.to)
    with loading.finding_base(source):
        config = load.load_config(source.base)
        base = load.build_meta(config, source.base)
    parameters = experts.adapted_parameters(source.files, base)
    adapter = fold(source.files, [path for path, _ in base.named_modules()], parameters)
    architecture = next(iter(config.architectures or ()), type(base).__name__)
    places = experts.place(source.files, base, parameters, options.to, architecture)
    return experts.placed(adapter, base, parameters, places), base, parameters, places


def _export_plain(
    source: AdapterDirectory,
    directory: OutputDirectory,
    options: ExportOptions,
    details: dict[str, Any],
    split: DatasetSplit | None,
) -> Exported:
    """Write a plain LoRA directory, for PEFT and vLLM. details: further fields of its record."""
    adapter, meta, parameters, places = _fold(source, options)
    needed, free = 5 * sum(parameter.numel() for parameter in meta.parameters()), memory.available(load.device())
    not_compared = options.why_not_verified
    if parameters and not adapter.config.get(PARAMETERS):
        not_compared = "PEFT does not read experts one by one"
    elif needed > free and not not_compared:
        not_compared = f"the base in float32 needs {format_size(needed)}, {format_size(free)} are free"
    metrics: dict[str, Any] = {"rank": adapter.rank, "modules": len(adapter.tensors) // 2, "logits": None}
    fingerprint, in_peft = source.files.base_fingerprint, f"not compared: {not_compared}"
    loaded = None if not_compared else loading.load(source)
    compared = loaded and texts(source, loaded.renderer, meta.config.get_text_config().vocab_size, split)
    with directory.staged(file_bytes(adapter.tensors) + (1 << 20), "the adapter") as staging:
        adapter.write(staging)
        source.copy_tokenizer(staging, RUN_FILE)
        metrics["tensors"] = check_tensors(source.files, staging, parameters, places)
        if loaded and compared:
            metrics["texts"] = compared.origin
            metrics["logits"] = check_logits(source.files, loaded.model, staging, compared.ids)
            in_peft = f"logits {_difference(metrics['logits'], 'the largest')}, on {compared.origin}"
            fingerprint = fingerprint or fingerprints.fingerprint(tensors.detached(loaded.model))
        details |= {"comparison": metrics, "chat": source.chat, "fingerprints": {"base": fingerprint}}
        source.write_record(staging, f"plain LoRA for {CLIENTS[options.to]}", details)
    lines = [
        ("each ΔW", f"{_difference(metrics['tensors'], 'its norm')}, {metrics['modules']} modules"),
        ("in PEFT", in_peft),
        ("rank", f"{adapter.rank}, lora_alpha {adapter.rank}"),
        *(("note", note) for note in adapter.notes),
    ]
    commands = []
    if options.to == "vllm":
        place, template = directory.output, directory.output / TEMPLATE  # vLLM would use the base's template
        rendering = str(template) if source.chat and template.is_file() else None
        base, name = source.base.name_or_path, clients.name_of(place.name)
        arguments = source.data.chat_template_kwargs
        commands = [clients.vllm(base, name, str(place), adapter.rank, rendering, arguments)]
    return Exported(directory.output, CLIENTS[options.to], lines, metrics, commands)


def _difference(share: float, whole: str) -> str:
    return f"equal to within {share:.0e} of {whole}" if share else "equal"


def _export_gguf(
    source: AdapterDirectory, directory: OutputDirectory, options: ExportOptions, split: DatasetSplit | None
) -> Exported:
    """Write a GGUF file, for llama.cpp and Ollama: of the adapter, or of the merged model."""
    converters, not_run = gguf.find_converters(options.llama_cpp), options.why_not_verified
    if not_run:
        note(f"llama.cpp will not be run: {not_run}")
    adapter = None if options.merged_type else _fold(source, options)[0]
    loaded, base_gguf = loading.load(source), options.base_gguf or _own_gguf(source)
    if adapter:
        gguf.check_layers(loaded.model, str(source.path))
    name = clients.name_of(directory.output.name)
    is_ollama = options.to == "ollama"
    modelfile = ollama.modelfile(loaded.renderer, f"{name}.gguf", chat=source.chat) if is_ollama else None
    answers = [] if not_run else scored_answers(loaded, source, split)
    is_small = adapter and (not_run or base_gguf)  # no GGUF file of the base has to be written
    size = 2 * file_bytes(adapter.tensors) if adapter and is_small else 8 * loaded.model.num_parameters()
    with directory.staged(size, "the GGUF file") as staging:
        file = staging / f"{name}.gguf"
        with TemporaryDirectory(dir=staging) as work:
            conversion = Conversion(loaded, source.base.name_or_path, converters, Path(work), base_gguf)
            if adapter:
                metrics: dict[str, Any] = {"rank": adapter.rank, "modules": conversion.write_adapter(adapter, file)}
                lines = [("tensors", f"{metrics['modules']} modules, of the norms that the adapter has")]
            else:
                outtype = str(options.merged_type)
                metrics = {"type": outtype, "tensors": conversion.write_merged(file, outtype)}
                lines = [("weights", outtype)]
            compared = not_run or _run(conversion, file, answers, is_adapter=adapter is not None)
        metrics["llama.cpp"] = None if isinstance(compared, str) else asdict(compared)
        lines.append(("llama.cpp", f"not run: {compared}" if isinstance(compared, str) else str(compared)))
        if modelfile:
            metrics["conversations"] = modelfile.compared
            lines += modelfile.lines()
            (staging / "Modelfile").write_text(modelfile.text, encoding="utf-8")
        kind = "Ollama model" if modelfile else "GGUF adapter" if adapter else "GGUF model"
        source.write_record(staging, kind, {"comparison": metrics, "chat": source.chat})
    file = directory.output / file.name
    base = str(base_gguf or "BASE.gguf") if adapter else None
    commands = [clients.llama_server(file, base, arguments=source.data.chat_template_kwargs)]
    commands = ollama.commands(name, file.with_name("Modelfile")) if modelfile else commands
    return Exported(directory.output, CLIENTS[options.to], lines, metrics, commands)


def _own_gguf(source: AdapterDirectory) -> Path | None:
    """The GGUF file of the base, if it was loaded from a local one."""
    file = Path(local_or_hub(source.base.name_or_path)) / (source.base.gguf_file or "")
    return file if source.base.gguf_file and file.is_file() else None


def _run(
    conversion: Conversion, file: Path, answers: Sequence[ScoredAnswer], *, is_adapter: bool
) -> LlamaCppResult | str:
    """Compare the answers of a GGUF file in llama.cpp with those of the adapter; or why it cannot be run."""
    ends = conversion.loaded.renderer.end_ids
    if not is_adapter:
        return gguf.compare(file, None, None, answers, ends)
    try:
        model = conversion.base_gguf or conversion.write_base()
    except AdapterError as error:
        reasons = "; ".join(problem.what for problem in error.problems)
        return f"no GGUF file of the base can be made ({reasons}); name one with --base-gguf"
    return gguf.compare(model, file, conversion.template, answers, ends)
