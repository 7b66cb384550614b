"""Loads the tokenizer and the base model: source, dtype and device, and whether this machine can hold the base."""

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem, is_rust_panic
from loratune.events import progress
from loratune.kernels import use_row_angles
from loratune.model import checks, fingerprints, tensor_files, upstream
from loratune.model.dequantization import packed_format
from loratune.model.fingerprints import FileStates
from loratune.model.quantization import (
    check_bitsandbytes,
    check_known,
    dense_config,
    held_as,
    loading_config,
    method,
    record_of,
)
from loratune.model.source import KEY, QUANTIZATION_KEY, ModelSource, local_or_hub, locate
from loratune.system import accelerator, hub_kernels, launcher, turns
from loratune.system.accelerator import device as device

_LOADING_ERRORS = (
    OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError,
)  # fmt: skip
"""What transformers, torch and safetensors raise for a model that cannot be loaded."""


@upstream.quiet_transformers()
def load_config(section: ModelSection, source: ModelSource | None = None) -> Any:
    """The model's configuration, without its weights. A GGUF file has one if the directory does not.

    Args:
        section: The settings of the model.
        source: The model, if it is located already.

    Raises:
        ModelError: The model does not exist or cannot be downloaded from the hub; it is not a decoder-only
            causal language model, or needs remote code that is not trusted; it is quantized twice, or by a method or
            variant that is not supported.
    """
    source = source or locate(section)
    try:
        origin = source.gguf_unless("config.json") | _trusted_origin(section)
        if "gguf_file" not in origin:  # which takes seconds to read
            values, _ = PreTrainedConfig.get_config_dict(source.name, **origin)
            checks.check_values(values, f"{source.name}/config.json")  # transformers makes lists of these lengths
        config = AutoConfig.from_pretrained(source.name, **origin)
    except Exception as error:  # a wrong value in config.json fails wherever it is first used
        raise checks.unreadable("configuration", section, error) from None
    checks.check_hub_kernels(config, section.name_or_path)
    checks.check_decoder(config, section)
    record = record_of(config.to_dict())
    if record is None or packed_format(record, section.name_or_path) is not None:
        return config
    check_known(record, section.name_or_path)
    if section.quantization != "none":
        what = f"{section.quantization} cannot be applied: the base is quantized already ({method(record)})"
        fix = "set it to none, or use the base that is not quantized"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, section.name_or_path, QUANTIZATION_KEY, fix))
    return config


