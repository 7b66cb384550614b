"""`loratune report`: writes an HTML page about an adapter, its run, its evaluation and its sweep."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from loratune import config
from loratune.adapter.directory import AdapterDirectory
from loratune.compare import preferences
from loratune.compare.comparison import Comparison
from loratune.compare.evaluation import ScaleComparison
from loratune.config import keys
from loratune.errors import AdapterError
from loratune.lora.adapter_files import RECORD_FILE
from loratune.lora.stats import AdapterStats, Update, adapter_stats, span
from loratune.report import facts, page
from loratune.report.page import Subject
from loratune.report.study import StudyResults, study_directory, trial_directory
from loratune.system.files import is_file, sha256
from loratune.text import format_size, shell_word


def report(
    adapters: Sequence[tuple[AdapterDirectory, Sequence[str]]],
    evaluation: Comparison | None = None,
    data: str | None = None,
    by_scale: ScaleComparison | None = None,
) -> str:
    """The page, as HTML.

    Args:
        adapters: The adapter, and optionally one to compare with, each with lines about it.
        evaluation: Their comparison on rows, if any.
        data: The file of these rows.
        by_scale: The adapter at several scales on these rows, if any.
    """
    paths = [adapter.files.path for adapter, _ in adapters]
    names = [path.resolve().name or str(path) for path in paths]
    if len({*names}) < len(names):
        names = [str(path) for path in paths]
    subjects = [_subject(name, *one) for name, one in zip(names, adapters, strict=True)]
    scales = by_scale.comparisons if by_scale is not None else {}
    commands = [*_commands([adapter for adapter, _ in adapters], data, [*scales])]
    return page.render(subjects, evaluation, data, commands, scales, _sweep_of(adapters[0][0]))


def _sweep_of(adapter: AdapterDirectory) -> StudyResults | None:
    """The results of the sweep that published an adapter: its study stands beside it, and has the same adapter."""
    directory = study_directory(adapter.files.path.absolute())
    results = StudyResults.read(directory)
    if results is None or results.winner is None or results.winner.adapter is None:
        return None
    trial = trial_directory(directory, results.winner.number) / Path(results.winner.adapter).name
    records = [path / RECORD_FILE for path in (trial, adapter.files.path)]
    is_same = all(map(is_file, records)) and len({sha256(record) for record in records}) == 1
    return results if is_same else None


def _subject(name: str, adapter: AdapterDirectory, notes: Sequence[str]) -> Subject:
    files, run = adapter.files, adapter.run
    base = "/".join(part for part in (files.base, adapter.base.gguf_file) if part)
    known, updates = {"base": base, "rank": f"{files.config['r']}", "size": "not measured"}, list[Update]()
    with files.reading():
        try:
            stats = adapter_stats(files)
            known, updates = known | _facts(stats), stats.updates
        except AdapterError as error:  # the page reports that the adapter is broken
            notes = [*notes, *map(str, error.problems)]
    objective = preferences.described(run) if run else ""
    extra = {"objective": objective, "revision": str(files.config.get("revision") or "")}
    return Subject(
        name=name,
        base=base,
        objective=objective,
        adapter=known | {name: value for name, value in extra.items() if value},
        record=facts.read(files.record),
        updates=updates,
        settings=keys.flat(run.resolved()) if run else {},
        config=config.dump(run) if run else "",
        max_length=run.data.max_length if run else None,
        notes=notes,
    )


def _facts(stats: AdapterStats) -> dict[str, str]:
    """Facts from the files of an adapter, as names and texts."""
    variants = [name for name, used in (("rsLoRA", stats.rslora), ("DoRA", stats.dora)) if used]
    facts = {
        "rank": span([update.rank for update in stats.updates] or [stats.r], "d"),
        "lora_alpha": f"{stats.lora_alpha:g}",
        "variants": ", ".join(variants) or "none",
        "modules": f"{len(stats.updates):,}",
        "parameters": f"{stats.parameters:,}",
        "size": format_size(stats.adapter_bytes),
    }
    if stats.dora:
        facts["beyond ΔW"] = "DoRA's magnitudes, which the norms leave out"
    if stats.others:
        others = (f"{name} ({count:,} numbers)" for name, count in stats.others.items())
        facts["also"] = f"{', '.join(others)}: in no norm"
    return facts


def _commands(adapters: Sequence[AdapterDirectory], data: str | None, scales: Sequence[float]) -> Iterator[str]:
    """Commands that repeat the training, the evaluation and the report."""
    first, *others = [_absolute(str(adapter.files.path)) for adapter in adapters]
    options = "".join(f" --against {other}" for other in others) + (f" --data {_absolute(data)}" if data else "")
    if adapters[0].run is not None:
        yield f"loratune train {_absolute(str(adapters[0].files.path / 'run.yaml'))} --set output_dir=NEW"
    if data:
        yield f"loratune evaluate --adapter {first}{options}"
    options += f" --adapter-scale {','.join(f'{scale:g}' for scale in scales)}" if scales else ""
    yield f"loratune report --adapter {first}{options}"


def _absolute(path: str) -> str:
    """A path as an absolute path, quoted for a shell; a hub id is unchanged."""
    return shell_word(str(Path(path).absolute()) if Path(path).exists() else path)
