"""The config: every fault of a YAML file is told with its line, its key and what to do, before anything is touched."""

import re
import resource
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, process, tree
from pydantic import ValidationError

from loratune import config
from loratune.config import DataSection, LoraSection, ModelSection, RunConfig, Source, TrainingSection
from loratune.config.messages import known_keys
from loratune.config.yaml_reader import dotted
from loratune.errors import ConfigError

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
def problems(load: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """What `load` complains of, one line each, the file called FILE."""

    def run(text: str | bytes, *assignments: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *assignments)
        return [str(problem).replace(str(tmp_path / "run.yaml"), "FILE") for problem in caught.value.problems]

    return run


def in_section(key: str, value: str) -> str:
    """A sound config, with `section.key` set to `value` in line 5."""
    section, _, name = key.partition(".")
    lines = [line for line in SOUND.splitlines() if not line.startswith(section)] + [f"{section}:"]
    required = {"model": ["  name_or_path: base"], "data": ["  train: rows.jsonl"]}.get(section, [])
    lines += [line for line in required if not line.startswith(f"  {name}:")]
    lines = ["# padding"] * (4 - len(lines)) + lines
    return "\n".join([*lines, f"  {name}: {value}", ""])


def value_at(run: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return run.model_dump()[section][name]


# Rows 1 and 10: not a YAML mapping at all


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model:\n\tname_or_path: x\n", "FILE:2:1: not valid YAML: found character '\\t'"),
        ("model: [a, b\n", "FILE:2:1: not valid YAML: expected ',' or ']'"),
        ("model: {a: b\ndata: c\n", "FILE:2:5: not valid YAML: expected ',' or '}'"),
        ("model: 'a\n", "FILE:2:1: not valid YAML: found unexpected end of stream"),
        ("model: a: b\n", "FILE:1:9: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "FILE:2:1: not valid YAML: but found another document"),
        ("a: 1\nb: \x07\n", "FILE:2: not valid YAML: the control character U+0007"),
        (bytes(100), "FILE:1: not valid YAML: the control character U+0000"),
        ("", "FILE: the file is empty; see configs/ for examples"),
        ("# nothing yet\n", "FILE: the file is empty"),
        ("{}", "FILE: the file is empty"),
        ("null", "FILE:1: expected a mapping of sections, got nothing"),
        ("# rows\n- a\n", "FILE:2: expected a mapping of sections, got a list; begin with `model:`"),
        ("word", "FILE:1: expected a mapping of sections, got text 'word'"),
        (b"model:\n  name: \xff\n", "FILE:2: byte 15 is not UTF-8"),
        (SOUND.encode("utf-16"), "FILE:1: byte 0 is not UTF-8"),
        ("? [a, b]\n: c\n", "FILE:1: keys must be plain words"),
        (SOUND + "<<: {lora: 1}\n", "FILE:4: keys must be plain words; merges are not supported"),
        (SOUND + "lora: &a {r: 8}\ntraining: *a\n", "FILE:5:11: YAML aliases are not supported; write the value out"),
        (SOUND + 'a: "\\UFFFFFFFF"\n', "FILE:4:7: not valid YAML: an escape that names no character"),
        (SOUND + 'a: "\\U00110000"\n', "FILE:4:7: not valid YAML: an escape that names no character"),
        (SOUND + "lora: !mine {r: 8}\n", "FILE:4:7: the YAML tag `!mine` is not supported"),
        ("output_dir: !!binary b3V0\n", "FILE:1:13: the YAML tag `!!binary` is not supported"),
    ],
)
def test_not_a_mapping(problems: Callable[..., list[str]], text: str | bytes, expected: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_a_tab_is_told_how_to_be_mended(problems: Callable[..., list[str]]) -> None:
    assert problems("model:\n\tname_or_path: x\n")[0].endswith("; indent with spaces")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path, what in [
        (tmp_path / "absent.yaml", "cannot be read: No such file or directory"),
        (tmp_path, "this is a directory, not a config file"),
        (tmp_path / "absent" / "run.yaml", "cannot be read: No such file or directory"),
        (Path("/dev/zero"), "larger than 256 KiB, so this is not a config file"),
    ]:
        with pytest.raises(ConfigError) as caught:
            config.load(path)
        assert str(caught.value) == f"{path}: {what}"


def test_byte_order_mark_and_crlf_are_accepted(load: Callable[..., RunConfig]) -> None:
    assert load(b"\xef\xbb\xbf" + SOUND.replace("\n", "\r\n").encode()) == load(SOUND)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: "x" * (100 << 20), "FILE: larger than 256 KiB"),
        (lambda: BOMB, "FILE:2:8: YAML aliases are not supported"),
        (lambda: "a: &a [*a]\n", "FILE:1:8: YAML aliases are not supported"),
        (lambda: "[" * 200_000, "FILE:1:34: nested more than 32 levels deep"),
        (lambda: "{a: " * 50_000, "FILE:1:130: nested more than 32 levels deep"),
        (lambda: "- " * 100_000, "FILE:1:67: nested more than 32 levels deep"),
        (lambda: "".join(f"k{number}: 1\n" for number in range(20_000)), "FILE: model: missing"),
        (lambda: "k: 1\n" * 20_000, "FILE:2: k: written twice, in line 1 and in line 2; keep one"),
        (lambda: SOUND + "lora: {r: " + "x" * 200_000 + "}", "FILE:4: lora.r: expected a whole number, got text 'xxx"),
    ],
    ids=["100MB", "aliases", "loop", "brackets", "braces", "dashes", "keys", "duplicates", "long"],
)
def test_hostile_files_cost_little(problems: Callable[..., list[str]], make: Callable[[], str], expected: str) -> None:
    text = make()
    before = resource.getrusage(resource.RUSAGE_SELF)
    found = problems(text)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert found[0].startswith(expected)
    assert sum(map(len, found)) < 10_000
    assert after.ru_utime - before.ru_utime < 20  # seconds of work, whatever else the machine does
    assert after.ru_maxrss - before.ru_maxrss < 300 << 10  # KiB


