"""Tokenizer and base model: where they come from, in which numbers, on which device."""

import io
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateSyntaxError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem
from loratune.model import gguf, hub, recorded_quantization, remote_code
from loratune.model.base_files import Files, copy_mapped
from loratune.model.device import compute_dtype, device
from loratune.model.faults import LOADING, damaged_weights, unreadable
from loratune.model.growth import check_growth
from loratune.model.quantization import check_trainable, keep_backward, settings
from loratune.model.sizes import check_sizes
from loratune.model.source import is_directory, local_or_hub
from loratune.model.weights import check_complete
from loratune.system import launcher
from loratune.system.sandbox import MEMORY, Apart, BeyondLimit, is_panic, limited
from loratune.system.uncompiled import UNCOMPILED, reason

_log = logging.getLogger(__name__)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@dataclass(frozen=True)
class _Found:
    """What transformers is given. name: an absolute path or a hub id; gguf: the absolute path of a GGUF file.

    on_hub: the file comes from there, and what lies beside it in the cache is chance.
    """

    name: str
    gguf: str | None = None
    on_hub: bool = False

    def instead_of(self, *files: str) -> dict[str, str]:
        """The GGUF file as a keyword for `from_pretrained`, unless the directory has one of these files."""
        if self.gguf is None or (not self.on_hub and any((Path(self.name) / file).is_file() for file in files)):
            return {}
        return {"gguf_file": self.gguf}


def load_config(section: ModelSection) -> Any:
    """The model's configuration, without its weights. It is that of the GGUF file where there is no other.

    Raises ModelError: path missing, repository absent, gated, offline and not cached; not a decoder-only causal
    language model; remote code needed and not allowed; quantization asked for, and the base comes quantized.
    """
    return _read_config(section, _find(section))


def load_tokenizer(section: ModelSection, chat_template: str | None = None) -> Any:
    """The model's tokenizer, or that of an adapter directory, which has no model configuration.

    chat_template: a Jinja file whose text replaces the tokenizer's own template.
    Raises ModelError: as `load_config`; the tokenizer cannot be read. Raises ConfigError: the template cannot be read,
    or is none.
    """
    path = Path(local_or_hub(section.name_or_path))
    found = _Found(str(path))
    if (path / "config.json").is_file() or not (path / "tokenizer_config.json").is_file():
        found = _find(section)
        _read_config(section, found)  # AutoTokenizer reads it too, and would report it as a fault of the tokenizer
    source = found.instead_of("tokenizer_config.json", "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.name, **source, **_origin(section))
        check_growth(tokenizer, section.name_or_path)
        limited(lambda: tokenizer("loratune"))  # values of its configuration are first looked at when it is used
    except BaseException as error:  # tokenizers raises plain Exception for a damaged file, and no Exception in a panic
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise unreadable("tokenizer", section, error) from None
    if chat_template is not None:
        tokenizer.chat_template = _read_text(chat_template)
        _check_syntax(tokenizer, chat_template)
    return tokenizer


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            Problem(f"cannot be read: {reason}", path, "data.chat_template", "name a Jinja file")
        ) from None


def _check_syntax(tokenizer: Any, path: str) -> None:
    """Raises ConfigError: the file is no template. Raises ModelError: the template goes on for ever."""
    where, key = path, "data.chat_template"
    if not tokenizer.chat_template.strip():
        raise ConfigError(Problem("the file is empty", where, key, "name a Jinja file with a template in it"))
    try:
        if refusal := Apart(lambda _: tokenizer)(_ask, MEMORY):
            _log.debug("the chat template refuses a single question\n%s", refusal)
    except BeyondLimit as error:
        raise ModelError(Problem(f"the chat template {error}", where, key, "mend it")) from None
    except UNCOMPILED as error:
        line = getattr(error, "lineno", None) if isinstance(error, TemplateSyntaxError) else None
        where = f"{path}:{line}" if line else path
        raise ConfigError(Problem(f"not a Jinja template: {reason(error)}", where, key, "mend it")) from None


