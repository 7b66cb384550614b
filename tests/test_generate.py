"""`loratune generate` on the tiny model: the completions, the streams they are written to, and what is refused."""

import csv
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import PLAIN, Expected, Ran, check_refused, mainly, process, tree, write_rows
from fork_server import ForkServer
from peft import PeftModel
from running import Cli, MakeConfig, until
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import loratune
from loratune import console
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.options import Sampling
from loratune.cli import app
from loratune.codes import Code
from loratune.data.sources.rows import with_own_fields
from loratune.system.files import kind

pytestmark = pytest.mark.usefixtures("untraced_module")

PROMPTS = ["go " * (number % 7) + "ab"[number % 2] + ":" for number in range(28)]
ANSWERS = ["ox" if number % 2 else "yes" for number in range(28)]
UNEVEN = [*PROMPTS, *("?" * length for length in range(1, 60, 5)), "Übermut\nand\ttabs"]
NEW = 8


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def train(path: Path, base: Path, rows: list[dict[str, Any]], steps: int) -> Path:
    config = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        **PLAIN,
        "data": {"train": str(write_rows(path / "rows.jsonl", rows))},
        "training": {"learning_rate": 1e-2, "max_steps": steps, "per_device_train_batch_size": 14},
        "output_dir": str(path / "adapter"),
    }
    (path / "run.yaml").write_text(yaml.safe_dump(config))
    ran = CliRunner().invoke(app, ["train", str(path / "run.yaml")])
    assert ran.exit_code == 0, ran.stderr
    return path / "adapter"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """An adapter trained on conversations until it gives their answers."""
    rows = [
        {"messages": [*user(prompt), {"role": "assistant", "content": answer}]}
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    return train(tmp_path_factory.mktemp("chat"), tiny_dir, rows, steps=100)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """An adapter trained on prompts and completions for a few steps."""
    rows = [
        {"prompt": prompt, "completion": answer, "note": "kept"}
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    return train(tmp_path_factory.mktemp("plain"), tiny_dir, rows, steps=20)


class Stock:
    """Base and adapter with stock transformers and PEFT, one prompt at a time, without padding and without a cache."""

    def __init__(self, adapter: Path, base: Path, on: bool = True):
        self.tokenizer = AutoTokenizer.from_pretrained(adapter)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(self.model, str(adapter)).eval() if on else self.model.eval()
        self.ends = self.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])

    @torch.no_grad()
    def answer(self, prompt: str, new: int = NEW) -> str:
        ids = self.tokenizer(prompt).input_ids
        start = len(ids)
        while len(ids) < start + new and (len(ids) == start or ids[-1] not in self.ends):
            ids = [*ids, int(self.model(torch.tensor([ids])).logits[0, -1].argmax())]
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("name", mainly(["chat"], ["plain", "chat"]))
def test_batched_answers_equal_those_of_single_prompts(
    cli: Cli, request: pytest.FixtureRequest, tiny_dir: Path, tmp_path: Path, name: str
) -> None:
    """Greedy answers to more prompts than fit in a batch, each formatted like the beginning of its training row."""
    adapter = request.getfixturevalue(name)
    questions = write_rows(tmp_path / "asked.jsonl", [{"prompt": prompt, "id": 7} for prompt in UNEVEN])
    out = tmp_path / "answers.jsonl"
    ran = cli(
        "generate", "--adapter", adapter, "--input", questions, "--output", out, "--base", "--max-new-tokens", NEW
    )
    assert (ran.code, ran.out) == (0, ""), ran.err
    frame = "{}" if name == "plain" else "<|user|>{}<|end|>\n<|assistant|>"
    tuned, base = Stock(adapter, tiny_dir), Stock(adapter, tiny_dir, on=False)
    expected = [
        {
            "prompt": text,
            "id": 7,
            "completion": tuned.answer(frame.format(text)),
            "base": base.answer(frame.format(text)),
        }
        for text in UNEVEN
    ]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert len({row["completion"] for row in expected}) > 1