def test_problems_beyond_the_first_twenty_are_counted(problems: Callable[..., list[str]]) -> None:
    text = SOUND + "".join(f"k{number}: 1\n" for number in range(1234))
    assert problems(text)[-1] == "and 1,214 more problems"
    assert problems("".join(["k: 1\n"] * 1235))[-1] == "and 1,214 more problems"


@pytest.mark.parametrize("where", ["model: ", "output_dir: ", "model: {name_or_path: base, revision: ", ""])
@pytest.mark.parametrize("call", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_python_tags_run_nothing(problems: Callable[..., list[str]], tmp_path: Path, where: str, call: str) -> None:
    target = tmp_path / "executed"
    found = problems(f"{where}{call} ['touch {target}']" + "}" * where.count("{") + "\n")
    assert found == [f"FILE:1:{len(where) + 1}: the YAML tag `{call}` is not supported"]
    assert not target.exists()


# Row 2: unknown keys


@pytest.mark.parametrize(
    "text, expected",
    [
        (in_section("lora.lora_alhpa", "16"), "FILE:5: lora.lora_alhpa: unknown key; did you mean `lora_alpha`?"),
        (in_section("training.lr", "1"), "FILE:5: training.lr: unknown key; did you mean `training.learning_rate`?"),
        (in_section("lora.learning_rate", "1"), "FILE:5: lora.learning_rate: unknown key; did you mean `training.le"),
        (in_section("model.load_in_4bit", "true"), "FILE:5: model.load_in_4bit: unknown key; did you mean `model.qu"),
        (in_section("data.train", "{path: a, splt: b}"), "FILE:5: data.train.splt: unknown key; did you mean `split`?"),
        (
            in_section("data.validation", "{path: a, s: b}"),
            "FILE:5: data.validation.s: unknown key; known here: path, ",
        ),
        (SOUND + "outputdir: x\n", "FILE:4: outputdir: unknown key; did you mean `output_dir`?"),
        (SOUND + "str: x\n", "FILE:4: str: unknown key; known here: model, lora, data, training, output_dir"),
        (SOUND + "'x[0]': x\n", "FILE:4: x[0]: unknown key; known here: model"),
        (SOUND + "1: x\n", "FILE:4: 1: unknown key; known here: model"),
    ],
)
def test_unknown_key_names_the_nearest(problems: Callable[..., list[str]], text: str, expected: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(expected)


def slips(word: str) -> Iterator[str]:
    """Every deletion, substitution, swap of neighbours and insertion of one letter."""
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
    """A sound config in which the key at `path` stands with the value 1."""
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
        return {str(one["loc"][-1]) for one in error.errors() if one["type"] == "extra_forbidden"}
    return set()


@pytest.mark.parametrize("path", sorted(known_keys()), ids=dotted)
def test_every_slip_in_every_key_is_caught(path: tuple[Any, ...]) -> None:
    assert unknown(nested(path)) == set()
    siblings = {key[-1] for key in known_keys() if key[:-1] == path[:-1]}
    wrong = set(slips(str(path[-1]))) - siblings - {""}
    assert len(wrong) > 50
    assert [slip for slip in wrong if slip not in unknown(nested((*path[:-1], slip)))] == []


@pytest.mark.parametrize("path", [key for key in known_keys() if len(key) == 2 and len(str(key[1])) > 4], ids=dotted)
def test_a_letter_left_out_leads_to_the_key(problems: Callable[..., list[str]], path: tuple[str, str]) -> None:
    slip = path[1][:2] + path[1][3:]
    assert f"FILE:5: {path[0]}.{slip}: unknown key; did you mean `{path[1]}`?" in problems(
        in_section(f"{path[0]}.{slip}", "1")
    )


# Row 3: duplicates


@pytest.mark.parametrize(
    "text, expected",
    [
        (SOUND + "output_dir: other\n", "FILE:4: output_dir: written twice, in line 3 and in line 4; keep one"),
        (SOUND + "lora:\n  r: 8\n  r: 8\n", "FILE:6: lora.r: written twice, in line 5 and in line 6; keep one"),
        (SOUND + "lora: {r: 4}\nlora: {r: 8}\n", "FILE:5: lora: written twice, in line 4 and in line 5; keep one"),
        (SOUND + "lora: {r: 8, 'r': 8}\n", "FILE:4: lora.r: written twice, in line 4 and in line 4; keep one"),
    ],
)
def test_duplicate_key_names_both_lines(problems: Callable[..., list[str]], text: str, expected: str) -> None:
    assert problems(text) == [expected]


# Rows 4 to 8: values


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
def test_values_are_read_as_meant(load: Callable[..., RunConfig], key: str, text: str, value: Any) -> None:
    found = value_at(load(in_section(key, text)), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("lora.r", "eight", "expected a whole number, got text 'eight'"),
        ("lora.r", "true", "expected a whole number, got true/false True"),
        ("lora.r", "8.5", "expected a whole number, got a number 8.5"),
        ("lora.r", "'8'", "expected a whole number, got text '8'"),
        ("lora.r", "[8]", "expected a whole number, got a list"),
        ("lora.r", "", "expected a whole number, got nothing"),
        ("lora.r", "0", "must be greater than 0, got a number 0"),
        ("lora.r", "-1", "must be greater than 0, got a number -1"),
        ("lora.lora_alpha", "0", "must be greater than 0, got a number 0"),
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
        ("training.learning_rate", "0", "must be greater than 0, got a number 0"),
        ("training.learning_rate", "-1", "must be greater than 0, got a number -1"),
        ("training.learning_rate", ".nan", "must be a finite number, got a number nan"),
        ("training.learning_rate", "nan", "expected a number, got text 'nan'"),
        ("training.learning_rate", ".inf", "must be a finite number, got a number inf"),
        ("training.learning_rate", "-.INF", "must be a finite number, got a number -inf"),
        ("training.learning_rate", "1e400", "must be a finite number, got a number inf"),
        ("training.learning_rate", "1_000", "expected a number, got text '1_000'"),
        ("training.learning_rate", "'1e-4'", "expected a number, got text '1e-4'"),
        ("training.max_steps", "0", "0 steps train nothing"),
        ("training.seed", "4294967296", "must be less than 4294967296, got a number 4294967296"),
        ("training.optim", "adamw", "expected 'adamw_torch', "),
        ("model.dtype", "fp16", "expected 'auto', 'float32', 'bfloat16' or 'float16', got text 'fp16'"),
        ("model.dtype", "bfloat", "expected 'auto', 'float32', 'bfloat16' or 'float16', got text 'bfloat'; did you me"),
        ("model.name_or_path", "''", "must not be empty"),
        ("model.revision", "1.5", "expected text, got a number 1.5"),
        ("data.validation", "0", "a fraction lies between 0 and 1"),
        ("data.validation", "1.5", "a fraction lies between 0 and 1"),
        ("data.validation", "true", "expected a section or a list or a number, got true/false True"),
        ("data.columns", "[prompt]", "expected a mapping, got a list"),
        ("data.max_length", "1", "must be greater than or equal to 2, got a number 1"),
        *[
            (key, text, f"`{text}` means different things to different YAML readers; quote it if text is meant")
            for key in ("lora.r", "training.learning_rate", "model.revision", "training.activation_checkpointing")
            for text in ("010", "12:30", "no", "On", "y", "0x1F", "0b11", "1:2:3", "-010")
        ],
    ],
)
def test_wrong_value_names_line_key_and_what_is_expected(
    problems: Callable[..., list[str]], key: str, text: str, expected: str
) -> None:
    found = problems(in_section(key, text))
    assert len(found) == 1
    assert found[0].startswith(f"FILE:5: {key}: {expected}")


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("lora.target_modules", "[q, 5]", "lora.target_modules[1]: expected text, got a number 5"),
        ("lora.layers_to_transform", "[0, 1, -1]", "lora.layers_to_transform[2]: must be greater than or equal to 0"),
        ("data.columns", "{prompt: 5}", "data.columns.prompt: expected text, got a number 5"),
    ],
)
def test_a_wrong_item_is_named(problems: Callable[..., list[str]], key: str, text: str, expected: str) -> None:
    found = problems(in_section(key, text))
    assert len(found) == 1
    assert found[0].startswith(f"FILE:5: {expected}")


