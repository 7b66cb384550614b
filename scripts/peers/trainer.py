"""transformers.Trainer + PEFT at their best: bf16 base, autocast, micro-batches of rows of like length."""

import torch
import transformers

from peers import stock
from peers.common import job

task = job()
arguments = transformers.TrainingArguments(
    **stock.settings(
        task,
        per_device_train_batch_size=task.padded_batch,
        gradient_accumulation_steps=task.accumulate,
        bf16=True,
        **stock.grouped(),
    )
)
stock.fit(
    task,
    transformers.Trainer(
        stock.adapted(task, torch.bfloat16),
        arguments,
        data_collator=stock.collator(task, whole=False),
        train_dataset=task.rows,
    ),
)
