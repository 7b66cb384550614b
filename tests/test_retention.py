"""Retention: the model is held to what it predicted before training, on texts that it wrote itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, check_refused, mainly, meanings, write_rows
from families import small
from fork_server import ForkServer
from peft import PeftModel, PeftModelForCausalLM
from running import WEIGHTS, Cli, MakeConfig, before_batch, curve
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import loratune
from loratune.codes import Code
from loratune.compare import behavior
from loratune.config import RetentionSection
from loratune.lora import tensors
from loratune.system.launcher import Group
from loratune.training import reference, retention
from loratune.training.batching import DistributedBatchSampler
from loratune.training.retention import Retention, RetentionText, TextsOfStep

SETTINGS = {"kl_weight": 2.0, "num_samples": 6, "max_new_tokens": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mixtral": {}, "gemma2": {"final_logit_softcapping": 2.0}, "cohere": {}, "falcon_h1": {}, "bamba": {},
    "phi3": {"original_max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "partial_rotary_factor": 1.0, "original_max_position_embeddings": 16,
    }},
}  # fmt: skip
"""Dense, with experts, with capped and with scaled logits, hybrids, with rotations that depend on the length (texts are
shorter than 16 tokens, rows on both sides); with what makes it visible."""
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " 7"} for row in ROWS]


def record_of(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "loratune.json").read_text())
    return record


def trained(cli: Cli, config: Path, output: Path, *arguments: str) -> tuple[bytes, list[dict[str, float]]]:
    ran = cli("train", config, "--set", f"output_dir={output}", "--allow-worse", *arguments)
    assert ran.code == 0, ran.err
    return (output / WEIGHTS).read_bytes(), record_of(output)["curve"]


@pytest.mark.parametrize("changes", mainly([{}], [{}, {"data": {"packing": "none"}}, {"data": {"packing": "full"}}]))
def test_it_keeps_the_model_nearer_to_its_base(
    changes: dict[str, dict[str, str]], cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    plain = run_config(training={"num_train_epochs": 4}, **changes)
    held = run_config("held.yaml", training={"num_train_epochs": 4}, retention=SETTINGS, **changes)
    adapter, of_plain = trained(cli, plain, tmp_path / "plain")
    other, of_held = trained(cli, held, tmp_path / "held")
    assert adapter != other
    assert all("divergence" not in step for step in of_plain)
    divergences = [step["divergence"] for step in of_held if "divergence" in step]
    assert abs(divergences[0]) < 1e-5 < divergences[-1]
    assert of_held[0]["loss"] == pytest.approx(of_plain[0]["loss"], rel=1e-5)
    assert record_of(tmp_path / "held")["metrics"]["tokens"] == record_of(tmp_path / "plain")["metrics"]["tokens"]


@pytest.mark.parametrize(
    ("family", "accumulation", "longest", "expected"),
    [
        *mainly(
            [(family, 1, 8, (1, 1, 8)) for family in ("llama", "gemma2")],
            [(family, 1, 8, (1, 1, 8)) for family in FAMILIES],
        ),
        ("llama", 2, 8, (3, 1, 8)),
        ("llama", 2, 100, (1, 2, 68)),
    ],
    ids=lambda value: str(value),
)
def test_three_steps_are_those_of_plain_torch(
    family: str, accumulation: int, longest: int, expected: tuple[int, int, int], cli: Cli, run_config: MakeConfig,
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    """Rows and texts one by one in stock transformers and PEFT, with divergences of the whole vocabulary, in which all
    tokens but the most probable ones are added up. By SGD: AdamW makes as much of gradients that are nearly zero.

    The texts are a fifth of the tokens of the rows; where one is more, every second step has the beginning of one with
    twice the weight, and the third step, which is the last, has one with the weight itself."""
    settings = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": 3,
    }
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    small(family, vocab_size=264, **FAMILIES[family]).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = run_config(
        model={"name_or_path": str(tmp_path / "base")}, training=settings, data={"share_prefixes": False},
        retention=SETTINGS | {"max_new_tokens": longest},
    )  # fmt: skip
    _, logged = trained(cli, path, tmp_path / "ours")
    plan = loratune.plan(loratune.load_config(path, {"output_dir": tmp_path / "plan"}))
    reference.write_texts(plan)
    assert plan.retention is not None
    texts, (number, every, compared) = plan.retention.texts, expected
    assert plan.retention.of_step == TextsOfStep(*expected)
    assert all(len(text.ids) <= text.begin + compared for text in texts), "predictions are those of what is computed"
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(plan.config.model.name_or_path), tmp_path / "ours", is_trainable=True
    )
    start = {name: value.clone() for name, value in tensors.weights(plan.model).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name.replace(".default", "")])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    tokenizer = AutoTokenizer.from_pretrained(plan.config.model.name_or_path)
    losses, divergences = [], []
    for step in range(3):
        size = 4 * accumulation
        rows = [ROWS[number] for number in order[step * size : (step + 1) * size]]
        first, has_some = step // every * number, every == 1 or step > 0
        numbers = range(first, first + number) if has_some else ()
        total, count = torch.zeros(()), 0
        for row in rows:
            before = tokenizer(row["prompt"]).input_ids
            ids = torch.tensor([[*before, *tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]])
            logits = model(ids).logits[0]
            total = total + functional.cross_entropy(
                logits[len(before) - 1 : -1], ids[0, len(before) :], reduction="sum"
            )
            count += ids.shape[1] - len(before)
        divergence, tokens = torch.zeros(()), 0
        for text in (texts[number % len(texts)] for number in numbers):
            ids = torch.tensor([text.ids[: text.begin + compared]])
            with torch.no_grad(), model.disable_adapter():
                of_base = model(ids).logits[0, text.begin - 1 : -1].softmax(-1)
            ours = model(ids).logits[0, text.begin - 1 : -1].softmax(-1)
            top = of_base.topk(retention.TOP).indices
            merged = [
                torch.cat([p.gather(1, top), 1 - p.gather(1, top).sum(1, keepdim=True)], 1) for p in (of_base, ours)
            ]
            divergence = divergence + (merged[0] * (merged[0].log() - merged[1].log())).sum()
            tokens += len(top)
        loss, kept = total / count, divergence / max(1, tokens)
        losses.append(loss.item())
        divergences += [kept.item()] * has_some
        optimizer.zero_grad()
        (loss + 2.0 * (every if step == 1 else 1) * kept).backward()
        optimizer.step()
    assert [step["loss"] for step in logged] == pytest.approx(losses, rel=1e-4)
    assert [step["divergence"] for step in logged if "divergence" in step] == pytest.approx(
        divergences, rel=1e-3, abs=1e-5
    )
    ours = load_file(tmp_path / "ours" / WEIGHTS)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".default", "")
            moved = (parameter.detach() - start[key]).norm()
            assert float((parameter.detach() - ours[key]).norm()) < 2e-3 * float(moved), key


def test_an_interrupted_run_has_the_same_bytes(processes: ForkServer, run_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_steps": 1, "logging_steps": 2}
    path = run_config(training=settings, retention=SETTINGS)
    straight = processes.start("train", path, "--set", f"output_dir={tmp_path / 'straight'}")
    assert straight.wait() == 0, straight.said()
    child = processes.start("train", path, first=before_batch(3, "signal.raise_signal(signal.SIGINT)"))
    assert child.wait() == 130, child.said()
    resumed = processes.start("train", path, "--resume")
    assert resumed.wait() == 0, resumed.said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()
    ours, others = (record_of(tmp_path / name) for name in ("out", "straight"))
    assert curve(ours) == curve(others)
    found = [[step["divergence"] for step in record["curve"]] for record in (ours, others)]
    assert found[0] == found[1]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_beside_preferences(objective: str, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    rows: Sequence[dict[str, Any]] = PAIRS
    if objective == "kto":
        rows = [{**row, "label": number % 2 == 0} for number, row in enumerate(ROWS)]
    data = {"train": str(write_rows(tmp_path / "compared.jsonl", rows))}
    settings = {"objective": objective, "max_steps": 4}
    _, plain = trained(cli, run_config(data=data, training=settings), tmp_path / "plain")
    held = run_config("held.yaml", data=data, training=settings, retention=SETTINGS)
    _, logged = trained(cli, held, tmp_path / "held", "--allow-worse")
    assert logged[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4)
    assert abs(logged[0]["divergence"]) < 1e-5 < logged[-1]["divergence"]


def test_prompts_of_a_file(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "say"}, {"prompt": "what is"}])
    path = run_config(training={"max_steps": 2}, retention=SETTINGS | {"prompts": str(prompts)})
    plan = loratune.plan(loratune.load_config(path))
    assert plan.retention is not None and len(plan.retention.given) == 2
    assert any("retention" in note for note in plan.all_notes())
    assert plan.datasets.tokenizer.decode(plan.retention.given[0]) == "say"
    trained(cli, path, tmp_path / "done")
    write_rows(prompts, [{"prompt": "a"}, {"prompt": "b" * 508}])
    ran = cli("train", path, "--set", f"output_dir={tmp_path / 'long'}")
    check_refused(ran, 2, (Code.DATA_TOO_LONG, f"{prompts}:2", "retention.prompts"))
    assert "shorten the prompt" in ran.err and "retention.max_new_tokens to 4" in ran.err
    write_rows(prompts, [{"prompt": "a"}, {"prompt": ""}])
    events = list[loratune.Event]()
    with pytest.raises(loratune.DataError) as refused:
        loratune.plan(loratune.load_config(path, {"output_dir": str(tmp_path / "none")}), on_event=events.append)
    assert meanings(refused.value) == [(Code.DATA_FIELD, f"{prompts}:2", "")]
    assert not any("load" in event.what for event in events if isinstance(event, loratune.ProgressEvent))
    write_rows(prompts, [])
    ran = cli("train", path, "--set", f"output_dir={tmp_path / 'none'}")
    assert ran.code == 4 and not (tmp_path / "none").exists(), ran.err


@pytest.mark.parametrize(("objective", "weight"), [("sft", "0"), ("dpo", "auto")])
def test_settings_that_are_not_read_are_reported(
    objective: str, weight: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Where there is no retention; by `explain` too."""
    data = {"train": str(write_rows(tmp_path / "pairs.jsonl", PAIRS))} if objective == "dpo" else {}
    path = run_config(
        data=data, training={"objective": objective}, retention={"prompts": "p.jsonl", "max_new_tokens": 3}
    )
    ran = cli("train", path, "--dry-run", "--set", f"retention.kl_weight={weight}")
    assert ran.code == 0, ran.err
    told = [line.split()[0] for line in ran.err.splitlines() if "has no effect" in line]
    assert sorted(told) == ["retention.max_new_tokens", "retention.prompts"]
    explained = cli("explain", "retention", path, "--set", f"retention.kl_weight={weight}").out
    assert explained.count("not used, as retention.kl_weight is 0") == 2
    ran = cli("train", path, "--dry-run", "--set", "retention={}")
    assert ran.code == 0 and "has no effect" not in ran.err, ran.err