def test_an_adapter_answers_as_it_was_trained(cli: Cli, chat: Path) -> None:
    ran = cli("generate", "--adapter", chat, *PROMPTS[:14])
    assert (ran.code, ran.out.splitlines(), ran.err) == (0, ANSWERS[:14], "")


def test_all_ways_to_pass_a_prompt_give_the_same_answer(cli: Cli, chat: Path, tmp_path: Path) -> None:
    answered = [{"role": "assistant", "content": "not this"}]
    rows = [
        {"prompt": "a:"},
        {"text": "a:"},
        {"prompt": user("a:")},
        {"messages": user("a:")},
        {"messages": user("a:") + answered},
    ]
    ran = cli("generate", "--adapter", chat, "--input", write_rows(tmp_path / "asked.jsonl", rows))
    assert (ran.code, ran.out, ran.err) == (0, "yes\n" * 5, "")
    assert cli("generate", "--adapter", chat, stdin="a:\n").out == "yes\n"
    (tmp_path / "asked.txt").write_text("a:\nb:\n")
    assert cli("generate", "--adapter", chat, "--input", tmp_path / "asked.txt").out == "yes\nox\n"


def test_stdin_is_one_prompt(cli: Cli, plain: Path) -> None:
    text = "several\n\nlines: é"
    arguments = ("generate", "--adapter", plain, "--max-new-tokens", 4)
    assert cli(*arguments, stdin=text + "\n").out == cli(*arguments, text).out != cli(*arguments, "several").out


def test_an_adapter_of_message_lists_treats_text_as_a_user_turn(
    cli: Cli, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path
) -> None:
    """For rows whose prompt and completion are both lists of messages."""
    rows = [{"prompt": user("a"), "completion": [{"role": "assistant", "content": "b"}]}]
    config = run_config(data={"train": str(write_rows(tmp_path / "data.jsonl", rows))})
    assert cli("train", config).code == 0
    ran = cli("generate", "--adapter", tmp_path / "out", "--max-new-tokens", NEW, "what")
    assert ran.out.rstrip("\n") == Stock(tmp_path / "out", tiny_dir).answer("<|user|>what<|end|>\n<|assistant|>")


