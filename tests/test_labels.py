"""Labels: their scores, how sure they are, and the base that a prompt tells the task."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import check_refused, once, write_rows
from fork_server import ForkServer
from peft import AutoPeftModelForCausalLM
from running import Cli
from transformers import AutoTokenizer

import loratune
from loratune.codes import Code
from loratune.compare import prompted, temperature
from loratune.compare.classification import Classification
from loratune.compare.labels import probabilities
from loratune.data.formats import Conversation, Plain

LABELS = ("red", "green", "blue")
WORDS = {"red": "rose tomato blood brick", "green": "grass leaf frog lime", "blue": "sky sea jeans ink"}


def rows(count: int, start: int = 0, chat: bool = False) -> list[dict[str, Any]]:
    """Things and their colours; a few have another one than their word says."""
    found: list[dict[str, Any]] = []
    for number in range(start, start + count):
        label = LABELS[number % 3]
        thing = WORDS[label].split()[number // 3 % 4]
        shown = LABELS[(number + 1) % 3] if number % 17 == 5 else label
        text = f"{thing} number {number}"
        if chat:
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": shown}]
            found.append({"messages": turns})
        else:
            found.append({"prompt": f"{text}: ", "completion": shown})
    return found


@pytest.fixture(scope="module", params=["texts", "chats"])
def trained(
    request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory, processes: ForkServer
) -> Path:
    """The folder of an adapter of a tiny model in float32, and of unseen rows."""
    chat, kept = request.param == "chats", tmp_path_factory.mktemp("kept")

    def make(folder: Path) -> None:
        config = {
            "model": {"name_or_path": str(tiny_dir), "dtype": "float32"},
            "data": {"train": str(write_rows(kept / "rows.jsonl", rows(120, chat=chat)))},
            "lora": {"r": 8, "target_modules": "all-linear"},
            "training": {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 8},
            "output_dir": str(folder / "adapter"),
        }
        write_rows(folder / "unseen.jsonl", rows(30, start=600, chat=chat))
        (folder / "config.yaml").write_text(json.dumps(config))
        child = processes.start("train", folder / "config.yaml")
        assert child.wait() == 0, child.said()

    return once(tmp_path_factory, f"labels-{request.param}", make)


def test_scores_are_those_of_plain_peft(trained: Path) -> None:
    """Of each label with its end, after the prompt that stock transformers makes."""
    adapter = loratune.Adapter(trained / "adapter")
    unseen = [json.loads(line) for line in (trained / "unseen.jsonl").read_text().splitlines()]
    asked = [row["messages"][:-1] if "messages" in row else row["prompt"] for row in unseen]
    found = adapter.classify(asked)
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(trained / "adapter", dtype=torch.float32).eval()
    for prompt, one in list(zip(asked, found, strict=True))[:8]:
        text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False
        )  # fmt: skip
        scores = []
        for label in one.probabilities:
            ends = adapter.record["labels"][next(key for key in adapter.record["labels"] if key.strip() == label)]
            start = tokenizer(text, add_special_tokens=isinstance(prompt, str)).input_ids
            ids = torch.tensor([[*start, *ends]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[len(start) - 1 + at, id]) for at, id in enumerate(ends)))
        expected = np.exp(np.array(scores) - np.logaddexp.reduce(scores))
        assert [*one.probabilities.values()] == pytest.approx(expected, abs=1e-5)
        assert one.label == [*one.probabilities][int(expected.argmax())]
        assert one.probability == pytest.approx(expected.max(), abs=1e-5)


def test_evaluate_says_how_sure_the_labels_are(trained: Path, cli: Cli) -> None:
    """And what the base answers if it is told the task; requirements may be about both."""
    ran = cli(
        "evaluate", "--adapter", trained / "adapter", "--data", trained / "unseen.jsonl", "--json",
        "--require", "accuracy>=0.3", "--require", "exact_match>=prompted",
    )  # fmt: skip
    found = json.loads(ran.out)
    assert ran.code in (0, 11), ran.err
    classes = found["classification"]
    assert {*classes["labels"]} == {*LABELS} or {label.strip() for label in classes["labels"]} == {*LABELS}
    assert 0 <= found["adapter"]["accuracy"] <= 1 and found["adapter"]["log_loss"] == pytest.approx(classes["log_loss"])
    assert found["adapter"]["brier"] == pytest.approx(classes["brier"])
    assert [one["share"] for one in classes["coverage"]] == sorted(
        (one["share"] for one in classes["coverage"]), reverse=True
    )
    assert sum(one["rows"] for one in classes["classes"]) == 30
    assert found["prompted"]["prompt"] in ("8 examples", "a prompt that names the labels", prompted.ALONE)
    assert "exact_match" in found["difference_from_prompted"] and "loss" not in found["difference_from_prompted"]
    shown = cli("evaluate", "--adapter", trained / "adapter", "--data", trained / "unseen.jsonl")
    assert "prompted base" in shown.out.splitlines()[0] and "  how sure?" in shown.out and "precision" in shown.out


def test_the_user_tells_the_base(trained: Path, cli: Cli) -> None:
    words = ("--few-shot", 3, "--base-prompt", "A colour, please: {prompt}")
    ran = cli("evaluate", "--adapter", trained / "adapter", "--data", trained / "unseen.jsonl", *words, "--json")
    assert json.loads(ran.out)["prompted"]["prompt"] == "its words and 3 examples", ran.err
    ran = cli("evaluate", "--adapter", trained / "adapter", "--data", trained / "unseen.jsonl", "--base-prompt", "Hi")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "", "--base-prompt"))


def test_classify_labels_rows(trained: Path, cli: Cli, tmp_path: Path) -> None:
    """Of files and arguments; unsure ones stay empty."""
    out = tmp_path / "out.csv"
    source = ("--adapter", trained / "adapter", "--input", trained / "unseen.jsonl")
    ran = cli("classify", *source, "--output", tmp_path / "out.jsonl")
    assert ran.code == 0, ran.err
    labelled = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(labelled) == 30 and {row["label"] for row in labelled} <= {*LABELS}
    middle = sorted(row["probability"] for row in labelled)[15]
    ran = cli("classify", *source, "--output", out, "--abstain-below", middle)
    assert ran.code == 0 and out.read_text().count(",") > 30, ran.err
    again = cli("classify", *source, "--json", "--abstain-below", middle)
    empty = [json.loads(line)["label"] == "" for line in again.out.splitlines()]
    assert empty == [row["probability"] < middle for row in labelled]
    ran = cli("classify", "--adapter", trained / "adapter", "--labels", "blue,violet", "sea number 4: ")
    assert ran.code == 0 and ran.out.split()[1] in ("blue", "violet"), ran.err
    check_refused(cli("classify", *source, "--labels", "blue"), 2, (Code.USAGE_BAD_VALUE, "", "--labels"))


def test_adapters_of_other_programs_are_compared_too(trained: Path, cli: Cli, tmp_path: Path) -> None:
    """Their training rows are not known, so that no example can be shown."""
    copy = Path(shutil.copytree(trained / "adapter", tmp_path / "copy"))
    for name in ("run.yaml", "loratune.json", "train_rows.hashes"):
        (copy / name).unlink()
    rows_of = write_rows(tmp_path / "rows.jsonl", rows(30, start=600))
    ran = cli("evaluate", "--adapter", copy, "--data", rows_of, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert any("another program made the adapter" in line for line in found["notes"]) and "prompted" in found
    ran = cli("evaluate", "--adapter", copy, "--data", rows_of, "--few-shot", 2)
    check_refused(ran, 4, (Code.DATA_NOT_FOUND, str(copy), "--few-shot"))


@pytest.mark.parametrize("labels", [
    ["red"], {"red": [1, 2]}, {"red": [1], "blue": [10**6]}, {"red": [], "blue": [1]}, {"red": "1", "blue": [1]},
    {"red": [True], "blue": [1]}, {str(number): [1] for number in range(101)},
], ids=str)  # fmt: skip
def test_labels_of_strangers_are_checked(labels: Any, trained: Path, cli: Cli, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained / "adapter", tmp_path / "copy"))
    record = json.loads((copy / "loratune.json").read_text())
    (copy / "loratune.json").write_text(json.dumps(record | {"labels": labels}))
    check_refused(cli("classify", "--adapter", copy, "x"), 5, (Code.ADAPTER_INVALID, str(copy), ""))


def test_the_report_draws_what_is_confused_and_how_sure_is_sure(trained: Path, cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ran = cli("report", "--adapter", trained / "adapter", "--data", trained / "unseen.jsonl", "--output", page)
    assert ran.code == 0, ran.err
    text = page.read_text()
    titles = "Given labels (columns) by expected ones (rows)", "Wrong answers in %, of the surest rows"
    for title in titles:
        start = text.index(f"<h3>{title}</h3>")
        assert text[start:].index("<svg") < text[start:].index("</div>")
    for label in LABELS:
        assert text.count(f">{label}<") >= 2  # of the rows, and of the columns


def test_a_temperature_is_fitted_to_rows_that_did_not_choose_the_step(trained: Path, cli: Cli, tmp_path: Path) -> None:
    """Validation rows whose labels are often wrong make all commands less sure."""
    config = json.loads((trained / "config.yaml").read_text())
    chat = "messages" in json.loads((trained / "unseen.jsonl").read_text().partition("\n")[0])
    held_out = rows(150, start=900, chat=chat)
    for number in range(0, 150, 3):  # red ones are called blue
        answer = held_out[number]["messages"][1] if chat else held_out[number]
        answer["content" if chat else "completion"] = "blue"
    data = {"train": str(write_rows(tmp_path / "r.jsonl", rows(120, chat=chat)))}
    config["data"] = data | {"validation": str(write_rows(tmp_path / "held_out.jsonl", held_out))}
    config["output_dir"], config["training"] = str(tmp_path / "adapter"), config["training"] | {"keep": "last"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    ran = cli("train", tmp_path / "config.yaml", "--allow-worse")
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "adapter" / "loratune.json").read_text())
    found = loratune.Adapter(tmp_path / "adapter").classify(tmp_path / "held_out.jsonl")
    (tmp_path / "adapter" / "loratune.json").write_text(json.dumps(record | {temperature.KEY: 1}))
    unscaled = loratune.Adapter(tmp_path / "adapter").classify(tmp_path / "held_out.jsonl")
    scores = np.log([[*one.probabilities.values()] for one in unscaled])
    names = [*unscaled[0].probabilities]
    labels = [row["messages"][1]["content"] if chat else row["completion"] for row in held_out]
    expected = np.array([names.index(label) for label in labels])
    value = temperature.temperature(scores, expected, np.ones(150))
    assert value is not None and value > 1.2 and record[temperature.KEY] == pytest.approx(value, rel=1e-3)
    for one, before in zip(found, unscaled, strict=True):
        powers = np.array([*before.probabilities.values()]) ** (1 / value)
        assert [*one.probabilities.values()] == pytest.approx(powers / powers.sum(), abs=1e-4)
    (tmp_path / "adapter" / "loratune.json").write_text(json.dumps(record | {temperature.KEY: 1e9}))
    check_refused(cli("classify", "--adapter", tmp_path / "adapter", "x"), 5, (Code.ADAPTER_INVALID, "", ""))


def test_what_a_baseline_has_not_is_a_requirement_that_is_not_met(trained: Path, cli: Cli) -> None:
    source = ("--adapter", trained / "adapter", "--data", trained / "unseen.jsonl")
    ran = cli(
        "evaluate", *source, "--metric", "contains", "--require", "accuracy>majority", "--require", "contains>prompted"
    )  # fmt: skip
    assert ran.code == 11 and "`contains` is not computed for `prompted`" in ran.err, ran.err
    ran = cli("evaluate", *source, "--few-shot", 0, "--json")
    assert ran.code == 0 and "prompted" not in json.loads(ran.out), ran.err
    check_refused(cli("evaluate", *source, "--few-shot", 1000), 4, (Code.DATA_EMPTY, "", "--few-shot"))
    ran = cli("evaluate", *source, "--adapter-scale", "0.5,1")
    assert ran.code == 0, ran.err


def test_other_answers_than_labels_are_compared_if_asked(trained: Path, cli: Cli, tmp_path: Path) -> None:
    """The screen has what was computed; rows without one answer at their end are not prompted, and say so."""
    is_chat = "messages" in (trained / "unseen.jsonl").read_text()
    longer = rows(12, start=900, chat=is_chat)
    for number, row in enumerate(longer):
        answer = f"it is {number} times " + "very " * 40 + "red"
        row |= (
            {"messages": [row["messages"][0], {"role": "assistant", "content": answer}]}
            if is_chat
            else {"completion": answer}
        )
    source = ("--adapter", trained / "adapter", "--data", write_rows(tmp_path / "longer.jsonl", longer))
    ran = cli("evaluate", *source, "--few-shot", 1)
    assert ran.code == 0 and "  a prompt?  the base, told by 1 example: 0 % right" in ran.out, ran.out
    assert "most probable label" not in ran.out


@pytest.mark.parametrize(("example", "is_question"), [
    (Plain("", "a", "b"), True), (Plain("", "", "b", whole=True), False),
    (Conversation("", ({"role": "assistant", "content": "b"},)), False),
    (Conversation("", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})), True),
    (Conversation("", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                       {"role": "user", "content": "c"})), False),
])  # fmt: skip
def test_questions_end_with_their_answer(example: Plain | Conversation, is_question: bool) -> None:
    assert prompted._is_question(example) == is_question


def test_figures_are_those_of_their_definitions() -> None:
    """By counting, with copies: the same as every copy by itself."""
    random = np.random.default_rng(0)
    given = random.dirichlet(np.ones(4), 60)
    expected = random.integers(0, 4, 60)
    copies = random.integers(1, 4, 60).astype(np.float64)
    found = Classification("abcd", expected, given, copies, [str(number) for number in range(60)])
    every = [place for place, count in enumerate(copies) for _ in range(int(count))]
    wanted, chosen = expected[every], given.argmax(1)[every]
    assert found.accuracy == pytest.approx((wanted == chosen).mean())
    pairs = [((wanted == one) & (chosen == other)).sum() for one in (2, 0) for other in (2, 0)]
    assert found.table([2, 0]).ravel().tolist() == pairs
    f1 = []
    for label in range(4):
        hits = ((wanted == label) & (chosen == label)).sum()
        f1.append(2 * hits / ((wanted == label).sum() + (chosen == label).sum()))
        assert found.classes[label].recall == pytest.approx(hits / (wanted == label).sum())
    assert found.macro_f1 == pytest.approx(np.mean(f1))
    values = found.to_dict()
    assert values["log_loss"] == pytest.approx(-np.log(given[every, wanted]).mean())
    assert values["brier"] == pytest.approx(((given[every] - np.eye(4)[wanted]) ** 2).sum(1).mean())
    sure = given.max(1)[every]
    assert values["overconfidence"]["value"] == pytest.approx(sure.mean() - (wanted == chosen).mean())
    assert found.coverage(1.0).accuracy == pytest.approx(found.accuracy) and found.coverage(1.0).share == 1
    half = found.coverage(0.5)
    assert 0.5 <= half.share < 0.56 and (sure >= half.threshold).mean() == pytest.approx(half.share)


def test_a_label_that_training_did_not_have_is_wrong() -> None:
    found = Classification("ab", np.array([-1, 0]), np.array([[0.9, 0.1], [0.8, 0.2]]), np.ones(2), ["", ""])
    assert found.right.tolist() == [0, 1] and math.isfinite(found.log_losses.sum())
    assert found.briers.tolist() == pytest.approx([0.82 + 1, 0.04 + 0.04])


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_temperature_of_drawn_labels_is_found(true: float) -> None:
    """Where it is 1, none is kept but in about 1 of 40 samples; with few rows, none is."""
    generator, kept = np.random.default_rng(0), []
    for _ in range(40):
        scores = np.log(generator.dirichlet(np.ones(4), 300))
        chances = probabilities(scores, true)
        drawn = np.array([generator.choice(4, p=chance) for chance in chances])
        kept.append(temperature.temperature(scores, drawn, np.ones(300)))
        assert temperature.temperature(scores[:39], drawn[:39], np.ones(39)) is None
    found = [value for value in kept if value is not None]
    if true == 1.0:
        assert len(found) <= 4
    else:
        assert len(found) >= 38 and np.median(found) == pytest.approx(true, rel=0.1)


def test_probabilities_of_small_scores() -> None:
    found = probabilities(np.array([[-2000.0, -2001.0]]))
    assert found[0] == pytest.approx([1 / (1 + math.exp(-1)), 1 - 1 / (1 + math.exp(-1))])
    assert probabilities(np.array([[0.0, -1.0]]), 1e6)[0] == pytest.approx([0.5, 0.5], abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_examples_are_drawn_by_label(chat: bool) -> None:
    """Each label as often as any other as far as there are rows, in an order of chance by the seed."""

    def example(number: int, label: str) -> Plain | Conversation:
        turns = ({"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": label})
        return Conversation(str(number), turns) if chat else Plain(str(number), f"q{number}", label)

    pool = [example(number, "rare" if number % 10 == 0 else "often") for number in range(40)]
    drawn = prompted.draw(pool, 8, 0)
    assert sorted(prompted._answer(one) == prompted._answer(pool[0]) for one in drawn) == [False] * 4 + [True] * 4
    assert drawn == prompted.draw(pool, 8, 0) != prompted.draw(pool, 8, 1)
    assert len(prompted.draw(pool, 100, 0)) == 40


def test_a_threshold_for_what_is_asked(trained: Path, cli: Cli, tmp_path: Path) -> None:
    """It is the one that `classify` needs, found on rows that the run has not read, and for labels alone."""
    unseen = write_rows(tmp_path / "more.jsonl", rows(300, start=600, chat=trained.name.endswith("chats")))
    asked = ("evaluate", "--adapter", trained / "adapter", "--data", unseen, "--abstain-for")
    ran = cli(*asked, "0.3", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["abstention"]
    assert found["accuracy"] == 0.3 and found["rows"] == 300
    if found["threshold"] is not None:
        predicted = loratune.Adapter(trained / "adapter").classify(unseen)
        sure = [one.probability >= found["threshold"] for one in predicted]
        assert found["answered"] == pytest.approx(sum(sure) / 300)
    shown = cli(*asked, "0.3").out
    assert "\n  abstain " in shown and "30 % of the answers are right" in shown
    assert "\n  abstain " in cli(*asked, "0.999").out
    for wrong in ("0", "1", "1.5", "nan"):
        check_refused(cli(*asked, wrong), 2, (Code.USAGE_BAD_VALUE, "", "--abstain-for"))
    read = trained / "rows.jsonl"
    train = Path(json.loads((trained / "config.yaml").read_text())["data"]["train"])
    if train.exists():
        read = train
        refused = cli("evaluate", "--adapter", trained / "adapter", "--data", read, "--abstain-for", "0.9")
        check_refused(refused, 4, (Code.EVALUATE_OVERLAP, str(read), "--abstain-for"))
    texts = write_rows(
        tmp_path / "texts.jsonl", [{"prompt": f"{n}", "completion": f"own answer {n}"} for n in range(9)]
    )
    refused = cli("evaluate", "--adapter", trained / "adapter", "--data", texts, "--abstain-for", "0.9")
    check_refused(refused, 2, (Code.USAGE_CONFLICT, "", "--abstain-for"))
