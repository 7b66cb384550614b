"""`loratune schema` and `loratune explain`: editors and loratune accept the same configs, and every key is
explained."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Ran, check_refused
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from running import Cli, MakeConfig
from test_cli import imported

from loratune import config
from loratune.codes import Code
from loratune.config import RunConfig, yaml_files
from loratune.config.keys import BOUNDS, DECIDED_BY_RUN, DIALECT, MEMORY_AND_TIME, Key, find, groups, json_schema
from loratune.config.schema import PREFERENCE_KEYS
from loratune.errors import ConfigError

SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
SHIPPED.append(ROOT / "loratune" / "data" / "quickstart" / "config.yaml")
KEYS = [key for group in groups() for key in group.keys]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    """A validator of the schema that the command prints."""
    (ran,), heavy = imported(["schema"])
    assert ran.code == 0 and ran.err == "" and heavy == set()
    schema = json.loads(ran.out)
    assert schema == json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def with_value(place: str, value: Any) -> dict[str, Any]:
    """A small valid config with a value at a place of one or more parts."""
    values: dict[str, Any] = {"model": {"name_or_path": "base"}, "data": {"train": {"path": "a"}}, "output_dir": "out"}
    below = values
    *above, name = place.split(".")
    for part in above:
        below = below.setdefault(part, {"path": "b"} if part in ("validation", "test") else {})
    below[name] = value
    return values


# The schema


def test_the_schema_describes_every_key_with_its_default(validator: Draft202012Validator) -> None:
    schema = validator.schema
    assert schema["$schema"] == DIALECT and schema["$id"].startswith("urn:loratune:") and schema["title"]
    described = {
        key["title"]: key
        for section in [schema, *schema["$defs"].values()]
        for key in section["properties"].values()
        if "title" in key
    }
    assert set(described) == {key.label for key in KEYS}
    for key in KEYS:
        assert described[key.label]["description"].startswith(key.meaning)
        assert key.required or described[key.label]["default"] == key.schema["default"]
    assert MEMORY_AND_TIME["lora.r"] in described["lora.r"]["description"]
    assert described["training.optim"]["enum"][0] == "adamw_torch"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_and_their_run_yaml_are_valid(validator: Draft202012Validator, path: Path) -> None:
    for text in (path.read_text(encoding="utf-8"), config.dump(config.load(path))):
        assert [error.message for error in validator.iter_errors(yaml_files.parse(text, "x").values)] == []


VALUES = [None, True, False, "x", "", "true", "none", "auto", "best", "q", 0, 1, 3, -1, 2**40, 0.5, 1.5, -0.5, [], {},
          ["x"], ["q", 1], [3], ["wandb"], {"q": 4}, {"prompt": "x"}, {"x": "y"}, {"path": "x"}, {"path": 1},
          [{"path": "x", "weight": 2}, "y"], {"path": "x", "rows": 1}]  # fmt: skip


def is_read(values: dict[str, Any]) -> bool | None:
    """Whether a config is accepted. None if it is refused for a reason that no schema can express."""
    try:
        RunConfig.model_validate(values)
    except ValidationError as error:
        of_ours = all(details["type"] == "value_error" for details in error.errors())
        return None if of_ours else False
    return True


def test_the_schema_and_the_config_reader_agree(validator: Draft202012Validator) -> None:
    differing, accepted = [], 0
    for place in [*(place for key in KEYS for place in key.places), "model", "lora", "data", "nonsense", "lora.rank"]:
        for value in VALUES:
            values = with_value(place, value)
            if (expected := is_read(values)) is not None and validator.is_valid(values) != expected:
                differing.append((place, value, expected))
            accepted += bool(expected)
    assert differing == [] and accepted > 200


def numbers_of(schema: Any) -> Iterator[tuple[dict[str, Any], Callable[[Any], Any]]]:
    """The schema of each kind of number that a key takes, and how a value of the key contains one."""
    if schema.get("type") in ("integer", "number"):
        yield schema, lambda number: number
    for part in schema.get("anyOf", []):
        yield from numbers_of(part)
    for place, held in (("items", lambda number: [number]), ("additionalProperties", lambda number: {"q": number})):
        if isinstance(schema.get(place), dict):
            yield from ((number, held) for number, _ in numbers_of(schema[place]))


NUMERIC = [(key, schema, held) for key in KEYS for schema, held in numbers_of(key.schema)]
LIMITS = {schema[bound] for _, schema, _ in NUMERIC for bound in BOUNDS if bound in schema} | {0, 1, 2, 10}
EDGES = sorted(
    {edge for limit in LIMITS for sign in (1, -1) for edge in (
        sign * limit, sign * limit + 1, sign * limit - 1, sign * limit + 0.5,
        math.nextafter(sign * limit, math.inf), math.nextafter(sign * limit, -math.inf),
    )} | {math.inf, -math.inf, 10**400}
)  # fmt: skip


def holding(place: str, value: Any) -> dict[str, Any]:
    """A config in which a number can occur at a place without another key that forbids it there."""
    values = with_value("data.validation", 0.5) | {"lora": {"start_from": "adapter"}}
    *above, name = place.split(".")
    if len(above) == 2:
        values["data"][above[1]] = [{"path": "a", name: value}, {"path": "b", name: 1}]
    else:
        values.setdefault(above[0], {})[name] = value
    if place == "data.stride":
        values["data"]["max_length"] = 2**31 - 1
    if above[0] == "preferences":
        values["training"] = {"objective": PREFERENCE_KEYS[name][0]}
    return values


def test_the_schema_and_the_reader_agree_on_boundary_numbers(validator: Draft202012Validator) -> None:
    """Except that `3.0` is an integer in JSON Schema but refused by the reader; no schema can distinguish it from 3."""
    differing, seen = [], set()
    assert {"training.max_steps", "lora.rank_pattern", "Source.weight"} < {key.label for key, _, _ in NUMERIC}
    for key, schema, held in NUMERIC:
        for place, edge in itertools.product(key.places, EDGES):
            if schema["type"] == "integer" and isinstance(edge, float) and edge.is_integer():
                continue
            values, read = holding(place, held(edge)), True
            try:
                config.from_values(copy.deepcopy(values), "test")
            except ConfigError:
                read = False
            if validator.is_valid(values) != read:
                differing.append((place, edge, read))
            seen.add((key.label, read))
    assert differing == [] and seen == {(key.label, read) for key, _, _ in NUMERIC for read in (True, False)}


# The text on every key


def test_every_key_documents_its_effect_on_memory_and_time() -> None:
    assert set(MEMORY_AND_TIME) <= {key.label for key in KEYS}
    for text in MEMORY_AND_TIME.values():
        assert text and not text.endswith(".") and "  " not in text
    assert all(key.meaning for key in KEYS)


def test_values_decided_by_the_run_are_valid_for_their_keys() -> None:
    by_label = {key.label: key for key in KEYS}
    for label, text in DECIDED_BY_RUN.items():
        value = yaml_files.parse(f"value: {text}", "x").values["value"]
        assert by_label[label].is_decided_by_run(value)
        config = with_value(label, value)
        config["data"].setdefault("validation", 0.5)  # which one of them needs
        assert is_read(config)


# Finding keys


def labels(words: str) -> list[str]:
    return [item.label if isinstance(item, Key) else item.name for item in find(words)]


@pytest.mark.parametrize("words, expected", [
    ("training.learning_rate", ["training.learning_rate"]),
    ("learning_rate", ["training.learning_rate"]),
    ("learn", ["training.learning_rate"]),
    ("training.learn", ["training.learning_rate"]),
    ("lr", ["training.learning_rate", "training.lr_scheduler_type"]),
    ("r", ["lora.r"]),
    ("rank", ["lora.r", "lora.rank_pattern"]),
    ("gradient_checkpointing", ["training.activation_checkpointing"]),
    ("training", ["training"]),
    ("trai", ["training", "lora.trainable_token_indices", "data.train"]),
    ("train", ["data.train"]),
    ("data.train[2].weight", ["Source.weight"]),
    ("Source", ["Source"]),
    ("output_dir", ["output_dir"]),
    ("compile", ["model.torch_compile"]),
    ("model.compile", ["model.torch_compile"]),
    ("liger", ["model.use_liger_kernel"]),
    ("flash_attention", ["model.attn_implementation"]),
    ("Flash-Attention", ["model.attn_implementation"]),
    ("lora.learning_rate", []),
    ("x", []),
    ("", []),
])  # fmt: skip
def test_a_key_is_found_by_name_prefix_and_names_in_other_tools(words: str, expected: list[str]) -> None:
    assert labels(words) == expected


def test_every_key_is_found_by_each_of_its_paths() -> None:
    for key in KEYS:
        for place in key.places:
            assert [item.places for item in find(place) if isinstance(item, Key)] == [(place,)]
    for group in groups():
        assert not group.name or find(group.name) == [group]


@pytest.mark.parametrize("words, nearest", [
    ("lerning_rate", "training.learning_rate"),
    ("training.lerning_rate", "learning_rate"),
    ("lora.learning_rate", "training.learning_rate"),
    ("modle", "model"),
    ("TRAINING.LEARNING_RATE", "training.learning_rate"),
    ("quantisation", "model.quantization"),
    ("xyz", ""),
])  # fmt: skip
def test_an_unknown_key_suggests_the_nearest(cli: Cli, words: str, nearest: str) -> None:
    ran = cli("explain", words)
    check_refused(ran, 2, (Code.CONFIG_UNKNOWN_KEY, "", words))
    assert ran.out == "" and f"`{nearest}`" in ran.err if nearest else "loratune explain" in ran.err


# Explaining


def test_the_code_of_an_error_is_explained(cli: Callable[..., Ran]) -> None:
    for words in (Code.CONFIG_SYNTAX, f"[{Code.CONFIG_SYNTAX}]", f"error[{Code.CONFIG_SYNTAX}]"):
        ran = cli("explain", words)
        assert ran.code == 0 and Code.CONFIG_SYNTAX.meaning in ran.out, ran.err
    assert json.loads(cli("explain", Code.CONFIG_SYNTAX, "--json").out)["codes"] == {
        Code.CONFIG_SYNTAX: Code.CONFIG_SYNTAX.meaning
    }


def test_a_code_that_is_also_a_key_is_explained_as_both(cli: Callable[..., Ran]) -> None:
    out = cli("explain", Code.DATA_FORMAT).out
    assert Code.DATA_FORMAT.meaning in out and "preference" in out
    explained = json.loads(cli("explain", Code.DATA_FORMAT, "--json").out)
    assert explained["keys"].keys() == explained["codes"].keys() == {"data.format"}


def test_what_a_run_would_choose_is_explained(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """With the values that the run takes, whatever is at its output directory; nothing is written."""
    config = run_config(training={"learning_rate": "auto", "max_steps": -1, "num_train_epochs": "auto"})
    (tmp_path / "out").mkdir()
    ran = cli("explain", "auto", config)
    assert ran.code == 0 and re.search(r"^training.learning_rate\n  value +\S+\n  reason +\w", ran.out, re.MULTILINE), (
        ran.err
    )
    choices = json.loads(cli("explain", "auto", config, "--json").out)["choices"]
    (tmp_path / "out").rmdir()
    ran = cli("train", config, "--dry-run", "--json")
    planned = json.loads(ran.out)["config"]
    assert {key: one["value"] for key, one in choices.items()} == {
        key: planned[key.split(".")[0]][key.split(".")[1]] for key in choices
    } and {"training.learning_rate", "training.num_train_epochs"} <= choices.keys()
    check_refused(cli("explain", "auto"), 2, (Code.USAGE_CONFLICT, "", "auto"))


def test_an_explanation_has_meaning_type_default_and_costs(cli: Cli) -> None:
    out = cli("explain", "quantization").out
    rows = {
        line[2:].partition("  ")[0]: line.partition("  ")[2].partition("  ")[2].strip() for line in out.splitlines()
    }
    assert rows["type"] == "none, 8bit, 4bit" and rows["default"] == "none"
    assert rows["memory and time"] == MEMORY_AND_TIME["model.quantization"]
    assert rows["elsewhere called"] == "load_in_8bit, load_in_4bit, quantization_bit"
    assert cli("explain", "r").out.splitlines()[2].split() == ["type", "integer", ">", "0", "or", "auto"]


def test_without_a_key_every_key_is_listed(cli: Cli) -> None:
    lines = [line.split()[0] for line in cli("explain").out.splitlines() if line.startswith("  ")]
    assert lines == [key.name if key.label.startswith("Source") else key.label for key in KEYS]


def in_force(ran: Ran) -> Iterator[tuple[str, Any, str, bool, bool]]:
    """For each key its value, the source of the value, whether the run decides it, and whether it is used."""
    assert ran.code == 0, ran.err
    for key in json.loads(ran.out)["keys"].values():
        yield from (tuple(setting.values())[:5] for setting in key["in_force"])


def test_the_value_in_force_and_its_source(cli: Cli, run_config: MakeConfig) -> None:
    sources = [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1}]
    path = run_config(data={"train": sources, "validation": "c.jsonl"}, training={"max_steps": 5})
    lines = path.read_text().splitlines()

    def at(text: str) -> str:
        return f"{path}:{next(number for number, line in enumerate(lines, 1) if text in line)}"

    settings = {}
    for setting in in_force(cli("explain", path, "--set", "lora.r=4", "--json")):
        assert setting[0] not in settings
        settings[setting[0]] = setting[1:]
    default = "the default"
    assert settings["training.max_steps"] == (5, at("max_steps"), False, True)
    assert settings["training.num_train_epochs"] == ("auto", default, False, False)
    assert settings["training.keep"] == (None, default, True, True)
    assert settings["training.patience"] == (None, default, False, True)
    assert settings["lora.r"] == (4, "--set", False, True)
    assert settings["data.train"] == (sources, at("train:"), False, True)
    assert settings["data.train[1].path"] == ("b.jsonl", at("b.jsonl"), False, True)
    assert settings["data.validation"] == ("c.jsonl", at("validation"), False, True)
    assert settings["data.validation.path"] == ("c.jsonl", at("validation"), False, True)
    assert settings["data.validation.split"] == (None, default, False, True)
    assert "data.test.path" not in settings

    assert f"5 ({at('max_steps')})" in cli("explain", "max_steps", path).out
    assert f"data.train[0].weight: 2 ({at('weight')})" in cli("explain", "weight", path).out
    assert "the config has no such entry" in cli("explain", "data.test.path", path).out
    listed = cli("explain", "training", path).out.splitlines()[1:]
    given = [line.split()[0] for line in listed if "(the default)" not in line]
    assert sorted(given) == sorted(f"training.{name}" for name in yaml.safe_load(path.read_text())["training"])


@pytest.mark.parametrize(
    ("objective", "beta", "used"),
    [
        ("sft", "not read by sft", []),
        ("dpo", "0.1 with dpo", ["beta", "label_smoothing", "sft_weight"]),
        ("simpo", "2 with simpo", ["beta", "label_smoothing", "simpo_gamma", "sft_weight"]),
        ("kto", "0.1 with kto", ["beta", "desirable_weight", "undesirable_weight"]),
    ],
)
def test_settings_that_the_objective_does_not_use_are_marked(
    objective: str, beta: str, used: list[str], cli: Cli, run_config: MakeConfig
) -> None:
    path = run_config(training={"objective": objective})
    found = [(key, is_used) for key, _, _, _, is_used in in_force(cli("explain", "preferences", path, "--json"))]
    assert [key.removeprefix("preferences.") for key, is_used in found if is_used] == used and len(found) == 6
    assert f"null (the default); {beta}\n" in cli("explain", "preferences.beta", path).out


def test_json_output_is_an_object_keyed_by_path(cli: Cli) -> None:
    everything = json.loads(cli("explain", "--json").out)
    assert everything["config"] is None
    assert list(everything["keys"]) == [place for key in KEYS for place in key.places]
    one = json.loads(cli("explain", "data.train.weight", "--json").out)["keys"]
    assert list(one) == ["data.train.weight"] and one["data.train.weight"]["required"] is False
    assert one["data.train.weight"] == everything["keys"]["data.train.weight"]


def test_problems_of_the_config_are_reported(cli: Cli, run_config: MakeConfig) -> None:
    path = run_config(lora={"rank": 8})
    line = path.read_text().splitlines().index("  rank: 8") + 1
    check_refused(cli("explain", "r", path), 2, (Code.CONFIG_UNKNOWN_KEY, f"{path}:{line}", "lora.rank"))
    check_refused(cli("explain", path, "r"), 2, (Code.CONFIG_UNKNOWN_KEY, f"{path}:{line}", "lora.rank"))
    check_refused(cli("explain", "r", "--set", "lora.r=4"), 2, (Code.USAGE_CONFLICT, "", "--set"))
