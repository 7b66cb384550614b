"""loratune's own command line, in this process; a hook of torch tells when the first update was made.

The variable SETTINGS has sections of the config as JSON, which change what is in `config` below.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from loratune.__main__ import main
from loratune.system import environment
from peers.common import Answer, job, reply

first: list[float] = []
"""When the first update was made."""


def note(*_: Any) -> None:
    """Called after each update."""
    if not first:
        first.append(time.time())


def config() -> Path:
    """The run as a config file."""
    # JSON is YAML.
    settings: dict[str, Any] = {
        "model": {"name_or_path": task.model, "quantization": task.quantization},
        "lora": {"r": task.r, "lora_alpha": task.lora_alpha, "target_modules": list(task.target_modules)},
        "data": {
            "train": task.train,
            "packing": "full",
            "max_length": task.max_length,
        },
        "training": {
            "learning_rate": task.learning_rate,
            "num_train_epochs": 1,
            "per_device_train_batch_size": max(1, task.packs * task.pack_length // task.max_length),
            "seed": task.seed,
        },
        "output_dir": task.adapter,
    }
    for section, values in json.loads(os.environ.get("SETTINGS", "{}")).items():
        settings[section] = settings.get(section, {}) | values
    path = Path(task.answer).with_name("config.yaml")
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


task = job()
environment.limit_threads()  # As the command line does, before torch is loaded.

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from peers.steps import Steps  # noqa: E402

sys.argv = ["loratune", "train", str(config()), "--debug"]
register_optimizer_step_post_hook(note)
steps = Steps()
try:
    main()
except SystemExit as end:
    if end.code:
        raise
record = json.loads((Path(task.adapter) / "loratune.json").read_text(encoding="utf-8"))
metrics = record["metrics"]
losses = [float(point["loss"]) for point in record["curve"]]
memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
reply(task, Answer(metrics["seconds"], first[0], metrics["steps"], memory, steps=steps.seconds, losses=losses))