@pytest.mark.parametrize("section, got", [("", "nothing"), ("[]", "a list"), ("x", "text 'x'")])
def test_a_section_must_be_one(problems: Callable[..., list[str]], section: str, got: str) -> None:
    assert problems(SOUND + f"lora: {section}\n") == [f"FILE:4: lora: expected a section, got {got}"]


def test_all_problems_are_told_at_once(problems: Callable[..., list[str]]) -> None:
    found = problems("model: {dtype: auto}\nlora: {r: 0, q: 1}\ntraining:\n  learning_rate: fast\n")
    assert found == [
        "FILE:1: model.name_or_path: missing; this key has no default",
        "FILE:2: lora.r: must be greater than 0, got a number 0",
        f"FILE:2: lora.q: unknown key; known here: {', '.join(LoraSection.model_fields)}",
        "FILE: data: missing; this key has no default",
        "FILE:4: training.learning_rate: expected a number, got text 'fast'",
        "FILE: output_dir: missing; this key has no default",
    ]


# Row 9: contradictions


@pytest.mark.parametrize(
    "section, first, second, what",
    [
        ("training", "max_steps: 5", "num_train_epochs: 2", "both set the length of the run; keep one"),
        ("training", "warmup_steps: 6", "max_steps: 5", "the learning rate would never reach its peak"),
        ("training", "lr_scheduler_type: constant", "warmup_steps: 5", "constant has no warmup"),
        ("data", "format: text", "chat_template: a.jinja", "text goes through no template"),
    ],
)
def test_contradiction_names_both_keys(
    problems: Callable[..., list[str]], load: Callable[..., RunConfig], section: str, first: str, second: str, what: str
) -> None:
    base = "# rows\n" + SOUND if section != "data" else "model: {name_or_path: b}\noutput_dir: o\n# rows\n"
    start = f"{base}{section}:\n" + ("  train: rows.jsonl\n" if section == "data" else "")
    line = start.count("\n") + 1
    keys = " and ".join(f"{section}.{entry.partition(':')[0]}" for entry in (first, second))
    found = problems(f"{start}  {first}\n  {second}\n")
    assert len(found) == 1
    assert found[0].startswith(f"FILE:{line}: {keys}: {what}")
    load(f"{start}  {first}\n")
    load(f"{start}  {second}\n")


