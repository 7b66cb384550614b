"""Quantized releases: FP8, MXFP4, NVFP4, AWQ, GPTQ and compressed-tensors. They are dequantized tensor by tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Ran, check_refused, meanings
from releases import FORMATS, configure, tiny, write
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)  # fmt: skip

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError
from loratune.lora.adapter_files import RECORD_FILE
from loratune.model import checks, fingerprints, load

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]
OTHERS = {
    "gpt-oss": ("mxfp4", "gpt-oss"),
    "fp8 experts": ("fp8", "deepseek"),
    "nvfp4 experts": ("modelopt nvfp4", "deepseek"),
}
OTHERS |= {model_type: ("fp8", model_type) for model_type in ("qwen3_5", "qwen3_5_moe", "gemma3", "mistral3")}
ALL = {form: (form, "llama") for form in FORMATS} | OTHERS
TRAINED = ["gptq"]


class Release(NamedTuple):
    """A quantized release, and the dense one that it stands for."""

    path: Path
    twin: Path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Release]:
    made: dict[str, Release] = {}

    def make(name: str) -> Release:
        if name not in made:
            path = tmp_path_factory.mktemp("release")
            made[name] = Release(path / "quantized", path / "dense")
            dense = write(made[name].path, tokenizer, *ALL[name])
            shutil.copytree(made[name].path, made[name].twin, ignore=shutil.ignore_patterns("*.safetensors"))
            configure(made[name].twin, quantization_config=None)
            save_file(dense, made[name].twin / "model.safetensors", {"format": "pt"})
        return made[name]

    return make


def base(path: Path, **settings: Any) -> PreTrainedModel:
    return load.load_base(ModelSection(name_or_path=str(path), **{"dtype": "float32"} | settings))


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert {tensor.dtype for tensor in found.values()} == {tensor.dtype for tensor in expected.values()}


@pytest.mark.parametrize("name", ALL)
def test_base_in_memory_is_the_dense_release(name: str, release: Callable[[str], Release]) -> None:
    """Every weight is, to the last bit, what another implementation decodes; also for blocks that are cut off."""
    path, twin = release(name)
    loaded, expected = base(path, dtype="bfloat16"), base(twin, dtype="bfloat16")
    assert_same(loaded, expected)
    assert fingerprints.fingerprint(loaded) == fingerprints.fingerprint(expected)
    assert "quantization_config" not in loaded.config.to_dict() and loaded.config.name_or_path == str(path)
    if name in ("fp8", "gptq"):
        assert_same(base(path), base(twin))


@pytest.mark.parametrize(
    ("name", "config"),
    [("gpt-oss", Mxfp4Config), ("mxfp8", FineGrainedFP8Config), ("fp8 of one scale", FineGrainedFP8Config)],
)
def test_base_in_memory_is_what_transformers_dequantizes(
    name: str, config: Any, release: Callable[[str], Release]
) -> None:
    path = release(name).path
    theirs = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config(dequantize=True), dtype=torch.bfloat16
    )
    assert_same(base(path, dtype="bfloat16"), theirs)


@pytest.mark.parametrize("name", [pytest.param(one, marks=[] if one in TRAINED else pytest.mark.slow) for one in ALL])
def test_release_trains_generates_and_merges(
    name: str, release: Callable[[str], Release], tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    path, twin = release(name)
    model = {"name_or_path": str(path), "dtype": "auto"}
    out, merged = tmp_path / "out", tmp_path / "merged"
    ran = cli("train", config := run_config(model=model, training={"max_steps": 2, "learning_rate": 1e-2}))
    assert ran.code == 0, ran.err
    method = json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
    assert f"the base is a quantized release ({method})" in ran.err
    assert json.loads((out / RECORD_FILE).read_text())["base"]["quantized"] == method
    assert f"quantized ({method})" in (out / "README.md").read_text()

    counted = json.loads(cli("params", config, "--json").out)  # as the dense release, in whose size it is in memory
    assert counted == json.loads(cli("params", config, "--set", f"model.name_or_path={twin}", "--json").out)
    ran = cli("generate", "--adapter", out, "--max-new-tokens", 3, "3 and 3 make")
    assert ran.code == 0, ran.err

    ran = cli("merge", "--adapter", out, "--output", merged, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert "not quantized again" in found["note"]
    adapted, plain = (found["comparison"][other]["divergence"] for other in ("adapter", "base"))
    assert adapted < 1e-3 and 10 * adapted < plain
    written = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in written and (written.get("dtype") or written["torch_dtype"]) in found["dtypes"]
    dense, tuned = load_file(twin / "model.safetensors"), load_file(merged / "model.safetensors")
    assert {key: (value.shape, value.dtype) for key, value in dense.items()} == {
        key: (value.shape, value.dtype) for key, value in tuned.items()
    }
    changed = [key for key in dense if not torch.equal(dense[key], tuned[key])]
    assert changed and all("self_attn" in key for key in changed)
    checks.auto_class(AutoConfig.from_pretrained(merged)).from_pretrained(merged)


def test_parts_of_a_weight_may_be_in_different_files(release: Callable[[str], Release], tmp_path: Path) -> None:
    shutil.copytree(release("gptq").path, path := tmp_path / "model")
    tensors, files = load_file(path / "model.safetensors"), ("model-00001-of-00002", "model-00002-of-00002")
    (path / "model.safetensors").unlink()
    places = {name: f"{files[name.endswith(('scales', 'g_idx'))]}.safetensors" for name in tensors}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(base(path), base(release("gptq").twin))


def test_release_is_quantized_again_on_request(
    release: Callable[[str], Release], tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """4bit of a GPTQ base is 4bit of its dense release: the same losses, and the dense weights for LoftQ."""
    losses = []
    for place in release("gptq"):
        section = {"name_or_path": str(place), "quantization": "4bit"}
        ran = cli(
            "train",
            run_config(
                model=section,
                lora={"init_lora_weights": "loftq"},
                training={"max_steps": 2},
                output_dir=str(tmp_path / place.name),
            ),
        )
        assert ran.code == 0, ran.err
        assert ("quantized again to 4bit" in ran.err) is (place.name == "quantized")
        curve = json.loads((tmp_path / place.name / RECORD_FILE).read_text())["curve"]
        losses.append([entry["loss"] for entry in curve if "loss" in entry])
    assert losses[0] == losses[1]


# Releases that are refused

GROUP = "config_groups"


def in_group(**changes: Any) -> dict[str, Any]:
    """A scheme of compressed-tensors like that of "compressed int4", but for some values."""
    known = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    return {GROUP: {"group_0": {"weights": known | changes}}}


SETTINGS: dict[str, tuple[str, Any, str]] = {
    "unknown method": ("fp8", {"quant_method": "alchemy"}, "alchemy"),
    "no method": ("fp8", {"quant_method": None}, "unknown"),
    "3 bits": ("gptq", {"bits": 3}, "bits: 3"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: marlin"),
    "no group size": ("gptq", {"group_size": None, "bits": None}, "bits: None"),
    "group size of 0": ("awq", {"group_size": 0}, "block size of 0"),
    "group size as text": ("awq", {"group_size": "64"}, "block size of 64"),
    "gemv": ("awq", {"version": "gemv"}, "version: gemv"),
    "AWQ of 8 bits": ("awq", {"bits": 8}, "bits: 8"),
    "AWQ of NVIDIA": ("modelopt nvfp4", {"quant_algo": "W4A8_AWQ"}, "quant_algo: W4A8_AWQ"),
    "block of one number": ("fp8", {"weight_block_size": [128]}, "not supported"),
    "block as number": ("fp8", {"weight_block_size": 128}, "not supported"),
    "block of negative size": ("fp8", {"weight_block_size": [-2, 128]}, "block size of -2"),
    "sparse": ("compressed int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "another layout": ("gptq", {"format": "gptq_v2"}, "format: gptq_v2"),
    "no groups": ("compressed int4", {GROUP: None}, "not supported"),
    "empty groups": ("compressed int4", {GROUP: {}}, "not supported"),
    "two schemes": ("compressed int4", {GROUP: {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}},
                    "in different ways"),
    "another format": ("compressed int4", {"format": "marlin-24"}, "format: marlin-24"),
    "no format": ("compressed int4", {"format": None}, "not supported"),
    "bits as fraction": ("gptq", {"bits": 4.0}, "bits: 4.0"),
    "bits as truth": ("awq", {"bits": True}, "bits: True"),
    "AWQ bits as fraction": ("awq", {"bits": 4.0}, "bits: 4.0"),
    "number of bits as fraction": ("compressed int4", in_group(num_bits=4.0), "num_bits: 4.0"),
    "number of bits as truth": ("compressed fp8", in_group(num_bits=True), "num_bits: True"),
    "symmetric as text": ("compressed int4", in_group(symmetric="false"), "symmetric: false"),
    "floats in integers": ("compressed int4", in_group(type="float"), "type: float"),
    "ordered groups": ("compressed int4", in_group(actorder="group"), "actorder: group"),
    "an empty block": ("fp8", {"weight_block_size": {}}, "not supported"),
    "experts of 4 bits": ("fp8", {"expert_dtype": "fp4"}, "expert_dtype: fp4"),
    "Hadamard": ("compressed int4", {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
                 "transform_config: its weights are transformed"),
    "rotated": ("gptq", {"rotation": "hadamard"}, "rotation: its weights are transformed"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_unsupported_quantization_is_refused_by_its_configuration(
    case: str, release: Callable[[str], Release], tmp_path: Path, cli: Cli
) -> None:
    """Without any weights, so before they are loaded or downloaded."""
    form, changes, named = SETTINGS[case]
    shutil.copytree(release(form).path, path := tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    record = json.loads((path / "config.json").read_text())["quantization_config"]
    configure(
        path,
        quantization_config={
            key: value for key, value in (record | changes).items() if value is not None or key != "quant_method"
        },
    )
    ran = cli("params", "--model", path)
    check_refused(ran, 3, (Code.MODEL_UNSUPPORTED, str(path), "quantization_config"))
    assert named in ran.err and "release that is not quantized" in ran.err


def test_quantization_without_a_backward_is_refused_by_its_configuration(
    release: Callable[[str], Release], tmp_path: Path, cli: Cli
) -> None:
    shutil.copytree(release("fp8").path, path := tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    configure(path, quantization_config={"quant_method": "bitnet"})
    ran = cli("params", "--model", path)
    assert ran.code == 3 and "a base quantized with bitnet cannot be trained" in ran.err


def without(end: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in tensors if name.endswith(end))]

    return change


def changed(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(end))
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def added(name: str, tensor: torch.Tensor | None = None) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(3) if tensor is None else tensor})


Q = "model.layers.0.self_attn.q_proj."
FILES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "no scale": ("fp8", without("0.self_attn.q_proj.weight_scale_inv"), Q + "weight"),
    "no value": ("fp8", without("0.self_attn.q_proj.weight"), Q + "weight"),
    "fewer scales": ("fp8", changed("q_proj.weight_scale_inv", lambda scales: scales[:1]), "scales of shape (1, 2)"),
    "scales that are NaN": ("fp8", changed("q_proj.weight_scale_inv", lambda scales: scales * torch.nan), "NaN"),
    "weights that are not quantized": (
        "fp8",
        changed("0.self_attn.q_proj.weight", lambda weight: weight.bfloat16()),
        "q_proj.weight (values in BF16 instead of F8_E4M3)",
    ),
    "scales of another name": ("fp8", added(Q + "weight_scale"), Q + "weight_scale"),
    "no zeros": ("gptq", without("0.self_attn.q_proj.qzeros"), "q_proj.weight (without .qzeros)"),
    "fewer zeros": ("gptq", changed("0.self_attn.q_proj.qzeros", lambda zeros: zeros[:, :-1]), Q + "weight"),
    "fewer groups": ("gptq", changed("0.self_attn.q_proj.g_idx", lambda groups: groups[:-1]), "g_idx of 191 inputs"),
    "groups that do not exist": ("gptq", changed("0.self_attn.q_proj.g_idx", lambda groups: groups + 9), Q + "weight"),
    "fewer words": ("awq", changed("0.self_attn.q_proj.qweight", lambda words: words[:-1]), Q + "weight"),
    "scales of activations": ("awq", added("model.layers.0.mlp.act.scales"), "without .qweight and .qzeros"),
    "scales before": ("modelopt nvfp4", added(Q + "pre_quant_scale"), Q + "pre_quant_scale"),
    "no second scale": ("modelopt nvfp4", without("0.self_attn.q_proj.weight_scale_2"), "without .weight_scale_2"),
    "no global scale": ("compressed nvfp4", without("q_proj.weight_global_scale"), "weight_global_scale"),
    "no blocks": ("gpt-oss", without("0.mlp.experts.down_proj_blocks"), "without _blocks"),
    "fewer blocks": ("gpt-oss", changed("experts.down_proj_blocks", lambda blocks: blocks[:, :, :-1]), "down_proj"),
    "values as bytes": ("fp8", changed(Q + "weight", lambda values: values.view(torch.uint8)), "U8 instead of F8_E4M3"),
    "values as int8": ("fp8", changed(Q + "weight", lambda values: values.view(torch.int8)), "I8 instead of F8_E4M3"),
    "values as truth": ("fp8", changed(Q + "weight", lambda values: values.float() > 0), "BOOL instead of F8_E4M3"),
    "values of E5M2": (
        "modelopt fp8",
        changed(Q + "weight", lambda values: values.view(torch.uint8).view(torch.float8_e5m2)),
        Q + "weight (.weight in F8_E5M2 instead of F8_E4M3)",
    ),
    "scales as truth": ("fp8", changed("q_proj.weight_scale_inv", lambda scales: scales > 0), "_scale_inv in BOOL"),
    "scales in 3-D": ("fp8", changed("q_proj.weight_scale_inv", lambda scales: scales[None]), "scales of shape (1,"),
    "bytes in compressed FP8": ("compressed fp8", changed(Q + "weight", lambda one: one.view(torch.uint8)), "in U8"),
    "FP8 in compressed INT8": (
        "compressed int8",
        changed(Q + "weight", lambda one: one.view(torch.float8_e4m3fn)),
        ".weight in F8_E4M3 instead of I8",
    ),
    "words as floats": (
        "gptq",
        changed("0.self_attn.q_proj.qweight", lambda words: words.float()),
        Q + "weight (.qweight in F32 instead of I32)",
    ),
    "all as floats": (
        "gptq",
        lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}),
        "14 tensors of quantized weights",
    ),
    "zeros as floats": ("gptq", changed("0.self_attn.q_proj.qzeros", lambda zeros: zeros.float()), ".qzeros in F32"),
    "scales as integers": ("gptq", changed("0.self_attn.q_proj.scales", lambda scales: scales.int()), ".scales in I32"),
    "groups as floats": ("gptq", changed("0.self_attn.q_proj.g_idx", lambda groups: groups + 0.6), ".g_idx in F32"),
    "negative groups": ("gptq", changed("0.self_attn.q_proj.g_idx", lambda groups: groups - 1), "g_idx from -1 to 4"),
    "short words": ("awq", changed("0.self_attn.q_proj.qweight", lambda words: words.short()), "I16 instead of I32"),
    "long words": ("awq", changed("0.self_attn.q_proj.qweight", lambda words: words.long()), "I64 instead of I32"),
    "packed as floats": ("compressed int4", changed("weight_packed", lambda words: words.float()), "F32 instead"),
    "FP4 as integers": ("modelopt nvfp4", changed(Q + "weight", lambda packed: packed.view(torch.int8)), "in I8"),
    "MXFP4 scales as floats": ("gpt-oss", changed("down_proj_scales", lambda one: one.float()), "_scales in F32"),
    "MXFP4 scales as integers": ("gpt-oss", changed("down_proj_scales", lambda one: one.int()), "_scales in I32"),
    "MXFP4 as truth": ("gpt-oss", changed("down_proj_blocks", lambda one: one > 0), "_blocks in BOOL instead of U8"),
    "dense beside GPTQ": ("gptq", added(Q + "weight", torch.zeros(192, 192)), Q + "weight (.weight in F32"),
    "dense beside AWQ": ("awq", added(Q + "weight", torch.zeros(192, 192).half()), Q + "weight (.weight in F16"),
    "dense beside INT4": ("compressed int4", added(Q + "weight", torch.zeros(192, 192)), Q + "weight (.weight in F32"),
    "dense beside MXFP4": (
        "gpt-oss",
        added("model.layers.0.mlp.experts.down_proj", torch.zeros(4, 96, 64)),
        "experts.down_proj (values in F32",
    ),
    "another shape": ("gptq", changed("norm.weight", lambda weight: weight[:-1]), "norm.weight"),
    "no norm": ("gptq", without("norm.weight"), "norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_damaged_release_is_refused(case: str, release: Callable[[str], Release], tmp_path: Path) -> None:
    form, change, named = FILES[case]
    shutil.copytree(release(form).path, path := tmp_path / "model")
    change(tensors := load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        model = base(path)
        load.checks.check_finite(model, str(path))
    assert {code for code, _, _ in meanings(caught.value)} <= {Code.MODEL_DAMAGED, Code.MODEL_UNREADABLE}
    assert named in str(caught.value)


@pytest.mark.parametrize("record", [None, "fp8", [], {}, ["fp8"], 3])
@pytest.mark.parametrize("name", ["fp8", "modelopt nvfp4", "compressed int8", "awq"])
def test_quantized_weights_without_a_record_are_refused(
    name: str, record: Any, release: Callable[[str], Release], tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """Loaded as they are, they would be random weights."""
    shutil.copytree(release(name).path, path := tmp_path / "model")
    configure(path, quantization_config=record)
    ran = cli("train", run_config(model={"name_or_path": str(path)}))
    assert (ran.code, ran.out) == (3, ""), ran.err


@pytest.mark.parametrize("name", ["fp8", "awq", "compressed int8", "gpt-oss"])
def test_dense_weights_with_a_record_are_refused(
    name: str, release: Callable[[str], Release], tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """Nothing says that they are dequantized."""
    shutil.copytree(release(name).twin, path := tmp_path / "model")
    record = json.loads((release(name).path / "config.json").read_text())["quantization_config"]
    configure(path, quantization_config=record)
    for command in (("train", run_config(model={"name_or_path": str(path)})), ("params", "--model", path)):
        ran = cli(*command)
        check_refused(ran, 3, (Code.MODEL_DAMAGED, str(path), "quantization_config"))
        assert "dequantized" not in ran.err and "remove quantization_config" in ran.err


def test_release_in_pickles_is_refused(release: Callable[[str], Release], tmp_path: Path) -> None:
    shutil.copytree(release("gptq").path, path := tmp_path / "model")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors") as caught:
        base(path)
    assert meanings(caught.value) == [(Code.MODEL_UNSUPPORTED, str(path), "")]


def test_dtype_is_that_of_the_release(release: Callable[[str], Release], cli: Cli) -> None:
    """Whatever the dtype of the run is."""
    for name, dtype in (("gptq", "float16"), ("fp8", "bfloat16"), ("gpt-oss", "bfloat16")):
        ran = cli("params", "--model", release(name).path)
        assert f"dequantized to {dtype}" in ran.out + ran.err


def test_tensors_are_read_one_after_another(release: Callable[[str], Release]) -> None:
    """The files hold no dense weights, and a tensor is computed when it is asked for."""
    section = ModelSection(name_or_path=str(release("awq").path))
    found = load.tensor_files.release_tensors(section, load.load_config(section))
    assert {tensor.dtype for tensor in found.values()} == {"F16"}
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in tiny("llama").state_dict().items()
    }
