"""What commands print with `--json`: a type for each command, from which `loratune schema --for COMMAND` is made.

`python scripts/write_reference.py` writes the schemas to `cli/schemas.json`, with the descriptions below. A type of the
form `Annotated[dict[str, Any], CLASS, ...]` has the fields of that dataclass or type, and those of its properties and
the further keys that follow; with `...` at the end, also any other key. Each `float` may be null, for a value that is
not finite.
"""

from typing import Annotated, Any, Literal, NotRequired, Required, TypeAlias, TypedDict

Interval: TypeAlias = list[float] | None
Bytes: TypeAlias = dict[str, int]
Score: TypeAlias = dict[str, float | str | dict[str, Interval] | None]

Gain = TypedDict("Gain", {"split": str, "rows": int, "drawn": int, "total": int, "base": float | None,
    "adapter": float, "better_by": float, "low": float | None, "high": float | None, "validation_rows": int | None,
    "adapter_low": float | None, "adapter_high": float | None, "unit": str, "other": Literal["base", "start"],
    "rows_needed": int | None})  # fmt: skip
"""Losses of base and adapter on the same rows, in nats per supervised token.

Attributes:
    split: The split of the rows, `validation` or `training`.
    rows: The number of distinct rows compared.
    drawn: The number of rows compared, including copies.
    total: Rows of the split.
    base: Loss of the base.
    adapter: Loss of the adapter.
    better_by: Loss of the base minus loss of the adapter: above 0 if the adapter is better.
    low: Lower end of the 95 % interval of `better_by`; None for too few rows.
    high: Upper end of that interval.
    validation_rows: Distinct validation rows, if they were too few, so that training rows were compared.
    adapter_low: Lower end of the 95 % interval of `adapter`; None for too few rows.
    adapter_high: Upper end of that interval.
    unit: The unit over which losses are averaged: `token`, `pair` or `answer`.
    other: The model that the adapter is compared with: its `base`; or its `start`, the adapter from which training
        continued, if that is the reference of the objective. The field `base` is then the loss of `start`.
    rows_needed: The estimated number of rows for a significant difference, if it is not.
"""
Forgetting = TypedDict("Forgetting", {"not_measured": str, "split": str, "rows": int, "drawn": int, "total": int,
    "before": float, "after": float, "change": float, "low": float | None, "high": float | None,
    "kinds": dict[str, float]}, total=False)  # fmt: skip
"""The change of the loss on other rows, in nats per supervised token.

Attributes:
    not_measured: Why it was not measured; all other keys are then missing.
    split: The split of the rows.
    rows: The number of distinct rows.
    drawn: The number of rows, including copies.
    total: Rows of the split.
    before: The loss before the first step.
    after: The loss of the adapter.
    change: The loss after minus the loss before: above 0 if the loss has increased.
    low: Lower end of the 95 % interval of `change`; null for too few rows.
    high: Upper end of that interval.
    kinds: Kind of text → the change on it alone.
"""
Behavior = TypedDict("Behavior", {"not_measured": str, "texts": int, "tokens": int, "divergence": float,
    "divergence_interval": Interval, "agreement": float, "agreement_interval": Interval,
    "median_divergence": float, "median_divergence_interval": Interval,
    "samples": list[dict[str, str]]}, total=False)  # fmt: skip
"""How an adapter changes the base's answers to everyday instructions.

Attributes:
    not_measured: Why it was not measured; all other keys are then missing.
    texts: The number of answers of the base that were compared.
    tokens: Their tokens.
    divergence: KL(base ‖ adapter), in nats per token: the mean over all tokens.
    divergence_interval: The ends of its 95 % interval; null for too few texts.
    agreement: The share of tokens for which both would choose the same.
    agreement_interval: The ends of its 95 % interval; null for too few texts.
    median_divergence: The median over answers of the divergence, in nats per token of each answer.
    median_divergence_interval: The ends of its 95 % interval; null for fewer than six answers.
    samples: Some of the instructions, each with both answers.
"""
Reasons = TypedDict("Reasons", {"asked": int, "base": int, "adapter": int, "share": float, "interval": Interval})
"""How many answers to everyday instructions begin with reasoning, in the reasoning mode of the chat template.

Attributes:
    asked: The number of instructions.
    base: How many answers of the base do.
    adapter: How many answers of the adapter do.
    share: The share of the adapter's answers that do.
    interval: The ends of its 95 % interval.
"""
Test = TypedDict("Test", {"loss": float, "tokens": int, "rows": int, "distinct": int, "interval": Interval})
"""The loss of the adapter on the test rows.

Attributes:
    loss: Nats per supervised token, or the objective's loss per pair or answer.
    tokens: Supervised tokens, pairs or answers.
    rows: Rows, including copies.
    distinct: Rows without copies.
    interval: The ends of the loss's 95 % interval; null for too few rows.
"""
Answers = TypedDict("Answers", {"rows": int, "right": float, "interval": Interval, "of_base": float,
    "over_base": dict[str, Any], "majority": str | None, "of_majority": float | None,
    "over_majority": dict[str, Any] | None, "metric": str})  # fmt: skip
