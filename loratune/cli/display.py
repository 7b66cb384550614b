"""Formats results as lines for the command line. Each line is escaped by `one_line`."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from loratune.cli.options import as_options
from loratune.console import columns, marked, wrapped
from loratune.lora.module_names import adapted_too, number_of, pattern, ranges, shape_text, shortest
from loratune.text import (
    Detail,
    Information,
    block,
    format_duration,
    format_size,
    listed,
    one_line,
    plural,
    shell_word,
    table,
)

Pieces = Sequence[tuple[str, bool]]
if TYPE_CHECKING:
    from loratune.adapter.answering import Answer
    from loratune.api.machine import Environment
    from loratune.api.quickstart import Quickstart
    from loratune.api.train import PublishedAdapter
    from loratune.compare.comparison import Comparison, Score
    from loratune.compare.evaluation import ScaleComparison
    from loratune.compare.tasks import TaskResults
    from loratune.compare.verdict import Outcome
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
    """The lines before and after the rendered rows of `train --dry-run --verbose`."""
    lines = []
    for module_pattern, roles in plan.targets.module_patterns().items():
        count = sum(pattern(path) == module_pattern for path in plan.targets.paths)
        shared = plan.targets.shared_roles().get(module_pattern)
        fused = f", fused: {adapted_too(shared)}" if shared else ", fused" if shared is not None else ""
        lines.append((", ".join(roles), f"{module_pattern} x {count}{fused}"))
    before = [*block("targets", lines), str(plan.count), *map(one_line, plan.dataset_lines())]
    size = f"adapter file: {format_size(plan.count.adapter_bytes)}"
    return before, [size, f"device: {plan.device}", f"memory at the longest batch: {_memory(plan.memory)}"]


def brief(plan: "Plan", example: Pieces | None, seconds: tuple[float, float] | None = None) -> Iterator[str]:
    """The plan of a run in at most fifteen lines of a hundred columns.

    Args:
        plan: The plan.
        example: The first row, in pieces of text with whether they are supervised; None to leave it out.
        seconds: See `PlanEvent.seconds`.
    """
    config, datasets, schedule = plan.config, plan.datasets, plan.schedule
    held_out, test = (split.items if split else 0 for split in (datasets.validation, datasets.test))
    item = "pairs" if datasets.train.rows_per_example == 2 else "rows"
    rows = [f"{datasets.train.items:,} to learn from, {f'{held_out:,} held out' if held_out else 'none held out'}"]
    rows += [f"{test:,} to test with"] if test else []
    rows += [f"{datasets.classes} classes"] if datasets.classes else []
    rows += (
        [f"{dropped:,} dropped"]
        if (dropped := sum(one.count for one in datasets.train.report.dropped.values()))
        else []
    )
    yield f"{Path(config.model.name_or_path).name} · {plan.device}"
    yield from _wrapped(item, " · ".join(rows))
    warnings = [line for found in (datasets.leaks, datasets.remarks) for lines in found.values() for line in lines]
    warnings = [line for line in warnings if not isinstance(line, Detail)]
    for line in warnings[:_MOST_WARNINGS]:
        yield from _wrapped("", line if isinstance(line, Information) else f"! {line}")
    if more := len(warnings) - _MOST_WARNINGS:
        yield from _wrapped("", f"! and {plural(more, 'more remark')} (-v shows all)") if more > 0 else ()
    if example is not None:
        yield from _wrapped("example", _marked_line(plan, example))
    yield from _wrapped("plan", " · ".join(_decisions(plan)))
    if seconds is not None:
        steps, others = map(format_duration, seconds)
        memory = f"{plan.memory.total / (1 << 30):.1f} GiB of memory"
        yield from _wrapped("time", f"about {steps} of training, {others} of loading and checks · {memory}")
    elif (fitting := plan.choices.get("training.max_steps")) is not None:
        yield from _wrapped("time", f"{plural(schedule.steps, 'step')}, {fitting[1]}")
    else:
        yield from _wrapped("memory", f"{plan.memory.total / (1 << 30):.1f} GiB")


_MOST_WARNINGS = 4
"""Remarks on the rows that are shown before the first step."""
_COMPARED = 8
"""Rows whose common beginnings and ends are left out of the example."""
_COLUMNS = 100
"""Lines of a plan are at most this long."""


def _decisions(plan: "Plan") -> Iterator[str]:
    """What is trained, and how, in few words."""
    config, schedule, lora = plan.config, plan.schedule, plan.config.lora
    modules = lora.target_modules if isinstance(lora.target_modules, str) else listed(list(lora.target_modules), 7)
    yield f"{'DoRA' if lora.use_dora else 'LoRA'} r {lora.r} on {modules.replace('_proj', '')}"
    passes = schedule.passes
    shown = "1 pass" if passes == 1 else f"{passes:.2g} passes" if passes < 10 else f"{passes:,.0f} passes"
    yield f"{plural(schedule.steps, 'step')} ({shown})"
    yield f"rate {config.training.learning_rate:g}"
    if config.training.objective != "sft":
        yield config.training.objective
    if config.has_retention:
        yield "keeps what the base can do"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table; in a terminal that is too narrow for it, a block for each row, with the cells below each other."""
    lines = [*table(header, rows)]
    if max(map(len, lines)) <= columns():
        yield from lines
        return
    for name, *cells in rows:
        found: list[tuple[str, str]] = []
        for title, cell in zip(header[1:], cells, strict=True):
            if title.startswith("p (") and cell:
                found[-1] = (found[-1][0], f"{found[-1][1]}, p {cell}")
            elif cell not in ("", "-"):
                found.append((title, cell))
        yield from block(one_line(name.strip()), found) if found else ()


