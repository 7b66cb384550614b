"""The recipe of the textbooks: transformers.Trainer + PEFT in fp32, every row padded to max_length."""

import torch

from peers import stock
from peers.common import job

task = job()
stock.fit_padded(task, stock.adapted(task, torch.float32), whole=True)
