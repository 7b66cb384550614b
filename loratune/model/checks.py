"""What can be wrong with a model's files: what a library could not load, implausible values, damaged weights."""

import logging
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem
from loratune.events import progress
from loratune.model import gguf, upstream
from loratune.model.source import cached_directory, local_or_hub, summary
from loratune.system.environment import cache_fix
from loratune.system.templates import TEMPLATE_ERRORS, template_error_reason

_log = logging.getLogger(__name__)

LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError)
"""What transformers, torch and safetensors raise for a model that cannot be loaded."""

# --- What a library could not load


def unreadable(part: str, section: ModelSection, error: BaseException) -> ModelError:
    """The error for a part of a model that a library failed to load.

    Args:
        part: "configuration", "tokenizer" or "model".
        section: The settings of the model.
        error: What the library raised; a ModelError is returned as it is.
    """
    if isinstance(error, ModelError):
        return error
    if "trust_remote_code" in str(error):
        what = "the model needs code from its repository"
        fix = "read that code, then set model.trust_remote_code: true and model.revision to the commit you read"
        return ModelError(Problem(Code.MODEL_FOREIGN_CODE, what, section.name_or_path, fix=fix))
    what = f"the {part} cannot be loaded: {summary(error)}"
    return ModelError(Problem(Code.MODEL_UNREADABLE, what, section.name_or_path, fix=cache_fix(error)))


def damaged_weights(section: ModelSection) -> Iterator[Problem]:
    """The weight files of a model that cannot be read; the libraries' own errors do not name the file."""
    directory = cached_directory(section)
    if directory is None:
        return
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        with path.open("rb") as file:
            is_pointer = file.read(len(gguf.LFS_START)) == gguf.LFS_START
        if is_pointer:
            yield gguf.lfs_pointer(path)
        elif path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                what = f"damaged or cut off: {summary(error)}"
                yield Problem(Code.MODEL_DAMAGED, what, str(path), fix="download it again")


def check_present(section: ModelSection) -> None:
    """Look at a model directory's files of weights without loading them.

    Raises:
        ModelError: There is none, or one is damaged.
    """
    directory = Path(local_or_hub(section.name_or_path))
    if section.gguf_file is not None or not directory.is_dir():
        return
    if not any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        what, fix = "the directory has no weights, neither *.safetensors nor *.bin", "get the whole model"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, section.name_or_path, fix=fix))
    try:
        problems = list(damaged_weights(section))
    except OSError as error:
        raise unreadable("model", section, error) from None
    if problems:
        raise ModelError(problems)


# --- config.json

_MOST = {
    re.compile(r"(num|n)(_\w+)?_(layers?|blocks)|(en|de)coder_layers"): 4096,
    re.compile(r"(num|n)(_\w+)?_experts"): 65_536,
    re.compile(r"num_labels"): 1_000_000,
    re.compile(r"hidden_size|intermediate_size|n_embd|d_model"): 10_000_000,
}
"""Key → its largest plausible value. The largest models have some hundred layers, and some hundred experts in each;
transformers creates an object for each of them, and a name for each label; an adapter has numbers for each width."""


def check_sizes(values: Any, where: str) -> None:
    """Check the counts in a config.json before any library builds something of them.

    Args:
        values: The content of config.json.
        where: The name of the model.

    Raises:
        ModelError: `architectures` is no list of names; a number is so large that building the model would take hours,
            or all memory.
    """
    if not isinstance(values, Mapping):
        return
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or any(not isinstance(name, str) for name in architectures):
        what, fix = "must be a list of class names", 'write it as ["LlamaForCausalLM"]'
        raise ModelError(Problem(Code.MODEL_UNREADABLE, what, where, "architectures", fix))
    problems = []
    for key, count in _counts(values):
        name = key.rpartition(".")[2]
        most = next((most for pattern, most in _MOST.items() if pattern.fullmatch(name)), None)
        if most is not None and count > most:
            number = f"{count:,}" if count < 10**18 else "more than 10^18"
            what = f"is {number}, and must be at most {most:,}"
            problems.append(Problem(Code.MODEL_UNREADABLE, what, where, key, "correct config.json"))
    if problems:
        raise ModelError(problems)


def _counts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers above 1 with their keys, also those of nested configurations."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{prefix}{key}.")
        elif isinstance(value, int) and value > 1:
            yield f"{prefix}{key}", value


def check_decoder(config: Any, section: ModelSection) -> None:
    """Check that a configuration is that of a decoder-only causal language model.

    Raises:
        ModelError: It is not.
    """
    architectures = config.architectures or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or section.trust_remote_code
    other_head = architectures and not any(
        name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures
    )
    if config.is_encoder_decoder or not known or other_head:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a causal language model"
        what = f"{', '.join(architectures) or config.model_type} (model type {config.model_type}) is {kind}"
        fix = "loratune adapts decoder-only language models"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, section.name_or_path, fix=fix))


