"""Each LoRA variant, enabled by one key: it trains, is saved, reloads to the same outputs, resumes, or is refused."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ATTENTION, Ran, decided_training, meanings, problem_text, tiny_llama, tree
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from running import run_record
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from loratune import config
from loratune.codes import Code
from loratune.compare.engine import SFT
from loratune.config import LoraSection, ModelSection
from loratune.data.batches import pad, put_rows
from loratune.errors import DataError, ModelError
from loratune.events import Event, Listener, StepEvent, listening
from loratune.lora import attach, creation, parameters, targets, tensors
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, inspect
from loratune.lora.initialize import KEY as INIT
from loratune.lora.tensors import AdapterInit
from loratune.model import load, stored
from loratune.training import preflight, trainer
from loratune.training import run as training_run
from loratune.training.checkpoints import run_dir
from loratune.training.checkpoints.store import Checkpoints
from loratune.training.processes import SharedStop
from loratune.training.results import TrainedAdapter
from loratune.training.schedule import Schedule

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]

VARIANTS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, fast": {"init_lora_weights": "pissa_niter_4"},
    "PiSSA with rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True},
    "PiSSA with patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q": 4}, "alpha_pattern": {"o": 8}},
    "OLoRA": {"init_lora_weights": "olora"},
    "EVA": {"init_lora_weights": "eva"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "LoRA+": {"loraplus_lr_ratio": 16.0},
    "LoRA-FA": {"use_lorafa": True},
    "LoRA-FA with rsLoRA": {"use_lorafa": True, "use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "PiSSA with modules_to_save": {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 1, 2]},
    "patterns": {"rank_pattern": {"q": 16}, "alpha_pattern": {"q": 4, r"layers\.1\..*v_proj": 64}},
}

TOKENS = [[(7 * row + 3 * place) % 250 for place in range(20 + row % 5)] for row in range(40)]
ROWS = Dataset.from_list([{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in TOKENS])
PROBE = torch.tensor([TOKENS[0]])
PAD = partial(pad, pad_id=0)
BATCHES = [PAD([ROWS[row] for row in range(start, start + 8)]) for start in range(0, 40, 8)]


def interrupt_at(step: int) -> Listener:
    """A listener that interrupts the run at a given step."""

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            raise KeyboardInterrupt

    return listen


def begun(base: nn.Module | None = None, **lora: Any) -> tuple[PeftModel, LoraSection, AdapterInit]:
    """The tiny Llama with an adapter, before its first step."""
    section, base = LoraSection(**ATTENTION | lora), base or tiny_llama()
    found = targets.find(base, section)
    model = creation.attach(base, section, found.peft(), seed=0, base_name="tiny")
    return model, section, creation.initialize_adapter(model, section, batches=BATCHES)


def outputs(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(PROBE).logits


def fit(model: PeftModel, section: LoraSection, path: Path, **training: Any) -> TrainedAdapter:
    settings = decided_training(**({"learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1} | training))
    size = settings.per_device_train_batch_size
    batches = SimpleNamespace(
        items=ROWS, size=size, collate=partial(put_rows, PAD), flat=False, heaviest=lambda: range(size)
    )
    plan: Any = SimpleNamespace(
        training=settings, config=SimpleNamespace(lora=section, training=settings), model=model, resume_point=None,
        best=None, retention=None, schedule=Schedule.of(settings, len(ROWS), size),
        run=SimpleNamespace(directory=SimpleNamespace(output=path)),
        batches=SimpleNamespace(train=batches, held_out=None, objective=SFT),
        base=SimpleNamespace(files=SimpleNamespace(check_unchanged_in_run=lambda: None)),
        checkpoints=Checkpoints(path / "checkpoints", run_record(), 0),
    )  # fmt: skip
    return trainer.fit(plan, SharedStop())


def factors(model: PeftModel) -> dict[str, tuple[LoraLayer, torch.Tensor]]:
    """Path of each adapted module → its layer and its update s·B·A."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            found[name.removeprefix("base_model.model.")] = layer, layer.scaling["default"] * b @ a
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_trains_saves_and_loads_to_the_same_outputs(variant: str, tmp_path: Path) -> None:
    before = outputs(tiny_llama())
    model, section, start = begun(**VARIANTS[variant])
    assert torch.allclose(outputs(model), before, atol=1e-6)
    count = creation.count(model, start)
    outcome = fit(model, section, tmp_path)
    losses = outcome.losses()
    assert losses[-1] < losses[0]
    trained = outputs(model)
    assert (trained - before).abs().max() > 0.01
    (tmp_path / "out").mkdir()
    assert attach.save(model, tmp_path / "out", start) == count.adapter_bytes
    exact = 0.0 if not start.to_plain_lora else 1e-6  # the part taken out of the base is added back with rounding
    assert torch.allclose(outputs(attach.load(tiny_llama(), inspect(tmp_path / "out"))), trained, rtol=0, atol=exact)
    assert torch.allclose(
        outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")), trained, rtol=0, atol=exact
    )


