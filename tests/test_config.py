"""The config: every problem of a YAML file is reported with its line, key and fix, before any file is written."""

import resource
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Expected, Ran, check_refused, process, tree
from pydantic import ValidationError

from loratune import config
from loratune.codes import Code
from loratune.config import DataSection, LoraSection, ModelSection, RunConfig, Source, TrainingSection
from loratune.config.keys import dotted, known_keys
from loratune.config.yaml_files import OVERRIDES
from loratune.errors import ConfigError, Problem

SECTIONS = (RunConfig, ModelSection, LoraSection, DataSection, TrainingSection, Source)
SOUND = """\
model: {name_or_path: base}
data: {train: rows.jsonl}
output_dir: out
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    """Loads YAML text (or bytes) with `--set` assignments."""

    def run(text: str | bytes, *assignments: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load(path, assignments)

    return run


@pytest.fixture
def problems(load: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., list[Problem]]:
    """The problems that `load` raises, with FILE as the name of the file."""

    def run(text: str | bytes, *assignments: str) -> list[Problem]:
        with pytest.raises(ConfigError) as caught:
            load(text, *assignments)
        path = str(tmp_path / "run.yaml")
        return [replace(problem, where=problem.where.replace(path, "FILE")) for problem in caught.value.problems]

    return run


def meaning(problem: Problem) -> Expected:
    """Its code, place and key."""
    return problem.code, problem.where, problem.key


def in_section(key: str, value: str) -> str:
    """A valid config, with `section.key` set to `value` in line 5."""
    section, _, name = key.partition(".")
    lines = [line for line in SOUND.splitlines() if not line.startswith(section)] + [f"{section}:"]
    required = {"model": ["  name_or_path: base"], "data": ["  train: rows.jsonl"]}.get(section, [])
    lines += [line for line in required if not line.startswith(f"  {name}:")]
    lines = ["# padding"] * (4 - len(lines)) + lines
    return "\n".join([*lines, f"  {name}: {value}", ""])


def value_at(run: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return run.model_dump()[section][name]


# Not a YAML mapping at all


@pytest.mark.parametrize(
    "text, code, where, what",
    [
        ("model:\n\tname_or_path: x\n", Code.CONFIG_SYNTAX, "FILE:2:1", "found character '\\t'"),
        ("model: [a, b\n", Code.CONFIG_SYNTAX, "FILE:2:1", "expected ',' or ']'"),
        ("model: {a: b\ndata: c\n", Code.CONFIG_SYNTAX, "FILE:2:5", "expected ',' or '}'"),
        ("model: 'a\n", Code.CONFIG_SYNTAX, "FILE:2:1", "found unexpected end of stream"),
        ("model: a: b\n", Code.CONFIG_SYNTAX, "FILE:1:9", "mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", Code.CONFIG_SYNTAX, "FILE:2:1", "but found another document"),
        ("a: 1\nb: \x07\n", Code.CONFIG_SYNTAX, "FILE:2", "U+0007"),
        (bytes(100), Code.CONFIG_SYNTAX, "FILE:1", "U+0000"),
        ("", Code.CONFIG_UNREADABLE, "FILE", ""),
        ("# nothing yet\n", Code.CONFIG_UNREADABLE, "FILE", ""),
        ("{}", Code.CONFIG_UNREADABLE, "FILE", ""),
        ("null", Code.CONFIG_SYNTAX, "FILE:1", "got nothing"),
        ("# rows\n- a\n", Code.CONFIG_SYNTAX, "FILE:2", "got a list"),
        ("word", Code.CONFIG_SYNTAX, "FILE:1", "got text 'word'"),
        (b"model:\n  name: \xff\n", Code.CONFIG_UNREADABLE, "FILE:2", "byte 15 "),
        (SOUND.encode("utf-16"), Code.CONFIG_UNREADABLE, "FILE:1", "byte 0 "),
        ("? [a, b]\n: c\n", Code.CONFIG_SYNTAX, "FILE:1", ""),
        (SOUND + "<<: {lora: 1}\n", Code.CONFIG_SYNTAX, "FILE:4", "merges"),
        (SOUND + "lora: &a {r: 8}\ntraining: *a\n", Code.CONFIG_SYNTAX, "FILE:5:11", ""),
        (SOUND + 'a: "\\UFFFFFFFF"\n', Code.CONFIG_SYNTAX, "FILE:4:7", "an escape that names no character"),
        (SOUND + 'a: "\\U00110000"\n', Code.CONFIG_SYNTAX, "FILE:4:7", "an escape that names no character"),
        (SOUND + "lora: !mine {r: 8}\n", Code.CONFIG_SYNTAX, "FILE:4:7", "`!mine`"),
        ("output_dir: !!binary b3V0\n", Code.CONFIG_SYNTAX, "FILE:1:13", "`!!binary`"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_refused(
    problems: Callable[..., list[Problem]], text: str | bytes, code: Code, where: str, what: str
) -> None:
    [problem] = problems(text)
    assert meaning(problem) == (code, where, "")
    assert what in problem.what


@pytest.mark.parametrize(
    "text, fix",
    [
        ("model:\n\tname_or_path: x\n", "indent with spaces"),
        ("", "`loratune init` writes a config"),
        ("# rows\n- a\n", "begin with `model:`"),
        (SOUND + "lora: &a {r: 8}\ntraining: *a\n", "write the value out"),
    ],
)
def test_the_fix_of_each_syntax_error(problems: Callable[..., list[Problem]], text: str, fix: str) -> None:
    assert [problem.fix for problem in problems(text)] == [fix]


def test_a_missing_file_or_a_directory_is_refused(tmp_path: Path) -> None:
    for path, code, what in [
        (tmp_path / "absent.yaml", Code.CONFIG_UNREADABLE, "No such file or directory"),
        (tmp_path, Code.CONFIG_UNREADABLE, "a directory"),
        (tmp_path / "absent" / "run.yaml", Code.CONFIG_UNREADABLE, "No such file or directory"),
        (Path("/dev/zero"), Code.CONFIG_UNREADABLE, "256 KiB"),
    ]:
        with pytest.raises(ConfigError) as caught:
            config.load(path)
        [problem] = caught.value.problems
        assert meaning(problem) == (code, str(path), "") and what in problem.what


def test_byte_order_mark_and_crlf_are_accepted(load: Callable[..., RunConfig]) -> None:
    assert load(b"\xef\xbb\xbf" + SOUND.replace("\n", "\r\n").encode()) == load(SOUND)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: "x" * (100 << 20), (Code.CONFIG_UNREADABLE, "FILE", "")),
        (lambda: BOMB, (Code.CONFIG_SYNTAX, "FILE:2:8", "")),
        (lambda: "a: &a [*a]\n", (Code.CONFIG_SYNTAX, "FILE:1:8", "")),
        (lambda: "[" * 200_000, (Code.CONFIG_SYNTAX, "FILE:1:34", "")),
        (lambda: "{a: " * 50_000, (Code.CONFIG_SYNTAX, "FILE:1:130", "")),
        (lambda: "- " * 100_000, (Code.CONFIG_SYNTAX, "FILE:1:67", "")),
        (lambda: "".join(f"k{number}: 1\n" for number in range(20_000)), (Code.CONFIG_MISSING_KEY, "FILE", "model")),
        (lambda: "k: 1\n" * 20_000, (Code.CONFIG_SYNTAX, "FILE:2", "k")),
        (lambda: SOUND + "lora: {r: " + "x" * 200_000 + "}", (Code.CONFIG_BAD_VALUE, "FILE:4", "lora.r")),
    ],
    ids=["100MB", "aliases", "loop", "brackets", "braces", "dashes", "keys", "duplicates", "long"],
)
def test_malicious_files_take_little_time_and_memory(
    problems: Callable[..., list[Problem]], make: Callable[[], str], expected: Expected
) -> None:
    text = make()
    before = resource.getrusage(resource.RUSAGE_SELF)
    refused = problems(text)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert meaning(refused[0]) == expected
    assert sum(len(str(problem)) for problem in refused) < 10_000
    assert after.ru_utime - before.ru_utime < 20  # seconds of processor time, whatever else the machine does
    assert after.ru_maxrss - before.ru_maxrss < 300 << 10  # KiB


def test_only_the_first_twenty_problems_are_listed_and_the_rest_counted(problems: Callable[..., list[Problem]]) -> None:
    text = SOUND + "".join(f"k{number}: 1\n" for number in range(1234))
    for last in (problems(text)[-1], problems("".join(["k: 1\n"] * 1235))[-1]):
        assert last.code == Code.MORE_PROBLEMS and "1,214" in last.what


@pytest.mark.parametrize("where", ["model: ", "output_dir: ", "model: {name_or_path: base, revision: ", ""])
@pytest.mark.parametrize("call", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_python_tags_are_not_executed(
    problems: Callable[..., list[Problem]], tmp_path: Path, where: str, call: str
) -> None:
    target = tmp_path / "executed"
    [problem] = problems(f"{where}{call} ['touch {target}']" + "}" * where.count("{") + "\n")
    assert meaning(problem) == (Code.CONFIG_SYNTAX, f"FILE:1:{len(where) + 1}", "") and f"`{call}`" in problem.what
    assert not target.exists()


# Unknown keys


@pytest.mark.parametrize(
    "text, where, key, fix",
    [
        (in_section("lora.lora_alhpa", "16"), "FILE:5", "lora.lora_alhpa", "did you mean `lora_alpha`?"),
        (in_section("training.cutoff_len", "1"), "FILE:5", "training.cutoff_len", "did you mean `data.max_length`?"),
        (SOUND + "lr: 1\n", "FILE:4", "lr", "did you mean `training.learning_rate`?"),
        (in_section("training.lr", "1"), "FILE:5", "training.lr", "did you mean `training.learning_rate`?"),
        (in_section("lora.learning_rate", "1"), "FILE:5", "lora.learning_rate", "did you mean `training.learning_rate"),
        (in_section("model.load_in_4bit", "true"), "FILE:5", "model.load_in_4bit", "did you mean `model.quantization`"),
        (in_section("data.train", "{path: a, splt: b}"), "FILE:5", "data.train.splt", "did you mean `split`?"),
        (in_section("data.validation", "{path: a, s: b}"), "FILE:5", "data.validation.s", "known here: path, "),
        (SOUND + "outputdir: x\n", "FILE:4", "outputdir", "did you mean `output_dir`?"),
        (
            SOUND + "str: x\n",
            "FILE:4",
            "str",
            "known here: model, lora, data, training, preferences, retention, output",
        ),
        (SOUND + "'x[0]': x\n", "FILE:4", "x[0]", "known here: model"),
        (SOUND + "1: x\n", "FILE:4", "1", "known here: model"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(
    problems: Callable[..., list[Problem]], text: str, where: str, key: str, fix: str
) -> None:
    [problem] = problems(text)
    assert meaning(problem) == (Code.CONFIG_UNKNOWN_KEY, where, key)
    assert problem.fix.startswith(fix)


def slips(word: str) -> Iterator[str]:
    """Every deletion, substitution, swap of neighbors and insertion of one letter."""
    letters = string.ascii_lowercase + "_"
    for place in range(len(word) + 1):
        head, tail = word[:place], word[place:]
        yield from (head + letter + tail for letter in letters)
        if tail:
            yield head + tail[1:]
            yield from (head + letter + tail[1:] for letter in letters)
        if len(tail) > 1:
            yield head + tail[1] + tail[0] + tail[2:]


def nested(path: tuple[Any, ...]) -> dict[str, Any]:
    """A valid config in which the key at `path` has the value 1."""
    values: dict[str, Any] = {"model": {"name_or_path": "base"}, "data": {"train": {"path": "a"}}, "output_dir": "out"}
    below = values
    for part in path[:-1]:
        below = below.setdefault(part, {})
    below[path[-1]] = 1
    return values


def unknown(values: dict[str, Any]) -> set[str]:
    """The keys that are refused as unknown."""
    try:
        RunConfig.model_validate(values)
    except ValidationError as error:
        return {str(details["loc"][-1]) for details in error.errors() if details["type"] == "extra_forbidden"}
    return set()


@pytest.mark.parametrize("path", sorted(known_keys()), ids=dotted)
def test_every_typo_in_every_key_is_reported(path: tuple[Any, ...]) -> None:
    assert unknown(nested(path)) == set()
    siblings = {key[-1] for key in known_keys() if key[:-1] == path[:-1]}
    wrong = set(slips(str(path[-1]))) - siblings - {""}
    assert len(wrong) > 50
    assert [slip for slip in wrong if slip not in unknown(nested((*path[:-1], slip)))] == []


@pytest.mark.parametrize("path", [key for key in known_keys() if len(key) == 2 and len(str(key[1])) > 4], ids=dotted)
def test_a_key_with_a_missing_letter_suggests_the_right_one(
    problems: Callable[..., list[Problem]], path: tuple[str, str]
) -> None:
    slip = path[1][:2] + path[1][3:]
    fixes = {meaning(problem): problem.fix for problem in problems(in_section(f"{path[0]}.{slip}", "1"))}
    assert fixes[Code.CONFIG_UNKNOWN_KEY, "FILE:5", f"{path[0]}.{slip}"] == f"did you mean `{path[1]}`?"


# Duplicates


@pytest.mark.parametrize(
    "text, line, key, lines",
    [
        (SOUND + "output_dir: other\n", 4, "output_dir", "in line 3 and in line 4"),
        (SOUND + "lora:\n  r: 8\n  r: 8\n", 6, "lora.r", "in line 5 and in line 6"),
        (SOUND + "lora: {r: 4}\nlora: {r: 8}\n", 5, "lora", "in line 4 and in line 5"),
        (SOUND + "lora: {r: 8, 'r': 8}\n", 4, "lora.r", "in line 4 and in line 4"),
    ],
)
def test_a_duplicate_key_is_reported_with_both_lines(
    problems: Callable[..., list[Problem]], text: str, line: int, key: str, lines: str
) -> None:
    [problem] = problems(text)
    assert meaning(problem) == (Code.CONFIG_SYNTAX, f"FILE:{line}", key)
    assert problem.what.endswith(lines) and problem.fix == "keep one"


# Values


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("training.learning_rate", "1e-4", 0.0001),
        ("training.learning_rate", "1E-4", 0.0001),
        ("training.learning_rate", ".5", 0.5),
        ("training.learning_rate", "2.e-3", 0.002),
        ("training.learning_rate", "1", 1.0),
        ("training.num_train_epochs", "3", 3.0),
        ("training.warmup_steps", "0.1", 0.1),
        ("training.activation_checkpointing", "true", True),
        ("training.eval_steps", "null", None),
        ("training.eval_steps", "~", None),
        ("model.revision", "'010'", "010"),
        ("model.revision", '"no"', "no"),
        ("model.revision", "1.2.3", "1.2.3"),
        ("model.revision", "2024-01-01", "2024-01-01"),
        ("lora.target_modules", "all-linear", "all-linear"),
        ("lora.init_lora_weights", "gaussian", "gaussian"),
        ("data.validation", "0.1", 0.1),
        ("data.validation", "held.jsonl", {"path": "held.jsonl", "split": None, "weight": None}),
        (
            "data.train",
            "{path: a.jsonl, split: 'train[:10]'}",
            {"path": "a.jsonl", "split": "train[:10]", "weight": None},
        ),
        (
            "data.train",
            "[{path: a.jsonl, weight: 1}, {path: 'b/*.csv', weight: 2}]",
            [{"path": "a.jsonl", "split": None, "weight": 1.0}, {"path": "b/*.csv", "split": None, "weight": 2.0}],
        ),
    ],
)
def test_values_are_read_as_intended(load: Callable[..., RunConfig], key: str, text: str, value: Any) -> None:
    value_read = value_at(load(in_section(key, text)), key)
    assert value_read == value
    assert type(value_read) is type(value)


@pytest.mark.parametrize(
    "key, text, what",
    [
        ("lora.r", "eight", "expected a whole number or 'auto', got text 'eight'"),
        ("lora.r", "true", "expected a whole number or 'auto', got true/false True"),
        ("lora.r", "8.5", "expected a whole number or 'auto', got a number 8.5"),
        ("lora.r", "[8]", "expected a whole number or 'auto', got a list"),
        ("lora.r", "", "expected a whole number or 'auto', got nothing"),
        ("lora.r", "0", "must be greater than 0, got a number 0"),
        ("retention.num_samples", "2147483647", "must be less than or equal to 10000"),
        ("data.replay", "0.9999999999", "must be less than or equal to 0.99"),
        ("lora.lora_alpha", "-16", "must be greater than 0, got a number -16"),
        ("lora.lora_dropout", "1.0", "must be less than 1, got a number 1.0"),
        ("lora.lora_dropout", "-0.1", "must be greater than or equal to 0, got a number -0.1"),
        ("lora.lora_dropout", ".nan", "must be a finite number, got a number nan"),
        ("lora.use_dora", "1", "expected true or false, got a number 1"),
        ("lora.bias", "lora", "expected 'none', 'all' or 'lora_only', got text 'lora'"),
        ("lora.target_modules", "3", "expected a list or text, got a number 3"),
        ("lora.target_modules", "[]", "must not be empty"),
        ("lora.target_modules", "''", "must not be empty"),
        ("lora.layers_to_transform", "[]", "must not be empty"),
        ("lora.init_lora_weights", "pisa", "expected 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_4', "),
        ("lora.init_lora_weights", "false", "false starts from a random update"),
        ("training.learning_rate", "-1", "must be greater than 0, got a number -1"),
        ("training.learning_rate", "nan", "expected a number or 'auto', got text 'nan'"),
        ("training.learning_rate", "-.INF", "must be a finite number, got a number -inf"),
        ("training.learning_rate", "1e400", "must be a finite number, got a number inf"),
        ("training.learning_rate", "1_000", "expected a number or 'auto', got text '1_000'"),
        ("training.learning_rate", "'1e-4'", "expected a number or 'auto', got text '1e-4'"),
        ("training.max_steps", "0", "0 steps train nothing"),
        ("training.seed", "4294967296", "must be less than 4294967296, got a number 4294967296"),
        ("training.optim", "adamw", "expected 'adamw_torch', "),
        ("model.dtype", "fp16", "expected 'auto', 'float32', 'bfloat16' or 'float16', got text 'fp16'"),
        ("model.name_or_path", "''", "must not be empty"),
        ("model.revision", "1.5", "expected text, got a number 1.5"),
        ("data.validation", "0", "a fraction must lie between 0 and 1"),
        ("data.validation", "1.5", "a fraction must lie between 0 and 1"),
        ("data.validation", "true", "expected a section or a list or a number, got true/false True"),
        ("data.columns", "[prompt]", "expected a mapping, got a list"),
        ("data.max_length", "1", "must be greater than or equal to 2, got a number 1"),
    ],
)
def test_a_wrong_value_is_reported_with_line_key_and_expectation(
    problems: Callable[..., list[Problem]], key: str, text: str, what: str
) -> None:
    [problem] = problems(in_section(key, text))
    assert meaning(problem) == (Code.CONFIG_BAD_VALUE, "FILE:5", key)
    assert problem.what.startswith(what)


def test_values_that_yaml_parsers_disagree_on_are_refused(problems: Callable[..., list[Problem]]) -> None:
    for key in ("lora.r", "training.learning_rate", "model.revision", "training.activation_checkpointing"):
        for text in ("010", "12:30", "no", "On", "y", "0x1F", "0b11", "1:2:3", "-010"):
            [problem] = problems(in_section(key, text))
            assert meaning(problem) == (Code.CONFIG_SYNTAX, "FILE:5", key)
            assert problem.what.startswith(f"`{text}`")


def test_the_nearest_choice_is_suggested(problems: Callable[..., list[Problem]]) -> None:
    [problem] = problems(in_section("model.dtype", "bfloat"))
    assert problem.fix == "did you mean `bfloat16`?"
    [problem] = problems(in_section("training.learning_rate", "AUTO"))
    assert problem.fix == "did you mean `auto`?"
    [problem] = problems(in_section("training.lr_scheduler_type", "null"))
    assert not problem.fix, "nothing is like no choice"
    [problem] = problems(in_section("lora.r", "010"))
    assert problem.fix.startswith("quote it if text is meant")


@pytest.mark.parametrize(
    ("lines", "place", "what"),
    [
        (
            ["  name_or_path: a", "   dtype: auto"],
            3,
            "line 3 is indented deeper than line 2, which has a value already",
        ),
        (["  name_or_path: a", "", "  # dtype", "    dtype: auto"], 5, "line 5 is indented deeper than line 2"),
        (["  name_or_path: a", " dtype: auto"], 3, "line 3 is indented less than line 2, and not as any line above it"),
        (["  name_or_path: [a", "   dtype: auto"], 3, "invalid or unsupported YAML"),
    ],
)
def test_wrong_indentation_is_said(tmp_path: Path, lines: list[str], place: int, what: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\n".join(["model:", *lines, "output_dir: o", ""]))
    with pytest.raises(ConfigError) as raised:
        config.load(path)
    [problem] = raised.value.problems
    assert problem.where.startswith(f"{path}:{place}") and problem.what.startswith(what), problem


def test_an_unindented_key_belongs_under_the_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  name_or_path: a\ndata:\ntrain: rows.jsonl\noutput_dir: o\n")
    with pytest.raises(ConfigError) as raised:
        config.load(path)
    assert [problem.fix for problem in raised.value.problems if problem.key == "train"] == ["indent it under `data:`"]


@pytest.mark.parametrize(
    "key, text, code, item, what",
    [
        ("lora.target_modules", "[q, 5]", Code.CONFIG_BAD_VALUE, "[1]", "expected text, got a number 5"),
        ("lora.layers_to_transform", "[0, 1, -1]", Code.CONFIG_BAD_VALUE, "[2]", "must be greater than or equal to"),
        ("data.columns", "{prompt: 5}", Code.CONFIG_BAD_VALUE, ".prompt", "expected text, got a number 5"),
    ],
)
def test_an_invalid_item_is_reported_by_its_position(
    problems: Callable[..., list[Problem]], key: str, text: str, code: Code, item: str, what: str
) -> None:
    [problem] = problems(in_section(key, text))
    assert meaning(problem) == (code, "FILE:5", key + item)
    assert problem.what.startswith(what)


@pytest.mark.parametrize("section, got", [("", "nothing"), ("[]", "a list"), ("x", "text 'x'")])
def test_a_section_must_be_a_mapping(problems: Callable[..., list[Problem]], section: str, got: str) -> None:
    [problem] = problems(SOUND + f"lora: {section}\n")
    assert meaning(problem) == (Code.CONFIG_BAD_VALUE, "FILE:4", "lora")
    assert problem.what == f"expected a section, got {got}"


def test_all_problems_are_reported_at_once(problems: Callable[..., list[Problem]]) -> None:
    refused = problems("model: {dtype: auto}\nlora: {r: 0, q: 1}\ntraining:\n  learning_rate: fast\n")
    assert [meaning(problem) for problem in refused] == [
        (Code.CONFIG_MISSING_KEY, "FILE:1", "model.name_or_path"),
        (Code.CONFIG_BAD_VALUE, "FILE:2", "lora.r"),
        (Code.CONFIG_UNKNOWN_KEY, "FILE:2", "lora.q"),
        (Code.CONFIG_MISSING_KEY, "FILE", "data"),
        (Code.CONFIG_BAD_VALUE, "FILE:4", "training.learning_rate"),
        (Code.CONFIG_MISSING_KEY, "FILE", "output_dir"),
    ]
    assert "got a number 0" in refused[1].what and "got text 'fast'" in refused[4].what
    assert refused[2].fix == f"known here: {', '.join(LoraSection.model_fields)}"


# Contradictions


@pytest.mark.parametrize(
    "section, first, second, code",
    [
        ("training", "max_steps: 5", "num_train_epochs: 2", Code.CONFIG_CONFLICT),
        ("training", "warmup_steps: 6", "max_steps: 5", Code.CONFIG_CONFLICT),
        ("training", "lr_scheduler_type: constant", "warmup_steps: 5", Code.CONFIG_CONFLICT),
        ("data", "format: text", "chat_template: a.jinja", Code.CONFIG_CONFLICT),
    ],
)
def test_a_contradiction_is_reported_with_both_keys(
    problems: Callable[..., list[Problem]],
    load: Callable[..., RunConfig],
    section: str,
    first: str,
    second: str,
    code: Code,
) -> None:
    base = "# rows\n" + SOUND if section != "data" else "model: {name_or_path: b}\noutput_dir: o\n# rows\n"
    start = f"{base}{section}:\n" + ("  train: rows.jsonl\n" if section == "data" else "")
    line = start.count("\n") + 1
    keys = " and ".join(f"{section}.{entry.partition(':')[0]}" for entry in (first, second))
    refused = problems(f"{start}  {first}\n  {second}\n")
    assert [meaning(problem) for problem in refused] == [(code, f"FILE:{line}", keys)]
    load(f"{start}  {first}\n")
    load(f"{start}  {second}\n")


@pytest.mark.parametrize(
    "key, value, other, code",
    [
        ("training.eval_steps", "5", "data.validation", Code.CONFIG_CONFLICT),
        ("model.trust_remote_code", "true", "model.revision", Code.CONFIG_CONFLICT),
    ],
)
def test_a_key_that_requires_another_is_refused_without_it(
    problems: Callable[..., list[Problem]], load: Callable[..., RunConfig], key: str, value: str, other: str, code: Code
) -> None:
    refused = problems(in_section(key, value))
    assert [meaning(problem) for problem in refused] == [(code, "FILE:5", f"{key} and {other}")]
    load(in_section(key, value), f"{other}=held.jsonl")


def test_a_warmup_above_one_is_a_number_of_steps(
    problems: Callable[..., list[Problem]], load: Callable[..., RunConfig]
) -> None:
    refused = problems(in_section("training.warmup_steps", "1.5"))
    assert [meaning(problem) for problem in refused] == [(Code.CONFIG_BAD_VALUE, "FILE:5", "training.warmup_steps")]
    assert load(in_section("training.warmup_steps", "10")).training.warmup_steps == 10


# --set


@pytest.mark.parametrize(
    "assignment, key, value",
    [
        ("training.learning_rate=1e-4", "training.learning_rate", 0.0001),
        ("lora.target_modules=[q, v]", "lora.target_modules", ["q", "v"]),
        ("lora.r = 4", "lora.r", 4),
        ("model.revision='010'", "model.revision", "010"),
        ("model.revision=a=b", "model.revision", "a=b"),
        ("data.train.split=train[:5]", "data.train", {"path": "rows.jsonl", "split": "train[:5]", "weight": None}),
        ("data={train: other.jsonl}", "data.train", {"path": "other.jsonl", "split": None, "weight": None}),
    ],
)
def test_set_values_are_parsed_like_the_file(
    load: Callable[..., RunConfig], assignment: str, key: str, value: Any
) -> None:
    text = SOUND.replace("rows.jsonl", "{path: rows.jsonl}") + "lora: {r: 8}\n"
    assert value_at(load(text, assignment), key) == value


def test_the_last_set_of_a_key_wins(load: Callable[..., RunConfig]) -> None:
    assert load(SOUND, "lora.r=4", "lora={r: 2}", "lora.r=16").lora.r == 16
    assert load(SOUND, "lora.r=4", "lora.lora_alpha=5").lora.r == 4


@pytest.mark.parametrize(
    "assignment, code, key, detail",
    [
        ("lora.r=eight", Code.CONFIG_BAD_VALUE, "lora.r", "expected a whole number or 'auto', got text 'eight'"),
        ("lora.r=null", Code.CONFIG_BAD_VALUE, "lora.r", "expected a whole number or 'auto', got nothing"),
        ("lora.alhpa=", Code.CONFIG_SYNTAX, "lora.alhpa", ""),
        ("lora.lora_alhpa=8", Code.CONFIG_UNKNOWN_KEY, "lora.lora_alhpa", "did you mean `lora_alpha`?"),
        ("lor.r=8", Code.CONFIG_UNKNOWN_KEY, "lor", "did you mean `lora`?"),
        ("trainng.learning_rate=1", Code.CONFIG_UNKNOWN_KEY, "trainng", "did you mean `training`?"),
        ("lora={r: 0}", Code.CONFIG_BAD_VALUE, "lora.r", "must be greater than 0, got a number 0"),
        ("lora.r=010", Code.CONFIG_SYNTAX, "lora.r", "`010`"),
        ("data={train: a, format: no}", Code.CONFIG_SYNTAX, "data.format", "`no`"),
        ("lora.r=[", Code.CONFIG_SYNTAX, "lora.r", ""),
        ("lora.r=8\nlora_alpha: 3", Code.CONFIG_SYNTAX, "lora.r", "one value"),
        ("lora.r=!!python/name:os.system", Code.CONFIG_SYNTAX, "lora.r", "`!!python/name:os.system`"),
        ("lora", Code.CONFIG_SYNTAX, "", "`lora` is not of the form section.key=value"),
        ("=8", Code.CONFIG_SYNTAX, "", "`=8` is not of the form section.key=value"),
        ("lora..r=8", Code.CONFIG_SYNTAX, "", "`lora..r=8` is not of the form section.key=value"),
        ("output_dir.x=8", Code.CONFIG_SYNTAX, "output_dir.x", "`output_dir` is text 'out', not a section"),
    ],
)
def test_an_invalid_assignment_is_reported_as_an_assignment(
    problems: Callable[..., list[Problem]], assignment: str, code: Code, key: str, detail: str
) -> None:
    [problem] = problems(SOUND + "lora: {r: 8}\n", assignment)
    assert meaning(problem) == (code, OVERRIDES, key)
    assert detail in f"{problem.what}; {problem.fix}"


def test_a_key_missing_after_assignments_is_reported_in_the_file(problems: Callable[..., list[Problem]]) -> None:
    [problem] = problems("data: {train: a}\noutput_dir: out\n", "model.dtype=float32")
    assert meaning(problem) == (Code.CONFIG_MISSING_KEY, "FILE", "model.name_or_path")


# dump


@pytest.mark.parametrize(
    "text",
    [
        SOUND,
        SOUND + "training: {max_steps: 7, warmup_steps: 0.1, learning_rate: 1e-7}\n",
        SOUND + "training: {num_train_epochs: 1e8}\nlora: {target_modules: all-linear, layers_to_transform: [0, 1]}\n",
        SOUND + "lora: {init_lora_weights: gaussian}\n",
        SOUND + "lora: {rank_pattern: {q: 16, 'layers\\.1\\..*': 4}, alpha_pattern: {'010': 4}, use_lorafa: true}\n",
        "model: {name_or_path: base, revision: main, trust_remote_code: true}\noutput_dir: out\n"
        "data: {train: {path: a, split: 'train[:5]'}, validation: 0.25, columns: {prompt: 'ü: #'}}\n",
    ],
)
def test_a_dumped_config_loads_equal(load: Callable[..., RunConfig], text: str) -> None:
    run = load(text)
    assert load(config.dump(run)) == run
    assert load(config.dump(run)).training.max_steps == run.training.max_steps


@pytest.mark.parametrize(
    "name",
    ["no", "y", "010", "12:30", "1e-4", "1", "null", "~", ".inf", "true", "0x1f", " a ", "a: b", "#", "a\nb", "*a",
     "!x", "\u00fc\u4e2d", "\x85", "\U0001f600", "/".join(["x" * 100] * 5)],
)  # fmt: skip
def test_text_is_unchanged_by_dump_and_load(load: Callable[..., RunConfig], name: str) -> None:
    run = load(SOUND).model_copy(update={"output_dir": name})
    assert load(config.dump(run)) == run


# The sections


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_small_described_frozen_and_strict(section: type[config.ModelSection]) -> None:
    fields = section.model_fields
    assert 0 < len(fields) <= 23
    if section is not RunConfig:
        assert [name for name, field in fields.items() if not field.description] == []
    instance = section.model_construct()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(instance, next(iter(fields)), None)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        section.model_validate({"nobody_knows_me": 1})


# On the command line


def test_a_problem_is_printed_as_one_line(cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Place, key, what is wrong, code, and what to do."""
    path = tmp_path / "run.yaml"
    path.write_text(in_section("lora.bais", "all"))
    line = f"error[config.unknown_key]: {path}:5: lora.bais: unknown key; did you mean `bias`?\n"
    assert cli("train", path) == Ran(2, "", line)


