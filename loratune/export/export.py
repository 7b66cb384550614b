"""`loratune export`: writes an adapter in the format of another program, reads it back, and compares it.

For PEFT, vLLM and SGLang, the output is a plain LoRA directory, which is loaded in stock PEFT for the comparison; then
its keys get the names that the server needs. For llama.cpp and Ollama, it is a GGUF file, written by llama.cpp's
converters and compared in llama.cpp.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratune import memory, outputs
from loratune.adapter import clients, loading
from loratune.adapter.clients import CLIENTS, ExportOptions
from loratune.adapter.directory import RUN_FILE, SYSTEM, AdapterDirectory
from loratune.config.template_arguments import FIELD
from loratune.data import DatasetSplit
from loratune.errors import AdapterError
from loratune.events import note
from loratune.export import experts, gguf, ollama, vllm
from loratune.export.answers import ScoredAnswer
from loratune.export.comparison import check_logits, check_plain, check_tensors, fold, scored_answers, texts
from loratune.export.experts import Placement
from loratune.export.gguf import TEMPLATE, Conversion, LlamaCppResult
from loratune.lora import tensors
from loratune.lora.merging import PlainAdapter
from loratune.lora.parameters import file_bytes
from loratune.lora.served import SERVERS, Served, names_for, renamed
from loratune.lora.tensors import PARAMETERS
from loratune.model import fingerprints, load
from loratune.model.quantization import record_of
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

    def to_dict(self) -> outputs.Export:
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
    if options.to != "ollama":
        source.note_system()
    if options.uses_llama_cpp:
        return _export_gguf(exact, directory, options, split)
    return _export_plain(exact, directory, options, dict(made_of), split)


@dataclass(frozen=True)
class _Folded:
    """An adapter as plain LoRA.

    Attributes:
        adapter: With the paths of A and B that a program reads, as our base names them.
        base: Its base without weights.
        parameters: Path of A and B → the parameter that they adapt.
        places: Where its A and B are.
        served: The names of its modules in a server; None: the program is none.
    """

    adapter: PlainAdapter
    base: Any
    parameters: Mapping[str, str]
    places: Sequence[Placement]
    served: Served | None


def _fold(source: AdapterDirectory, options: ExportOptions) -> _Folded:
    """The adapter as plain LoRA for a program."""
    check_plain(source.files, options.to)
    with loading.finding_base(source):
        config = load.load_config(source.base)
        base = load.build_meta(config, source.base)
    parameters = experts.adapted_parameters(source.files, base)
    adapter = fold(source.files, [path for path, _ in base.named_modules()], parameters)
    architecture = next(iter(config.architectures or ()), type(base).__name__)
    places = experts.place(source.files, base, parameters, options.to, architecture)
    adapter = experts.placed(adapter, base, parameters, places)
    served = None
    if options.to in SERVERS:
        served = names_for(options.to, config, type(base).__name__, adapter.modules, str(source.path))
    return _Folded(adapter, base, parameters, places, served)


def _export_plain(
    source: AdapterDirectory,
    directory: OutputDirectory,
    options: ExportOptions,
    details: dict[str, Any],
    split: DatasetSplit | None,
) -> Exported:
    """Write a plain LoRA directory, for PEFT, vLLM and SGLang. details: further fields of its record."""
    folded, client, in_server = _fold(source, options), CLIENTS[options.to], ""
    adapter, meta, served = folded.adapter, folded.base, folded.served
    not_compared, not_run = _why_not(source, folded, options)
    metrics: dict[str, Any] = {"rank": adapter.rank, "modules": len(adapter.modules), "logits": None}
    loaded = None if not_compared and not_run else loading.load(source)
    vocabulary = meta.config.get_text_config().vocab_size
    compared = texts(source, loaded.renderer, vocabulary, split) if loaded and not not_compared else None
    answers = scored_answers(loaded, source, split) if loaded and not not_run else []
    with directory.staged(file_bytes(adapter.tensors) + (1 << 20), "the adapter") as staging:
        adapter.write(staging)
        source.copy_tokenizer(staging, RUN_FILE)
        metrics["tensors"] = check_tensors(source.files, staging, folded.parameters, folded.places)
        fingerprint = source.files.base_fingerprint
        if loaded and compared:
            metrics["texts"] = compared.origin
            metrics["logits"] = check_logits(source.files, loaded.model, staging, compared.ids)
            fingerprint = fingerprint or fingerprints.fingerprint(tensors.detached(loaded.model))
        if served:
            renamed(adapter, served, meta).write(staging)
            base, python = source.base.name_or_path, options.runs_vllm
            result = vllm.compare(python, base, staging, adapter.rank, answers, str(source.path)) if answers else None
            metrics["server"] = {
                "class": served.architecture,
                "release": served.release,
                "run": result and asdict(result),
            }
            in_server = f"{served}; {result or f'not run: {not_run}'}"
        details |= {"comparison": metrics, "chat": source.chat, "fingerprints": {"base": fingerprint}}
        details |= {SYSTEM: source.system} if source.system else {}
        source.write_record(staging, f"plain LoRA for {client}", details)
    lines = _plain_lines(adapter, metrics, not_compared, (client, in_server))
    return Exported(
        directory.output, client, lines, metrics, _server_commands(source, directory, options, adapter.rank)
    )


def _plain_lines(
    adapter: PlainAdapter, metrics: Mapping[str, Any], not_compared: str, in_server: tuple[str, str]
) -> list[tuple[str, str]]:
    """The lines of a plain LoRA directory. in_server: a server, and what is known of the adapter there."""
    logits = f"not compared: {not_compared}"
    if not not_compared:
        logits = f"logits {_difference(metrics['logits'], 'the largest')}, on {metrics['texts']}"
    lines = [
        ("each ΔW", f"{_difference(metrics['tensors'], 'its norm')}, {metrics['modules']} modules"),
        ("in PEFT", logits),
        (f"in {in_server[0]}", in_server[1]),
        ("rank", f"{adapter.rank}, lora_alpha {adapter.rank}"),
        *(("note", note) for note in adapter.notes),
    ]
    return [line for line in lines if line[1]]


def _why_not(source: AdapterDirectory, folded: _Folded, options: ExportOptions) -> tuple[str, str]:
    """Why the export is not compared in PEFT, and why it is not run in a server; each is empty if it is."""
    copies = 9 if options.runs_vllm else 5  # bytes per parameter: vLLM loads the base once more
    needed, free = copies * sum(value.numel() for value in folded.base.parameters()), memory.available(load.device())
    reason = options.why_not_verified
    if needed > free and not reason:
        reason = f"the base in float32 needs {format_size(needed)}, {format_size(free)} are free"
    each = folded.parameters and not folded.adapter.config.get(PARAMETERS)
    not_compared = reason or "PEFT has experts in another form" * bool(each)
    if not options.runs_vllm:
        name = ", name it with `vllm_python=...`" * (options.to == "vllm")
        return not_compared, reason or f"{CLIENTS[options.to]} is not found{name}"
    is_dense = source.base.quantization == "none" and source.base.gguf_file is None
    is_dense &= record_of(load.load_config(source.base).to_dict()) is None
    return not_compared, reason or "vLLM loads the base in another form than training did" * (not is_dense)


def _server_commands(
    source: AdapterDirectory, directory: OutputDirectory, options: ExportOptions, rank: int
) -> list[str]:
    """The commands that serve an export."""
    place = directory.output
    template = place / TEMPLATE  # a server would use the base's template
    rendering = str(template) if source.chat and template.is_file() else None
    base, name, arguments = source.base.name_or_path, clients.name_of(place.name), source.data.chat_template_kwargs
    if options.to == "sglang":
        return [clients.sglang(base, name, str(place), rendering)]
    return [clients.vllm(base, name, str(place), rank, rendering, arguments)] if options.to == "vllm" else []


def _difference(share: float, whole: str) -> str:
    return f"equal to within {share:.0e} of {whole}" if share else "equal"


def _export_gguf(
    source: AdapterDirectory, directory: OutputDirectory, options: ExportOptions, split: DatasetSplit | None
) -> Exported:
    """Write a GGUF file, for llama.cpp and Ollama: of the adapter, or of the merged model."""
    converters, not_run = gguf.find_converters(options.llama_cpp), options.why_not_verified
    if not_run:
        note(f"llama.cpp will not be run: {not_run}")
    adapter = None if options.merged_type else _fold(source, options).adapter
    loaded, base_gguf = loading.load(source), options.base_gguf or _own_gguf(source)
    if adapter:
        gguf.check_layers(loaded.model, str(source.path))
    name = clients.name_of(directory.output.name)
    is_ollama = options.to == "ollama"
    modelfile = None
    if is_ollama:
        modelfile = ollama.modelfile(loaded.renderer, f"{name}.gguf", chat=source.chat, system=source.system)
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
    commands = [clients.llama_server(file, base, arguments=clients.llama_cpp_arguments(source.data))]
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
    ends, arguments = conversion.loaded.renderer.end_ids, clients.llama_cpp_arguments(conversion.loaded.data)
    if arguments:
        asked = [
            {**one.request, FIELD: arguments | one.request.get(FIELD, {})} if "messages" in one.request else one.request
            for one in answers
        ]
        answers = [replace(one, request=request) for one, request in zip(answers, asked, strict=True)]
    if not is_adapter:
        return gguf.compare(file, None, None, answers, ends)
    try:
        model = conversion.base_gguf or conversion.write_base()
    except AdapterError as error:
        reasons = "; ".join(problem.what for problem in error.problems)
        return f"no GGUF file of the base can be made ({reasons}); name one with `base_gguf=...`"
    return gguf.compare(model, file, conversion.template, answers, ends)
