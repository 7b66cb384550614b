"""transformers.Trainer + PEFT as in their documentation: bf16, rows in the order of the file, padded to the longest."""

import torch

from peers import stock
from peers.common import job

task = job()
stock.fit_padded(
    task, stock.adapted(task, torch.bfloat16), bf16=True, train_sampling_strategy="sequential", logging_steps=1
)
