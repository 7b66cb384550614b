"""The section `data`: the rows of a run, and which of their tokens are supervised."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from loratune.config.section import AUTO, Auto, FilePath, InvalidSettingError, Section


class Source(Section):
    """One source of rows."""

    path: FilePath = Field(description="a file, a directory, a glob, or a hub id")
    split: str | None = Field(None, description="a split or a slice of one, e.g. train[:2000]")
    weight: float | None = Field(
        None, gt=0, le=1e6, description="its share of the rows, relative to the other sources; null: all its rows"
    )


def _as_sources(value: Any) -> Any:
    """Sources from paths, as text."""
    if isinstance(value, list):
        return [_as_sources(source) for source in value]
    return {"path": value} if isinstance(value, str) else value


def _listed(sources: Source | list[Source] | float | None) -> list[Source]:
    return [sources] if isinstance(sources, Source) else sources if isinstance(sources, list) else []


Sources = Source | Annotated[list[Source], Field(min_length=1)]
"""One source, or several."""

Fraction = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})]
"""A share of the rows; `DataSection` checks it, as only there it differs from sources."""

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
        None, description="sources as in train, or the fraction of the training rows that is held out"
    )
    test: Annotated[Sources | None, BeforeValidator(_as_sources)] = Field(
        None, description="sources as in train; the adapter is scored on them once, after training"
    )
    group_by: str | None = Field(
        None,
        min_length=1,
        description="field name; rows with the same value of this field stay in one split when a fraction is held out",
    )
    format: Literal[
        "auto", "input_ids", "prompt_completion", "messages", "conversations", "alpaca", "text", "preference",
        "unpaired_preference",
    ] = Field("auto", description="auto: recognized for each file by the keys of its rows")  # fmt: skip
    columns: dict[str, str] = Field(
        {},
        json_schema_extra={"propertyNames": {"enum": list(COLUMNS)}},
        description="field → its name in the data, e.g. {prompt: question}; the data's prompt is then ignored",
    )
    chat_template: FilePath | None = Field(None, description="a Jinja file that replaces the tokenizer's chat template")
    loss_on: Literal["completion", "assistant", "all"] = Field(
        "completion",
        description="completion: completions, or all assistant turns of messages; assistant: also assistant turns in "
        "the prompt; all: every token up to the end of the last answer",
    )
    max_length: int = Field(
        1024, ge=2, lt=2**31, description="maximum number of tokens of a row, including the end-of-sequence token"
    )
    truncation: Literal["keep_completion", "drop", "error"] = Field(
        "keep_completion",
        description="for rows over max_length: truncate the prompt from the left, drop the row, or stop the run",
    )
    invalid_rows: Literal["error", "drop"] = Field(
        "error",
        description="for rows that cannot be used, such as a line that is not valid JSON or a row that lacks a field: "
        "stop the run, or drop up to max_dropped of the rows",
    )
    max_dropped: float = Field(
        0.1, ge=0, le=1, description="fraction of the rows that may be dropped; if more are, the run stops"
    )
    packing: Literal["none", "batch", "full"] = Field(
        "batch",
        description="none: pad rows; batch: concatenate a batch's rows; full: fill batches with whole rows by best fit",
    )
    share_prefixes: bool | Auto = Field(
        AUTO,
        description="compute shared prefixes of a packed batch once; auto: if exact and 5 % of the tokens are saved",
    )
    replay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of the training rows that is drawn from the rows of the run of lora.start_from",
    )

    @property
    def train_sources(self) -> list[Source]:
        """The sources of training, one or several."""
        return _listed(self.train)

    @property
    def validation_sources(self) -> list[Source]:
        """The sources of validation; none where a fraction of training is held out, or nothing."""
        return _listed(self.validation)

    @property
    def test_sources(self) -> list[Source]:
        """The sources of the test rows; none where nothing is tested."""
        return _listed(self.test)

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        yield from self._column_conflicts()
        yield from self._source_conflicts()
        if self.share_prefixes is True and self.packing == "none":
            message, fix = "padded rows share no prefix", "set packing to batch or full, or leave share_prefixes out"
            yield InvalidSettingError(message, "share_prefixes", "packing", fix=fix)
        if self.format in ("text", "input_ids") and self.chat_template is not None:
            message = f"{self.format} rows do not go through a chat template"
            yield InvalidSettingError(message, "format", "chat_template")
        if self.format in ("text", "input_ids") and self.loss_on == "assistant":
            yield InvalidSettingError(f"{self.format} rows have no assistant turns", "format", "loss_on")

    def _column_conflicts(self) -> Iterator[InvalidSettingError]:
        names = list(self.columns.values())
        for field, name in self.columns.items():
            if field not in COLUMNS:
                message = f"`{field}` is not a field of a row; the fields are {', '.join(COLUMNS)}"
                yield InvalidSettingError(message, "columns")
            if names.count(name) > 1:
                message = f"the data's `{name}` is given for two fields of a row"
                yield InvalidSettingError(message, "columns", fix="give each field its own")

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
