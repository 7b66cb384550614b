"""`loratune evaluate --tasks` on tasks of a few rows, compared with stock PEFT, one choice at a time in float32."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Expected, Ran, check_refused, config_in, write_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from loratune import statistics
from loratune.cli import app
from loratune.codes import Code
from loratune.compare import harness
from loratune.compare import tasks as compared
from loratune.compare.metrics import ADAPTER, BASE
from loratune.errors import install

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]
QUESTIONS = [f"{number} and {number} make" for number in range(12)]
ANSWERS = [str(2 * number) for number in range(12)]
ROWS: list[dict[str, Any]] = [
    {"q": question, "a": answer, "choices": [str(number), answer, "no number"], "gold": 1}
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
]
CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_target": "{{' '}}{{a}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
}
TEXT = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}} {{a}}"}
MEDIAN = CHOICE | {"metric_list": [{"metric": "acc", "aggregation": "median", "higher_is_better": True}]}
GROUP = {
    "group": "both",
    "task": ["choice", "more"],
    "aggregate_metric_list": [
        {"metric": "acc", "weight_by_size": True},
        {"metric": "acc_norm", "weight_by_size": False},
    ],
}


def task(folder: Path, name: str, **keys: Any) -> Path:
    """A YAML file of a task on the rows in the same directory."""
    rows = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    values = {"task": name, **rows, "test_split": "test", "doc_to_text": "{{q}}"} | keys
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(adapter: Path, tasks: object, *options: object) -> Ran:
    ran = CliRunner().invoke(app, ["evaluate", "--adapter", str(adapter), "--tasks", str(tasks), *map(str, options)])
    return Ran(ran.exit_code, ran.stdout, ran.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """`adapter`, trained on prompts and completions, and `tasks`."""
    path = tmp_path_factory.mktemp("harness")
    config = config_in(path, tiny_dir)(training={"max_steps": 60}, output_dir=str(path / "adapter"))
    ran = CliRunner().invoke(app, ["train", str(config)])
    assert ran.exit_code == 0, ran.stderr
    folder = path / "tasks"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", ROWS)
    task(folder, "choice", **CHOICE)
    task(folder, "more", **CHOICE, process_docs=None, doc_to_text="{{q}}:")
    task(folder, "answer", **ANSWER)
    task(folder, "text", **TEXT)
    task(folder, "median", **MEDIAN)
    (folder / "both.yaml").write_text(yaml.safe_dump(GROUP))
    return path


@pytest.fixture(scope="module")
def tasks(place: Path) -> dict[str, Any]:
    """The printed results for all tasks of the directory. No environment variable changes."""
    before = dict(os.environ)
    ran = run(place / "adapter", place / "tasks", "--json")
    assert ran.code == 0 and ran.err.splitlines() == [f"running 5 tasks on the {name}" for name in (BASE, ADAPTER)]
    assert dict(os.environ) == before
    printed: dict[str, Any] = json.loads(ran.out)
    assert {key: printed[key] for key in ("limit", "chat_template")} == {"limit": None, "chat_template": False}
    return dict(printed["tasks"])


class Stock:
    """Base and adapter with stock transformers and PEFT, without padding, cache, or any code of loratune."""

    def __init__(self, adapter: Path, base: Path, which: str):
        self.tokenizer = AutoTokenizer.from_pretrained(adapter)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if which == ADAPTER:
            self.model = PeftModel.from_pretrained(self.model, str(adapter)).eval()

    @torch.no_grad()
    def likelihood(self, context: str, text: str) -> float:
        """The log-likelihood of a text after a context, or after the end-of-text token if there is none."""
        before = self.tokenizer(context).input_ids or [self.tokenizer.eos_token_id]
        after = self.tokenizer(text).input_ids
        logits = self.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum())

    @torch.no_grad()
    def answer(self, prompt: str, end: str, tokens: int) -> str:
        """The greedy answer, up to an end."""
        ids = self.tokenizer(prompt).input_ids
        new: list[int] = []
        while len(new) < tokens and end not in self.tokenizer.decode(new):
            new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == self.tokenizer.eos_token_id:
                break
        text: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return text.split(end)[0]


def right(model: Stock, prompt: str, row: dict[str, Any], by_length: bool = False) -> bool:
    """Whether the expected choice is the most likely one, optionally normalized by characters."""
    choices = row["choices"]
    scores = [model.likelihood(prompt, f" {text}") / (len(text) if by_length else 1) for text in choices]
    return max(range(3), key=scores.__getitem__) == row["gold"]


@pytest.fixture(scope="module")
def by_hand(place: Path, tiny_dir: Path) -> dict[str, dict[str, list[float]]]:
    """Metric → model → the value of each row."""
    found: dict[str, dict[str, list[float]]] = {}
    for which in (BASE, ADAPTER):
        model = Stock(place / "adapter", tiny_dir, which)
        for name, values in {
            "choice.acc": [right(model, row["q"], row) for row in ROWS],
            "choice.acc_norm": [right(model, row["q"], row, by_length=True) for row in ROWS],
            "more.acc": [right(model, f"{row['q']}:", row) for row in ROWS],
            "answer.exact_match": [model.answer(row["q"], ".", 4) == f" {row['a']}" for row in ROWS],
            "text": [model.likelihood("", f"{row['q']} {row['a']}") for row in ROWS],
        }.items():
            found.setdefault(name, {})[which] = [float(value) for value in values]
    return found


@pytest.mark.parametrize("name", ["choice.acc", "choice.acc_norm", "more.acc", "answer.exact_match"])
def test_rates_equal_an_independent_computation(
    name: str, tasks: dict[str, Any], by_hand: dict[str, dict[str, list[float]]]
) -> None:
    of_task, metric = name.split(".")
    figure = tasks[of_task][metric]
    base, adapter = by_hand[name][BASE], by_hand[name][ADAPTER]
    for model, values in ((BASE, base), (ADAPTER, adapter)):
        assert figure[model] == pytest.approx(sum(values) / 12)
        assert figure["intervals"][model] == statistics.wilson(int(sum(values)), 12).to_dict()
    lost, won = (sum(map(float.__gt__, one, other)) for one, other in ((base, adapter), (adapter, base)))
    difference = figure["difference"]
    assert difference["value"] == pytest.approx((won - lost) / 12)
    assert difference["p"] == pytest.approx(binomtest(won, won + lost).pvalue if won + lost else 1)
    interval = statistics.share_difference_interval(lost, won, 12)
    assert [difference["low"], difference["high"]] == interval.to_dict()
    is_clear = difference["p"] < 0.05 and not interval.low <= 0 <= interval.high
    assert figure["verdict"] == (("better" if won > lost else "worse") if is_clear else "indistinguishable")
    assert (figure["rows"], "stderr" in figure) == (12, False)


def test_perplexities_equal_an_independent_computation(
    tasks: dict[str, Any], by_hand: dict[str, dict[str, list[float]]]
) -> None:
    texts = [f"{row['q']} {row['a']}" for row in ROWS]
    for metric, units in (("word_perplexity", [5] * 12), ("byte_perplexity", [len(text) for text in texts])):
        figure = tasks["text"][metric]
        for model in (BASE, ADAPTER):
            expected = math.exp(-sum(by_hand["text"][model]) / sum(units))
            assert figure[model] == pytest.approx(expected, rel=1e-5)
            low, high = figure["intervals"][model]
            assert low < figure[model] < high
        assert figure["difference"]["value"] == pytest.approx(figure[ADAPTER] - figure[BASE])
        assert figure["difference"]["low"] < figure["difference"]["value"] < figure["difference"]["high"] < 0
        assert figure["verdict"] == "better"  # as lower is better
    bits, byte = tasks["text"]["bits_per_byte"], tasks["text"]["byte_perplexity"]
    assert bits[ADAPTER] == pytest.approx(math.log2(byte[ADAPTER]))


def test_metrics_that_are_not_means_use_the_harness_standard_errors(tasks: dict[str, Any]) -> None:
    figure = tasks["median"]["acc"]
    assert figure["intervals"] == {BASE: None, ADAPTER: None}
    assert all(error is not None and error >= 0 for error in figure["stderr"].values())
    assert (figure["verdict"], figure["difference"]["low"]) == (None, None)


def test_a_size_weighted_group_is_compared_over_all_rows_of_its_tasks(tasks: dict[str, Any]) -> None:
    by_size, by_task = tasks["both"]["acc"], tasks["both"]["acc_norm"]
    for model in (BASE, ADAPTER):
        values = [tasks[name]["acc"][model] for name in ("choice", "more")]
        assert by_size[model] == pytest.approx(sum(values) / 2)
        assert by_size["intervals"][model] == statistics.wilson(round(sum(values) * 12), 24).to_dict()
    assert (by_size["rows"], by_task["rows"]) == (24, 24)


def test_a_limit_with_tasks_given_as_files_and_printed_as_text(place: Path) -> None:
    files = [place / "tasks" / f"{name}.yaml" for name in ("choice", "answer")]
    ran = run(place / "adapter", f"{files[0]}, {files[1]},{files[0]}", "--limit", 3)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert "at most 3 rows" in lines[0]
    names = ["choice.acc", "choice.acc_norm", "answer.exact_match"]
    assert [line.split()[:2] for line in lines[2:]] == [[name, "3"] for name in names]


def test_requirements_on_tasks_without_data(place: Path) -> None:
    path = place / "tasks" / "choice.yaml"
    texts = ["choice.acc>=0", "choice.acc>2", "choice.bleu>0"]
    ran = run(place / "adapter", path, "--json", *(word for text in texts for word in ("--require", text)))
    check_refused(ran, 11, *[(Code.EVALUATE_REQUIREMENT, "", "--require")] * 2)
    assert "choice.acc, choice.acc_norm" in ran.errors[1]
    printed = json.loads(ran.out)
    first, *others = printed["requirements"]
    found = printed["tasks"]["choice"]["acc"]
    assert first["met"] and [first["value"], first["low"], first["high"]] == [
        found["adapter"],
        *found["intervals"]["adapter"],
    ]
    assert [one["met"] for one in others] == [False, False]
    ran = run(place / "adapter", path, "--require", "choices.acc>0")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "", "--require"))


SHUFFLING = "import random\n\n\ndef shuffled(rows):\n    return rows.select(random.sample(range(12), 12))\n"


def test_random_numbers_are_reproducible_and_the_state_is_restored(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "own.py").write_text(SHUFFLING)
    path = task(tmp_path, "shuffled", **CHOICE)
    path.write_text(path.read_text() + "process_docs: !function own.shuffled\n")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    orders = [harness.open_tasks([str(path)]).tasks["shuffled"].task_docs["q"][:] for _ in range(2)]
    assert orders[0] == orders[1] != QUESTIONS
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def silenced(adapter: Path, target: Path) -> Path:
    """A copy of an adapter that has no effect: all B are zero."""
    shutil.copytree(adapter, target)
    weights = load_file(target / "adapter_model.safetensors")
    save_file(
        {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in weights.items()},
        target / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return target


def test_an_adapter_without_effect_is_reported(place: Path, tmp_path: Path) -> None:
    adapter = silenced(place / "adapter", tmp_path / "adapter")
    ran = run(adapter, place / "tasks", "--force", "--json")
    check_refused(ran, 6, (Code.LORA_UNCHANGED, str(adapter), ""))
    assert ran.out == ""
    ran = run(adapter, place / "tasks" / "answer.yaml", "--force", "--json")
    assert ran.code == 0 and "tasks: base and adapter give the same 12 answers\n" in ran.err
    assert json.loads(ran.out)["tasks"]["answer"]["exact_match"]["verdict"] == "indistinguishable"


def test_a_chat_adapter_is_prompted_with_its_template(place: Path, tiny_dir: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 2
    config = config_in(tmp_path, tiny_dir)(
        data={"train": str(write_rows(tmp_path / "chats.jsonl", rows))}, training={"max_steps": 3}
    )
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    ran = run(tmp_path / "out", place / "tasks" / "choice.yaml", "--json")
    assert ran.code == 0 and "chat template" in ran.err
    printed = json.loads(ran.out)
    assert printed["chat_template"] is True
    for which in (BASE, ADAPTER):
        model = Stock(tmp_path / "out", tiny_dir, which)
        matches = sum(chosen(model, row) == row["gold"] for row in ROWS)
        assert printed["tasks"]["choice"]["acc"][which] == pytest.approx(matches / 12)


def chosen(model: Stock, row: dict[str, Any]) -> int:
    """The index of the choice that a model selects in a conversation without earlier turns."""
    prompt = f"<|user|>{row['q']}<|end|>\n<|assistant|>"
    scores = [model.likelihood(prompt, text) for text in row["choices"]]
    return max(range(3), key=scores.__getitem__)


VARYING = "calls = []\n\n\ndef prompt(doc):\n    calls.append(doc)\n    return f'{len(calls)} {doc[\"q\"]}'\n"


def test_a_task_with_different_prompts_per_model_is_refused(place: Path, tmp_path: Path) -> None:
    """Its code is in a file beside the YAML file."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "varying.py").write_text(VARYING)
    path = task(tmp_path, "varies", **CHOICE)
    path.write_text(path.read_text().replace("doc_to_text: '{{q}}'", "doc_to_text: !function varying.prompt"))
    ran = run(place / "adapter", path, "--limit", 2)
    check_refused(ran, 4, (Code.EVALUATE_TASK, "", "--tasks"))


