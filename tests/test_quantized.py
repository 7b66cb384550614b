"""Quantized bases on a CPU: quantized on loading or saved quantized, and missing hardware support or packages."""

import json
import math
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import ROWS, Expected, Ran, check_refused, meanings, process, tiny_llama, tree, write_rows
from running import stopped
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import LoraSection, ModelSection
from loratune.errors import ConfigError
from loratune.kernels import quantized
from loratune.lora import creation, tensors
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.model import fingerprints, load
from loratune.model.load import Machine

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]
LAYER = {"8bit": "Dequantized8bit", "4bit": "Dequantized4bit"}
MAINLY_4BIT = ["4bit", pytest.param("8bit", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Wide enough for bitsandbytes to quantize in whole blocks of 64."""
    path = tmp_path_factory.mktemp("wide") / "llama"
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def curve(out: Path, key: str) -> list[float]:
    entries = json.loads((out / "loratune.json").read_text())["curve"]
    return [entry[key] for entry in entries if key in entry]


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def layers_of(out: Path) -> set[str]:
    base = loading.load(AdapterDirectory.open(out)).model.get_base_model()
    return {type(module).__name__ for module in base.modules()}


@pytest.mark.parametrize("quantization", MAINLY_4BIT)
def test_quantized_base_trains_evaluates_and_generates(
    quantization: str, wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    section = {"name_or_path": str(wide), "dtype": "auto", "quantization": quantization}
    data = {"validation": str(tmp_path / "rows.jsonl")}
    ran = cli("train", run_config(model=section, data=data, training={"max_steps": 6, "eval_steps": 2}))
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    held_out = curve(out, "eval_loss")
    assert len(held_out) >= 3
    assert held_out[-1] < held_out[1] < held_out[0] - 0.01  # training continues after an evaluation

    saved = load_file(out / WEIGHTS_FILE)
    plain = creation.attach(
        load.load_base(ModelSection(name_or_path=str(wide))),
        LoraSection(),
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        seed=0,
    )
    assert shapes(saved) == shapes(tensors.weights(plain))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    assert LAYER[quantization] in layers_of(out)
    ran = cli("generate", "--adapter", out, "--max-new-tokens", 4, "3 and 3 make")
    assert ran.code == 0, ran.err
    ran = cli("evaluate", "--adapter", out, "--data", tmp_path / "rows.jsonl", "--json")
    assert ran.code == 0, ran.err
    scores = json.loads(ran.out)
    assert scores["adapter"]["loss"] == pytest.approx(held_out[-1], rel=0.03)  # of half of the rows
    assert scores["base"]["loss"] > scores["adapter"]["loss"]


@pytest.mark.parametrize("quantization", MAINLY_4BIT)
def test_quantized_base_trains_on_preference_pairs(
    quantization: str, wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    rows = [{"prompt": f"{one} and {one} make", "chosen": f" {2 * one}", "rejected": f" {one}!"} for one in range(12)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    section = {"name_or_path": str(wide), "dtype": "auto", "quantization": quantization}
    ran = cli("train", run_config(
        model=section, data={"train": str(tmp_path / "pairs.jsonl")}, training={"objective": "dpo", "max_steps": 6},
    ))  # fmt: skip
    assert ran.code == 0, ran.err
    losses = curve(tmp_path / "out", "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-2) and losses[-1] < losses[0]


def eight_bit(inputs: int, outputs: int, **settings: Any) -> torch.nn.Module:
    """A layer in 8 bit with outliers in its inputs, as transformers makes it."""
    torch.manual_seed(0)
    return bitsandbytes.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=6.0, **settings).to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_8bit_layers_compute_what_bitsandbytes_does_in_training(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    """Bit by bit, forward and backward; also in evaluation mode, where bitsandbytes rounds inputs."""
    x, dy = torch.randn(*shape).to(dtype), torch.randn(*shape[:-1], 48).to(dtype)
    x.view(-1, 64)[1, 3] = 20.0
    results = []
    for own in (False, True):
        layer = eight_bit(64, 48, bias=bias).train(not own)
        if own:
            quantized.dequantize_in_use(layer)
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(dy)
        results.append((y, given.grad))
    for old, new in zip(*results, strict=True):
        assert old.dtype == new.dtype == dtype and torch.equal(old, new)
    with torch.no_grad():
        assert torch.allclose(layer(x), results[0][0], rtol=2 * torch.finfo(dtype).eps, atol=0.02)
    assert isinstance(layer, bitsandbytes.nn.Linear8bitLt) and layer.state_dict().keys() >= {"weight", "SCB"}


def test_8bit_layers_train_a_bias_and_keep_no_input() -> None:
    layer = eight_bit(64, 48)
    quantized.dequantize_in_use(layer)
    layer.bias.requires_grad_()
    x, kept = torch.randn(2, 3, 64, requires_grad=True), list[torch.Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 6.0)) and kept == [] and layer.weight.grad is None
    unpacked = bitsandbytes.nn.Linear8bitLt(64, 48)  # has its weights in 16 bit until they are used
    quantized.dequantize_in_use(unpacked)
    assert type(unpacked) is bitsandbytes.nn.Linear8bitLt


@pytest.mark.parametrize("settings", [{}, {"compress_statistics": False}, {"quant_type": "fp4"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [128, 96], ids="{} inputs".format)
def test_4bit_layers_compute_what_bitsandbytes_does_in_training(
    inputs: int, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """Bit by bit, forward and backward. Where rows of 96 inputs end within a block, bitsandbytes uses wrong scales."""
    torch.manual_seed(0)
    settings = {"quant_type": "nf4", "compute_dtype": dtype} | settings
    layer: Any = bitsandbytes.nn.Linear4bit(inputs, 48, **settings)
    original = layer.weight.data.clone()
    layer = layer.to("cpu").train()
    x, dy, results = torch.randn(2, 3, inputs).to(dtype), torch.randn(2, 3, 48).to(dtype), []
    layer.bias.requires_grad_()
    for own in (False, True):
        if own:
            quantized.dequantize_in_use(layer)
            assert type(layer).__name__ == "Dequantized4bit" and isinstance(layer, bitsandbytes.nn.Linear4bit)
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(dy)
        results.append((y, given.grad, layer.bias.grad))
        layer.bias.grad = None
    for kind, old, new in zip(("y", "dx", "bias"), *results, strict=True):
        loose = 8 * torch.finfo(dtype).eps if kind == "bias" else 0.0  # sums in another order
        same = torch.allclose(old, new, rtol=loose, atol=loose)
        assert old.dtype == new.dtype and (same or inputs == 96), kind
    with torch.inference_mode():
        unbiased = layer(torch.eye(inputs, dtype=dtype)) - layer.bias.to(dtype)
    assert float((unbiased.t().float() - original).abs().max()) < 0.2 * float(original.abs().max())


@pytest.mark.parametrize("shape", [(40, 128), (3, 50), (9, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_quantized_as_by_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Bit by bit, with an output of zeros, and one of equal weights; and dequantized as by its reference."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1], weight[2] = 0, 30
    weights, outliers = (weight.half(), 0.0), (weight.half(), 2.0)
    cases = [("int8_vectorwise_quant", weights), ("int8_vectorwise_quant", outliers)]
    cases += [("quantize_4bit", (weight, size, kind, torch.uint8)) for size in (32, 64) for kind in ("nf4", "fp4")]
    numbers, scales = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
    cases += [("dequantize_4bit", (numbers, scales, 64, "nf4", shape, dtype))]
    quantized.use_operations()
    for name, arguments in cases:
        operation = getattr(torch.ops.bitsandbytes, name).default
        theirs = operation._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)
        ours = operation(*arguments)
        both = [(theirs, ours)] if isinstance(ours, torch.Tensor) else [*zip(theirs, ours, strict=True)]
        for old, new in both:
            assert (old is None and new is None) or (old.dtype == new.dtype and torch.equal(old, new)), name


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("quantization", LAYER)
def test_weights_that_are_not_finite_stay_so(
    quantization: str, value: float, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a damaged base would train."""
    monkeypatch.setenv("LORATUNE_NATIVE", native)
    weight = torch.randn(4, 128)
    weight[2, 70] = value
    quantized.use_operations()
    if quantization == "8bit":
        numbers, most, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        dense = quantized._of_8bit(weight, numbers, most / 127)
    else:
        dense = quantized._of_4bit(weight, *bitsandbytes.functional.quantize_4bit(weight, compress_statistics=False))
    assert not dense[2, 70].isfinite() and dense[[0, 1, 3]].isfinite().all()


def quantized_layer(quantization: str, inputs: int, outputs: int) -> Any:
    """A layer with the class of this package."""
    layer = eight_bit(inputs, outputs) if quantization == "8bit" else bitsandbytes.nn.Linear4bit(inputs, outputs)
    quantized.dequantize_in_use(layer.to("cpu"))
    assert type(layer).__name__ == LAYER[quantization]
    return layer


@pytest.mark.parametrize("quantization", LAYER)
def test_quantized_layers_take_no_tokens_and_refuse_a_second_derivative(quantization: str) -> None:
    """The scratch has another weight by then, so that the second derivative would be wrong."""
    layer = quantized_layer(quantization, 128, 48)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert layer(torch.zeros(0, 128)).shape == (0, 48) and layer(torch.zeros(2, 0, 128)).shape == (2, 0, 48)
    x = torch.randn(3, 128, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(), (64,), (1, 64), (4, 127), (5, 129), (2, 2, 256), (3, 1)], ids=str)
@pytest.mark.parametrize("quantization", LAYER)
def test_inputs_of_another_width_are_refused_as_by_a_linear_layer(quantization: str, shape: tuple[int, ...]) -> None:
    layer, x = quantized_layer(quantization, 128, 48), torch.randn(shape)
    with pytest.raises(RuntimeError) as expected:
        torch.nn.Linear(128, 48)(x)
    for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(RuntimeError) as caught:
            layer(x)
        assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(128,), (0, 128), (1, 128), (2, 3, 128)], ids=str)
