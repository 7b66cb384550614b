"""Tokenizer and base model: where they come from, in which numbers, on which device."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loratune import places
from loratune.config import ModelSection
from loratune.errors import ModelError, Problem

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_LFS = b"version https://git-lfs"


def load_config(section: ModelSection) -> Any:
    """The model's configuration, without its weights.

    Raises ModelError: path missing, repository absent, gated, offline and not cached; not a decoder-only causal
    language model; remote code needed and not allowed.
    """
    if not places.is_directory(section.name_or_path, section.revision, trusted=section.trust_remote_code):
        _check_on_hub(section.name_or_path, section.revision)
    try:
        config = AutoConfig.from_pretrained(places.local_or_hub(section.name_or_path), **_origin(section))
    except Exception as error:  # a wrong value in config.json fails wherever it is first used
        raise _unreadable("configuration", section, error) from None
    _check_decoder(config, section)
    return config


def load_tokenizer(section: ModelSection, chat_template: str | None = None) -> Any:
    """The model's tokenizer, or that of an adapter directory, which has no model configuration.

    chat_template: a Jinja file whose text replaces the tokenizer's own template.
    Raises ModelError: as `load_config`; the tokenizer, or the template, cannot be read.
    """
    path = Path(places.local_or_hub(section.name_or_path))
    if (path / "config.json").is_file() or not (path / "tokenizer_config.json").is_file():
        load_config(section)  # AutoTokenizer reads it too, and would report it as a fault of the tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(places.local_or_hub(section.name_or_path), **_origin(section))
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise _unreadable("tokenizer", section, error) from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(Problem(f"cannot be read: {error}", chat_template, "data.chat_template")) from None
    return tokenizer


def load_base(section: ModelSection) -> PreTrainedModel:
    """The base model with its weights, on the GPU if there is one, in evaluation mode.

    Raises ModelError: as `load_config`; weights that are missing, damaged, or do not fit the configuration.
    """
    config = load_config(section)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            places.local_or_hub(section.name_or_path),
            config=config,
            dtype=compute_dtype(section),
            quantization_config=_quantization(section),
            device_map={"": device()} if section.quantization != "none" or torch.cuda.is_available() else None,
            attn_implementation=section.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with names
            **_origin(section),
        )
    except _LOADING as error:
        if problems := list(_damaged_weights(section)):
            raise ModelError(problems) from None
        raise _unreadable("model", section, error) from None
    _check_complete(info, section)
    _keep_backward(model)
    model.generation_config = GenerationConfig()  # a base's own sampling defaults would make greedy less than greedy
    return model.eval()


def build_meta(config: Any, section: ModelSection | None = None) -> PreTrainedModel:
    """The model on the meta device: every shape and no numbers, whatever its size.

    Raises ModelError: no causal language model can be built from this configuration.
    """
    section = section or ModelSection(name_or_path=config.name_or_path or config.model_type)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=section.trust_remote_code, dtype=torch.bfloat16
            )
    except Exception as error:  # values that the configuration accepts may fail wherever a layer first uses them
        raise _unreadable("model", section, error) from None


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(section: ModelSection) -> torch.dtype:
    """The dtype of the frozen weights; `auto` is bfloat16 where the machine multiplies in it, else float32."""
    if section.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[section.dtype]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def fingerprint(base: PreTrainedModel) -> str:
    """SHA-256 of the shape of a model and a sample of its numbers: 64 values of each of 16 tensors, spread evenly."""
    config = base.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "quantization_config"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = list(base.named_parameters())
    for name, tensor in tensors[:: max(1, len(tensors) // 16)]:
        digest.update(name.encode() + tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def pad_id(tokenizer: Any) -> int:
    """The id that fills padding. It is masked by position, so the end of sequence will do where none is defined."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def context_length(config: Any) -> int | None:
    """How many tokens the model was built for, if its configuration says so."""
    length = config.to_dict().get("max_position_embeddings") or config.to_dict().get("n_positions")
    return int(length) if length else None


_LOADING = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError)


def _damaged_weights(section: ModelSection) -> Iterator[Problem]:
    """The weight files that are no such thing: what the libraries report does not name the file."""
    place = Path(places.local_or_hub(section.name_or_path))
    if not place.is_dir():
        cached = try_to_load_from_cache(section.name_or_path, "config.json", revision=section.revision)
        place = Path(str(cached)).parent
    for file in sorted([*place.glob("*.safetensors"), *place.glob("*.bin")]):
        with file.open("rb") as opened:
            pointer = opened.read(len(_LFS)) == _LFS
        if pointer:
            yield Problem("a Git LFS pointer, not the weights", str(file), fix="fetch them with `git lfs pull`")
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                yield Problem(f"damaged or cut off: {_summary(error)}", str(file), fix="fetch it again")


def _check_complete(info: Any, section: ModelSection) -> None:
    problems = []
    if missing := sorted(info["missing_keys"]):
        what = f"the weights lack {len(missing)} tensors of the model, among them {', '.join(missing[:3])}"
        problems.append(Problem(what, section.name_or_path, fix="they would be random; get the whole model"))
    if wrong := sorted(info["mismatched_keys"]):
        listed = ", ".join(f"{name} {tuple(has)} for {tuple(asks)}" for name, has, asks in wrong[:3])
        what = f"{len(wrong)} tensors have another shape than config.json asks for, among them {listed}"
        problems.append(Problem(what, section.name_or_path, fix="are weights and config.json of one model?"))
    if problems:
        raise ModelError(problems)


def _origin(section: ModelSection) -> dict[str, Any]:
    return section.model_dump(include={"revision", "trust_remote_code"})


def _quantization(section: ModelSection) -> BitsAndBytesConfig | None:
    if section.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if section.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(section),
        )  # fmt: skip
    return None


def _keep_backward(model: PreTrainedModel) -> None:
    """Stop 4-bit layers from repacking their weights for AVX512-BF16 at the first evaluation: no backward after it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_on_hub(name: str, revision: str | None) -> None:
    """Tell the ways apart in which a model is not to be had; transformers reports most of them as one OSError."""
    fix, key = "", places.KEY
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except hub.GatedRepoError:
        what = "this repository is gated"
        fix = f"accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
    except hub.RevisionNotFoundError:
        what, key = f"the repository has no revision {revision}", "model.revision"
    except hub.RepositoryNotFoundError:
        what = "no such directory, and no such repository on the hub"
        fix = "check the name; private ones need `hf auth login`"
    except hub.EntryNotFoundError:
        what = "the repository has no config.json, so it holds no model"
    except hub.HFValidationError:
        what = "no such directory, and not the id of a repository"
    except Exception as error:  # whatever the network stack of the day raises
        what = f"no such directory; the hub cannot be reached and the model is not cached ({_summary(error)})"
        fix = "check the path, or the connection"
    else:
        return
    raise ModelError(Problem(what, name, key, fix))


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


def _unreadable(part: str, section: ModelSection, error: Exception) -> ModelError:
    text = str(error)
    if "trust_remote_code" in text:
        fix = "read that code, then set model.trust_remote_code: true and model.revision to the commit you read"
        return ModelError(Problem("the model needs code from its repository", section.name_or_path, fix=fix))
    return ModelError(Problem(f"the {part} cannot be loaded: {_summary(error)}", section.name_or_path))


def _summary(error: Exception) -> str:
    """The first line of an error, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    announced = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return announced.partition(". ")[0]