AT_LENGTH = (
    "PiSSA, fast", "PiSSA with rsLoRA", "PiSSA with patterns", "LoRA-FA with rsLoRA", "PiSSA with modules_to_save",
    "rsLoRA", "patterns", "OLoRA", "modules_to_save", "orthogonal", "gaussian", "DoRA", "EVA",
)  # fmt: skip
"""Variants that resume like others, with the same kinds of state: a changed base, trained factors."""


@pytest.mark.parametrize(
    "variant", [pytest.param(one, marks=pytest.mark.slow) if one in AT_LENGTH else one for one in VARIANTS]
)
def test_resumed_variant_writes_the_same_bytes(variant: str, run_config: MakeConfig, tmp_path: Path) -> None:
    def run(name: str, interrupted_at: int = 0, resume: bool = False) -> None:
        loaded = config.load(path, [f"output_dir={tmp_path / name}"])
        directory = run_dir.check(loaded.output_dir, resume=resume, overwrite=False)
        ready = preflight.check(loaded, directory, [] if resume else None)
        with listening(interrupt_at(interrupted_at)):
            training_run.train(ready)

    lora = {"lora_dropout": 0.1} | VARIANTS[variant]
    path = run_config(lora=lora, training={"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2})
    run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("halted", interrupted_at=3)
    assert not (tmp_path / "halted").exists()
    run("halted", resume=True)
    assert (tmp_path / "halted" / WEIGHTS_FILE).read_bytes() == (tmp_path / "straight" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initializations_that_change_the_base_are_saved_as_plain_lora(start: str, tmp_path: Path) -> None:
    model, section, began = begun(init_lora_weights=start, use_rslora=True, alpha_pattern={"q": 4})
    fit(model, section, tmp_path)
    attach.save(model, tmp_path, began)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (written["init_lora_weights"], written["r"]) == (True, 16)
    assert written["lora_alpha"] == pytest.approx(16 * math.sqrt(2))
    assert [*written["alpha_pattern"].values()] == [pytest.approx(4 * math.sqrt(2))]
    assert inspect(tmp_path).tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (16, 32)


def test_pissa_starts_from_the_principal_directions() -> None:
    base = tiny_llama()
    for path, (layer, update) in factors(begun(init_lora_weights="pissa")[0]).items():
        weight = base.get_submodule(path).weight.detach()
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        assert torch.allclose(update, left[:, :8] * singular[:8] @ right[:8], atol=1e-5)
        assert torch.allclose(layer.get_base_layer().weight + update, weight, atol=1e-6)


def test_olora_starts_from_an_orthonormal_b() -> None:
    for layer, _ in factors(begun(init_lora_weights="olora")[0]).values():
        b = layer.lora_B["default"].weight.detach()
        assert torch.allclose(b.T @ b, torch.eye(8), atol=1e-5)


def test_eva_starts_from_the_main_directions_of_the_inputs() -> None:
    base, seen = tiny_llama().eval(), []
    hook = base.model.layers[1].self_attn.o_proj.register_forward_hook(lambda layer, args, result: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            seen[-1] = seen[-1][batch["labels"] != -100]
    hook.remove()
    inputs = torch.cat(seen)
    principal = torch.linalg.svd(inputs - inputs.mean(0)).Vh[:8]
    for init, least in (("eva", 0.8), (True, 0.0)):  # plain LoRA is the control
        layer, update = factors(begun(init_lora_weights=init)[0])["model.layers.1.self_attn.o_proj"]
        basis = torch.linalg.qr(layer.lora_A["default"].weight.detach().T).Q
        shared = (principal @ basis).square().sum() / 8  # 1 if both span the same space
        assert (shared > 0.8) == (init == "eva") and shared > least
        assert not update.any()


def test_eva_needs_more_supervised_tokens_than_directions() -> None:
    model = creation.attach(
        tiny_llama(), section := LoraSection(init_lora_weights="eva"), {"target_modules": ["q_proj"]}, seed=0
    )
    few = dict(BATCHES[0], labels=torch.full_like(BATCHES[0]["labels"], -100))
    few["labels"][0, :8] = 1
    with pytest.raises(DataError, match="r = 8; the first batches have at most 8 ") as caught:
        creation.initialize_adapter(model, section, batches=[few])
    assert meanings(caught.value) == [(Code.LORA_UNSUPPORTED, "", INIT)]
    few["labels"][0, :9] = 1
    creation.initialize_adapter(model, section, batches=[few])


def test_loraplus_gives_b_its_own_learning_rate(tmp_path: Path) -> None:
    model, section, start = begun(loraplus_lr_ratio=16.0)
    fit(model, section, tmp_path, max_steps=1, lr_scheduler_type="constant")
    moved = {name: (tensor - start.tensors[name]).abs().max().item() for name, tensor in tensors.weights(model).items()}
    # The length of Adam's first step is its learning rate. A has no gradient while B is zero.
    assert {round(step, 4) for name, step in moved.items() if "lora_B" in name} == {0.16}
    assert {step for name, step in moved.items() if "lora_A" in name} == {0.0}


def test_loraplus_trains_an_embedding_at_the_rate_of_the_config(tmp_path: Path) -> None:
    model, section, start = begun(loraplus_lr_ratio=1.0, target_modules=["embed_tokens", "q"])
    fit(model, section, tmp_path, max_steps=1, lr_scheduler_type="constant")
    moved = max(
        (tensor - start.tensors[n]).abs().max() for n, tensor in tensors.weights(model).items() if "embedding" in n
    )
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_lorafa_does_not_train_a(tmp_path: Path) -> None:
    plain, lorafa = begun()[0], begun(use_lorafa=True)
    model, section, start = lorafa
    assert creation.count(model, start).trainable < plain.get_nb_trainable_parameters()[0]
    fit(model, section, tmp_path)
    for name, tensor in tensors.weights(model).items():
        assert torch.equal(tensor, start.tensors[name]) == ("lora_A" in name)


# --- LoftQ: 4-bit bases


@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_starts_from_the_quantization_error(rslora: bool, tiny_dir: Path) -> None:
    held = ModelSection(name_or_path=str(tiny_dir), dtype="float32", quantization="4bit")
    section = LoraSection(**ATTENTION, init_lora_weights="loftq", use_rslora=rslora)
    base, whole = load.load_base(held), tiny_llama()
    tuned = creation.attach(base, section, targets.find(base, section).peft(), seed=0)
    creation.initialize_adapter(
        tuned, section, originals=partial(stored.original_weights, held, base, load.load_config(held))
    )
    for path, (layer, update) in factors(tuned).items():
        lost = whole.get_submodule(path).weight.detach() - dequantize_module_weight(layer.get_base_layer()).float()
        singular = torch.linalg.svdvals(lost)
        best = singular[8:].norm() / singular.norm()  # Eckart-Young: no update of rank 8 leaves a smaller error
        assert (lost - update).norm() / lost.norm() == pytest.approx(best.item(), rel=1e-3)
        assert best < 0.9


def test_loftq_on_the_command_line(cli: Cli, run_config: MakeConfig, tmp_path: Path, tiny_dir: Path) -> None:
    quantized = {"name_or_path": str(tiny_dir), "dtype": "float32", "quantization": "4bit"}
    losses = {}
    for start in ("loftq", "true"):
        path = run_config(model=quantized, training={"max_steps": 2, "learning_rate": 1e-6})
        ran = cli("train", path, "--overwrite", "--allow-worse", "--set", f"lora.init_lora_weights={start}")
        assert ran.code == 0, ran.err
        losses[start] = json.loads((tmp_path / "out" / "loratune.json").read_text())["metrics"]["first_loss"]
        assert cli("generate", "--adapter", tmp_path / "out", "1 and 1 make", "--max-new-tokens", "2").code == 0
    assert losses["loftq"] != losses["true"]


def test_loftq_reports_missing_original_weights(tiny_dir: Path, tmp_path: Path) -> None:
    base = tiny_llama()
    section = ModelSection(name_or_path=str(tiny_dir))
    read = stored.original_weights(section, base, load.load_config(section))
    assert torch.equal(read("model.layers.0.self_attn.q_proj"), base.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(ModelError, match=r"model\.layers\.9\.gone\.weight") as caught:
        read("model.layers.9.gone")
    assert meanings(caught.value) == [(Code.MODEL_DAMAGED, str(tiny_dir), "lora.init_lora_weights")]


# --- refusals

CONTRADICTIONS = [
    (
        {"lora.init_lora_weights": "pissa", "model.quantization": "8bit"},
        "lora.init_lora_weights and model.quantization",
    ),
    (
        {"lora.init_lora_weights": "olora", "model.quantization": "4bit"},
        "lora.init_lora_weights and model.quantization",
    ),
    (
        {"lora.init_lora_weights": "orthogonal", "model.quantization": "8bit"},
        "lora.init_lora_weights and model.quantization",
    ),
    ({"lora.init_lora_weights": "loftq"}, "lora.init_lora_weights and model.quantization"),
    (
        {"lora.init_lora_weights": "loftq", "model.quantization": "8bit"},
        "lora.init_lora_weights and model.quantization",
    ),
    ({"lora.init_lora_weights": "pissa", "lora.use_dora": "true"}, "lora.init_lora_weights and lora.use_dora"),
    ({"lora.init_lora_weights": "eva", "lora.rank_pattern": "{q: 16}"}, "lora.init_lora_weights and lora.rank_pattern"),
    ({"lora.init_lora_weights": "orthogonal", "lora.r": "3"}, "lora.init_lora_weights and lora.r"),
    ({"lora.use_lorafa": "true", "lora.loraplus_lr_ratio": "4"}, "lora.use_lorafa and lora.loraplus_lr_ratio"),
    ({"lora.use_lorafa": "true", "lora.use_dora": "true"}, "lora.use_lorafa and lora.use_dora"),
    ({"lora.use_lorafa": "true", "training.optim": "sgd"}, "lora.use_lorafa and training.optim"),
    ({"lora.loraplus_lr_ratio": "0.5"}, "lora.loraplus_lr_ratio"),
    ({"lora.rank_pattern": "{q: 0}"}, "lora.rank_pattern.q"),
    ({"lora.rank_pattern": "{'(q': 4}"}, "lora.rank_pattern"),
]


@pytest.mark.parametrize(("values", "keys"), CONTRADICTIONS)
def test_incompatible_keys_are_reported_before_anything_is_read(
    values: dict[str, str], keys: str, cli: Cli, run_config: MakeConfig, tmp_path: Path
) -> None:
    path = run_config()
    before = tree(tmp_path)
    ran = cli("train", path, *(part for key, value in values.items() for part in ("--set", f"{key}={value}")))
    assert (ran.code, ran.out) == (2, "")
    assert f": {keys}: " in ran.err, ran.err
    assert tree(tmp_path) == before


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=264, n_positions=64))


def test_initializations_that_do_not_fit_a_layer_are_refused() -> None:
    with pytest.raises(ModelError, match=r"olora .* Conv1D") as caught:
        begun(gpt2(), init_lora_weights="olora")
    assert meanings(caught.value) == [(Code.LORA_UNSUPPORTED, "", INIT)]
    with pytest.raises(ModelError, match=r"pissa .*; model\.embed_tokens is a Embedding") as caught:
        begun(init_lora_weights="pissa", target_modules=["q", "embed_tokens"])
    assert meanings(caught.value) == [(Code.LORA_UNSUPPORTED, "", INIT)]
    with pytest.raises(ModelError) as caught:
        begun(use_lorafa=True, target_modules=["q", "embed_tokens"])
    assert meanings(caught.value) == [(Code.LORA_UNSUPPORTED, "", "lora.use_lorafa")]
    for start in ("pissa", "olora", "eva"):
        with pytest.raises(
            ModelError, match=rf"{start} needs 17 directions .* has only 16 .*; lower lora\.r to 16"
        ) as caught:
            begun(init_lora_weights=start, r=17)
        assert meanings(caught.value) == [(Code.LORA_UNSUPPORTED, "", INIT)]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initializations_that_change_a_tied_weight_are_refused(start: str) -> None:
    """The embedding would lose the part taken out of the head, with which it shares the weight."""
    with pytest.raises(ModelError, match=rf"{start} .*lm_head") as caught:
        begun(tiny_llama(tie_word_embeddings=True), init_lora_weights=start, target_modules=["q", "lm_head"])
    assert meanings(caught.value) == [(Code.LORA_UNSUPPORTED, "", INIT)]
    before = outputs(tiny_llama())
    assert torch.allclose(
        outputs(begun(tiny_llama(), init_lora_weights=start, target_modules=["lm_head"])[0]), before, atol=1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_trainable_tokens_of_an_adapted_embedding_are_refused(tied: bool, key: str, name: str) -> None:
    lora = {"trainable_token_indices": [1], key: ["q", name] if key == "target_modules" else [name]}
    if name == "lm_head" and not tied:
        begun(tiny_llama(tie_word_embeddings=tied), **lora)
        return
    with pytest.raises(ModelError, match=rf"both adapt .*{name}, which") as caught:
        begun(tiny_llama(tie_word_embeddings=tied), **lora)
    keys = f"lora.{key} and lora.trainable_token_indices"
    assert meanings(caught.value) == [(Code.LORA_UNSUPPORTED, "", keys)]


@pytest.mark.parametrize("start", ["pissa", "eva", "orthogonal"])
def test_initializations_support_transposed_weights(start: str) -> None:
    before = outputs(gpt2())
    assert torch.allclose(outputs(begun(gpt2(), init_lora_weights=start)[0]), before, atol=1e-5)


# --- portability

LEAVES = [
    ({"use_dora": True}, "lora.use_dora: vLLM, llama.cpp"),
    ({"bias": "all"}, "lora.bias: vLLM, llama.cpp"),
    ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save: vLLM, llama.cpp"),
    ({"trainable_token_indices": [1]}, "lora.trainable_token_indices: vLLM, llama.cpp"),
    ({"use_rslora": True}, "lora.use_rslora: llama.cpp"),
    ({"rank_pattern": {"q": 4}}, "lora.rank_pattern: vLLM"),
    ({"alpha_pattern": {"q": 4}}, "lora.alpha_pattern: vLLM, llama.cpp"),
    ({"r": 32}, "lora.r: the file's rank is 32; vLLM"),
    ({"rank_pattern": {"q": 32}, "alpha_pattern": {"q": 64}}, "lora.rank_pattern: the file's rank is 32; vLLM"),
    (
        {"init_lora_weights": "pissa", "r": 4},
        "lora.init_lora_weights: pissa is saved as plain LoRA of twice the rank, 8",
    ),
    ({"init_lora_weights": "pissa", "r": 16}, "lora.r: the file's rank is 32; vLLM"),
    ({"init_lora_weights": "olora", "use_rslora": True}, "lora.use_rslora: with olora, lora_alpha is saved times"),
    ({"init_lora_weights": "loftq"}, "lora.init_lora_weights: loftq compensates for what 4bit loses"),
]


@pytest.mark.parametrize(("lora", "line"), LEAVES)
def test_non_portable_settings_are_reported(lora: dict[str, Any], line: str) -> None:
    assert any(note.startswith(line) for note in config.portability(LoraSection(**lora)))


@pytest.mark.parametrize("lora", [{}, {"r": 16}, {"init_lora_weights": "eva"}, {"use_lorafa": True}])
def test_portable_settings_give_no_note(lora: dict[str, Any]) -> None:
    assert [*config.portability(LoraSection(**lora))] == []


@pytest.mark.parametrize(
    ("model", "names", "kind"),
    [
        (lambda: tiny_llama(), ["q", "o", "lm_head"], None),
        (lambda: tiny_llama(tie_word_embeddings=True), ["q", "lm_head"], "lm_head, a Linear with the weight of"),
        (lambda: tiny_llama(), ["embed_tokens"], "model.embed_tokens, an Embedding"),
        (lambda: gpt2(), ["q"], "attn.c_attn, a Conv1D"),
    ],
)
def test_layers_that_llama_cpp_cannot_read_are_reported(
    model: Callable[[], Any], names: list[str], kind: str | None
) -> None:
    notes = parameters.notes(begun(model(), target_modules=names)[0])
    assert notes == [] if kind is None else f"do not read an adapter of {kind}" in notes[0]


def test_non_portable_keys_are_reported_at_config_time(
    run_config: MakeConfig, cli: Cli, tmp_path: Path, forked: Cli
) -> None:
    path = run_config(lora={"use_dora": True}, data={"train": str(tmp_path / "gone.jsonl")})
    ran = forked("train", path)
    assert ran.code == 4
    note, failed = ran.err.splitlines()
    assert note.startswith("lora.use_dora: vLLM, llama.cpp and Ollama do not read DoRA")
    assert problem_text(failed).startswith(f"{tmp_path / 'gone.jsonl'}")
    assert "lora.use_dora: vLLM" in cli("params", run_config(lora={"use_dora": True})).err