@upstream.quiet_transformers()
def load_tokenizer(section: ModelSection, chat_template: str | None = None) -> Any:
    """The model's tokenizer, or that of an adapter directory, which has no model configuration.

    Args:
        section: The settings of the model.
        chat_template: Path of a Jinja file whose text replaces the tokenizer's own template.

    Raises:
        ModelError: As `load_config`; the tokenizer cannot be read.
        ConfigError: The template cannot be read, or is not valid.
    """
    path = Path(local_or_hub(section.name_or_path))
    source = ModelSource(str(path))
    if (path / "config.json").is_file() or not (path / "tokenizer_config.json").is_file():
        source = locate(section)
        load_config(section, source)  # AutoTokenizer reads it too, and would blame the tokenizer for what is wrong
    file = source.gguf_unless("tokenizer_config.json", "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **file, **_trusted_origin(section))
        tokenizer("loratune")  # some of its configuration is only read when it is used
    except BaseException as error:  # a panic of tokenizers is not an Exception
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        raise checks.unreadable("tokenizer", section, error) from None
    if chat_template is not None:
        checks.read_template(tokenizer, chat_template)
    return tokenizer


@progress("loading the base")
@upstream.quiet_transformers()
def load_base(section: ModelSection) -> PreTrainedModel:
    """The base model with its weights, on the GPU if there is one, in evaluation mode. A GGUF file and the formats of
    `dequantization` are dequantized, tensor by tensor.

    Later changes of its files do not change the model. Whether the machine can hold it is `check_machine`'s to say.

    Raises:
        ModelError: As `load_config`; weights are missing or damaged, change while they are read, or do not fit the
            configuration; a quantized base lacks its packages or cannot be trained.
    """
    source = locate(section)
    config = load_config(section, source)
    before = FileStates(section)
    from_pretrained, config, origin = _loader(section, source, config)
    quantization_config = loading_config(section, config, dtype := compute_dtype(section))
    is_packed = quantization_config is not None or record_of(config.to_dict()) is not None
    device_map: Any = section.device_map
    # Packed weights cannot be moved later. Sharded ones are moved by accelerate, shard by shard.
    if device_map is None and not launcher.sharding() and (is_packed or accelerator.has_gpu()):
        device_map = {"": device()}
    quantized = import_module("loratune.kernels.quantized") if held_as(section, config) != "none" else None
    if quantized is not None:  # it imports bitsandbytes, which few bases need
        quantized.use_operations()
    try:
        # Libraries of quantized bases print to stdout, and transformers shows bars for a GGUF file.
        bars = redirect_stderr(io.StringIO()) if source.gguf_file else nullcontext()
        with turns.stdout_to(io.StringIO()), bars, hub_kernels.hidden():
            model, info = from_pretrained(
                config=config,
                dtype=dtype,
                quantization_config=quantization_config,
                device_map=device_map,
                attn_implementation=section.attn_implementation,
                output_loading_info=True,
                use_kernels=False,  # those of the hub
                ignore_mismatched_sizes=True,  # `check_complete` reports them with their names
                **origin,
            )
    except _LOADING_ERRORS as error:
        if problems := list(checks.damaged_weights(section)):
            raise ModelError(problems) from None
        raise checks.unreadable("model", section, error) from None
    before.check_unchanged()  # copying from a truncated file would end the process
    tensor_files.copy_mapped(model)
    before.check_unchanged()
    model.name_or_path = model.config.name_or_path = source.name
    checks.check_complete(model, info, section.name_or_path)
    checks.check_text(model, section.name_or_path)
    if quantized is not None:
        quantized.cast_dense_weights(model, dtype)
        quantized.dequantize_in_use(model)
    use_row_angles(model)
    model.generation_config = GenerationConfig()  # a base's own sampling defaults would change greedy decoding
    return model.eval()


def _loader(section: ModelSection, source: ModelSource, config: Any) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """What loads a base: `from_pretrained` of a class, the configuration for it, and where it reads the weights.

    The weights of a quantized release are those of a dense one, which are computed when transformers reads them.
    """
    if packed_format(record_of(config.to_dict()), section.name_or_path) is None:
        origin = {"pretrained_model_name_or_path": source.name, **source.gguf_unless(), **_trusted_origin(section)}
        return checks.auto_class(config).from_pretrained, config, origin
    try:
        weights: dict[str, Any] = {**tensor_files.release_tensors(section, config)}
    except tensor_files.NotStreamableError as reason:
        fix = "use a release that has model.safetensors or its index"
        what = f"the quantized base cannot be read: {reason}"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, section.name_or_path, fix=fix)) from None
    if launcher.sharding() == "deepspeed":  # ZeRO-3 does not wait until a weight is needed
        weights = {name: tensor.read() for name, tensor in weights.items()}
    empty = build_meta(dense_config(config), section)
    return type(empty).from_pretrained, empty.config, {"pretrained_model_name_or_path": None, "state_dict": weights}


@dataclass(frozen=True)
class Base:
    """A base model that a run has loaded.

    Attributes:
        model: The model with its weights.
        fingerprint: Of the model.
        files: The state of its files when they were read.
        config: The configuration in its files, with the record of their quantization.
        notes: Lines for the user on what was loaded, and how the machine computes it.
    """

    model: PreTrainedModel
    fingerprint: str
    files: FileStates
    config: Any
    notes: list[str]

    @property
    def quantized(self) -> str | None:
        """The method by which its files hold it quantized; None if they do not."""
        record = record_of(self.config.to_dict())
        return method(record) if record else None