def _marked_line(plan: "Plan", example: "Pieces") -> str:
    """The first row as one line, with what is learned in ⟦ ⟧, and both cut to fit; without special tokens and what the
    next rows begin and end with too, such as the headers of a chat template."""
    from loratune.compare.text import distinct_parts

    def joined(pieces: Iterable[tuple[str, bool]], *, supervised: bool) -> str:
        return "".join(text for text, is_learned in pieces if is_learned == supervised)

    special = plan.datasets.tokenizer.all_special_tokens
    others = [plan.row_text(number) for number in range(1, min(_COMPARED, len(plan.datasets.train.rows)))]
    prompts = [joined(pieces, supervised=False) for pieces in (example, *others)]
    asked, (answer,) = distinct_parts(prompts, special)[0], distinct_parts([joined(example, supervised=True)], special)
    most = _COLUMNS // 2
    asked = f"… {asked[-most:]}" if len(asked) > most else asked
    answer = f"{answer[:most]} …" if len(answer) > most else answer
    return one_line(f"{asked} ⟦{answer}⟧")


def _wrapped(label: str, text: str) -> list[str]:
    """A label and its text in short lines."""
    width = min(_COLUMNS, shutil.get_terminal_size((_COLUMNS, 24)).columns)
    return wrapped(one_line(f"{label:<9}{text}"), width)


def plan_values(plan: "Plan", rows: int) -> "DryRun":
    """The plan for `train --dry-run --json`, with this many training rows."""
    train = plan.datasets.train
    shown = range(min(rows * train.rows_per_example, len(train.rows)))
    return {
        "config": plan.config.resolved(), "targets": plan.targets.entry_patterns(), "trainable": plan.count.trainable,
        "total": plan.count.total, "adapter_bytes": plan.count.adapter_bytes, "memory": plan.memory.parts(),
        "device": plan.device,
        "rows": {
            name: split.report.record() | {"dropped_places": split.report.dropped_places()}
            for name, split in plan.datasets.splits.items()
        },
        "examples": [{"place": train.rows.row(one).where, "text": marked(plan.row_text(one))} for one in shown],
        "notes": [*(line for lines in plan.datasets.leaks.values() for line in lines), *plan.all_notes()],
    }  # fmt: skip