"""How many held-out answers are right, of base and adapter on the same rows.

Attributes:
    rows: Rows, including copies.
    right: The share of the adapter's right answers.
    interval: Its 95 % interval.
    of_base: The same share of the base.
    over_base: The paired difference, adapter minus base.
    majority: The most frequent answer of the training rows; null if answers are not labels.
    of_majority: The share of rows for which it is right.
    over_majority: The paired difference, adapter minus always giving it.
    metric: What makes an answer right.
"""
Metrics = TypedDict("Metrics", {"verdict": str | None, "judged_apart": bool, "looks": int, "steps": int,
    "kept_step": int, "stopped_early": bool,
    "first_loss": float, "last_loss": float, "held_out_loss": float | None, "best_held_out_loss": float | None,
    "last_held_out_loss": float | None, "evaluations": int, "tokens": int, "seconds": float,
    "tokens_per_second": float | None, "held_out_interval": Interval,
    "gain": NotRequired[Gain], "answers": NotRequired[Answers],
    "forgetting": NotRequired[Forgetting], "unrelated_text": NotRequired[Forgetting], "behavior": NotRequired[Behavior],
    "reasons": NotRequired[Reasons], "preferences": NotRequired[dict[str, Any]], "test": NotRequired[Test],
    "computed_by": dict[str, dict[str, str]]})  # fmt: skip
"""The metrics of a run, also in `loratune.json`.

Attributes:
    verdict: `beats base and majority`, `better than its base`, `cannot tell`, `learned nothing`, `worse` or
        `collapsed`.
    judged_apart: Whether the validation rows that judged did not choose the step; then other ones did.
    looks: How many adapters the rows that judged have chosen from; 1 if they chose nothing. What is called better must
        be so for the best of that number (Bonferroni).
    steps: Optimizer steps that were taken.
    kept_step: The step whose weights became the adapter.
    stopped_early: Whether the run ended before its last planned step, as the held-out loss did not fall any more.
    first_loss: The first training loss.
    last_loss: The last training loss.
    held_out_loss: The loss of the adapter on the validation rows; null without any.
    best_held_out_loss: The lowest loss on the validation rows.
    last_held_out_loss: The loss on the validation rows after the last step.
    evaluations: How often the loss on the validation rows was computed.
    tokens: Tokens read in training, without padding.
    seconds: The duration of training.
    tokens_per_second: Tokens per second in steps, without evaluations and checkpoints; null if there was no step.
    held_out_interval: The ends of the 95 % interval of `held_out_loss`; null if unknown.
    gain: The losses of the adapter and its base on held-out rows.
    answers: How many held-out answers are right, where they are short.
    forgetting: The change on rows of the earlier run, for lora.start_from.
    unrelated_text: The change on text unrelated to the training rows.
    behavior: How the base's answers to everyday instructions change.
    reasons: Whether the adapter still reasons, where its base does.
    preferences: Reward accuracy and other metrics of preferences.
    test: The loss on the test rows, computed once.
    computed_by: Metric → how it was computed: dtype, layers and batches.
"""
Train = Annotated[dict[str, Any], Metrics, {"adapter": str, "adapter_bytes": int, "peak_memory": Bytes,
    "not_accelerated": dict[str, str]}]  # fmt: skip
"""The published adapter.

Attributes:
    adapter: The adapter directory.
    adapter_bytes: The size of its weights.
    peak_memory: The most bytes in use at once, by kind of memory.
    not_accelerated: Kind of layers that were not accelerated → the reason.
"""
DryRun = TypedDict("DryRun", {"config": dict[str, Any], "targets": dict[str, list[str]], "trainable": int, "total": int,
    "adapter_bytes": int, "memory": Bytes, "device": str, "rows": dict[str, dict[str, Any]],
    "examples": list[dict[Literal["place", "text"], str]], "notes": list[str]})  # fmt: skip
