"""A recipe in LLaMA-Factory, through its own run_exp: `python -P -m peers.recipe_llamafactory ORDER`."""

from peers import llamafactory_rows, stock
from peers.recipes import order

task = order()
recipe = task.recipe
timing = stock.Timing()
llamafactory_rows.run(
    task.read_rows(),
    task.answer,
    {
        "model_name_or_path": task.model,
        "lora_rank": recipe.r,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "lora_target": "all",
        "cutoff_len": 2048,
        **task.arguments(output_dir=task.adapter),
    },
    timing,
)
stock.reply(task, timing.clock.answer())
