"""`loratune merge`: the merged model equals base plus adapter in every family and variant, or the merge is refused."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import Ran, check_refused, meanings, tiny_llama, tree, write_rows
from fork_server import ForkServer
from peft import LoraConfig, PeftModel, get_peft_model
from running import flip, until
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from loratune import memory
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.errors import AdapterError
from loratune.export import merged_model, merging
from loratune.export.comparison import Texts
from loratune.export.merging import Merge
from loratune.lora import adapter_files
from loratune.lora.adapter_files import inspect
from loratune.model import fingerprints, load, stored, tensor_files
from loratune.system.output_dir import OutputDirectory

IDS = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200]])
SMALL: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED, attention_bias=True),
    "llama, tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED),
    "phi3": Phi3Config(**GROUPED, pad_token_id=0),
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=256),
    "neox": GPTNeoXConfig(**SMALL),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
}
TARGETS = {"phi3": ["qkv_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "neox": ["query_key_value", "dense"]}
EXPERTS: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
DEFAULT_SETTINGS = {"mixtral": EXPERTS, "qwen3 moe": EXPERTS}
PATTERNS: dict[str, Any] = {
    "use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 8},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 3},
}  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"use_dora": True}),
    ("llama", PATTERNS),
    ("llama", {"bias": "all"}),
    ("llama", {"bias": "lora_only"}),
    ("llama", {"lora_bias": True}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"trainable_token_indices": [3, 5, 200]}),
    ("llama", {"init_lora_weights": "pissa"}),
    ("llama", {"init_lora_weights": "olora"}),
    ("llama", {"init_lora_weights": "orthogonal"}),
    ("llama", {"init_lora_weights": "mica"}),
    ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama, tied", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama, tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama, tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    ("llama, tied", {"modules_to_save": ["lm_head"]}),
    ("llama, tied", {"modules_to_save": ["embed_tokens"]}),
    ("llama, tied", {"trainable_token_indices": [3, 5, 200]}),
    ("gpt2", {"use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    ("gpt2", {"init_lora_weights": "pissa", "fan_in_fan_out": True}),
    ("mixtral", EXPERTS),
    ("qwen3 moe", EXPERTS),
    ("mixtral", {"modules_to_save": ["gate"]}),
]


@dataclass(frozen=True)
class Case:
    """A base and an adapter on disk."""

    base: Path
    adapter: Path

    @property
    def info(self) -> AdapterDirectory:
        return AdapterDirectory.open(self.adapter)

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the base, and of base plus adapter in PEFT, in float32."""
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        with torch.no_grad():
            alone = base(IDS).logits
            return alone, PeftModel.from_pretrained(base, self.adapter).eval()(IDS).logits


