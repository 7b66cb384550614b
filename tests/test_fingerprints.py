"""Every tensor of a base contributes to its fingerprint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, check_refused, tiny_llama
from running import MakeConfig, stopped
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError
from loratune.model import checks, fingerprints, tensor_files
from loratune.model.fingerprints import FileStates
from loratune.model.load import load_config, load_for_run
from loratune.system.launcher import Group

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B, Mistral-7B": {"num_hidden_layers": 32},
    "Llama-3-70B": {"num_hidden_layers": 80},
    "Qwen2-0.5B": {"num_hidden_layers": 24, "attention_bias": True, "tie_word_embeddings": True},
    "SmolLM2-360M": {"num_hidden_layers": 32, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    "shape", [one if one == "Qwen2-0.5B" else pytest.param(one, marks=pytest.mark.slow) for one in SHAPES]
)
def test_a_change_of_any_tensor_changes_the_fingerprint(shape: str) -> None:
    """By a rank-1 change of a hundredth of the tensor, like a merged LoRA on a single module of one layer."""
    base = tiny_llama(**SHAPES[shape])
    known, unseen = fingerprints.fingerprint(base), []
    for name, tensor in base.named_parameters():
        before = tensor.data.clone()
        up, down = torch.randn(len(tensor), 1), torch.randn(1, tensor.numel() // len(tensor))
        tensor.data += 0.01 * tensor.std() * (up @ down).view_as(tensor) if tensor.dim() > 1 else 0.05 * up[:, 0]
        if fingerprints.fingerprint(base) == known:
            unseen.append(name)
        tensor.data = before
    assert unseen == []
    assert fingerprints.fingerprint(base) == known


def test_a_lora_on_one_layer_changes_the_fingerprint_of_large_tensors() -> None:
    """In bfloat16, where most of a small change is rounded away, with unchanged embeddings and first values."""
    base = tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=4).to(torch.bfloat16)
    known, weight = fingerprints.fingerprint(base), base.model.layers[2].self_attn.v_proj.weight.data
    change = 0.002 * torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1]) * weight.float().std()
    change.view(-1)[:64] = 0
    weight += change.to(weight.dtype)
    assert fingerprints.fingerprint(base) != known


def test_the_same_base_has_the_same_fingerprint(tmp_path: Path) -> None:
    """In another dtype, saved as shards, and with another attention implementation."""
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    known = fingerprints.fingerprint(base)
    for given in ({"dtype": torch.bfloat16}, {"dtype": torch.float32, "attn_implementation": "eager"}):
        assert fingerprints.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, **given)) == known
    assert fingerprints.fingerprint(tiny_llama(rms_norm_eps=1e-5)) != known


def test_a_change_of_one_value_anywhere_changes_the_fingerprint() -> None:
    """One token's row of an embedding, the smallest change of one number, swapped rows."""
    base = tiny_llama(vocab_size=3000, hidden_size=256, intermediate_size=700).to(torch.bfloat16)
    known = fingerprints.fingerprint(base)
    dice = torch.Generator().manual_seed(0)
    for weight in (base.model.embed_tokens.weight, base.lm_head.weight, base.model.layers[1].mlp.down_proj.weight):
        before = weight.data.clone()
        for number in torch.randint(len(weight), (10,), generator=dice).tolist():
            weight.data[number] *= 1.1
            assert fingerprints.fingerprint(base) != known, number
            weight.data.copy_(before)
            column = int(torch.randint(weight.shape[1], (1,), generator=dice))
            weight.data[number, column].view(torch.int16).add_(1)
            assert fingerprints.fingerprint(base) != known, (number, column)
            weight.data.copy_(before)
            weight.data[[number, number - 7]] = before[[number - 7, number]]
            assert fingerprints.fingerprint(base) != known, number
            weight.data.copy_(before)
    assert fingerprints.fingerprint(base) == known


def test_tensors_of_any_layout_are_supported() -> None:
    """Not contiguous, at odd offsets of a storage, empty, of one value."""
    values = torch.randn(9, 1000)
    plain = fingerprints.block_sums(values)
    assert fingerprints.block_sums(torch.randn(9000, 9).T.copy_(values.repeat(1, 9))[:, :1000]) == plain
    for shift in range(1, 5):
        held = torch.zeros(9000 + shift, dtype=torch.bfloat16)
        held[shift:] = values.flatten()
        assert fingerprints.block_sums(held[shift:]) == plain
    assert fingerprints.block_sums(torch.zeros(0)) == b"" and len(fingerprints.block_sums(torch.tensor(1.0))) == 2


IRRELEVANT: dict[str, Any] = {
    "use_cache": False, "pad_token_id": 3, "eos_token_id": [256, 257], "bos_token_id": 1, "architectures": ["Other"],
    "temperature": 0.3, "max_length": 77, "id2label": {0: "no", 1: "yes"}, "unsloth_version": "2026.1",
    "task_specific_params": {"a": 1}, "initializer_range": 0.5, "tokenizer_class": "Other",
    "auto_map": {"AutoConfig": "a.B"},
}  # fmt: skip
RELEVANT: dict[str, Any] = {
    "rms_norm_eps": 1e-5, "hidden_act": "relu", "rope_theta": 5e4, "attention_dropout": 0.1, "num_key_value_heads": 1,
    "max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True,
}  # fmt: skip


