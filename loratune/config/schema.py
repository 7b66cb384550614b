"""The config of a run, `RunConfig`, with the sections `model`, `training` and `preferences`.

The sections `lora` and `data` are in the module `sections`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from loratune.config.sections import (
    AUTO,
    WEIGHT,
    Auto,
    Count,
    DataSection,
    FileName,
    FilePath,
    InvalidSettingError,
    LoraSection,
    Section,
)

Objective = Literal["sft", "dpo", "orpo", "simpo", "kto"]
"""The training objectives; see `compare.objectives` for the formulas and papers."""

DEFAULT_BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
"""Objective → its default beta: the value of DPO's experiments (arXiv:2305.18290), ORPO's lambda for Mistral
(arXiv:2403.07691), the lower end of the range recommended for SimPO, 2.0 to 2.5 (arXiv:2405.14734), and the value of
KTO's experiments (arXiv:2402.01306)."""

PREFERENCE_KEYS = {
    "beta": ("dpo", "orpo", "simpo", "kto"),
    "label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "sft_weight": ("dpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Key of the section `preferences` → the objectives that use it."""


class ModelSection(Section):
    """The base model, its dtype and quantization, and the implementation of its layers."""

    name_or_path: FilePath = Field(description="a local directory or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    gguf_file: FileName | None = Field(None, description="a GGUF file in name_or_path; it is dequantized to dtype")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 if the hardware supports it natively, else float32"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field("none", description="by bitsandbytes; 4bit is nf4")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="attention implementation; null: chosen by transformers")
    )
    device_map: Literal["auto"] | None = Field(
        None, description="auto: one process spreads the layers over all GPUs; null: one GPU per process"
    )
    trust_remote_code: bool = Field(False, description="run code from the model's repository; needs revision")
    torch_compile: bool = Field(False, description="compile each layer with torch.compile, for training on a GPU")
    use_liger_kernel: bool | Auto = Field(
        AUTO,
        description="Liger's norms, rotary embeddings and activations, on a GPU, by `pip install liger-kernel`; auto: "
        "if they are installed, and the check before training finds that the model computes the same with them",
    )

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        if self.trust_remote_code and self.revision is None:
            message, fix = "code from a repository only runs at a pinned revision", "set model.revision to a commit"
            yield InvalidSettingError(message, "trust_remote_code", "revision", fix=fix)
        if self.gguf_file is not None and self.quantization != "none":
            message = "a GGUF file is unpacked to dtype, and cannot be quantized again while it is loaded"
            yield InvalidSettingError(message, "gguf_file", "quantization", fix="leave quantization at none")


_STEPS = {"type": "integer", "minimum": 1, "exclusiveMaximum": 2**31}
Steps = Annotated[int, Field(ge=-1, lt=2**31), WithJsonSchema({"anyOf": [{"type": "integer", "const": -1}, _STEPS]})]
"""Optimizer steps of a run, or -1; `TrainingSection` rejects 0."""
Warmup = Annotated[
    float,
    Field(ge=0, lt=2**31),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, _STEPS]}),
]
"""A fraction of all steps, or a number of steps; `TrainingSection` checks that the number is whole."""


class TrainingSection(Section):
    """The objective, and fields of `transformers.TrainingArguments` under the same names."""

    objective: Objective = Field(
        "sft", description="sft: supervised fine-tuning; dpo, orpo, simpo: preference pairs; kto: unpaired preferences"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] | Auto = Field(
        AUTO,
        description="peak learning rate; auto: from the model's size, lora_alpha, rows per step, passes and targets, "
        "and lower where training continues from an adapter",
    )
    num_train_epochs: Annotated[float, Field(gt=0, le=1e9)] | Auto = Field(
        AUTO, description="passes over the data; auto: one, or two for few rows if only q, k, v, o are adapted"
    )
    max_steps: Steps = Field(-1, description="optimizer steps; -1: num_train_epochs sets the length")
    max_minutes: float | None = Field(
        None, gt=0, le=1e5, description="time limit of the whole command, which determines max_steps; null: no limit"
    )
    per_device_train_batch_size: Count = Field(8, description="rows per device and micro-step")
    gradient_accumulation_steps: Count = Field(1, description="micro-steps per optimizer step")
    warmup_steps: Warmup | Auto = Field(AUTO, description="warmup steps, or below 1 a fraction; auto: no warmup")
    lr_scheduler_type: Literal["auto", "linear", "cosine", "constant", "constant_with_warmup"] = Field(
        AUTO, description="learning rate schedule; auto: linear decay to zero"
    )
    weight_decay: float = Field(0.0, ge=0, le=1e30, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, le=1e30, description="gradients are clipped to this norm; 0: no clipping")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        Field("adamw_torch", description="optimizer")
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="random seed for the adapter's initial values, the order of rows and dropout"
    )
    logging_steps: Count = Field(10, description="steps between reports of the loss")
    save_steps: Count = Field(200, description="steps between checkpoints")
    eval_steps: Count | None = Field(
        None, description="steps between evaluations; the last step is always evaluated; null: about ten evaluations"
    )
    keep: Literal["best", "last"] | None = Field(
        None, description="the step whose weights become the adapter; null: best, or last without validation rows"
    )
    patience: Count | None = Field(
        None, description="end the run after this number of evaluations without a lower held-out loss; null: never"
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        [], description="experiment trackers, used through transformers' integrations"
    )
    ddp_timeout: int = Field(
        1800, gt=0, le=10**7, description="seconds that processes wait for each other before the run ends"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        if self.max_steps == 0:
            fix = "-1 leaves the length of the run to num_train_epochs"
            yield InvalidSettingError("0 steps train nothing", "max_steps", fix=fix)
        both = "both set the length of the run"
        if self.max_steps > 0 and self.num_train_epochs != AUTO and "num_train_epochs" in self.model_fields_set:
            fix = "keep one; to remove the other: --set training.num_train_epochs="
            yield InvalidSettingError(both, "max_steps", "num_train_epochs", fix=fix)
        if self.max_steps > 0 and self.max_minutes is not None:
            fix = "keep one; beside max_minutes, num_train_epochs is an upper limit"
            yield InvalidSettingError(both, "max_steps", "max_minutes", fix=fix)
        if self.warmup_steps == AUTO:
            return
        if self.warmup_steps > 1 and not self.warmup_steps.is_integer():
            yield InvalidSettingError("above 1 it counts steps, so it must be a whole number", "warmup_steps")
        if self.warmup_steps > self.max_steps > 0:
            message = "the run is shorter than its warmup, so the learning rate would never reach its peak"
            yield InvalidSettingError(message, "warmup_steps", "max_steps")
        if self.warmup_steps > 0 and self.lr_scheduler_type == "constant":
            message, fix = "the constant schedule has no warmup", "use constant_with_warmup"
            yield InvalidSettingError(message, "lr_scheduler_type", "warmup_steps", fix=fix)


class PreferenceSection(Section):
    """Settings of the preference objectives. The meaning of each key starts with the objectives that use it."""

    beta: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="dpo, kto: regularization towards the reference; simpo: scale of rewards; orpo: weight of the odds "
        "ratio; null: 0.1, for simpo 2",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo, simpo: the fraction of pairs assumed to be in the wrong order, as in cDPO"
    )
    simpo_gamma: float = Field(1.0, ge=0, le=1e3, description="simpo: target margin of the rewards, arXiv:2405.14734")
    sft_weight: float = Field(
        0.0, ge=0, le=1e3, description="dpo, simpo: weight of the chosen answer's own loss per token, arXiv:2404.19733"
    )
    desirable_weight: float = Field(1.0, gt=0, le=1e3, description="kto: weight of desirable answers, arXiv:2402.01306")
    undesirable_weight: float = Field(1.0, gt=0, le=1e3, description="kto: weight of undesirable answers")


class RetentionSection(Section):
    """Keeping what the base can do: the model is held to its predictions before training, on texts that it wrote."""

    kl_weight: Annotated[float, Field(ge=0, le=1e3)] | Auto = Field(
        AUTO, description="weight of the divergence from the model before training; 0: none; auto: 1 for sft, else 0"
    )
    num_samples: Annotated[int, Field(gt=0, le=10_000)] | Auto = Field(
        AUTO, description="texts that the model writes before the first step; auto: at most 48, fewer for short runs"
    )
    max_new_tokens: Count = Field(48, description="tokens of each text")
    prompts: FilePath | None = Field(
        None, description="rows whose prompts the model answers; null: it writes the questions too"
    )


class RunConfig(Section):
    """A whole run, as `loratune train` reads it."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    preferences: PreferenceSection = PreferenceSection()
    retention: RetentionSection = RetentionSection()
    output_dir: FilePath = Field(description="directory that the adapter is written to")

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        yield from self._row_conflicts()
        yield from self._objective_conflicts()
        init, quantization = self.lora.init_lora_weights, self.model.quantization
        keys = "lora.init_lora_weights", "model.quantization"
        if quantization != "none" and str(init).startswith(("pissa", "olora", "orthogonal")):
            message = f"{init} starts from the base's weights in full precision, which {quantization} does not hold"
            yield InvalidSettingError(message, *keys)
        if init == "loftq" and quantization != "4bit":
            yield InvalidSettingError("loftq starts from what 4bit quantization loses, so it needs 4bit", *keys)
        if self.lora.use_lorafa and self.training.optim != "adamw_torch":
            keys, fix = ("lora.use_lorafa", "training.optim"), "leave optim at adamw_torch"
            yield InvalidSettingError("LoRA-FA has an AdamW of its own", *keys, fix=fix)

    def _row_conflicts(self) -> Iterator[InvalidSettingError]:
        training = self.training
        wanted = {"eval_steps": training.eval_steps, "patience": training.patience, "keep": training.keep == "best"}
        keys = [key for key, value in wanted.items() if value]
        if keys and self.data.validation is None:
            fix = f"set data.validation, or leave out {' and '.join(keys)}"
            names = (*(f"training.{key}" for key in keys), "data.validation")
            yield InvalidSettingError("there are no rows to evaluate on", *names, fix=fix)
        if self.data.replay is not None and self.lora.start_from is None:
            message, names = "there is no earlier run to take rows from", ("data.replay", "lora.start_from")
            yield InvalidSettingError(message, *names, fix="set lora.start_from")
        if self.data.share_prefixes is True and self.lora.lora_dropout > 0:
            message = "dropout draws a mask for each token of each row, and a prefix that rows share would have one"
            fix = "set lora_dropout to 0, or share_prefixes to auto"
            yield InvalidSettingError(message, "data.share_prefixes", "lora.lora_dropout", fix=fix)

    def _objective_conflicts(self) -> Iterator[InvalidSettingError]:
        objective = self.training.objective
        for key in self.preferences.model_dump(exclude_defaults=True):
            if objective not in PREFERENCE_KEYS[key]:
                message = f"{objective} does not read it, but only {', '.join(PREFERENCE_KEYS[key])}"
                fix = "leave it out, or set training.objective"
                yield InvalidSettingError(message, f"preferences.{key}", "training.objective", fix=fix)
        if objective != "sft" and self.data.loss_on != "completion":
            message = f"{objective} compares answers to a prompt, so it takes the loss over these alone"
            fix = "leave loss_on at completion"
            yield InvalidSettingError(message, "data.loss_on", "training.objective", fix=fix)
        if objective != "sft" and (self.data.prompt_loss_weight or WEIGHT in self.data.columns):
            key = "data.prompt_loss_weight" if self.data.prompt_loss_weight else "data.columns"
            message = f"the tokens of a row are weighted for sft, and not for {objective}"
            yield InvalidSettingError(message, key, "training.objective", fix="leave the weight out")
        if objective != "sft" and self.data.replay is not None:
            message = f"rows of an earlier run are replayed with the loss of sft, and not with {objective}"
            held = "; preferences.sft_weight keeps chosen answers probable"
            fix = f"leave replay out{held if objective in PREFERENCE_KEYS['sft_weight'] else ''}"
            yield InvalidSettingError(message, "data.replay", "training.objective", fix=fix)

    @property
    def has_retention(self) -> bool:
        """Whether steps compare texts with the base, as far as the config says."""
        weight = self.retention.kl_weight
        return self.training.objective == "sft" if weight == AUTO else weight != 0

    def without_effect(self) -> dict[str, str]:
        """Key that is set, and that the run does not read → the reason, as the end of a sentence. `num_samples` is left
        out, as run.yaml has it in any case."""
        if self.has_retention:
            return {}
        is_auto = self.retention.kl_weight == AUTO
        why = "as retention.kl_weight is 0" + (f", which auto is for {self.training.objective}" if is_auto else "")
        unread = self.retention.model_dump(exclude_defaults=True, exclude={"kl_weight", "num_samples"})
        return {f"retention.{key}": why for key in unread}

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter gets the weights of the step with the lowest held-out loss, instead of the last step."""
        return self.data.validation is not None and self.training.keep != "last"

    def resolved(self) -> dict[str, Any]:
        """Every setting of the run as plain values, from which an equal config can be read."""
        values = self.model_dump()
        if self.training.max_steps > 0:
            del values["training"]["num_train_epochs"], values["training"]["max_minutes"]
        return values
