"""`loratune params`: exact counts from a configuration alone, for models of any size."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ATTENTION, Ran, check_refused, run_command
from running import Cli, MakeConfig
from transformers import FalconConfig, GPT2Config, LlamaConfig, Phi3Config

import loratune
from loratune import config
from loratune.codes import Code
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.training import params

ROLES = {
    "q": ["model.layers.*.self_attn.q_proj"],
    "k": ["model.layers.*.self_attn.k_proj"],
    "v": ["model.layers.*.self_attn.v_proj"],
    "o": ["model.layers.*.self_attn.o_proj"],
}
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 264,
}  # fmt: skip
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_2_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip

# Runs a command and reports its own peak memory; a direct child would start with the peak of pytest.
PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def config_only(path: Path, config: Any) -> Path:
    """A model directory with a configuration but no weights."""
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(path)
    return path


def counted(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    counts: dict[str, Any] = json.loads(ran.out)
    return counts


def test_counts_match_the_formula(cli: Cli, tiny_dir: Path) -> None:
    counts = counted(cli("params", "--model", tiny_dir, "--json"))
    trainable = 2 * 8 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))  # layers x r x (in + out) of q, k, v, o
    base = 2 * 264 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert list(counts)[:5] == ["trainable", "total", "percent", "adapter_bytes", "targets"]
    assert list(counts)[5:] == ["roles", "layers", "others", "memory", "rows_memory", "device"]
    assert counts["roles"] == {role: 2 * 8 * (32 + size) for role, size in {"q": 32, "k": 16, "v": 16, "o": 32}.items()}
    assert counts["layers"] == {"0": trainable // 2, "1": trainable // 2}
    assert counts["others"] == {}
    assert (counts["trainable"], counts["total"]) == (trainable, base + trainable)
    assert counts["percent"] == pytest.approx(100 * trainable / (base + trainable))
    assert counts["targets"] == ROLES


SIZED: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora", "rank_pattern": {"q": 4, "o": 12}},
    {"init_lora_weights": "eva"},
    {"use_lorafa": True},
    {"modules_to_save": ["lm_head", "norm"], "bias": "none"},
    {"trainable_token_indices": [5, 7, 9]},
    {"r": 3, "target_modules": ["q", "down_proj"]},
    {"use_dora": True, "target_modules": "all-linear"},
    {"layers_to_transform": [1]},
    {"r": 64, "use_rslora": True, "target_modules": [r"v_proj"]},
]
OTHERWISE = {"float32": (0, 1, 3, 4, 6, 7, 9, 10), "bfloat16": (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)}
"""The indices of cases that only `make test-all` runs for a dtype. Similar cases are always run."""


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        pytest.param(dtype, lora, marks=pytest.mark.slow if place in OTHERWISE[dtype] else ())
        for dtype in OTHERWISE
        for place, lora in enumerate(SIZED)
    ],
)
def test_adapter_file_size_is_predicted_exactly(
    lora: dict[str, Any], dtype: str, cli: Cli, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path
) -> None:
    path = run_config(lora=lora, model={"name_or_path": str(tiny_dir), "dtype": dtype}, training={"max_steps": 1})
    estimated = counted(cli("params", path, "--json"))
    ran = cli("train", path, "--allow-worse")
    assert ran.code == 0, ran.err
    assert estimated["adapter_bytes"] == (tmp_path / "out" / WEIGHTS_FILE).stat().st_size
    assert sum(estimated["roles"].values()) == sum(estimated["layers"].values())
    assert sum(estimated["roles"].values()) + sum(estimated["others"].values()) == estimated["trainable"]


def test_model_option_counts_the_default_lora_config(cli: Cli, run_config: MakeConfig, tiny_dir: Path) -> None:
    retention = {"kl_weight": "auto"}
    config = run_config(model={"name_or_path": str(tiny_dir), "dtype": "auto"}, lora=ATTENTION, retention=retention)
    counts = counted(cli("params", config, "--json"))
    assert counted(cli("params", "--model", tiny_dir, "--json")) == counts | {"rows_memory": None}


@pytest.mark.usefixtures("untraced")
def test_output_starts_with_the_trainable_params_line_of_peft(cli: Cli, tmp_path: Path) -> None:
    directory = config_only(tmp_path, LlamaConfig(vocab_size=32000, **LLAMA_2_7B))
    ran = cli("params", "--model", directory)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "trainable params: 8,388,608 || all params: 6,746,804,224 || trainable%: 0.1243"
    assert lines[2].split() == ["q", *ROLES["q"], "32", "4,096", "→", "4,096", "8", "2,097,152"]
    assert lines[6] == "per layer: 262,144 in each of layers 0-31"
    assert lines[7].startswith("adapter file: 33.6 MB")
    assert re.match(r"device: .*(bfloat16|float32)$", lines[8])
    assert lines[9].startswith("memory to train, 8 rows of 1,024 tokens: about ")


@pytest.mark.parametrize(
    ("config", "role", "line"),
    [
        (Phi3Config, ["q"], "  q, k, v: model.layers.*.self_attn.qkv_proj, fused"),
        (FalconConfig, ["v"], "  q, k, v: transformer.h.*.self_attention.query_key_value, fused"),
    ],
)
def test_fused_modules_are_reported(
    config: Any, role: list[str], line: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    directory = config_only(tmp_path / "fused", config(**shape, vocab_size=264, pad_token_id=0, multi_query=False))
    path = run_config(model={"name_or_path": str(directory)}, lora={"target_modules": role})
    ran = cli("params", path)
    assert ran.code == 0, ran.err
    assert line in ran.out.splitlines()
    assert counted(cli("params", path, "--json"))["trainable"] == 2 * 8 * (32 + 96)


def test_fused_modules_are_counted_once(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    directory = config_only(tmp_path, Phi3Config(**shape, vocab_size=264, pad_token_id=0))
    counts = params.params(config.for_model(str(directory), []))
    assert [(group.role, group.modules, group.shape) for group in counts.groups] == [
        ("q, k, v", 3, (32, 96)),
        ("o", 3, (32, 32)),
    ]
    assert sum(group.trainable for group in counts.groups) == counts.count.trainable


def test_whole_modules_are_counted_with_their_biases(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    directory = tmp_path / "gpt2"
    GPT2Config(**shape, vocab_size=264, architectures=["GPT2LMHeadModel"]).save_pretrained(directory)
    whole = {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    counts = counted(cli("params", run_config(model={"name_or_path": str(directory)}, lora=whole), "--json"))
    assert counts["others"] == {"transformer.ln_f, whole": 2 * 32}
    assert sum(counts["roles"].values()) + 2 * 32 == counts["trainable"]


@pytest.mark.slow
def test_counting_70b_needs_less_than_a_gigabyte(tmp_path: Path) -> None:
    directory = config_only(tmp_path, LlamaConfig(vocab_size=32000, **LLAMA_2_70B))
    command = [sys.executable, "-c", PEAK, sys.executable, "-m", "loratune", "params", "--model", directory, "--json"]
    done = run_command(command, capture_output=True, text=True, check=False)
    counts = counted(Ran(done.returncode, done.stdout, done.stderr))
    trainable = 80 * 8 * 2 * ((8192 + 8192) + (8192 + 1024))
    assert (counts["trainable"], counts["total"]) == (trainable, 68_976_648_192 + trainable)
    kilobytes = int(done.stderr.splitlines()[-1])
    assert kilobytes < 1 << 20


CONFIG, MODEL = Code.MODEL_UNREADABLE, Code.MODEL_UNREADABLE
ODD = {
    "labels that are text": ({"id2label": "x"}, CONFIG, ""),
    "a tie that is text": ({"tie_word_embeddings": "yes"}, CONFIG, "Field 'tie_word_embeddings' expected bool"),
    "more kinds than layers": (
        {"model_type": "qwen2", "layer_types": ["full_attention"] * 5},
        CONFIG,
        "must be equal to the n",
    ),
    "no configuration": ({"model_type": "gemma3", "text_config": 5}, CONFIG, "Field 'text_config' with value 5"),
    "empty heads": ({"head_dim": 0}, MODEL, ""),
    "negative heads": ({"head_dim": -8}, MODEL, "Trying to create tensor with negative dimension"),
    "negative states": ({"hidden_size": -32}, MODEL, "Trying to create tensor with negative"),
    "no heads": ({"num_attention_heads": 0}, CONFIG, ""),
    "an unknown rope": ({"rope_scaling": {"type": "x"}}, MODEL, "unknown: 'x'"),
    "no layers": (
        {"num_hidden_layers": 0},
        None,
        "lora.target_modules: llama has no attention in which roles (q, k, v, o) could be found; ",
    ),
}


WORDS: dict[str, Any] = {
    "architectures": [5, True, 1.5, 0, "LlamaForCausalLM", {"a": 1}, [5], [None], [["x"]]],
    "text_config.architectures": [[["x"]], 5],
    "num_hidden_layers": [10**9, 1e9],
    "text_config.num_hidden_layers": [10**9],
    "num_labels": [10**9],
}
"""Keys of config.json, and values by which no model can be built, or none in a lifetime."""


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WORDS.items() for value in values])
def test_names_and_counts_that_are_none_are_refused(
    key: str, value: Any, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """Before transformers makes lists as long as the numbers say."""
    path = config_only(tmp_path / "odd", LlamaConfig(**SMALL))
    part, _, last = key.rpartition(".")
    values = json.loads((path / "config.json").read_text())
    values |= {part: {"model_type": "llama", last: value}} if part else {"model_type": "qwen2", key: value}
    (path / "config.json").write_text(json.dumps(values))
    for command in (("params", "--model", path), ("train", run_config(model={"name_or_path": str(path)}))):
        check_refused(cli(*command), 3, (Code.MODEL_UNREADABLE, str(path / "config.json"), key))


@pytest.mark.parametrize(("changes", "code", "text"), ODD.values(), ids=ODD)
def test_invalid_configurations_are_model_errors(
    changes: dict[str, Any], code: Code | None, text: str, tmp_path: Path, cli: Cli
) -> None:
    """Each one fails quickly."""
    path = config_only(tmp_path / "odd", LlamaConfig(**SMALL))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))
    ran = cli("params", "--model", path)
    assert ran.code == 3 and text in ran.err and ran.err.startswith("error"), ran.err
    if code is not None:
        check_refused(ran, 3, (code, str(path), ""))


def test_huge_vocabulary_is_counted(tmp_path: Path) -> None:
    directory = config_only(tmp_path, LlamaConfig(**SMALL | {"vocab_size": 10**12}))
    assert params.params(config.for_model(str(directory))).count.total > 2 * 32 * 10**12


def test_the_memory_for_the_rows_at_hand(cli: Cli, run_config: MakeConfig, tiny_dir: Path) -> None:
    """As a dry run estimates it from the weights; rows that cannot be read change nothing else."""
    path = run_config(training={"per_device_train_batch_size": 4})
    found = counted(cli("params", path, "--json"))
    planned = loratune.plan(config.load(path)).memory
    assert found["rows_memory"]["total"] == pytest.approx(planned.total, rel=0.1)
    assert found["rows_memory"]["activations"] < found["memory"]["activations"]
    assert "on the rows of data.train" in cli("params", path).out
    assert counted(cli("params", "--model", tiny_dir, "--json"))["rows_memory"] is None
    (path.parent / "rows.jsonl").write_text("{")
    ran = cli("params", path, "--json")
    assert counted(ran) == found | {"rows_memory": None} and "is not known" in ran.err


def test_settings_that_training_would_refuse_here_are_reported(cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("params", run_config(model={"use_liger_kernel": True}))
    assert ran.code == 0, ran.err
    assert ("train would stop here: model.use_liger_kernel" in ran.out + ran.err) != torch.accelerator.is_available()
