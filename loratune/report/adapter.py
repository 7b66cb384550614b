"""`loratune report`: writes an HTML page about an adapter, its run and its evaluation, or about a sweep."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from loratune import config
from loratune.adapter.directory import RUN_FILE, AdapterDirectory
from loratune.compare import preferences
from loratune.compare.comparison import Comparison
from loratune.compare.evaluation import ScaleComparison
from loratune.config import keys
from loratune.errors import AdapterError, ConfigError
from loratune.lora.stats import AdapterStats, Update, adapter_stats, span
from loratune.report import facts, page
from loratune.report.page import Subject
from loratune.report.study import StudyResults
from loratune.system.files import is_directory
from loratune.text import shell_word, short_size


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
    return page.render(subjects, evaluation, data, commands, scales)


def study_report(directory: Path) -> str:
    """The page of a sweep. Raises ConfigError: the directory does not hold a study."""
    results = StudyResults.read(directory, "--study")
    commands = [f"loratune report --adapter {shell_word(path)}" for path in _kept(results)]
    return page.render_study(results, commands or ["no adapter is kept"])


def study_inputs(directory: Path) -> list[Path]:
    """The adapters of a sweep, and the files that its trials have read. Raises ConfigError: as `study_report`."""
    found = list[Path]()
    for adapter in map(Path, _kept(StudyResults.read(directory, "--study"))):
        found.append(adapter)
        with suppress(ConfigError):  # such as of a later release
            found += (Path(path) for _, path in config.files_read(config.load(adapter / RUN_FILE)))
    return found


def _kept(results: StudyResults) -> list[str]:
    """The directories of adapters that there still are; a study may have moved."""
    paths = [results.published, *(trial.adapter for trial in results.trials)]
    return [path for path in paths if path is not None and is_directory(Path(path))]


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
        "size": short_size(stats.adapter_bytes),
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
