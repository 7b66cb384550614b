"""A recipe in TRL's SFTTrainer: `python -P -m peers.recipe_trl ORDER`."""

import datasets
import torch
import transformers
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from peers import stock
from peers.recipes import order

task = order()
recipe = task.recipe
transformers.set_seed(task.seed)
timing = stock.Timing()
trainer = SFTTrainer(
    transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16),
    SFTConfig(**task.arguments(gradient_checkpointing=False)),
    train_dataset=datasets.Dataset.from_list(task.read_rows()),
    processing_class=transformers.AutoTokenizer.from_pretrained(task.model),
    peft_config=LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.targets and list(recipe.targets),
        task_type="CAUSAL_LM",
    ),
    callbacks=[timing],
)
trainer.train()
trainer.save_model(task.adapter)
stock.reply(task, timing.clock.answer())