"""What would be trained, for `train --dry-run --json`.

Attributes:
    config: The effective value of each key, without `auto`.
    targets: Entry of lora.target_modules → patterns of the modules.
    trainable: Trainable parameters.
    total: All parameters.
    adapter_bytes: The size of the adapter's weights.
    memory: The estimated memory for training, in bytes: its parts and the `total`.
    device: What the process computes on, and in which dtype.
    rows: Split → numbers of rows, duplicates, dropped rows with their reasons and places, truncated rows, tokens, and
        lengths.
    examples: The first training rows: their place, and their text with the supervised parts in ⟦ ⟧.
    notes: Choices and warnings.
"""
Init = TypedDict("Init", {"config": str | None, "text": str, "rows": int, "formats": list[str], "longest": int,
    "steps": int, "seconds": float, "memory": Bytes, "free_memory": int, "adapter_bytes": int,
    "notes": list[str]})  # fmt: skip
"""A new config, and estimates for its run.

Attributes:
    config: The file that was written; null for `--output -`.
    text: Its content: YAML with the reason for each choice as a comment.
    rows: The number of training rows.
    formats: The formats of the rows.
    longest: The tokens of the longest row.
    steps: Optimizer steps of training.
    seconds: The estimated time of training with evaluations, within a factor of two.
    memory: The estimated memory for training, in bytes: its parts and the `total`.
    free_memory: The memory that is free, in bytes.
    adapter_bytes: The size of the adapter's weights.
    notes: What else should be known: truncated rows, scarce memory.
"""
Params = TypedDict("Params", {"trainable": int, "total": int, "percent": float, "adapter_bytes": int,
    "targets": dict[str, list[str]], "roles": dict[str, int], "layers": dict[int, int], "others": dict[str, int],
    "memory": Bytes, "rows_memory": Bytes | None, "device": str})  # fmt: skip
"""Trainable parameters, and the estimated memory for training.

Attributes:
    trainable: Trainable parameters.
    total: All parameters.
    percent: The percentage of trainable parameters.
    adapter_bytes: The size of the adapter's weights.
    targets: Entry of lora.target_modules → patterns of the modules.
    roles: Role → trainable parameters.
    layers: Number of the layer → trainable parameters.
    others: Pattern → trainable parameters outside the adapted modules.
    memory: The estimated memory for training, in bytes: its parts and the `total`.
    rows_memory: The same for the rows of `data.train`; null if it names no local files.
    device: What training here computes on, and in which dtype.
"""
ExplainedKey = TypedDict("ExplainedKey", {"meaning": str, "type": str, "required": bool, "default": Any,
    "memory_and_time": str, "other_names": list[str],
    "in_force": list[Annotated[dict[str, Any], "loratune.api.explain.Setting"]],
    "template_reads": NotRequired[dict[str, str]], "servers": NotRequired[dict[str, str]]})  # fmt: skip
"""A key of the config.

Attributes:
    meaning: What it sets.
    type: Its type, allowed values and range.
    required: Whether it must be set.
    default: Its default; null if it is required.
    memory_and_time: Its effect on memory and time.
    other_names: Its names in other tools.
    in_force: Its effective values; empty without a config.
    template_reads: Name → default of each argument that the chat template reads.
    servers: Server → whether its newest release applies the adapter.
"""
Explain = TypedDict("Explain", {"config": str | None, "keys": dict[str, ExplainedKey],
    "codes": NotRequired[dict[str, str]], "choices": NotRequired[dict[str, Any]]})  # fmt: skip
"""Keys of a config, the code of an error, or what a run decides itself.

Attributes:
    config: The file of the config, if it was given.
    keys: Key → its explanation.
    codes: Code → when it is reported.
    choices: Key → `value` and `reason` of what a run of the config decides.
"""
Requirement = TypedDict("Requirement", {"text": str, "met": bool, "value": float | None, "low": float | None,
    "high": float | None})  # fmt: skip
"""Whether a requirement is met.

Attributes:
    text: The requirement as written.
    met: Whether it is met.
    value: The metric, or its difference to a model; null if not computed.
    low: Lower end of the 95 % interval of the value.
    high: Upper end of that interval.
"""
Tasks = TypedDict("Tasks", {"tasks": dict[str, dict[str, dict[str, Any]]], "limit": int | None, "chat_template": bool,
    "lm_eval": str, "requirements": NotRequired[list[Requirement]]})  # fmt: skip
