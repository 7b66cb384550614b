"""The base class of all sections of a config, and the sections `data` and `lora`.

Sections are frozen, complete, and strict about unknown keys and types. Fields of upstream objects have upstream's names
and are passed on by `model_dump`, so new fields reach the object automatically.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from loratune.codes import Code
from loratune.config.expressions import BadPatternError, compile_pattern
from loratune.config.template_arguments import TemplateArguments
from loratune.system.files import path_problem

PATH_FORMAT = "path"
"""The JSON schema format of strings that name a local file or directory."""
AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]
"""A value that the run chooses, see `training.auto`."""
_Value = TypeVar("_Value")


def decided(value: _Value | Auto) -> _Value:
    """A setting that allows `auto`, after `training.auto` has set it. Raises AssertionError: it is still `auto`."""
    assert value != AUTO, "a setting is still `auto`"
    return value


Count = Annotated[int, Field(gt=0, lt=2**31)]
"""A positive count or size. From 2³¹ on, torch and its optimizers silently lose precision, or fail."""


class InvalidSettingError(ValueError):
    """A value rejected by a check of loratune, or several values that contradict each other.

    Attributes:
        keys: The keys, relative to the section being validated; empty for the key being validated.
        fix: What to do about it.
        code: What kind of problem it is.
    """

    def __init__(self, message: str, *keys: str, fix: str = ""):
        super().__init__(message)
        self.keys, self.fix = keys, fix
        self.code = Code.CONFIG_CONFLICT if len(keys) > 1 else Code.CONFIG_BAD_VALUE


def _check_path(path: str) -> str:
    if reason := path_problem(path):
        raise InvalidSettingError(reason)
    return path


FileName = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
"""The name of a file in a directory given by another key."""
FilePath = Annotated[FileName, WithJsonSchema({"type": "string", "minLength": 1, "format": PATH_FORMAT})]
"""A path, or a glob or hub id instead. `path_keys` finds the keys of this type."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no coercion between types, no NaN or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for conflict in self._conflicts():
            raise conflict
        return self

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        """Conflicts between the values; the first is reported."""
        yield from ()


class Source(Section):
    """One source of rows."""

    path: FilePath = Field(description="a file, a directory, a glob, or a hub id")
    split: str | None = Field(None, description="a split or a slice of one, e.g. train[:2000]")
    weight: float | None = Field(
        None, gt=0, le=1e6, description="share of the rows, relative to the other sources; null: all rows of the source"
    )


def _as_sources(value: Any) -> Any:
    """Sources, with paths given as strings converted to mappings."""
    if isinstance(value, list):
        return [_as_sources(source) for source in value]
    return {"path": value} if isinstance(value, str) else value


def _listed(sources: Source | list[Source] | float | None) -> list[Source]:
    return [sources] if isinstance(sources, Source) else sources if isinstance(sources, list) else []


Sources = Source | Annotated[list[Source], Field(min_length=1)]
"""One or several sources."""

Fraction = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})]
"""A fraction of the rows; `DataSection` checks its range, after pydantic has distinguished it from sources."""

COLUMNS = (
    "input_ids", "labels", "prompt", "completion", "messages", "tools", "conversations", "system",
    "instruction", "input", "output", "history", "text", "chosen", "rejected", "label",
    "chat_template_kwargs", "weight"
)  # fmt: skip
"""The names of the fields of a row; `data.columns` maps them to column names in the data. `weight` is read only if it
is mapped."""
WEIGHT, MOST_WEIGHT = COLUMNS[-1], 1_000_000
"""The field with the factor of a row in the loss, and the largest factor."""


def _check_label(label: str) -> str:
    if not label.strip():
        raise ValueError("must not be empty")
    return label


Label = Annotated[str, AfterValidator(_check_label)]
UNLABELLED = ("text", "input_ids", "preference", "unpaired_preference")
"""Formats whose rows have no answer that `data.labels` could replace."""


