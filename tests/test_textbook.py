"""`creation.attach` compared with a handwritten LoRA: same outputs, gradients, losses and counts."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import reference
import torch
from conftest import ATTENTION
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import LlamaConfig

from loratune.config import LoraSection
from loratune.lora import attach as attach_module
from loratune.lora import creation, targets, tensors
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.model import load

R, ALPHA = 4, 12
PEFT_NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(1)
    layers = [("fc1", nn.Linear(16, 32)), ("act", nn.ReLU()), ("fc2", nn.Linear(32, 8)), ("head", nn.Linear(8, 3))]
    return nn.Sequential(OrderedDict(layers))


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(20, 16), torch.randn(20, 3)


def attach(base: nn.Module) -> PeftModel:
    found = targets.find(base, LoraSection(target_modules=["fc1", "fc2"]))
    return creation.attach(base, LoraSection(r=R, lora_alpha=ALPHA), found.peft(), seed=3)


def both(mlp: nn.Module, *, moved: bool) -> tuple[PeftModel, nn.Module]:
    """Our model and the reference on copies of one base, with the same A and B. moved: B is not zero."""
    ours, ref = attach(deepcopy(mlp)), reference.attach(deepcopy(mlp), ["fc1", "fc2"], R, ALPHA)
    for layer in ("fc1", "fc2"):
        for name, peft_name in PEFT_NAMES.items():
            source = ours.get_parameter(f"base_model.model.{layer}.{peft_name}")
            if moved:
                source.data.normal_()
            ref.get_parameter(f"{layer}.{name}").data.copy_(source.data)
    return ours, ref


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def test_output_follows_the_lora_formula(mlp: nn.Module, rows: tuple[Tensor, Tensor]) -> None:
    ours, x = attach(deepcopy(mlp)), rows[0]
    layer = ours.get_submodule("base_model.model.fc1")
    a, b = (layer.get_parameter(name).data.normal_() for name in PEFT_NAMES.values())
    expected = mlp.fc1(x) + (ALPHA / R) * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-5)
    assert not torch.allclose(layer(x), mlp.fc1(x), atol=0.1)


def test_outputs_and_gradients_match_the_reference(mlp: nn.Module, rows: tuple[Tensor, Tensor]) -> None:
    ours, ref = (module.double() for module in both(mlp, moved=True))
    x, y = (value.double() for value in rows)
    torch.testing.assert_close(ours(x), ref(x), rtol=1e-6, atol=1e-6)
    for module in (ours, ref):
        mse_loss(module(x), y).backward()
    assert len(gradients(ours)) == 4
    for mine, theirs in zip(gradients(ours), gradients(ref), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("optimizer", "rate"), [(torch.optim.AdamW, 1e-2), (torch.optim.SGD, 1e-1)])
def test_losses_over_20_steps_match_the_reference(
    mlp: nn.Module, rows: tuple[Tensor, Tensor], optimizer: type[torch.optim.Optimizer], rate: float
) -> None:
    x, y = rows
    curves = []
    for module in both(mlp, moved=False):
        steps = optimizer([p for p in module.parameters() if p.requires_grad], lr=rate)
        curves.append([])
        for _ in range(20):
            loss = mse_loss(module(x), y)
            steps.zero_grad()
            loss.backward()
            steps.step()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < 0.9 * curves[0][0]


def test_output_is_unchanged_at_step_0(mlp: nn.Module, rows: tuple[Tensor, Tensor]) -> None:
    before = mlp(rows[0])
    ours = attach(mlp)
    assert torch.equal(ours(rows[0]), before)
    state = tensors.weights(ours)
    assert [bool(tensor.any()) for name, tensor in sorted(state.items())] == [True, False, True, False]  # A, B, A, B


def test_only_a_and_b_are_trained(mlp: nn.Module, rows: tuple[Tensor, Tensor]) -> None:
    base = deepcopy(mlp.state_dict())
    ours = attach(mlp)
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    start = deepcopy(tensors.weights(ours))
    steps = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        mse_loss(ours(rows[0]), rows[1]).backward()
        steps.step()
    assert trained == [f"base_model.model.{layer}.{name}" for layer in ("fc1", "fc2") for name in PEFT_NAMES.values()]
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is not None] == trained
    assert not any(torch.equal(tensor, start[name]) for name, tensor in tensors.weights(ours).items())
    assert len(base) == 6
    for name, tensor in ours.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base.pop(name.replace(".base_layer", "")))
    assert not base


def test_saved_tensors_are_a_and_b(mlp: nn.Module, tmp_path) -> None:
    ours, ref = both(mlp, moved=True)
    attach_module.save(ours, tmp_path, creation.initialize_adapter(attach(deepcopy(mlp)), LoraSection()))
    save_file(reference.adapter_state(ref), tmp_path / "reference.safetensors")
    saved, expected = load_file(tmp_path / WEIGHTS_FILE), load_file(tmp_path / "reference.safetensors")
    names = {"lora_A.weight": "A", "lora_B.weight": "B"}
    plain = {}
    for name, tensor in saved.items():
        layer, kind = name.removeprefix("base_model.model.").split(".", 1)
        plain[f"{layer}.{names[kind]}"] = tensor
    assert plain.keys() == expected.keys() == {"fc1.A", "fc1.B", "fc2.A", "fc2.B"}
    assert all(torch.equal(plain[name], expected[name]) for name in plain)


def test_4096_by_4096_layer_has_65536_parameters() -> None:
    with torch.device("meta"):
        base = nn.Sequential(OrderedDict(fc=nn.Linear(4096, 4096, bias=False)))
    ours = creation.attach(
        base, LoraSection(r=8), targets.find(base, LoraSection(target_modules=["fc"])).peft(), seed=0
    )
    count = creation.count(ours, creation.initialize_adapter(ours, LoraSection(r=8)))
    assert (count.trainable, count.total) == (65_536, 4096 * 4096 + 65_536)


def test_llama_2_7b_has_8388608_trainable_parameters() -> None:
    shape = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    base = load.build_meta(shape)
    ours = creation.attach(base, LoraSection(r=8), targets.find(base, LoraSection(**ATTENTION)).peft(), seed=0)
    line = "trainable params: 8,388,608 || all params: 6,746,804,224 || trainable%: 0.1243"
    count = creation.count(ours, creation.initialize_adapter(ours, LoraSection(r=8)))
    assert str(count) == line
    assert count.adapter_bytes - 4 * 8_388_608 in range(1 << 16)  # float32 values and a header
