"""The sections of a run: frozen, complete, and strict about unknown keys and types.

Fields that belong to an upstream object carry upstream's name and are handed over by `model_dump`, so a field that
is added here reaches its object without being copied by hand.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loratune.codes import Code
from loratune.config.patterns import BadPatternError, compile_pattern, shorten
from loratune.system.files import path_problem

Count = Annotated[int, Field(gt=0, lt=2**31)]
"""How many of something, or how large: beyond this, torch and its optimizers lose numbers in silence, or fail."""


class InvalidSettingError(ValueError):
    """A value that a check of ours refuses, or several that cannot hold together.

    Attributes:
        code: What kind of problem it is.
        keys: Relative to the section that is being validated; none for the key itself.
        fix: What to do about it.
    """

    def __init__(self, code: Code, message: str, *keys: str, fix: str = ""):
        super().__init__(message)
        self.code, self.keys, self.fix = code, keys, fix


def _check_path(path: str) -> str:
    if reason := path_problem(path):
        raise InvalidSettingError(Code.CONFIG_NOT_A_PATH, reason)
    return path


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
"""A path, or a glob or hub id in the place of one."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no coercion between types, no NaN or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(Section):
    """Which base model, in which dtype or quantization it is held, and what computes it."""

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
    use_liger_kernel: bool = Field(
        False, description="train with Liger's norms, rotary embeddings, activations; on a GPU"
    )

    @model_validator(mode="after")
    def _pinned_remote_code(self) -> Self:
        if self.trust_remote_code and self.revision is None:
            message, fix = "code from a repository only runs at a pinned revision", "set model.revision to a commit"
            raise InvalidSettingError(Code.CONFIG_UNPINNED_CODE, message, "trust_remote_code", "revision", fix=fix)
        return self

    @model_validator(mode="after")
    def _one_form_of_weights(self) -> Self:
        if self.gguf_file is not None and self.quantization != "none":
            message = "a GGUF file is unpacked to dtype, and cannot be quantized again while it is loaded"
            fix = "leave quantization at none"
            raise InvalidSettingError(Code.CONFIG_GGUF_QUANTIZED, message, "gguf_file", "quantization", fix=fix)
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
        True,
        description="start of A and B; true: Kaiming and zero; pissa, olora, loftq: from the base; eva: from the data",
    )
    use_lorafa: bool = Field(
        False, description="LoRA-FA: only B is trained, with a corrected gradient, arXiv:2308.03303"
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
    start_from: FilePath | None = Field(None, description="an adapter directory to train further from")

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        patterns = {"rank_pattern": list(self.rank_pattern), "alpha_pattern": list(self.alpha_pattern)}
        if isinstance(self.target_modules, str):
            patterns["target_modules"] = [self.target_modules]
        for key, texts in patterns.items():
            for text in texts:
                try:
                    compile_pattern(text)
                except BadPatternError as error:
                    message = f"`{shorten(text)}` {error}"
                    raise InvalidSettingError(Code.CONFIG_BAD_PATTERN, message, key) from None
        return self

    @model_validator(mode="after")
    def _update_starts_at_zero(self) -> Self:
        if self.init_lora_weights is False:
            message = "false starts from a random update, which is meant for PEFT's own tests"
            raise InvalidSettingError(Code.CONFIG_RANDOM_INIT, message, "init_lora_weights", fix="leave it out")
        return self

    @model_validator(mode="after")
    def _rank_is_even(self) -> Self:
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            message = "orthogonal initialization splits the rank into two halves, so the rank must be even"
            raise InvalidSettingError(Code.CONFIG_ODD_RANK, message, "init_lora_weights", "r")
        return self

    @model_validator(mode="after")
    def _variants_agree(self) -> Self:
        init = str(self.init_lora_weights)
        twice = self.start_from is not None and self.init_lora_weights is not True
        conflicts = [
            (
                self.use_lorafa and self.loraplus_lr_ratio is not None,
                ("use_lorafa", "loraplus_lr_ratio"),
                "LoRA+ makes B learn faster than A, but LoRA-FA does not train A",
            ),
            (
                init.startswith(("pissa", "olora")) and self.use_dora,
                ("init_lora_weights", "use_dora"),
                f"{init} takes a part out of the base, and DoRA would measure the rest",
            ),
            (
                self.use_lorafa and self.use_dora,
                ("use_lorafa", "use_dora"),
                "PEFT's LoRA-FA pairs each A with its B, and miscounts where DoRA has a third tensor",
            ),
            (
                init == "eva" and bool(self.rank_pattern),
                ("init_lora_weights", "rank_pattern"),
                "eva shares directions between layers that read the same input, so they must have one rank",
            ),
            (twice, ("start_from", "init_lora_weights"), "the values of the adapter it starts from are its start"),
        ]
        for conflict, keys, message in conflicts:
            if conflict:
                raise InvalidSettingError(Code.CONFIG_LORA_VARIANTS, message, *keys, fix="choose one of the two")
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
    return [_as_source(source) for source in value] if isinstance(value, list) else _as_source(value)


Sources = Source | Annotated[list[Source], Field(min_length=1)]
"""One source, or several."""

COLUMNS = (
    "input_ids", "labels", "prompt", "completion", "messages", "tools", "conversations", "system",
    "instruction", "input", "output", "history", "text",
)  # fmt: skip
"""The names of the fields of a row; `data.columns` maps them to those in the data."""


class DataSection(Section):
    """Which rows, and which of their tokens are supervised."""

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
        description="field of a row → its name in the data, e.g. {prompt: question}; hides a field of that name",
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
        description="for rows over max_length: shorten the prompt from its left, drop the row, or refuse the run",
    )
    max_dropped: float = Field(
        0.1, ge=0, le=1, description="share of rows that may be dropped before the run is refused"
    )
    packing: Literal["none", "batch", "full"] = Field(
        "batch", description="batch: a batch without padding; full: batches filled up with whole rows by best fit"
    )
    replay: float | None = Field(
        None, gt=0, lt=1, description="share of the training rows that is drawn from those of lora.start_from"
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
            message = f"`{unknown[0]}` is not a field of a row; the fields are {', '.join(COLUMNS)}"
            raise InvalidSettingError(Code.CONFIG_UNKNOWN_COLUMN, message, "columns")
        names = list(self.columns.values())
        if repeated := [name for name in names if names.count(name) > 1]:
            message = f"the data's `{repeated[0]}` is given for two fields of a row"
            raise InvalidSettingError(Code.CONFIG_COLUMN_TWICE, message, "columns", fix="give each field its own")
        return self

    @model_validator(mode="after")
    def _weights(self) -> Self:
        for key, sources in (("train", self.train_sources), ("validation", self.validation_sources)):
            weighted = sum(source.weight is not None for source in sources)
            if 0 < weighted < len(sources):
                message, fix = "some sources have a weight and some have none", "give one to each, or to none"
                raise InvalidSettingError(Code.CONFIG_SOURCE_WEIGHTS, message, key, fix=fix)
            if weighted == len(sources) == 1:
                message = "a single source takes no weight"
                raise InvalidSettingError(Code.CONFIG_SOURCE_WEIGHTS, message, key, fix="leave the weight out")
        return self

    @model_validator(mode="after")
    def _validation_is_a_fraction(self) -> Self:
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise InvalidSettingError(Code.CONFIG_NOT_A_FRACTION, "a fraction must lie between 0 and 1", "validation")
        return self

    @model_validator(mode="after")
    def _templates_render_chats(self) -> Self:
        if self.format in ("text", "input_ids") and self.chat_template is not None:
            message = f"{self.format} rows do not go through a chat template"
            raise InvalidSettingError(Code.CONFIG_FORMAT_WITHOUT_CHAT, message, "format", "chat_template")
        if self.format in ("text", "input_ids") and self.loss_on == "assistant":
            message = f"{self.format} rows have no assistant turns"
            raise InvalidSettingError(Code.CONFIG_FORMAT_WITHOUT_CHAT, message, "format", "loss_on")
        return self


class TrainingSection(Section):
    """How it is trained: fields of `transformers.TrainingArguments`, under its names."""

    learning_rate: float = Field(2e-4, gt=0, le=1e30, description="peak learning rate")
    num_train_epochs: float = Field(1.0, gt=0, le=1e9, description="passes over the data")
    max_steps: int = Field(-1, ge=-1, lt=2**31, description="optimizer steps; -1: num_train_epochs sets the length")
    per_device_train_batch_size: Count = Field(8, description="rows per device and micro-step")
    gradient_accumulation_steps: Count = Field(1, description="micro-steps per optimizer step")
    warmup_steps: float = Field(0.0, ge=0, lt=2**31, description="steps, or a fraction of all steps if below 1")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="schedule of the learning rate"
    )
    weight_decay: float = Field(0.0, ge=0, le=1e30, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, le=1e30, description="gradients are clipped to this norm; 0: not at all")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        Field("adamw_torch", description="optimizer")
    )
    seed: int = Field(42, ge=0, lt=2**32, description="for the adapter's initial values, the order of rows, dropout")
    logging_steps: Count = Field(10, description="steps between two reports of the loss")
    save_steps: Count = Field(200, description="steps between two checkpoints")
    eval_steps: Count | None = Field(None, description="steps between two evaluations; one always ends the run")
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")

    @model_validator(mode="after")
    def _length_is_set_once(self) -> Self:
        if self.max_steps == 0:
            fix = "-1 leaves the length of the run to num_train_epochs"
            raise InvalidSettingError(Code.CONFIG_NO_STEPS, "0 steps train nothing", "max_steps", fix=fix)
        if self.max_steps > 0 and {"max_steps", "num_train_epochs"} <= self.model_fields_set:
            message = "both set the length of the run"
            fix = "keep one; to remove the other: --set training.num_train_epochs="
            raise InvalidSettingError(Code.CONFIG_LENGTH_TWICE, message, "max_steps", "num_train_epochs", fix=fix)
        return self

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_steps > 1 and not self.warmup_steps.is_integer():
            message = "above 1 it counts steps, so it must be a whole number"
            raise InvalidSettingError(Code.CONFIG_WARMUP_NOT_WHOLE, message, "warmup_steps")
        if self.warmup_steps > self.max_steps > 0:
            message = "the run is shorter than its warmup, so the learning rate would never reach its peak"
            raise InvalidSettingError(Code.CONFIG_WARMUP_TOO_LONG, message, "warmup_steps", "max_steps")
        if self.warmup_steps > 0 and self.lr_scheduler_type == "constant":
            message, fix = "the constant schedule has no warmup", "use constant_with_warmup"
            keys = ("lr_scheduler_type", "warmup_steps")
            raise InvalidSettingError(Code.CONFIG_CONSTANT_WARMUP, message, *keys, fix=fix)
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
            message, fix = "there are no rows to evaluate on", "set data.validation, or leave out eval_steps"
            keys = ("training.eval_steps", "data.validation")
            raise InvalidSettingError(Code.CONFIG_NO_EVALUATION_ROWS, message, *keys, fix=fix)
        return self

    @model_validator(mode="after")
    def _replayed_rows_need_a_run(self) -> Self:
        if self.data.replay is not None and self.lora.start_from is None:
            message, keys = "there is no earlier run to take rows from", ("data.replay", "lora.start_from")
            raise InvalidSettingError(Code.CONFIG_REPLAY, message, *keys, fix="set lora.start_from")
        return self

    @model_validator(mode="after")
    def _init_fits_the_base(self) -> Self:
        init, quantization = self.lora.init_lora_weights, self.model.quantization
        code, keys = Code.CONFIG_INIT_QUANTIZATION, ("lora.init_lora_weights", "model.quantization")
        if quantization != "none" and str(init).startswith(("pissa", "olora", "orthogonal")):
            message = f"{init} starts from the base's weights in full precision, which {quantization} does not hold"
            raise InvalidSettingError(code, message, *keys)
        if init == "loftq" and quantization != "4bit":
            raise InvalidSettingError(code, "loftq starts from what 4bit quantization loses, so it needs 4bit", *keys)
        return self

    @model_validator(mode="after")
    def _lorafa_is_an_optimizer(self) -> Self:
        if self.lora.use_lorafa and self.training.optim != "adamw_torch":
            message, keys = "LoRA-FA has an AdamW of its own", ("lora.use_lorafa", "training.optim")
            raise InvalidSettingError(Code.CONFIG_LORAFA_OPTIMIZER, message, *keys, fix="leave optim at adamw_torch")
        return self

    def resolved(self) -> dict[str, Any]:
        """Every setting of the run as plain values; reading them back gives this config again."""
        values = self.model_dump()
        if self.training.max_steps > 0:
            del values["training"]["num_train_epochs"]
        return values
