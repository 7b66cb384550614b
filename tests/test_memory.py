"""The memory estimate: its parts against formulas, activations against autograd, the total against a real run."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import ROOT, run_command, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from running import Cli, MakeConfig
from torch import nn
from transformers import (
    Adafactor,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
)

from loratune import kernels, memory
from loratune.config import LoraSection, TrainingSection
from loratune.errors import is_out_of_memory
from loratune.lora import attach, creation
from loratune.memory import activations, moments

ROLES = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROWS = [(32, 8), (32, 32)]
TINY = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def adapted(base: nn.Module, **changes: Any) -> PeftModel:
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **({"r": 8, "target_modules": ROLES} | changes)))


def on_meta(config: Any, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PeftModel:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return adapted(base, **changes)


def deep(layers: int, **changes: Any) -> PeftModel:
    return on_meta(LlamaConfig(**(TINY | {"num_hidden_layers": layers})), **changes)


def test_weights_gradients_and_optimizer_state_match_formulas() -> None:
    estimate = memory.estimate(adapted(tiny_llama()), ROWS, 2)
    base = 2 * 264 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    trained = 2 * 8 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    assert (estimate.weights, estimate.adapter, estimate.gradients) == (4 * base, 4 * trained, 4 * trained)
    assert estimate.optimizer == 2 * 4 * trained
    assert (
        estimate.parts()["total"]
        == estimate.total
        == sum(value for name, value in estimate.parts().items() if name != "total")
    )


@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adamw_bnb_8bit", bitsandbytes.optim.AdamW8bit),
        ("paged_adamw_8bit", bitsandbytes.optim.PagedAdamW8bit),
        ("adafactor", lambda params: Adafactor(params, scale_parameter=False, relative_step=False, lr=1e-3)),
    ],
)
@pytest.mark.parametrize("shape", [(8, 32), (64, 300), (100,)])
def test_moments_match_the_optimizer_state(optim: str, make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    optimizer = make([parameter])
    optimizer.step()
    state = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
    saved = [tensor for name, tensor in state.items() if "qmap" not in name and tensor.dim()]  # the maps are shared
    assert moments(parameter, optim) == sum(tensor.numel() * tensor.element_size() for tensor in saved)


def saved_bytes(model: nn.Module, rows: int, length: int) -> int:
    """The bytes that autograd saves in a real forward of the trained modules, without weights and logits."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(rows, length, dtype=torch.long)
    with kernels.accelerated(model, attach.adapted_linear):
        known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        kernels.set_loss_targets(model, ids)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return sum(size for pointer, size in saved.items() if pointer != logits.untyped_storage().data_ptr())


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4))


