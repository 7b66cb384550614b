"""Publishes the adapter of a run: its directory with weights, tokenizer, config, card and record, moved to its place as
a whole; or records why there is none."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from loratune import config, data, memory
from loratune.adapter import card, clients
from loratune.codes import Code
from loratune.compare import labels, preferences, temperature
from loratune.data import splits
from loratune.errors import NumericError, Problem
from loratune.events import note
from loratune.lora import adapter_files, attach, parameters
from loratune.model import checks, load
from loratune.system.files import explain_full_disk, versioned, write_json
from loratune.training.checkpoints.run_dir import PUBLISH_WORSE
from loratune.training.plan import Plan
from loratune.training.results import TrainedAdapter

_CONDITIONS = {
    "processor": "the processor", "device": "the device", "threads": "the number of threads",
    "compiled_code": "the compiled CPU code",
}  # fmt: skip
"""Key of loratune.json → its name in `conditions`."""


def publish(plan: Plan, trained: TrainedAdapter) -> TrainedAdapter:
    """Write the adapter directory, and move it atomically to the output directory."""
    directory, trained = plan.run.directory, replace(trained, peak_memory=memory.peak())
    size = plan.count.adapter_bytes + load.tokenizer_bytes(plan.datasets.tokenizer)
    try:
        with explain_full_disk("the adapter directory", size, directory.partial, "make room, then `resume=True`"):
            directory.create_staging()
            unchanged, init = trained.verdict == "learned nothing", plan.adapter_init
            size = attach.save(plan.model, directory.staging, init, trained.weights, unchanged=unchanged)
            _write_descriptions(plan, trained)
            for path in directory.publish():
                note(f"{path} is kept: this run did not write it")
    except NumericError:
        directory.remove_checkpoints()  # The weights did not change; resuming would fail in the same way.
        raise
    return replace(trained, adapter_bytes=size)


def reject(plan: Plan, trained: TrainedAdapter) -> NoReturn:
    """End a run whose adapter is worse than its base or learned nothing, and record that next to its checkpoints."""
    assert trained.gain is not None and trained.verdict is not None
    is_worse, what = trained.verdict == "worse", trained.headline
    if plan.group.main:
        record = versioned({"step": trained.steps, "verdict": trained.verdict, "headline": what})
        with suppress(OSError):  # the record only makes later messages more exact
            write_json(plan.run.directory.rejection, record)
    plan.group.all_gather(None)  # a barrier: the other processes end only after the record is written
    code = Code.TRAINING_WORSE_THAN_BASE if is_worse else Code.TRAINING_LEARNED_NOTHING
    change = "lower training.learning_rate" if is_worse else "raise training.learning_rate or training.num_train_epochs"
    fix = f"{change} and start with `overwrite=True`, or {PUBLISH_WORSE}"
    message = f"the adapter {'is ' if is_worse else ''}{what}{'' if is_worse else f' (gain: {trained.gain.gain_line})'}"
    if not is_worse and not plan.adapter_init.has_changed(trained.weights):
        code, message = Code.LORA_UNCHANGED, "training changed nothing: every lora_B still has its initial values"
    raise NumericError(Problem(code, message, fix=fix))


def _write_descriptions(plan: Plan, trained: TrainedAdapter) -> None:
    """Write all files of the staged adapter except its weights: tokenizer, config, card, row hashes, record."""
    staging, name, rows = plan.run.directory.staging, plan.run.directory.output.name, plan.run.rows
    assert rows is not None and trained.gain is not None
    plan.datasets.tokenizer.save_pretrained(staging)
    (staging / "run.yaml").write_text(config.dump(plan.config), encoding="utf-8")
    system, known = plan.run.system, not [*parameters.layers_unknown_to_llama_cpp(plan.model)]
    loader, quantized = checks.auto_class(plan.base.config).__name__, plan.base.quantized
    use = partial(clients.sections, loader=loader, quantized=quantized, in_vllm=plan.servers["vllm"])
    lines = card.CardLines(
        use=use(plan.config, name, card.example_command(name, rows.train, system), are_layers_known=known),
        verdict=trained.headline,
        gain=trained.gain.gain_line,
        side_effects=trained.side_effects,
        held_out=trained.held_out,
        formats=rows.train.formats,
        example=card.example(rows.train, system),
        changes=plan.checkpoints.record.changes,
        objective=preferences.described(plan.config),
        processes=plan.group.count,
        has_system=bool(system),
    )
    text = card.model_card(plan.config.resolved(), trained.metrics, name, lines)
    (staging / "README.md").write_text(text, encoding="utf-8")
    start = plan.run.start
    splits.write_row_hashes(staging, rows, start.trained_on if start else None, continued=start is not None)
    record = _record(plan, trained) | {"files": adapter_files.manifest(staging)}
    write_json(staging / adapter_files.RECORD_FILE, record)


def _record(plan: Plan, trained: TrainedAdapter) -> dict[str, Any]:
    """The content of loratune.json, except the list of files."""
    kept, datasets, start, rows = plan.checkpoints.record, plan.datasets, plan.run.start, plan.run.rows
    assert rows is not None
    quantized = plan.base.quantized
    record = card.provenance(plan.config.resolved(), trained.metrics, trained.curve, kept.fingerprints, quantized)
    record["machine"] |= {key: (kept.conditions or {})[name] for key, name in _CONDITIONS.items()}
    record["machine"]["peak_memory"] = trained.peak_memory
    prompts = card.recorded_prompts(data.first_examples(rows.train, datasets.train.rows))
    record |= {
        "not_accelerated": dict(trained.not_accelerated),
        "formats": rows.train.formats,
        "chat": rows.train.chat,
        "processes": plan.group.count,
        "rows": datasets.train.report.counts(),
        "splits": {name: split.report.record() for name, split in datasets.splits.items()},
        "changes": kept.changes,
        "prompts": prompts,
    }
    if trained.labels is not None:
        record[labels.KEY] = trained.labels.to_dict()
    if trained.label_temperature is not None:
        record[temperature.KEY] = trained.label_temperature
    if plan.targets.parameters:
        record["target_parameters"] = parameters.wrapped_parameters(plan.model)
    if system := plan.run.system:
        record["system"] = system
    if start is not None:
        adapter = {"adapter": str(start.info.files.path), "digest": start.digest, "replay": datasets.replay}
        record["start_from"] = adapter
    return record
