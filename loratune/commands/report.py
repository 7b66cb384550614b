"""`loratune report`: a page that shows an adapter, the run that made it, and how well it does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratune import config, escaping
from loratune.adapter.directory import AdapterDirectory
from loratune.commands.adapter_stats import AdapterStats, adapter_stats
from loratune.config import keys
from loratune.console import format_size
from loratune.errors import AdapterError
from loratune.evaluation import page, page_study, run_record
from loratune.evaluation.page import Subject
from loratune.evaluation.results import Evaluation
from loratune.evaluation.study_results import StudyResults
from loratune.system.files import is_directory
from loratune.training import objectives


@dataclass(frozen=True)
class Subjects:
    """What a report is about.

    Attributes:
        adapters: The adapter, and perhaps the one that it is compared with.
        notes: Lines about each of them.
    """

    adapters: list[AdapterDirectory] = field(default_factory=list)
    notes: list[list[str]] = field(default_factory=list)

    def add(self, adapter: AdapterDirectory, notes: list[str]) -> None:
        """One more adapter."""
        self.adapters.append(adapter)
        self.notes.append(notes)

    def names(self) -> list[str]:
        """What the adapters are called: by their directories, or the paths of these where that is the same."""
        paths = [adapter.files.path for adapter in self.adapters]
        names = [path.resolve().name or str(path) for path in paths]
        return names if len({*names}) == len(names) else [str(path) for path in paths]


def report(shown: Subjects, evaluation: Evaluation | None, data: str | None) -> str:
    """The page, as HTML.

    Args:
        shown: The adapters.
        evaluation: What they do on rows; None where none were given.
        data: The file of these rows.
    """
    described = [_subject(*one) for one in zip(shown.names(), shown.adapters, shown.notes, strict=True)]
    return page.render(described, evaluation, data, [*_commands(shown.adapters, data)])


def study_report(directory: Path) -> str:
    """The page of a study. Raises ConfigError: the directory holds none."""
    results = StudyResults.read(directory)
    paths = [results.published, *(trial.adapter for trial in results.trials)]
    kept = [path for path in paths if path is not None and is_directory(Path(path))]  # a study may have moved
    commands = [f"loratune report --adapter {escaping.shell(path)}" for path in kept]
    return page_study.render(results, commands or ["no adapter is kept"])


def _subject(name: str, adapter: AdapterDirectory, notes: Sequence[str]) -> Subject:
    files, run = adapter.files, adapter.run
    base = "/".join(part for part in (files.base, adapter.base.gguf_file) if part)
    facts, updates, lines = {"base": base}, [], [*notes]
    try:
        stats = adapter_stats(files)
        facts |= _facts(stats)
        updates = stats.updates
    except AdapterError as error:  # the page of an adapter that is broken says so
        lines += map(str, error.problems)
        facts |= {"rank": f"{files.config['r']}", "size": "not measured"}
    objective = objectives.described(run) if run else ""
    facts |= {"objective": objective} if objective else {}
    facts |= {"revision": str(files.config["revision"])} if files.config.get("revision") else {}
    return Subject(
        name=name,
        base=base,
        objective=objective,
        adapter=facts,
        record=run_record.read(files.record),
        updates=updates,
        settings=keys.flat(run.resolved()) if run else {},
        config=config.dump(run) if run else "",
        max_length=run.data.max_length if run else None,
        notes=lines,
    )


def _facts(stats: AdapterStats) -> dict[str, str]:
    """What the files of an adapter say of it."""
    variants = [name for name, used in (("rsLoRA", stats.rslora), ("DoRA", stats.dora)) if used]
    ranks = sorted({update.rank for update in stats.updates} or {stats.r})
    facts = {
        "rank": f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "lora_alpha": f"{stats.lora_alpha:g}",
        "variants": ", ".join(variants) or "none",
        "modules": f"{len(stats.updates):,}",
        "parameters": f"{stats.parameters:,}",
        "size": format_size(stats.adapter_bytes).partition("(")[2].rstrip(")") or format_size(stats.adapter_bytes),
    }
    if stats.dora:
        facts["beyond ΔW"] = "DoRA's magnitudes, which the norms leave out"
    if stats.others:
        others = (f"{name} ({count:,} numbers)" for name, count in stats.others.items())
        facts["also"] = f"{', '.join(others)}: in no norm"
    return facts


def _commands(adapters: Sequence[AdapterDirectory], data: str | None) -> Iterator[str]:
    """What to type to train, evaluate and look again."""
    first, *others = [_absolute(str(adapter.files.path)) for adapter in adapters]
    options = "".join(f" --against {other}" for other in others) + (f" --data {_absolute(data)}" if data else "")
    if adapters[0].run is not None:
        yield f"loratune train {_absolute(str(adapters[0].files.path / 'run.yaml'))} --set output_dir=NEW"
    if data:
        yield f"loratune evaluate --adapter {first}{options}"
    yield f"loratune report --adapter {first}{options}"


def _absolute(path: str) -> str:
    """A path as one can type it in any directory; a hub id stays what it is."""
    return escaping.shell(str(Path(path).absolute()) if Path(path).exists() else path)
