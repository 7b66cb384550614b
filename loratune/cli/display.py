"""Formats results as lines for the command line. Each line is escaped by `one_line`."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from loratune.console import marked
from loratune.lora.module_names import adapted_too, number_of, pattern, ranges, shape_text, shortest
from loratune.text import block, format_duration, format_size, one_line, plural, shell_word, table

if TYPE_CHECKING:
    from loratune.api.machine import Environment
    from loratune.api.train import PublishedAdapter
    from loratune.compare.comparison import Comparison, Score
    from loratune.compare.evaluation import ScaleComparison
    from loratune.compare.tasks import TaskResults
    from loratune.compare.verdict import Answers
    from loratune.export.export import Exported
    from loratune.export.hub import Upload
    from loratune.export.merge import Merged
    from loratune.lora.stats import AdapterStats, Update
    from loratune.memory import Estimate
    from loratune.outputs import DryRun, Init
    from loratune.study.sweep import SweepResult
    from loratune.training.init import InitialConfig
    from loratune.training.params import Params
    from loratune.training.plan import Plan
    from loratune.training.results import SampleAnswer, TrainedAdapter


def plan(plan: "Plan") -> tuple[list[str], list[str]]:
    """The lines before and after the rendered rows of `train --dry-run`."""
    lines = []
    for module_pattern, roles in plan.targets.module_patterns().items():
        count = sum(pattern(path) == module_pattern for path in plan.targets.paths)
        shared = plan.targets.shared_roles().get(module_pattern)
        fused = f", fused: {adapted_too(shared)}" if shared else ", fused" if shared is not None else ""
        lines.append((", ".join(roles), f"{module_pattern} x {count}{fused}"))
    before = [*block("targets", lines), str(plan.count), *map(one_line, plan.dataset_lines())]
    size = f"adapter file: {format_size(plan.count.adapter_bytes)}"
    return before, [size, f"device: {plan.device}", f"memory at the longest batch: {_memory(plan.memory)}"]


def plan_values(plan: "Plan", rows: int) -> "DryRun":
    """The plan for `train --dry-run --json`, with this many training rows."""
    train = plan.datasets.train
    shown = range(min(rows * train.rows_per_example, len(train.rows)))
    return {
        "config": plan.config.resolved(), "targets": plan.targets.entry_patterns(), "trainable": plan.count.trainable,
        "total": plan.count.total, "adapter_bytes": plan.count.adapter_bytes, "memory": plan.memory.parts(),
        "device": plan.device,
        "rows": {name: split.report.record() for name, split in plan.datasets.splits.items()},
        "examples": [{"place": train.rows.row(one).where, "text": marked(plan.row_text(one))} for one in shown],
        "notes": [*plan.datasets.leaks, *plan.all_notes()],
    }  # fmt: skip


def trained(result: "PublishedAdapter", program: str) -> Iterator[str]:
    """The lines on a published adapter. program: the command that starts loratune."""
    from loratune.adapter.card import example_command

    found, directory = result.trained, result.run.directory
    adapter = shell_word(directory.display_name)
    lines = [("sure?", found.doubt)] if found.doubt else []
    lines += [("try", " · ".join(found.advice))] if found.advice else []
    lines += [("kept", _kept(found, f"{program} evaluate --adapter {adapter} --data ROWS --forgetting builtin"))]
    lines += [("sample", _sample(one, texts=found.answers is None)) for one in found.samples]
    lines += [line for line in found.held_out if line[0] != "held-out"]
    alone = "; it holds the adapter that it started from" if found.forgetting is not None else ""
    duration = f"{found.tokens:,} tokens in {found.steps:,} steps, {format_duration(found.seconds)}"
    lines += [("saved", f"{directory.output}, {format_size(found.adapter_bytes)}; {duration}{alone}")]
    rows = result.run.rows.train if result.run.rows else None
    lines += [("try it", f"{program} {example_command(directory.display_name, rows, result.run.system)}")]
    lines += [("test it", f"{program} evaluate --adapter {adapter} --data FILE, with rows that it has not seen")]
    is_unseen = found.gain is not None and found.gain.split != "training"
    return block(f"{mark(found.verdict, found.answers, unseen=is_unseen)} {one_line(found.headline)}", lines)


def mark(verdict: str | None, answers: "Answers | None", *, unseen: bool) -> str:
    """A mark that says at once whether it worked: yes, no, or not known. unseen: whether rows judge that it was not
    trained on."""
    from loratune.compare.verdict import GOOD

    is_good = verdict in (*GOOD, "better") and (answers is None or answers.beats_majority is not False)
    none_is_right = answers is not None and answers.majority is None and not answers.right
    if verdict in (None, "cannot tell", "indistinguishable") or (is_good and (none_is_right or not unseen)):
        return "?"
    with suppress(LookupError):  # a stream of a Python program may have no encoding
        try:
            "✓✗".encode(sys.stdout.encoding or "ascii")
        except UnicodeEncodeError:
            return "yes:" if is_good else "no:"
    return "✓" if is_good else "✗"


def _kept(found: "TrainedAdapter", command: str) -> str:
    """What the base could do otherwise, in words. command: what measures it, if the run has not."""
    from loratune.compare import verdict

    if (measured := found.unrelated.comparison) is None:
        return f"not measured: {found.unrelated.unknown}; {command}"
    worse = -measured.better_by
    how = verdict.change(worse, significant=measured.high is not None and measured.high < 0)
    shown = f"{worse:+.2f}" if f"{worse:.2f}" != f"{verdict.SLIGHTLY:.2f}" else f"{worse:+.4f}"
    text = f"what the base could do otherwise: {how} ({shown}; a warning from {verdict.SLIGHTLY:.2f})"
    if found.behavior is not None and found.behavior.remark:
        text += f"; but in everyday answers {100 * (1 - found.behavior.agreement):.0f} % of its words are others now"
    return text


def _sample(one: "SampleAnswer", *, texts: bool) -> str:
    """A held-out prompt and the adapter's answer; with those of the base and the expected one, if they are texts."""
    from loratune.compare.text import shorten, shorten_apart

    prompt = f'"{shorten(one.prompt, 60)}"'
    adapter, expected = (f'"{text}"' for text in shorten_apart(one.adapter, one.expected, 90))
    if one.adapter == one.expected:
        expected = "the same"
    if not texts:
        return f"{prompt} → {adapter}" + ("" if one.adapter == one.expected else f", expected {expected}")
    return f'{prompt}: base "{shorten(one.base, 60)}" → adapter {adapter}; expected {expected}'