@pytest.mark.parametrize("quantization", LAYER)
def test_gradient_of_a_bias_for_inputs_of_any_shape(quantization: str, shape: tuple[int, ...]) -> None:
    layer, x = quantized_layer(quantization, 128, 48), torch.randn(shape, requires_grad=True)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), float(math.prod(shape[:-1])))) and x.grad.shape == shape


def test_a_stored_dtype_of_4bit_weights_is_kept() -> None:
    """FSDP shards floats only."""
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.randn(8, 128), quant_type="nf4", quant_storage=storage
        )
        assert packed.dtype == storage
        dense = quantized._of_4bit(torch.zeros(1), packed, state)
        assert torch.equal(dense, bitsandbytes.functional.dequantize_4bit(packed, state))


def test_8bit_rows_do_not_depend_on_the_batch(wide: Path) -> None:
    """With bitsandbytes' own layers, a column is an outlier, and so not rounded, if any row of the batch makes it
    one."""
    row, outlier = torch.randn(1, 64), torch.full((1, 64), 20.0)
    for own in (False, True):
        layer = eight_bit(64, 64).eval()
        if own:
            quantized.dequantize_in_use(layer)
        with torch.no_grad():
            assert torch.allclose(layer(row), layer(torch.cat([row, outlier]))[:1], atol=1e-3) is own
    section = ModelSection(name_or_path=str(wide), quantization="8bit")
    layers = [one for one in load.load_base(section).modules() if isinstance(one, bitsandbytes.nn.Linear8bitLt)]
    assert layers and {type(one).__name__ for one in layers} == {"Dequantized8bit"}


