"""The settings that other tools recommend, and what a driver that trains with them is told and answers.

TRL: `ModelConfig` and `SFTConfig` of trl 1.16 (r=16, alpha 32, dropout 0.05, PEFT's own targets for the model, batch 8,
linear, three epochs), and 2e-4, the rate of the LoRA example in its trl/scripts/sft.py. Without a flag it learns every
token of a conversation, and only the completion of a pair. Unsloth: the notebook for Llama 3.2 (1B and 3B),
conversational; 60 steps, and only the answers are learnt. LLaMA-Factory: examples/train_lora/qwen3_lora_sft.yaml of
0.9.5. Gradient checkpointing, which costs time and changes no result, is off for all of them.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.common import Row, read

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """Settings of a tool.

    driver, venv: module of this folder and environment, see `contestants`; targets: None for PEFT's own for the model,
    "all" for all linear layers; warmup: steps, or a part of all below 1; epochs, steps: where the recipe itself ends;
    whole: it learns every token of a conversation.
    """

    driver: str
    venv: str
    r: int
    alpha: int
    dropout: float
    targets: tuple[str, ...] | None
    rate: float
    batch: int
    accumulate: int
    schedule: str
    warmup: float
    decay: float
    epochs: float = 0.0
    steps: int = 0
    whole: bool = False

    def own_steps(self, rows: int) -> int:
        """The steps after which the recipe ends by itself."""
        return self.steps or round(self.epochs * -(-rows // (self.batch * self.accumulate)))

    def warmup_steps(self, steps: int) -> int:
        """Steps of warmup in a run of so many."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)


RECIPES = {
    "trl": Recipe("recipe_trl", "trl", 16, 32, 0.05, None, 2e-4, 8, 1, "linear", 0, 0.0, epochs=3, whole=True),
    "trl, answers only": Recipe("recipe_trl", "trl", 16, 32, 0.05, None, 2e-4, 8, 1, "linear", 0, 0.0, epochs=3),
    "unsloth": Recipe("recipe_unsloth", "unsloth", 16, 16, 0.0, LINEARS, 2e-4, 2, 4, "linear", 5, 0.001, steps=60),
    "unsloth's recipe in trl": Recipe(
        "recipe_trl", "trl", 16, 16, 0.0, LINEARS, 2e-4, 2, 4, "linear", 5, 0.001, steps=60
    ),
    "llamafactory": Recipe(
        "recipe_llamafactory", "llamafactory", 8, 16, 0.0, LINEARS, 1e-4, 1, 8, "cosine", 0.1, 0.0, epochs=3
    ),
}


@dataclass(frozen=True)
class Order:
    """One run of a recipe. model, rows, adapter, answer: paths; rows: as `common.Row`, in JSON lines."""

    recipe: Recipe
    model: str
    rows: str
    adapter: str
    answer: str
    steps: int
    seed: int

    def read_rows(self) -> list[Row]:
        """The rows to learn from."""
        return read(Path(self.rows))

    @property
    def scratch(self) -> str:
        """A directory for what the tool writes besides."""
        return str(Path(self.answer).parent / "scratch")

    def arguments(self, **own: Any) -> dict[str, Any]:
        """Keywords of TrainingArguments and of the classes that inherit from it."""
        recipe = self.recipe
        return {
            "output_dir": self.scratch,
            "max_steps": self.steps,
            "per_device_train_batch_size": recipe.batch,
            "gradient_accumulation_steps": recipe.accumulate,
            "learning_rate": recipe.rate,
            "lr_scheduler_type": recipe.schedule,
            "warmup_steps": recipe.warmup_steps(self.steps),
            "weight_decay": recipe.decay,
            "optim": "adamw_torch",
            "seed": self.seed,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": True,
            "dataloader_pin_memory": False,
        } | own


def order() -> Order:
    """The run that this process was started for."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recipe = given.pop("recipe")
    targets = recipe["targets"]
    return Order(Recipe(**recipe | {"targets": targets and tuple(targets)}), **given)