def test_what_cannot_be_done_is_refused(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    path = run_config(retention={"kl_weight": 1.0, "max_new_tokens": 512})
    check_refused(cli("train", path), 2, (Code.DATA_TOO_LONG, "", "retention.max_new_tokens"))
    for value in ("-1", "nan", "yes"):
        ran: Ran = cli("train", path, "--set", f"retention.kl_weight={value}")
        assert ran.code == 2 and "retention.kl_weight" in ran.err


def test_a_base_that_writes_only_its_end(cli: Cli, run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behavior, "write", lambda model, engine, given, *_, **__: [[256, 256]] * len(given))
    path = run_config(training={"seed": 11}, retention=SETTINGS)  # of which no texts are in the cache
    check_refused(cli("train", path), 3, (Code.MODEL_UNSUPPORTED, "", "retention"))


@pytest.mark.parametrize(
    ("reason", "write"),
    [
        (
            "the model writes nothing but its end token",
            lambda model, engine, given, *_, **__: [[256, 256]] * len(given),
        ),
        ("the model cannot write: no cache fits it", None),
    ],
    ids=["only ends", "an error"],
)
def test_a_base_that_cannot_write_trains_without_it_by_default(
    reason: str, write: Any, cli: Cli, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no cache fits it\nat all")

    if write is not None:
        monkeypatch.setattr(behavior, "write", write)
    else:
        monkeypatch.setattr(PeftModelForCausalLM, "generate", fail)
    settings = {"seed": 12, "max_steps": 6}  # of which no texts are in the cache
    plain, _ = trained(cli, run_config("plain.yaml", training=settings), tmp_path / "plain")
    ran = cli("train", run_config(training=settings, retention={"kl_weight": "auto"}))
    assert ran.code == 0, ran.err
    assert f"retention has no effect: {reason}" in ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == plain
    assert all("divergence" not in step for step in record_of(tmp_path / "out")["curve"])
    ran = cli("train", tmp_path / "out" / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}")
    assert ran.code == 0 and (tmp_path / "again" / WEIGHTS).read_bytes() == plain, ran.err


Division = tuple[int, int, int]
"""Processes, rows of a micro-step of each, micro-steps of an optimizer step."""
LONG = [{"prompt": "what is " + "q" * (31 * n % 97), "completion": " " + "ab" * (17 * n % 43)} for n in range(1, 27)]
COMPARED = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"} for row in LONG]
DIVIDED: dict[str, tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]] = {
    "packed": (LONG, {}),
    "padded": (LONG, {"data": {"packing": "none"}}),
    "packs": (LONG, {"data": {"packing": "full", "max_length": 150}}),
    "short rows": (ROWS[:26], {"retention": {"max_new_tokens": 100}}),
    "dpo": (COMPARED, {"training": {"objective": "dpo"}}),
    "kto": ([row | {"label": number % 2 == 0} for number, row in enumerate(LONG)], {"training": {"objective": "kto"}}),
}
"""Rows and settings. The last step of an epoch has 2 rows instead of 8."""
WHOLE: Division = (1, 8, 1)
FAST: list[tuple[str, Division, Division]] = [
    ("packed", WHOLE, (2, 1, 4)), ("dpo", WHOLE, (1, 2, 4)),
]  # fmt: skip
OTHERS = [
    ("padded", WHOLE, (1, 1, 8)), ("short rows", WHOLE, (2, 2, 2)), ("packs", (1, 2, 4), (2, 2, 2)),
    ("kto", WHOLE, (2, 4, 1)),
    *((name, WHOLE, (1, 4, 2)) for name in ("packed", "padded", "kto")),
    *((name, WHOLE, (2, 2, 2)) for name in ("packed", "padded", "dpo")),
    ("packed", WHOLE, (1, 1, 8)), ("short rows", WHOLE, (1, 1, 8)), ("dpo", WHOLE, (2, 4, 1)),
]  # fmt: skip
"""Of each kind of rows two divisions. Packs have as many tokens as the rows of a micro-step may, so its size stays."""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "whole", "other"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_the_division_of_a_step_does_not_change_it(
    name: str, whole: Division, other: Division, processes: ForkServer, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Neither over micro-steps nor over processes. By SGD: AdamW makes steps of rounding errors where a weight has
    hardly any gradient, which moved two of the 3,584 weights of kto by 2e-4."""
    rows, settings = DIVIDED[name]
    data = {"train": str(write_rows(tmp_path / "divided.jsonl", rows))} | settings.get("data", {})
    training = {"max_steps": 7, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.5}
    training |= settings.get("training", {})
    path = run_config(data=data, training=training, retention=SETTINGS | settings.get("retention", {}))
    found = []
    for count, size, accumulation in (whole, other):
        output = tmp_path / f"{count} {size} {accumulation}"
        values = {"output_dir": output, "training.per_device_train_batch_size": size}
        values["training.gradient_accumulation_steps"] = accumulation
        assignments = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        children = processes.launch(count, "train", path, "--allow-worse", *assignments)
        assert [child.wait() for child in children] == [0] * count, children[0].said()
        found.append((load_file(output / WEIGHTS), record_of(output)["curve"]))
    (expected, curve_of_whole), (tensors, curve_of_other) = found
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    assert all(float((tensors[key] - expected[key]).abs().max()) < 5e-6 * largest for key in expected)
    values = [
        [step["divergence"] for step in curve if "divergence" in step] for curve in (curve_of_whole, curve_of_other)
    ]
    assert values[1] == pytest.approx(values[0], abs=2e-6) and max(values[0]) > 1e-4


class Member(Group):
    """One process of several."""

    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count  # type: ignore[misc]


def planned(tokens: float, items: int, batches: int = 1) -> Retention:
    """The retention of a run whose steps have so many tokens, with texts of 5 tokens that continue 4."""
    section = RetentionSection(kl_weight=0.5, max_new_tokens=24)
    made = Retention.of(section, [(1, 2, 3, 4)] * 12, tokens, items, batches)
    made.texts = [RetentionText((1, 2, 3, 4, 5), 4, torch.zeros(1, 1).long().numpy(), torch.zeros(1, 1).numpy())] * 12
    return made


@pytest.mark.parametrize(
    ("tokens", "share"), [(10.0, 1.0), (100.0, 0.14), (139.0, 14 / 139), (141.0, 28 / 141), (500.0, 0.168)]
)
@pytest.mark.parametrize("steps", range(1, 8))
def test_the_mean_weight_of_the_steps_is_that_of_the_config(tokens: float, share: float, steps: int) -> None:
    made = planned(tokens, 8)
    has_texts = [bool(made.numbers(step, 8, is_last=step == steps - 1)) for step in range(steps)]
    weights = [made.weight(step) * has for step, has in enumerate(has_texts)]
    assert sum(weights) == 0.5 * steps and max(weights) <= 1.0
    assert made.of_step.every == (1 if tokens > 140 else 2) and made.share == pytest.approx(share)
    assert made.of_step.tokens == 24 if tokens >= 100 else 16


@pytest.mark.parametrize("items", [8, 19, 24])
@pytest.mark.parametrize(("count", "size", "accumulation"), [(1, 8, 1), (1, 1, 8), (2, 2, 2), (3, 1, 3), (4, 2, 1)])
def test_the_texts_of_a_step_are_shared_evenly(items: int, count: int, size: int, accumulation: int) -> None:
    """Each once in all, and a last step with fewer rows has as many fewer."""
    whole = count * size * accumulation
    made = planned(900.0, min(items, whole), count * accumulation)
    parts = [
        DistributedBatchSampler(items, size, 7, Member(rank, count), accumulation, made.numbers)
        for rank in range(count)
    ]
    steps = -(-items // whole)
    for epoch in range(2):
        for part in parts:
            part.set_epoch(epoch)
        micro_steps = [
            [[n - items for n in own if n >= items] for own in shares] for shares in zip(*parts, strict=True)
        ]
        for step in range(steps):
            shares = [own for one in micro_steps[step * accumulation : (step + 1) * accumulation] for own in one]
            rows = min(whole, items - step * whole)
            expected = made.numbers(epoch * steps + step, rows)
            assert sorted(number for own in shares for number in own) == sorted(expected)
            assert len(expected) == max(1, 6 * rows // min(items, whole))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1 and max(map(len, shares)) <= made.of_batch


def test_short_rows_have_texts_in_every_second_step(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """These have twice the weight, and a report on other steps has no divergence; the last of an odd number has one."""
    path = run_config(training={"max_steps": 9, "per_device_train_batch_size": 1}, retention={"kl_weight": "auto"})
    plan = loratune.plan(loratune.load_config(path))
    assert plan.retention is not None
    assert plan.retention.of_step == TextsOfStep(1, 2, 16)
    line = "; one beside the rows of every second step, with twice the weight, "
    assert f"{line}{plan.retention.share:.0%} more tokens" in str(plan.retention)
    _, curve = trained(cli, path, tmp_path / "held", "--allow-worse")
    assert [step["step"] for step in curve if "divergence" in step] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize(("steps", "is_told"), [(2, True), (400, False)])
def test_what_writing_costs_is_told_before_a_short_run(steps: int, is_told: bool, run_config: MakeConfig) -> None:
    """Passes of writing are one for each token of a text, and of training three for each step."""
    path = run_config(
        training={"max_steps": steps}, retention={"kl_weight": 1.0, "num_samples": 30, "max_new_tokens": 8}
    )
    plan = loratune.plan(loratune.load_config(path))
    (line, *told) = [note for note in plan.all_notes() if note.startswith("retention: ")]
    assert "writes 30 texts" in line and bool(told) == is_told
    assert not is_told or ("takes 16 passes" in told[0] and "training 6" in told[0] and "kl_weight: 0" in told[0])


def test_texts_without_room_are_left_out_by_default(cli: Cli, run_config: MakeConfig) -> None:
    path = run_config(retention={"kl_weight": "auto", "max_new_tokens": 512})
    plan = loratune.plan(loratune.load_config(path))
    assert plan.retention is None and plan.config.retention.kl_weight == 0
    assert any("retention.kl_weight is 0 (a text would have" in note for note in plan.all_notes())


def test_texts_survive_as_numbers() -> None:
    plan = [retention.RetentionText((1, 2, 3, 4), 2, torch.arange(6).view(2, 3).numpy(), torch.rand(2, 3).numpy())] * 2
    found = retention._from_numbers(retention._as_numbers(plan))
    assert [(text.ids, text.begin) for text in found] == [((1, 2, 3, 4), 2)] * 2
    assert all((one.top_ids == two.top_ids).all() for one, two in zip(found, plan, strict=True))
    assert all((one.log_probabilities == two.log_probabilities).all() for one, two in zip(found, plan, strict=True))
