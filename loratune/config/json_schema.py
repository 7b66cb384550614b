"""The JSON schema of a config file, as editors read it: what `load` accepts, as far as a schema can say it."""

from typing import Any

from loratune import __version__
from loratune.config.data_section import Source
from loratune.config.keys import groups, reference_of
from loratune.config.schema import RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_TEXT = {"type": "string", "minLength": 1}
_NUMBER_AS_TEXT = {
    "type": "string",
    "pattern": r"^[-+]?([0-9]+[eE][-+]?[0-9]+|([0-9]+\.[0-9]*|\.[0-9]+)[eE][0-9]+)$",
}
"""Numbers of our reader, and of YAML 1.2, that YAML 1.1 takes for text: `1e-4`, and `1.5e3`, whose exponent has no sign
(https://yaml.org/type/float.html)."""
_NOT_NEGATIVE_AS_TEXT = {**_NUMBER_AS_TEXT, "pattern": str(_NUMBER_AS_TEXT["pattern"]).replace("[-+]?", r"\+?", 1)}


def json_schema() -> dict[str, Any]:
    """The schema of `RunConfig` by draft 2020-12, opened for what our reader does before pydantic sees a value.

    A source may be plain text, its path, and a number may be what a reader of YAML 1.1 takes for text. Descriptions
    also say what a key does to memory and time. Titles are the keys themselves, not what pydantic makes of them, and
    whole sections have no default, which an editor would write out.
    """
    schema: dict[str, Any] = _as_read(RunConfig.model_json_schema())
    for group in groups():
        keys = schema["properties"]
        if group.name:
            name = reference_of(keys[group.name]) if group.is_section else group.name
            keys = schema["$defs"][name]["properties"]
        if group.is_section:
            schema["properties"][group.name].pop("default", None)
        for key in group.keys:
            keys[key.name]["title"] = key.label
            if key.costs != "none":
                keys[key.name]["description"] = f"{key.meaning}. Memory and time: {key.costs}."
    return {"$schema": DIALECT, "$id": f"urn:loratune:config:{__version__}", "title": "A run of loratune", **schema}


def _as_read(schema: Any) -> Any:
    """The schema of what stands in a file."""
    if isinstance(schema, list):
        return [_as_read(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    values = {
        name: _as_read(value) for name, value in schema.items() if not (name == "title" and isinstance(value, str))
    }
    if "$ref" in values and reference_of(values) == Source.__name__:
        return {"anyOf": [_TEXT, values]}
    if values.get("type") == "number":
        outside = {name: values.pop(name) for name in ("description", "default") if name in values}
        least = max(values.get("minimum", -1), values.get("exclusiveMinimum", -1))
        return outside | {"anyOf": [values, _NUMBER_AS_TEXT if least < 0 else _NOT_NEGATIVE_AS_TEXT]}
    return values
