"""The sections of a run: frozen, complete, and strict about unknown keys and types.

Fields that belong to an upstream object carry upstream's name and are handed over by `model_dump`, so a field that
is added here reaches its object without being copied by hand.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loratune.config.expressions import BadExpressionError, brief, compiled
from loratune.system.files import path_problem

Count = Annotated[int, Field(gt=0, lt=2**31)]
"""How many of something, or how large: beyond this, torch and its optimizers lose numbers in silence, or fail."""


def _usable(path: str) -> str:
    if reason := path_problem(path):
        raise ValueError(reason)
    return path


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_usable)]
"""A path, or what else stands in its place: a glob, a hub id."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no coercion between types, no NaN or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Contradiction(ValueError):
    """Two keys that cannot both hold; `keys` are relative to the section that is being validated."""

    def __init__(self, message: str, *keys: str):
        super().__init__(message)
        self.keys = keys


class ModelSection(Section):
    """Which base model, in which numbers it is held, and by what it is computed."""

    name_or_path: FilePath = Field(description="a local directory or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    gguf_file: FilePath | None = Field(None, description="a GGUF file within name_or_path, held unpacked")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the machine computes in it, else float32"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field("none", description="bitsandbytes; 4bit is nf4")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="null: what transformers chooses")
    )
    device_map: Literal["auto"] | None = Field(
        None, description="auto: layers over all GPUs of one process; null: each process on its GPU"
    )
    trust_remote_code: bool = Field(False, description="run code from the model's repository; needs revision")
    torch_compile: bool = Field(False, description="compile each layer for training; on a GPU")
    use_liger_kernel: bool = Field(False, description="train with Liger's norms, rotations and activations; on a GPU")

    @model_validator(mode="after")
    def _pinned_remote_code(self) -> Self:
        if self.trust_remote_code and self.revision is None:
            raise Contradiction(
                "code from a repository is only run at a pinned revision", "trust_remote_code", "revision"
            )
        return self

    @model_validator(mode="after")
    def _one_form_of_weights(self) -> Self:
        if self.gguf_file is not None and self.quantization != "none":
            message = "a GGUF file is unpacked to dtype, and cannot be quantized again while it is loaded"
            raise Contradiction(message, "gguf_file", "quantization")
        return self


