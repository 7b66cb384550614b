"""The LoRA adapter: attach, save, verify, load, count. The only room that imports peft.

LoRA: y = Wx + (alpha / r) B A x, W frozen, B zero at the start (Hu et al. 2021, arXiv:2106.09685).
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft import PeftModel as PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from loratune.config import LoraSection, patterns
from loratune.errors import AdapterError, ModelError, NumericError, Problem
from loratune.lora import initialize, optimizers
from loratune.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.counts import Count, file_bytes
from loratune.lora.initialize import AdapterInit
from loratune.lora.module_names import ends_in
from loratune.lora.sharded import Weights, weights
from loratune.lora.untouched import Untouched, untouched

# Keys of the section that are not fields of `peft.LoraConfig`, or that come resolved with the targets.
_NOT_PEFT = {"init_lora_weights", "use_lorafa", "loraplus_lr_ratio"}


_PLAIN = {"format": "pt"}  # what readers of safetensors ask for


def attach(
    base: nn.Module,
    section: LoraSection,
    targeting: Mapping[str, Any],
    *,
    seed: int,
    base_name: str | None = None,
    revision: str | None = None,
) -> PeftModel:
    """Freeze `base` and put LoRA on the modules that PEFT finds by `targeting`; its output stays as it is.

    targeting: `target_modules`, and the patterns and modules to save that go with them, resolved to this base's names.
    seed: of the start of A. base_name, revision: recorded as where the base comes from.
    Raises ModelError: what PEFT cannot adapt, or a start that does not fit these layers.
    """
    on_paper = next(base.parameters()).is_meta  # where there are no numbers to decompose
    config = LoraConfig(
        task_type="CAUSAL_LM" if isinstance(base, PreTrainedModel) else None,
        base_model_name_or_path=base_name,
        revision=revision,
        init_lora_weights=True if on_paper else initialize.peft_start(section),
        **section.model_dump(exclude=_NOT_PEFT | targeting.keys()) | dict(targeting),
    )
    _check_tokens(base, section, targeting)
    initialize.check_layers(base, section, tuple(f".{name}" for name in targeting["target_modules"]))
    set_seed(seed)
    try:
        model = _wrap(base, config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(Problem(f"PEFT cannot adapt this model: {error}", key="lora")) from None
    initialize.check_ranks(model, section)
    if initialize.becomes_plain_lora(section):
        config.init_lora_weights = True  # what is published is plain LoRA, see `AdapterInit`
    if section.bias != "none" and not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")):
        raise ModelError(Problem("the model has no such biases", key="lora.bias", fix="set it to none"))
    if section.use_lorafa:
        optimizers.freeze_a(model)
    return model


def _check_tokens(base: nn.Module, section: LoraSection, targeting: Mapping[str, Any]) -> None:
    """Tokens that the model has, in an embedding that nothing else adapts."""
    if section.trainable_token_indices is None or not isinstance(base, PreTrainedModel):
        return
    embedding = base.get_input_embeddings()
    known = embedding.num_embeddings
    for path, module in base.named_modules():
        if getattr(module, "weight", None) is not embedding.weight:
            continue
        for key in ("target_modules", "modules_to_save"):
            if any(ends_in(path, name) for name in targeting.get(key) or ()):
                what, keys = (
                    f"both adapt {path}, which holds the embeddings",
                    f"lora.{key} and lora.trainable_token_indices",
                )
                raise ModelError(Problem(what, key=keys, fix="keep one of them"))
    if beyond := [token for token in section.trainable_token_indices if token >= known]:
        key, fix = "lora.trainable_token_indices", f"ids go from 0 to {known - 1}"
        raise ModelError(Problem(f"the model has no token {', '.join(map(str, beyond[:3]))}", key=key, fix=fix))


def initialize_adapter(
    model: PeftModel,
    section: LoraSection,
    *,
    batches: Sequence[Mapping[str, torch.Tensor]] = (),
    originals: Callable[[], Callable[[str], torch.Tensor]] | None = None,
) -> AdapterInit:
    """Bring a fresh adapter to where it starts, and keep what it is there.

    batches: collated training rows, for eva; originals: opens the weights before quantization, for loftq, as a reader
    from the path of a linear layer to its weight. Raises ModelError: see `starts.eva` and `starts.loftq`.
    """
    first: torch.Tensor = next(model.parameters())
    if not first.is_meta:
        if section.init_lora_weights == "eva":
            initialize.eva(model, batches)
        elif section.init_lora_weights == "loftq" and originals is not None:
            initialize.loftq(model, originals())
    return AdapterInit(
        {name: tensor.clone() for name, tensor in weights(model).items()}, initialize.becomes_plain_lora(section)
    )


def check_trained(state: Mapping[str, torch.Tensor], start: AdapterInit) -> None:
    """Refuse an adapter that cannot be of use.

    Raises NumericError: a tensor holds NaN or inf, or every B is as it started.
    """
    if bad := _not_finite(state):
        raise NumericError(Problem(f"{len(bad)} adapter tensors hold NaN or inf, among them {_few(bad)}"))
    if not start.moved(state):
        fix = "is the learning rate too small, or the loss constant?"
        raise NumericError(Problem("nothing was learnt: every lora_B is as it started", fix=fix))


def write(model: PeftModel, directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write the two files that PEFT reads. state: see `weights`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file({name: tensor.cpu().clone() for name, tensor in state.items()}, directory / WEIGHTS_FILE, _PLAIN)


def save(model: PeftModel, directory: Path, start: AdapterInit, state: Weights | None = None) -> int:
    """Write the two files that PEFT reads, and read them back. Returns the size of the weights in bytes.

    state: the trained tensors, if the model holds only a part of them, see `sharded.whole`.
    Raises NumericError as `check_trained`. Raises AdapterError: what is on the disk is not what is in memory.
    """
    state = weights(model) if state is None else state
    check_trained(state, start)
    memory = {name: tensor.cpu().contiguous() for name, tensor in start.published(state).items()}
    write(model, directory, memory)
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    start.publish_config(config)
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)  # peft writes its sets in hash order
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    disk = _read_tensors(directory / WEIGHTS_FILE)
    if memory.keys() != disk.keys() or not all(torch.equal(memory[name], disk[name]) for name in memory):
        raise AdapterError(Problem("the file differs from the weights in memory", str(directory / WEIGHTS_FILE)))
    return (directory / WEIGHTS_FILE).stat().st_size


def ignored(saved: AdapterFiles) -> list[str]:
    """A line on the keys of the configuration that this PEFT does not know, and that have no value.

    Raises AdapterError: such a key with a value, which would be left out of account.
    """
    where, known = str(saved.path / CONFIG_FILE), {field.name for field in fields(LoraConfig)}
    unknown = {key: value for key, value in saved.config.items() if key not in known}
    if given := sorted(key for key, value in unknown.items() if value not in (None, False, {}, [])):
        fix = "upgrade peft, or take it out"
        raise AdapterError([Problem("this version of PEFT does not know it", where, key, fix) for key in given])
    return [f"{where}: this version of PEFT does not know {', '.join(sorted(unknown))}"] if unknown else []


def attach_saved(base: nn.Module, saved: AdapterFiles) -> PeftModel:
    """Put LoRA on `base`, which may be on the meta device, as a saved configuration says, without its weights.

    Raises AdapterError: see `check_patterns`; the configuration does not fit the base; tensors of the file are missing,
    extra or of another shape than this base asks for.
    """
    where = str(saved.path)
    paths = (path for path, _ in base.named_modules() if path)
    patterns.check_patterns(saved.config, saved.tensors, paths, str(saved.path / CONFIG_FILE))
    with _fitting(saved):
        config = LoraConfig.from_pretrained(where)
        config.r, config.rank_pattern = patterns.bounded_ranks(saved.config, saved.tensors)
        config.inference_mode = False  # its parameters count as trained, which they were
        model = _wrap(base, config)
    expected = {name: tuple(tensor.shape) for name, tensor in weights(model).items()}
    if problems := _differences(expected, saved, where):
        raise AdapterError(problems)
    return model


def before_load(base: PreTrainedModel, saved: AdapterFiles) -> Untouched:
    """What `load` may change of the base, as it is before. Raises AdapterError: the configuration does not fit it."""
    with _fitting(saved):
        return untouched(base, LoraConfig.from_pretrained(str(saved.path)))


@contextmanager
def _fitting(saved: AdapterFiles) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # values that PEFT does not check fail wherever it first uses them
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AdapterError(Problem(f"does not fit its base {saved.base}: {reason}", str(saved.path))) from None


def load(base: PreTrainedModel, saved: AdapterFiles) -> PeftModel:
    """Put a saved adapter on its base.

    Raises AdapterError: as `attach_saved`; a tensor holds NaN or inf.
    """
    model = attach_saved(base, saved)
    tensors = _read_tensors(saved.path / WEIGHTS_FILE)
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise AdapterError(Problem(f"{len(odd)} tensors hold no fractions, among them {_few(odd)}", str(saved.path)))
    if bad := _not_finite(tensors):
        raise AdapterError(Problem(f"{len(bad)} tensors hold NaN or inf, among them {_few(bad)}", str(saved.path)))
    result = set_peft_model_state_dict(model, tensors)
    if lost := list(result.unexpected_keys):  # PEFT renames some modules as it loads, and says nothing of what it loses
        raise AdapterError(
            Problem(f"PEFT finds no place for {len(lost)} tensors, among them {_few(lost)}", str(saved.path))
        )
    return model.eval()


def count(model: PeftModel, start: AdapterInit) -> Count:
    """Count parameters exactly, on any device, the meta device too."""
    trainable, total = model.get_nb_trainable_parameters()
    return Count(trainable, total, file_bytes(start.published(weights(model))))


def _wrap(base: nn.Module, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # packages of quantized bases greet as PEFT finds them
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft corrects it for Conv1D, and says so
        warnings.filterwarnings("ignore", message=".*was renamed from.*")
        base_name = config.base_model_name_or_path
        model = get_peft_model(base, config)
    config.base_model_name_or_path = base_name  # peft put there what the base calls itself
    return model


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _differences(expected: Mapping[str, tuple[int, ...]], saved: AdapterFiles, where: str) -> list[Problem]:
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
