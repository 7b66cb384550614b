"""Two more shapes of model, made once, and the same each time: `python scripts/learning/models.py NAME WORK`.

57M     eight of the thirty layers of SmolLM2-135M (width 576), healed by training all weights
narrow  a width of 256 and eight layers, 19M with the same tokenizer, trained from the first random weights on

Both learn from the docstrings of packages beside loratune: no task is about them, nor the text on which forgetting is
measured. Which docstrings depends on the releases installed, so a model is the same as long as those are.
"""

import argparse
import ast
import importlib.util
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_linear_schedule_with_warmup

PACKAGES = ("numpy", "scipy", "pandas", "networkx")
KEPT = (0, 1, 2, 8, 15, 22, 28, 29)
"""Layers of the thirty: the first and last change the least when others go."""
ROWS, LENGTH = 8, 128
"""Of a step."""


@dataclass(frozen=True)
class Plan:
    """How a model is trained. steps: of `ROWS` times `LENGTH` tokens; rate: the highest."""

    steps: int
    rate: float


PLANS = {"57M": Plan(400, 3e-4), "narrow": Plan(900, 1e-3)}


def docstrings() -> Iterator[str]:
    """Docstrings of the packages, each of them once."""
    seen = set[str]()
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            continue
        for path in sorted(Path(found.origin).parent.rglob("*.py")):
            if "tests" in path.parts:
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= 200 and text not in seen:
                        seen.add(text)
                        yield text


def blocks(tokenizer: Any, count: int) -> torch.Tensor:
    """Docstrings in an order of chance, one after the other. Shape [count, LENGTH], int64."""
    texts = list(docstrings())
    random.Random(0).shuffle(texts)
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * LENGTH:
            break
    whole = len(ids) // LENGTH * LENGTH
    return torch.tensor(ids[:whole]).view(-1, LENGTH)


def untrained(name: str, source: Path) -> Any:
    """The model before its training, in float32."""
    torch.manual_seed(0)
    if name == "57M":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in KEPT)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
        model.config.num_hidden_layers = len(KEPT)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: len(KEPT)]
        return model
    known = LlamaConfig.from_pretrained(source)
    settings = known.to_dict() | {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "layer_types": None,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.float32)


def fit(model: Any, rows: torch.Tensor, plan: Plan) -> None:
    """Train all weights, in autocast to bfloat16, AdamW, linear to zero after a warmup of a twentieth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, plan.steps // 20, plan.steps)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    model.train()
    for step in range(plan.steps):
        batch = rows[order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == plan.steps - 1:
            print(f"step {step + 1}/{plan.steps}: {loss.item():.3f}", file=sys.stderr, flush=True)


def made(name: str, work: Path, source: Path, steps: int = 0) -> Path:
    """The directory of a model, which is made if it is not there. steps: in the place of the plan's, to try it out."""
    place = work / "models" / name
    if (place / "config.json").is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    plan = PLANS[name] if not steps else Plan(steps, PLANS[name].rate)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = untrained(name, source)
    fit(model, blocks(tokenizer, plan.steps * ROWS), plan)
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:
        half = Path(directory) / name
        model.to(torch.bfloat16).save_pretrained(half)
        for path in [*source.glob("tokenizer*"), *source.glob("*.jinja"), *source.glob("special_tokens*")]:
            shutil.copy(path, half)
        half.rename(place)
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(PLANS))
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    given = parser.parse_args()
    models = Path(__file__).resolve().parents[2] / "models"
    print(made(given.name, given.work, models / "SmolLM2-135M-Instruct", given.steps))
