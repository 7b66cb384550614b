"""The files of the base are overwritten, truncated or removed while a command runs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, meanings, tiny_llama
from running import WEIGHTS, MakeConfig, checkpoints
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import ModelSection
from loratune.config import load as load_config
from loratune.errors import ModelError
from loratune.events import Event, StepEvent, TrainingEvent, listening
from loratune.model import load, tensor_files
from loratune.training import preflight
from loratune.training import run as training_run
from loratune.training.checkpoints import run_dir


def mapped(directory: Path) -> list[str]:
    """The lines of the process's memory map about files below a directory."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]


def overwrite(weights: Path) -> None:
    """Overwrite with other numbers in place: the same file with the same size and times."""
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
def test_no_file_stays_memory_mapped(name: str, base_dir: Path) -> None:
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


def test_files_that_cannot_change_remain_memory_mapped(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that is read-only, which a test cannot mount."""
    real = os.statvfs("/")
    read_only = os.statvfs_result((*real[:8], os.ST_RDONLY, *real[9:]))
    monkeypatch.setattr(tensor_files.os, "statvfs", lambda path: read_only if str(base_dir) in path else real)
    base = load.load_base(ModelSection(name_or_path=str(base_dir), dtype="float32"))
    assert mapped(base_dir) != []
    assert all(torch.equal(one, other) for one, other in zip(base.parameters(), tiny_llama().parameters(), strict=True))


def test_pickled_weights_are_not_memory_mapped_either(base_dir: Path) -> None:
    torch.save(tiny_llama().state_dict(), base_dir / "pytorch_model.bin")
    (base_dir / "model.safetensors").unlink()
    load.load_base(ModelSection(name_or_path=str(base_dir), dtype="float32"))
    assert mapped(base_dir) == []


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_while_the_base_is_loaded_is_refused(
    name: str, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, section = base_dir / "model.safetensors", ModelSection(name_or_path=str(base_dir))
    loading_mapped = AutoModelForCausalLM.from_pretrained

    def change_meanwhile(*arguments: Any, **settings: Any) -> Any:
        loaded = loading_mapped(*arguments, **settings)
        CHANGES[name](weights)
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", change_meanwhile)
    with pytest.raises(ModelError) as refused:
        load.load_base(section)
    assert meanings(refused.value) == [(Code.MODEL_CHANGED, str(weights), "")]


def run(config: Path, out: Path, on_event: Callable[[Event], None]) -> None:
    """Train in this process through the API; the command line has a listener of its own."""
    with listening(on_event):
        training_run.train(preflight.check(load_config(config), run_dir.check(str(out), overwrite=False)))


def test_a_run_whose_base_changes_ends_with_its_last_checkpoint(
    run_config: MakeConfig, tmp_path: Path, base_dir: Path, cli: Callable[..., Ran]
) -> None:
    """The change is noticed at the next checkpoint. Once the files are restored, the run continues as if
    undisturbed."""
    sections = {"model": {"name_or_path": str(base_dir)}, "training": {"save_steps": 4, "max_steps": 10}}
    config = run_config(**sections)
    assert cli("train", config, "--set", f"output_dir={tmp_path / 'straight'}").code == 0
    kept = shutil.copytree(base_dir, tmp_path / "kept")

    def change(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 2:
            overwrite(base_dir / "model.safetensors")

    with pytest.raises(ModelError) as refused:
        run(config, tmp_path / "out", change)
    assert meanings(refused.value) == [(Code.MODEL_CHANGED, str(base_dir / "model.safetensors"), "")]
    assert not (tmp_path / "out").exists() and checkpoints(tmp_path / "out.partial")
    ran = cli("train", config, "--resume")
    assert ran.code == 7 and f"[{Code.RESUME_CHANGED}]" in ran.err, ran.err
    shutil.rmtree(base_dir)
    shutil.copytree(kept, base_dir)
    assert (ran := cli("train", config, "--resume")).code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["overwritten", "removed"])
def test_a_change_of_the_base_after_the_last_step_is_noticed(
    name: str, run_config: MakeConfig, tmp_path: Path, base_dir: Path
) -> None:
    """Before the adapter is published. The last step is kept."""
    config = run_config(model={"name_or_path": str(base_dir)}, training={"max_steps": 2})

    def change(event: Event) -> None:
        if isinstance(event, TrainingEvent) and event.finished:
            CHANGES[name](base_dir / "model.safetensors")

    with pytest.raises(ModelError) as refused:
        run(config, tmp_path / "out", change)
    (problem,) = meanings(refused.value)
    assert problem == (Code.MODEL_CHANGED, str(base_dir / "model.safetensors"), "")
    assert (tmp_path / "out.partial" / "checkpoints" / "checkpoint-2").exists() and not (tmp_path / "out").exists()


def test_answers_and_scores_do_not_depend_on_the_files_after_loading(
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