def params(params: "Params") -> Iterator[str]:
    """Parameter counts, a table of the modules, and the estimated memory for training."""
    yield str(params.count)
    rows = [
        [one.role, one.pattern, f"{one.modules}", shape_text(*one.shape, one.experts), f"{one.rank}",
         f"{one.trainable:,}"]
        for one in params.groups
    ]  # fmt: skip
    rows += [["", name, "", "", "", f"{trainable:,}"] for name, trainable in params.others.items()]
    yield from table(["role", "modules", "count", "shape", "rank", "trainable"], rows)
    for module_pattern, fused_roles in params.targets.fused.items():
        yield f"  {', '.join(fused_roles)}: {module_pattern}, fused"
    yield f"per layer: {_per_layer(params.layers)}"
    yield f"adapter file: {format_size(params.count.adapter_bytes)}"
    yield f"device: {params.device}"
    yield f"memory to train, {params.batch} rows of {params.length:,} tokens: {_memory(params.memory)}"
    if params.rows_memory is not None:
        yield f"memory to train on the rows of data.train: {_memory(params.rows_memory)}"


def environment(found: "Environment") -> Iterator[str]:
    """The facts about a machine by section, the results of the self-test, and what to do."""
    for title, facts in found.sections.items():
        yield from block(title, [(fact.name, fact.value) for fact in facts])
    if found.checks:
        lines = [(check.name, f"{check.result} ({check.seconds:.1f} s): {check.detail}") for check in found.checks]
        yield from block("self-test", lines)
    if found.advice:
        yield "what to do"
        yield from (one_line(f"  {line}") for line in found.advice)


def stats(path: str, stats: "AdapterStats") -> Iterator[str]:
    """The statistics of an adapter: overall, by kind of module, and by layer."""
    from loratune.lora.stats import TABLE_HEADER, by_pattern, span, table_row

    variants = [name for name, used in (("rsLoRA", stats.rslora), ("DoRA", stats.dora)) if used]
    scalings = [f"scaling {span([update.scaling for update in stats.updates], '.4g')}"] if stats.updates else []
    rank = span([update.rank for update in stats.updates] or [stats.r], "d")
    lines = [
        ("adapter", path),
        ("base", stats.base),
        ("rank", ", ".join([rank, f"lora_alpha {stats.lora_alpha:g}", *variants, *scalings])),
        ("size", f"{format_size(stats.adapter_bytes)}, {stats.parameters:,} numbers"),
    ]
    experts, unchanged = (sum(getattr(one, key) for one in stats.updates) for key in ("experts", "unchanged"))
    if any(update.experts > 1 for update in stats.updates) and unchanged:
        lines.append(("unchanged", f"{unchanged:,} of {experts:,} modules and experts have an update of zero"))
    lines += [("also", f"{name}: {count:,} numbers") for name, count in stats.others.items()]
    width = max(len(name) for name, _ in lines)
    yield from (one_line(f"{name:<{width}}  {value}") for name, value in lines)
    groups = by_pattern(stats.updates)
    yield from table(TABLE_HEADER, [[kind, *table_row(group)] for kind, group in groups.items()])
    yield from _norms(groups)