@pytest.mark.parametrize(
    "text, code, line, key",
    [
        ("model:\n\tname: x\n", Code.CONFIG_SYNTAX, ":2:1", ""),
        (in_section("lora.bais", "all"), Code.CONFIG_UNKNOWN_KEY, ":5", "lora.bais"),
        (in_section("lora.r", "eight"), Code.CONFIG_BAD_VALUE, ":5", "lora.r"),
        (SOUND + "output_dir: x\n", Code.CONFIG_SYNTAX, ":4", "output_dir"),
        ("", Code.CONFIG_UNREADABLE, "", ""),
        ("a: \x07\n", Code.CONFIG_SYNTAX, ":1", ""),
    ],
)
def test_command_line_prints_the_problem(
    cli: Callable[..., Ran], tmp_path: Path, text: str, code: Code, line: str, key: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    before = tree(tmp_path)
    for ran in (cli("train", path), cli("params", path)):
        check_refused(ran, 2, (code, f"{path}{line}", key))
        assert ran.out == "" and ran.err.count("\n") == 1
    assert tree(tmp_path) == before


def test_command_line_prints_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SOUND)
    ran = process("train", path, "--set", "lora.r=0", "--set", "lora.lora_alpha=-1")
    expected = [(Code.CONFIG_BAD_VALUE, "--set", key) for key in ("lora.r", "lora.lora_alpha")]
    check_refused(ran, 2, *expected)
    assert "got a number 0" in ran.errors[0] and "got a number -1" in ran.errors[1]
    assert ran.err.count("\n") == 2


def test_set_without_a_value_removes_the_key(run_config: Callable[..., Path]) -> None:
    path = run_config(training={"num_train_epochs": 3})
    run = config.load(path, ["training.max_steps=5", "training.num_train_epochs="])
    assert (run.training.max_steps, run.training.num_train_epochs) == (5, "auto")


@pytest.mark.parametrize(
    "section, code, key, name",
    [
        ({"lora": {"target_modules": "(unclosed"}}, Code.CONFIG_BAD_VALUE, "lora.target_modules", "`(unclosed`"),
        ({"data": {"columns": {"promt": "question"}}}, Code.CONFIG_BAD_VALUE, "data.columns", "`promt`"),
        ({"data": {"labels": {" ": "b"}}}, Code.CONFIG_BAD_VALUE, "data.labels. ", ""),
        ({"data": {"labels": {"a": "b", "b": "c"}}}, Code.CONFIG_BAD_VALUE, "data.labels", "`b` is replaced as well"),
    ],
)
def test_settings_that_libraries_would_refuse_late_are_refused_early(
    run_config: Callable[..., Path], section: dict[str, Any], code: Code, key: str, name: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(run_config(**section))
    [problem] = caught.value.problems
    assert (problem.code, problem.key) == (code, key) and name in problem.what