"""The results of tasks of the lm-evaluation-harness.

Attributes:
    tasks: Task → metric → its value for `base` and `adapter`, their `intervals` or `stderr`, the `difference` with its
        interval, the `verdict`, and the scored `rows`.
    limit: The maximum number of documents of each task; null for all.
    chat_template: Whether prompts were rendered with the chat template.
    lm_eval: The version of the harness.
    requirements: Whether each requirement is met.
"""
Difference = TypedDict("Difference", {"value": float, "low": float | None, "high": float | None,
    "p": NotRequired[float], "rows_needed": NotRequired[int | None]})  # fmt: skip
"""A metric of the adapter minus that of another model, on the same rows.

Attributes:
    value: The difference.
    low: Lower end of its 95 % interval; null for too few rows.
    high: Upper end of that interval.
    p: The exact p-value, for proportions.
    rows_needed: How many rows would show a difference of this size, if it is not significant.
"""
Differences: TypeAlias = dict[str, Difference]
Evaluate = TypedDict("Evaluate", {"base": Required[Score], "adapter": Required[Score], "against": Score,
    "majority": Score, "prompted": Score, "classification": dict[str, Any],
    "tool_calls": dict[str, Annotated[dict[str, Any], "loratune.compare.tool_calls.CallErrors"]],
    "difference": Required[Differences],
    "difference_from_base": Differences, "difference_from_majority": Differences,
    "difference_from_prompted": Differences,
    "abstention": Annotated[dict[str, Any], "loratune.compare.abstention.Abstention"],
    "forgetting": dict[str, Any], "behavior": Behavior, "reasons": Reasons,
    "metric": Required[str], "verdict": Required[str | None], "notes": list[str],
    "overlap": Required[dict[Literal["exact", "folded", "rows"], int] | None], "computed_by": Required[dict[str, str]],
    "prompt_sensitivity": Annotated[dict[str, Any], "loratune.compare.collapse.PromptSensitivity"] | None,
    "objective": dict[str, Any], "requirements": list[Requirement], "worst": list[dict[str, Any]],
    "tasks": dict[str, Any], "limit": int | None, "chat_template": bool, "lm_eval": str}, total=False)  # fmt: skip
"""The comparison of an adapter with its base, or with another adapter, on the same rows.

Attributes:
    base: The metrics of the base, with `rows`, `tokens`, and the `intervals` of the metrics.
    adapter: The metrics of the adapter.
    against: The metrics of the second adapter.
    majority: The metrics of always giving the most frequent expected answer, which is `answer`.
    prompted: The metrics of the base with the best prompt that tells it the task, which is `prompt`.
    classification: Of labels: `macro_f1`, `log_loss`, `brier`, `overconfidence`, `classes`, `confusions`, `coverage`.
    abstention: The threshold of `abstain_for`.
    tool_calls: Model → how many of its calls are right, and what is wrong with the others, for `--metric tool_call`.
    difference: Metric → the adapter minus the base, or minus the second adapter if there is one.
    difference_from_base: Metric → the adapter minus the base, if there is a second adapter.
    difference_from_majority: Metric → the adapter minus the most frequent answer.
    difference_from_prompted: Metric → the adapter minus the prompted base.
    forgetting: The loss of the adapter minus that of the base on other text: `value`, `low`, `high`, and by `kinds`.
    behavior: How the base's answers to everyday instructions change.
    reasons: Whether the adapter still reasons, where its base does.
    metric: The metric of the verdict beside another adapter; against the base, loss and right answers judge.
    verdict: As that of a run. Beside another adapter `better`, `worse` or `indistinguishable`; null for too few rows.
    notes: Rows that were cut or dropped, or are also in train; too few rows.
    overlap: Rows that are also in train, exactly or with white space folded, of all `rows`; null if unknown.
    computed_by: How losses were computed: dtype, layers and batches.
    prompt_sensitivity: How much the predictions depend on the prompt; null if not measured.
    objective: The objective of preferences, and its parameters.
    requirements: Whether each requirement is met.
    worst: The rows with the largest increase of the loss, for `--worst`.
    tasks: The results of tasks, as without `--data`.
    limit: The maximum number of documents of each task; null for all.
    chat_template: Whether the prompts of tasks were rendered with the chat template.
    lm_eval: The version of the harness.
"""
Quickstart = TypedDict("Quickstart", {"directory": str, "adapter": str, "metrics": Metrics, "comparison": Evaluate,
    "answers": list[dict[str, Any]]})  # fmt: skip