def _ask(tokenizer: Any) -> str:
    """Compile the chat template, and render one question. It may refuse this one for any reason of its own; it is
    asked again with the user's. Returns the traceback of a refusal, if any. Raises one of `UNCOMPILED`."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "loratune?"}], tokenize=False)
    except (*UNCOMPILED, MemoryError):
        raise
    except Exception:
        return traceback.format_exc()
    return ""


def load_base(section: ModelSection) -> PreTrainedModel:
    """The base model with its weights, on the GPU if there is one, in evaluation mode. A GGUF file is unpacked.

    What becomes of its files afterwards has no effect on it. The machine can hold it, see `check_machine`. Raises
    ModelError: as `load_config`; weights that are missing, damaged, change while they are read, or do not fit the
    configuration; a base that comes quantized, and is without its packages or cannot be trained.
    """
    found = _find(section)
    config = _read_config(section, found)
    quantization = settings(section, config)
    packed = quantization is not None or recorded_quantization.found_in(config.to_dict()) is not None
    known = files(section, read=False)
    try:
        with _quietly(found):
            model, info = AutoModelForCausalLM.from_pretrained(
                found.name,
                config=config,
                dtype=compute_dtype(section),
                quantization_config=quantization,
                device_map=_device_map(section, packed=packed),
                attn_implementation=section.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with names
                **found.instead_of(),
                **_origin(section),
            )
    except LOADING as error:
        if problems := list(damaged_weights(section)):
            raise ModelError(problems) from None
        raise unreadable("model", section, error) from None
    _check_unchanged(known)  # a file that was cut off must not be copied from
    copy_mapped(model)
    _check_unchanged(known)
    check_complete(model, info, section.name_or_path)
    check_trainable(model, section.name_or_path)
    keep_backward(model)
    model.generation_config = GenerationConfig()  # a base's own sampling defaults would make greedy less than greedy
    return model.eval()


def files(section: ModelSection, *, read: bool = True) -> Files:
    """The files that a base is loaded from, as they are now; none, if it is on the hub and not in the cache.

    read: see `Files`.
    """
    name, file = section.name_or_path, section.gguf_file
    directory = Path(local_or_hub(name))
    if not directory.is_dir():
        cached = try_to_load_from_cache(name, file or "config.json", revision=section.revision)
        if not isinstance(cached, str):
            return Files(None)
        directory = Path(cached).parents[len(Path(file).parts) - 1 if file else 0]
    return Files(directory, directory / file if file else None, read=read)


def _check_unchanged(known: Files) -> None:
    if found := known.changed():
        raise ModelError([Problem("was changed while it was being loaded", path, fix="start again") for path in found])


def _device_map(section: ModelSection, *, packed: bool) -> Any:
    """Where `from_pretrained` is to put the weights; packed ones cannot be moved once they are there."""
    if section.device_map is not None:
        return section.device_map
    if launcher.sharding():
        return None  # accelerate takes it from the memory of the machine to the devices, piece by piece
    return {"": device()} if packed or torch.cuda.is_available() else None


def build_meta(config: Any, section: ModelSection | None = None) -> PreTrainedModel:
    """The model on the meta device: every shape and no numbers, whatever its size. A quantized one is dense here.

    Raises ModelError: no causal language model can be built from this configuration.
    """
    section = section or ModelSection(name_or_path=config.name_or_path or config.model_type)
    try:
        with torch.device("meta"):
            named = "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
            known = type(config) in AutoModelForCausalLM._model_mapping  # its class is there, from an earlier call
            pinned = {"code_revision": section.revision} if section.trust_remote_code and named and not known else {}
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=section.trust_remote_code, dtype=compute_dtype(section), **pinned
            )
    except Exception as error:  # values that the configuration accepts may fail wherever a layer first uses them
        raise unreadable("model", section, error) from None


def unpacked(base: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    """The model in which targets are looked for: `base`, or its plain twin on the meta device.

    The layers that GPTQ, AWQ and their like put into a model are no `nn.Linear`; those of bitsandbytes are.
    """
    found = recorded_quantization.found_in(base.config.to_dict())
    packed = found is not None and recorded_quantization.method(found) != "bitsandbytes"
    return build_meta(base.config, section) if packed else base


def pad_id(tokenizer: Any) -> int:
    """The id that fills padding. It is masked by position, so the end of sequence will do where none is defined."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def tokenizer_bytes(tokenizer: Any) -> int:
    """About what a tokenizer takes on the disk; nearly all of it is one file."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return len(fast.to_str(pretty=True).encode()) if fast is not None else 0


def context_length(config: Any) -> int | None:
    """How many tokens the model was built for, if its configuration says so."""
    values = config.get_text_config().to_dict()
    length = values.get("max_position_embeddings") or values.get("n_positions")
    return int(length) if length else None


def _find(section: ModelSection) -> _Found:
    """Look for the model, and fetch its GGUF file if it is on the hub.

    The file goes to transformers by its absolute path: a relative one it would look for in the working directory first.
    """
    name, file = section.name_or_path, section.gguf_file
    if is_directory(name, section.revision, file, trusted=section.trust_remote_code):
        directory = local_or_hub(name)
        return _Found(directory, str(Path(directory) / file) if file else None)
    if file is None:
        hub.check(name, section.revision)
        return _Found(name)
    fetched = hub.fetch(name, section.revision, file)
    gguf.check(fetched)
    return _Found(str(fetched.parent), str(fetched), on_hub=True)


def _read_config(section: ModelSection, found: _Found) -> Any:
    origin, instead = _origin(section), found.instead_of("config.json")
    try:
        if not instead:
            check_sizes(PreTrainedConfig.get_config_dict(found.name, **origin)[0], section.name_or_path)
        config = AutoConfig.from_pretrained(found.name, **instead, **origin)
    except Exception as error:  # a wrong value in config.json fails wherever it is first used
        raise unreadable("configuration", section, error) from None
    remote_code.check_kernels(config, section.name_or_path)
    _check_decoder(config, section)
    recorded = recorded_quantization.found_in(config.to_dict())
    recorded_quantization.check_asked(recorded, section.name_or_path, section.quantization)
    return config


@contextmanager
def _quietly(found: _Found) -> Iterator[None]:
    """Libraries of quantized bases greet on stdout, and transformers shows bars as it unpacks a GGUF file."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) if found.gguf else nullcontext():
        yield


def _origin(section: ModelSection) -> dict[str, Any]:
    """What goes to every `from_pretrained`, once no file names code of another repository. Raises ModelError."""
    name = local_or_hub(section.name_or_path)
    if section.trust_remote_code and Path(name).is_dir():
        remote_code.check_directory(Path(name))
    elif section.trust_remote_code:
        remote_code.check_files(hub.naming_code(name, section.revision), name)
    return section.model_dump(include={"revision", "trust_remote_code"})


def _check_decoder(config: Any, section: ModelSection) -> None:
    architectures = config.architectures or []
    architecture = ", ".join(architectures) or config.model_type
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or section.trust_remote_code
    other_head = architectures and not any(
        name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures
    )
    if config.is_encoder_decoder or not known or other_head:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a causal language model"
        what = f"{architecture} (model type {config.model_type}) is {kind}"
        raise ModelError(Problem(what, section.name_or_path, fix="loratune adapts decoder-only language models"))