def _norms(groups: "Mapping[str, Sequence[Update]]") -> Iterator[str]:
    """One row per layer: the norm of ΔW, and the effective rank in brackets."""
    cells = {
        (number_of(update.module), module_pattern): f"{update.norm:.3g} ({update.effective_rank:.1f})"
        for module_pattern, group in groups.items()
        for update in group
    }
    layers = sorted({number for number, _ in cells if number is not None})
    rows = [[f"{number}", *(cells.get((number, name), "-") for name in groups)] for number in layers]
    if rows:
        yield "norm of ΔW (effective rank) by layer"
        yield from table(["layer", *shortest([*groups])], rows)


def started(started: "InitialConfig") -> list[tuple[str, str]]:
    """The findings of `init` and its estimates for the run, as names and texts."""
    rows, fit, run = started.rows, started.fit, started.run
    lengths, paired = rows.tokenized.lengths, rows.rows_per_example > 1
    answers = f", {rows.classes.labels} labels" if rows.classes.labels else ""
    what = "trained as {:,.0f} rows" if rows.tokenized.owners is None else "in {:,.0f} blocks"
    blocks = f", {what.format(rows.items_per_row * len(rows.train))}" if rows.items_per_row != 1 else ""
    sampled = f", of {len(lengths) // rows.rows_per_example:,} drawn from them" if rows.is_sample else ""
    median, high = (int(value) for value in np.quantile(lengths, (0.5, 0.95), method="inverted_cdf"))
    sampled += ", of each answer with its prompt" * paired
    steps = plural(started.steps, "step")
    duration = f"about {format_duration(max(1, float(f'{started.seconds:.2g}')))} for {steps}"
    duration += ", within a factor of two; timed under the current load"
    if run.training.max_minutes is not None:
        duration = f"at most {run.training.max_minutes:g} min, for about {steps}, within a factor of two"
    context = f", {started.context:,} positions" if started.context else ""
    return [
        ("rows", f"{len(rows.train):,}, {' and '.join(rows.train.formats)}{answers}{blocks}"),
        ("lengths", f"{median:,} tokens in the median, {high:,} at 95 %, {lengths.max():,} at most{sampled}"),
        ("model", f"{started.count.total - started.count.trainable:,} parameters{context}"),
        ("machine", f"{started.machine}, {fit.free / (1 << 30):.1f} GiB free"),
        ("time", duration),
        ("memory", _memory(fit.estimate)),
        ("adapter", format_size(started.count.adapter_bytes)),
    ]


def started_values(started: "InitialConfig", file: str | None) -> "Init":
    """The config and the estimates for `init --json`. file: where the config was written."""
    rows, fit = started.rows, started.fit
    return {
        "config": file, "text": started.text, "rows": len(rows.train), "formats": [*rows.train.formats],
        "longest": int(rows.tokenized.lengths.max()), "steps": started.steps, "seconds": started.seconds,
        "memory": fit.estimate.parts(), "free_memory": fit.free, "adapter_bytes": started.count.adapter_bytes,
        "notes": started_notes(started),
    }  # fmt: skip


def started_notes(started: "InitialConfig") -> list[str]:
    """Warnings about the config: truncation, and scarce memory."""
    lines = [f"data.max_length: {line}" for line in started.cut]
    if not started.fit.is_roomy:
        batch = started.run.training.per_device_train_batch_size
        lines.append(f"memory: even a batch of {batch} takes more than half of what is free, and the run may not fit")
    return lines


def _memory(estimate: "Estimate") -> str:
    """`about 3.2 GiB (weights 1.0, activations 2.1, runtime 0.1)`, without negligible parts."""
    parts = estimate.parts()
    total = parts.pop("total")
    texts = [f"{name} {value / (1 << 30):.1f}" for name, value in parts.items() if value >= 0.05 * (1 << 30)]
    coarse = "" if estimate.traced else ", by a coarse formula"
    return f"about {format_size(total)} ({', '.join(texts)}{coarse})"