@pytest.mark.parametrize(
    "key, value, other, what",
    [
        ("training.eval_steps", "5", "data.validation", "there are no rows to evaluate on"),
        (
            "model.trust_remote_code",
            "true",
            "model.revision",
            "code from a repository is only run at a pinned revision",
        ),
    ],
)
def test_a_key_that_needs_another(
    problems: Callable[..., list[str]], load: Callable[..., RunConfig], key: str, value: str, other: str, what: str
) -> None:
    assert problems(in_section(key, value)) == [f"FILE:5: {key} and {other}: {what}"]
    load(in_section(key, value), f"{other}=held.jsonl")


def test_warmup_above_one_counts_whole_steps(
    problems: Callable[..., list[str]], load: Callable[..., RunConfig]
) -> None:
    found = problems(in_section("training.warmup_steps", "1.5"))
    assert found == ["FILE:5: training.warmup_steps: above 1 it counts steps, so it must be whole"]
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
def test_set_is_read_like_the_file(load: Callable[..., RunConfig], assignment: str, key: str, value: Any) -> None:
    text = SOUND.replace("rows.jsonl", "{path: rows.jsonl}") + "lora: {r: 8}\n"
    assert value_at(load(text, assignment), key) == value


def test_the_last_set_wins(load: Callable[..., RunConfig]) -> None:
    assert load(SOUND, "lora.r=4", "lora={r: 2}", "lora.r=16").lora.r == 16
    assert load(SOUND, "lora.r=4", "lora.lora_alpha=5").lora.r == 4


