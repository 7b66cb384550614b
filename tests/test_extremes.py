"""Values of the right type that cannot work are refused with their key, before anything is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Ran, check_refused

from loratune import config
from loratune.codes import Code
from loratune.config.keys import known_keys
from loratune.errors import ConfigError, Problem
from loratune.system.files import path_problem

MakeConfig = Callable[..., Path]
Cli = Callable[..., Ran]
NUMBERS = [10**30, -(10**30), 2**63, 2**31, 1e308, -1e308, 1e-320, -1]
PATHS = ["~nobody-of-this-name/x", "a\0b", "x" * 5000, "y/" + "é" * 200, "\ud800"]
FILES = ["model.name_or_path", "model.gguf_file", "data.train", "data.validation", "data.chat_template", "output_dir"]


def refused(values: dict[str, object], path: Path) -> tuple[Problem, ...]:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    return caught.value.problems


def test_extreme_numbers_are_accepted_or_refused_with_their_key(run_config: MakeConfig, tmp_path: Path) -> None:
    """Accepted numbers are finite and fit in 64-bit integers; others are refused with a documented error."""
    base = yaml.safe_load(run_config().read_text())
    checked = 0
    for section, *rest in known_keys():
        if len(rest) != 1 or section not in ("model", "lora", "data", "training"):
            continue
        if rest == ["chat_template_kwargs"]:  # any JSON value
            continue
        for number in NUMBERS:
            for value in (number, [number], {"q": number}):
                values = base | {section: base.get(section, {}) | {rest[0]: value}}
                path = tmp_path / "extreme.yaml"
                path.write_text(yaml.safe_dump(values))
                try:
                    run = config.load(path)
                except ConfigError as error:
                    assert all(str(rest[0]) in problem.key for problem in error.problems), str(error)
                else:
                    loaded = run.model_dump()[section][rest[0]]
                    assert abs(number) <= 1e30 and (not isinstance(loaded, int) or abs(loaded) < 2**32), rest
                checked += 1
    assert checked > 1000


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path[:9]))
@pytest.mark.parametrize("key", FILES)
def test_invalid_paths_are_refused(key: str, path: str, run_config: MakeConfig, tmp_path: Path) -> None:
    values = yaml.safe_load(run_config().read_text())
    section, _, name = key.partition(".")
    if name:
        values[section][name] = path
    else:
        values[section] = path
    [problem] = refused(values, tmp_path / "bad.yaml")
    assert problem.code == Code.CONFIG_BAD_VALUE and problem.key.removesuffix(".path") == key


@pytest.mark.parametrize("path", ["~", "a/b", "x" * 255, "é" * 127, "data/*.jsonl", "org/name", "/", "~/x"])
def test_valid_paths_are_accepted(path: str) -> None:
    assert path_problem(path) == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "1e-300"], ["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "1e308"],
        ["--max-new-tokens", "1" + "0" * 30], ["--input", "~nobody-of-this-name/x"], ["--output", "x" * 5000],
        ["--input", "é" * 200],
    ],
    ids=lambda words: " ".join(words)[:30],
)  # fmt: skip
def test_extreme_options_of_generate_are_refused(arguments: list[str], cli: Cli) -> None:
    ran = cli("generate", "--adapter", "x", *arguments, "hello")
    assert ran.code == 2 and arguments[0] in ran.err and ran.out == "", ran.err


def test_invalid_paths_are_refused_by_all_commands(cli: Cli) -> None:
    long = "x" * 5000
    assert cli("params", "--adapter", long).code == 2
    assert cli("evaluate", "--adapter", "x", "--data", long).code == 2
    check_refused(cli("evaluate", "--adapter", "x", "--data", ""), 2, (Code.USAGE_BAD_VALUE, "", "--data"))
    assert cli("train", long).code == 2