def test_only_settings_that_affect_the_computation_count(tmp_path: Path) -> None:
    """As they are in config.json."""
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())

    def having(changes: dict[str, Any]) -> str:
        kept = {key: value for key, value in written.items() if key != "rope_parameters" or "rope" not in str(changes)}
        file.write_text(json.dumps(kept | changes))
        found = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
        return fingerprints.fingerprint(found)

    known = having({})
    assert {key for key, value in IRRELEVANT.items() if having({key: value}) != known} == set()
    assert {key for key, value in RELEVANT.items() if having({key: value}) == known} == set()
    del written["head_dim"]
    assert having({}) == known


def test_an_undeclared_key_counts_if_the_model_reads_it() -> None:
    """Qwen2 reads a head_dim that its configuration does not declare."""
    shape = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    made = [
        Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=4, **more))
        for more in ({}, {"head_dim": 8}, {"nobody_reads_it": 8})
    ]
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    prints = [fingerprints.fingerprint(one) for one in made]
    assert prints[0] == prints[2] != prints[1]


def test_tensors_of_integers_or_few_values() -> None:
    """Packed weights are buffers in some formats."""

    def packed(change: int) -> LlamaForCausalLM:
        base = tiny_llama()
        base.model.layers[1].mlp.register_buffer("qweight", torch.full((3, 5), 70_000 + change, dtype=torch.int32))
        base.model.layers[1].mlp.register_buffer("passing", torch.full((3,), float(change)), persistent=False)
        return base

    assert fingerprints.fingerprint(packed(0)) != fingerprints.fingerprint(packed(1))
    other = packed(0)
    other.model.layers[1].mlp.passing += 1
    assert fingerprints.fingerprint(other) == fingerprints.fingerprint(packed(0))


@pytest.fixture
def merged(tiny_dir: Path, tmp_path: Path) -> Path:
    """The tiny base with a change in each projection."""
    base = tiny_llama()
    for layer in base.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight):
            weight.data.view(-1)[64:] *= 1.05
    shutil.copytree(tiny_dir, tmp_path / "merged")
    base.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_a_published_adapter_detects_a_different_base(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, tiny_dir: Path, merged: Path
) -> None:
    assert cli("train", run_config(training={"max_steps": 2})).code == 0
    out = tmp_path / "out"
    config, record = out / "adapter_config.json", out / "loratune.json"
    rows = tmp_path / "rows.jsonl"

    def on(base: Path) -> list[Ran]:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
        asked = cli("generate", "1 and 1 make", "--adapter", out, "--max-new-tokens", 1)
        return [asked, cli("evaluate", "--adapter", out, "--data", rows)]

    def recorded(base: str) -> None:
        values = json.loads(record.read_text())
        values["fingerprints"]["base"] = base
        record.write_text(json.dumps(values))

    assert [ran.code for ran in on(tiny_dir)] == [0, 0]
    for ran in on(merged):
        check_refused(ran, 5, (Code.ADAPTER_MISMATCH, str(out), ""))
        assert f"was trained on another base than {merged}" in ran.err
    recorded("9:of a later release")
    for ran in on(tiny_dir):
        check_refused(ran, 5, (Code.ADAPTER_MISMATCH, str(out), ""))
        assert "upgrade loratune" in ran.err


def test_a_run_resumes_only_on_the_same_base(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, merged: Path
) -> None:
    config = run_config(training={"save_steps": 1, "num_train_epochs": 4})
    assert stopped(cli, tmp_path / "out.partial", "train", config).code == 130
    moved = ("--resume", "--set", f"model.name_or_path={merged}", "--allow-change", "model.name_or_path")
    refused = cli("train", config, *moved)
    assert refused.code == 7 and f"[{Code.RESUME_CHANGED}]" in refused.err


