"""Errors of pydantic as problems: where, which key, what was expected, what to do."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from loratune.codes import Code
from loratune.config.schema import InvalidSettingError, RunConfig, Section
from loratune.config.yaml_reader import MAX_PROBLEMS, Document, KeyPath, dotted, first_problems, kind_of
from loratune.errors import Problem

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section",
    "model_attributes_type": "a section",
}

# What other tools call our keys.
_KNOWN_AS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "lora_r": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "gradient_checkpointing": "activation_checkpointing",
    "warmup_ratio": "warmup_steps",
    "base_model": "name_or_path",
    "model_name_or_path": "name_or_path",
    "load_in_8bit": "quantization",
    "load_in_4bit": "quantization",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "dataset": "train",
    "scheduler": "lr_scheduler_type",
}


def translate(error: ValidationError, document: Document) -> list[Problem]:
    """One problem for each error of pydantic, in the order of the keys; alternatives of a union count once."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors():
        groups.setdefault(_key_path(details), []).append(details)
    groups = _without_alternatives(groups)
    problems = [_problem(path, group, document) for path, group in [*groups.items()][:MAX_PROBLEMS]]
    return first_problems(problems, len(groups))


def known_keys(section: type[Section] = RunConfig, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key of a section and of the sections below it."""
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        for part in _sections_in(field.annotation):
            yield from known_keys(part, (*prefix, name))


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    else:
        for part in get_args(annotation):  # of a union, a list, Annotated
            yield from _sections_in(part)


def _key_path(details: ErrorDetails) -> KeyPath:
    """The keys of a location, without the names that pydantic gives to the alternatives of a union."""
    alternatives, location = {"str", "int", "float", "bool", "Source"}, details["loc"]
    own = location[-1:] if details["type"] == "extra_forbidden" else ()  # the user's word, whatever it is
    above = location[: len(location) - len(own)]
    return (*(part for part in above if isinstance(part, int) or not (part in alternatives or "[" in part)), *own)


def _without_alternatives(groups: dict[KeyPath, list[ErrorDetails]]) -> dict[KeyPath, list[ErrorDetails]]:
    """Drop `a: not a number` where `a.b: unknown key` says what is wrong with the alternative that was meant."""
    parents = {path[:end] for path in groups for end in range(1, len(path))}
    return {
        path: group
        for path, group in groups.items()
        if path not in parents or not all(details["type"] in _EXPECTED for details in group)
    }


def _problem(path: KeyPath, group: list[ErrorDetails], document: Document) -> Problem:
    details = next((details for details in group if details["type"] not in _EXPECTED), group[0])
    where, key, value = document.where(path), dotted(path), f"got {kind_of(details['input'])}"
    kind, context = details["type"], details.get("ctx", {})
    if group[0]["type"] == "extra_forbidden":
        return Problem(Code.CONFIG_UNKNOWN_KEY, "unknown key", where, key, _suggestion(path))
    if group[0]["type"] == "missing":
        where = document.where(path[:-1])
        return Problem(Code.CONFIG_MISSING_KEY, "missing", where, key, "this key has no default")
    if isinstance(error := context.get("error"), InvalidSettingError):
        if not error.keys:
            return Problem(error.code, f"{error}, {value}", where, key, error.fix)
        where = document.where((*path, *error.keys[0].split(".")))
        keys = " and ".join(dotted((*path, *name.split("."))) for name in error.keys)
        return Problem(error.code, str(error), where, keys, error.fix)
    if kind in _EXPECTED:
        expected = " or ".join(dict.fromkeys(_EXPECTED[details["type"]] for details in group))
        return Problem(Code.CONFIG_WRONG_TYPE, f"expected {expected}, {value}", where, key)
    if kind == "literal_error":
        choices = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        fix = _nearest(str(details["input"]), choices)
        return Problem(Code.CONFIG_NOT_A_CHOICE, f"expected {context['expected']}, {value}", where, key, fix)
    if kind.endswith("too_short"):
        return Problem(Code.CONFIG_EMPTY_VALUE, "must not be empty", where, key)
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
    code = Code.CONFIG_WRONG_TYPE if kind == "string_unicode" else Code.CONFIG_OUT_OF_RANGE
    return Problem(code, f"{message}, {value}", where, key)


def _nearest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else ""


def _suggestion(path: KeyPath) -> str:
    """The key that was probably meant: a sibling that looks alike, another tool's name, or a key of another section."""
    name, keys = str(path[-1]), list(dict.fromkeys(known_keys()))
    section = tuple(part for part in path[:-1] if isinstance(part, str))  # without the numbers of a list's entries
    siblings = [str(key[-1]) for key in keys if key[:-1] == section]
    if near := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"did you mean `{near[0]}`?"
    wanted = _KNOWN_AS.get(name, name)
    if elsewhere := [key for key in keys if key[-1] == wanted]:
        return f"did you mean `{dotted(elsewhere[0])}`?"
    return f"known here: {', '.join(siblings)}" if siblings else "remove it"
