"""The recipe of the textbooks: transformers.Trainer + PEFT in fp32, every row padded to max_length."""

import torch
import transformers

from peers import stock
from peers.common import job

task = job()
arguments = transformers.TrainingArguments(
    **stock.settings(task, per_device_train_batch_size=task.padded_batch, gradient_accumulation_steps=task.accumulate)
)
stock.fit(
    task,
    transformers.Trainer(
        stock.adapted(task, torch.float32),
        arguments,
        data_collator=stock.collator(task, whole=True),
        train_dataset=task.rows,
    ),
)
