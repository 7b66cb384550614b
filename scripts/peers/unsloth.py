"""Unsloth: its model in 16 bit under the Trainer that it patches, micro-batches of rows of like length."""

# Unsloth patches what is imported after it.
import unsloth  # isort: skip
import torch

from peers import stock
from peers.common import job

task = job()
model, _ = unsloth.FastLanguageModel.from_pretrained(
    task.model, max_seq_length=task.max_length, dtype=torch.bfloat16, load_in_4bit=False
)
model = unsloth.FastLanguageModel.get_peft_model(
    model,
    r=task.r,
    lora_alpha=task.lora_alpha,
    target_modules=list(task.target_modules),
    lora_dropout=0.0,
    bias="none",
    use_gradient_checkpointing=False,
    random_state=task.seed,
)
stock.fit_padded(task, model, bf16=True, **stock.grouped())