def test_columns_of_the_training_data_are_applied(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"question": "a", "answer": "b"}])
    columns = {"prompt": "question", "completion": "answer"}
    assert cli("train", run_config(data={"train": str(path), "columns": columns})).code == 0
    arguments = ("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 4)
    ran = cli(*arguments, "--input", path)
    assert (ran.code, ran.out) == (0, cli(*arguments, "a").out)


def test_base_prints_both_answers(cli: Cli, chat: Path) -> None:
    ran = cli("generate", "--adapter", chat, "--base", "--max-new-tokens", 4, "a:", "b:")
    assert ran.code == 0, ran.err
    first, base, adapter, second, *_ = ran.out.splitlines()
    assert (first, adapter, second) == ("a:", "  adapter  yes", "b:")
    assert base.startswith("  base     ") and "yes" not in base


@pytest.mark.parametrize("row", [{"messages": [*user("z"), *user("a:")]}, {"prompt": user("a:")}, {"text": "a:"}])
def test_base_prints_both_answers_to_rows(cli: Cli, chat: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    asked = write_rows(tmp_path / "asked.jsonl", [row])
    ran = cli("generate", "--adapter", chat, "--base", "--max-new-tokens", 4, "--input", asked)
    assert ran.code == 0, ran.err
    assert (ran.out.splitlines()[0], ran.out.splitlines()[-1][:11]) == ("a:", "  adapter  ")


def test_temperature_zero_is_greedy_and_the_default(cli: Cli, plain: Path) -> None:
    arguments = ("generate", "--adapter", plain, "--max-new-tokens", 8, *PROMPTS[:8])
    greedy = cli(*arguments).out
    assert cli(*arguments).out == cli(*arguments, "--temperature", 0).out == greedy
    assert cli(*arguments, "--temperature", 1).out != greedy


def test_the_same_seed_gives_the_same_text(cli: Cli, plain: Path) -> None:
    arguments = ("generate", "--adapter", plain, "--max-new-tokens", 8, "--temperature", 1, *PROMPTS, *PROMPTS)

    def answers(*more: object) -> list[str]:
        ran = cli(*arguments, "--output", "-", *more)
        assert ran.code == 0, ran.err
        return [json.loads(line)["completion"] for line in ran.out.splitlines()]

    found = answers("--seed", 7)
    assert found == answers("--seed", 7) != answers("--seed", 8)
    assert found[: len(PROMPTS)] != found[len(PROMPTS) :]  # another position or batch has other random numbers


def test_top_k_and_top_p_restrict_sampling(cli: Cli, plain: Path) -> None:
    """To a single token, or to the tokens within a tiny probability, they leave only the most likely one."""
    arguments = ("generate", "--adapter", plain, "--max-new-tokens", 8, *PROMPTS[:8])
    greedy, hot = cli(*arguments).out, (*arguments, "--temperature", 100, "--seed", 1)
    for narrow in (("--top-k", 1), ("--top-p", 1e-6)):
        assert cli(*hot, *narrow).out == greedy
    assert len({cli(*hot, *wide).out for wide in ((), ("--top-k", 3), ("--top-p", 0.1))} - {greedy}) == 3


def test_a_completion_ends_before_a_stop_text(plain: Path) -> None:
    """Each row of a batch ends separately, even if the stop text consists of several tokens. Longer rows continue."""
    adapter, loaded = loratune.Adapter(plain), loading.load(AdapterDirectory.open(plain))
    whole = adapter.generate(UNEVEN, max_new_tokens=24)
    long, short = max(whole, key=len), min(filter(None, whole), key=len)
    stops = [long[2:4], short[-1]]
    found = adapter.generate(UNEVEN, max_new_tokens=24, stop=stops)
    assert found == [min((text.split(stop)[0] for stop in stops), key=len) for text in whole] != whole
    (ids,) = loaded.complete([loaded.renderer.prompt(UNEVEN[whole.index(long)], "")], 24, Sampling(stop=(stops[0],)))
    assert len(ids) == 4 and loaded.text(ids).endswith(stops[0])
    seed = torch.initial_seed()
    adapter.generate(["a"], max_new_tokens=1, temperature=2, seed=3)
    adapter.generate(["a"], max_new_tokens=1, temperature=np.int64(2), seed=np.int64(3))
    with pytest.raises(loratune.ConfigError, match="is not between"):
        adapter.generate(["a"], temperature=10**400)
    assert torch.initial_seed() == seed


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--temperature", 1e4], "--temperature"),
        (["--temperature", 1, "--top-p", 0], "--top-p"),
        (["--temperature", 1, "--top-p", 1.1], "--top-p"),
        (["--temperature", 1, "--top-k", 0], "--top-k"),
        (["--top-k", 5], "--top-k"),
        (["--top-p", 0.5], "--top-p"),
        (["--seed", -1], "--seed"),
        (["--stop", ""], "--stop"),
    ],
)
def test_invalid_sampling_options_are_refused(cli: Cli, plain: Path, arguments: list[Any], key: str) -> None:
    ran = cli("generate", "--adapter", plain, *arguments, "a")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "", key))


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--input", "absent.jsonl"], 4, f"[{Code.DATA_NOT_FOUND}]"),
        (["--adapter", "absent", "a"], 2, "[usage.bad_value]"),
    ],
)
def test_invalid_input_is_refused(cli: Cli, plain: Path, arguments: list[Any], code: int, expected: str) -> None:
    ran = cli("generate", "--adapter", plain, *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert expected in ran.err


def test_a_missing_adapter_is_refused(cli: Cli, tmp_path: Path) -> None:
    ran = cli("generate", "--adapter", tmp_path / "absent", "a")
    check_refused(ran, 5, (Code.ADAPTER_NOT_FOUND, str(tmp_path / "absent"), ""))
    assert ran.out == ""


EMPTY, TOO_LONG, NO_DIRECTORY = Code.USAGE_NO_PROMPT, Code.DATA_TOO_LONG, Code.OUTPUT_UNUSABLE


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([""], (EMPTY, "prompt 1", "")),
        (["a", ""], (EMPTY, "prompt 2", "")),
        (["a" * 600], (TOO_LONG, "prompt 1", "")),
        (["a", "a" * 400], (TOO_LONG, "prompt 2", "")),
        (["--output", "absent/answers.jsonl", "a"], (NO_DIRECTORY, "absent/answers.jsonl", "--output")),
    ],
)
def test_invalid_prompts_and_options_are_refused(
    cli: Cli, chat: Path, arguments: list[str], expected: Expected
) -> None:
    ran = cli("generate", "--adapter", chat, *arguments)
    check_refused(ran, 2, expected)
    assert ran.out == ""
    if len(arguments[0]) == 600:
        assert "prompt tokens and 256 new ones exceed the model's context of 512" in ran.err
        assert ran.err.endswith("; shorten the prompt\n")


