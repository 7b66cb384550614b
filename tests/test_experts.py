"""`lora.target_parameters`: LoRA of fused experts. Names in the config select the same parameters as in stock PEFT."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ATTENTION, Ran, check_refused, config_in, meanings, resolve, tiny_llama, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from running import stopped
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    set_seed,
)

from loratune import config, memory
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import LoraSection, ModelSection, TrainingSection
from loratune.errors import AdapterError, ConfigError, ModelError
from loratune.lora import attach, creation, parameters
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, inspect
from loratune.lora.stats import adapter_stats
from loratune.lora.targets import Targets
from loratune.memory.activations import AllocationTracker
from loratune.model import load

Cli = Callable[..., Ran]
SHAPE: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gpt_oss": GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **{name: value for name, value in SHAPE.items() if name != "head_dim"} | LATENT,
        num_experts_per_tok=2, moe_intermediate_size=16,
    ),
}  # fmt: skip
SIZES = {"mixtral": (48, 2), "qwen3_moe": (16, 2), "gpt_oss": (48, 2), "deepseek_v3": (16, 1)}
"""Hidden size of an expert, and the number of layers with experts."""
NAMES = ["experts.down_proj", "experts.gate_up_proj"]
ROWS = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(8)]


def build(family: str, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(FAMILIES[family]).float()


def adapted(model: nn.Module, targets: Targets, **settings: Any) -> PeftModel:
    """The model as stock PEFT adapts it, given the names."""
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **targets.peft() | settings))


# --- which parameters are selected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_role_selects_every_fused_expert_projection(family: str) -> None:
    targets = resolve(build(family, "meta"), [], target_parameters=["experts"])
    hidden, layers = SIZES[family]
    numbers = range(2 - layers, 2)
    expected = [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in numbers for name in ("gate_up_proj", "down_proj")
    ]
    assert targets.roles == {"experts": tuple(expected)}
    assert (targets.modules, targets.parameters) == ((), tuple(expected))
    assert targets.parameter_names == ("experts.down_proj", "experts.gate_up_proj")
    model = adapted(build(family, "meta"), targets)
    values = 4 * 4 * ((32 + 2 * hidden) + (hidden + 32)) * layers  # r, experts, inputs and outputs of both
    assert model.get_nb_trainable_parameters()[0] == values
    assert parameters.layers_of(model).keys() == {*expected}
    assert sum(map(parameters.count_of, parameters.layers_of(model).values())) == values


@pytest.mark.parametrize(
    ("wanted", "names", "count"),
    [
        ("experts", ("experts.down_proj", "experts.gate_up_proj"), 4),
        (["down_proj"], ("experts.down_proj",), 2),
        (["mlp.experts.down_proj", "experts.gate_up_proj"], ("experts.down_proj", "experts.gate_up_proj"), 4),
        (["model.layers.1.mlp.experts.down_proj"], ("1.mlp.experts.down_proj",), 1),
        (r".*layers\.1\..*experts\.\w+_proj", ("1.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"), 2),
        (["mlp.gate.weight"], ("gate.weight",), 2),
    ],
)
def test_names_match_as_in_peft(wanted: list[str] | str, names: tuple[str, ...], count: int) -> None:
    targets = resolve(build("qwen3_moe", "meta"), ["q"], target_parameters=wanted)
    assert targets.parameter_names == names and len(targets.parameters) == count
    model = adapted(build("qwen3_moe", "meta"), targets)
    assert parameters.layers_of(model).keys() == {*targets.paths}
    if isinstance(wanted, list):
        stock = get_peft_model(
            build("qwen3_moe", "meta"), LoraConfig(r=4, target_modules=["q_proj"], target_parameters=wanted)
        )
        assert parameters.layers_of(stock).keys() == {*targets.paths}


def test_layers_can_be_selected_although_peft_ignores_them_for_parameters() -> None:
    targets = resolve(build("mixtral", "meta"), ["q"], [1], target_parameters=["experts"])
    assert targets.parameter_names == ("1.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj")
    model = adapted(build("mixtral", "meta"), targets, layers_to_transform=[1])
    assert parameters.layers_of(model).keys() == {*targets.paths} and len(targets.paths) == 3


def test_rank_and_alpha_patterns_apply_to_experts() -> None:
    ranks = {"experts": 2, r".*layers\.0.*down_proj": 2, "q": 3}
    patterns = {"rank_pattern": ranks, "alpha_pattern": {"down_proj": 5}}
    section = LoraSection(r=4, target_parameters=["experts"], **ATTENTION, **patterns)
    model, targets = creation.adapt(build("gpt_oss", "meta"), section, seed=0)
    found = {path.rpartition(".")[2]: (layer.r["default"], layer.lora_alpha["default"])
             for path, layer in parameters.layers_of(model).items()}  # fmt: skip
    assert found == {"q_proj": (3, 16), "k_proj": (4, 16), "v_proj": (4, 16), "o_proj": (4, 16),
                     "gate_up_proj": (2, 16), "down_proj": (2, 5)}  # fmt: skip
    assert targets.rank_pattern == {"down_proj": 2, "gate_up_proj": 2, "q_proj": 3}


@pytest.mark.parametrize(
    ("family", "wanted", "code", "text"),
    [
        ("mixtral", ["experts.dwn_proj"], Code.LORA_UNKNOWN_TARGET, "nearest: experts.down_proj"),
        (
            "mixtral",
            ["nothing"],
            Code.LORA_UNKNOWN_TARGET,
            "those that can be: mlp.gate, experts.gate_up_proj, experts.down_proj",
        ),
        ("mixtral", "down_proj", Code.LORA_UNKNOWN_TARGET, "write a list to name parameters, [down_proj]"),
        ("mixtral", ["q_proj.weight"], Code.LORA_UNSUPPORTED, "a layer that lora.target_modules adapts"),
        ("mixtral", ["embed_tokens.weight"], Code.LORA_UNSUPPORTED, "a layer that lora.target_modules adapts"),
        ("mixtral", ["norm.weight"], Code.LORA_UNSUPPORTED, "it has 1 dimensions"),
        ("gpt_oss", r".*experts\..*", Code.LORA_UNSUPPORTED, ""),
        ("llama", ["experts"], Code.LORA_UNKNOWN_TARGET, "llama has no tensors that hold the experts of a layer"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_refused(
    family: str, wanted: list[str] | str, code: Code, text: str
) -> None:
    if text == "":  # biases of experts have two dimensions, so they can be adapted: the whole module is meant
        assert len(resolve(build(family, "meta"), [], target_parameters=wanted).parameters) == 8
        return
    with pytest.raises(ModelError) as caught:
        resolve(build(family, "meta") if family in FAMILIES else tiny_llama(), ["q"], target_parameters=wanted)
    assert meanings(caught.value) == [(code, "", "lora.target_parameters")]
    assert text in str(caught.value) and caught.value.problems[0].fix


def test_contradictory_pattern_entries_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        resolve(
            build("mixtral", "meta"), [], target_parameters=["experts"], rank_pattern={"experts": 2, "down_proj": 3}
        )
    assert [problem.code for problem in caught.value.problems] == [Code.LORA_UNSUPPORTED]


def test_all_linear_explains_how_to_adapt_experts() -> None:
    notes = resolve(build("mixtral", "meta"), "all-linear").notes
    assert notes[-1] == (
        "all-linear leaves out experts.gate_up_proj, experts.down_proj: no linear layers, but experts in one tensor; "
        "lora.target_parameters: [experts] adapts them"
    )
    assert not [note for note in resolve(build("mixtral", "meta"), "all-linear", target_parameters="experts").notes
                if "experts.gate_up_proj" in note]  # fmt: skip


def test_a_whole_module_that_contains_a_target_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        resolve(build("mixtral", "meta"), ["q"], target_parameters=["experts"], modules_to_save=["experts"])
    assert [problem.code for problem in caught.value.problems] == [Code.LORA_UNSUPPORTED]


# --- what PEFT cannot do

SETTINGS = {
    "lora_dropout": 0.1, "use_dora": True, "use_lorafa": True, "init_lora_weights": "pissa",
}  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_incompatible_with_parameters_are_refused_in_the_config(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.for_model("base", ["lora.target_parameters=[experts]", f"lora.{key}={json.dumps(SETTINGS[key])}"])
    [problem] = caught.value.problems
    keys = f"lora.{key} and lora.target_parameters"
    assert (problem.code, problem.key, problem.fix) == (Code.CONFIG_CONFLICT, keys, "choose one of the two")


def test_an_empty_list_of_targets_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        config.for_model("base", ["lora.target_modules=[]"])
    [problem] = caught.value.problems
    assert (problem.code, problem.key) == (Code.CONFIG_BAD_VALUE, "lora.target_modules")


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.1}, {"use_dora": True}]
    + [{"init_lora_weights": name} for name in ("pissa", "olora", "orthogonal")],
    ids=str,
)  # fmt: skip
def test_stock_peft_refuses_the_same_settings(settings: dict[str, Any]) -> None:
    """Of the settings refused here, PEFT accepts LoRA-FA and EVA, with wrong results: see below."""
    with pytest.raises((ValueError, AttributeError)):
        get_peft_model(build("mixtral"), LoraConfig(r=4, target_modules=[], target_parameters=NAMES, **settings))


def test_lora_fa_would_be_wrong_for_experts() -> None:
    """Its corrected gradient of B is grad_B (A A^T)^-1, which needs the ranks of A and B in the same order; here they
    differ."""
    model = adapted(build("mixtral"), resolve(build("mixtral", "meta"), [], target_parameters=["down_proj"]))
    layer = parameters.layers_of(model)["model.layers.0.mlp.experts.down_proj"]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up)
    with torch.no_grad():
        down[1] = 0  # the second rank of the first expert
        up[:, 4] = 0  # the second rank of the first expert, in the order in which PEFT reads B
    of_first = layer.scaling["default"] * sum(torch.outer(up[:, 4 * rank], down[rank]) for rank in (0, 2, 3))
    assert torch.allclose(layer.get_delta_weight("default")[0], of_first, atol=1e-6)


# --- training


@pytest.fixture(
    scope="module",
    params=["mixtral", "gpt_oss", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_moe", "deepseek_v3"))],
)
def base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    path = tmp_path_factory.mktemp("bases") / request.param
    build(request.param).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run_config(folder: Path, base: Path, **sections: Any) -> Path:
    """Three steps with all rows in each, so that their order does not matter."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "lora": {"r": 4, "target_parameters": ["experts"], "target_modules": ["o"]},
        "data": {"train": str(write_rows(folder / "eight.jsonl", ROWS)), "packing": "none"},
        "training": {"learning_rate": 1e-2, "max_steps": 3, "lr_scheduler_type": "constant", "logging_steps": 1},
    }
    merged = {name: value | sections.pop(name, {}) for name, value in values.items()}
    return config_in(folder, base)(**merged, **sections)