def test_a_base_is_hashed_once_for_each_state_of_its_files(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, times and places of files are their state. What was changed just now may change again within a tick."""
    base, calls = Path(shutil.copytree(tiny_dir, tmp_path / "base")), list[str]()

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def count(*given: Any) -> Any:
            calls.append(name)
            return function(*given)

        monkeypatch.setattr(owner, name, count)

    counted(fingerprints, "fingerprint")
    counted(checks, "check_finite")

    def load(**given: Any) -> list[str]:
        calls.clear()
        section = ModelSection(**({"name_or_path": str(base), "dtype": "float32"} | given))
        prints.append(load_for_run(section, Group()).fingerprint)
        return [*calls]

    prints, both = list[str](), ["check_finite", "fingerprint"]
    assert load() == both == load()
    monkeypatch.setattr(fingerprints, "_OLD", 0)
    assert load() == both and load() == []
    assert load(dtype="bfloat16") == both and load(dtype="bfloat16") == []
    weights = base / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns))  # which changes the time of the last change of the inode
    assert load() == both and load() == []
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)
    assert load() == both and load() == []
    assert len({*prints}) == 1
    tiny_llama(rms_norm_eps=1e-3).save_pretrained(base)
    assert load() == both and prints[-1] != prints[0]
    (damaged := tiny_llama()).lm_head.weight.data[0] = torch.nan
    damaged.save_pretrained(base)
    for _ in range(2):
        with pytest.raises(ModelError):
            load()


LAYOUTS = {
    "shards in a directory": ("model.safetensors.index.json", "part/w.safetensors", ""),
    "pickles in a directory": ("pytorch_model.bin.index.json", "part/w.bin", ""),
    "a shard of another name": ("model.safetensors.index.json", "0001.safetensors", ""),
    "a file that config.json names": ("", "part/w.safetensors", "part/w.safetensors"),
    "an index that config.json names": (
        "part/a.safetensors.index.json",
        "b/w.safetensors",
        "part/a.safetensors.index.json",
    ),
}
"""Where the weights of a base are: the index, the file that it names, and `transformers_weights` of config.json."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_any_name_in_any_directory_belong_to_the_state_of_a_base(
    layout: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of a base is not used after such a file has changed, and a run notices the change."""
    base, (index, shard, chosen) = Path(shutil.copytree(tiny_dir, tmp_path / "base")), LAYOUTS[layout]
    (base / "model.safetensors").unlink()
    for path in filter(None, (index, shard)):
        (base / path).parent.mkdir(exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | ({"transformers_weights": chosen} if chosen else {})))

    def write(llama: LlamaForCausalLM) -> None:
        values = llama.state_dict()
        if index:
            content = {"metadata": {}, "weight_map": dict.fromkeys(values, shard)}
            (base / index).write_text(json.dumps(content))
        if shard.endswith("bin"):
            torch.save(values, base / shard)
        else:
            save_file(values, base / shard, {"format": "pt"})

    monkeypatch.setattr(fingerprints, "_OLD", 0)
    section = ModelSection(name_or_path=str(base), dtype="float32")
    write(tiny_llama())
    first = load_for_run(section, Group())
    assert load_for_run(section, Group()).fingerprint == first.fingerprint
    if not shard.endswith("bin"):
        stored = tensor_files.release_tensors(section, load_config(section))
        assert {*stored} == {*tiny_llama().state_dict()}
    (other := tiny_llama()).model.layers[1].mlp.up_proj.weight.data *= -1
    write(other)
    with pytest.raises(ModelError, match=Path(shard).name):
        first.files.check_unchanged_in_run()
    assert load_for_run(section, Group()).fingerprint != first.fingerprint
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    write(other)
    with pytest.raises(ModelError, match="hold NaN"):
        load_for_run(section, Group())
    (base / shard).write_bytes((base / shard).read_bytes()[:-9])
    with pytest.raises(ModelError):
        load_for_run(section, Group())


STATES = {
    "settings of a GGUF file": ({"gguf_file": "a.gguf"}, "config.json"),
    "a GGUF file in a directory": ({"gguf_file": "b/a.gguf"}, "b/a.gguf"),
    "an adapter in the base": ({}, "adapter_config.json"),
    "an index that is no object": ({}, "no.index.json"),
    "an index that is no JSON": ({}, "bad.index.json"),
    "shards that are no texts": ({}, "odd.index.json"),
}


@pytest.mark.parametrize("name", STATES)
def test_what_decides_how_a_base_computes_belongs_to_its_state(name: str, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    contents = {
        "config.json": "{}", "a.gguf": "a", "b/a.gguf": "a", "adapter_config.json": "{}", "no.index.json": "[]",
        "bad.index.json": "[" * 9999, "odd.index.json": json.dumps({"weight_map": {"a": 1, "b": None, "c": "x" * 999}}),
    }  # fmt: skip
    for file, content in contents.items():
        (tmp_path / file).write_text(content)
    given, changed = STATES[name]
    files = FileStates(ModelSection(name_or_path=str(tmp_path), **given))
    files.check_unchanged()
    (tmp_path / changed).write_text("{ }")
    with pytest.raises(ModelError, match=changed):
        files.check_unchanged()


def test_nothing_is_kept_of_a_base_whose_weights_came_after_its_state(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when config.json was in the cache of the hub, and the weights are downloaded."""
    monkeypatch.setattr(fingerprints, "_OLD", 0)
    shutil.copy(tiny_dir / "config.json", tmp_path)
    files = FileStates(ModelSection(name_or_path=str(tmp_path)))
    assert files.kept_results(torch.device("cpu")).store({"fingerprint": "a"}) == ""
    shutil.copy(tiny_dir / "model.safetensors", tmp_path)
    assert files.kept_results(torch.device("cpu")).load() == {}
