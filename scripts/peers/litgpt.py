"""LitGPT's own finetune_lora in bf16-true, without what it does besides training: a generated example, merging."""

import json
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.prompts import Default
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from peers.common import Clock, Row, job, reply


class Rows(DataModule):
    """The rows of the job, tokenised already."""

    prompt_style = Default()

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        """What LitGPT tells of its settings."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, padded to their longest row."""
        made = [item(row) for row in task.rows]
        order = torch.Generator().manual_seed(task.seed)
        return DataLoader(made, self.batch_size, shuffle=True, generator=order, collate_fn=get_sft_collate_fn())

    def val_dataloader(self) -> DataLoader:
        """A row, which is not looked at."""
        return DataLoader([item(task.rows[0])], collate_fn=get_sft_collate_fn())


def item(row: Row) -> dict[str, Any]:
    """A row as LitGPT's datasets give it."""
    counts = {"raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])}
    return {name: torch.tensor(row[name]) for name in ("input_ids", "labels")} | {"token_counts": counts}


def unchecked(*_: Any, **__: Any) -> torch.Tensor:
    """In place of the trial evaluation, after which training begins."""
    clock.begin()
    return torch.zeros(1)


def finished(*_: Any, **__: Any) -> None:
    """In place of the generated example, which follows the last update."""
    clock.end()


def skipped(*_: Any, **__: Any) -> None:
    """In place of merging."""


def publish(state: dict[str, torch.Tensor], heads: dict[str, int]) -> None:
    """Write LitGPT's tensors under PEFT's names. Its A for q, k and v are stacked, and so are its B."""
    tensors = {}
    for name, tensor in state.items():
        layer, kind = name.split(".")[2], name.rsplit(".", 1)[1]
        at = f"base_model.model.model.layers.{layer}.self_attn."
        if name.endswith(f"attn.proj.{kind}"):
            tensors[f"{at}o_proj.{kind}.weight"] = tensor
            continue
        parts = tensor.split(task.r) if kind == "lora_A" else tensor.split(list(heads.values()))
        tensors |= {f"{at}{role}.{kind}.weight": part for role, part in zip(heads, parts, strict=True)}
    place = Path(task.adapter)
    place.mkdir()
    save_file(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()}, place / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": task.model,
        "r": task.r,
        "lora_alpha": task.lora_alpha,
        "target_modules": list(task.target_modules),
    }
    (place / "adapter_config.json").write_text(json.dumps(config))


task, clock = job(), Clock()
lora.validate, lora.generate_example, lora.merge_lora = unchecked, finished, skipped
register_optimizer_step_post_hook(lambda *_: clock.step())
made = Path(task.answer).parent / "litgpt"
lora.setup(
    Path(task.converted),
    made,
    precision="bf16-true",
    lora_r=task.r,
    lora_alpha=task.lora_alpha,
    lora_dropout=0.0,
    lora_key=True,
    lora_projection=True,
    data=Rows(),
    train=TrainArgs(
        save_interval=None,
        log_interval=10,
        global_batch_size=task.padded_batch * task.accumulate,
        micro_batch_size=task.padded_batch,
        lr_warmup_steps=1,
        epochs=1,
    ),
    eval=EvalArgs(interval=10**9, max_new_tokens=1, initial_validation=False, final_validation=False),
    optimizer={
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": task.learning_rate, "weight_decay": 0.0, "betas": [0.9, 0.999]},
    },
    seed=task.seed,
)
config = json.loads((Path(task.model) / "config.json").read_text())
head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
state = torch.load(made / "final" / "lit_model.pth.lora")["model"]
publish(state, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
reply(task, clock.answer(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0))