@pytest.fixture(scope="module")
def trained(base: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    ran = cli("train", run_config(folder, base), "--allow-worse")
    assert ran.code == 0, ran.err
    return folder / "out"


def batch(tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """The rows as a batch: text of prompt and completion, with the completion and the end token supervised."""
    ids = [(tokenizer(row["prompt"]).input_ids, [*tokenizer(row["completion"]).input_ids, 256]) for row in ROWS]
    longest = max(len(prompt) + len(answer) for prompt, answer in ids)
    filled = {"input_ids": [], "labels": [], "attention_mask": []}  # type: dict[str, list[list[int]]]
    for prompt, answer in ids:
        size = len(prompt) + len(answer)
        filled["input_ids"].append([*prompt, *answer, *[0] * (longest - size)])
        filled["labels"].append([*[-100] * len(prompt), *answer, *[-100] * (longest - size)])
        filled["attention_mask"].append([*[1] * size, *[0] * (longest - size)])
    return {name: torch.tensor(rows) for name, rows in filled.items()}


def stock_run(base: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[PeftModel, list[float]]:
    """The same three steps with stock PEFT and torch."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    set_seed(42)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["o_proj"], target_parameters=NAMES)
    adapted = get_peft_model(model, settings).train()
    rows, losses = batch(tokenizer), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        logits = adapted(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows["labels"][:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in adapted.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return adapted, losses


def test_three_steps_equal_those_of_stock_peft(
    base: Path, trained: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    stock, losses = stock_run(base, tokenizer)
    stock.save_pretrained(tmp_path, save_embedding_layers=False)
    mine, theirs = load_file(trained / WEIGHTS_FILE), load_file(tmp_path / WEIGHTS_FILE)
    assert mine.keys() == theirs.keys() and any("experts.base_layer.lora_A" in name for name in mine)
    for name, tensor in theirs.items():
        assert tensor.shape == mine[name].shape
        # A step of Adam has the size of the learning rate. The sign of a gradient that is only rounding error decides.
        moved = (mine[name] - tensor).abs()
        assert moved.quantile(0.99) < 1e-4, name
    curve = [point["loss"] for point in json.loads((trained / "loratune.json").read_text())["curve"] if "loss" in point]
    assert curve == pytest.approx(losses, abs=2e-5)
    written = json.loads((trained / CONFIG_FILE).read_text())
    assert written["target_parameters"] == NAMES


def test_stock_peft_loads_the_adapter_with_the_same_logits(base: Path, trained: Path) -> None:
    ids = torch.arange(20)[None]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(trained))
    mine = attach.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), inspect(trained))
    with torch.no_grad():
        assert torch.equal(stock.eval()(ids).logits, mine(ids).logits)
        with mine.disable_adapter():
            alone = mine(ids).logits
        assert torch.equal(alone, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(ids).logits)
        assert (alone - mine(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "base",
    ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3_moe", "deepseek_v3"))],
    indirect=True,
)
def test_the_commands_accept_the_adapter(cli: Cli, base: Path, trained: Path, tmp_path: Path) -> None:
    assert cli("generate", "--adapter", trained, "1 and 1 make", "--max-new-tokens", 4).code == 0
    evaluated = cli("evaluate", "--adapter", trained, "--data", write_rows(tmp_path / "rows.jsonl", ROWS), "--json")
    assert evaluated.code == 0, evaluated.err
    merged = cli("merge", "--adapter", trained, "--output", tmp_path / "merged", "--dtype", "float32")
    assert merged.code == 0, merged.err
    ids = torch.arange(20)[None]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(ids).logits
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        both = PeftModel.from_pretrained(model, str(trained)).eval()(ids).logits
    assert (whole - both).abs().max() < 1e-5


def test_the_card_names_no_server(trained: Path) -> None:
    """Which server reads the experts depends on the base; `export` says it."""
    card = (trained / "README.md").read_text()
    assert "vllm serve" not in card and "llama-server" not in card


@pytest.mark.parametrize(
    ("version", "width", "exchanged", "code"),
    [
        ("0.18.1", 48, True, Code.ADAPTER_UNSUPPORTED), ("0.18.1", 48, False, None),
        ("0.19.0", 16, False, Code.ADAPTER_UNSUPPORTED), ("0.19.1", 16, False, None),
        ("0.21.2", 48, True, Code.ADAPTER_MISMATCH), (None, 48, False, None),
    ],
)  # fmt: skip
def test_experts_of_early_releases_of_peft_are_not_read_the_wrong_way_round(
    version: str | None, width: int, exchanged: bool, code: Code | None, tmp_path: Path
) -> None:
    """Of square tensors, shapes do not tell."""
    made = MixtralConfig(**SHAPE | {"intermediate_size": width}, num_local_experts=4)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[], target_parameters=NAMES[1:])
    get_peft_model(AutoModelForCausalLM.from_config(made), lora).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    values |= {"peft_version": version, "base_model_name_or_path": "base"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    if exchanged:
        tensors, pair = load_file(tmp_path / WEIGHTS_FILE), {"A": "B", "B": "A"}
        swapped = {re.sub("lora_([AB])", lambda kind: f"lora_{pair[kind[1]]}", name): tensor.T.contiguous()
                   for name, tensor in tensors.items()}  # fmt: skip
        save_file(swapped, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(made)
    if code is None:
        attach.attach_saved(base, inspect(tmp_path))
        return
    with pytest.raises(AdapterError) as caught:
        attach.attach_saved(base, inspect(tmp_path))
    assert {problem.code for problem in caught.value.problems} == {code}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_experts_of_a_quantized_base_stay_unquantized_and_are_trained(
    quantization: str, cli: Cli, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = run_config(tmp_path, tmp_path / "base", model={"quantization": quantization})
    assert (ran := cli("train", run, "--allow-worse")).code == 0, ran.err
    model = load.load_base(config.load(run).model)
    stacked = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}
    assert stacked and all(parameter.dtype == torch.float32 for parameter in stacked.values())
    learned = attach.load(model, inspect(tmp_path / "out"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        outputs = learned(ids).logits
        with learned.disable_adapter():
            assert (learned(ids).logits - outputs).abs().max() > 1e-3


def test_several_adapters_on_one_base(base: Path, tmp_path: Path) -> None:
    """With the same parameters, or beside one without parameters. Other combinations are refused, as in PEFT."""
    kinds = {"plain": {}, "both": {"target_parameters": NAMES}, "small": {"target_parameters": NAMES, "r": 2},
             "one": {"target_parameters": NAMES[:1]}}  # fmt: skip
    for number, (name, settings) in enumerate(kinds.items()):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        made = get_peft_model(
            model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["o_proj"]} | settings)
        )
        torch.manual_seed(number)
        for path, parameter in made.named_parameters():
            if "lora_B" in path:
                nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(tmp_path / name)
    section, ids = ModelSection(name_or_path=str(base), dtype="float32"), torch.arange(20)[None]
    names = ["plain", "both", "small"]
    opened = [AdapterDirectory.open(tmp_path / name) for name in names]
    for name, loaded in zip(names, loading.load_all(opened, base=section), strict=True):
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded.model.set_adapter(loaded.key)
        with torch.no_grad():
            expected = PeftModel.from_pretrained(stock, str(tmp_path / name)).eval()(ids).logits
            assert torch.equal(loaded.model(ids).logits, expected)
    with pytest.raises(AdapterError) as caught:
        loading.load_all([AdapterDirectory.open(tmp_path / name) for name in ("both", "one")], base=section)
    assert [problem.code for problem in caught.value.problems] == [Code.ADAPTER_UNSUPPORTED]


@pytest.mark.parametrize("base", ["mixtral"], indirect=True)
def test_an_interrupted_run_resumes_to_the_same_bytes(cli: Cli, base: Path, tmp_path: Path) -> None:
    run = run_config(tmp_path, base, training={"per_device_train_batch_size": 2, "max_steps": 8, "save_steps": 1})
    assert stopped(cli, tmp_path / "out.partial", "train", run, "--allow-worse").code == 130
    for arguments in (("--resume",), ("--set", f"output_dir={tmp_path / 'straight'}")):
        ran = cli("train", run, "--allow-worse", *arguments)
        assert ran.code == 0, ran.err
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (tmp_path / "straight" / WEIGHTS_FILE).read_bytes()


def test_statistics_are_computed_for_each_expert(base: Path, trained: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(trained))
    layers = parameters.layers_of(model)
    stats = adapter_stats(inspect(trained))
    assert {update.module for update in stats.updates} == layers.keys()
    for update in stats.updates:
        layer = layers[update.module]
        full = layer.get_delta_weight("default").detach().double()
        assert update.norm == pytest.approx(full.norm().item(), rel=1e-5)
        assert update.shape == (layer.in_features, layer.out_features)
        assert (update.rank, update.scaling, update.experts) == (4, 4.0, getattr(layer, "num_experts", 1))
        singular = torch.linalg.svdvals(full)[..., :4]
        shares = singular / singular.sum(-1, keepdim=True)
        ranks = torch.special.entr(shares).sum(-1).exp()
        assert update.effective_rank == pytest.approx(ranks[ranks.isfinite()].mean().item(), rel=1e-4)
    assert stats.parameters == sum(update.parameters for update in stats.updates)


def test_params_counts_the_trained_parameters(cli: Cli, base: Path, trained: Path) -> None:
    counted = json.loads(cli("params", trained.parent / "run.yaml", "--json").out)
    tensors = load_file(trained / WEIGHTS_FILE)
    assert counted["trainable"] == sum(tensor.numel() for tensor in tensors.values())
    assert counted["adapter_bytes"] == (trained / WEIGHTS_FILE).stat().st_size
    assert counted["roles"]["experts"] == sum(t.numel() for name, t in tensors.items() if "experts" in name)
    assert counted["targets"]["experts"] == [
        "model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj",
    ]  # fmt: skip
    assert counted["others"] == {}
    assert " in 4 experts" in cli("params", trained.parent / "run.yaml").out


def test_continuing_starts_with_the_function_of_the_adapter(
    cli: Cli, base: Path, trained: Path, tmp_path: Path
) -> None:
    """With a higher rank: the rows of A are ordered by expert, and the columns of B by rank."""
    section = {"r": 6, "lora_alpha": 16, "start_from": str(trained)}
    model, _ = creation.adapt(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        lora := LoraSection(**section, target_modules=["o"], target_parameters=["experts"]), seed=0,
    )  # fmt: skip
    creation.initialize_adapter(model, lora, start_from=inspect(trained))
    before = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(trained))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, before.eval()(ids).logits, atol=1e-5)
    run = run_config(tmp_path, base, lora=section | {"target_parameters": ["down_proj"]})
    check_refused(cli("train", run), 2, (Code.LORA_START, str(trained), "lora.start_from"))


# --- memory


@pytest.mark.parametrize(
    ("checkpointed", "wanted", "dtype"),
    [
        (False, ["experts"], torch.float32),
        (True, ["down_proj"], torch.bfloat16),
        pytest.param(False, ["down_proj"], torch.float32, marks=pytest.mark.slow),
        pytest.param(False, ["experts"], torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(False, ["down_proj"], torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(True, ["experts"], torch.float32, marks=pytest.mark.slow),
        pytest.param(True, ["down_proj"], torch.float32, marks=pytest.mark.slow),
        pytest.param(True, ["experts"], torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_recomputed_expert_weights_is_estimated(
    checkpointed: bool, wanted: list[str], dtype: torch.dtype
) -> None:
    """The difference from a run without them, both in allocated tensors and by the formula."""
    large = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    section = TrainingSection(activation_checkpointing=checkpointed)
    measured, estimated = [], []
    for parameters_wanted in (None, wanted):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE | large, num_local_experts=4)).to(dtype)
        lora = LoraSection(target_modules=["o_proj"], target_parameters=parameters_wanted)
        made, _ = creation.adapt(model, lora, seed=0)
        found = memory.estimate(made, [(32, 31)], 1, section)
        estimated.append(found.activations + found.logits + found.gradients)
        if checkpointed:
            made.activation_checkpointing_enable({"use_reentrant": False})
        tracker = AllocationTracker(made.train(), limited=False)
        with tracker:
            made(input_ids=torch.arange(32)[None], use_cache=False).logits.float().square().mean().backward()
        measured.append(tracker.peak)
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.25)


# --- adapters of other tools


def stranger(path: Path, family: str, **settings: Any) -> dict[str, Any]:
    """An adapter of stock PEFT, without a record. Returns its configuration."""
    made = get_peft_model(build(family), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[], **settings))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    made.peft_config["default"].base_model_name_or_path = "/gone"
    made.save_pretrained(path, save_embedding_layers=False)
    written: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text())
    return written


def test_an_adapter_with_only_parameters_is_opened(tmp_path: Path) -> None:
    """Without a record, a parameter is known by name only if there is a single one."""
    stranger(tmp_path / "both", "mixtral", target_parameters=NAMES)
    paths = [update.module for update in adapter_stats(inspect(tmp_path / "both")).updates]
    assert paths[:2] == ["model.layers.0.mlp.experts", "model.layers.0.mlp.experts.base_layer"]
    stranger(tmp_path / "one", "mixtral", target_parameters=NAMES[:1])
    paths = [update.module for update in adapter_stats(inspect(tmp_path / "one")).updates]
    assert paths == ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"]


def test_ambiguous_ranks_are_refused(tmp_path: Path) -> None:
    settings = {"target_parameters": NAMES, "rank_pattern": {"gate_up_proj": 2}}
    stranger(tmp_path, "mixtral", **settings)
    with pytest.raises(AdapterError) as caught:
        adapter_stats(inspect(tmp_path))
    assert [problem.code for problem in caught.value.problems] == [Code.ADAPTER_UNSUPPORTED]
    model = attach.attach_saved(build("mixtral", "meta"), inspect(tmp_path))  # PEFT itself has the base to look at
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in parameters.layers_of(model).items()}
    assert ranks == {"gate_up_proj": 2, "down_proj": 4}


def test_an_expert_without_tokens_has_no_update(tmp_path: Path) -> None:
    stranger(tmp_path, "mixtral", target_parameters=NAMES[:1])
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    tensors[name].view(32, 4, 4)[:, :, 1] = 0  # (outputs, ranks, experts)
    save_file(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    first, second = adapter_stats(inspect(tmp_path)).updates
    assert (first.experts, first.unchanged, second.unchanged) == (4, 1, 0)
    assert 1 < first.effective_rank <= 4


@pytest.mark.parametrize("value", ["experts", ["x"] * 1001, [1], {"a": 1}], ids=["text", "many", "number", "mapping"])
def test_an_invalid_list_of_parameters_is_refused(value: Any, tmp_path: Path) -> None:
    written = stranger(tmp_path, "mixtral", target_parameters=NAMES)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(written | {"target_parameters": value}))
    with pytest.raises(AdapterError) as caught:
        inspect(tmp_path)
    assert [(one.code, one.key) for one in caught.value.problems] == [(Code.ADAPTER_INVALID, "target_parameters")]
