"""TRL's SFTTrainer at its best: bf16 base, packing by best fit, no checkpointing."""

import datasets
import torch
import transformers
from trl import SFTConfig, SFTTrainer

from peers import stock
from peers.common import job

task = job()
transformers.set_seed(task.seed)
arguments = SFTConfig(
    **stock.settings(
        task,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=task.packs,
        bf16=True,
        max_length=task.pack_length,
        packing=True,
        gradient_checkpointing=False,
    )
)
stock.fit(
    task,
    SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16),
        arguments,
        train_dataset=datasets.Dataset.from_list(task.rows),
        processing_class=stock.tokenizer(task),
        peft_config=stock.lora(task),
    ),
)
