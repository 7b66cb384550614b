"""loratune's own command line, in this process; what it prints tells when the first step was made.

Nothing here may load torch before it, as loratune decides by the machine's load how torch's threads wait.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from loratune.__main__ import main
from peers.common import Answer, job, reply


class Watched:
    """A stream that notes when the report of the first step passes."""

    def __init__(self, stream: Any):
        self.stream, self.first = stream, 0.0

    def write(self, text: str) -> int:
        """Pass text on."""
        if not self.first and re.search(r"step +1/", text):
            self.first = time.time()
        return int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def config() -> Path:
    """The run as a config file."""
    # JSON is YAML.
    settings = {
        "model": {"name_or_path": task.model, **json.loads(os.environ.get("MODEL_SETTINGS", "{}"))},
        "lora": {"r": task.r, "lora_alpha": task.lora_alpha, "target_modules": list(task.target_modules)},
        "data": {"train": task.train, "packing": "full", "max_length": task.max_length},
        "training": {
            "learning_rate": task.learning_rate,
            "num_train_epochs": 1,
            "per_device_train_batch_size": max(1, task.packs * task.pack_length // task.max_length),
            "seed": task.seed,
        },
        "output_dir": task.adapter,
    }
    path = Path(task.answer).with_name("config.yaml")
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


task = job()
sys.argv = ["loratune", "train", str(config()), "--debug"]
watched = sys.stderr = Watched(sys.stderr)
try:
    main()
except SystemExit as end:
    if end.code:
        raise
import torch  # noqa: E402

metrics = json.loads((Path(task.adapter) / "loratune.json").read_text(encoding="utf-8"))["metrics"]
memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
reply(task, Answer(metrics["seconds"], watched.first, metrics["steps"], memory))