class DataSection(Section):
    """Which rows, and which of their tokens are supervised."""

    train: Annotated[Sources, BeforeValidator(_as_sources)] = Field(
        description="a path, a glob, a hub id, {path, split, weight}, or a list of these"
    )
    validation: Annotated[Sources | Fraction | None, BeforeValidator(_as_sources)] = Field(
        None, description="sources as in train, or the fraction of the training rows that is held out"
    )
    test: Annotated[Sources | None, BeforeValidator(_as_sources)] = Field(
        None, description="sources as in train; the adapter is scored on them once, after training"
    )
    group_by: str | None = Field(
        None, min_length=1, description="rows equal in this field stay in one split when a fraction is held out"
    )
    max_train_samples: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="how many of the training rows are used, each label in its share; fewer rows are a part of more",
    )
    sample_by: Literal["auto", "line", "paragraph", "document"] = Field(
        AUTO, description="what is a row of a text file; auto: a line of .txt, otherwise the document"
    )
    format: Literal[
        "auto", "input_ids", "prompt_completion", "messages", "conversations", "alpaca", "text", "preference",
        "unpaired_preference"
    ] = Field("auto", description="auto: recognized for each file by the keys of its rows")  # fmt: skip
    columns: dict[str, str] = Field(
        {},
        json_schema_extra={"propertyNames": {"enum": list(COLUMNS)}},
        description="field → its name in the data, e.g. {prompt: question}; then a field `prompt` is ignored",
    )
    labels: dict[Label, Label] = Field(
        {},
        description="last answer of a row, with or without the white space around it → what is learned instead, e.g. "
        "{biling: billing}",
    )
    chat_template: FilePath | None = Field(None, description="a Jinja file that replaces the tokenizer's chat template")
    chat_template_kwargs: TemplateArguments = Field(
        {}, description="arguments of the chat template, e.g. {enable_thinking: false}; a row's field of this name adds"
    )
    reasoning: Literal["train", "mask", "drop"] = Field(
        "train",
        description="reasoning of answers: train: supervised, each answer after its own; mask: not supervised; drop: "
        "removed",
    )
    empty_reasoning: Literal["auto", "supervised", "context"] = Field(
        AUTO,
        description="the empty block of reasoning in answers without any: supervised; or context, which prompts have "
        "by default; auto: context if no row reasons",
    )
    loss_on: Literal["completion", "assistant", "all"] = Field(
        "completion",
        description="completion: completions, or all assistant turns of messages; assistant: also assistant turns in "
        "the prompt; all: every token up to the end of the last answer",
    )
    prompt_loss_weight: float = Field(
        0.0, ge=0, le=1, description="weight in the loss of the tokens that loss_on leaves out, arXiv:2401.13586"
    )
    max_length: int = Field(1024, ge=2, lt=2**31, description="maximum tokens of a row, with the end-of-sequence token")
    truncation: Literal["auto", "keep_completion", "split", "drop", "error"] = Field(
        AUTO,
        description="rows over max_length: truncate the prompt from the left, split into blocks, drop, or stop the "
        "run; auto: split for text, keep_completion for other formats",
    )
    stride: int = Field(
        0, ge=0, lt=2**31 - 1, description="tokens that a block repeats from the block before, as context without loss"
    )
    invalid_rows: Literal["error", "drop"] = Field(
        "error", description="unusable rows, e.g. invalid JSON or without a field: stop, or drop up to max_dropped"
    )
    max_dropped: float = Field(0.1, ge=0, le=1, description="fraction of rows that may be dropped before the run stops")
    packing: Literal["none", "batch", "full"] = Field(
        "batch", description="none: pad rows; batch: join a batch's rows; full: fill batches with rows by best fit"
    )
    share_prefixes: bool | Auto = Field(
        AUTO,
        description="compute shared prefixes of a packed batch once; auto: on a CPU, if this saves 5 % of the "
        "tokens and the results are the same",
    )
    replay: float | None = Field(
        None,
        gt=0,
        le=0.99,
        description="fraction of the training rows that is drawn from the training rows of the lora.start_from adapter",
    )

    @property
    def train_sources(self) -> list[Source]:
        """The sources of the training rows."""
        return _listed(self.train)

    @property
    def validation_sources(self) -> list[Source]:
        """The sources of the validation rows; empty if a fraction of the training rows is held out, or none."""
        return _listed(self.validation)

    @property
    def test_sources(self) -> list[Source]:
        """The sources of the test rows; empty if there are none."""
        return _listed(self.test)

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        yield from self._column_conflicts()
        yield from self._label_conflicts()
        yield from self._source_conflicts()
        yield from self._length_conflicts()
        if self.share_prefixes is True and self.packing == "none":
            message, fix = "padded rows share no prefix", "set packing to batch or full, or leave share_prefixes out"
            yield InvalidSettingError(message, "share_prefixes", "packing", fix=fix)
        if self.format in ("text", "input_ids") and self.chat_template is not None:
            message = f"{self.format} rows do not go through a chat template"
            yield InvalidSettingError(message, "format", "chat_template")
        for key, value in {"reasoning": "mask", "empty_reasoning": "context"}.items():
            if getattr(self, key) == value and self.loss_on == "all":
                yield InvalidSettingError("loss_on all supervises every token", key, "loss_on")
        if self.reasoning == "mask" and self.prompt_loss_weight:
            message = "masked reasoning would have the weight of a prompt, and mask gives it none"
            yield InvalidSettingError(message, "reasoning", "prompt_loss_weight", fix="choose one of the two")
        if self.loss_on == "all" and self.prompt_loss_weight:
            message = "loss_on all gives each token the weight 1"
            yield InvalidSettingError(message, "prompt_loss_weight", "loss_on", fix="choose one of the two")
        if self.format == "text" and self.prompt_loss_weight:
            yield InvalidSettingError("text rows have no prompt", "prompt_loss_weight", "format")
        if self.format in ("text", "input_ids") and self.loss_on == "assistant":
            yield InvalidSettingError(f"{self.format} rows have no assistant turns", "format", "loss_on")

    def truncation_of(self, *, is_text: bool) -> str:
        """What becomes of a row over `max_length`. is_text: whether the format of the row is `text`."""
        automatic = "split" if is_text else "keep_completion"
        return automatic if self.truncation == AUTO else self.truncation

    def _length_conflicts(self) -> Iterator[InvalidSettingError]:
        if self.stride >= self.max_length:
            message = f"blocks of {self.max_length} tokens that repeat {self.stride} would have nothing new"
            yield InvalidSettingError(message, "stride", "max_length", fix="lower stride")
        if self.stride and self.truncation not in (AUTO, "split"):
            message, fix = f"truncation {self.truncation} makes no blocks", "set it to split, or leave stride out"
            yield InvalidSettingError(message, "stride", "truncation", fix=fix)
        if self.stride and self.truncation == AUTO and self.format not in (AUTO, "text"):
            yield InvalidSettingError(f"{self.format} rows are not split", "stride", "format", fix="leave stride out")
        if self.stride and self.prompt_loss_weight:
            message = "tokens that a block repeats would count again"
            yield InvalidSettingError(message, "stride", "prompt_loss_weight", fix="choose one of the two")
        if self.truncation == "split" and self.format not in (AUTO, "text", "input_ids"):
            message = f"{self.format} rows have a prompt, which each block would need; only texts can be split"
            yield InvalidSettingError(message, "truncation", "format", fix="set truncation to keep_completion")

    def _column_conflicts(self) -> Iterator[InvalidSettingError]:
        names = list(self.columns.values())
        for field, name in self.columns.items():
            if field not in COLUMNS:
                message = f"`{field}` is not a field of a row; the fields are {', '.join(COLUMNS)}"
                yield InvalidSettingError(message, "columns")
            if names.count(name) > 1:
                message = f"the data's `{name}` is given for two fields of a row"
                yield InvalidSettingError(message, "columns", fix="give each field its own")

    def _label_conflicts(self) -> Iterator[InvalidSettingError]:
        if self.labels and self.format in UNLABELLED:
            yield InvalidSettingError(f"{self.format} rows have no answers that are labels", "labels", "format")
        if again := [label for name, label in self.labels.items() if self.labels.get(label, label) != label]:
            fix = "give each answer the label that it is to have in the end"
            yield InvalidSettingError(f"`{again[0]}` is replaced as well", "labels", fix=fix)

    def _source_conflicts(self) -> Iterator[InvalidSettingError]:
        sources = {"train": self.train_sources, "validation": self.validation_sources, "test": self.test_sources}
        for key, listed in sources.items():
            weighted = sum(source.weight is not None for source in listed)
            if 0 < weighted < len(listed):
                message, fix = "some sources have a weight and some have none", "give one to each, or to none"
                yield InvalidSettingError(message, key, fix=fix)
            if weighted == len(listed) == 1:
                yield InvalidSettingError("a single source takes no weight", key, fix="leave the weight out")
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            yield InvalidSettingError("a fraction must lie between 0 and 1", "validation")
        if self.group_by is not None and not isinstance(self.validation, float):
            message = "groups only matter where a fraction of the rows is held out"
            fix = "set data.validation to a fraction, or leave group_by out"
            yield InvalidSettingError(message, "group_by", "validation", fix=fix)