def _per_layer(layers: Mapping[int, int]) -> str:
    """`30,720 in each of layers 0-29`; several such parts if layers differ."""
    numbers_by_count: dict[int, list[int]] = {}
    for number, trainable in layers.items():
        numbers_by_count.setdefault(trainable, []).append(number)
    return "; ".join(
        f"{trainable:,} in {'each of layers' if len(numbers) > 1 else 'layer'} {ranges(numbers)}"
        for trainable, numbers in numbers_by_count.items()
    )


def comparison(found: "Comparison", worst: int = 0) -> Iterator[str]:
    """The metrics of each model, their differences, and the verdict.

    worst: the number of rows with the largest loss increase to show.
    """
    from loratune.compare import text

    leaked = sum((found.overlap or {}).get(kind, 0) for kind in ("exact", "folded"))
    yield one_line(f"{mark(found.verdict, found.answers, unseen=not leaked)} {text.verdict(found)}")
    if leaked:
        yield f"  sure?  no: {leaked:,} of the rows are also training rows"
    if measured := text.measured(found):
        yield measured
    yield f"{text.rows(found)}, 95 % intervals in brackets"
    yield from table(*text.scores_table(found))
    yield from table(*text.differences_table(found))
    rows = text.worst(found, worst)
    for row in rows:
        copies = f", {row.copies:,} copies" if row.copies > 1 else ""
        yield from block(f"{row.where}{copies}", text.row_lines(row, found.compared_with))
    if worst and not rows:
        yield f"no {found.item} got worse"
    lines = []
    if found.forgetting is not None:
        lines.append(("forgetting", text.forgetting(found.forgetting, found.forgetting_by_kind)))
    if found.behavior is not None:
        lines.append(("base's answers", str(found.behavior)))
    if lines := [*lines, *text.required(found.requirements)]:
        yield from block("result", lines)
    if found.tasks is not None:
        yield from tasks(found.tasks)


def scales(found: "ScaleComparison") -> Iterator[str]:
    """The metrics of an adapter at several scales, a scale a row."""
    from loratune.compare import metrics, text

    comparisons = found.comparisons
    first = next(iter(comparisons.values()))
    yield f"{text.rows(first)}, 95 % intervals in brackets"
    names = [*first.scores[metrics.ADAPTER].metrics]
    header = ["scale", *map(text.name, names), *(["forgetting"] if first.forgetting is not None else [])]
    header += ["median KL on the base's answers"] if first.behavior is not None else []

    def cells(score: "Score") -> Iterator[str]:
        return (text.with_interval(name, score.metrics.get(name), score.intervals.get(name)) for name in names)

    rows = [["base", *cells(first.scores[metrics.BASE])]]
    rows[0] += [""] * (len(header) - len(rows[0]))
    for scale, one in comparisons.items():
        rows.append([f"{scale:g}", *cells(one.scores[metrics.ADAPTER])])
        if (lost := one.forgetting) is not None:
            rows[-1].append(text.with_interval(metrics.FORGETTING, lost.value, lost.interval, signed=True))
        if (changed := one.behavior) is not None:
            middle = changed.median_interval
            ends = f" [{middle.low:.3f}, {middle.high:.3f}]" if middle else ""
            rows[-1].append("-" if changed.unknown else f"{changed.median:.3f}{ends}")
    yield from table(header, rows)


def tasks(results: "TaskResults") -> Iterator[str]:
    """The metrics of tasks of the lm-evaluation-harness, for base and adapter side by side."""
    from loratune.compare import text

    limit = f", at most {results.limit:,} rows of each" if results.limit is not None else ""
    yield f"tasks of lm-evaluation-harness {results.version}{limit}, 95 % intervals in brackets"
    yield from table(*text.tasks_table(results))
    if results.requirements:
        yield from block("result", text.required(results.requirements))


def study(swept: "SweepResult", program: str) -> Iterator[str]:
    """The trials of a study, the best first, and the published adapter. program: the command that starts loratune."""
    results = swept.results
    yield results.summary()
    yield from table(results.header(), [results.cells(trial) for trial in results.trials])
    for trial in results.trials:
        if trial.note:
            yield one_line(f"  trial {trial.number}: {trial.state}: {trial.note}")
    lines = [("best", results.conclusion())]
    if results.published is not None:
        lines += [("adapter", results.published), ("try it", f"{program} {swept.example_command}")]
    lines += [
        ("study", str(swept.directory)),
        ("look", f"{program} report --study {shell_word(str(swept.directory))}"),
    ]
    lines += [("note", note) for note in (*results.remarks(), *swept.notes)]
    yield from block("swept" if swept.stop is None else "interrupted", lines)


