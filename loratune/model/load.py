"""Loading the tokenizer and the base model: from where, in which dtype, on which device."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem
from loratune.model import checks, quantization, upstream
from loratune.model.base_files import Files, copy_mapped
from loratune.model.device import compute_dtype, device
from loratune.model.source import (
    ModelSource,
    check_directory_code,
    check_hub_kernels,
    check_repository_code,
    local_or_hub,
    locate,
)
from loratune.system import launcher
from loratune.system.sandbox import is_rust_panic, run_with_time_limit

_log = logging.getLogger(__name__)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_config(section: ModelSection) -> Any:
    """The model's configuration, without its weights. It is that of the GGUF file where there is no other.

    Raises:
        ModelError: The model does not exist or cannot be had from the hub; it is no decoder-only causal language model,
            or needs remote code that is not trusted; it is to be quantized and is quantized already.
    """
    return _read_config(section, locate(section))


def load_tokenizer(section: ModelSection, chat_template: str | None = None) -> Any:
    """The model's tokenizer, or that of an adapter directory, which has no model configuration.

    Args:
        section: The settings of the model.
        chat_template: Path of a Jinja file whose text replaces the tokenizer's own template.

    Raises:
        ModelError: As `load_config`; the tokenizer cannot be read, or the template takes too long.
        ConfigError: The template cannot be read, or is none.
    """
    path = Path(local_or_hub(section.name_or_path))
    source = ModelSource(str(path))
    if (path / "config.json").is_file() or not (path / "tokenizer_config.json").is_file():
        source = locate(section)
        _read_config(section, source)  # AutoTokenizer reads it too, and would blame the tokenizer for what is wrong
    file = source.gguf_unless("tokenizer_config.json", "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **file, **_trusted_origin(section))
        checks.check_growth(tokenizer, section.name_or_path)
        run_with_time_limit(lambda: tokenizer("loratune"))  # some of its configuration is only read when it is used
    except BaseException as error:  # a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        raise checks.unreadable(Code.MODEL_TOKENIZER_UNREADABLE, section, error) from None
    if chat_template is not None:
        tokenizer.chat_template = checks.template_text(chat_template)
        checks.check_template(tokenizer, chat_template)
    return tokenizer


def load_base(section: ModelSection) -> PreTrainedModel:
    """The base model with its weights, on the GPU if there is one, in evaluation mode. A GGUF file is dequantized.

    Later changes of its files do not change the model. Whether the machine can hold it is `check_machine`'s to say.

    Raises:
        ModelError: As `load_config`; weights are missing or damaged, change while they are read, or do not fit the
            configuration; a quantized base lacks its packages or cannot be trained.
    """
    source = locate(section)
    config = _read_config(section, source)
    quantization_config = quantization.loading_config(section, config, compute_dtype(section))
    is_packed = quantization_config is not None or quantization.record_of(config.to_dict()) is not None
    before = files(section, read=False)
    try:
        with _quietly(source):
            model, info = AutoModelForCausalLM.from_pretrained(
                source.name,
                config=config,
                dtype=compute_dtype(section),
                quantization_config=quantization_config,
                device_map=_device_map(section, packed=is_packed),
                attn_implementation=section.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_complete` reports them with their names
                **source.gguf_unless(),
                **_trusted_origin(section),
            )
    except checks.LOADING_ERRORS as error:
        if problems := list(checks.damaged_weights(section)):
            raise ModelError(problems) from None
        raise checks.unreadable(Code.MODEL_UNREADABLE, section, error) from None
    _check_unchanged(before)  # copying from a truncated file would end the process
    copy_mapped(model)
    _check_unchanged(before)
    checks.check_complete(model, info, section.name_or_path)
    quantization.check_trainable(model, section.name_or_path)
    for module in model.modules():
        upstream.keep_4bit_backward(module)
    model.generation_config = GenerationConfig()  # a base's own sampling defaults would change greedy decoding
    return model.eval()


def files(section: ModelSection, *, read: bool = True) -> Files:
    """The files that a base is loaded from, in their present state; none if it is on the hub and not in the cache.

    Args:
        section: The settings of the model.
        read: As in `Files`.
    """
    name, file = section.name_or_path, section.gguf_file
    directory = Path(local_or_hub(name))
    if not directory.is_dir():
        cached = try_to_load_from_cache(name, file or "config.json", revision=section.revision)
        if not isinstance(cached, str):
            return Files(None)
        directory = Path(cached).parents[len(Path(file).parts) - 1 if file else 0]
    return Files(directory, directory / file if file else None, read=read)


def _check_unchanged(before: Files) -> None:
    if paths := before.changed():
        what, fix = "was changed while it was being loaded", "start again"
        raise ModelError([Problem(Code.MODEL_WEIGHTS_CHANGED, what, path, fix=fix) for path in paths])


def _device_map(section: ModelSection, *, packed: bool) -> Any:
    """Where `from_pretrained` is to put the weights; packed ones cannot be moved later."""
    if section.device_map is not None:
        return section.device_map
    if launcher.sharding():
        return None  # accelerate moves the weights from the machine's memory to the devices, shard by shard
    return {"": device()} if packed or torch.cuda.is_available() else None


def build_meta(config: Any, section: ModelSection | None = None) -> PreTrainedModel:
    """The model on the meta device: every shape and no values, whatever its size. A quantized one is dense here.

    Raises:
        ModelError: No causal language model can be built from this configuration.
    """
    section = section or ModelSection(name_or_path=config.name_or_path or config.model_type)
    try:
        with torch.device("meta"):
            remote = "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
            loaded = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING  # its class, by an earlier call
            pinned = {"code_revision": section.revision} if section.trust_remote_code and remote and not loaded else {}
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=section.trust_remote_code, dtype=compute_dtype(section), **pinned
            )
    except Exception as error:  # values that the configuration accepts may fail wherever a layer first uses them
        raise checks.unreadable(Code.MODEL_UNREADABLE, section, error) from None


def unpacked(base: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    """The model in which targets are looked for: `base`, or a dense model of its shape on the meta device.

    The layers of GPTQ, AWQ and the like are no `nn.Linear`; those of bitsandbytes are.
    """
    record = quantization.record_of(base.config.to_dict())
    is_dense = record is None or quantization.method(record) == "bitsandbytes"
    return base if is_dense else build_meta(base.config, section)


def pad_id(tokenizer: Any) -> int:
    """The id of padding, which is masked by position: the end of sequence will do where the tokenizer defines none."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def tokenizer_bytes(tokenizer: Any) -> int:
    """About how many bytes a tokenizer takes on the disk; nearly all of them are in one file."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return len(fast.to_str(pretty=True).encode()) if fast is not None else 0


def context_length(config: Any) -> int | None:
    """How many tokens the model was built for, if its configuration says so."""
    values = config.get_text_config().to_dict()
    length = values.get("max_position_embeddings") or values.get("n_positions")
    return int(length) if length else None


def _read_config(section: ModelSection, source: ModelSource) -> Any:
    origin, file = _trusted_origin(section), source.gguf_unless("config.json")
    try:
        if not file:
            checks.check_sizes(PreTrainedConfig.get_config_dict(source.name, **origin)[0], section.name_or_path)
        config = AutoConfig.from_pretrained(source.name, **file, **origin)
    except Exception as error:  # a wrong value in config.json fails wherever it is first used
        raise checks.unreadable(Code.MODEL_CONFIG_UNREADABLE, section, error) from None
    check_hub_kernels(config, section.name_or_path)
    checks.check_decoder(config, section)
    record = quantization.record_of(config.to_dict())
    quantization.check_not_quantized(record, section.name_or_path, section.quantization)
    return config


@contextmanager
def _quietly(source: ModelSource) -> Iterator[None]:
    """Keep libraries of quantized bases from printing to stdout, and transformers from showing bars for a GGUF file."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) if source.gguf_file else nullcontext():
        yield


def _trusted_origin(section: ModelSection) -> dict[str, Any]:
    """Revision and trust for `from_pretrained`, after a check that trusted files name no code of another repository."""
    name = local_or_hub(section.name_or_path)
    if section.trust_remote_code and Path(name).is_dir():
        check_directory_code(Path(name))
    elif section.trust_remote_code:
        check_repository_code(name, section.revision)
    return section.model_dump(include={"revision", "trust_remote_code"})
