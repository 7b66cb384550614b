"""A recipe in Unsloth itself, under the Trainer that it patches: `python -P -m peers.recipe_unsloth ORDER`."""

# Unsloth patches what is imported after it.
import unsloth  # isort: skip
import torch
import transformers

from peers import stock
from peers.recipes import order

task = order()
recipe = task.recipe
model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
    task.model, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=False
)
model = unsloth.FastLanguageModel.get_peft_model(
    model,
    r=recipe.r,
    lora_alpha=recipe.alpha,
    target_modules=list(recipe.targets or ()),
    lora_dropout=recipe.dropout,
    bias="none",
    use_gradient_checkpointing=False,
    random_state=task.seed,
)
timing = stock.Timing()
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**task.arguments()),
    data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
    train_dataset=task.read_rows(),
    callbacks=[timing],
)
trainer.train()
model.save_pretrained(task.adapter)
stock.reply(task, timing.clock.answer())
