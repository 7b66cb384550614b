"""The stable codes of all errors and warnings. loratune/codes.md is generated from this module."""

from enum import StrEnum


class Code(StrEnum):
    """The stable name of each kind of problem, for scripts and tests: messages may be reworded, codes never change.

    A member is its code; `meaning` says in one sentence when it is reported. A code without an area, such as
    `interrupted`, already occurs in the message, and is not printed again.
    """

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> "Code":
        """Create a member from its code and its meaning."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    UNEXPECTED = "unexpected", "An error that loratune has no code for; please report it."
    INTERRUPTED = "interrupted", "The user stopped the command with Ctrl-C."
    TERMINATED = "terminated", "A signal other than Ctrl-C asked the command to end."
    MORE_PROBLEMS = "more_problems", "There are more problems than are shown."

    # Command line
    USAGE_CONFLICT = "usage.conflict", "Options contradict each other, need one another, or do not suit this command."
    USAGE_BAD_VALUE = "usage.bad_value", "The value of an option or argument is not valid."
    USAGE_NO_PROMPT = "usage.no_prompt", "There is no prompt, or an empty one."

    # Configuration
    CONFIG_UNREADABLE = "config.unreadable", "The config file is missing, empty, too large, not UTF-8, or not a file."
    CONFIG_SYNTAX = "config.syntax", "The config file, or an argument of --set, is not the YAML that is expected."
    CONFIG_UNKNOWN_KEY = "config.unknown_key", "There is no such key."
    CONFIG_MISSING_KEY = "config.missing_key", "A key without a default is missing."
    CONFIG_BAD_VALUE = "config.bad_value", "A value has the wrong type, is out of range, or is not one of the choices."
    CONFIG_CONFLICT = "config.conflict", "Two settings contradict each other, or one needs another."
    CONFIG_BUDGET = "config.budget", "A time budget has no room for a few steps, or for one trial."

    # System
    SYSTEM_OUT_OF_MEMORY = "system.out_of_memory", "The process ran out of memory, or would."
    SYSTEM_CALL_FAILED = "system.call_failed", "The operating system refused to read or write a file."
    SYSTEM_DISK_FULL = "system.disk_full", "A disk or quota is full, or has too little room for what will be written."
    SYSTEM_LOCKED = "system.locked", "Another run is using the same directory, database or process."
    SYSTEM_MISSING_PACKAGE = "system.missing_package", "A package that a setting or option needs is not installed."

    SYSTEM_SELF_TEST = "system.self_test", "A check of `loratune env --self-test` found a wrong result."

    # Rows
    DATA_NOT_FOUND = "data.not_found", "A data path names nothing that exists, or no file of a type that is read."
    DATA_UNREADABLE = "data.unreadable", "A data file cannot be read, is damaged, or changed while it was in use."
    DATA_HUB = "data.hub", "A dataset of the hub cannot be loaded."
    DATA_EMPTY = "data.empty", "A source or split has no rows, or no row with a supervised token."
    DATA_SYNTAX = "data.syntax", "A row is not valid JSON or CSV, or not an object with named fields."
    DATA_FORMAT = "data.format", "The fields of the rows fit no format, several, or not the settings."
    DATA_FIELD = "data.field", "A field of a row is missing, or its value cannot be used."
    DATA_TOO_LONG = "data.too_long", "A row or prompt is longer than a limit or than the model's context."
    DATA_TOO_MANY_DROPPED = "data.too_many_dropped", "More rows would be dropped than data.max_dropped allows."
    DATA_REPLAY = "data.replay", "The rows of an earlier run cannot be replayed."
    TOKENIZER_UNUSABLE = "tokenizer.unusable", "The tokenizer fails, or does not fit the model."
    TEMPLATE_MISSING = "template.missing", "Conversations need a chat template, and the tokenizer has none."
    TEMPLATE_INVALID = "template.invalid", "A chat template cannot be read or compiled, or fails on a conversation."
    TEMPLATE_OMITS = "template.omits", "The chat template leaves out something of a conversation."
    TEMPLATE_ANSWER = "template.answer", "The beginning or end of an answer is not found in the rendered text."

    # Base
    MODEL_NOT_FOUND = "model.not_found", "There is no such model, revision or file."
    MODEL_GATED = "model.gated", "The repository is gated, and this account has no access to it."
    MODEL_HUB_UNREACHABLE = "model.hub_unreachable", "The hub cannot be reached, or a download failed."
    MODEL_FOREIGN_CODE = "model.foreign_code", "The model needs code that is not trusted, or outside of its repository."
    MODEL_DAMAGED = "model.damaged", "A file of the model is damaged, cut off, or does not fit config.json."
    MODEL_UNREADABLE = "model.unreadable", "transformers cannot load the model, its configuration or its tokenizer."
    MODEL_CHANGED = "model.changed", "A file of the model changed during the run, or differs between processes."
    MODEL_UNSUPPORTED = "model.unsupported", "Not a decoder-only causal language model, or a setting is not supported."

    # LoRA
    LORA_UNKNOWN_TARGET = "lora.unknown_target", "A setting of LoRA names modules or tokens that the model lacks."
    LORA_UNSUPPORTED = "lora.unsupported", "PEFT, or a setting of LoRA, does not support these modules."
    LORA_START = "lora.start", "The adapter to start from does not fit the settings or the base."
    LORA_UNCHANGED = "lora.unchanged", "Training did not change the adapter."

    # Adapter directories
    ADAPTER_NOT_FOUND = "adapter.not_found", "The adapter directory, or one of its two files, is missing."
    ADAPTER_UNSAFE = "adapter.unsafe", "The adapter directory has links that lead out of it, special files, or code."
    ADAPTER_INVALID = "adapter.invalid", "A file of the adapter is damaged, or not one of a LoRA adapter."
    ADAPTER_NEWER_RECORD = "adapter.newer_record", "A newer release of loratune wrote the record."
    ADAPTER_CHANGED = "adapter.changed", "A file of the adapter was added, removed or changed since it was saved."
    ADAPTER_MISMATCH = "adapter.mismatch", "The adapter does not fit the base, or was trained on another one."
    ADAPTER_NOT_REPRODUCIBLE = "adapter.not_reproducible", "The files do not record how PEFT has changed the base."
    ADAPTER_NOT_FINITE = "adapter.not_finite", "The adapter holds NaN or inf, or gives it with its base."
    ADAPTER_UNSUPPORTED = "adapter.unsupported", "The adapter has parts that this use of it does not support."

    # Output
    OUTPUT_EXISTS = "output.exists", "The output exists, and --overwrite is not given."
    OUTPUT_UNUSABLE = "output.unusable", "The output cannot be written: its place, its kind or its permissions."
    OUTPUT_OVERWRITE = "output.overwrite", "What --overwrite would replace is not only an adapter."
    OUTPUT_FAILED = "output.failed", "Standard output cannot be written, or its disk is full."
    RUN_INTERRUPTED = "run.interrupted", "An interrupted run is there, and neither --resume nor --overwrite is given."

    # Resuming
    RESUME_CHANGED = "resume.changed", "Config, rows, base, processes or release are not those of that run."
    RESUME_CHECKPOINT = "resume.checkpoint", "There is no interrupted run, or its checkpoint is damaged or incomplete."

    # Training
    TRAINING_NOT_FINITE = "training.not_finite", "A loss, a gradient or a weight is NaN or inf."
    TRAINING_COLLAPSED = "training.collapsed", "The adapter predicts the same after every prompt, or at random."
    TRAINING_WORSE_THAN_BASE = "training.worse_than_base", "The adapter does worse than its base."
    TRAINING_LEARNED_NOTHING = "training.learned_nothing", "The adapter does no better than its base."
    TRAINING_TRACKER_FAILED = "training.tracker_failed", "A tracker failed; the run continues without it."

    # Several processes
    DISTRIBUTED_LOST = "distributed.lost", "Another process of the run has ended, or cannot be reached."
    DISTRIBUTED_SETTING = "distributed.setting", "A setting, or the rows of one machine, do not suit several processes."

    # Sweeps
    SWEEP_STUDY = "sweep.study", "A study is damaged, or belongs to another config, other rows or another base."
    SWEEP_ALL_FAILED = "sweep.all_failed", "Every trial of a study diverged, or did worse than the base."

    # Evaluation
    EVALUATE_TASK = "evaluate.task", "A task cannot be loaded or run, or says nothing."
    EVALUATE_OVERLAP = (
        "evaluate.overlap",
        "Rows that are to show what is required are among those that the run has read.",
    )
    EVALUATE_REQUIREMENT = "evaluate.requirement", "The adapter failed a requirement."

    # Export
    EXPORT_DIFFERS = "export.differs", "What was written does not compute the same, or is not what was sent."
    EXPORT_UNSUPPORTED = "export.unsupported", "The program cannot read this adapter, base, tokenizer or template."
    EXPORT_FAILED = "export.failed", "A converter of llama.cpp, llama.cpp itself or Ollama failed."

    # Push
    PUSH_LOGIN = "push.login", "There is no valid login to the hub, or it may not write the repository."
    PUSH_LOCAL_PATH = "push.local_path", "What is to be pushed names a path of this machine, or another base."
    PUSH_REPOSITORY = "push.repository", "The repository on the hub is not one that the adapter can be pushed to."
    PUSH_HUB = "push.hub", "The hub cannot be reached, is too busy or full, or answers with an error."