def gradients_around_an_evaluation(section: ModelSection) -> list[list[torch.Tensor]]:
    base = load.load_base(section)
    tuned, ids, found = (
        creation.attach(base, LoraSection(), {"target_modules": ["q_proj"]}, seed=0),
        torch.arange(20)[None],
        [],
    )
    for _ in range(2):
        tuned.train()(ids).logits.float().square().sum().backward()
        found.append([parameter.grad.clone() for parameter in tuned.parameters() if parameter.grad is not None])
        tuned.zero_grad()
        with torch.inference_mode():
            tuned.eval()(ids)
    return found


@pytest.mark.parametrize("comes_so", [False, True])
@pytest.mark.parametrize("quantization", LAYER)
def test_gradients_are_the_same_after_an_evaluation(quantization: str, comes_so: bool, wide: Path, ready: Any) -> None:
    """In evaluation mode on CPUs with AVX512-BF16, bitsandbytes' own layers repack 4-bit weights, which breaks the
    backward pass."""
    path, asked = (ready(quantization), "none") if comes_so else (wide, quantization)
    section = ModelSection(name_or_path=str(path), quantization=asked, dtype="bfloat16")
    before, after = gradients_around_an_evaluation(section)
    assert len(before) == 4
    assert before[1].any()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", MAINLY_4BIT)
