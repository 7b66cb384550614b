"""The base class of all sections of a run: frozen, complete, and strict about unknown keys and types.

Fields that belong to an upstream object carry upstream's name and are passed on by `model_dump`, so a field that is
added here reaches its object without being copied by hand.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from loratune.codes import Code
from loratune.system.files import path_problem

PATH_FORMAT = "path"
"""The format, in the JSON schema, of text that names a file or directory of this machine."""
AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]
"""A value that the run chooses itself, see `training.auto`."""
_Value = TypeVar("_Value")


def decided(value: _Value | Auto) -> _Value:
    """A setting for which `auto` was allowed, once `training.auto` has chosen. Raises AssertionError: it has not."""
    assert value != AUTO, "a setting is still `auto`"
    return value


Count = Annotated[int, Field(gt=0, lt=2**31)]
"""How many of something, or how large: beyond this, torch and its optimizers lose numbers in silence, or fail."""


class InvalidSettingError(ValueError):
    """A value that a check of ours refuses, or several that contradict each other.

    Attributes:
        keys: Relative to the section that is being validated; none for the key itself.
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
"""The name of a file within a directory that another key names."""
FilePath = Annotated[FileName, WithJsonSchema({"type": "string", "minLength": 1, "format": PATH_FORMAT})]
"""A path, or a glob or hub id in the place of one. `path_keys` finds the keys of this type."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no coercion between types, no NaN or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for conflict in self._conflicts():
            raise conflict
        return self

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        """What is wrong with the values together; the first is reported."""
        yield from ()
