"""LLaMA-Factory at its best: neat_packing, no checkpointing, through its own run_exp."""

from peers import llamafactory_rows, stock
from peers.common import job, reply

task = job()
timing = stock.Timing()
llamafactory_rows.run(
    task.rows,
    task.answer,
    {
        "model_name_or_path": task.model,
        "lora_rank": task.r,
        "lora_alpha": task.lora_alpha,
        "lora_target": ",".join(task.target_modules),
        "lora_dropout": 0.0,
        "cutoff_len": task.pack_length + 8,  # it keeps one for itself, drops longer rows, and wants multiples of 8
        "packing": True,
        "neat_packing": True,
        **stock.settings(
            task,
            output_dir=task.adapter,
            per_device_train_batch_size=task.packs,
            gradient_accumulation_steps=1,
            bf16=True,
        ),
    },
    timing,
)
reply(task, timing.clock.answer(stock.gpu_bytes()))