def make(folder: Path, family: str, settings: dict[str, Any], size: float = 0.1, shard: str = "20KB") -> Case:
    """A base of several files in bfloat16, and an adapter without zero weights, as if it were trained."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).bfloat16().save_pretrained(folder / "base", max_shard_size=shard)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    defaults = {"target_modules": TARGETS.get(family, ["q_proj", "v_proj"]), "r": 4, "lora_alpha": 16}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **defaults | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.save_pretrained(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return Case(folder / "base", folder / "adapter")


def written(case: Case, folder: Path, stored: torch.dtype | None = None, **changes: Any) -> tuple[Any, Any, Any]:
    """The plan, its result, and the written model loaded by stock transformers in float32."""
    info = case.info
    info = replace(info, base=info.base.model_copy(update=changes))
    plan = Merge(info, stored)
    folder.mkdir()
    made = plan.write(folder, most=20_000)
    merged_model.write_configs(folder, info, plan, (256,))
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return plan, made, model.eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Case:
    case = make(tmp_path_factory.mktemp("merge"), "llama", {})
    tokenizer.save_pretrained(case.base)
    return case


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=[f"{name} {kind or ''}" for name, kind in VARIANTS])
def test_float32_merge_equals_base_plus_adapter(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    case = make(tmp_path, family, settings)
    base, adapter = case.logits()
    plan, _, merged = written(case, tmp_path / "out", torch.float32)
    assert not plan.is_loaded and not plan.note
    difference = (merged(IDS).logits - adapter).abs().max()
    assert difference < 1e-5 < 1e-2 < (base - adapter).abs().max()


@pytest.mark.parametrize("family", ["phi3", "gpt2", "neox", "mixtral", "qwen3 moe"])
def test_loaded_base_is_written_with_the_original_tensor_names(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(tmp_path, family, DEFAULT_SETTINGS.get(family, {}))
    _, _, streamed = written(case, tmp_path / "streamed", torch.float32)

    def refuse(*_: Any) -> None:
        raise tensor_files.NotStreamableError("a test")

    monkeypatch.setattr(stored, "open_stored", refuse)
    plan, _, loaded = written(case, tmp_path / "loaded", torch.float32)
    assert plan.is_loaded and plan.note
    names = [tensors.keys() for tensors in map(stored_tensors, (tmp_path / "loaded", case.base))]
    assert names[0] == names[1]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, streamed.state_dict()[name]), name


def stored_tensors(path: Path) -> dict[str, Any]:
    return tensor_files.tensors(path.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_rounded_once(tmp_path: Path, family: str) -> None:
    """Adapted weights match PEFT's merge in float32, rounded to bfloat16; all others match the base."""
    case = make(tmp_path, family, DEFAULT_SETTINGS.get(family, {}))
    plan, made, merged = written(case, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    original = {name: value.clone() for name, value in base.state_dict().items()}
    reference = PeftModel.from_pretrained(base, case.adapter).merge_and_unload().state_dict()
    changed = {kept.name for kept in made.kept}
    for name, value in merged.state_dict().items():
        assert torch.equal(value, value.bfloat16().float())
        if name in changed:
            assert ((value - reference[name]).abs() <= reference[name].abs() * 2**-8 + 1e-30).all(), name
        else:
            assert torch.equal(value, original[name]), name
    assert {name for name in reference if not torch.equal(reference[name], original[name])} == changed
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == made.files > 1
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert names.keys() == json.loads((case.base / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert plan.fingerprint() == fingerprints.fingerprint(load.load_base(case.info.base))


def test_tied_embeddings_stay_tied_or_are_stored_apart(tmp_path: Path) -> None:
    for number, (settings, untied) in enumerate(
        [({"trainable_token_indices": [3]}, False), ({"modules_to_save": ["lm_head"]}, True), ({}, False)]
    ):
        folder = tmp_path / str(number)
        _, made, merged = written(make(folder, "llama, tied", settings), folder / "out")
        assert made.untied == untied
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) != untied
        assert merged.config.tie_word_embeddings != untied


def test_kept_share_shows_updates_lost_to_rounding(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", {}, size=1e-5)
    _, made, _ = written(case, tmp_path / "rounded")
    _, exact, _ = written(case, tmp_path / "exact", torch.float32)
    assert max(kept.share for kept in made.kept) < 0.9
    assert min(kept.share for kept in exact.kept) > 0.999


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_base_is_dequantized_before_merging(
    tmp_path: Path, tiny: Case, quantization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor by tensor, so that the merged model is never in memory as a whole beside the base."""
    info = tiny.info
    free = 6 * sum(weight.numel() for weight in load.load_base(info.base).parameters())
    monkeypatch.setattr(memory, "available", lambda device: free)  # a byte for each value of the base, 4 of the merged
    section = info.base.model_copy(update={"quantization": quantization, "dtype": "float32"})
    base = load.load_base(section)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(tiny.adapter / "adapter_model.safetensors").items():
        path, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        factors.setdefault(path, {})[factor] = tensor
    plan, _, merged = written(tiny, tmp_path / "out", torch.float32, quantization=quantization, dtype="float32")
    assert plan.is_loaded
    assert "dequantized" in plan.note and quantization in plan.note
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, layer in base.named_modules():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            continue
        if quantization == "4bit":
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            weight = layer.weight.data.float() * (layer.weight.SCB / 127)[:, None]
        if adapter := factors.get(name.replace(".base_layer", "")):
            weight = weight + 4 * adapter["B"] @ adapter["A"]
        assert torch.allclose(merged.get_submodule(name).weight, weight.float(), rtol=0, atol=1e-7), name
    if quantization == "4bit":  # in 8 bits, activations are rounded too
        adapted = PeftModel.from_pretrained(base, tiny.adapter).eval()
        assert (merged(IDS).logits - adapted(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_merged_model_is_compared_with_the_base_as_it_was_quantized(
    tmp_path: Path, quantization: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """From weights in the dtype of training, although files and comparison are in float32."""
    case = make(tmp_path, "llama", {"target_modules": ["q_proj"]})
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(1 + 0.003 * torch.randn_like(weight))
    shutil.rmtree(case.base)
    base.save_pretrained(case.base)
    tokenizer.save_pretrained(case.base)
    info = case.info
    section = info.base.model_copy(update={"quantization": quantization, "dtype": "bfloat16"})
    info = replace(info, base=section)
    merge = Merge(info)
    (tmp_path / "out").mkdir()
    written = merge.write(tmp_path / "out")
    merged_model.write_configs(tmp_path / "out", info, merge, (256,))
    texts = Texts("a test", ((1, 2, 3, 5, 8, 13, 21),), complete=True)
    found = merged_model.compare(info, tmp_path / "out", texts, "float32")
    assert written.dtypes == ("float32",) and found["dtype"] == "float32"
    assert found["adapter"]["divergence"] < 0.01 * found["base"]["divergence"], found


def test_gguf_base_is_dequantized_before_merging(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    llama = tiny_llama(vocab_size=len(tokenizer))
    (tmp_path / "base").mkdir()
    write_gguf(tmp_path / "base" / "tiny.gguf", llama, tokenizer)
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(llama, settings).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    changes: dict[str, Any] = {"gguf_file": "tiny.gguf", "dtype": "float32"}
    plan, _, merged = written(Case(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out", **changes)
    assert plan.is_loaded and "dequantized" in plan.note
    assert (merged(IDS).logits - adapted(IDS).logits).abs().max() < 1e-5


def test_base_in_pickle_format_is_merged(tmp_path: Path) -> None:
    case = make(tmp_path, "llama, tied", {"target_modules": ["q_proj", "embed_tokens"]})
    model = AutoModelForCausalLM.from_pretrained(case.base)
    torch.save(model.state_dict(), case.base / "pytorch_model.bin")
    for path in case.base.glob("model*"):
        path.unlink()
    adapter = case.logits()[1]
    plan, _, merged = written(case, tmp_path / "out", torch.float32)
    assert plan.is_loaded
    assert (merged(IDS).logits - adapter).abs().max() < 1e-5
    model.model.embed_tokens.weight.data *= 2  # now the base differs from the copy in the adapter
    torch.save(model.state_dict(), case.base / "pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"embed_tokens\.base_layer\.weight"):
        Merge(case.info)


def test_unsupported_adapters_cannot_be_merged(tmp_path: Path, tiny: Case) -> None:
    files = inspect(tiny.adapter)
    info = replace(tiny.info, files=replace(files, config=files.config | {"layer_replication": [[0, 2], [1, 2]]}))
    with pytest.raises(AdapterError, match="layer_replication") as refused:
        Merge(info)
    assert meanings(refused.value) == [(Code.ADAPTER_UNSUPPORTED, str(tiny.adapter), "")]


def test_merge_that_overflows_the_dtype_is_refused(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", {}, size=1000.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError) as refused:
        Merge(case.info, torch.float16).write(tmp_path / "out")
    assert meanings(refused.value) == [(Code.EXPORT_DIFFERS, str(case.adapter), "")]


def test_merge_reports_a_comparison_with_base_and_adapter(tmp_path: Path, tiny: Case, cli: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 and 1 make", "completion": " 2"}])
    ran = cli("merge", "--adapter", tiny.adapter, "--output", out, "--data", rows, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    found = result["comparison"]
    assert found["adapter"]["divergence"] < 1e-6 < found["base"]["divergence"]
    assert found["texts"] == 1 and result["dtypes"] == ["bfloat16"] and result["compared_on"] == "1 row of rows.jsonl"
    assert 0.9 < result["kept"]["least"] <= result["kept"]["median"]
    record = json.loads((out / "loratune.json").read_text())
    assert record["kind"] == "merged model" and record["merge"]["comparison"] == found
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= record["files"].keys()
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [256, 260]  # <|end|>


class Fails:
    """A fake comparison, as the real one takes seconds."""

    def __init__(self, divergences: tuple[float, float]):
        self.divergences = divergences

    def __call__(self, *_: Any) -> dict[str, Any]:
        figures = {"largest": 1.0, "top1": 0.5, "positions": 9}
        to_adapter, to_base = (figures | {"divergence": value} for value in self.divergences)
        return {"adapter": to_adapter, "base": to_base, "dtype": "float32", "texts": 1}


def test_merged_model_nearer_to_the_base_is_not_written(
    tmp_path: Path, tiny: Case, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "compare", Fails((0.2, 0.1)))
    ran = cli("merge", "--adapter", tiny.adapter, "--output", tmp_path / "out")
    check_refused(ran, 5, (Code.EXPORT_DIFFERS, str(tiny.adapter), ""))
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_only_merged_models(
    tmp_path: Path, tiny: Case, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "compare", Fails((0.1, 0.2)))
    out, arguments = tmp_path / "out", ("merge", "--adapter", tiny.adapter, "--output")
    assert cli(*arguments, out).code == 0
    first = tree(out)
    check_refused(cli(*arguments, out), 2, (Code.OUTPUT_EXISTS, str(out), "--output"))
    assert tree(out) == first
    assert cli(*arguments, out, "--overwrite", "--dtype", "float32").code == 0
    assert tree(out)["model.safetensors"] != first["model.safetensors"]
    (out / "notes.txt").write_text("mine")
    ran = cli(*arguments, out, "--overwrite")
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(out), "--output"))
    before = tree(tiny.base), tree(tiny.adapter)
    for path in (tiny.base, tiny.adapter, tiny.base / "x", tiny.adapter / "x"):
        ran = cli(*arguments, path, "--overwrite")
        check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(path), "--output"))
    assert (tree(tiny.base), tree(tiny.adapter)) == before


def test_adapter_files_do_not_replace_model_files(
    tmp_path: Path, tiny: Case, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "compare", Fails((0.1, 0.2)))
    clean, strange = tmp_path / "clean", tmp_path / "strange"
    assert cli("merge", "--adapter", tiny.adapter, "--output", clean).code == 0
    adapter = Path(shutil.copytree(tiny.adapter, tmp_path / "adapter"))
    for path in (*tiny.base.glob("tokenizer*"), *tiny.base.glob("*.jinja")):
        shutil.copy(path, adapter)
    for name in ("config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py"):
        (adapter / name).write_text("{}")
    config = json.loads((tiny.base / "config.json").read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}
    }
    (adapter / "config.json").write_text(json.dumps(config))
    assert cli("merge", "--adapter", adapter, "--output", strange).code == 0
    own = {"loratune.json", "README.md", "tokenizer_config.json", "chat_template.jinja"}
    assert {n: c for n, c in tree(strange).items() if n not in own} == {
        n: c for n, c in tree(clean).items() if n not in own
    }


@pytest.mark.parametrize("content", ["[1]", "{bad", "[" * 100_000])
def test_damaged_base_file_is_named(
    tmp_path: Path, tiny: Case, tokenizer: PreTrainedTokenizerFast, cli: Callable[..., Ran], content: str
) -> None:
    case = make(tmp_path, "llama", {})
    tokenizer.save_pretrained(case.base)
    (case.base / "generation_config.json").write_text(content)
    ran = cli("merge", "--adapter", case.adapter, "--output", tmp_path / "out")
    check_refused(ran, 3, (Code.MODEL_UNREADABLE, str(case.base / "generation_config.json"), ""))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.export").exists()


def test_base_that_changes_during_the_merge_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base files are replaced before the comparison, which alone would not detect it."""
    case = make(tmp_path, "llama", {}, shard="1GB")
    tokenizer.save_pretrained(case.base)
    file = case.base / "model.safetensors"

    def replace_base(*arguments: Any) -> dict[str, Any]:
        (tmp_path / "new").write_bytes(file.read_bytes()[::-1])
        (tmp_path / "new").rename(file)
        return Fails((0.1, 0.2))(*arguments)

    monkeypatch.setattr(merged_model, "compare", replace_base)
    ran = cli("merge", "--adapter", case.adapter, "--output", tmp_path / "out")
    check_refused(ran, 3, (Code.MODEL_CHANGED, str(file), ""))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.export").exists()


def test_different_base_is_refused_unless_forced(
    tmp_path: Path, tiny: Case, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "compare", Fails((0.1, 0.2)))
    case = make(tmp_path, "llama", {})
    adapter = case.adapter
    record = {
        "fingerprints": {"base": f"{fingerprints.VERSION}0"},
        "base": {},
        "files": adapter_files.manifest(adapter),
    }
    (adapter / "loratune.json").write_text(json.dumps(record))
    case.base.joinpath("tokenizer.json").write_bytes((tiny.base / "tokenizer.json").read_bytes())
    case.base.joinpath("tokenizer_config.json").write_bytes((tiny.base / "tokenizer_config.json").read_bytes())
    arguments = ("merge", "--adapter", adapter, "--output", tmp_path / "out")
    check_refused(cli(*arguments), 5, (Code.ADAPTER_MISMATCH, str(adapter), ""))
    assert not (tmp_path / "out").exists()
    ran = cli(*arguments, "--force")
    assert ran.code == 0, ran.err
    assert Code.ADAPTER_MISMATCH in ran.err
    missing = tmp_path / "none"
    ran = cli("merge", "--adapter", missing, "--output", tmp_path / "other")
    check_refused(ran, 5, (Code.ADAPTER_NOT_FOUND, str(missing), ""))


def test_full_disk_leaves_no_files(
    tmp_path: Path, tiny: Case, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:

    def write(_: Any, path: Path, __: Any) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merging, "save_file", write)
    ran = cli("merge", "--adapter", tiny.adapter, "--output", tmp_path / "out")
    partial = str(tmp_path / "out.export")
    check_refused(ran, 8, (Code.SYSTEM_DISK_FULL, partial, ""))
    assert not list(tmp_path.iterdir())


def test_concurrent_merge_to_the_same_output_is_refused(tmp_path: Path, tiny: Case, cli: Callable[..., Ran]) -> None:
    directory = OutputDirectory.at(str(tmp_path / "out"), overwrite=False).check()
    with directory.locked():
        ran = cli("merge", "--adapter", tiny.adapter, "--output", tmp_path / "out")
    check_refused(ran, 9, (Code.SYSTEM_LOCKED, str(tmp_path / "out"), "--output"))


def test_tensors_are_verified_when_logits_do_not_fit_in_memory(
    tmp_path: Path, tiny: Case, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "dtype_that_fits", lambda *_: None)
    ran = cli("merge", "--adapter", tiny.adapter, "--output", tmp_path / "out", "--json")
    assert ran.code == 0 and json.loads(ran.out)["comparison"] == {"tensors": 29, "nearer": True}


def test_corrupted_output_is_detected(tmp_path: Path, tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:

    def write(part: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        save_file(part, path, metadata)
        flip(path)

    monkeypatch.setattr(merging, "save_file", write)
    with pytest.raises(AdapterError) as refused:
        Merge(tiny.info).write(tmp_path, most=20_000)
    assert meanings(refused.value) == [(Code.SYSTEM_CALL_FAILED, str(tmp_path), "")]


def test_comparison_detects_an_unmerged_base(tiny: Case) -> None:
    """A copy of the base in place of the merged model is closer to the base than to the adapter."""
    texts = Texts("a test", ((1, 2, 3, 5, 8),), complete=False)
    found = merged_model.compare(tiny.info, tiny.base, texts, "float32")
    assert found["base"]["divergence"] == 0 < found["adapter"]["divergence"]
    assert found["base"]["positions"] > 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_merge_can_be_rerun(
    tmp_path: Path, tiny: Case, processes: ForkServer, number: signal.Signals, code: int
) -> None:
    out, staging = tmp_path / "out", tmp_path / "out.export" / "adapter"
    arguments = ("merge", "--adapter", tiny.adapter, "--output", out)
    child = processes.start(*arguments)
    until(lambda: (staging / "tokenizer.json").exists(), child)
    child.send(number)
    with suppress(ProcessLookupError):
        assert child.wait() == code
    assert not out.exists()
    assert staging.exists() == (number == signal.SIGKILL)
    again = processes.start(*arguments)
    assert again.wait() == 0, again.said()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_adapter_lost_to_bfloat16_rounding_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cli: Callable[..., Ran]
) -> None:
    case = make(tmp_path, "llama", {}, size=1e-7)
    tokenizer.save_pretrained(case.base)
    ran = cli("merge", "--adapter", case.adapter, "--output", tmp_path / "out")
    check_refused(ran, 5, (Code.EXPORT_DIFFERS, str(case.adapter), ""))
    ran = cli("merge", "--adapter", case.adapter, "--output", tmp_path / "out", "--dtype", "float32")
    assert ran.code == 0, ran.err


def test_commands_that_end_as_another_begins_do_not_stop_it(tmp_path: Path) -> None:
    """The lock file is removed and made again, also between opening and locking it."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(100):
                with OutputDirectory.at(str(tmp_path / "out"), overwrite=False).locked(30):
                    pass
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failed == [] and not (tmp_path / "out.partial").exists()