class LoraSection(Section):
    """The adapter: fields of `peft.LoraConfig`, under the same names."""

    r: Count | Auto = Field(8, description="rank; auto: from the number of supervised tokens")
    lora_alpha: Count | Auto = Field(16, description="the update is scaled by lora_alpha / r; auto: 16")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: list[str] | str = Field(
        ["q", "k", "v", "o"],
        description="roles (q, k, v, o), exact names, a regular expression, or all-linear, which leaves out stacked "
        "experts and routers; auto: those of the lora.start_from adapter, otherwise all-linear",
    )
    target_parameters: list[str] | str | None = Field(
        None,
        min_length=1,
        json_schema_extra={"minItems": 1},
        description="parameters outside linear layers: [experts], exact names, or a regular expression",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that are trained as well")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r), arXiv:2312.03732")
    use_dora: bool = Field(False, description="weight-decomposed LoRA, arXiv:2402.09353")
    init_lora_weights: (
        Annotated[bool, WithJsonSchema({"const": True})]
        | Literal["gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "loftq"]
    ) = Field(True, description="true: Kaiming and zero; pissa, olora, loftq: from the base; eva: from the data")
    use_lorafa: bool = Field(False, description="LoRA-FA: freeze A, train B by a corrected gradient, arXiv:2308.03303")
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, le=1e6, description="LoRA+: rate of B divided by the rate of A, arXiv:2402.12354"
    )
    layers_to_transform: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="indices of the layers to adapt, from 0"
    )
    rank_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own r, e.g. {q: 16}")
    alpha_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own lora_alpha")
    modules_to_save: list[str] | None = Field(
        None, min_length=1, description="modules to train and save in full, e.g. [lm_head]"
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="ids of the tokens whose embeddings are trained"
    )
    start_from: FilePath | None = Field(None, description="an adapter directory from which training continues")

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        yield from self._bad_patterns()
        if not self.target_modules and self.target_parameters is None:
            message = "must not be empty where lora.target_parameters names nothing either"
            yield InvalidSettingError(message, "target_modules")
        if self.init_lora_weights is False:
            message = "false starts from a random update, which is meant for PEFT's own tests"
            yield InvalidSettingError(message, "init_lora_weights", fix="leave it out")
        ranks = (rank for rank in (self.r, *self.rank_pattern.values()) if rank != AUTO)
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            message = "orthogonal initialization splits the rank into two halves, so the rank must be even"
            yield InvalidSettingError(message, "init_lora_weights", "r")
        for first, second, message in (*self._variant_conflicts(), *self._parameter_conflicts()):
            yield InvalidSettingError(message, first, second, fix="choose one of the two")

    def _bad_patterns(self) -> Iterator[InvalidSettingError]:
        texts = {"target_modules": self.target_modules, "target_parameters": self.target_parameters}
        patterns = [(key, text) for key, text in texts.items() if isinstance(text, str) and text != AUTO]
        patterns += [("rank_pattern", text) for text in self.rank_pattern]
        patterns += [("alpha_pattern", text) for text in self.alpha_pattern]
        for key, text in patterns:
            try:
                compile_pattern(text)
            except BadPatternError as error:
                yield InvalidSettingError(f"`{text}` {error}", key)

    def _variant_conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Pairs of conflicting keys, with the reason."""
        init = str(self.init_lora_weights)
        if self.use_lorafa and self.loraplus_lr_ratio is not None:
            message = "LoRA+ makes B learn faster than A, but LoRA-FA does not train A"
            yield "use_lorafa", "loraplus_lr_ratio", message
        if self.use_lorafa and self.use_dora:
            message = "PEFT's LoRA-FA pairs each A with its B, and miscounts where DoRA has a third tensor"
            yield "use_lorafa", "use_dora", message
        if init.startswith(("pissa", "olora")) and self.use_dora:
            message = f"{init} takes a part out of the base, and DoRA would measure the rest"
            yield "init_lora_weights", "use_dora", message
        if init == "eva" and self.rank_pattern:
            message = "eva shares directions between layers that read the same input, so they must have one rank"
            yield "init_lora_weights", "rank_pattern", message
        if self.start_from is not None and self.init_lora_weights is not True:
            yield "start_from", "init_lora_weights", "the values of the adapter it starts from are its start"

    def _parameter_conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Settings that work only with modules, and conflict with `target_parameters`."""
        if self.target_parameters is None:
            return
        if self.lora_dropout > 0:
            message = "the update is added to the tensor itself, where there is no input to drop out; set it to 0"
            yield "lora_dropout", "target_parameters", message
        if self.use_dora:
            yield "use_dora", "target_parameters", "PEFT has DoRA for modules only"
        if self.use_lorafa:
            message = "A and B of stacked experts have their ranks in different orders, which LoRA-FA would mix up"
            yield "use_lorafa", "target_parameters", message
        if self.init_lora_weights not in (True, "gaussian"):
            message = f"PEFT has {self.init_lora_weights} for modules only; true and gaussian go with it"
            yield "init_lora_weights", "target_parameters", message