ADAPTED: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (tiny_llama, {}),
    (tiny_llama, {"target_modules": "all-linear", "r": 16, "lora_dropout": 0.1}),
    (tiny_llama, {"modules_to_save": ["lm_head"]}),
    (tiny_gpt2, {"target_modules": ["c_attn"]}),
]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "lora", "native"),
    [
        *((*one, True) for one in ADAPTED),
        (*ADAPTED[0], False),
        *(pytest.param(*one, False, marks=pytest.mark.slow) for one in ADAPTED[1:]),
    ],
)
def test_activations_match_what_autograd_saves(
    make: Callable[[], nn.Module], lora: dict[str, Any], native: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LORATUNE_NATIVE", str(int(native)))
    model = adapted(make().to(dtype), **lora)
    estimate = memory.estimate(model, [(64, 63)] * 4, 4)
    assert estimate.traced
    assert estimate.activations == pytest.approx(saved_bytes(model, 4, 64), rel=0.02)


def keep_kernels_away(model: PeftModel) -> None:
    """Force the model's own code in all layers: the kernels do not replace layers with hooks."""
    for module in model.get_base_model().modules():
        module.register_forward_pre_hook(lambda *_: None)


def test_kernels_need_less_activation_memory() -> None:
    """The estimate reflects which kernels are used."""
    model, hooked = deep(2), deep(2)
    keep_kernels_away(hooked)
    fused, stock = (memory.estimate(candidate, ROWS, 2) for candidate in (model, hooked))
    assert fused.traced and stock.traced
    assert fused.activations < 0.8 * stock.activations


def test_activations_grow_linearly_with_rows_and_layers() -> None:
    by_rows = [memory.estimate(deep(2), [(128, 128)] * rows, rows).activations for rows in (1, 2, 3)]
    by_layers = [memory.estimate(deep(layers), ROWS, 2).activations for layers in (1, 2, 3)]
    for first, second, third in (by_rows, by_layers):
        assert 0 < third - second == second - first


def test_estimate_depends_on_the_longest_rows_only() -> None:
    model = deep(2)
    rows = [(8, 2), (32, 8), (16, 16), (32, 32)]
    assert memory.estimate(model, rows, 2) == memory.estimate(model, ROWS, 2)
    assert memory.estimate(model, rows, 3).total > memory.estimate(model, ROWS, 2).total


def traced_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that collects the sequence length of every step traced from now on."""
    lengths: list[int] = []
    trace = activations._trace

    def counted(fake: Any, step: activations.TracedStep, **limits: bool) -> tuple[int, int]:
        lengths.append(step.length)
        return trace(fake, step, **limits)

    monkeypatch.setattr(activations, "_trace", counted)
    return lengths


def limit(monkeypatch: pytest.MonkeyPatch, **limits: object) -> None:
    """Set the tracing limits, and clear the results traced under other limits."""
    for name, value in limits.items():
        monkeypatch.setattr(activations, name, value)
    monkeypatch.setattr(activations, "_TRACED", {})


def test_equal_steps_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep estimates each trial; trials that differ only in the learning rate share a trace. A hook changes the
    model."""
    limit(monkeypatch)
    lengths, model = traced_lengths(monkeypatch), deep(1)
    assert memory.estimate(model, ROWS, 2) == memory.estimate(deep(1), ROWS, 2)
    assert lengths == [32]
    keep_kernels_away(model)
    memory.estimate(model, ROWS, 2)
    memory.estimate(deep(1), [(16, 16)], 1)
    memory.estimate(deep(2), ROWS, 2)
    assert lengths == [32, 32, 16, 32]


def test_recurrent_layers_are_extrapolated_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1), target_modules=["in_proj"])
    rows = [(14, 14), (10, 7)]
    lengths = traced_lengths(monkeypatch)
    limit(monkeypatch, MIN_OPERATIONS=1_000_000)
    exact = memory.estimate(model, rows, 2)
    limit(monkeypatch, MIN_OPERATIONS=100, OPERATIONS_PER_MODULE=10, SHORT_LENGTHS=(512, 4))
    assert exact.traced
    assert memory.estimate(model, rows, 2) == exact
    assert lengths == [14, 14, 4, 8, 12]


def test_eager_attention_is_extrapolated_quadratically(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of long rows are not built; shorter rows are traced instead."""
    model, rows = on_meta(LlamaConfig(**TINY, attn_implementation="eager")), [(96, 90), (48, 45)]
    keep_kernels_away(model)
    lengths = traced_lengths(monkeypatch)
    exact = memory.estimate(model, rows, 2)
    limit(monkeypatch, MAX_ELEMENTS=96 * 96 - 1, SHORT_LENGTHS=(16, 8))
    long = memory.estimate(model, rows, 2)
    assert lengths == [96, 96, 16, 32, 48]
    assert long.activations == pytest.approx(exact.activations, rel=0.01)
    assert long.total == pytest.approx(exact.total, rel=0.01)


def test_sizes_are_checked_before_tensors_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a billion tokens are extrapolated, as are masks of a trillion elements; too many rows are estimated by
    the formula."""
    model = on_meta(LlamaConfig(**TINY))
    assert memory.estimate(model, [(10**9, 10**9)] * 8, 8).traced
    ids = torch.arange(1 << 20)
    for make in (lambda: torch.ones(1 << 20, 1 << 20), lambda: ids[:, None] < ids, lambda: ids.expand(1 << 20, -1) + 1):
        with pytest.raises(activations._TooLong), activations.AllocationTracker(model, limited=True):
            make()
    with activations.AllocationTracker(model, limited=True):
        assert len(ids[:9].nonzero()) == 8
    limit(monkeypatch, MAX_TOKENS=10)
    assert not memory.estimate(model, [(16, 16)] * 11, 11).traced


def test_an_adapter_that_is_too_large_is_not_made(run_config: MakeConfig, cli: Cli) -> None:
    """It is counted without values; where it needs values, memory runs out."""
    ran = cli("params", run_config(lora={"r": 10**9}), "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["trainable"] > 10**10
    with pytest.raises(RuntimeError) as failed:
        creation.adapt(tiny_llama(), LoraSection(r=10**9, target_modules=["q"]), seed=0)
    assert is_out_of_memory(failed.value)


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4)).save_pretrained(path)
    return path