@pytest.mark.parametrize(
    "keys",
    [
        {"dataset_kwargs": {"data_files": "gone.jsonl"}}, {"doc_to_text": "{{q"}, {"test_split": "dev"},
        {"doc_to_target": "{{gold + missing}}"},
    ],
)  # fmt: skip
def test_an_invalid_task_is_refused_before_the_base_is_loaded(
    keys: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    path = task(tmp_path, "bad", **CHOICE | keys)
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    ran = run(adapter, path, "--json", "--force")
    check_refused(ran, 4, (Code.EVALUATE_TASK, str(path), ""))
    assert ran.out == ""


def test_a_task_that_fails_while_it_runs_is_reported(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    for keys in ({"metric_list": [{"metric": "acc", "aggregation": "f1"}]}, {"unsafe_code": True}):
        path = task(tmp_path, "bad", **CHOICE, **keys)
        check_refused(run(place / "adapter", path), 4, (Code.EVALUATE_TASK, "", "--tasks"))


def test_tasks_and_rows_in_one_evaluation(place: Path, cli: Cli) -> None:
    """The metrics of rows have the same place as without tasks."""
    rows = write_rows(
        place / "held-out.jsonl", [{"prompt": f"{row['q']}:", "completion": f" {row['a']}"} for row in ROWS]
    )
    arguments = ("evaluate", "--adapter", place / "adapter", "--data", rows)
    tasks = ("--tasks", place / "tasks" / "answer.yaml", "--limit", 2)
    ran, without = cli(*arguments, *tasks, "--json"), cli(*arguments, "--json")
    assert (ran.code, without.code) == (0, 0), ran.err
    printed = json.loads(ran.out)
    assert [*printed["tasks"]] == ["answer"] and printed["limit"] == 2
    assert {key: printed[key] for key in json.loads(without.out)} == json.loads(without.out)
    text = cli(*arguments, *tasks)
    assert text.code == 0 and text.out.index("its base") < text.out.index("answer.exact_match")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--tasks", "gone.yaml"], (Code.EVALUATE_TASK, "gone.yaml", "--tasks")),
        (["--tasks", "empty/"], (Code.EVALUATE_TASK, "empty/", "--tasks")),
        (["--tasks", " ,"], (Code.EVALUATE_TASK, "", "--tasks")),
        ([], (Code.USAGE_CONFLICT, "", "")),
        (["--data", "rows.jsonl", "--limit", "3"], (Code.USAGE_CONFLICT, "", "--limit")),
        (["--tasks", "tasks/", "--metric", "label"], (Code.USAGE_CONFLICT, "", "--metric")),
    ],
)
def test_invalid_options_are_refused(
    options: list[str], expected: Expected, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    check_refused(cli("evaluate", "--adapter", place / "adapter", *options), 2, expected)


@pytest.mark.slow
def test_an_unknown_task_name_is_refused(place: Path) -> None:
    """The harness reads 14,000 files to list its tasks."""
    ran = run(place / "adapter", "arc_esy,hellaswag")
    check_refused(ran, 2, (Code.EVALUATE_TASK, "", "--tasks"))
    assert "did you mean arc_easy" in ran.err


def test_a_missing_harness_package_is_reported(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "find_spec", lambda name: None)
    ran = cli("evaluate", "--adapter", place / "adapter", "--tasks", "arc_easy")
    check_refused(ran, 2, (Code.SYSTEM_MISSING_PACKAGE, "", "--tasks"))
    assert ran.out == "" and ran.err.endswith(f"; {install('eval')}\n") and ran.err.count("\n") == 1


def test_two_tasks_with_one_name_are_refused(place: Path, tmp_path: Path) -> None:
    """The harness would run only one of them. A file that is given twice is the same task."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    first = task(tmp_path, "bad", **CHOICE)
    second = Path(shutil.copy(first, tmp_path / "second.yaml"))
    second.write_text(second.read_text().replace("{{q}}", "{{q}}?"))
    expected = (Code.EVALUATE_TASK, str(second), "--tasks")
    check_refused(run(place / "adapter", f"{first},{second}"), 2, expected)
    assert run(place / "adapter", f"{first},{tmp_path}/../{tmp_path.name}/bad.yaml", "--limit", 1).code == 0


def test_task_code_that_exits_the_process_is_an_error(place: Path, tmp_path: Path) -> None:
    """It would look like success."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "own.py").write_text("def text(row):\n    raise SystemExit(0)\n")
    path = task(tmp_path, "bad", **CHOICE | {"doc_to_text": "own"})
    path.write_text(path.read_text().replace("doc_to_text: own", "doc_to_text: !function own.text"))
    check_refused(run(place / "adapter", path), 4, (Code.EVALUATE_TASK, str(path), ""))


def test_a_task_file_is_not_overwritten_by_the_output(place: Path, cli: Cli, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    path = task(tmp_path, "bad", **CHOICE)
    for tasks in (path, tmp_path):
        output = ("--data", tmp_path / "rows.jsonl", "--output", path, "--overwrite")
        ran = cli("evaluate", "--adapter", place / "adapter", "--tasks", f"{tasks}", *output)
        check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(path), "--output"))
