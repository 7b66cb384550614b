"""`loratune merge`: writes base and adapter as one model, for programs that do not load adapters."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from loratune import outputs
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.data import DatasetSplit
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, Problem
from loratune.events import note
from loratune.export import merged_model
from loratune.export.comparison import Texts, texts
from loratune.export.merging import Kept, Merge, Written
from loratune.lora import attach
from loratune.model import checks, load
from loratune.model.fingerprints import FileStates
from loratune.model.source import locate
from loratune.system.output_dir import OutputDirectory


@dataclass(frozen=True)
class Merged:
    """The result of `loratune merge`.

    Attributes:
        directory: The directory of the model.
        written: The written weights.
        texts: The texts it was compared on.
        comparison: See `merged_model.compare`; if memory is too small for that, `tensors`: the number of tensors read
            back, and `nearer`: whether the changed ones are closer to base and adapter than to the base.
        note: Why and how the base was loaded; empty if its files were read directly.
        loader: The class of transformers that loads the model.
    """

    LOW_SHARE: ClassVar = 0.9
    """Parameters that keep less than this fraction of their change are reported."""

    directory: Path
    written: Written
    texts: Texts
    comparison: dict[str, Any]
    note: str
    loader: str

    @property
    def low(self) -> list[Kept]:
        """Parameters that lose much of their change to rounding, the largest loss first."""
        return sorted((kept for kept in self.written.kept if kept.share < self.LOW_SHARE), key=lambda kept: kept.share)

    def to_dict(self) -> outputs.Merge:
        """Plain values, which are also in the record."""
        written = self.written
        shares = {kept.name: round(kept.share, 6) for kept in written.kept}
        kept = (
            {"median": median(shares.values()), "least": min(shares.values()), "parameters": shares} if shares else {}
        )
        return {
            "output": str(self.directory),
            "dtypes": list(written.dtypes),
            "bytes": written.size,
            "files": written.files,
            "untied": written.untied,
            "note": self.note,
            "compared_on": self.texts.origin,
            "comparison": self.comparison,
            "kept": kept,
        }


def merge(
    adapter: AdapterDirectory,
    directory: OutputDirectory,
    split: DatasetSplit | None,
    *,
    dtype: str | None,
) -> Merged:
    """Merge, read back, compare, and publish.

    Args:
        adapter: The adapter.
        directory: The output, see `OutputDirectory.check`.
        split: Rows to compare on.
        dtype: The dtype of the merged model; None keeps that of the base.

    Raises:
        AdapterError: The adapter cannot be merged, has another base, or the merged model is not closer to it than to
            its base.
        ModelError: Files of the base changed in the meantime, or as `loading.load`.
        ConfigError, DataError, ResourceError, LockedError: See `OutputDirectory.staged`, `loading.load`, `texts`.
    """
    load.check_machine(adapter.base)
    adapter.note_system()
    for line in attach.unknown_keys(adapter.files):
        note(line)
    with loading.finding_base(adapter):
        locate(adapter.base)
        before = FileStates(adapter.base)
        plan = Merge(adapter, getattr(torch, dtype) if dtype else None)
    parameters, is_whole, loaded_how = plan.parameters, plan.is_whole, plan.note
    loader = checks.auto_class(plan.config).__name__
    if loaded_how:
        note(loaded_how)
    loading.check_base(adapter, adapter.base, plan.fingerprint())
    tokenizer = loading.load_tokenizer_of(adapter)
    vocabulary = plan.config.get_text_config().vocab_size
    renderer = Renderer(tokenizer, vocabulary, adapter.data.chat_template_kwargs)
    compared_on = texts(adapter, renderer, vocabulary, split)
    with directory.staged(plan.size + (64 << 20), "the merged model") as staging:
        written = plan.write(staging)
        merged_model.write_configs(staging, adapter, plan, renderer.end_ids)
        merged_model.write_tokenizer(staging, adapter, tokenizer)
        del plan  # frees the base, if it was loaded
        computed = merged_model.dtype_that_fits(parameters, written.dtypes)
        if computed is None and is_whole:
            computed = written.dtypes[0]  # it fitted into memory before
        if computed is not None:
            comparison = merged_model.compare(adapter, staging, compared_on, computed)
        else:
            nearer = sum(one.error for one in written.kept) < sum(one.moved for one in written.kept)
            comparison = {"tensors": written.tensors, "nearer": nearer}
        before.check_unchanged()
        merged = Merged(directory.output, written, compared_on, comparison, loaded_how, loader)
        _check_nearer(merged, adapter)
        merged_model.write_card(staging, adapter, summary(merged))
        adapter.write_record(staging, "merged model", {"merge": merged.to_dict()})
    return merged


def _check_nearer(merged: Merged, adapter: AdapterDirectory) -> None:
    """Raises AdapterError: the merged model is not closer to base and adapter than to the base alone."""
    found, where = merged.comparison, str(adapter.files.path)
    if "tensors" in found:
        nearer, what = found["nearer"], "the merged weights are not nearer to base and adapter than to the base"
    else:
        to_adapter, to_base = float(found["adapter"]["divergence"]), float(found["base"]["divergence"])
        nearer = to_adapter < to_base
        what = "the merged model is not nearer to base and adapter than to the base: "
        what += f"KL {to_adapter:.3g} and {to_base:.3g} nats a token"
    if not nearer:
        fix = "use `dtype='float32'`, or use the adapter with PEFT"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, f"{what}; nothing was written", where, fix=fix))


def summary(merged: Merged) -> list[str]:
    """Lines on the merged parameters and the comparison, for the card."""
    written, found = merged.written, merged.comparison
    lines = [f"{len(written.kept)} parameters changed, stored as {', '.join(written.dtypes)}"]
    if merged.note:
        lines.append(merged.note)
    if "tensors" in found:
        lines.append(f"read back tensor by tensor: {found['tensors']} tensors are as base and adapter give")
    else:
        for name, other in (("base and adapter", found["adapter"]), ("the base", found["base"])):
            lines.append(
                f"compared with {name} on {merged.texts.origin}: KL {other['divergence']:.3g} nats a token, "
                f"top-1 agreement {other['top1']:.1%}, largest logit difference {other['largest']:.3g}"
            )
    return lines
