"""Row 77: a base is told from another by every one of its tensors, in this version of the fingerprint and the first."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, tiny_llama
from running import MakeConfig, checkpoints, stopped
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from loratune import model
from loratune.checkpoints import seal

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B, Mistral-7B": {"num_hidden_layers": 32},
    "Llama-3-70B": {"num_hidden_layers": 80},
    "Qwen2-0.5B": {"num_hidden_layers": 24, "attention_bias": True, "tie_word_embeddings": True},
    "SmolLM2-360M": {"num_hidden_layers": 32, "tie_word_embeddings": True},
}


def first_version(base: Any) -> str:
    """As the release before wrote it."""
    config = base.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "quantization_config"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = list(base.named_parameters())
    for name, tensor in tensors[:: max(1, len(tensors) // 16)]:
        some = tensor.detach().flatten()[:64].cpu().to(torch.bfloat16)
        digest.update(name.encode() + some.float().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_of_any_one_tensor_is_seen(shape: str) -> None:
    """By rank 1, scaled to a hundredth of the tensor, as a merged LoRA on a single module of a single layer does."""
    base = tiny_llama(**SHAPES[shape])
    known, unseen = model.fingerprint(base), []
    for name, tensor in base.named_parameters():
        before = tensor.data.clone()
        up, down = torch.randn(len(tensor), 1), torch.randn(1, tensor.numel() // len(tensor))
        tensor.data += 0.01 * tensor.std() * (up @ down).view_as(tensor) if tensor.dim() > 1 else 0.05 * up[:, 0]
        if model.fingerprint(base) == known:
            unseen.append(name)
        tensor.data = before
    assert unseen == []
    assert model.fingerprint(base) == known


def test_a_lora_on_one_layer_is_seen_in_the_middle_of_large_tensors() -> None:
    """In bfloat16, where most of a small change is rounded away, and with embeddings and first values as they were."""
    base = tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=4).to(torch.bfloat16)
    known, weight = model.fingerprint(base), base.model.layers[2].self_attn.v_proj.weight.data
    change = 0.002 * torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1]) * weight.float().std()
    change.view(-1)[:64] = 0
    weight += change.to(weight.dtype)
    assert model.fingerprint(base) != known


def test_the_same_base_has_the_same_fingerprint(tmp_path: Path) -> None:
    """In another dtype, saved as shards, and with other attention."""
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    known = model.fingerprint(base)
    for given in ({"dtype": torch.bfloat16}, {"dtype": torch.float32, "attn_implementation": "eager"}):
        assert model.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, **given)) == known
    assert model.fingerprint(tiny_llama(rms_norm_eps=1e-5)) != known
    assert model.fingerprint(base, like=first_version(base)) == first_version(base)
    assert model.fingerprint(base, like="3:of a later release") == known


def test_values_that_are_whole_numbers_or_few() -> None:
    """Packed weights are buffers in some formats."""

    def packed(change: int) -> LlamaForCausalLM:
        base = tiny_llama()
        base.model.layers[1].mlp.register_buffer("qweight", torch.full((3, 5), 70_000 + change, dtype=torch.int32))
        base.model.layers[1].mlp.register_buffer("passing", torch.full((3,), float(change)), persistent=False)
        return base

    assert model.fingerprint(packed(0)) != model.fingerprint(packed(1))
    other = packed(0)
    other.model.layers[1].mlp.passing += 1
    assert model.fingerprint(other) == model.fingerprint(packed(0))


@pytest.fixture
def merged(tiny_dir: Path, tmp_path: Path) -> Path:
    """The tiny base with a change in each projection, of which the first version of the fingerprint sees nothing."""
    base = tiny_llama()
    before = first_version(base)
    for layer in base.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight):
            weight.data.view(-1)[64:] *= 1.05
    assert first_version(base) == before
    shutil.copytree(tiny_dir, tmp_path / "merged")
    base.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_a_published_adapter_knows_its_base(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, tiny_dir: Path, merged: Path
) -> None:
    """With a record of this release and of the one before."""
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
        assert ran.code == 5 and f"was trained on another base than {merged}" in ran.err
    recorded(first_version(AutoModelForCausalLM.from_pretrained(tiny_dir)))
    assert [ran.code for ran in on(tiny_dir)] == [0, 0]
    recorded(first_version(tiny_llama(rms_norm_eps=1e-4)))
    assert [ran.code for ran in on(tiny_dir)] == [5, 5]
    recorded("3:of a later release")
    for ran in on(tiny_dir):
        assert ran.code == 5 and "a way that this release of loratune does not know; upgrade loratune" in ran.err


def test_a_run_is_resumed_on_its_base_only(
    cli: Callable[..., Ran], run_config: MakeConfig, tmp_path: Path, tiny_dir: Path, merged: Path
) -> None:
    """A checkpoint of this release, and one of the release before."""
    config = run_config(training={"save_steps": 1, "num_train_epochs": 20})
    partial = tmp_path / "out.partial"
    assert stopped(cli, partial, "train", config).code == 130
    before = json.loads((checkpoints(partial)[0] / "run.json").read_text())
    moved = ("--resume", "--set", f"model.name_or_path={merged}", "--allow-change", "model.name_or_path")
    changed = "model.name_or_path: the base model has changed since the run was interrupted"
    refused = cli("train", config, *moved)
    assert refused.code == 7 and changed in refused.err

    def recorded(base: str) -> None:
        for path in checkpoints(partial):
            (path / "manifest.json").unlink()
            run = before | {"fingerprints": before["fingerprints"] | {"base": base}}
            (path / "run.json").write_text(json.dumps(run))
            seal(path)

    recorded(first_version(tiny_llama(rms_norm_eps=1e-4)))
    refused = cli("train", config, "--resume")
    assert refused.code == 7 and changed in refused.err
    recorded(first_version(AutoModelForCausalLM.from_pretrained(tiny_dir)))
    assert cli("train", config, "--resume").code == 0
    made = json.loads((tmp_path / "out" / "loratune.json").read_text())
    assert made["fingerprints"]["base"] == before["fingerprints"]["base"]