def test_an_overlong_prompt_is_refused_with_the_limit_that_fits(cli: Cli, plain: Path) -> None:
    ran = cli("generate", "--adapter", plain, "a" * 400)
    check_refused(ran, 2, (TOO_LONG, "prompt 1", ""))
    assert "exceed the model's context of 512" in ran.err and ran.err.endswith("; set --max-new-tokens to 112\n")
    assert cli("generate", "--adapter", plain, "--max-new-tokens", 112, "a" * 400).code == 0


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"question": "a"}, Code.DATA_FIELD),
        ({"prompt": None}, Code.DATA_FIELD),
        ({"messages": []}, Code.DATA_FIELD),
        ({"messages": [{"role": "assistant", "content": "a"}]}, Code.DATA_FIELD),
    ],
)
def test_rows_without_a_prompt_are_refused(
    cli: Cli, chat: Path, tmp_path: Path, row: dict[str, Any], code: Code
) -> None:
    path = write_rows(tmp_path / "asked.jsonl", [{"prompt": "a"}, row])
    ran = cli("generate", "--adapter", chat, "--input", path)
    check_refused(ran, 4, (code, f"{path}:2", ""))
    assert ran.out == ""


def test_refused_input_leaves_the_output_unchanged(cli: Cli, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("precious\n")
    assert cli("generate", "--adapter", plain, "--output", out, "").code == 2
    assert tree(tmp_path) == {"answers.jsonl": b"precious\n"}


@pytest.mark.parametrize("imports", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stdout_contains_only_completions(imports: bool, chat: Path, forked: Cli) -> None:
    """imports: also in a process that imports the libraries itself, as in a test of `train` in `test_quantized.py`."""
    run = process if imports else forked
    assert run("generate", "--adapter", chat, "a:", "b:") == Ran(0, "yes\nox\n", "")


def test_a_reader_that_closes_the_pipe_ends_the_command(chat: Path, tmp_path: Path, processes: ForkServer) -> None:
    """`generate ... | head -1`: nobody reads the second batch."""
    questions = write_rows(tmp_path / "asked.jsonl", [{"prompt": "a:"}] * 64)
    reading, writing = os.pipe()
    running = processes.start(
        "generate", "--adapter", chat, "--input", questions, stdout=f"/proc/{os.getpid()}/fd/{writing}"
    )
    with open(reading) as reader:
        assert reader.readline() == "yes\n"
        os.close(writing)
    assert (running.wait(), running.said()) == (0, "")


def test_output_to_a_device_a_link_and_a_directory(cli: Cli, plain: Path, tmp_path: Path) -> None:
    """A device and a link are kept, and a directory is refused before anything is loaded."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").touch()
    for output in (["/dev/null"], [tmp_path / "link", "--overwrite"]):
        assert cli("generate", "--adapter", plain, "--max-new-tokens", 2, "a:", "--output", *output).code == 0
    assert Path("/dev/null").is_char_device() and (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["prompt"] == "a:"
    ran = cli("generate", "--adapter", plain, "--output", tmp_path, "a:")
    check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(tmp_path), "--output"))
    assert ran.out == ""


def test_an_existing_output_is_replaced_only_on_request(cli: Cli, plain: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """It is refused before anything is loaded. Input files are never overwritten."""
    questions = write_rows(tmp_path / "asked.jsonl", [{"prompt": "a:"}])
    out = tmp_path / "answers.jsonl"
    out.write_text('{"precious": 1}\n')
    (tmp_path / ".answers.jsonl.unfinished").symlink_to(questions)
    before = tree(tmp_path)
    command = ("generate", "--adapter", plain, "--max-new-tokens", 2, "--input", questions, "--output")
    ran = cli(*command, out)
    check_refused(ran, 2, (Code.OUTPUT_EXISTS, str(out), "--output"))
    assert ran.out == "" and ran.err.endswith("--overwrite\n") and ran.err.count("\n") == 1
    for path, read in {
        questions: questions, plain / "adapter_model.safetensors": plain, tiny_dir / "config.json": tiny_dir
    }.items():  # fmt: skip
        content = path.read_bytes()
        ran = cli(*command, path, "--overwrite")
        check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(path), "--output"))
        assert f"is, or belongs to, an input ({read})" in ran.err
        assert path.read_bytes() == content
    assert tree(tmp_path) == before
    ran = cli(*command, out, "--overwrite")
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert json.loads(out.read_text())["prompt"] == "a:" and "precious" not in out.read_text()
    assert (tmp_path / ".answers.jsonl.unfinished").is_symlink() and questions.read_text() == '{"prompt": "a:"}\n'


def test_output_to_stdout_and_a_named_pipe(plain: Path, processes: ForkServer, tmp_path: Path) -> None:
    """Answers are written to stdout at its current position, and to a pipe as it is."""
    command = ("generate", "--adapter", plain, "--max-new-tokens", 2, "a:", "b:", "--output")
    child = processes.start(*command, "/dev/stdout")
    assert child.wait() == 0, child.said()
    expected = child.out.read_text()
    assert [json.loads(line)["prompt"] for line in expected.splitlines()] == ["a:", "b:"]
    os.mkfifo(tmp_path / "pipe")
    child = processes.start(*command, tmp_path / "pipe")
    assert (tmp_path / "pipe").read_text() == expected
    assert child.wait() == 0 and kind(tmp_path / "pipe") == "a named pipe"


OWN = {"id": 2**60 + 1, "share": 0.1, "tags": ["é", {"a": None}], "none": None, "flag": False, "adapter": 'a,"b"\n'}
"""Fields that are unrelated to the prompt."""


@pytest.mark.parametrize(
    ("own", "renamed"),
    [
        ({}, {}),
        ({"completion": "right"}, {"completion": "reference"}),
        ({"completion": "right", "reference": "other"}, {"completion": "row_completion"}),
        ({"base": 1, "row_base": 2, "completion": 3}, {"base": "row_row_base", "completion": "reference"}),
    ],
)
def test_fields_are_not_overwritten_by_answers(own: dict[str, Any], renamed: dict[str, str]) -> None:
    found = {"completion": "given", "base": "other"}
    assert with_own_fields(own, found) == {renamed.get(name, name): value for name, value in own.items()} | found


def test_rows_from_stdin_are_answered_on_stdout(cli: Cli, plain: Path) -> None:
    """Stdout contains nothing else, and the values of all fields are kept."""
    rows = [{"prompt": "a:", **OWN, "base": 1, "completion": "right"}, {"prompt": "b:"}]
    command = ("generate", "--adapter", plain, "--max-new-tokens", 2)
    stdin = "".join(json.dumps(row) + "\n\n" for row in rows)
    ran = cli(*command, "--input", "-", "--output", "-", "--base", stdin=stdin)
    assert (ran.code, ran.err) == (0, "")
    found = [json.loads(line) for line in ran.out.splitlines()]
    answers = [(row.pop("completion"), row.pop("base")) for row in found]
    assert found == [{"prompt": "a:", **OWN, "row_base": 1, "reference": "right"}, {"prompt": "b:"}]
    assert [answer for answer, _ in answers] == cli(*command, "a:", "b:").out.splitlines()


def test_ignored_files_are_reported(cli: Cli, plain: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a:"}])
    (tmp_path / "more.md").touch()
    ran = cli("generate", "--adapter", plain, "--max-new-tokens", 2, "--input", tmp_path)
    assert ran.code == 0 and "not read: more.md" in ran.err


def test_numbers_that_json_lacks_are_null(cli: Cli, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "1 and", "score": NaN, "more": {"x": [1.5, -Infinity]}}\n')
    command = ("generate", "--adapter", plain, "--max-new-tokens", 1, "--input", tmp_path / "in.jsonl")
    row = json.loads(cli(*command, "--json").out, parse_constant=pytest.fail)
    assert (row["score"], row["more"]) == (None, {"x": [1.5, None]})
    assert cli(*command, "--output", tmp_path / "out.csv").code == 0
    assert "1 and,," in (tmp_path / "out.csv").read_text()


def test_json_is_printed_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [float("nan"), float("inf"), 1.5], "b": (1,)}, indent=None)
    assert capsys.readouterr().out == '{"a": [null, null, 1.5], "b": [1]}\n'


def test_csv_input_gives_csv_output(cli: Cli, plain: Path, tmp_path: Path) -> None:
    """A table remains a table with unchanged cells. JSON fields become columns, with JSON in the cells."""
    cells = {"id": "007", "prompt": 'a,"\nb:', "none": "", "formula": "=1+1", "completion": "right"}
    with (tmp_path / "asked.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cells)
        writer.writeheader()
        writer.writerow(cells)
    write_rows(tmp_path / "asked.jsonl", [{"prompt": "a:", **OWN}, {"prompt": "b:", "late": "é"}])
    command = ("generate", "--adapter", plain, "--max-new-tokens", 2, "--input")
    for ending in ("csv", "jsonl"):
        ran = cli(*command, tmp_path / f"asked.{ending}", "--output", made := tmp_path / f"from-{ending}.CSV")
        assert (ran.code, ran.out, ran.err) == (0, "", f"the answers are in {made}\n")
    with (tmp_path / "from-csv.CSV").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row.pop("completion") != "right"
    assert row == {"reference" if name == "completion" else name: cell for name, cell in cells.items()}
    with (tmp_path / "from-jsonl.CSV").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first.keys() == {"prompt", *OWN, "completion", "late"}
    assert {name: first[name] for name in OWN} == {
        "id": str(2**60 + 1), "share": "0.1", "tags": '["é", {"a": null}]', "none": "", "flag": "false",
        "adapter": OWN["adapter"],
    }  # fmt: skip
    assert (second["late"], second["id"], first["late"]) == ("é", "", "")
    ran = cli(*command, tmp_path / "asked.csv", "--output", tmp_path / "answers.csv.gz")
    check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(tmp_path / "answers.csv.gz"), "--output"))


@pytest.mark.parametrize(
    ("stdin", "code", "place"),
    [
        ("", Code.DATA_EMPTY, "stdin"),
        ('{"prompt": "a"}\n[]\n', Code.DATA_SYNTAX, "stdin:2"),
        ('{"prompt": "a"}\n{"prompt"', Code.DATA_SYNTAX, "stdin:2"),
        ('{"prompt": "a"}\n\n{"id": 1}\n', Code.DATA_FIELD, "stdin:3"),
    ],
)
def test_invalid_rows_from_stdin_are_refused(cli: Cli, plain: Path, stdin: str, code: Code, place: str) -> None:
    ran = cli("generate", "--adapter", plain, "--input", "-", "--output", "-", stdin=stdin)
    check_refused(ran, 4, (code, place, ""))
    assert ran.out == ""


def test_two_commands_with_the_same_output(plain: Path, processes: ForkServer, tmp_path: Path) -> None:
    """The output has the lines of one of them. Without --overwrite the other command is refused."""
    for overwrite in ((), ("--overwrite",)):
        out = tmp_path / f"answers{len(overwrite)}.jsonl"
        children = []
        for name in ("one", "two"):
            questions = write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "a:", "of": name}] * 64)
            more = ("--input", questions, "--output", out, *overwrite)
            children.append(processes.start("generate", "--adapter", plain, "--max-new-tokens", 8, *more))
        codes = sorted(child.wait() for child in children)
        assert codes == ([0, 0] if overwrite else [0, 2])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == 64 and len({row["of"] for row in rows}) == 1
        unfinished = [path for path in tmp_path.iterdir() if path.name.endswith(".unfinished")]
        for path in unfinished:  # of the command that was refused only at the end
            assert f"the output is kept in {path}" in "".join(child.said() for child in children)
            assert len({json.loads(line)["of"] for line in path.read_text().splitlines()}) == 1
            path.unlink()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_an_interrupted_command_leaves_no_output(
    number: signal.Signals, plain: Path, processes: ForkServer, tmp_path: Path
) -> None:
    """No file has the name of the output. A killed command leaves a temporary file with another name."""
    questions = write_rows(tmp_path / "asked.jsonl", [{"prompt": "a:"}] * 4_000)
    out = tmp_path / "answers.jsonl"
    child = processes.start("generate", "--adapter", plain, "--input", questions, "--output", out)
    until(lambda: [*tmp_path.glob(".answers.jsonl.*.unfinished")], child)
    child.send(number)
    assert child.wait() == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    remaining = {path.name for path in tmp_path.iterdir()} - {"asked.jsonl"}
    assert len(remaining) == (number == signal.SIGKILL)
    assert not remaining or re.fullmatch(r"\.answers\.jsonl\.[0-9a-f]{12}\.unfinished", remaining.pop())


def test_a_full_disk_is_reported(plain: Path, processes: ForkServer, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    questions = write_rows(tmp_path / "asked.jsonl", [{"prompt": "a:", "note": "x" * 5000}])
    command = ("generate", "--adapter", plain, "--max-new-tokens", 2, "--input", questions, "--output", out)
    child = processes.start(*command, limit=3000)
    ran = Ran(child.wait(), "", child.said())
    check_refused(ran, 8, (Code.SYSTEM_DISK_FULL, str(out), "--output"))
    assert ran.err.endswith("; make room\n") and ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["asked.jsonl"]


def test_files_of_two_conversation_formats_can_be_combined(tmp_path: Path, tiny_dir: Path, cli: Cli) -> None:
    """Conversations in two formats train one chat adapter, which takes bare text as a turn. run.yaml repeats the
    run."""
    turns = [("user", "human", "a"), ("assistant", "gpt", "b")]
    for name, key, role, content in (("m", "messages", "role", "content"), ("s", "conversations", "from", "value")):
        names = [openai if name == "m" else sharegpt for openai, sharegpt, _ in turns]
        rows = [
            {key: [{role: who, content: text * count} for who, (*_, text) in zip(names, turns, strict=True)]}
            for count in range(1 if name == "m" else 5, 5 if name == "m" else 9)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    values = {
        "model": {"name_or_path": str(tiny_dir), "dtype": "float32"},
        **PLAIN,
        "training": {"learning_rate": 0.01},
        "data": {"train": f"{os.path.relpath(tmp_path)}/?.jsonl", "validation": 0.25},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli("train", tmp_path / "run.yaml").code == 0
    record = json.loads((tmp_path / "out" / "loratune.json").read_text())
    assert (record["formats"], record["chat"]) == (["conversations", "messages"], True)
    questions = write_rows(tmp_path / "asked.jsonl", [{"messages": user("a")}])
    as_rows = cli("generate", "--adapter", tmp_path / "out", "--input", questions, "--max-new-tokens", NEW)
    assert cli("generate", "--adapter", tmp_path / "out", "a", "--max-new-tokens", NEW).out == as_rows.out != ""
    here = os.getcwd()
    os.chdir("/")
    try:
        again = cli("train", tmp_path / "out" / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}")
    finally:
        os.chdir(here)
    assert again.code == 0, again.err
    names = ("out", "again")
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names}) == 1
