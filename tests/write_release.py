"""Writes what a release leaves behind, and what it promises, as release_1.tar.xz:

    PYTHONPATH=scripts python tests/write_release.py 1

test_earlier_releases.py reads it with later releases. A model of 17,000 parameters, an adapter, one of preferences, a
run that was interrupted after step 4 of 6, a study with two finished trials of three, and `promises.json`. All is in
/tmp/loratune-release-NUMBER, as records contain absolute paths. A fixture of an earlier release is never changed.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from conftest import ROWS, byte_tokenizer, tiny_llama, write_rows
from running import before_batch
from typer.main import get_command

from loratune import cli, errors
from loratune.cli import app
from loratune.codes import Code
from loratune.config.keys import json_schema

SCHEMAS = Path(cli.__file__).with_name("schemas.json")
GRID = "training.learning_rate=1e-3,1e-2,3e-3"
SETTINGS = """model: {name_or_path: base}
lora: {r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [q, k, v, o]}
data: {train: rows.jsonl, validation: 0.2, format: auto, max_length: 64}
training: {learning_rate: 1e-3, max_steps: 6, per_device_train_batch_size: 4, save_steps: 3, logging_steps: 1,
           eval_steps: 3, seed: 3}
"""
PREFERENCES = """model: {name_or_path: base}
lora: {r: 4, target_modules: [q, v]}
data: {train: pairs.jsonl}
training: {objective: dpo, learning_rate: 1e-3, max_steps: 4, per_device_train_batch_size: 4, logging_steps: 1}
preferences: {beta: 0.2}
"""


def promises() -> dict[str, Any]:
    """What does not go away before the next major release: keys and their values, what commands print with `--json`,
    codes, commands and options."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    return {
        "schema": json_schema(),
        "outputs": json.loads(SCHEMAS.read_text(encoding="utf-8")),
        "codes": sorted(Code),
        "exit_codes": {one.__name__: one.exit_code for one in errors.LoratuneError.__subclasses__()},
        "options": {
            name: sorted(option for parameter in command.params for option in parameter.opts)
            for name, command in commands.items()
        },
    }


def run(*arguments: str, stopped: int = 0) -> None:
    """Run a command in a process of its own; stopped: in the batch of this number."""
    first = before_batch(stopped, "signal.raise_signal(signal.SIGINT)") if stopped else ""
    code = f"{first}\nimport sys\nfrom loratune.__main__ import main\nsys.argv[0] = 'loratune'\nmain()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, timeout=600)
    assert done.returncode == (130 if stopped else 0), arguments


def main(number: str) -> None:
    archive = Path(__file__).with_name(f"release_{number}.tar.xz")
    assert not archive.exists(), f"{archive} is kept as it is"
    place = Path(f"/tmp/loratune-release-{number}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    tiny_llama(hidden_size=16, intermediate_size=32).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    write_rows(Path("rows.jsonl"), ROWS)
    write_rows(
        Path("pairs.jsonl"),
        [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"} for row in ROWS],
    )
    for name, text in {"sft": SETTINGS, "whole": SETTINGS, "best": SETTINGS, "dpo": PREFERENCES}.items():
        Path(f"{name}.yaml").write_text(f"{text}output_dir: {name}\n")
    run("train", "whole.yaml")
    run("train", "dpo.yaml")
    run("train", "sft.yaml", stopped=4)
    run("sweep", "best.yaml", "--grid", GRID, stopped=14)
    Path("promises.json").write_text(json.dumps(promises(), indent=1))
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(place, place.name)
    shutil.rmtree(place)


if __name__ == "__main__":
    main(sys.argv[1])