class LoraSection(Section):
    """What is trained: the fields of `peft.LoraConfig`, under its names."""

    r: Count = Field(8, description="rank of the update")
    lora_alpha: Count = Field(16, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: list[str] | str = Field(
        ["q", "k", "v", "o"],
        min_length=1,
        description="roles q, k, v, o; exact names; a regular expression; all-linear",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained as well")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r), arXiv:2312.03732")
    use_dora: bool = Field(False, description="weight-decomposed LoRA, arXiv:2402.09353")
    init_lora_weights: (
        bool | Literal["gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "loftq"]
    ) = Field(
        True, description="how A and B start: true (Kaiming, zero), or by the base (pissa, olora, loftq) or data (eva)"
    )
    use_lorafa: bool = Field(
        False, description="A stays as it starts, and B's gradient allows for it, arXiv:2308.03303"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, le=1e6, description="LoRA+: B learns this many times as fast as A, arXiv:2402.12354"
    )
    layers_to_transform: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="numbers of the layers to adapt, from 0"
    )
    rank_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own r, e.g. {q: 16}")
    alpha_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own lora_alpha")
    modules_to_save: list[str] | None = Field(
        None, min_length=1, description="modules that are trained and saved whole, e.g. [lm_head]"
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="ids of the tokens whose embeddings are trained"
    )

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        patterns = {"rank_pattern": list(self.rank_pattern), "alpha_pattern": list(self.alpha_pattern)}
        if isinstance(self.target_modules, str):
            patterns["target_modules"] = [self.target_modules]
        for key, texts in patterns.items():
            for text in texts:
                try:
                    compiled(text)
                except BadExpressionError as error:
                    raise Contradiction(f"`{brief(text)}` {error}", key) from None
        return self

    @model_validator(mode="after")
    def _zero_start(self) -> Self:
        if self.init_lora_weights is False:
            raise Contradiction("false starts from a random update, which is for PEFT's own tests", "init_lora_weights")
        return self

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise Contradiction("orthogonal starts from two halves, so the rank is even", "init_lora_weights", "r")
        return self

    @model_validator(mode="after")
    def _variants_agree(self) -> Self:
        if self.use_lorafa and self.loraplus_lr_ratio is not None:
            message = "LoRA+ makes B learn faster than A, and LoRA-FA leaves A as it is"
            raise Contradiction(message, "use_lorafa", "loraplus_lr_ratio")
        if str(self.init_lora_weights).startswith(("pissa", "olora")) and self.use_dora:
            message = f"{self.init_lora_weights} takes a part of the base out, and DoRA would measure what is left"
            raise Contradiction(message, "init_lora_weights", "use_dora")
        if self.use_lorafa and self.use_dora:
            message = "PEFT's LoRA-FA pairs each A with its B, and loses count where DoRA has a third tensor"
            raise Contradiction(message, "use_lorafa", "use_dora")
        if self.init_lora_weights == "eva" and self.rank_pattern:
            message = "eva shares directions between layers that read the same input, so they have one rank"
            raise Contradiction(message, "init_lora_weights", "rank_pattern")
        return self


class Source(Section):
    """One place that rows come from."""

    path: FilePath = Field(description="a file, a directory, a glob, or a hub id")
    split: str | None = Field(None, description="a split or a slice of one, e.g. train[:2000]")
    weight: float | None = Field(
        None, gt=0, le=1e6, description="its share of the rows, relative to the other sources; null: all its rows"
    )


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    return [_as_source(one) for one in value] if isinstance(value, list) else _as_source(value)


Sources = Source | Annotated[list[Source], Field(min_length=1)]
"""One source, or several."""

COLUMNS = (
    "input_ids", "labels", "prompt", "completion", "messages", "tools", "conversations", "system",
    "instruction", "input", "output", "history", "text",
)  # fmt: skip
"""Our names of the fields of a row; `data.columns` maps them to the data's."""


class DataSection(Section):
    """Which rows, and what of them is learnt."""

    train: Annotated[Sources, BeforeValidator(_as_sources)] = Field(
        description="a path, a glob, a hub id, {path, split, weight}, or a list of these"
    )
    validation: Annotated[Sources | float | None, BeforeValidator(_as_sources)] = Field(
        None, description="sources like train, or the fraction of train that is held out"
    )
    format: Literal["auto", "input_ids", "prompt_completion", "messages", "conversations", "alpaca", "text"] = Field(
        "auto", description="auto: recognised by the keys of the rows, file by file"
    )
    columns: dict[str, str] = Field(
        {},
        description="our name → the data's name, e.g. {prompt: question}, for all files; it hides a field of our name",
    )
    chat_template: FilePath | None = Field(None, description="a Jinja file that replaces the tokenizer's chat template")
    loss_on: Literal["completion", "assistant", "all"] = Field(
        "completion",
        description="completion: completions, and every assistant turn of messages; assistant: every assistant turn, "
        "those of a prompt too; all: every token up to the end of the last answer",
    )
    max_length: int = Field(1024, ge=2, lt=2**31, description="tokens of a row, its end-of-sequence token included")
    truncation: Literal["keep_completion", "drop", "error"] = Field(
        "keep_completion",
        description="for rows over max_length: shorten the prompt from its left, drop the row, or stop",
    )
    max_dropped: float = Field(0.1, ge=0, le=1, description="the share of rows that may be dropped before it stops")
    packing: Literal["none", "batch", "full"] = Field(
        "batch", description="batch: a batch without padding; full: batches filled up with whole rows by best fit"
    )

    @property
    def train_sources(self) -> list[Source]:
        """The sources of training, one or several."""
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def validation_sources(self) -> list[Source]:
        """The sources of validation; none where a fraction of training is held out, or nothing."""
        if isinstance(self.validation, Source):
            return [self.validation]
        return self.validation if isinstance(self.validation, list) else []

    @model_validator(mode="after")
    def _known_columns(self) -> Self:
        if unknown := [name for name in self.columns if name not in COLUMNS]:
            raise Contradiction(f"`{unknown[0]}` is none of our names, which are {', '.join(COLUMNS)}", "columns")
        theirs = list(self.columns.values())
        if twice := [name for name in theirs if theirs.count(name) > 1]:
            raise Contradiction(f"`{twice[0]}` cannot be two of our fields at once", "columns")
        return self

    @model_validator(mode="after")
    def _weights(self) -> Self:
        for key, sources in (("train", self.train_sources), ("validation", self.validation_sources)):
            given = [source for source in sources if source.weight is not None]
            if given and len(given) < len(sources):
                raise Contradiction("some sources have a weight and some have none; give one to each, or to none", key)
            if given and len(sources) == 1:
                raise Contradiction("one source alone has no weight; take it out", key)
        return self

    @model_validator(mode="after")
    def _fraction(self) -> Self:
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise Contradiction("a fraction lies between 0 and 1", "validation")
        return self

    @model_validator(mode="after")
    def _templates_render_chats(self) -> Self:
        if self.format in ("text", "input_ids") and self.chat_template is not None:
            raise Contradiction(f"{self.format} goes through no template", "format", "chat_template")
        if self.format in ("text", "input_ids") and self.loss_on == "assistant":
            raise Contradiction(f"{self.format} has no assistant turns", "format", "loss_on")
        return self


class TrainingSection(Section):
    """How it is trained: fields of `transformers.TrainingArguments`, under its names."""

    learning_rate: float = Field(2e-4, gt=0, le=1e30, description="peak learning rate")
    num_train_epochs: float = Field(1.0, gt=0, le=1e9, description="passes over the data")
    max_steps: int = Field(-1, ge=-1, lt=2**31, description="optimizer steps; -1: as num_train_epochs says")
    per_device_train_batch_size: Count = Field(8, description="rows per device and micro-step")
    gradient_accumulation_steps: Count = Field(1, description="micro-steps per optimizer step")
    warmup_steps: float = Field(0.0, ge=0, lt=2**31, description="steps, or a fraction of all steps if below 1")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="how the learning rate falls"
    )
    weight_decay: float = Field(0.0, ge=0, le=1e30, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, le=1e30, description="gradients are clipped to this norm; 0: not at all")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        Field("adamw_torch", description="optimizer")
    )
    seed: int = Field(42, ge=0, lt=2**32, description="of the adapter's start, the order of rows, and dropout")
    logging_steps: Count = Field(10, description="steps between two reports of the loss")
    save_steps: Count = Field(200, description="steps between two checkpoints")
    eval_steps: Count | None = Field(None, description="steps between two evaluations; one always ends the run")
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.max_steps == 0:
            raise Contradiction("0 steps train nothing; -1 leaves the length to num_train_epochs", "max_steps")
        if self.max_steps > 0 and {"max_steps", "num_train_epochs"} <= self.model_fields_set:
            raise Contradiction(
                "both set the length of the run; keep one (`--set training.num_train_epochs=` takes one out)",
                "max_steps",
                "num_train_epochs",
            )
        return self

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_steps > 1 and not self.warmup_steps.is_integer():
            raise Contradiction("above 1 it counts steps, so it must be whole", "warmup_steps")
        if self.warmup_steps > self.max_steps > 0:
            raise Contradiction("the learning rate would never reach its peak", "warmup_steps", "max_steps")
        if self.warmup_steps > 0 and self.lr_scheduler_type == "constant":
            message = "constant has no warmup; take constant_with_warmup"
            raise Contradiction(message, "lr_scheduler_type", "warmup_steps")
        return self


