"""The base's own answers to everyday instructions: how far an adapter moves from them, and what it answers itself."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran, mainly, tiny_llama, write_rows
from peft import PeftModel
from running import MakeConfig
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune import kernels
from loratune.compare import behavior
from loratune.compare.behavior import Behavior
from loratune.kernels.upstream import TorchDispatchMode, tree_leaves
from loratune.statistics import Interval
from loratune.training import time_budget

pytestmark = pytest.mark.usefixtures("all_instructions")

Run = Callable[..., Ran]
TRAINED = {"learning_rate": 0.02, "max_steps": 20}


def recorded(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "loratune.json").read_text())["metrics"]["behavior"]
    return found


@torch.inference_mode()
def by_hand(base_dir: Path, out: Path, *, chat: bool) -> dict[str, float]:
    """The numbers from stock transformers and PEFT, text by text in float32, over the whole vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    texts = []
    for line in behavior.INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
        turns = [{"role": "user", "content": line}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] if chat else tokenizer(
            f"{line}\n"
        ).input_ids  # fmt: skip
        whole = base.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=48, pad_token_id=0)
        texts.append((len(ids), whole))
    model = PeftModel.from_pretrained(base, str(out)).eval()

    def distributions() -> torch.Tensor:
        return torch.cat([model(whole).logits[0, begin - 1 : -1].log_softmax(-1) for begin, whole in texts])

    with model.disable_adapter():
        its = distributions()
    ours = distributions()
    nats = functional.kl_div(ours, its, reduction="none", log_target=True).sum(-1)
    agree = (ours.argmax(-1) == its.argmax(-1)).double()
    each = torch.stack([part.mean() for part in torch.split(nats, [whole.shape[1] - begin for begin, whole in texts])])
    middle = each.double().quantile(0.5)
    return {
        "divergence": float(nats.mean()),
        "agreement": float(agree.mean()),
        "tokens": len(nats),
        "median_divergence": float(middle),
    }


@pytest.mark.parametrize("chat", mainly([True], [True, False]))
def test_the_numbers_equal_those_of_stock_peft(
    chat: bool, cli: Run, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path
) -> None:
    """In train and in evaluate; for a base without a chat template, on continuations of the instructions as text."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_dir).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    tokenizer.save_pretrained(base)
    ran = cli("train", run_config(model={"name_or_path": str(base)}, training=TRAINED))
    assert ran.code == 0, ran.err
    found, expected = recorded(tmp_path / "out"), by_hand(base, tmp_path / "out", chat=chat)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4) and found["divergence"] > 0.01
    assert found["texts"] == 24 and found["divergence_interval"][0] < found["divergence"]
    low, high = found["median_divergence_interval"]
    assert low < found["median_divergence"] < high
    assert len(found["samples"]) == 6 and found["samples"][0]["base"] != found["samples"][0]["adapter"]
    line = f"median KL {found['median_divergence']:.3f} nats per token (95 % interval {low:.3f} to {high:.3f}) on its "
    assert f"- **Base's answers:** {line}" in (tmp_path / "out" / "README.md").read_text()
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    ran = cli("evaluate", "--adapter", tmp_path / "out", "--data", rows, "--forgetting", "builtin", "--json")
    evaluated = json.loads(ran.out)
    assert evaluated["behavior"]["divergence"] == pytest.approx(expected["divergence"], rel=1e-4)
    assert [*evaluated["forgetting"]["kinds"]] == ["prose", "dialogue", "code", "french", "german"]
    assert evaluated["behavior"]["samples"] == found["samples"]
    ran = cli("report", "--adapter", tmp_path / "out", "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"{found['median_divergence']:.4f} (95 % interval {low:.4f} to {high:.4f})" in page
    assert ran.code == 0 and 'id="everyday"' in page and "Explain in two sentences why the sky looks blue." in page


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("context", "the instructions and their answers are too long for the 60 positions of the model"),
        ("template", "the chat template refuses these messages"),
        ("end", "the base answers nothing but its end token"),
    ],
)
def test_a_run_reports_why_nothing_was_measured(
    why: str, text: str, cli: Run, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The run succeeds as usual."""
    model = tiny_llama(max_position_embeddings=60 if why == "context" else 500)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    if why == "template":
        tokenizer.chat_template = "{{ raise_exception('no chat') }}"
    if why == "end":
        monkeypatch.setattr(behavior, "write", lambda model, engine, given, *_, **__: [[256]] * len(given))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes: dict[str, Any] = {"model": {"name_or_path": str(tmp_path / "base")}, "data": {"max_length": 40}}
    ran = cli("train", run_config(**changes, training={"max_steps": 2}), "--allow-worse")
    assert ran.code == 0, ran.err
    found = recorded(tmp_path / "out")
    assert [*found] == ["not_measured"] and text in found["not_measured"]
    assert (
        f"- **Base's answers:** not measured: {found['not_measured']}" in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.slow
def test_with_a_time_budget_the_base_answers_before_steps_are_timed(
    cli: Run, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are in the cache then, so the end of the run takes as long as was foreseen."""
    tiny_llama(max_position_embeddings=300).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "base")
    calls, write, fix_length = list[Any](), behavior.write, time_budget.fix_length
    monkeypatch.setattr(
        behavior, "write", lambda model, engine, given, *rest, **more: (
            calls.append(len(given)), write(model, engine, given, *rest, **more))[1]
    )  # fmt: skip
    monkeypatch.setattr(
        time_budget, "fix_length", lambda *given, **more: (calls.append("timed"), fix_length(*given, **more))[1]
    )
    training = {"max_minutes": 5, "max_steps": -1, "num_train_epochs": 1}
    ran = cli("train", run_config(model={"name_or_path": str(tmp_path / "base")}, training=training), "--allow-worse")
    assert ran.code == 0 and calls == [24, "timed", behavior.SHOWN], ran.err


class Largest(TorchDispatchMode):
    """Records how many elements the largest tensor has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_prompts_share_the_weights_of_the_output_layer() -> None:
    """Without `dense_states`, torch multiplies the last state of each prompt with a copy of its own."""
    model, prompts = tiny_llama().eval().requires_grad_(False), torch.arange(5 * 7).view(5, 7)
    output = model.get_output_embeddings().weight.numel()
    found = []
    for context in (nullcontext, lambda: kernels.dense_states(model)):
        with torch.no_grad(), Largest() as largest, context():
            answers = model.generate(prompts, max_new_tokens=3, do_sample=False, pad_token_id=0)
        found.append((largest.elements, answers.tolist()))
    (copied, old), (shared, new) = found
    assert copied >= 5 * output and shared <= output and old == new
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_one_answer_of_24_does_not_move_the_line() -> None:
    nats = np.linspace(0.5, 2.5, 24)
    plain, far = (Behavior.of(nats + shift, np.full(24, 40.0), np.full(24, 48.0)) for shift in (0, 60 * np.eye(24)[23]))
    assert far.divergence > 2 * plain.divergence and far.divergence_interval != plain.divergence_interval
    assert str(far) == str(plain) and plain.median_interval == Interval(nats[6] / 48, nats[17] / 48)
    assert str(plain).startswith("median KL 0.031 nats per token (95 % interval 0.021 to 0.041) on its answers to 24 ")


def test_a_low_agreement_is_reported() -> None:
    far = Behavior(24, 900, 1.2, Interval(0.2, 1.9), 0.6, Interval(0.5, 0.7))
    assert far.has_suffered
    assert (
        not Behavior(24, 900, 1.2, Interval(0.2, 1.9), 0.6, Interval(0.4, 0.81)).has_suffered
        and not Behavior(unknown="no room").has_suffered
    )
