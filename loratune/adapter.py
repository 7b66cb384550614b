"""The LoRA adapter: attach, save, verify, load, count. The only room that imports peft.

LoRA: y = Wx + (alpha / r) B A x, W frozen, B zero at the start (Hu et al. 2021, arXiv:2106.09685).
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft import PeftModel as PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, set_seed

from loratune.config import LoraSection
from loratune.errors import AdapterError, ModelError, NumericError, Problem
from loratune.saved import CONFIG_FILE, WEIGHTS_FILE, Saved

WRAPPER_PREFIX = "base_model.model."


def attach(
    base: nn.Module,
    section: LoraSection,
    target_modules: Sequence[str],
    *,
    seed: int,
    base_name: str | None = None,
    revision: str | None = None,
) -> PeftModel:
    """Freeze `base` and put LoRA on the modules that PEFT finds by `target_modules`; its output stays as it is.

    seed: of the start of A. base_name, revision: recorded as where the base comes from.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM" if isinstance(base, PreTrainedModel) else None,
        base_model_name_or_path=base_name,
        revision=revision,
        **section.model_dump(exclude={"target_modules"}),
        target_modules=list(target_modules),
    )
    set_seed(seed)
    try:
        model = _wrap(base, config)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ModelError(Problem(f"PEFT cannot adapt this model: {error}", key="lora")) from None
    if section.bias != "none" and not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")):
        raise ModelError(Problem("the model has no such biases", key="lora.bias", fix="set it to none"))
    return model


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names they are saved by."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def check_learnt(model: PeftModel) -> None:
    """Refuse an adapter that cannot be of use.

    Raises NumericError: a tensor holds NaN or inf, or every B is still zero.
    """
    state = weights(model)
    if bad := _not_finite(state):
        raise NumericError(Problem(f"{len(bad)} adapter tensors hold NaN or inf, among them {_few(bad)}"))
    if not any(tensor.any() for name, tensor in state.items() if "lora_B" in name):
        fix = "is the learning rate too small, or the loss constant?"
        raise NumericError(Problem("nothing was learnt: every lora_B is still zero", fix=fix))


def save(model: PeftModel, directory: Path) -> int:
    """Write the two files that PEFT reads, and read them back. Returns the size of the weights in bytes.

    Raises NumericError as `check_learnt`. Raises AdapterError: what is on the disk is not what is in memory.
    """
    check_learnt(model)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)  # peft writes its sets in hash order
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    memory, disk = weights(model), _read_tensors(directory / WEIGHTS_FILE)
    if memory.keys() != disk.keys() or not all(torch.equal(memory[name].cpu(), disk[name]) for name in memory):
        raise AdapterError(Problem("the file differs from the weights in memory", str(directory / WEIGHTS_FILE)))
    return (directory / WEIGHTS_FILE).stat().st_size


def attach_saved(base: nn.Module, saved: Saved) -> PeftModel:
    """Put LoRA on `base`, which may be on the meta device, as a saved configuration says, without its weights.

    Raises AdapterError: the configuration does not fit the base; tensors of the file are missing, extra or of another
    shape than this base asks for.
    """
    where = str(saved.path)
    try:
        config = LoraConfig.from_pretrained(where)
        config.inference_mode = False  # its parameters count as trained, which they were
        model = _wrap(base, config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        raise AdapterError(Problem(f"does not fit its base {saved.base}: {error}", where)) from None
    expected = {name: tuple(tensor.shape) for name, tensor in weights(model).items()}
    if problems := _differences(expected, saved, where):
        raise AdapterError(problems)
    return model


def load(base: PreTrainedModel, saved: Saved) -> PeftModel:
    """Put a saved adapter on its base.

    Raises AdapterError: as `attach_saved`; a tensor holds NaN or inf.
    """
    model = attach_saved(base, saved)
    tensors = _read_tensors(saved.path / WEIGHTS_FILE)
    if bad := _not_finite(tensors):
        raise AdapterError(Problem(f"{len(bad)} tensors hold NaN or inf, among them {_few(bad)}", str(saved.path)))
    set_peft_model_state_dict(model, tensors)
    return model.eval()


@dataclass(frozen=True)
class Count:
    """Parameters: trained, all of them with the adapter, and bytes of the adapter file."""

    trainable: int
    total: int
    adapter_bytes: int

    @property
    def percent(self) -> float:
        """Trained share of all parameters, in percent."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        """The line of `PeftModel.print_trainable_parameters`."""
        return f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {self.percent:.4f}"


def count(model: PeftModel) -> Count:
    """Count parameters exactly, on any device, the meta device too."""
    trainable, total = model.get_nb_trainable_parameters()
    return Count(trainable, total, file_bytes(weights(model)))


def count_of(model: PeftModel, module: str) -> int:
    """Trained parameters of one adapted module, named as in the base."""
    return sum(
        parameter.numel()
        for name, parameter in model.get_submodule(WRAPPER_PREFIX + module).named_parameters()
        if parameter.requires_grad
    )


def notes(model: PeftModel) -> list[str]:
    """What is lawful and of no use: a rank above the smaller side of a layer, which bounds the rank of any update."""
    highest: dict[int, int] = {}
    layers: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            limit = min(layer.in_features, layer.out_features)
            if (rank := max(layer.r.values())) > limit:
                highest[limit] = max(rank, highest.get(limit, 0))
                layers.setdefault(limit, []).append(name.removeprefix(WRAPPER_PREFIX))
    return [
        f"lora.r: {highest[limit]} is more than the {limit} inputs or outputs of {len(names)} modules, among them "
        f"{_few(names)}; {limit} can express every update of theirs"
        for limit, names in sorted(layers.items())
    ]


def shape_of(model: PeftModel, module: str) -> tuple[int, int]:
    """Inputs and outputs of one adapted module, named as in the base."""
    layer = model.get_submodule(WRAPPER_PREFIX + module)
    return layer.in_features, layer.out_features


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of the safetensors file that holds `tensors`, to the byte.

    8 bytes of length, a JSON header padded to a multiple of 8, then the data in order of dtype and name:
    https://github.com/huggingface/safetensors#format
    """
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    order = list(dtypes)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def _wrap(base: nn.Module, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft corrects it for Conv1D, and says so
        warnings.filterwarnings("ignore", message=".*was renamed from.*")
        base_name = config.base_model_name_or_path
        model = get_peft_model(base, config)
    config.base_model_name_or_path = base_name  # peft put there what the base calls itself
    return model


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _differences(expected: Mapping[str, tuple[int, ...]], saved: Saved, where: str) -> list[Problem]:
    """Each way in which the tensors of a file differ from those that the base asks for."""
    found = {
        "missing": sorted(expected.keys() - saved.tensors.keys()),
        "not asked for": sorted(saved.tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {saved.tensors[name]} where the base asks for {shape}"
            for name, shape in expected.items()
            if name in saved.tensors and saved.tensors[name] != shape
        ],
    }
    fix = f"is {saved.base} the base it was trained on?"
    return [
        Problem(f"{len(names)} tensors are {kind}, among them {_few(names)}", where, fix=fix)
        for kind, names in found.items()
        if names
    ]


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3])
