"""Loads adapter directories for inference: loads the base once, verifies it against the adapters, and attaches them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from loratune import kernels
from loratune.adapter.directory import RUN_FILE, AdapterDirectory
from loratune.adapter.generation import LoadedAdapter, SharedPrompts, reader
from loratune.adapter.options import Selection
from loratune.codes import Code
from loratune.config import ModelSection
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, ModelError, Problem
from loratune.events import note, progress
from loratune.lora import attach, merging, tensors
from loratune.lora.adapter_files import AdapterFiles
from loratune.lora.attach import PeftModel
from loratune.lora.tensors import BaseSnapshot
from loratune.model import fingerprints
from loratune.model.fingerprints import FileStates, Sampled
from loratune.model.load import check_machine, load_base, load_tokenizer, pad_id
from loratune.model.source import local_or_hub


@dataclass(frozen=True)
class LoadedAdapters:
    """The adapters of a command, all on one base.

    Attributes:
        by_name: Name → adapter; empty for an unnamed adapter or a mixture.
        default: The adapter for prompts that name none.
        label: The name of the default in output.
    """

    by_name: Mapping[str, LoadedAdapter]
    default: LoadedAdapter
    label: str


def load(adapter: AdapterDirectory) -> LoadedAdapter:
    """Load the base of an adapter directory and attach the adapter. Raises as `load_all` does."""
    return load_all([adapter])[0]


def load_computing_in(dtype: str, adapter: AdapterDirectory) -> LoadedAdapter:
    """As `load`, with the same base, but computed in another dtype than in training: a base that is quantized as it is
    loaded is quantized from weights in the dtype of training. Raises as `load_all` does."""
    if adapter.base.quantization == "none":
        base = adapter.base.model_copy(update={"dtype": dtype})
        return load(replace(adapter, base=base, forced=True))
    model, fingerprint, check = _load_base([adapter], adapter.base)
    import_module("loratune.kernels.quantized").cast_dense_weights(model, getattr(torch, dtype))
    return _attach_all(model, fingerprint, [(adapter, adapter.files)], check)[0]


def load_selection(adapters: Mapping[str, AdapterDirectory], selection: Selection) -> LoadedAdapters:
    """Load the adapters of a command. adapters: the opened adapters of the selection, by name.

    Raises as `load_all` and `merging.weighted_sum` do.
    """
    if selection.mix:
        mixed = _load_mixture([(adapters[name], weight) for name, weight in selection.mix.items()])
        return LoadedAdapters({}, mixed, "mix")
    loaded = dict(zip(adapters, load_all(list(adapters.values())), strict=True))
    named = {name: adapter for name, adapter in loaded.items() if name}
    return LoadedAdapters(named, loaded[selection.default], selection.default or "adapter")


def load_all(adapters: Sequence[AdapterDirectory], base: ModelSection | None = None) -> list[LoadedAdapter]:
    """Load the base of adapter directories once, and attach the adapters.

    Args:
        adapters: The adapter directories.
        base: The base, and how it is loaded; by default that of the first adapter.

    Raises:
        ConfigError: See `model.load.check_machine`.
        ModelError: The base cannot be loaded.
        AdapterError: See `attach.load`; an adapter was trained on another base, which is only logged with `forced`;
            base and adapter give NaN or inf; one of several adapters changes the base.
    """
    model, fingerprint, check = _load_base(adapters, base or adapters[0].base)
    return _attach_all(model, fingerprint, [(adapter, adapter.files) for adapter in adapters], check)


def _load_mixture(weighted: Sequence[tuple[AdapterDirectory, float]]) -> LoadedAdapter:
    """The weighted sum of adapters as one adapter, which renders prompts like the first of them."""
    adapters = [adapter for adapter, _ in weighted]
    mixed = merging.weighted_sum([(adapter.files, weight) for adapter, weight in weighted])
    first = adapters[0]
    for other in (adapter for adapter in adapters if adapter.chat != first.chat):
        kind = "conversations" if other.chat else "raw prompts"
        note(f"{other.path}: was trained on {kind}; the mixture renders prompts as its first adapter, {first.path}")
    for other in (adapter for adapter in adapters if adapter.system != first.system):
        note(f"{other.path}: had another system message than {first.path}, whose is used for the mixture")
    base, fingerprint, check = _load_base(adapters, first.base)
    with TemporaryDirectory() as directory:
        return _attach_all(base, fingerprint, [(first, mixed.write(Path(directory)))], check)[0]


def write_mixture(directory: Path, weighted: Sequence[tuple[AdapterDirectory, float]]) -> AdapterDirectory:
    """Write the weighted sum of adapters as one adapter, with the tokenizer and the settings of the first.

    Args:
        directory: An empty directory.
        weighted: Adapters of one base, each with its weight.

    Raises:
        AdapterError: As `merging.weighted_sum`; the adapters record different bases, without `forced`.
    """
    first, recorded = weighted[0][0], [adapter.files.base_fingerprint for adapter, _ in weighted]
    for (adapter, _), fingerprint in zip(weighted, recorded, strict=True):
        is_same = fingerprint == recorded[0] if fingerprint and recorded[0] else adapter.files.base == first.files.base
        if not is_same and not adapter.forced:
            what, fix = f"was trained on another base than {first.files.path}", "mix adapters of one base"
            raise AdapterError(Problem(Code.ADAPTER_MISMATCH, what, str(adapter.files.path), fix=fix))
    mixed = merging.weighted_sum([(adapter.files, weight) for adapter, weight in weighted])
    first.copy_tokenizer(directory, RUN_FILE)
    files = mixed.write(directory)
    fingerprint = next(filter(None, recorded), None)
    record = {"fingerprints": {"base": fingerprint}, "prompts": first.files.record.get("prompts", [])}
    copies = {place: shape for adapter, _ in weighted for place, shape in adapter.files.copies.items()}
    return replace(first, files=replace(files, record=record, copies=copies))


@contextmanager
def finding_base(adapter: AdapterDirectory) -> Iterator[None]:
    """Add the file in which the adapter names its base to errors about a missing base. Raises ModelError."""
    try:
        yield
    except ModelError as error:
        fix = f"if the base has moved, set base_model_name_or_path in {adapter.files.path / 'adapter_config.json'}"
        problems = [replace(one, key="", fix="; ".join(filter(None, (one.fix, fix)))) for one in error.problems]
        raise ModelError(problems) from None


def _load_base(
    adapters: Sequence[AdapterDirectory], section: ModelSection
) -> tuple[PreTrainedModel, str, Callable[[], None]]:
    """A base, its fingerprint before anything is attached, and a function that checks this against all adapters.

    The check runs after the adapters are attached: an error about tensors is more specific than one about fingerprints.
    """
    check_machine(section)
    with finding_base(adapters[0]):
        files, base = FileStates(section), load_base(section)
        kept = files.kept_results(base.device)
    fingerprint = kept.once("fingerprint", str, partial(fingerprints.fingerprint, base))
    for adapter in adapters:
        for line in attach.unknown_keys(adapter.files):
            note(line)
        tensors.check_copies(adapter.files, base)

    def check() -> None:
        for adapter in adapters:
            check_base(adapter, section, fingerprint)

    return base, fingerprint, check


@progress("attaching the adapter")
def _attach_all(
    base: PreTrainedModel,
    fingerprint: str,
    attached: Sequence[tuple[AdapterDirectory, AdapterFiles]],
    check: Callable[[], None],
) -> list[LoadedAdapter]:
    """Attach adapters to their base.

    Args:
        base: The base.
        fingerprint: Of the base.
        attached: The directory of each adapter, and the files that are attached for it.
        check: Checks the fingerprint of the base against the adapters.
    """
    tokenizers = [load_tokenizer_of(adapter) for adapter, _ in attached]
    vocabulary, settings = base.config.get_text_config().vocab_size, [adapter.data for adapter, _ in attached]
    renderers = [
        Renderer(tokenizer, vocabulary, data.chat_template_kwargs)
        for tokenizer, data in zip(tokenizers, settings, strict=True)
    ]
    sample, snapshots = Sampled(base), [attach.before_load(base, files) for _, files in attached]
    if len(attached) > 1:
        _check_sharing([(adapter, before) for (adapter, _), before in zip(attached, snapshots, strict=True)])
    keys = ["default" if number == 1 else f"adapter{number}" for number in range(1, len(attached) + 1)]
    model: Any = base
    for (_, files), key in zip(attached, keys, strict=True):
        model = attach.load(model, files, key)
    check()
    for (adapter, _), tokenizer, key in zip(attached, tokenizers, keys, strict=True):
        _check_output(model, adapter, key, tokenizer.eos_token_id or 0)
    plain = [key for key in keys if attach.is_plain(model, key)]
    mixing = plain if len(plain) > 1 and _takes_rows(model, plain) else []
    return [
        LoadedAdapter(
            model, tokenizer, renderer, adapter.data, adapter.chat, (sample, before), str(adapter.files.path), key,
            kernels.InferenceLayers(model, reader(key)), mixes=key in mixing, is_enough=plain == keys,
            prompts=SharedPrompts(model, pad_id(tokenizer)), fingerprint=fingerprint, system=adapter.system,
        )
        for (adapter, _), tokenizer, renderer, before, key in zip(
            attached, tokenizers, renderers, snapshots, keys, strict=True
        )
    ]  # fmt: skip


def load_tokenizer_of(adapter: AdapterDirectory) -> Any:
    """The tokenizer in an adapter directory, else that of the base.

    Raises:
        AdapterError: The tokenizer of the adapter cannot be read.
        ModelError: The tokenizer of the base cannot be read.
    """
    if not adapter.has_tokenizer:
        return load_tokenizer(adapter.base)
    try:
        with adapter.files.reading() as path:
            return load_tokenizer(ModelSection(name_or_path=str(path)))
    except ModelError as error:
        raise AdapterError(error.problems) from None


def check_base(adapter: AdapterDirectory, base: ModelSection, fingerprint: str) -> None:
    """Compare the fingerprint of a base with the one that an adapter records.

    For an adapter without a record, the name of the base is compared instead.

    Raises:
        AdapterError: They differ, and `forced` is not set.
    """
    recorded, where = adapter.files.base_fingerprint, str(adapter.files.path)
    for key in ("dtype", "quantization", "attn_implementation", "gguf_file"):
        own, used = getattr(adapter.base, key), getattr(base, key)
        if own != used:
            note(f"{where}: was trained with model.{key} {own}, and the base is loaded with {used}")
    is_named = local_or_hub(adapter.base.name_or_path) == local_or_hub(base.name_or_path)
    if recorded == fingerprint or (recorded is None and is_named):
        return
    fix = "use its base"
    what = f"was trained on another base than {base.name_or_path}, by its settings or weights"
    if recorded is None:
        what = f"names the base {adapter.base.name_or_path}, not {base.name_or_path}, and has no record to compare"
    elif reason := fingerprints.incomparable(recorded, fingerprint):
        what, fix = reason
    fix += ", or use the adapter all the same with `force=True`"
    problem = Problem(Code.ADAPTER_MISMATCH, what, where, fix=fix)
    if not adapter.forced:
        raise AdapterError(problem)
    note(str(replace(problem, fix="")))


def _check_sharing(adapters: Sequence[tuple[AdapterDirectory, BaseSnapshot]]) -> None:
    """Raises AdapterError: one of several adapters changes the base; or they differ in `target_parameters`, which PEFT
    does not support: it identifies A and B of a parameter by the number of wrappers around the module."""
    problems, parameters = [], list[set[str]]()
    for adapter, before in adapters:
        names = {*(adapter.files.config.get("target_parameters") or [])}
        reason = before.refusal or ("it changes weights or biases of the base" if before.values else "")
        if names and any(names != others for others in parameters):
            reason = reason or "its target_parameters are not those of the others"
        parameters += [names] if names else []
        if reason:
            what, where = f"cannot be loaded beside other adapters: {reason}", str(adapter.path)
            problems.append(Problem(Code.ADAPTER_UNSUPPORTED, what, where, fix="use it alone"))
    if problems:
        raise AdapterError(problems)


@torch.inference_mode()
def _check_output(model: PeftModel, adapter: AdapterDirectory, key: str, token: int) -> None:
    """Compute the logits of one token, to find bad config values that PEFT does not check.

    Raises AdapterError: the forward pass fails, or gives NaN or inf.
    """
    where, name = str(adapter.files.path), adapter.base.name_or_path
    try:
        if model.active_adapter != key:
            model.set_adapter(key)
        logits = model(input_ids=torch.tensor([[token]], device=model.device), use_cache=False).logits
    except Exception as error:
        what = f"cannot be computed with its base {name}: {error}"
        raise AdapterError(Problem(Code.ADAPTER_UNSUPPORTED, what, where)) from None
    if not logits.isfinite().all():
        raise AdapterError(Problem(Code.ADAPTER_NOT_FINITE, f"gives NaN or inf with its base {name}", where))


@torch.inference_mode()
def _takes_rows(model: PeftModel, keys: Sequence[str]) -> bool:
    """Whether rows of a batch stay separate in each layer, so that adapters can share a batch; tested on a batch."""
    try:
        with kernels.inference_lora(model, *map(reader, keys), rows=range(len(keys))):
            ids = torch.zeros(len(keys), len(keys) + 1, dtype=torch.long, device=model.device)
            model(input_ids=ids, use_cache=False)
    except kernels.RowsMixedError:
        return False
    return True