QUANTIZED = {
    "none": None,
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "targets", "quantization"),
    [
        *(("tiny_dir", ROLES, quantization) for quantization in ("none", "8bit", "4bit")),
        *(pytest.param("gpt2_dir", ["c_attn"], one, marks=pytest.mark.slow) for one in ("none", "8bit", "4bit")),
    ],
)
def test_meta_model_gets_the_same_estimate(
    quantization: Any, place: str, targets: list[str], request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(place)
    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=QUANTIZED[quantization], device_map={"": "cpu"}
    )
    loaded = memory.estimate(adapted(base, target_modules=targets), ROWS, 2)
    planned = on_meta(base.config, target_modules=targets)
    assert memory.estimate(planned, ROWS, 2, planned=memory.Planned(quantization)) == loaded
    assert loaded.traced
    wide = memory.estimate(on_meta(base.config, torch.float32, target_modules=targets), ROWS, 2)
    narrow = memory.estimate(planned, ROWS, 2)
    assert wide.weights == 2 * narrow.weights and wide.activations > narrow.activations
    assert loaded.weights == narrow.weights if quantization == "none" else loaded.weights < narrow.weights


def test_eight_bit_layers_save_their_inputs_on_a_gpu_only() -> None:
    """bitsandbytes keeps them there, although the weights are frozen."""
    model = deep(2)
    formats = [memory.Planned(kind) for kind in ("4bit", "8bit")]
    four, eight = (memory.estimate(model, ROWS, 2, planned=planned).activations for planned in formats)
    assert four == eight
    step = activations.TracedStep(tuple(ROWS), torch.device("cpu"), quantized=tuple(sorted(memory.quantizable(model))))
    steps = (replace(step, keeps_input=keeps) for keeps in (True, False))
    (kept, _), (four, _) = (activations.trace(model, one, attach.adapted_linear) or (0, 0) for one in steps)
    inputs = 64 + 64 + 128  # of q, k and v; of gate and up; of down; the input of o is already saved by attention
    first = 64  # the input of q, k and v of the first layer needs no gradient
    assert kept - four == 2 * 32 * (2 * inputs - first) * 2