class RunConfig(Section):
    """A whole run, as `loratune train` reads it."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    output_dir: FilePath = Field(description="where the adapter goes")

    @model_validator(mode="after")
    def _evaluations_need_rows(self) -> Self:
        if self.training.eval_steps is not None and self.data.validation is None:
            raise Contradiction("there are no rows to evaluate on", "training.eval_steps", "data.validation")
        return self

    @model_validator(mode="after")
    def _start_fits_the_base(self) -> Self:
        start, held = self.lora.init_lora_weights, self.model.quantization
        keys = ("lora.init_lora_weights", "model.quantization")
        if held != "none" and str(start).startswith(("pissa", "olora", "orthogonal")):
            raise Contradiction(f"{start} starts from the base's weights in full, and {held} does not hold them", *keys)
        if start == "loftq" and held != "4bit":
            raise Contradiction("loftq starts from what 4bit quantization loses, so it needs 4bit", *keys)
        return self

    @model_validator(mode="after")
    def _lorafa_is_an_optimizer(self) -> Self:
        if self.lora.use_lorafa and self.training.optim != "adamw_torch":
            message = "LoRA-FA has an AdamW of its own; leave optim at adamw_torch"
            raise Contradiction(message, "lora.use_lorafa", "training.optim")
        return self

    def resolved(self) -> dict[str, Any]:
        """Every setting of the run as plain values; reading them back gives this config again."""
        values = self.model_dump()
        if self.training.max_steps > 0:
            del values["training"]["num_train_epochs"]
        return values
