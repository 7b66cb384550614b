"""`loratune export`: writes an adapter as another program reads it, reads it back, and compares."""

import gc
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratune import escaping, memory
from loratune.commands import card, inference
from loratune.commands.inference import LoadedAdapter
from loratune.config import patterns
from loratune.console import format_size
from loratune.data import DatasetSplit, ProgressFactory
from loratune.errors import AdapterError
from loratune.export import converter, gguf, llama_cpp, ollama, output, plain
from loratune.export.llama_cpp import Question
from loratune.export.texts import FIXED, MOST_TEXTS, texts
from loratune.lora import tensors
from loratune.lora.parameters import file_bytes
from loratune.model import fingerprints, load
from loratune.model.source import local_or_hub
from loratune.training.preflight import AdapterInfo
from loratune.training.run_dir import RunDirectory

_LOGITS = 1 << 24
"""Logits that are kept to be compared, of 4 bytes each."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank of vLLM can be (vllm/config/lora.py)."""
_TYPE = "f16"
"""The type of the weights of a merged GGUF file, if the user names none."""
_ANSWER = 16
"""The longest answer that is compared in llama.cpp, in tokens."""
_Log = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What the user wants.

    Attributes:
        to: The client: peft, vllm, gguf or ollama.
        name: What the client is to call the adapter.
        merged: The type of the weights of a GGUF file of base and adapter; None for the adapter alone, or the default.
        llama_cpp: A checkout of llama.cpp.
        base_gguf: A GGUF file of the base.
    """

    to: str
    name: str
    merged: str | None = None
    llama_cpp: Path | None = None
    base_gguf: Path | None = None


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
    converters = converter.find(order.llama_cpp)
    gguf.check_package()
    if not llama_cpp.is_installed():
        log(f"llama.cpp will not be run: {llama_cpp.INSTALL}")
    if order.to == "ollama":
        return _ollama(source, directory, order, split, log, converters)
    make = _merged_gguf if order.merged else _adapter_gguf
    return make(source, directory, order, split, log, converters)


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


def name_of(directory: RunDirectory) -> str:
    """What the client is to call the adapter: the name of the output, of the characters that all clients take."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", directory.output.name).strip("-.") or "adapter"


def in_float32(source: AdapterInfo) -> AdapterInfo:
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


def _adapter_gguf(
    source: AdapterInfo, directory: RunDirectory, order: Order, split: DatasetSplit | None, log: _Log, converters: Path
) -> Exported:
    """The adapter as a GGUF file, for a GGUF file of its base."""
    files = source.files
    plain.check_plain(files, "gguf")
    meta = load.build_meta(load.load_config(source.base), source.base)
    adapter = plain.fold(files, [path for path, _ in meta.named_modules()])
    gguf.check_layers(meta, patterns.adapted_modules(files.tensors), str(files.path))
    loaded = inference.load(in_float32(source), log)
    asked = questions(loaded, source, split)
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


def _merged_gguf(
    source: AdapterInfo, directory: RunDirectory, order: Order, split: DatasetSplit | None, log: _Log, converters: Path
) -> Exported:
    """Base and adapter as one GGUF file."""
    loaded = inference.load(in_float32(source), log)
    asked = questions(loaded, source, split)
    with output.staged(directory, _merged_size(loaded), "the GGUF file") as staging:
        file, lines, figures = _convert_merged(loaded, source, order, asked, staging, converters)
        output.write_record(staging, "GGUF model", source, {"comparison": figures, "chat": source.chat})
    command = f"llama-server --jinja -m {escaping.shell(str(directory.output / file.name))}"
    return Exported(directory.output, "llama.cpp", lines, figures, [command])


def _ollama(
    source: AdapterInfo, directory: RunDirectory, order: Order, split: DatasetSplit | None, log: _Log, converters: Path
) -> Exported:
    """Base and adapter as one GGUF file, with a Modelfile."""
    loaded = inference.load(in_float32(source), log)
    modelfile = ollama.modelfile(loaded.renderer, f"{order.name}.gguf", chat=source.chat)
    asked = questions(loaded, source, split)
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


def questions(loaded: LoadedAdapter, source: AdapterInfo, split: DatasetSplit | None) -> list[Question]:
    """Prompts of the rows, or of the training rows and fixed ones, with the adapter's likeliest answers."""
    rows = card.recorded_prompts(split, most=MOST_TEXTS) if split else [*source.files.record.get("prompts", ())]
    if not split:
        rows += [
            {"messages": [{"role": "user", "content": text}]} if source.chat else {"prompt": text} for text in FIXED
        ]
    prompts = [
        tuple(row["input_ids"])
        if "input_ids" in row
        else loaded.renderer.prompt(row["messages"] if "messages" in row else row["prompt"], "", row.get("tools") or ())
        for row in rows
    ]
    answers = [loaded.complete([prompt], _ANSWER)[0] for prompt in prompts]
    adapted = [_log_probabilities(loaded, *pair) for pair in zip(prompts, answers, strict=True)]
    with loaded.without_adapter():
        base = [_log_probabilities(loaded, *pair) for pair in zip(prompts, answers, strict=True)]
    return [
        Question({} if "input_ids" in row else row, prompt, answer, first, alone, second)
        for row, prompt, answer, (first, second), (alone, _) in zip(rows, prompts, answers, adapted, base, strict=True)
    ]


@torch.inference_mode()
def _log_probabilities(
    loaded: LoadedAdapter, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[list[float], list[float]]:
    """The log-probability of each token of an answer, and that of the likeliest other token."""
    row = torch.tensor([[*prompt, *answer]], device=loaded.model.device)
    logits = loaded.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].double().cpu()
    chances = logits.log_softmax(-1)
    tokens = torch.tensor(answer)[:, None]
    own = chances.gather(1, tokens)[:, 0].tolist()
    return own, chances.scatter(1, tokens, -torch.inf).amax(-1).tolist()


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
