"""What the commands print: tables and blocks on stdout for people, or JSON for programs."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from loratune import escaping
from loratune.console import log, print_block, print_json, print_marked, print_table
from loratune.lora.module_names import adapted_too, pattern, ranges, shape_text, shared_module
from loratune.report.loss_plot import loss_plot
from loratune.text import format_duration, format_size, plural

if TYPE_CHECKING:
    from loratune.commands.export import Exported
    from loratune.commands.init import Started
    from loratune.commands.merge import Merged
    from loratune.commands.params import Params
    from loratune.commands.sweep import SweepResult
    from loratune.compare.comparison import Comparison
    from loratune.compare.tasks import TaskResults
    from loratune.export.hub import Upload
    from loratune.memory import Estimate
    from loratune.training.plan import Plan
    from loratune.training.preflight import Run
    from loratune.training.results import TrainedAdapter


def print_plan(plan: "Plan", rows: int) -> None:
    """What `train --dry-run` shows, with this many training rows."""
    lines = []
    for module_pattern, roles in plan.targets.module_patterns().items():
        count = sum(pattern(path) == module_pattern for path in plan.targets.paths)
        shared = plan.targets.shared_roles().get(module_pattern)
        fused = f", fused: {adapted_too(shared)}" if shared else ", fused" if shared is not None else ""
        lines.append((", ".join(roles), f"{module_pattern} x {count}{fused}"))
    print_block("targets", lines)
    print(plan.count)
    for line in plan.dataset_lines():
        print(escaping.line(line))
    for line in plan.all_notes():
        log(line)
    for number in range(min(rows * plan.datasets.train.rows_per_example, len(plan.datasets.train.rows))):
        where = escaping.line(plan.datasets.train.rows.row(number).where)
        print(f"{where}{plan.side_name(number)}, supervised text marked")
        print_marked(plan.row_text(number))
    print(f"adapter file: {format_size(plan.count.adapter_bytes)}")
    print(f"memory at the longest batch: {_memory(plan.memory)}")


def print_result(run: "Run", trained: "TrainedAdapter", program: str, as_json: bool) -> None:
    """The block at the end of a run, and a curve of its loss. program: what to type to start this program."""
    from loratune.adapter.card import example_prompt

    directory, losses = run.directory, trained.losses()
    if as_json:
        result = {"adapter": str(directory.output), "adapter_bytes": trained.adapter_bytes, **trained.metrics}
        print_json(result | {"peak_memory": trained.peak_memory, "not_accelerated": dict(trained.not_accelerated)})
        return
    lines = [
        ("adapter", str(directory.output)),
        ("size", format_size(trained.adapter_bytes)),
        ("trained", f"{trained.tokens:,} tokens in {trained.steps:,} steps, {format_duration(trained.seconds)}"),
        ("loss", f"{losses[0]:.4f} → {losses[-1]:.4f}"),
    ]
    lines += [*trained.held_out, ("gain", str(trained.gain)), *trained.side_effects]
    if trained.forgetting is not None:
        lines.append(("stands alone", "it holds the adapter that it started from"))
    prompt = example_prompt(run.rows.train) if run.rows else ""
    lines.append(("try it", f"{program} generate --adapter {escaping.shell(directory.display_name)} {prompt}"))
    print_block("done", lines)
    for line in loss_plot(trained.curve, sys.stdout.encoding or "ascii"):
        print(line)


def print_params(params: "Params", as_json: bool) -> None:
    """Counts, a table of the modules, and the memory that training will need."""
    for line in params.notes:
        log(line)
    for module_pattern, roles in params.shared_roles.items():
        log(shared_module(module_pattern, params.fused[module_pattern], roles))
    if as_json:
        print_json(params.as_json())
        return
    count = params.count
    print(count)
    rows = [
        [
            group.role,
            group.pattern,
            f"{group.modules}",
            shape_text(*group.shape, group.experts),
            f"{group.rank}",
            f"{group.trainable:,}",
        ]
        for group in params.groups
    ]
    rows += [["", name, "", "", "", f"{trainable:,}"] for name, trainable in params.others.items()]
    print_table(["role", "modules", "count", "shape", "rank", "trainable"], rows)
    for module_pattern, fused_roles in params.fused.items():
        print(f"  {', '.join(fused_roles)}: {module_pattern}, fused")
    print(f"per layer: {_per_layer(params.layers)}")
    print(f"adapter file: {format_size(count.adapter_bytes)}")
    print(f"memory to train, {params.batch} rows of {params.length:,} tokens: {_memory(params.memory)}")


def print_started(started: "Started", output: str, program: str, *, to_stderr: bool) -> None:
    """What `init` found, what to expect of the run, and what to type.

    Args:
        started: The config.
        output: Where it was written, as the user named it.
        program: What to type to start this program.
        to_stderr: Whether stdout has the config.
    """
    rows, fit, run = started.rows, started.fit, started.run
    lengths, paired = rows.tokenized.lengths, rows.rows_per_example > 1
    answers = f", {rows.classes.labels} labels" if rows.classes.labels else ""
    sampled = f", of {len(lengths) // rows.rows_per_example:,} drawn from them" if rows.is_sample else ""
    median, high = (int(value) for value in np.quantile(lengths, (0.5, 0.95), method="inverted_cdf"))
    sampled += ", of each answer with its prompt" * paired
    context = f", {started.context:,} positions" if started.context else ""
    free = f"{fit.free / (1 << 30):.1f} GiB free"
    duration = f"about {format_duration(max(1, float(f'{started.seconds:.2g}')))} for {plural(started.steps, 'step')}"
    duration += ", within a factor of two; timed under the current load"
    if run.training.max_minutes is not None:
        steps = plural(started.steps, "step")
        duration = f"at most {run.training.max_minutes:g} min, for about {steps}, within a factor of two"
    lines = [
        ("rows", f"{len(rows.train):,}, {' and '.join(rows.train.formats)}{answers}"),
        ("lengths", f"{median:,} tokens in the median, {high:,} at 95 %, {lengths.max():,} at most{sampled}"),
        ("model", f"{started.count.total - started.count.trainable:,} parameters{context}"),
        ("machine", f"{started.machine}, {free}"),
        ("time", duration),
        ("memory", _memory(fit.estimate)),
        ("adapter", format_size(started.count.adapter_bytes)),
    ]
    if not to_stderr:
        command = f"{program} train {escaping.shell(output)}"
        lines += [("config", output), ("look", f"{command} --dry-run"), ("train", command)]
        print_block("started", lines)
    else:
        for name, value in lines:
            log(f"{name}: {value}")
    for line in started.cut:
        log(f"data.max_length: {line}")
    if not fit.is_roomy:
        batch = run.training.per_device_train_batch_size
        log(f"memory: even a batch of {batch} takes more than half of what is free, and the run may not fit")


def _memory(estimate: "Estimate") -> str:
    """`about 3.2 GiB (weights 1.0, activations 2.1, runtime 0.1)`, without parts that are negligible."""
    parts = estimate.parts()
    total = parts.pop("total")
    texts = [f"{name} {value / (1 << 30):.1f}" for name, value in parts.items() if value >= 0.05 * (1 << 30)]
    coarse = "" if estimate.traced else ", by a coarse formula"
    return f"about {format_size(total)} ({', '.join(texts)}{coarse})"


def _per_layer(layers: Mapping[int, int]) -> str:
    """`30,720 in each of layers 0-29`; several of these where layers differ."""
    numbers_by_count: dict[int, list[int]] = {}
    for number, trainable in layers.items():
        numbers_by_count.setdefault(trainable, []).append(number)
    return "; ".join(
        f"{trainable:,} in {'each of layers' if len(numbers) > 1 else 'layer'} {ranges(numbers)}"
        for trainable, numbers in numbers_by_count.items()
    )


def print_evaluation(comparison: "Comparison", worst: int, as_json: bool) -> None:
    """The metrics of each model, how the adapter differs, and the verdict.

    worst: how many of the rows that got worse most are shown.
    """
    from loratune.compare import text

    rows = text.worst(comparison, worst)
    if as_json:
        print_json(comparison.to_dict() | ({"worst": [row.as_json() for row in rows]} if worst else {}))
        return
    if measured := text.measured(comparison):
        print(measured)
    print(f"{text.rows(comparison)}, 95 % intervals in brackets")
    print_table(*text.scores_table(comparison))
    print_table(*text.differences_table(comparison))
    for row in rows:
        print_block(
            f"{row.where}{f', {row.copies:,} copies' if row.copies > 1 else ''}",
            text.row_lines(row, comparison.compared_with),
        )
    if worst and not rows:
        print(f"no {comparison.item} got worse")
    lines = [("verdict", text.verdict(comparison))]
    if majority := text.majority(comparison):
        lines.append(("majority", majority))
    if comparison.forgetting is not None:
        lines.append(("forgetting", text.forgetting(comparison.forgetting)))
    print_block("result", [*lines, *text.required(comparison.requirements)])
    if comparison.tasks is not None:
        print_tasks(comparison.tasks)


def print_tasks(results: "TaskResults", as_json: bool = False) -> None:
    """The metrics of tasks of the lm-evaluation-harness, those of base and adapter side by side."""
    from loratune.compare import text

    if as_json:
        print_json(results.as_json())
        return
    limit = f", at most {results.limit:,} rows of each" if results.limit is not None else ""
    print(f"tasks of lm-evaluation-harness {results.version}{limit}, 95 % intervals in brackets")
    print_table(*text.tasks_table(results))
    if results.requirements:
        print_block("result", text.required(results.requirements))


def print_study(swept: "SweepResult", program: str, as_json: bool) -> None:
    """The trials of a study, the best first, and what became of the best. program: what starts this program."""
    results = swept.results
    if as_json:
        print_json(results.as_json() | {"notes": [*results.remarks(), *swept.notes]})
        return
    print(results.summary())
    print_table(results.header(), [results.cells(trial) for trial in results.trials])
    for trial in results.trials:
        if trial.note:
            print(escaping.line(f"  trial {trial.number}: {trial.state}: {trial.note}"))
    lines = [("best", results.conclusion())]
    if results.published is not None:
        lines.append(("adapter", results.published))
        lines.append(
            ("try it", f"{program} generate --adapter {escaping.shell(results.published)} {swept.example_prompt}")
        )
    lines += [
        ("study", str(swept.directory)),
        ("look", f"{program} report --study {escaping.shell(str(swept.directory))}"),
    ]
    notes = [*results.remarks(), *swept.notes]
    print_block("swept" if swept.stop is None else "interrupted", [*lines, *(("note", note) for note in notes)])


def print_upload(upload: "Upload", as_json: bool) -> None:
    """Where an adapter was uploaded to, what of it, and how that was checked."""
    if as_json:
        print_json(upload.as_json())
        return
    count, size = len(upload.files), format_size(sum(file.bytes for file in upload.files))
    lines = [
        ("repository", upload.url),
        ("visibility", f"{'public' if upload.public else 'private'}{', new' if upload.created else ''}"),
        ("base", upload.base),
        ("files", f"{count}, {size}: {', '.join(file.name for file in upload.files)}"),
        ("commit", f"{upload.commit}{', which held these files already' if upload.unchanged else ''}"),
        ("checked", f"{count} files re-read, equal"),
    ]
    optional = {
        "paths replaced": upload.paths_replaced, "removed there": upload.removed, "left out": upload.left_out
    }  # fmt: skip
    lines += [(name, ", ".join(names)) for name, names in optional.items() if names]
    lines.append(("get it", f"hf download {upload.repository} --local-dir {upload.repository.rpartition('/')[2]}"))
    print_block("pushed", lines)


def print_merged(merged: "Merged", as_json: bool) -> None:
    """What was merged, how it compares with base and adapter, and how it is used."""
    if merged.low:
        worst = merged.low[0]
        count = f"{len(merged.low)} of {len(merged.written.kept)} parameters keep"
        log(
            f"{count} less than {merged.LOW_SHARE:.0%} of their change in {worst.dtype}, the least {worst.share:.1%} "
            f"({worst.name}); --dtype float32 keeps all of it"
        )
    if as_json:
        print_json(merged.as_json())
        return
    written, found = merged.written, merged.comparison
    changed: dict[str, int] = {}
    for kept in written.kept:
        changed[pattern(kept.name)] = changed.get(pattern(kept.name), 0) + 1
    shares = sorted(kept.share for kept in written.kept)
    files = f"{written.files} file{'s' if written.files != 1 else ''}"
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
    lines.append(("use it", f"AutoModelForCausalLM.from_pretrained({str(merged.directory)!r})"))
    print_block("merged", lines)
    if "tensors" not in found:
        rows = [
            [name, f"{one['largest']:.3g}", f"{one['divergence']:.3g}", f"{one['top1']:.1%}"]
            for name, one in (("base and adapter", found["adapter"]), ("base", found["base"]))
        ]
        print_table(["merged against", "largest logit difference", "KL (nats a token)", "same top-1"], rows)


def print_exported(exported: "Exported", as_json: bool) -> None:
    """What was written and compared, and what to type."""
    if as_json:
        print_json(exported.as_json())
        return
    lines = [("written", str(exported.directory)), *exported.lines]
    print_block(f"exported for {exported.client}", [*lines, *(("type", command) for command in exported.commands)])
