"""LLaMA-Factory at its best: neat_packing, no checkpointing, through its own run_exp.

Each row is handed to it as its number, and where its template would tokenise the text, the row of that number is put
in. Its packing, masks, collator, model and trainer are its own.
"""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from peers.common import job, reply

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # its binary does not load beside a CPU build of torch, and text needs none
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.train.tuner import run_exp

from peers import stock


def prepared(self: Any, prompt: list[dict[str, str]], **_: Any) -> tuple[list[int], list[int]]:
    """The row whose number the prompt is."""
    row = rows[int(prompt[0]["content"])]
    return list(row["input_ids"]), list(row["labels"])


task = job()
rows = task.rows
SupervisedDatasetProcessor._encode_data_example = prepared
place = Path(task.answer).parent / "data"
place.mkdir()
(place / "rows.json").write_text(
    json.dumps([{"instruction": str(n), "input": "", "output": "-"} for n in range(len(rows))])
)
(place / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
timing = stock.Timing()
run_exp(
    {
        "model_name_or_path": task.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": task.r,
        "lora_alpha": task.lora_alpha,
        "lora_target": ",".join(task.target_modules),
        "lora_dropout": 0.0,
        "dataset": "rows",
        "dataset_dir": str(place),
        "template": "empty",
        "cutoff_len": task.pack_length + 8,  # it keeps one for itself, drops longer rows, and wants multiples of 8
        "packing": True,
        "neat_packing": True,
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
        **stock.settings(
            task,
            output_dir=task.adapter,
            per_device_train_batch_size=task.packs,
            gradient_accumulation_steps=1,
            bf16=True,
        ),
    },
    callbacks=[timing],
)
reply(task, timing.clock.answer(stock.gpu_bytes()))