def load_for_run(section: ModelSection, group: launcher.Group) -> Base:
    """The base of a run, with its fingerprint.

    Args:
        section: The settings of the model.
        group: The processes of the run, each of which loads the base.

    Raises:
        ModelError: As `load_base`; the base has weights that are not finite, or processes have loaded different bases.
    """
    files = FileStates(section)
    model = load_base(section)
    kept = files.kept_results(model.device)
    kept.once("finite", type(None), partial(checks.check_finite, model, section.name_or_path))
    fingerprint: str = kept.once("fingerprint", str, partial(fingerprints.fingerprint, model))
    if group.broadcast(fingerprint) != fingerprint:
        what = f"the base on {launcher.host()} differs from that of the main process"
        raise ModelError(Problem(Code.MODEL_CHANGED, what, section.name_or_path, KEY, "use the same files everywhere"))
    config = load_config(section)
    return Base(model, fingerprint, files, config, [*tensor_files.notes(section, config), *machine_notes(section)])


@upstream.quiet_transformers()
def build_meta(config: Any, section: ModelSection | None = None) -> PreTrainedModel:
    """The model on the meta device: every shape and no values, whatever its size. A quantized one is dense here.

    Raises:
        ModelError: No causal language model can be built from this configuration.
    """
    section = section or ModelSection(name_or_path=config.name_or_path or config.model_type)
    try:
        with torch.device("meta"):
            has_code = "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
            is_imported = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING  # by an earlier call
            needs_code = section.trust_remote_code and has_code and not is_imported
            made: PreTrainedModel = checks.auto_class(config).from_config(
                copy.deepcopy(config),  # transformers sets its dtype
                trust_remote_code=section.trust_remote_code,
                dtype=compute_dtype(section),
                **({"code_revision": section.revision} if needs_code else {}),
            )
            return made
    except Exception as error:  # values that the configuration accepts may fail wherever a layer first uses them
        raise checks.unreadable("model", section, error) from None


