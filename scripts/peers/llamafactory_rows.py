"""LLaMA-Factory's run_exp on rows that are tokenised already, without checkpointing.

Each row is handed to it as its number, and where its template would tokenise the text, the row of that number is put
in. Its masks, collator, model and trainer are its own.
"""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from peers import stock
from peers.common import Row

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # its binary does not load beside a CPU build of torch, and text needs none
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.train.tuner import run_exp


def run(rows: list[Row], answer: str, settings: dict[str, Any], timing: stock.Timing) -> None:
    """Train. answer: the path beside which the numbers of the rows are written; settings: LLaMA-Factory's own."""

    def prepared(self: Any, prompt: list[dict[str, str]], **_: Any) -> tuple[list[int], list[int]]:
        row = rows[int(prompt[0]["content"])]
        return list(row["input_ids"]), list(row["labels"])

    SupervisedDatasetProcessor._encode_data_example = prepared
    place = Path(answer).parent / "data"
    place.mkdir()
    (place / "rows.json").write_text(
        json.dumps([{"instruction": str(n), "input": "", "output": "-"} for n in range(len(rows))])
    )
    (place / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    fixed = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(place),
        "template": "empty",
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
    }
    run_exp(fixed | settings, callbacks=[timing])