"""What the quickstart made.

Attributes:
    directory: The directory with config, rows, model and adapter.
    adapter: The directory of the adapter.
    metrics: What training recorded, as `train` prints it.
    comparison: Base and adapter on rows that training has not seen, as `evaluate` prints it.
    answers: The first of these rows, with the answers of the adapter as `completion` and of the base as `base`.
"""
Scales = TypedDict("Scales", {"scales": list[Annotated[dict[str, Any], Evaluate, {"adapter_scale": float}]]})
"""An adapter at several scales.

Attributes:
    scales: Its comparison with the base at each scale.
"""
Report = TypedDict("Report", {"page": str})
"""The page that was written.

Attributes:
    page: The HTML file.
"""
Generate = Annotated[dict[str, Any], {"prompt": NotRequired[str], "completion": str, "base": NotRequired[str]}, ...]
"""One line per prompt: for `--input` or `--output`, the fields of its row, and the completion.

Attributes:
    prompt: The prompt as text; of a conversation, its last message.
    completion: The completion of the adapter.
    base: The completion of the base, for `--base`.
"""
Classify = Annotated[dict[str, Any], {"prompt": NotRequired[str], "label": str, "probability": float}, ...]
"""One line per row: for `--input` or `--output`, its fields, and its label.

Attributes:
    prompt: The prompt, if it was an argument.
    label: The most probable label; empty if it is less probable than `--abstain-below`.
    probability: Its probability among all labels.
"""
Merge = TypedDict("Merge", {"output": str, "dtypes": list[str], "bytes": int, "files": int, "untied": bool, "note": str,
    "compared_on": str, "comparison": dict[str, Any], "kept": dict[str, Any]})  # fmt: skip
"""The merged model.

Attributes:
    output: Its directory.
    dtypes: The dtypes of its weights.
    bytes: The size of its weights.
    files: The number of their files.
    untied: Whether the embeddings are stored apart from the output layer.
    note: Why and how the base was loaded; empty if its files were read directly.
    compared_on: The texts on which the model was compared with base and adapter.
    comparison: The largest difference of logits, the KL divergence and the equal tokens, against both.
    kept: How much of the change is left after rounding: `median`, `least`, and by `parameters`.
"""
Export = TypedDict("Export", {"directory": str, "client": str, "comparison": dict[str, Any], "commands": list[str]})
"""The exported adapter.

Attributes:
    directory: Its directory.
    client: The program that it is for.
    comparison: The results of the comparison with the adapter, by name.
    commands: Commands that use it.
"""
Push = Annotated[dict[str, Any], "loratune.export.hub.Upload", {"bytes": int, "files_equal": int}]
"""The upload.

Attributes:
    bytes: The size of all files.
    files_equal: How many files were downloaded again and are equal.
"""
Sweep = Annotated[dict[str, Any], "loratune.report.study.StudyResults", {"version": int, "winner": int | None,
    "notes": list[str]}]  # fmt: skip
"""The trials of a sweep.

Attributes:
    version: The version of this format.
    winner: The number of the trial with the lowest held-out loss; of parts of the rows, that on all of them.
    notes: What else should be known.
"""
Fact = TypedDict("Fact", {"value": str, "advice": NotRequired[str]})
"""What was found.

Attributes:
    value: The value.
    advice: What to do where it is slow or missing.
"""
Env: TypeAlias = dict[str, dict[str, Fact] | list[Annotated[dict[str, Any], "loratune.api.machine.Check"]]]
"""Section → name → what was found; `self_test` has the results of `--self-test`."""
Reported = TypedDict("Reported", {"code": str, "place": str, "key": str, "what": str, "fix": str})
"""One thing that is wrong.

Attributes:
    code: Its stable code, such as `config.unknown_key`.
    place: A file, `file:line`, or `file:line:column`; empty if there is none.
    key: A key of the config, or an option of the command line; empty if there is none.
    what: What is wrong.
    fix: What to do about it.
"""
Failure = TypedDict("Failure", {"exit_code": int, "errors": list[Reported]})
"""The last line of stderr of a command that failed with `--json`.

Attributes:
    exit_code: The exit code, by the kind of error.
    errors: Everything that is wrong.
"""