def dense_model(base: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    """The model in which targets are looked for: `base`, or a dense model of its shape on the meta device.

    The layers of GPTQ, AWQ and the like are not `nn.Linear`; those of bitsandbytes are.
    """
    record = record_of(base.config.to_dict())
    is_dense = record is None or method(record) == "bitsandbytes"
    return base if is_dense else build_meta(base.config, section)


def pad_id(tokenizer: Any) -> int:
    """The id of padding, which is masked by position; the end of sequence is used if the tokenizer defines none."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def tokenizer_bytes(tokenizer: Any) -> int:
    """About how many bytes a tokenizer takes on the disk; nearly all of them are in one file."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return len(fast.to_str(pretty=True).encode()) if fast is not None else 0


def context_length(config: Any) -> int | None:
    """The context length of the model in tokens; None if its configuration does not define it."""
    values = config.get_text_config().to_dict()
    length = values.get("max_position_embeddings") or values.get("n_positions")
    return int(length) if length and length > 1 else None  # -1 and the like say that there is no limit


def hidden_size(config: Any) -> int | None:
    """The width of the model: values of each token between two layers; None where its configuration does not say."""
    return _largest(config, "hidden_size")


def layers(config: Any) -> int | None:
    """How many layers a token passes through; None where its configuration does not say."""
    return _largest(config, "num_hidden_layers")


def _largest(config: Any, name: str) -> int | None:
    """A number of the decoder's configuration; of one that has it in parts, the largest."""
    text = config.get_text_config(decoder=True)
    parts = [text] if hasattr(text, name) else [getattr(text, part) for part in text.sub_configs]
    values = (getattr(part, name, None) for part in parts)
    return max((value for value in values if type(value) is int), default=None)


def _trusted_origin(section: ModelSection) -> dict[str, Any]:
    """Revision and trust for `from_pretrained`, after a check that trusted files name no code of another repository."""
    name = local_or_hub(section.name_or_path)
    if section.trust_remote_code and Path(name).is_dir():
        checks.check_directory(Path(name))
    elif section.trust_remote_code:
        checks.check_repository(name, section.revision)
    return section.model_dump(include={"revision", "trust_remote_code"})


@dataclass(frozen=True)
class Machine:
    """The relevant properties of a machine.

    Attributes:
        gpu: Name of its GPU, None without one.
        bfloat16: Whether it multiplies in bfloat16 natively.
        bitsandbytes: Why bitsandbytes does not work; empty if it does.
    """

    gpu: str | None
    bfloat16: bool
    bitsandbytes: str


def this_machine() -> Machine:
    """The machine of this process. Imports bitsandbytes."""
    gpu = accelerator.name(device()) if accelerator.has_gpu() else None
    return Machine(gpu, automatic_dtype() == torch.bfloat16, upstream.bitsandbytes_lacks())


def check_machine(section: ModelSection, machine: Machine | None = None) -> None:
    """Check that the machine can hold a model in the dtype or quantization that is set, without looking at the model.

    Args:
        section: The settings of the model.
        machine: The machine; by default that of this process.

    Raises:
        ConfigError: bfloat16 on a GPU that only emulates it; 8bit or 4bit where bitsandbytes does not work; flash
            attention without its package or a GPU.
    """
    problems = []
    attention = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if (name := section.attn_implementation or "") in attention and not attention[name]():
        what, fix = f"{name} needs a CUDA GPU and its package, such as flash-attn", "leave it out, or set it to sdpa"
        problems.append(Problem(Code.MODEL_UNSUPPORTED, what, key="model.attn_implementation", fix=fix))
    if section.dtype == "bfloat16" or section.quantization != "none":  # else bitsandbytes is not imported
        machine = machine or this_machine()
        if section.dtype == "bfloat16" and machine.gpu and not machine.bfloat16:
            what, fix = f"{machine.gpu} does not compute in bfloat16", "set it to float16 or float32"
            problems.append(Problem(Code.MODEL_UNSUPPORTED, what, key="model.dtype", fix=fix))
        check_bitsandbytes(section.quantization, machine.bitsandbytes)
    if problems:
        raise ConfigError(problems)


def check_kernels(section: ModelSection, *, gpu: bool) -> None:
    """Raises ConfigError: a setting of training needs a GPU, and there is none, or a package that is not installed."""
    settings = section.model_dump(include={"device_map", "torch_compile"})
    settings["use_liger_kernel"] = section.use_liger_kernel is True
    what, fix = "needs a GPU, and this machine has none", "leave it out"
    problems = [
        Problem(Code.MODEL_UNSUPPORTED, what, key=f"model.{name}", fix=fix)
        for name, value in settings.items()
        if value and not gpu
    ]
    if section.use_liger_kernel is True and gpu and not is_liger_kernel_available():
        what, fix = "needs the package liger-kernel", "leave it out, or: pip install liger-kernel"
        problems.append(Problem(Code.SYSTEM_MISSING_PACKAGE, what, key="model.use_liger_kernel", fix=fix))
    if problems:
        raise ConfigError(problems)


def machine_notes(section: ModelSection, machine: Machine | None = None) -> list[str]:
    """Lines on settings that work on this machine, but not well. Arguments as in `check_machine`."""
    if section.dtype == "float16":
        return ["model.dtype: float16 overflows above 65,504; bfloat16 and float32, one of which is auto, do not"]
    if section.dtype == "bfloat16" and not (machine.bfloat16 if machine else automatic_dtype() == torch.bfloat16):
        return ["model.dtype: this CPU has no instructions for bfloat16 and emulates it, slowly; auto is float32 here"]
    return []


def compute_dtype(section: ModelSection) -> torch.dtype:
    """The dtype of the frozen weights."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return named.get(section.dtype) or automatic_dtype()


def automatic_dtype() -> torch.dtype:
    """What `model.dtype: auto` is here: bfloat16 where the machine multiplies in it, else float32."""
    return torch.bfloat16 if accelerator.multiplies_bfloat16() else torch.float32
