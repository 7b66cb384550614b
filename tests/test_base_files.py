"""The files of the base are overwritten, cut off or removed while a command runs."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Expected, Ran, check_refused, tiny_llama
from fork_server import ForkServer
from running import WEIGHTS, MakeConfig, checkpoints, straight, until
from safetensors.torch import load_file, save_file

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import ModelSection
from loratune.model import load


def mapped(directory: Path) -> list[str]:
    """Lines on mappings of files below a directory."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]


def overwrite(weights: Path, only: str = "") -> None:
    """With other numbers, in place: the same file, of the same size and with the times that it had. only: a tensor."""
    before = weights.stat()
    tensors = load_file(weights)
    raw = bytearray(weights.read_bytes())
    save_file(
        {name: tensor + (only in name) for name, tensor in tensors.items()},
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


def changed(base: Path) -> Expected:
    """The problem of a run whose base has changed."""
    return Code.TRAIN_BASE_CHANGED, str(base / "model.safetensors"), "model.name_or_path"


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


def test_changed_files_are_distinguished_from_touched_ones(base_dir: Path) -> None:
    section = ModelSection(name_or_path=str(base_dir))
    weights, config = base_dir / "model.safetensors", base_dir / "config.json"
    known, strictly = load.files(section), load.files(section, read=False)
    assert strictly.changed() == []
    os.utime(weights)
    assert strictly.changed() == [str(weights)]
    shutil.copy(weights, base_dir / "copy")
    (base_dir / "copy").replace(weights)
    (base_dir / "README.md").write_text("New.")
    assert known.changed() == known.changed(thoroughly=True) == []
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert known.changed() == [str(config)]
    for change in CHANGES.values():
        shutil.rmtree(base_dir)
        tiny_llama().save_pretrained(base_dir)
        known = load.files(section)
        change(weights)
        assert known.changed() == [str(weights)]


def test_a_change_of_any_one_tensor_is_seen(base_dir: Path) -> None:
    """In place, of the same size, and with the time of the last change set back."""
    weights = base_dir / "model.safetensors"
    before = weights.read_bytes()
    known = load.files(ModelSection(name_or_path=str(base_dir)))
    unseen = []
    for name, tensor in load_file(weights).items():
        overwrite(weights, name)
        if known.changed() != [str(weights)]:
            unseen.append((name, tensor.shape))
        weights.write_bytes(before)
    assert unseen == []
    assert known.changed() == []


def test_one_norm_that_changes_while_a_run_lasts_ends_it(
    run_config: MakeConfig, tmp_path: Path, base_dir: Path, processes: ForkServer
) -> None:
    """One tensor of 128 bytes, of which no sample of the file need know."""
    config = run_config(
        model={"name_or_path": str(base_dir)}, training={"save_steps": 20, "num_train_epochs": 8, "logging_steps": 1}
    )
    child = processes.start("train", config)
    until(lambda: "step     5/" in child.said(), child)
    overwrite(base_dir / "model.safetensors", "model.layers.1.input_layernorm.weight")
    check_refused(Ran(child.wait(), "", child.said()), 3, changed(base_dir))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["overwritten", "cut off", "removed"])
def test_a_run_ends_with_its_last_checkpoint(
    name: str, run_config: MakeConfig, tmp_path: Path, base_dir: Path, processes: ForkServer
) -> None:
    """Noticed at the next checkpoint; with the files put back, the run goes on as if nothing had been."""
    config = run_config(
        model={"name_or_path": str(base_dir)}, training={"save_steps": 20, "num_train_epochs": 8, "logging_steps": 1}
    )
    kept = shutil.copytree(base_dir, tmp_path / "kept")
    expected = straight(processes, config, tmp_path) if name == "overwritten" else None
    child = processes.start("train", config)
    until(lambda: "step     5/" in child.said(), child)
    CHANGES[name](base_dir / "model.safetensors")
    check_refused(Ran(child.wait(), "", child.said()), 3, changed(base_dir))
    assert not (tmp_path / "out").exists()
    assert checkpoints(tmp_path / "out.partial") != []
    shutil.rmtree(base_dir)
    shutil.copytree(kept, base_dir)
    if expected is not None:
        child = processes.start("train", config, "--resume")
        assert child.wait() == 0, child.said()
        assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected


def test_a_change_after_the_last_step_is_noticed(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, base_dir: Path
) -> None:
    """While the adapter is compared with its base, before it is published."""
    config = run_config(model={"name_or_path": str(base_dir)}, training={"max_steps": 5})
    last, over = tmp_path / "out.partial" / "checkpoints" / "checkpoint-5", threading.Event()

    def watch() -> None:
        while not last.exists() and not over.wait(0.002):
            pass
        overwrite(base_dir / "model.safetensors")

    watcher = threading.Thread(target=watch)
    watcher.start()
    ran = cli("train", config)
    over.set()
    watcher.join()
    check_refused(ran, 3, changed(base_dir))
    assert last.exists() and not (tmp_path / "out").exists()


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