# --- Weights

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@progress("checking the weights of the base")
def check_finite(model: PreTrainedModel, name: str) -> None:
    """Look at every weight once.

    Raises:
        ModelError: One is NaN or inf.
    """
    summable = (torch.float16, torch.bfloat16, torch.float32)  # the sum of a tensor with NaN or inf is NaN or inf
    bad = [
        path
        for path, weight in model.named_parameters()
        if weight.dtype in summable
        and not upstream.is_4bit(weight)
        and not weight.detach().sum(dtype=torch.float32).isfinite()
    ]
    if bad:
        what = f"{len(bad)} of its tensors hold NaN or inf, among them {', '.join(bad[:3])}"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, name, fix="download it again"))


def check_complete(model: PreTrainedModel, info: Any, name: str) -> None:
    """Check that weights and model agree.

    Args:
        model: The model.
        info: What `from_pretrained(output_loading_info=True)` returned with it.
        name: The name of the model.

    Raises:
        ModelError: Tensors are missing, of another shape, or left over although the model has others like them.
    """
    problems, fix = [], "use weights and config.json of the same model"
    if missing := sorted(info["missing_keys"]):
        what = f"the files lack {len(missing)} tensors of the model, among them {', '.join(missing[:3])}"
        code, download = Code.MODEL_DAMAGED, "they would be random; get the whole model"
        problems.append(Problem(code, what, name, fix=download))
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = ", ".join(f"{key} {tuple(actual)} for {tuple(expected)}" for key, actual, expected in mismatched[:3])
        what = f"{len(mismatched)} tensors have another shape than config.json asks for, among them {shapes}"
        problems.append(Problem(Code.MODEL_DAMAGED, what, name, fix=fix))
    if extra := sorted(_relevant(model, info["unexpected_keys"])):
        what = f"the files hold {len(extra)} tensors more than config.json asks for, among them {', '.join(extra[:3])}"
        problems.append(Problem(Code.MODEL_DAMAGED, what, name, fix=fix))
    if problems:
        raise ModelError(problems)


def _relevant(model: PreTrainedModel, unexpected: Iterable[str]) -> Iterator[str]:
    """The unexpected tensors that matter: those of a further layer or expert like the model's own, and biases.

    Others are harmless: buffers of other versions, heads of other tasks. transformers has removed what the model class
    ignores on purpose, and layers that predict further tokens, but those only for the released model's number of
    layers.
    """
    config = model.config.get_text_config().to_dict()
    layers, predicting = config.get("num_hidden_layers") or 0, config.get("num_nextn_predict_layers") or 0
    ignored = {str(layers + number) for number in range(predicting)}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    patterns = {_NUMBER.sub("*", name) for name in known}
    for name in unexpected:
        module, _, last = name.rpartition(".")
        number = _NUMBER.search(name)
        further = number is not None and number.group() not in ignored and _NUMBER.sub("*", name) in patterns
        if further or (last == "bias" and f"{module}.weight" in known):
            yield name


# --- Chat template


def template_text(path: str) -> str:
    """The text of a chat template file.

    Raises:
        ConfigError: It cannot be read, or is empty.
    """
    key, fix = "data.chat_template", "name a Jinja file"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(Problem(Code.TEMPLATE_INVALID, f"cannot be read: {cause}", path, key, fix)) from None
    if not text.strip():
        fix = "name a Jinja file with a template in it"
        raise ConfigError(Problem(Code.TEMPLATE_INVALID, "the file is empty", path, key, fix))
    return text


def check_template(tokenizer: Any, path: str) -> None:
    """Compile the tokenizer's chat template, which was read from a file, and render a conversation with it.

    The template may refuse this conversation for reasons of its own; the user's rows decide about that later.

    Raises:
        ConfigError: The file is no template.
    """
    key = "data.chat_template"
    try:
        if refusal := _render_question(tokenizer):
            _log.debug("the chat template refuses a single question\n%s", refusal)
    except TEMPLATE_ERRORS as error:
        line = error.lineno if isinstance(error, TemplateSyntaxError) else None
        where = f"{path}:{line}" if line else path
        what = f"not a Jinja template: {template_error_reason(error)}"
        raise ConfigError(Problem(Code.TEMPLATE_INVALID, what, where, key, "correct it")) from None


def _render_question(tokenizer: Any) -> str:
    """The traceback of the template's refusal, empty without one. Raises one of `TEMPLATE_ERRORS`."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "loratune?"}], tokenize=False)
    except TEMPLATE_ERRORS:
        raise
    except Exception:
        return traceback.format_exc()
    return ""
