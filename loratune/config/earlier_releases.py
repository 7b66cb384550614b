"""Configs that earlier releases recorded: what this release makes of them, and which of their keys it does not know."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel


def migrated(before: Any, now: Any, section: type[BaseModel] | None) -> Any:
    """A configuration as this release would have written it.

    A key that a later release added has its default, and one that was removed is left out; see `unknown_keys`.

    Args:
        before: Resolved values, as a checkpoint holds them.
        now: Those of this run.
        section: The class of the values, None for plain ones.
    """
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [migrated(old, new, section) for old, new in zip(before, now, strict=True)]
    if not isinstance(before, dict) or not isinstance(now, dict) or section is None:
        return before
    values = {
        key: migrated(old, now.get(key), _section_of(section, key))
        for key, old in before.items()
        if key in section.model_fields
    }
    for key in now.keys() - before.keys():
        if key in section.model_fields and not section.model_fields[key].is_required():
            default = section.model_fields[key].get_default(call_default_factory=True)
            values[key] = default.model_dump() if isinstance(default, BaseModel) else default
    return values


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class of the values of a key, alone or in a list; None for plain values."""
    annotations: list[Any] = [section.model_fields[key].annotation] if key in section.model_fields else []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        annotations.extend(get_args(annotation))
    return None


def unknown_keys(before: Mapping[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys, with values, that this release does not know."""
    for key, value in before.items():
        if key not in section.model_fields:
            yield f"{prefix}{key}", value
        elif (inner := _section_of(section, key)) is not None:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    yield from unknown_keys(item, inner, f"{prefix}{key}.")