@pytest.mark.parametrize("kind", ["none", "8bit", "4bit"])
def test_a_large_base_is_in_memory_once(kind: Any) -> None:
    """While it is loaded, single matrices are quantized; files are mapped, and their pages are not counted."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    model = on_meta(LlamaConfig(**TINY | shape | {"num_hidden_layers": 6, "head_dim": 128}))
    found = memory.estimate(model, ROWS, 2, planned=memory.Planned(kind))
    beside, quantizing = found.total - found.weights - memory.RUNTIME, 4096 * 11008 * memory.QUANTIZING
    assert (quantizing if kind != "none" else 0) <= beside < quantizing + 1e8


def test_checkpointing_reduces_the_estimate() -> None:
    model = deep(4)
    rows = [(64, 64)] * 4
    plain, less = (
        memory.estimate(model, rows, 4, TrainingSection(activation_checkpointing=on)) for on in (False, True)
    )
    assert less.activations < plain.activations / 4
    assert less.total < plain.total


def test_onednn_cache_grows_with_the_number_of_batch_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN caches code for each number of tokens, until its cache is full and it evicts entries."""

    def runtime(*batch_tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return memory.estimate(on_meta(LlamaConfig(**TINY), dtype), ROWS, 2, batch_tokens=batch_tokens).runtime

    code = memory.PRIMITIVES_PER_SIZE * memory.PRIMITIVE_SIZE
    assert runtime() == runtime(64, 64) == runtime(64, 70) - code
    assert runtime(64, 70, 64, 80) == runtime() + 2 * code
    full = runtime(*range(1, 1000))
    assert (
        full == runtime(*range(1, 2000)) < runtime() + memory.CACHED_PRIMITIVES * memory.PRIMITIVE_SIZE + memory.HOLES
    )
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    assert full - runtime(*range(1, 1000)) == (memory.CACHED_PRIMITIVES - 64) * memory.PRIMITIVE_SIZE
    assert runtime(64, 70, dtype=torch.float32) == runtime(64, dtype=torch.float32)


def test_accumulation_adds_a_gradient_buffer() -> None:
    """A trained head has a large gradient, which is held from the second micro-step on."""
    model = deep(1, modules_to_save=["lm_head"])
    once, waiting = (
        memory.estimate(model, [(2, 2)], 1, TrainingSection(gradient_accumulation_steps=steps)) for steps in (1, 2)
    )
    assert waiting.total > once.total
    assert waiting.gradients == once.gradients > 2 * 264 * 64
    wide = memory.estimate(
        on_meta(LlamaConfig(**TINY | {"num_hidden_layers": 1}), torch.float32, modules_to_save=["lm_head"]), [(2, 2)], 1
    )
    assert wide.gradients - once.gradients == 2 * 264 * 64


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (FalconConfig(vocab_size=264, hidden_size=64, num_hidden_layers=2, num_attention_heads=4), ["query_key_value"]),
        (MixtralConfig(**TINY, num_local_experts=4), ROLES),
        (Qwen3Config(**TINY), ROLES),
        (GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4), ["c_attn"]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.parametrize("rows", [[(32, 4), (20, 4)], pytest.param([(32, 32)] * 2, marks=pytest.mark.slow)])
def test_other_architectures_are_traced(config: Any, targets: list[str], rows: list[tuple[int, int]]) -> None:
    estimate = memory.estimate(on_meta(config, target_modules=targets), rows, 2)
    assert estimate.traced
    assert estimate.activations > 0 < estimate.logits


def reads_numbers(module: nn.Module, inputs: Any) -> None:
    """A hook that depends on values, as data-dependent code does."""
    if inputs[0].sum().item() < 0:
        raise AssertionError


def test_data_dependent_models_are_estimated_by_formula(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "loratune")
    model = deep(4)
    keep_kernels_away(model)  # the formula covers the model's own layers
    exact = memory.estimate(model, ROWS, 2)
    model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(reads_numbers)
    assert "estimated by a formula" not in caplog.text
    rough = memory.estimate(model, ROWS, 2)
    assert "estimated by a formula" in caplog.text
    assert (exact.traced, rough.traced) == (True, False)
    assert (rough.weights, rough.adapter, rough.optimizer) == (exact.weights, exact.adapter, exact.optimizer)
    assert 0.5 < rough.activations / exact.activations < 2
    less = memory.estimate(model, ROWS, 2, TrainingSection(activation_checkpointing=True))
    assert less.activations < rough.activations
    assert capfd.readouterr() == ("", "")


def states(model: nn.Module) -> Iterator[tuple[object, ...]]:
    for name, parameter in model.named_parameters():
        yield name, id(parameter), parameter.dtype, parameter.device, parameter.requires_grad, parameter.grad is None
    yield from ((name, module.training, id(module)) for name, module in model.named_modules())
    yield (str(model.config.to_dict()),)


def test_estimate_changes_neither_the_model_nor_the_rng() -> None:
    model = adapted(tiny_llama(num_hidden_layers=4).to(torch.bfloat16), lora_dropout=0.5).eval()
    before, generator = list(states(model)), torch.get_rng_state()
    memory.estimate(model, ROWS, 2, TrainingSection(activation_checkpointing=True, gradient_accumulation_steps=2))
    assert list(states(model)) == before
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.slow
def test_estimate_matches_a_real_run(smollm2: Path) -> None:
    script = ROOT / "scripts" / "measure_memory.py"
    command = [sys.executable, script, "8 x 128, float32", "--steps", "2"]
    done = run_command(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    estimated, measured = (int(cell.replace(",", "")) for cell in done.stdout.splitlines()[-1].split("|")[2:4])
    assert measured > 1500  # MiB: above what imports alone need
    assert 0.9 < measured / estimated < 1.1
