"""transformers.Trainer + PEFT at their best: bf16 base, autocast, micro-batches of rows of like length."""

import torch

from peers import stock
from peers.common import job

task = job()
stock.fit_padded(task, stock.adapted(task, torch.bfloat16), bf16=True, **stock.grouped())