def upload(upload: "Upload") -> Iterator[str]:
    """The repository of an upload, the uploaded files, and their verification."""
    count, size = len(upload.files), format_size(sum(file["bytes"] for file in upload.files))
    names = ", ".join(file["name"] for file in upload.files)
    lines = [
        ("repository", upload.url),
        ("visibility", f"{'public' if upload.public else 'private'}{', new' if upload.created else ''}"),
        ("base", upload.base),
        ("files", f"{count}, {size}: {names}"),
        ("commit", f"{upload.commit}{', which held these files already' if upload.unchanged else ''}"),
        ("checked", f"{count} files re-read, equal"),
    ]
    optional = {
        "paths replaced": upload.paths_replaced, "removed there": upload.removed, "left out": upload.left_out
    }  # fmt: skip
    lines += [(name, ", ".join(listed)) for name, listed in optional.items() if listed]
    lines.append(("get it", f"hf download {upload.repository} --local-dir {upload.repository.rpartition('/')[2]}"))
    return block("pushed", lines)


def merged_notes(merged: "Merged") -> list[str]:
    """A line on parameters that lose much of their change to rounding."""
    if not merged.low:
        return []
    worst = merged.low[0]
    return [
        f"{len(merged.low)} of {len(merged.written.kept)} parameters keep less than {merged.LOW_SHARE:.0%} of their "
        f"change in {worst.dtype}, the least {worst.share:.1%} ({worst.name}); --dtype float32 keeps all of it"
    ]


def merged(merged: "Merged") -> Iterator[str]:
    """The merged model, its comparison with base and adapter, and how to use it."""
    written, found = merged.written, merged.comparison
    changed: dict[str, int] = {}
    for kept in written.kept:
        changed[pattern(kept.name)] = changed.get(pattern(kept.name), 0) + 1
    shares = sorted(kept.share for kept in written.kept)
    files = plural(written.files, "file")
    lines = [
        ("model", str(merged.directory)),
        ("weights", f"{format_size(written.size)} in {files}, {', '.join(written.dtypes)}"),
        ("merged", ", ".join(f"{name} x {count}" for name, count in changed.items())),
    ]
    if written.untied:
        lines.append(("embeddings", "stored apart, tie_word_embeddings is false"))
    if shares:
        lines.append(("change kept", f"{shares[len(shares) // 2]:.1%} (median), {shares[0]:.1%} (least)"))
    if "tensors" in found:
        what = f"{found['tensors']} tensors were read back: all are equal, byte for byte"
        lines.append(("compared", f"{what}; there is too little memory to compute logits"))
    else:
        count = f"{found['adapter']['positions']:,} tokens, in {found['dtype']}"
        lines.append(("compared", f"on {merged.texts.origin}, {count}"))
    lines.append(("use it", f"{merged.loader}.from_pretrained({str(merged.directory)!r})"))
    yield from block("merged", lines)
    if "tensors" not in found:
        rows = [
            [name, f"{one['largest']:.3g}", f"{one['divergence']:.3g}", f"{one['top1']:.1%}"]
            for name, one in (("base and adapter", found["adapter"]), ("base", found["base"]))
        ]
        yield from table(["merged against", "largest logit difference", "KL (nats a token)", "same top-1"], rows)


def exported(exported: "Exported") -> Iterator[str]:
    """The exported directory, the results of the comparison, and the commands to use it."""
    lines = [("written", str(exported.directory)), *exported.lines]
    return block(f"exported for {exported.client}", [*lines, *(("type", line) for line in exported.commands)])


def write_rows(rows: Iterable[Mapping[str, Any]], file: TextIO, *, as_csv: bool = False) -> None:
    """Write rows as JSON lines, or as CSV with one column per field; NaN and infinity, which JSON lacks, as null."""
    from loratune.data.sources.rows import to_json_line, write_csv

    rows = (json.loads(to_json_line(row), parse_constant=lambda _: None) for row in rows)
    if as_csv:
        write_csv(rows, file)
        return
    for row in rows:
        file.write(f"{to_json_line(row)}\n")
        file.flush()


def worst_rows(found: "Comparison", count: int) -> list[dict[str, Any]]:
    """The rows with the largest loss increase, as plain values."""
    from loratune.compare import text

    return [row.to_dict() for row in text.worst(found, count)]