def trained(result: "PublishedAdapter", program: str) -> Iterator[str]:
    """The lines on a published adapter. program: the command that starts loratune."""
    from loratune.adapter.card import example_command

    found, directory = result.trained, result.run.directory
    adapter = shell_word(directory.display_name)
    lines = [("sure?", found.doubt)] if found.doubt else []
    lines += [("try", " · ".join(found.advice))] if found.advice else []
    lines += [("kept", _kept(found, f"{program} evaluate --adapter {adapter} --data ROWS --forgetting builtin"))]
    lines += [("reasons", str(found.reasoning))] if found.reasoning is not None else []
    lines += [("sample", _sample(one, texts=found.answers is None)) for one in found.samples]
    lines += [line for line in found.held_out if line[0] != "held-out"]
    alone = "; it holds the adapter that it started from" if found.earlier is not None else ""
    duration = f"{found.tokens:,} tokens in {found.steps:,} steps, {format_duration(found.seconds)}"
    lines += [("saved", f"{directory.output}, {format_size(found.adapter_bytes)}; {duration}{alone}")]
    rows = result.run.rows.train if result.run.rows else None
    lines += [("try it", f"{program} {example_command(directory.display_name, rows, result.run.system)}")]
    lines += [("test it", f"{program} evaluate --adapter {adapter} --data UNSEEN_ROWS")]
    return block(f"{mark(found.outcome)} {one_line(found.headline)}", lines)


def mark(outcome: "Outcome") -> str:
    """A mark that says at once whether it worked: yes, no, or not known."""
    if outcome not in ("good", "bad"):
        return "?"
    is_good = outcome == "good"
    with suppress(LookupError):  # a stream of a Python program may have no encoding
        try:
            "✓✗".encode(sys.stdout.encoding or "ascii")
        except UnicodeEncodeError:
            return "yes:" if is_good else "no:"
    return "✓" if is_good else "✗"


def _kept(found: "TrainedAdapter", command: str) -> str:
    """What the base could do otherwise, in words. command: what measures it, if the run has not."""
    from loratune.compare import verdict

    if isinstance(losses := found.unrelated, str):
        return f"not measured: {losses}; {command}"
    worse, shown = losses.difference.value, verdict.change(losses)
    if worse > 0:
        number = f"{worse:+.2f}" if f"{worse:.2f}" != f"{verdict.SLIGHTLY:.2f}" else f"{worse:+.4f}"
        shown += f" ({number}; a warning from {verdict.SLIGHTLY:.2f})"
    text, is_unlike = f"what the base could do otherwise: {shown}", False
    if found.behavior is not None and (is_unlike := found.behavior.has_suffered):
        share = 100 * (1 - found.behavior.agreement)
        text = (
            f"everyday questions get other answers than from the base: {share:.0f} % of the words differ; other text "
        )
        text += f"is predicted {shown}"
    if losses.has_suffered or is_unlike:
        text += "; where that matters, raise retention.kl_weight, or lower training.learning_rate"
    return text


def _sample(one: "SampleAnswer", *, texts: bool) -> str:
    """A held-out prompt and the adapter's answer; also the base's and the expected answer, if they are texts."""
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
    yield from _table(["role", "modules", "count", "shape", "rank", "trainable"], rows)
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
    yield from _table(TABLE_HEADER, [[kind, *table_row(group)] for kind, group in groups.items()])
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
        yield from _table(["layer", *shortest([*groups])], rows)


