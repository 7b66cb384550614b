"""The files of the base are overwritten, cut off or removed while a command runs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, meanings, tiny_llama
from fork_server import ForkServer
from running import WEIGHTS, MakeConfig, straight, until
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError
from loratune.model import load


def mapped(directory: Path) -> list[str]:
    """Lines on mappings of files below a directory."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]


def overwrite(weights: Path) -> None:
    """With other numbers, in place: the same file, of the same size and with the times that it had."""
    before = weights.stat()
    tensors = load_file(weights)
    raw = bytearray(weights.read_bytes())
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()},
        weights.with_suffix(".new"),
        {"format": "pt"},
    )
    raw[:] = weights.with_suffix(".new").read_bytes()
    weights.with_suffix(".new").unlink()
    assert len(raw) == before.st_size
    with weights.open("r+b") as file:
        file.write(raw)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "overwritten": overwrite,
    "cut off": lambda weights: os.truncate(weights, 1000),
    "empty": lambda weights: os.truncate(weights, 0),
    "removed": lambda weights: weights.unlink(),
    "replaced": lambda weights: save_file(
        {name: tensor * 2 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"}
    ),
}


@pytest.fixture
def base_dir(tmp_path: Path, tiny_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "base"))


HELD: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "as it is": ({}, lambda path: None),
    "in another dtype": ({"dtype": "bfloat16"}, lambda path: None),
    "tied": ({}, lambda path: tiny_llama(tie_word_embeddings=True).save_pretrained(path)),
    "in shards": ({}, lambda path: tiny_llama().save_pretrained(path, max_shard_size="20KB")),
    "in 4 bit": ({"quantization": "4bit"}, lambda path: None),
    "in 8 bit": ({"quantization": "8bit"}, lambda path: None),
}


@pytest.mark.parametrize("name", HELD)
def test_no_file_stays_mapped(name: str, base_dir: Path) -> None:
    given, prepare = HELD[name]
    prepare(base_dir)
    section = ModelSection(**({"name_or_path": str(base_dir), "dtype": "float32"} | given))
    base = load.load_base(section)
    assert mapped(base_dir) == []
    if name == "tied":
        assert base.lm_head.weight is base.model.embed_tokens.weight
    if name == "as it is":
        assert all(
            torch.equal(one, other) for one, other in zip(base.parameters(), tiny_llama().parameters(), strict=True)
        )


def test_pickled_weights_are_not_mapped_either(base_dir: Path) -> None:
    torch.save(tiny_llama().state_dict(), base_dir / "pytorch_model.bin")
    (base_dir / "model.safetensors").unlink()
    load.load_base(ModelSection(name_or_path=str(base_dir), dtype="float32"))
    assert mapped(base_dir) == []


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_while_the_base_is_read_is_refused(name: str, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, section = base_dir / "model.safetensors", ModelSection(name_or_path=str(base_dir))
    loading_mapped = AutoModelForCausalLM.from_pretrained

    def change_meanwhile(*arguments: Any, **settings: Any) -> Any:
        loaded = loading_mapped(*arguments, **settings)
        CHANGES[name](weights)
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", change_meanwhile)
    with pytest.raises(ModelError) as refused:
        load.load_base(section)
    assert meanings(refused.value) == [(Code.MODEL_WEIGHTS_CHANGED, str(weights), "")]


def test_a_run_does_not_depend_on_the_files_once_they_are_read(
    run_config: MakeConfig, tmp_path: Path, base_dir: Path, processes: ForkServer
) -> None:
    """The adapter has the same bytes, and records the base that it was trained on."""
    config = run_config(
        model={"name_or_path": str(base_dir)}, training={"save_steps": 20, "num_train_epochs": 8, "logging_steps": 1}
    )
    expected = straight(processes, config, tmp_path)
    child = processes.start("train", config)
    until(lambda: "step     5/" in child.said(), child)
    overwrite(base_dir / "model.safetensors")
    assert child.wait() == 0, child.said()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected
    used = processes.start("generate", "1 and 1 make", "--adapter", tmp_path / "out")
    assert used.wait() == 5 and f"[{Code.INFERENCE_OTHER_BASE}]" in used.said()


def test_answers_and_scores_do_not_depend_on_the_files_any_more(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, base_dir: Path
) -> None:
    assert cli("train", run_config(model={"name_or_path": str(base_dir)}, training={"max_steps": 2})).code == 0
    expected = cli("generate", "1 and 1 make", "--adapter", tmp_path / "out", "--max-new-tokens", 4)
    tuned = loading.load(AdapterDirectory.open(tmp_path / "out"))
    prompt = tuned.tokenizer("1 and 1 make").input_ids
    for change in CHANGES.values():
        if (base_dir / "model.safetensors").exists():
            change(base_dir / "model.safetensors")
        assert tuned.text(tuned.complete([prompt], 4)[0]) == expected.out.rstrip("\n")