def test_interrupted_and_resumed_run_writes_the_same_bytes(
    quantization: str, wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    config = run_config(
        model={"name_or_path": str(wide), "dtype": "auto", "quantization": quantization},
        data={"validation": str(write_rows(tmp_path / "few.jsonl", ROWS[:8]))},
        lora={"lora_dropout": 0.1},
        training={"max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 2, "eval_steps": 3},
    )
    assert cli("train", config, "--set", f"output_dir={tmp_path / 'straight'}").code == 0
    assert stopped(cli, tmp_path / "out.partial", "train", config).code == 130
    assert not (tmp_path / "out").exists()
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    assert "resuming from step" in ran.err
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (tmp_path / "straight" / WEIGHTS_FILE).read_bytes()
    assert curve(tmp_path / "out", "loss") == curve(tmp_path / "straight", "loss")


# Fingerprints


class Doubled:
    """What changes a quantized weight and leaves its numbers: twice the scales, as of a base with weights twice as
    large."""

    @staticmethod
    def all_of_a_row(layer: Any) -> None:
        (layer.weight if layer.weight.SCB is not None else layer.state).SCB[3] *= 2

    @staticmethod
    def of_a_block(layer: Any) -> None:
        layer.weight.quant_state.absmax[3] *= 2

    @staticmethod
    def of_the_scales(layer: Any) -> None:
        layer.weight.quant_state.state2.absmax *= 2

    @staticmethod
    def the_offset(layer: Any) -> None:
        layer.weight.quant_state.offset *= 2

    @staticmethod
    def another_format(layer: Any) -> None:
        layer.weight.quant_state.quant_type = "fp4"


@pytest.mark.parametrize(
    ("quantization", "nested", "change"),
    [
        ("8bit", False, Doubled.all_of_a_row), ("4bit", False, Doubled.of_a_block), ("4bit", True, Doubled.the_offset),
        ("4bit", True, Doubled.of_the_scales), ("4bit", False, Doubled.another_format),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_scales_and_formats_of_quantized_weights_count_in_fingerprints(
    quantization: str, nested: bool, change: Callable[[Any], None], wide: Path
) -> None:
    how = (
        BitsAndBytesConfig(load_in_8bit=True) if quantization == "8bit"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32, quantization_config=how)
    known, sample, state = fingerprints.fingerprint(base), fingerprints.Sampled(base), fingerprints._bits(base)
    assert known.startswith(fingerprints.QUANTIZED_VERSION)
    base(torch.arange(4)[None])  # bitsandbytes moves scales in 8 bit to another place
    assert fingerprints.fingerprint(base) == known and sample.is_in(base) and fingerprints._bits(base) == state
    change(base.model.layers[1].mlp.up_proj)
    assert fingerprints.fingerprint(base) != known
    assert not sample.is_in(base) and fingerprints._bits(base) != state


def test_quantized_bases_with_other_scales_are_refused(
    wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights twice as large have the same numbers. Fingerprints of earlier revisions do not contain the scales."""
    config = run_config(
        model={"name_or_path": str(wide), "quantization": "4bit"}, training={"max_steps": 6, "save_steps": 1}
    )
    out, moved = tmp_path / "out", Path(shutil.copytree(wide, tmp_path / "moved"))
    weights = load_file(moved / "model.safetensors")
    save_file(
        {name: weight * (2 if "proj" in name else 1) for name, weight in weights.items()},
        moved / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    monkeypatch.setattr(fingerprints, "QUANTIZED_VERSION", fingerprints.VERSION)
    assert stopped(cli, tmp_path / "out.partial", "train", config).code == 130
    earlier = Path(shutil.copytree(tmp_path / "out.partial", tmp_path / "earlier.partial"))
    adapter = tmp_path / "adapter"
    assert cli("train", config, "--set", f"output_dir={adapter}").code == 0
    monkeypatch.undo()

    ran = cli("train", config, "--resume", "--set", f"output_dir={earlier.with_suffix('')}")
    check_refused(ran, 7, (Code.RESUME_CHANGED, "", "model.name_or_path"))
    assert "without the scales" in ran.err and "--overwrite" in ran.err
    ran = cli("train", config, "--set", f"lora.start_from={adapter}", "--set", f"output_dir={tmp_path / 'more'}")
    check_refused(ran, 5, (Code.ADAPTER_MISMATCH, str(adapter), "lora.start_from"))
    ask = ("generate", "--adapter", adapter, "--max-new-tokens", 1, "1 and 1 make")
    ran = cli(*ask)
    check_refused(ran, 5, (Code.ADAPTER_MISMATCH, str(adapter), ""))
    assert "without the scales" in ran.err and "train it again" in ran.err and "--force" in ran.err
    assert cli(*ask, "--force").code == 0

    assert cli("train", config, "--overwrite").code == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    for base, code in ((wide, 0), (moved, 5)):
        (out / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
        ran = cli("generate", "--adapter", out, "--max-new-tokens", 1, "1 and 1 make")
        assert ran.code == code, ran.err
        assert ("was trained on another base" in ran.err) == (code == 5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", MAINLY_4BIT)
def test_no_output_of_other_libraries_is_printed(
    quantization: str, wide: Path, tmp_path: Path, run_config: MakeConfig, forked: Cli
) -> None:
    """Importing bitsandbytes prints. Forked processes have already imported the libraries."""
    section = {"name_or_path": str(wide), "dtype": "auto", "quantization": quantization}
    data = {"validation": str(tmp_path / "rows.jsonl")}
    run = process if quantization == "4bit" else forked
    ran = run("train", run_config(model=section, data=data, training={"max_steps": 2}))
    assert ran.code == 0
    ours = r" *(rows  duplicates|train  |validation  |40 of the validation rows|first row, |.*⟦|trainable params"
    ours += "|device: |step |comparing the adapter |evaluating |auto: |not accelerated, |loratune "
    ours += r"|data\.validation: half of the rows "
    ours += r"|the model no longer answers |[a-z][a-z, ]+: (\d+ s$|\d+ of \d+))"  # progress, of what takes two seconds
    foreign = [line for line in ran.err.splitlines() if not re.match(ours, line)]
    assert (foreign, ran.out[2:8]) == ([], "better")
    ran = forked("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 2, "3 and 3 make")
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", LAYER)
def test_smollm2_trains_and_generates_quantized(
    quantization: str, smollm2: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    section = {"name_or_path": str(smollm2), "dtype": "auto", "quantization": quantization}
    ran = cli("train", run_config(model=section, training={"max_steps": 2, "learning_rate": 1e-3}))
    assert ran.code == 0, ran.err
    first, second = curve(tmp_path / "out", "loss")
    assert second < first < 8
    ran = cli("generate", "--adapter", tmp_path / "out", "--base", "--max-new-tokens", 4, "The capital of France is")
    assert "Paris" in ran.out, ran.err


# Bases that are saved quantized


def configure(path: Path, **values: Any) -> None:
    known = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(known | values))


@pytest.fixture(scope="module")
def ready(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model quantized by bitsandbytes and written by `save_pretrained`."""
    path = tmp_path_factory.mktemp("ready")

    def make(quantization: str) -> Path:
        if not (path / quantization).exists():
            shutil.copytree(wide, path / quantization)
            how = (
                BitsAndBytesConfig(load_in_8bit=True)
                if quantization == "8bit"
                else BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16,
                )
            )  # fmt: skip
            base = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16, quantization_config=how)
            base.save_pretrained(path / quantization)
        return path / quantization

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", LAYER)
def test_weights_that_are_not_quantized_get_the_dtype_of_the_config(quantization: str, dtype: str, ready: Any) -> None:
    """transformers would leave them as they are in the files, here in bfloat16."""
    base = load.load_base(ModelSection(name_or_path=str(ready(quantization)), dtype=dtype))
    found = {weight.dtype for weight in base.parameters() if weight.is_floating_point()}
    assert found == {getattr(torch, dtype)}
    assert base(torch.arange(5)[None]).logits.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("quantization", MAINLY_4BIT)
def test_saved_quantized_base_trains_like_one_quantized_on_loading(
    quantization: str, wide: Path, ready: Callable[[str], Path], tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    path = ready(quantization)
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} & {torch.int8, torch.uint8}
    rows = {"validation": str(tmp_path / "rows.jsonl")}
    losses = []
    for name, base, asked in (("saved", path, "none"), ("loaded", wide, quantization)):
        section = {"name_or_path": str(base), "dtype": "bfloat16", "quantization": asked}
        out, training = tmp_path / name, {"max_steps": 4, "eval_steps": 2}
        ran = cli("train", run_config(model=section, data=rows, training=training, output_dir=str(out)))
        assert ran.code == 0, ran.err
        losses.append(curve(out, "loss") + curve(out, "eval_loss"))
        assert LAYER[quantization] in layers_of(out)
    assert losses[0] == losses[1]
    assert losses[0][3] < losses[0][2] < losses[0][0]
    ran = cli("generate", "--adapter", tmp_path / "saved", "--max-new-tokens", 4, "3 and 3 make")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("quantization", LAYER)
def test_every_byte_of_a_saved_quantized_base_counts(
    quantization: str, wide: Path, ready: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of weights and scales, also where they are many, and where scales are packed too. Quantized on loading, a base
    has another kind of fingerprint, and what is recorded of a sample cannot be compared."""
    path = Path(shutil.copytree(ready(quantization), tmp_path / "base"))
    stored = load_file(path / "model.safetensors")

    def found() -> str:
        return fingerprints.fingerprint(load.load_base(ModelSection(name_or_path=str(path), dtype="float32")))

    known, unseen = found(), list[str]()
    assert known.startswith(fingerprints.STORED_VERSION) and known == found()
    sampled = load.load_base(ModelSection(name_or_path=str(wide), dtype="float32", quantization=quantization))
    assert fingerprints.incomparable(fingerprints.fingerprint(sampled), known)
    names = [name for name in stored if "layers.1.mlp.up_proj" in name and "__" not in name and "format" not in name]
    assert len(names) >= (2 if quantization == "8bit" else 5)
    for name in names:
        changed = stored[name].clone()
        whole = changed.view(-1).view(torch.uint8)
        whole[len(whole) // 3] ^= 1
        save_file(stored | {name: changed}, path / "model.safetensors", {"format": "pt"})
        if found() == known:
            unseen.append(name)
    assert unseen == []


def by_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One scale per 64x64 block. DeepSeek-V3 uses 128x128 blocks (arXiv:2412.19437)."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 64, 64, columns // 64, 64)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).reshape(rows, columns)
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def by_bitnet(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Four values of -1, 0 or 1 per byte; here all of them are 0."""
    return {"weight": torch.full((weight.shape[0] // 4, weight.shape[1]), 0b01010101, dtype=torch.uint8),
            "weight_scale": torch.ones(1)}  # fmt: skip


def as_it_is(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """For methods whose package is missing: the weights are never read."""
    return {"weight": weight}


METHODS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], dict[str, torch.Tensor]]]] = {
    "fp8": ({"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [64, 64]}, by_fp8),
    "hqq": ({"quant_config": {}}, as_it_is),
    "quanto": ({"weights": "int8"}, as_it_is),
    "bitnet": ({}, by_bitnet),
}  # fmt: skip
MODULES = {"hqq": "hqq", "quanto": "optimum"}
ABSENT = [method for method in MODULES if find_spec(MODULES[method]) is None]
FOR_TRAINING = [method for method in METHODS if method != "bitnet"]


def packed(method: str, wide: Path, path: Path) -> Path:
    """The wide model with all of its projections quantized."""
    shutil.copytree(wide, path)
    settings, pack = METHODS[method]
    configure(path, quantization_config={"quant_method": method} | settings)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        prefix = name.removesuffix("weight")
        parts = pack(tensor) if name.endswith("proj.weight") else {"weight": tensor}
        tensors |= {prefix + part: value.contiguous() for part, value in parts.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def plain_counts(wide: Path, cli: Cli) -> str:
    return cli("params", "--model", wide, "--json").out


@pytest.mark.parametrize("method", FOR_TRAINING)
def test_parameter_counts_match_those_of_the_plain_model(
    method: str, wide: Path, plain_counts: str, tmp_path: Path, cli: Cli
) -> None:
    """From the configuration alone, with or without the packages of the method."""
    path = packed(method, wide, tmp_path / "packed")
    (path / "model.safetensors").unlink()
    assert cli("params", "--model", path, "--json").out == plain_counts


def test_fp8_base_trains_and_generates(wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig) -> None:
    section = {"name_or_path": str(packed("fp8", wide, tmp_path / "packed")), "dtype": "auto"}
    ids = torch.arange(20)[None]
    bases = [load.load_base(ModelSection(name_or_path=path)) for path in (section["name_or_path"], str(wide))]
    answers = [base(ids).logits for base in bases]
    assert torch.cosine_similarity(*(answer.float().flatten() for answer in answers), dim=0) > 0.97
    data, training = {"validation": str(tmp_path / "rows.jsonl")}, {"max_steps": 4, "eval_steps": 2}
    ran = cli("train", run_config(model=section, data=data, training=training))
    assert ran.code == 0, ran.err
    plain = section | {"name_or_path": str(wide)}
    ran = cli("train", run_config(model=plain, data=data, training=training, output_dir=str(tmp_path / "plain")))
    assert ran.code == 0, ran.err
    losses, exact = curve(tmp_path / "out", "eval_loss"), curve(tmp_path / "plain", "eval_loss")
    assert losses == pytest.approx(exact, abs=0.1)
    assert losses[-1] < losses[0] - 0.05
    ran = cli("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 4, "3 and 3 make")
    assert ran.code == 0, ran.err


def test_targets_are_resolved_on_plain_linear_layers(wide: Path, ready: Callable[[str], Path], tmp_path: Path) -> None:
    """fp8 layers are plain once unpacked. GPTQ's layers are no `nn.Linear`, and need its packages."""
    packed("fp8", wide, tmp_path / "fp8")
    for path, changes in ((wide, {}), (tmp_path / "fp8", {}), (ready("4bit"), {}), (wide, {"quant_method": "gptq"})):
        section = ModelSection(name_or_path=str(path))
        base = load.load_base(section)
        if changes:
            base.config.quantization_config = changes
        found = load.dense_model(base, section)
        assert (found is base, found.device.type) == ((False, "meta") if changes else (True, "cpu"))
        assert isinstance(found.model.layers[1].self_attn.q_proj, torch.nn.Linear)


@pytest.mark.parametrize("quantization", LAYER)
def test_memory_of_a_base_that_is_saved_quantized(
    quantization: str, wide: Path, ready: Callable[[str], Path], cli: Cli, run_config: MakeConfig
) -> None:
    def counted(path: Path, how: str) -> str:
        section = {"name_or_path": str(path), "dtype": "bfloat16", "quantization": how}
        return cli("params", run_config(model=section), "--json").out

    assert counted(ready(quantization), "none") == counted(wide, quantization) != counted(wide, "none")


@pytest.mark.parametrize("method", ABSENT)
def test_missing_quantization_package_is_reported(
    method: str, wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    path = packed(method, wide, tmp_path / "packed")
    config = run_config(model={"name_or_path": str(path)})
    before = tree(tmp_path)
    ran = cli("train", config)
    check_refused(ran, 3, (Code.SYSTEM_MISSING_PACKAGE, str(path), ""))
    assert ran.out == "" and method in ran.err.lower()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq"])
@pytest.mark.parametrize("command", ["train", "params"])
def test_quantizing_a_quantized_base_is_refused(
    command: str, method: str, wide: Path, ready: Any, tmp_path: Path, cli: Cli, run_config: MakeConfig
) -> None:
    """Those that are dequantized can be quantized again, see `test_releases.py`."""
    path = ready("4bit") if method == "bitsandbytes" else packed(method, wide, tmp_path / "packed")
    ran = cli(command, run_config(model={"name_or_path": str(path), "quantization": "4bit"}))
    check_refused(ran, 3, (Code.MODEL_UNSUPPORTED, str(path), "model.quantization"))
    assert ran.out == "" and f"({method})" in ran.err and "set it to none" in ran.err


def test_method_without_backward_is_refused(wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig) -> None:
    path = packed("bitnet", wide, tmp_path / "packed")
    (path / "model.safetensors").unlink()  # before weights are read
    ran = cli("train", run_config(model={"name_or_path": str(path)}))
    check_refused(ran, 3, (Code.MODEL_UNSUPPORTED, str(path), ""))
    assert ran.out == "" and "bitnet" in ran.err


def test_unknown_quantization_method_is_refused(wide: Path, tmp_path: Path, cli: Cli, run_config: MakeConfig) -> None:
    """transformers would ignore it and treat the weights as plain ones."""
    shutil.copytree(wide, tmp_path / "packed")
    configure(tmp_path / "packed", quantization_config={"quant_method": "alchemy"})
    ran = cli("train", run_config(model={"name_or_path": str(tmp_path / "packed")}))
    check_refused(ran, 3, (Code.MODEL_UNSUPPORTED, str(tmp_path / "packed"), "quantization_config"))
    assert ran.out == "" and "(alchemy)" in ran.err


# What the machine does not support


MACHINES = {
    "old GPU": Machine("Tesla T4", bfloat16=False, bitsandbytes=""),
    "GPU": Machine("H100", bfloat16=True, bitsandbytes=""),
    "CPU": Machine(None, bfloat16=True, bitsandbytes=""),
    "old CPU": Machine(None, bfloat16=False, bitsandbytes=""),
    "broken": Machine(None, bfloat16=True, bitsandbytes="no library"),
}
NO_BFLOAT16 = (Code.MODEL_UNSUPPORTED, "", "model.dtype"), "Tesla T4"
NO_LIBRARY = (Code.MODEL_UNSUPPORTED, "", "model.quantization"), "no library"
EMULATED = "model.dtype: this CPU has no instructions for bfloat16 and emulates it, slowly; auto is float32 here"


@pytest.mark.parametrize(
    ("machine", "values", "error", "note"),
    [
        ("old GPU", {"dtype": "bfloat16"}, NO_BFLOAT16, None),
        ("old GPU", {"dtype": "float32", "quantization": "4bit"}, None, None),
        ("GPU", {"dtype": "bfloat16", "quantization": "4bit"}, None, None),
        ("CPU", {"dtype": "bfloat16"}, None, None),
        ("old CPU", {"dtype": "bfloat16"}, None, EMULATED),
        ("old CPU", {"dtype": "auto"}, None, None),
        ("old CPU", {"dtype": "float16"}, None, "model.dtype: float16 overflows above 65,504"),
        ("broken", {"quantization": "4bit"}, NO_LIBRARY, None),
        ("broken", {"dtype": "bfloat16"}, None, None),
    ],
)
def test_settings_are_checked_against_the_machine(
    machine: str, values: dict[str, Any], error: tuple[Expected, str] | None, note: str | None
) -> None:
    section, where = ModelSection(name_or_path="base", **values), MACHINES[machine]
    if error:
        with pytest.raises(ConfigError, match=error[1]) as caught:
            load.check_machine(section, where)
        assert meanings(caught.value) == [error[0]]
        return
    load.check_machine(section, where)
    assert [line[: len(note or "")] for line in load.machine_notes(section, where)] == ([note] if note else [])


def test_this_machine_supports_4bit() -> None:
    load.check_machine(ModelSection(name_or_path="base", quantization="4bit"))


def test_gpu_kernels_are_refused_without_a_gpu() -> None:
    asked = ModelSection(name_or_path="base", device_map="auto", torch_compile=True, use_liger_kernel=True)
    with pytest.raises(ConfigError) as caught:
        load.check_kernels(asked, gpu=False)
    keys = ["model.device_map", "model.torch_compile", "model.use_liger_kernel"]
    assert meanings(caught.value) == [(Code.MODEL_UNSUPPORTED, "", key) for key in keys]
    load.check_kernels(ModelSection(name_or_path="base"), gpu=False)
    load.check_kernels(ModelSection(name_or_path="base", torch_compile=True), gpu=True)
    with pytest.raises(ConfigError, match=r"pip install liger-kernel$") as caught:
        load.check_kernels(asked, gpu=True)
    assert meanings(caught.value) == [(Code.SYSTEM_MISSING_PACKAGE, "", "model.use_liger_kernel")]


def broken_installation(kind: str, path: Path) -> Path:
    """A copy of bitsandbytes without its native library, or one that cannot be imported."""
    if kind == "no library":
        source = Path(bitsandbytes.__file__).parent
        shutil.copytree(source, path / "bitsandbytes", ignore=shutil.ignore_patterns("*.so", "*.dll", "*.dylib"))
    else:
        (path / "bitsandbytes").mkdir(parents=True)
        (path / "bitsandbytes" / "__init__.py").write_text("raise ImportError('libfoo.so.1: no such file')")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param("no library", "bitsandbytes has no native library for this machine", marks=pytest.mark.slow),
        ("no import", "bitsandbytes cannot be imported (libfoo.so.1: no such file)"),
    ],
)
def test_broken_bitsandbytes_is_reported_for_4bit(
    kind: str, reason: str, wide: Path, tmp_path: Path, run_config: MakeConfig, forked: Cli
) -> None:
    """Reported before loading the model, whose missing weights would be another error."""
    shutil.copytree(wide, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = run_config(model={"name_or_path": str(tmp_path / "model"), "quantization": "4bit"})
    broken = str(broken_installation(kind, tmp_path / "site"))
    before = tree(tmp_path)
    ran = process("train", config, PYTHONPATH=broken, PYTHONDONTWRITEBYTECODE="1")
    check_refused(ran, 2, (Code.MODEL_UNSUPPORTED, "", "model.quantization"))
    assert ran.out == "" and f"4bit does not work here: {reason};" in ran.err
    first = [line.partition(" ")[0] for line in ran.err.splitlines()]
    assert first == ["loratune", f"error[{Code.MODEL_UNSUPPORTED}]:"]
    assert tree(tmp_path) == before
    assert forked("train", config).code == 3  # the control: with a working bitsandbytes, the error is about the model