def started(started: "InitialConfig") -> list[tuple[str, str]]:
    """The findings of `init` and its estimates for the run, as names and texts."""
    rows, fit, run = started.rows, started.fit, started.run
    lengths, paired, counts = rows.tokenized.lengths, rows.rows_per_example > 1, rows.classes.counts
    what = "trained as {:,.0f} rows" if rows.tokenized.owners is None else "in {:,.0f} blocks"
    blocks = f", {what.format(rows.items_per_row * len(rows.train))}" if rows.items_per_row != 1 else ""
    sampled = f", of {len(lengths) // rows.rows_per_example:,} drawn from them" if rows.is_sample else ""
    median, high = (int(value) for value in np.quantile(lengths, (0.5, 0.95), method="inverted_cdf"))
    sampled += ", of each answer with its prompt" * paired
    steps = plural(started.steps, "step")
    duration = f"about {format_duration(max(1, float(f'{started.seconds:.2g}')))} for {steps}"
    duration += ", beside loading and checks; within a factor of two; timed under the current load"
    if run.training.max_minutes is not None:
        duration = f"at most {run.training.max_minutes:g} min, for about {steps}, within a factor of two"
    context = f", {started.context:,} positions" if started.context else ""
    return [
        ("rows", f"{len(rows.train):,}: {rows.train.described}{blocks}"),
        *([("classes", f"{len(counts):,}: {rows.classes.listed(counts)}")] if counts else []),
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


_OUTLIER = 512
"""A row with fewer tokens is not called too long."""


def started_notes(started: "InitialConfig") -> list[str]:
    """What should be known of the rows, the model and the config: rows that are dropped or truncated, scarce memory."""
    lines = [*started.remarks, *(f"data.max_length: {line}" for line in started.cut)]
    lengths = started.rows.tokenized.lengths
    usual, longest = int(np.quantile(lengths, 0.95)), int(lengths.max())
    if longest >= max(_OUTLIER, 8 * usual):
        place = started.rows.tokenized.row(int(lengths.argmax())).where
        lines.append(
            f"one row is much longer than the others: {place} has {longest:,} tokens, most have up to {usual:,}"
        )
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
    from loratune.compare.verdict import outcome

    leaked = sum((found.overlap or {}).get(kind, 0) for kind in ("exact", "folded"))
    head = one_line(f"{mark(outcome(found.verdict, found.answers, unseen=not leaked))} {text.verdict(found)}")
    lines = [("sure?", f"no: {leaked:,} of the rows are also training rows")] if leaked else []
    lines += [*text.prompted(found), *text.tool_calls(found), *text.classified(found)]
    lines += [text.abstention(found.abstention)] if found.abstention is not None else []
    yield from block(head, lines) if lines else [head]
    if line := text.objective_line(found):
        yield line
    yield f"{text.rows(found)}, 95 % intervals in brackets"
    yield from _table(*text.scores_table(found))
    yield from _table(*text.differences_table(found))
    if found.classification is not None:
        yield from _table(*text.classes_table(found.classification))
    yield from _worst(found, worst) if worst else ()
    lines = []
    if found.forgetting is not None:
        lines.append(("forgetting", text.forgetting(found.forgetting)))
    if found.behavior is not None:
        lines.append(("base's answers", str(found.behavior)))
    if found.reasoning is not None:
        lines.append(("reasons", str(found.reasoning)))
    if lines := [*lines, *text.required(found.requirements)]:
        yield from block("result", lines)
    if found.tasks is not None:
        yield from tasks(found.tasks)


def _worst(found: "Comparison", count: int) -> Iterator[str]:
    """The rows with the largest increase of the loss."""
    from loratune.compare import text

    rows = text.worst(found, count)
    for row in rows:
        copies = f", {row.copies:,} copies" if row.copies > 1 else ""
        yield from block(f"{row.where}{copies}", text.row_lines(row, found.compared_with))
    if not rows:
        yield f"no {found.item} got worse"


def both_answers(answer: "Answer") -> Iterator[str]:
    """A prompt, and the answers of base and adapter, a line each."""
    yield answer.prompt
    for name, text in (("base", answer.base), (answer.adapter, answer.completion)):
        yield f"  {name:<7}  {' ↵ '.join(line.strip() for line in (text or '').splitlines() if line.strip())}"


def quickstart(found: "Quickstart", program: str) -> Iterator[str]:
    """What comes after the training: rows that it has not seen, and what to do next. program: as for `trained`."""
    from loratune.compare import text
    from loratune.compare.verdict import outcome

    place = found.directory
    yield ""
    yield f"rows that it has not seen ({place / 'eval.jsonl'}):"
    is_good = outcome(found.comparison.verdict, found.comparison.answers, unseen=True)
    yield one_line(f"{mark(is_good)} {text.verdict(found.comparison)}")
    for answer in found.answers:
        yield from both_answers(answer)
    config, adapter, unseen = (shell_word(str(place / name)) for name in ("config.yaml", "adapter", "eval.jsonl"))
    model = shell_word(str(place / "model") if (place / "model").exists() else found.adapter.base)
    yield from block(
        "next",
        [
            ("train", f"edit {config}, then: {program} train {config} --overwrite"),
            ("compare", f"{program} evaluate --adapter {adapter} --data {unseen}"),
            ("your rows", f"{program} init FILE.csv --model {model}"),
        ],
    )


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
        if one.forgetting is not None:
            lost = one.forgetting.difference
            rows[-1].append(text.with_interval(metrics.FORGETTING, lost.value, lost.interval, signed=True))
        if (changed := one.behavior) is not None:
            middle = changed.median_interval
            ends = f" [{middle.low:.3f}, {middle.high:.3f}]" if middle else ""
            rows[-1].append("-" if changed.unknown else f"{changed.median:.3f}{ends}")
    yield from _table(header, rows)


def tasks(results: "TaskResults") -> Iterator[str]:
    """The metrics of tasks of the lm-evaluation-harness, for base and adapter side by side."""
    from loratune.compare import text

    limit = f", at most {results.limit:,} rows of each" if results.limit is not None else ""
    yield f"tasks of lm-evaluation-harness {results.version}{limit}, 95 % intervals in brackets"
    yield from _table(*text.tasks_table(results))
    if results.requirements:
        yield from block("result", text.required(results.requirements))


def study(swept: "SweepResult", program: str) -> Iterator[str]:
    """The verdict on the best adapter of a study, and its trials, the best first. program: the command that starts
    loratune."""
    results, best = swept.results, swept.results.winner
    lines = [("best" if results.curve is None else "rows", results.conclusion())]
    if results.published is not None:
        adapter = shell_word(results.published)
        lines += [("saved", results.published), ("try it", f"{program} {swept.example_command}")]
        lines.append(("test it", f"{program} evaluate --adapter {adapter} --data FILE, with rows that it has not seen"))
        lines.append(("look", f"{program} report --adapter {adapter}"))
    lines.append(("study", str(swept.directory)))
    lines += [("note", as_options(note)) for note in (*results.remarks(), *swept.notes)]
    if swept.stop is not None:
        title = "? interrupted"
    elif best is None or not best.headline:  # a study of an earlier release has none
        title = "swept"
    else:
        title = f"{mark(best.outcome)} {best.headline}"
    yield from block(one_line(title), lines)
    yield results.summary()
    yield from _table(results.header(), [results.cells(trial) for trial in results.trials])
    for trial in results.trials:
        if trial.note:
            yield one_line(f"  trial {trial.number}: {trial.state}: {trial.note}")


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
    counts = Counter(kept.name.removesuffix(".weight").rpartition(".")[2] for kept in written.kept)
    changed: dict[int, list[str]] = {}
    for name, count in counts.items():
        changed.setdefault(count, []).append(name)
    shares = sorted(kept.share for kept in written.kept)
    files = plural(written.files, "file")
    lines = [
        ("model", str(merged.directory)),
        ("weights", f"{format_size(written.size)} in {files}, {', '.join(written.dtypes)}"),
        ("merged", "; ".join(f"{', '.join(names)} x {count}" for count, names in changed.items())),
    ]
    if written.untied:
        lines.append(("embeddings", "stored apart, tie_word_embeddings is false"))
    if shares:
        lines.append(("change kept", f"{shares[len(shares) // 2]:.1%} (median), {shares[0]:.1%} (least)"))
    if "tensors" in found:
        what = f"{found['tensors']} tensors were read back: all are equal, byte for byte"
        lines.append(("compared", f"{what}; there is too little memory to compute logits"))
    else:
        of_adapter, of_base = found["adapter"], found["base"]
        where = f"{merged.texts.origin}, {of_adapter['positions']:,} tokens, in {found['dtype']}"
        alike = f"as base and adapter in {of_adapter['top1']:.1%}, as the base alone in {of_base['top1']:.1%}"
        lines.append(("compared", f"on {where}: the next word is predicted {alike}"))
    lines.append(("use it", f"{merged.loader}.from_pretrained({str(merged.directory)!r})"))
    is_compared = "tensors" not in found  # a model that computes something else is refused
    what = "merged: it computes what base and adapter do" if is_compared else "merged, and not run"
    yield from block(f"{mark('good' if is_compared else 'open')} {what}", lines)


def exported(exported: "Exported") -> Iterator[str]:
    """The exported directory, the results of the comparison, and the commands to use it."""
    lines = [("written", str(exported.directory)), *((name, as_options(text)) for name, text in exported.lines)]
    return block(
        f"{mark('good')} exported for {exported.client}", [*lines, *(("type", line) for line in exported.commands)]
    )


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
