"""Compare the speed and memory of DPO with those of TRL's DPOTrainer on the same pairs.

    PYTHONPATH=.:tests:scripts OMP_NUM_THREADS=1 /tmp/trlvenv/bin/python scripts/measure_preferences.py \\
        models/SmolLM2-135M-Instruct configs/preferences/train.jsonl [ROUNDS]

The environment is that of compare_preferences_with_trl.py. Each contestant takes the same batches of eight pairs, in a
process of its own, in turns; its steps are those of its own trainer's loss, backward pass and AdamW. TRL has what is
fastest there: the base in bfloat16, the reference computed before, no checkpointing. Seconds are those of the processor
(`time.process_time`) of one thread, as other programs may run beside; tokens are those of both sides, without padding.
The median of the steps after the first two is taken, and the peak of the resident set.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from loratune import config, kernels
from loratune.commands.plan import Plan, make_plan
from loratune.console import show_progress
from loratune.model import load
from loratune.system.launcher import SINGLE_PROCESS
from loratune.training import preflight, reference
from loratune.training.preferences import Comparing
from loratune.training.reference import Reference
from loratune.training.run_dir import RunDirectory

BATCH, STEPS, WARM_UP, LENGTH = 8, 7, 2, 1024
Step = Callable[[Sequence[int]], None]


def planned(model: str, rows: str, folder: Path) -> tuple[Plan, Comparing]:
    """A DPO run of loratune, with its reference."""
    values = {
        "model": {"name_or_path": model, "dtype": "bfloat16"},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": rows, "max_length": LENGTH},
        "training": {
            "objective": "dpo", "per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-5,
        },
        "output_dir": str(folder / "out"),
    }  # fmt: skip
    directory = RunDirectory(folder / "out", folder / "out.partial", str(folder / "out"))
    plan = make_plan(preflight.check(config.from_values(values, "measured"), directory, show_progress), show_progress)
    objective = plan.batches.objective
    assert isinstance(objective, Comparing)
    found = Reference(plan.model, plan.adapter_init, False, plan.batches.acceleration, {"run": os.getpid()})
    pad_id = load.pad_id(plan.tokenizer)
    reference.compute(objective, found, plan.batches.layouts, pad_id, SINGLE_PROCESS, lambda _: None)
    return plan, objective


def of_loratune(plan: Plan, objective: Comparing) -> Step:
    """A step of loratune, while the model is accelerated."""
    plan.model.train()
    optimizer = torch.optim.AdamW([one for one in plan.model.parameters() if one.requires_grad], lr=1e-5)
    train = plan.batches.train

    def step(numbers: Sequence[int]) -> None:
        batch: dict[str, Any] = train.collate([train.items[number] for number in numbers])
        count = objective.begin_step(plan.model, [batch], None, SINGLE_PROCESS)
        objective.expect(plan.model, batch)
        labels = batch.pop("labels")
        total, _ = objective.total(plan.model, plan.model(**batch, use_cache=False).logits, labels)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_trl(model: str, items: list[dict[str, Any]], folder: str) -> Step:
    """A step of TRL's DPOTrainer, its reference computed before."""
    import datasets  # noqa: PLC0415  loratune does without
    from compare_preferences_with_trl import OfDpo  # noqa: PLC0415
    from peft import LoraConfig  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from trl import DPOConfig  # type: ignore[import-not-found]  # noqa: PLC0415

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    arguments = DPOConfig(
        output_dir=folder, use_cpu=True, bf16=True, gradient_checkpointing=False, max_length=LENGTH, report_to="none",
        per_device_train_batch_size=BATCH, precompute_ref_log_probs=True, learning_rate=1e-5,
    )  # fmt: skip
    trainer = OfDpo(
        model=base, args=arguments, train_dataset=datasets.Dataset.from_list(items),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.model.train()
    optimizer = torch.optim.AdamW([one for one in trainer.model.parameters() if one.requires_grad], lr=1e-5)

    def step(numbers: Sequence[int]) -> None:
        batch = trainer.data_collator([trainer.train_dataset[number] for number in numbers])
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def contest(name: str, model: str, rows: str) -> dict[str, float]:
    """Seconds and tokens of the steps of one contestant, and its peak of memory."""
    kernels.keep_pages()
    lengths: Any
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if name == "loratune":
            plan, objective = planned(model, rows, Path(folder))
            stack.enter_context(plan.batches.acceleration.applied(plan.model))
            step, lengths = of_loratune(plan, objective), plan.datasets.train.rows.lengths
        else:
            items = json.loads(Path(rows).read_text(encoding="utf-8"))
            step = of_trl(model, items, folder)
            lengths = [
                len(item["prompt_ids"]) + len(item[side]) for item in items for side in ("chosen_ids", "rejected_ids")
            ]
        rates = []
        for number in range(STEPS):
            numbers = range(number * BATCH, (number + 1) * BATCH)
            tokens = sum(int(lengths[place]) for one in numbers for place in (2 * one, 2 * one + 1))
            start = time.process_time()
            step(numbers)
            rates.append(tokens / (time.process_time() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens/s": statistics.median(rates[WARM_UP:]), "MiB": peak}


def token_rows(model: str, rows: str, path: Path) -> None:
    """The tokens of the first pairs, for TRL."""
    with tempfile.TemporaryDirectory() as folder:
        plan, _ = planned(model, rows, Path(folder))
    dataset = plan.datasets.train
    items = []
    for number in range(min(dataset.items, STEPS * BATCH)):
        chosen, rejected = dataset.item(number)
        start = chosen.spans[0][0]
        answers = {"chosen_ids": chosen.ids[start:], "rejected_ids": rejected.ids[start:]}
        items.append({"prompt_ids": chosen.ids[:start], **answers})
    path.write_text(json.dumps(items))


def rounds(model: str, rows: str, count: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The figures of each contestant, in turns, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        subprocess.run([sys.executable, __file__, model, rows, "--tokens", str(tokens)], check=True)
        for number in range(count):
            order = ("loratune", "trl") if number % 2 == 0 else ("trl", "loratune")
            for name in order:
                source = rows if name == "loratune" else str(tokens)
                command = [sys.executable, __file__, model, source, "--contestant", name]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                yield name, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the figures of each round, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("rounds", type=int, nargs="?", default=2)
    parser.add_argument("--contestant")
    parser.add_argument("--tokens", type=Path)
    arguments = parser.parse_args()
    if arguments.tokens:
        token_rows(arguments.model, arguments.rows, arguments.tokens)
    elif arguments.contestant:
        print(json.dumps(contest(arguments.contestant, arguments.model, arguments.rows)))
    else:
        found: dict[str, list[dict[str, float]]] = {"loratune": [], "trl": []}
        for name, figures in rounds(arguments.model, arguments.rows, arguments.rounds):
            found[name].append(figures)
            print(f"{name}: {figures['tokens/s']:,.0f} tokens/s, {figures['MiB']:,.0f} MiB", flush=True)
        for ours, theirs in zip(found["loratune"], found["trl"], strict=True):
            speed, memory = (ours[key] / theirs[key] for key in ("tokens/s", "MiB"))
            print(f"{speed:.2f} x tokens/s, {memory:.2f} x memory")


if __name__ == "__main__":
    main()
