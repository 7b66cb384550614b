"""The section `data`: which rows, and which of their tokens are supervised."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from loratune.codes import Code
from loratune.config.section import AUTO, Auto, FilePath, InvalidSettingError, Section


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

Fraction = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})]
"""A share of the rows; `DataSection` checks it, as only there it is told from sources."""

COLUMNS = (
    "input_ids", "labels", "prompt", "completion", "messages", "tools", "conversations", "system",
    "instruction", "input", "output", "history", "text", "chosen", "rejected", "label",
)  # fmt: skip
"""The names of the fields of a row; `data.columns` maps them to those in the data."""


class DataSection(Section):
    """Which rows, and which of their tokens are supervised."""

    train: Annotated[Sources, BeforeValidator(_as_sources)] = Field(
        description="a path, a glob, a hub id, {path, split, weight}, or a list of these"
    )
    validation: Annotated[Sources | Fraction | None, BeforeValidator(_as_sources)] = Field(
        None, description="sources like train, or the fraction of train that is held out"
    )
    test: Annotated[Sources | None, BeforeValidator(_as_sources)] = Field(
        None, description="sources like train; the adapter is scored on them once, after the last step"
    )
    group_by: str | None = Field(
        None,
        min_length=1,
        description="a field of the rows; rows with the same value of it stay in one split when a fraction is held out",
    )
    format: Literal[
        "auto", "input_ids", "prompt_completion", "messages", "conversations", "alpaca", "text", "preference",
        "unpaired_preference",
    ] = Field("auto", description="auto: recognised by the keys of the rows, file by file")  # fmt: skip
    columns: dict[str, str] = Field(
        {},
        json_schema_extra={"propertyNames": {"enum": list(COLUMNS)}},
        description="field of a row → its name in the data, e.g. {prompt: question}, which hides the data's prompt",
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
        description="for rows over max_length: truncate the prompt from the left, drop the row, or stop the run",
    )
    invalid_rows: Literal["error", "drop"] = Field(
        "error",
        description="for rows that cannot be used, such as a line that is not valid JSON or a row that lacks a field: "
        "stop the run, or drop them, within max_dropped",
    )
    max_dropped: float = Field(
        0.1, ge=0, le=1, description="fraction of the rows that may be dropped; if more are, the run stops"
    )
    packing: Literal["none", "batch", "full"] = Field(
        "batch",
        description="none: padding; batch: a batch without padding; full: batches filled with whole rows by best fit",
    )
    share_prefixes: bool | Auto = Field(
        AUTO,
        description="compute shared prefixes of a packed batch once; auto: if exact, and 5 % of the tokens are saved",
    )
    replay: float | None = Field(
        None, gt=0, lt=1, description="fraction of the training rows that is drawn from those of lora.start_from"
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

    @property
    def test_sources(self) -> list[Source]:
        """The sources of the test rows; none where nothing is tested."""
        if isinstance(self.test, Source):
            return [self.test]
        return self.test or []

    @model_validator(mode="after")
    def _known_columns(self) -> Self:
        if unknown := [name for name in self.columns if name not in COLUMNS]:
            message = f"`{unknown[0]}` is not a field of a row; the fields are {', '.join(COLUMNS)}"
            raise InvalidSettingError(Code.DATA_FORMAT, message, "columns")
        names = list(self.columns.values())
        if repeated := [name for name in names if names.count(name) > 1]:
            message = f"the data's `{repeated[0]}` is given for two fields of a row"
            raise InvalidSettingError(Code.DATA_FORMAT, message, "columns", fix="give each field its own")
        return self

    @model_validator(mode="after")
    def _weights(self) -> Self:
        for key, sources in (
            ("train", self.train_sources),
            ("validation", self.validation_sources),
            ("test", self.test_sources),
        ):
            weighted = sum(source.weight is not None for source in sources)
            if 0 < weighted < len(sources):
                message, fix = "some sources have a weight and some have none", "give one to each, or to none"
                raise InvalidSettingError(Code.CONFIG_CONFLICT, message, key, fix=fix)
            if weighted == len(sources) == 1:
                message = "a single source takes no weight"
                raise InvalidSettingError(Code.CONFIG_CONFLICT, message, key, fix="leave the weight out")
        return self

    @model_validator(mode="after")
    def _validation_is_a_fraction(self) -> Self:
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise InvalidSettingError(Code.CONFIG_BAD_VALUE, "a fraction must lie between 0 and 1", "validation")
        return self

    @model_validator(mode="after")
    def _groups_are_divided(self) -> Self:
        if self.group_by is not None and not isinstance(self.validation, float):
            message = "groups only matter where a fraction of the rows is held out"
            fix = "set data.validation to a fraction, or leave group_by out"
            raise InvalidSettingError(Code.CONFIG_CONFLICT, message, "group_by", "validation", fix=fix)
        return self

    @model_validator(mode="after")
    def _padded_rows_share_nothing(self) -> Self:
        if self.share_prefixes is True and self.packing == "none":
            message, keys = "padded rows stand beside each other, and share no prefix", ("share_prefixes", "packing")
            fix = "set packing to batch or full, or leave share_prefixes out"
            raise InvalidSettingError(Code.CONFIG_CONFLICT, message, *keys, fix=fix)
        return self

    @model_validator(mode="after")
    def _templates_render_chats(self) -> Self:
        if self.format in ("text", "input_ids") and self.chat_template is not None:
            message = f"{self.format} rows do not go through a chat template"
            raise InvalidSettingError(Code.CONFIG_CONFLICT, message, "format", "chat_template")
        if self.format in ("text", "input_ids") and self.loss_on == "assistant":
            message = f"{self.format} rows have no assistant turns"
            raise InvalidSettingError(Code.CONFIG_CONFLICT, message, "format", "loss_on")
        return self