@pytest.mark.parametrize(
    "assignment, expected",
    [
        ("lora.r=eight", "lora.r: expected a whole number, got text 'eight'"),
        ("lora.r=null", "lora.r: expected a whole number, got nothing"),
        ("lora.alhpa=", "lora.alhpa: is not in the file, so there is nothing to take out"),
        ("lora.lora_alhpa=8", "lora.lora_alhpa: unknown key; did you mean `lora_alpha`?"),
        ("lora={r: 0}", "lora.r: must be greater than 0, got a number 0"),
        ("lora.r=010", "lora.r: `010` means different things"),
        ("data={train: a, format: no}", "data.format: `no` means different things"),
        ("lora.r=[", "lora.r: not valid YAML"),
        ("lora.r=8\nlora_alpha: 3", "lora.r: one value is expected, not several lines"),
        ("lora.r=!!python/name:os.system", "lora.r: the YAML tag `!!python/name:os.system` is not supported"),
        ("lora", "`lora` is not of the form section.key=value"),
        ("=8", "`=8` is not of the form section.key=value"),
        ("lora..r=8", "`lora..r=8` is not of the form section.key=value"),
        ("output_dir.x=8", "output_dir.x: `output_dir` is text 'out', not a section"),
    ],
)
def test_wrong_set_is_told_as_such(problems: Callable[..., list[str]], assignment: str, expected: str) -> None:
    found = problems(SOUND + "lora: {r: 8}\n", assignment)
    assert len(found) == 1
    assert found[0].startswith(f"--set: {expected}")


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
def test_dump_reads_back_equal(load: Callable[..., RunConfig], text: str) -> None:
    run = load(text)
    assert load(config.dump(run)) == run
    assert load(config.dump(run)).training.max_steps == run.training.max_steps


@pytest.mark.parametrize(
    "name",
    ["no", "y", "010", "12:30", "1e-4", "1", "null", "~", ".inf", "true", "0x1f", " a ", "a: b", "#", "a\nb", "*a",
     "!x", "\u00fc\u4e2d", "\x85", "\U0001f600", "/".join(["x" * 100] * 5)],
)  # fmt: skip
def test_text_survives_dump(load: Callable[..., RunConfig], name: str) -> None:
    run = load(SOUND).model_copy(update={"output_dir": name})
    assert load(config.dump(run)) == run


# The sections themselves


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_small_described_frozen_and_strict(section: type[config.ModelSection]) -> None:
    fields = section.model_fields
    assert 0 < len(fields) <= 15
    if section is not RunConfig:
        assert [name for name, field in fields.items() if not field.description] == []
    made = section.model_construct()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, next(iter(fields)), None)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        section.model_validate({"nobody_knows_me": 1})


# Through the command line


@pytest.mark.parametrize(
    "text, line",
    [
        ("model:\n\tname: x\n", "FILE:2:1: not valid YAML: found character '\\t' that cannot start any token, while "
         "scanning for the next token; indent with spaces"),
        (in_section("lora.bais", "all"), "FILE:5: lora.bais: unknown key; did you mean `bias`?"),
        (in_section("lora.r", "eight"), "FILE:5: lora.r: expected a whole number, got text 'eight'"),
        (SOUND + "output_dir: x\n", "FILE:4: output_dir: written twice, in line 3 and in line 4; keep one"),
        ("", "FILE: the file is empty; see configs/ for examples"),
        ("a: \x07\n", "FILE:1: not valid YAML: the control character U+0007"),
    ],
)  # fmt: skip
def test_command_line_prints_the_problem(cli: Callable[..., Ran], tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    before = tree(tmp_path)
    for ran in (cli("train", path), cli("params", path)):
        assert ran == Ran(2, "", f"error: {line.replace('FILE', str(path))}\n")
    assert tree(tmp_path) == before


def test_command_line_prints_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SOUND)
    ran = process("train", path, "--set", "lora.r=0", "--set", "lora.lora_alpha=-1")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "error: --set: lora.r: must be greater than 0, got a number 0",
        "error: --set: lora.lora_alpha: must be greater than 0, got a number -1",
    ]


def test_set_without_a_value_takes_the_key_out(run_config: Callable[..., Path]) -> None:
    path = run_config(training={"num_train_epochs": 3})
    run = config.load(path, ["training.max_steps=5", "training.num_train_epochs="])
    assert (run.training.max_steps, run.training.num_train_epochs) == (5, 1.0)


@pytest.mark.parametrize(
    "section, said",
    [
        ({"lora": {"target_modules": "(unclosed"}}, "lora.target_modules: `(unclosed` is not a regular expression"),
        ({"data": {"columns": {"promt": "question"}}}, "data.columns: `promt` is none of our names"),
    ],
)
def test_what_upstream_would_find_late(run_config: Callable[..., Path], section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.load(run_config(**section))
