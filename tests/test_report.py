"""Run records and reports: what a run records, the loss curve in the terminal, and the HTML page of `report`."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import screenshot_report
from conftest import ROWS, Ran, check_refused, config_in, write_rows
from running import RESTLESS, MakeConfig, stopped
from safetensors.torch import load_file, save_file
from test_adapter_stats import save_adapter
from test_preferences import config as preferences_config

from loratune.cli.loss_plot import loss_plot
from loratune.codes import Code
from loratune.compare.answers import ComparedRow, ModelAnswer
from loratune.compare.comparison import compare_rows
from loratune.data.report import Report
from loratune.errors import install
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.lora.stats import Update
from loratune.report import charts, facts
from loratune.report import page as report_page
from loratune.report.charts import Line, Point, heat_map, histogram, line_chart, point_chart
from loratune.report.study import BEST, DONE, StudyResults, TrialResult
from loratune.training.results import MOST_HELD_OUT, MOST_LOSSES, thinned

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]
HOSTILE = "<script>alert(1)</script>\"'& \u202eright to left\x1b[31m \u05e9\u05dc\u05d5\u05dd"
DETERMINISTIC = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Cli) -> tuple[Path, dict[str, Any]]:
    """A folder with the adapters `one` and `two`, and what `train --json` printed for the first.

    The second was trained without `--json`, so its output ends with the loss curve.
    """
    folder = tmp_path_factory.mktemp("runs")
    make = config_in(folder, tiny_dir)
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "eval_steps": 5}
    config = make(data={"validation": 0.2}, training=training, output_dir=str(folder / "one"))
    ran = cli("train", config, "--json")
    assert ran.code == 0, ran.err
    changes = ("lora.r=4", "lora.target_modules=all-linear", f"output_dir={folder / 'two'}")
    second = cli("train", config, *(word for one in changes for word in ("--set", one)))
    assert second.code == 0 and 0 <= second.out.index("  saved ") < second.out.index(". loss, o held-out by step")
    return folder, json.loads(ran.out)


def record_of(adapter: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((adapter / "loratune.json").read_text(encoding="utf-8"))
    return record


class Page(HTMLParser):
    """The content of a page. Fails on unbalanced tags and duplicate ids."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if (own := values.get("id")) is not None:
            assert own not in self.ids
            self.ids.add(own)
        self.loads += [f"{value}" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split() if self.open[-1:] != ["style"] else []

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def check_inert(self) -> None:
        """It loads nothing, runs nothing, and its content security policy says so."""
        assert not self.tags & {"script", "link", "iframe", "object", "embed", "form", "base", "video", "audio"}
        assert all(one.startswith(("#", "data:image/png;base64,")) for one in self.loads)
        assert {one[1:] for one in self.loads if one.startswith("#")} <= self.ids
        assert "http://" not in self.html and "https://" not in self.html and "@import" not in self.html
        assert "default-src 'none'" in self.html
        assert not re.search(r"\son\w+=", re.sub(r">[^<]*<", "><", self.html))


# What a run records


def test_record_contains_the_whole_curve(runs: tuple[Path, dict[str, Any]]) -> None:
    record = record_of(runs[0] / "one")
    losses = [entry for entry in record["curve"] if "loss" in entry]
    held_out = [entry for entry in record["curve"] if "eval_loss" in entry]
    assert [entry["step"] for entry in losses] == [*range(1, 13)]
    assert [entry["step"] for entry in held_out] == [5, 10, 12]
    names = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert all(entry.keys() == names for entry in losses)
    assert all(entry.keys() == {"step", "epoch", "eval_loss", "tokens"} for entry in held_out)
    assert all(after["tokens"] > before["tokens"] > 0 for before, after in pairwise(losses))
    assert losses[-1]["tokens"] == record["metrics"]["tokens"] == 3 * record["splits"]["train"]["tokens"]
    assert all(entry["tokens_per_second"] > 0 for entry in losses)
    train, validation = record["splits"]["train"], record["splits"]["validation"]
    assert (sum(train["lengths"].values()), sum(validation["lengths"].values())) == (train["rows"], validation["rows"])
    assert train["rows"] + validation["rows"] == len(ROWS)
    assert record["machine"]["peak_memory"]["process"] > 100 << 20
    assert record["machine"].keys() >= {"processor", "device", "threads"}


@pytest.mark.slow  # the same values as `test_resuming.py` has for losses and rates
def test_resumed_run_has_the_same_curve_as_an_uninterrupted_one(
    run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    config = run_config(data={"validation": 0.2}, **RESTLESS)
    ran = stopped(cli, tmp_path / "out.partial", "train", config)
    assert ran.code in (0, 130)
    if ran.code:  # otherwise the run ended before the signal arrived
        assert cli("train", config, "--resume").code == 0
    assert cli("train", config, "--set", f"output_dir={tmp_path / 'straight'}").code == 0
    resumed, straight = (
        [{name: entry.get(name) for name in DETERMINISTIC} for entry in record_of(tmp_path / name)["curve"]]
        for name in ("out", "straight")
    )
    assert resumed == straight


def test_long_curves_are_thinned() -> None:
    """To less than 200 kB, keeping the first and last losses, and the lowest held-out loss."""
    values = {"learning_rate": 0.1 / 3, "grad_norm": 1 / 3, "epoch": 1 / 3, "tokens": 10**9, "tokens_per_second": 1e4}
    history: list[dict[str, float]] = []
    for step in range(1, 20_001):
        history.append({"loss": 1 / step, **values, "step": step})
        if step % 10 == 0:
            history.append({"eval_loss": abs(step - 7770) / 3, "epoch": 1 / 3, "tokens": 10**9, "step": step})
    kept = thinned(history)
    losses = [entry["step"] for entry in kept if "loss" in entry]
    held_out = [entry["step"] for entry in kept if "eval_loss" in entry]
    assert (len(losses), losses[0], losses[-1]) == (MOST_LOSSES, 1, 20_000)
    assert len(held_out) <= MOST_HELD_OUT and {10, 7770, 20_000} <= {*held_out}
    assert [*losses] == sorted(losses)
    assert len(json.dumps(kept, indent=2)) < 200_000
    assert thinned(history[:50]) == history[:50]


def test_recorded_row_lengths_are_accurate_to_three_percent() -> None:
    report = Report()
    report.lengths.update({length: 2 for length in range(1, 40_000)})
    lengths = {int(length): count for length, count in report.record()["lengths"].items()}
    assert sum(lengths.values()) == 2 * 39_999 and len(lengths) < 400
    assert all(lengths[length] == 2 for length in range(1, 64))
    assert all(after - before <= max(1, 0.032 * after) for before, after in pairwise(sorted(lengths)))


def test_train_json_is_one_object(runs: tuple[Path, dict[str, Any]], run_config: MakeConfig, cli: Cli) -> None:
    folder, printed = runs
    metrics = record_of(folder / "one")["metrics"]
    assert printed["adapter"] == str(folder / "one")
    assert printed["adapter_bytes"] == (folder / "one" / "adapter_model.safetensors").stat().st_size
    assert {name: printed[name] for name in metrics} == metrics
    assert printed["peak_memory"]["process"] > 0 and printed["tokens_per_second"] > 0


# The loss curve in the terminal


def test_terminal_loss_curve_fits_the_terminal_and_its_encoding() -> None:
    curve = [{"step": step, "loss": 6.0 / step} for step in range(1, 41)] + [{"step": 40, "eval_loss": 2.0}]
    for encoding, frame in (("utf-8", "─"), ("ascii", "-"), ("cp1252", "-")):
        lines = loss_plot(curve, encoding)
        assert 8 <= len(lines) <= 12 and all(len(line) <= 80 for line in lines)
        "\n".join(lines).encode(encoding)
        assert frame * 60 in lines[1]
        assert "held-out" in lines[0] and sum(line.count("o") for line in lines[1:]) == 1
        assert lines[2].endswith(" 6.0000") and lines[-3].endswith(" 0.1500") and lines[-1].split() == ["1", "40"]
    assert loss_plot(curve[:2], "utf-8") == []
    assert "held-out" not in loss_plot(curve[:3], "utf-8")[0]
    assert [line[-6:] for line in loss_plot([{"step": step, "loss": 2.5} for step in range(3)], "utf-8")].count(
        "2.5000"
    ) == 1


# The page


def test_page_of_a_run_shows_the_values_of_its_record(
    runs: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path
) -> None:
    """It needs no base, and is the same each time."""
    shutil.copytree(runs[0] / "one", tmp_path / "one")
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    for path in (first, second):
        ran = cli("report", "--adapter", tmp_path / "one", "--output", path)
        assert (ran.code, ran.out) == (0, f"{path}\n"), ran.err
    assert first.read_bytes() == second.read_bytes()
    page, record = Page(first), record_of(runs[0] / "one")
    page.check_inert()
    metrics, gain = record["metrics"], record["metrics"]["gain"]
    low, high = metrics["held_out_interval"]
    for text in (
        f"{low:.4f} to {high:.4f}",
        f"{metrics['first_loss']:.4f} → {metrics['last_loss']:.4f}", f"{metrics['held_out_loss']:.4f}",
        f"{metrics['tokens']:,}", f"{gain['better_by']:+.3f}", f"{gain['base']:.4f}", f"{gain['adapter']:.4f}",
        f"{metrics['tokens_per_second']:,.1f}", record["fingerprints"]["base"], record["versions"]["torch"],
        "/gone/base", "--set output_dir=NEW", "effective rank", "learning_rate: 0.01",
    ):  # fmt: skip
        assert text in page.text, text
    names = "loss loss-n learning_rate grad_norm tokens_per_second lengths-0-0 lengths-0-1 norm-0 effective_rank-0-n"
    assert {f"{name}-figure_1" for name in names.split()} <= page.ids
    assert "not recorded" not in page.text and len(page.html) < 500_000


def test_page_of_preference_runs_shows_their_metrics(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    """Next to an SFT run: the objective, the unit of its loss, accuracy, margin, and log-probabilities before and
    after."""
    for objective in ("dpo", "kto"):
        path = preferences_config(run_config, tmp_path, objective, output_dir=str(tmp_path / objective))
        assert cli("train", path).code == 0
    for name in ("dpo", "kto"):
        ran = cli("report", "--adapter", tmp_path / name, "--output", tmp_path / f"{name}.html")
        assert ran.code == 0, ran.err
    page, figures = Page(tmp_path / "dpo.html"), record_of(tmp_path / "dpo")["metrics"]["preferences"]
    page.check_inert()
    accuracy, (low, high) = figures["reward_accuracy"]["value"], figures["reward_accuracy"]["interval"]
    change, ends = figures["chosen"]["change"], figures["chosen"]["change_interval"]
    for text in (
        "trained by dpo with beta 0.1, the base as the reference", "gain, a pair", "held-out loss, a pair",
        "of 12 validation pairs", "Loss of the objective, per pair",
        f"reward accuracy {accuracy:.3f} 95 % {low:.4f} to {high:.4f}, margin {figures['reward_margin']['value']:.3f}",
        f"reward accuracy {accuracy:.4f} (95 % {low:.4f} to {high:.4f})",
        f"ranking accuracy before {figures['ranking_accuracy_before']['value']:.4f} (95 %",
        f"preferred length after {figures['preferred_length_after']:.4f}",
        f"chosen answers: change {change:.4f} (95 % {ends[0]:.4f} to {ends[1]:.4f})", "chosen answers 12",
        "rejected answers: log-probability before", "Log-probability of rejected answers, in nats",
    ):  # fmt: skip
        assert text in page.text, text
    names = ("reward_accuracy", "reward_margin", "chosen_log_probability", "rejected_log_probability")
    assert {f"{name}-figure_1" for name in names} <= page.ids and "not recorded" not in page.text
    judged = Page(tmp_path / "kto.html")
    assert "trained by kto with beta 0.1" in judged.text and "gain, an answer" in judged.text
    assert "undesirable_log_probability-figure_1" in judged.ids
    assert "chosen_log_probability-figure_1" not in judged.ids


def test_page_of_two_adapters_on_rows_lists_the_worst_rows_first(
    runs: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path
) -> None:
    """Untrusted text in rows is shown as plain text only."""
    rows = [*ROWS[:5], {"prompt": HOSTILE, "completion": "</p><img src=http://evil.example/x onerror=alert(1)>"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    path = tmp_path / "page.html"
    ran = cli("report", "--adapter", runs[0] / "one", "--against", runs[0] / "two", "--data", data, "--output", path)
    assert ran.code == 0, ran.err
    found = json.loads(
        cli("evaluate", "--adapter", runs[0] / "one", "--against", runs[0] / "two", "--data", data, "--json",
            "--worst", "6").out
    )  # fmt: skip
    page = Page(path)
    assert not page.tags & {"script", "img"} and "\u202e" not in page.html and "\x1b" not in page.html
    assert "\\u202eright to left\\x1b[31m" in page.text and "<script>alert(1)</script>" in page.text
    page.html = page.html.replace("http://evil.example", "")  # displayed as text
    page.check_inert()
    for model in ("base", "adapter", "against"):
        assert f"{found[model]['loss']:.4f}" in page.text
    changes = [float(text) for text in re.findall(r'<span class="change [^>]*>([^<]*)<', page.html)]
    assert len(changes) == len(rows) and changes == sorted(changes, reverse=True)
    worst = [row["adapter"]["loss"] - row["against"]["loss"] for row in found["worst"]]
    assert [change for change in changes if change > 0] == pytest.approx(worst, abs=6e-4)
    assert "lora.target_modules" in page.text and "Each adapter has its own scale" in page.text
    for other in ("base", "two"):
        assert f"one less {other}, on the same rows" in page.text


CHAT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompts", "titles"),
    [
        (["a", "b"], ["a", "b"]),
        ([CHAT.format("Who?"), CHAT.format("Where?\nAnd when?")], ["Who?", "Where? And when?"]),
        ([CHAT.format("Who?")], ["system Be brief. user Who? assistant"]),
        (["Sort:\n3 1\n### Answer:", "Sort:\n2 1\n### Answer:"], ["3 1", "2 1"]),
    ],
    ids=["text", "chat", "one", "template"],
)
def test_wrong_answers_come_first_and_titles_omit_the_shared_prompt(prompts: list[str], titles: list[str]) -> None:
    def row(number: int, exact: float, loss: float) -> ComparedRow:
        values = {"exact_match": exact, "label_accuracy": exact}
        answers = {"base": ModelAnswer(1.0, "x", values), "adapter": ModelAnswer(loss, "y", values)}
        return ComparedRow(number, "rows.jsonl", 1, prompts[number % len(prompts)], "e", 1, answers)

    rows = [row(0, 1.0, 9.0), row(1, 0.0, 1.5), row(2, 0.0, 2.0), row(3, 1.0, 1.0)]
    evaluation = replace(compare_rows(rows), special_tokens=("<|im_start|>", "<|im_end|>"))
    shown = report_page.answers(evaluation)
    assert [(one.right["adapter"], one.shown_change) for one in shown] == [
        (False, "+1.000"), (False, "+0.500"), (True, "+8.000"), (True, "0.000"),
    ]  # fmt: skip
    assert [one.title for one in shown] == [titles[n % len(titles)] for n in (2, 1, 0, 3)]


def test_losses_of_different_objectives_get_separate_charts() -> None:
    read = facts.read({"curve": [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "eval_loss": 4.5}]})
    subjects = [
        report_page.Subject(name, "base", objective, {"rank": "8", "size": "1 kB"}, read, [], {}, "", None, [])
        for name, objective in (("one", ""), ("two", "dpo with beta 0.1"))
    ]
    html = report_page.render(subjects, None, None, [])
    assert "loss-figure_1" in html and "loss-1-figure_1" in html and "dpo with beta 0.1</h3>" in html
    assert "The losses of different objectives are not comparable." in html
    html = report_page.render([subjects[0], subjects[0]], None, None, [])
    assert "loss-figure_1" in html and "loss-1-figure_1" not in html and "comparable" not in html


def test_tables_of_two_runs_distinguish_none_from_unknown() -> None:
    """A section that one run lacks is listed only once in the differing settings."""
    split = dict.fromkeys(("rows", "duplicates", "dropped", "truncated", "tokens", "supervised", "longest"), 1)
    record = {"splits": {"train": split}, "fingerprints": {"base": "b"}, "seed": 1}
    tested = {"splits": {"train": split, "test": split}, "fingerprints": {"base": "b", "test": "t"}}
    read = [facts.read(one) for one in (record, tested, {})]
    rows = {name: values for table in facts.tables(read, [{}] * 3).values() for name, values in table.items()}
    assert rows["test rows"] == ["none", "t", None] and rows["seed"] == ["1", None, None]
    assert rows["held-out loss"] == ["none", "none", None] and rows["loss of the last step"] == [None] * 3
    settings = [{"data.test": "null", "data.x": "1"}, {"data.test.path": "t.jsonl", "data.x": "1"}]
    assert facts.differing(settings) == {"data.test.path": ["null", "t.jsonl"]}


def test_page_of_an_adapter_without_a_record(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "foreign", use_dora=True, modules_to_save=["lm_head"])
    ran = cli("report", "--adapter", "foreign")
    assert (ran.code, ran.out) == (0, "foreign-report.html\n"), ran.err
    page = Page(tmp_path / "foreign-report.html")
    page.check_inert()
    assert page.text.count("not recorded") >= 10
    stats = json.loads(cli("params", "--adapter", "foreign", "--json").out)
    norms = [update["norm"] for update in stats["updates"] if update["module"].endswith("q_proj")]
    assert f"{min(norms):.3g} to {max(norms):.3g}" in page.text
    assert (
        "/gone/base" in page.text and "DoRA" in page.text and "lm_head" in page.text and "norm-0-figure_1" in page.ids
    )


def broken(tensors: dict[str, Any]) -> dict[str, Any]:
    """Make an update NaN."""
    next(tensor for name, tensor in tensors.items() if "lora_B" in name).fill_(float("nan"))
    return tensors


def far_apart(tensors: dict[str, Any]) -> dict[str, Any]:
    """Move layers so far apart that the ones between them exist in no model."""
    return {name.replace("layers.1.", f"layers.{10**12}."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("edit", [broken, far_apart])
def test_page_of_unusual_weights(edit: Callable[..., dict[str, Any]], cli: Cli, tmp_path: Path) -> None:
    save_adapter(tmp_path / "it")
    weights = tmp_path / "it" / WEIGHTS_FILE
    save_file(edit(load_file(weights)), weights, {"format": "pt"})
    ran = cli("report", "--adapter", tmp_path / "it", "--output", tmp_path / "page.html")
    assert ran.code == 0, ran.err
    page = Page(tmp_path / "page.html")
    assert ("norm-0-figure_1" in page.ids) == (edit is far_apart)
    assert (f"[{Code.ADAPTER_NOT_FINITE}]" in page.text) == (edit is broken)
    assert ("no update of this adapter can be measured" in page.text) == (edit is broken)


def test_widely_spread_lengths_get_a_logarithmic_axis() -> None:
    """Otherwise the many short rows would form a single bar. The cut is drawn only if a row is longer."""
    scattered = histogram("a", "A", {8: 100, 12: 80, 300: 3, 9000: 1}, 1024)
    even = histogram("b", "B", {30: 4, 35: 9, 44: 2}, 1024)
    assert ">1,000<" in scattered and ">10<" in scattered and ">cut at 1,024<" in scattered
    assert ">40<" in even and "cut at" not in even


def test_invalid_record_values_are_ignored() -> None:
    nonsense: list[Any] = [None, 3, "x", [], {}, [1, "x", {"step": -1}, {"step": 1, "loss": float("nan")}]]
    keys = ("curve", "metrics", "splits", "machine", "versions", "fingerprints", "seed", "processes", "changes")
    for value in nonsense:
        known = facts.read(dict.fromkeys(keys, value))
        assert known.curve == [] and known.gain is None and known.splits == {} and known.metrics == {}
    test = {"loss": 1.5, "interval": [1.25, 1.75]}
    known = facts.read(
        {"metrics": {"kept_step": 7, "test": test, "seconds": float("inf"), "x": True, "held_out_interval": [1, "x"]}}
    )
    assert known.metrics == {"kept_step": 7, "test loss": 1.5} and known.intervals == {"test interval": (1.25, 1.75)}
    tiles = {tile.label: tile for tile in facts.tiles(known, {})}
    assert (tiles["test loss"].value, tiles["held-out loss"].tone) == ("1.5000", "absent")
    assert "1.2500 to 1.7500" in tiles["test loss"].note


SPLIT = dict.fromkeys(("rows", "duplicates", "dropped", "truncated", "tokens", "supervised", "longest"), 1)
EXTREMES: dict[str, dict[str, Any]] = {
    "numbers": {
        "metrics": dict.fromkeys(("first_loss", "last_loss", "tokens", "seconds", "steps"), 10**400),
        "curve": [{"step": 10**400, "loss": 1}, {"step": 1, "loss": 2}],
        "splits": {"train": SPLIT | {"lengths": {str(10**20): 1}}},
        "machine": {"peak_memory": {"process": 10**400}},
    },
    "large": {
        "curve": [{"step": step, "loss": (-1) ** step * 1e308, "grad_norm": 1e308} for step in range(99)],
        "splits": {"train": SPLIT | {"lengths": {str(10**15): 10**15}}},
    },
    "many": {
        "curve": [{"step": step, "loss": step % 7} for step in range(30_000)],
        "splits": {f"{number}": SPLIT | {"lengths": {"3": 1}} for number in range(2000)},
    },
    "many rows": {"splits": {"train": SPLIT | {"lengths": {"3": 10**400}}}},
    "depth": {
        "metrics": json.loads('{"a": ' * 800 + "1" + "}" * 800),
        "changes": [{"key": "k", "step": 1, "was": json.loads("[" * 800 + "]" * 800), "is": 1}],
        "splits": {"train": SPLIT | {"lengths": {"0": 1}}},
    },
}


@pytest.mark.parametrize("name", EXTREMES)
def test_page_of_an_extreme_record_stays_small(name: str, runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Any numbers in a record of unknown origin must give a page quickly."""
    record = facts.read(json.loads(json.dumps(record_of(runs[0] / "one") | EXTREMES[name])))
    subject = report_page.Subject("it", "base", "", {"rank": "8", "size": "1 kB"}, record, [], {}, "", 1024, [])
    (tmp_path / "page.html").write_text(report_page.render([subject], None, None, []), encoding="utf-8")
    assert len(Page(tmp_path / "page.html").html) < 1_000_000


def test_oversized_record_is_refused(runs: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(runs[0] / "one", tmp_path / "one"))
    with (adapter / "loratune.json").open("a") as file:
        file.truncate(1 << 34)
    ran = cli("report", "--adapter", adapter, "--output", tmp_path / "page.html")
    check_refused(ran, 5, (Code.ADAPTER_INVALID, str(adapter / "loratune.json"), ""))


def test_long_texts_are_shortened() -> None:
    shown = report_page.block("a" * 600_000 + "b" * 400_000)
    assert len(shown) < charts.LONGEST_TEXT + 60 and shown[0] == "a" and shown[-1] == "b"
    assert "998,000 characters left out" in shown
    assert charts.label("learning rate") == "learning rate"
    assert charts.label("abc\ndef" * 100, 9) == "abc\\n…def"


STRANGE = "\u202e\u2066<b>\x1b[31m\n" + "x" * 200_000
CHARTS: dict[str, Callable[[str], str]] = {
    "lines": lambda text: line_chart("c", text, [Line([1], [1.0])]),
    "histogram": lambda text: histogram("c", text, {3: 1}, None),
    "points": lambda text: point_chart("c", text, [Point(text, 1.0, None), Point("1", 2.0, (1, 3))], text, [text, "1"]),
    "numbers": lambda text: point_chart("c", text, [Point("0" * 200_000 + "1", 1.0, None)], text, []),
    "heat map": lambda text: heat_map("c", text, [[1.0]], [text], [text], 0.0, (text, text)),
}


def check_shown(html: str, longest: int) -> None:
    """The page contains no characters that hide or reorder text, and no unreadably long text."""
    assert not re.search(r"[\u202e\u2066\x1b]|<b>|x{3000}|0{3000}", html) and len(html) < longest


@pytest.mark.parametrize("name", CHARTS)
def test_charts_escape_and_shorten_any_label(name: str) -> None:
    check_shown(CHARTS[name](STRANGE), 60_000)


def test_page_escapes_and_shortens_any_text() -> None:
    values = dict.fromkeys(("a", STRANGE), STRANGE)
    trial = {"number": 0, "settings": values, "values": values, "adapter": STRANGE, "note": STRANGE}
    trials = [
        TrialResult(**trial, state=DONE, loss=1.0, verdict=BEST),
        TrialResult(**trial | {"number": 1, "settings": {}}, state=STRANGE),
    ]
    results = StudyResults(STRANGE, STRANGE, ["a", STRANGE], 3, 3, trials, STRANGE, measured_by=STRANGE)
    updates = [Update(STRANGE, 1, (2, 2), 1.0, 1.0, 1.0, 4), Update(f"layers.0.{STRANGE}", 1, (2, 2), 1.0, 1.0, 1.0, 4)]
    adapter = {"rank": STRANGE, "size": STRANGE, STRANGE: STRANGE}
    names = [STRANGE, "other"]
    record = facts.read({"versions": {STRANGE: STRANGE}, "splits": {STRANGE: SPLIT | {"reasons": {STRANGE: 1}}}})
    subjects = [
        report_page.Subject(name, STRANGE, STRANGE, adapter, record, updates, {STRANGE: name}, STRANGE, 3, [STRANGE])
        for name in names
    ]
    check_shown(report_page.render(subjects, None, STRANGE, [STRANGE], sweep=results), 300_000)


def test_invalid_outputs_and_missing_matplotlib_are_refused(
    runs: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path
) -> None:
    adapter, page = runs[0] / "one", tmp_path / "page.html"
    page.write_text("<!DOCTYPE html>precious")
    ran = cli("report", "--adapter", adapter, "--output", page)
    check_refused(ran, 2, (Code.OUTPUT_EXISTS, str(page), "--output"))
    inside = adapter / "page.html"
    ran = cli("report", "--adapter", adapter, "--output", inside)
    check_refused(ran, 2, (Code.OUTPUT_UNUSABLE, str(inside), "--output"))
    ran = cli("report", "--adapter", adapter, "--output", tmp_path / "new.html", "--set", "data.max_length=8")
    check_refused(ran, 2, (Code.USAGE_CONFLICT, "", "--set"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        ran = cli("report", "--adapter", tmp_path / "gone", "--output", tmp_path / "new.html")
    check_refused(ran, 2, (Code.SYSTEM_MISSING_PACKAGE, "", ""))
    assert install("report") in ran.err
    assert page.read_text() == "<!DOCTYPE html>precious" and [*tmp_path.iterdir()] == [page]
    assert cli("report", "--adapter", adapter, "--output", page, "--overwrite").code == 0
    assert Page(page).tags


@pytest.mark.slow
@pytest.mark.skipif(screenshot_report.find_browser() is None, reason="there is no Chromium")
def test_page_renders_correctly_in_a_real_browser(runs: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path) -> None:
    """No requests, console errors, clipping or horizontal scrolling; the light and dark schemes differ."""
    adapter, page = Path(shutil.copytree(runs[0] / "one", tmp_path / "one")), tmp_path / "page.html"
    metrics = {"first_loss": 123.4567, "last_loss": 118.9, "tokens": 12_345_678_901, "seconds": 1e6, "steps": 10**7}
    record = record_of(adapter)
    (adapter / "loratune.json").write_text(json.dumps(record | {"metrics": record["metrics"] | metrics}))
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": HOSTILE * 4 + "x" * 150, "completion": HOSTILE}, *ROWS[:3]])
    ran = cli("report", "--adapter", adapter, "--against", runs[0] / "two", "--data", data, "--output", page)
    assert ran.code == 0, ran.err
    path = screenshot_report.find_browser()
    assert path is not None
    with screenshot_report.browsing(path) as browser:
        for screen in screenshot_report.SCREENS:
            seen = {scheme: browser.look(page, screen, scheme) for scheme in screenshot_report.SCHEMES}
            assert [screenshot_report.faults(one, screen) for one in seen.values()] == [[], []]
            assert seen["light"].background != seen["dark"].background
            assert all(one.image.startswith(b"\x89PNG") for one in seen.values())
