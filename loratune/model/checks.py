"""Checks of a model's files: weights that a library could not load, damaged weights, and code of third parties."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, hf_hub_download
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import ConfigError, ModelError, Problem, template_error_reason
from loratune.events import progress
from loratune.model import upstream
from loratune.model.source import LFS_START, files_of, lfs_pointer, local_or_hub, summary
from loratune.system.environment import cache_fix

_log = logging.getLogger(__name__)

# --- What a library could not load


def unreadable(part: str, section: ModelSection, error: BaseException) -> ModelError:
    """The error for a part of a model that a library failed to load.

    Args:
        part: "configuration", "tokenizer" or "model".
        section: The settings of the model.
        error: The error of the library; a ModelError is returned unchanged.
    """
    if isinstance(error, ModelError):
        return error
    if "trust_remote_code" in str(error):
        what = "the model needs code from its repository"
        fix = "read that code, then set model.trust_remote_code: true and model.revision to the commit you read"
        return ModelError(Problem(Code.MODEL_FOREIGN_CODE, what, section.name_or_path, fix=fix))
    what = f"the {part} cannot be loaded: {summary(error)}"
    code = Code.SYSTEM_MISSING_PACKAGE if isinstance(error, ImportError) else Code.MODEL_UNREADABLE
    return ModelError(Problem(code, what, section.name_or_path, fix=cache_fix(error)))


def damaged_weights(section: ModelSection) -> Iterator[Problem]:
    """The weight files of a model that cannot be read; the libraries' own errors do not name the file."""
    for path in files_of(section):
        try:
            with path.open("rb") as file:
                is_pointer = file.read(len(LFS_START)) == LFS_START
            if path.suffix == ".safetensors" and not is_pointer:
                with safe_open(path, framework="pt"):
                    pass
        except (SafetensorError, OSError) as error:
            what = f"damaged or cut off: {summary(error)}"
            yield Problem(Code.MODEL_DAMAGED, what, str(path), fix="download it again")
        else:
            yield from [lfs_pointer(path)] if is_pointer else []


def check_present(section: ModelSection) -> None:
    """Check the weight files of a model directory without loading them.

    Raises:
        ModelError: There are no such files, or one is damaged.
    """
    directory = Path(local_or_hub(section.name_or_path))
    if section.gguf_file is not None or not directory.is_dir():
        return
    if all(path.suffix == ".json" for path in files_of(section)):
        what, fix = "the directory has no weights, neither *.safetensors nor *.bin", "get the whole model"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, section.name_or_path, fix=fix))
    if problems := list(damaged_weights(section)):
        raise ModelError(problems)


# --- config.json

_COUNT = re.compile("(layers?|blocks?|depth|experts|labels)$")
_MOST = 30_000
"""How many layers, experts or labels a model may have: more than any has, and few enough to be built."""


def check_values(values: Any, file: str, *keys: str) -> None:
    """Check the names of classes in a configuration, or in its part under `keys`, and that building it ends.

    Raises:
        ModelError: `architectures` is not a list of names, or a count is too large.
    """
    for key, value in values.items() if isinstance(values, dict) else ():
        what, is_list = "", isinstance(value, list) and all(isinstance(name, str) for name in value)
        if key == "architectures" and value is not None and not is_list:
            what = f"{value!r:.80} is not a list of names of classes"
        elif isinstance(value, int | float) and value > _MOST and _COUNT.search(str(key)):
            what = f"{value} is more than {_MOST:,}"
        if what:
            fix = "use the config.json that belongs to the weights"
            raise ModelError(Problem(Code.MODEL_UNREADABLE, what, file, ".".join((*keys, key)), fix))
        check_values(value, file, *keys, str(key))


def check_decoder(config: Any, section: ModelSection) -> None:
    """Check that a configuration is that of a decoder-only causal language model.

    Raises:
        ModelError: It is not.
    """
    check_values(config.to_dict(), section.name_or_path)
    architectures = config.architectures or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or has_images(config) or section.trust_remote_code
    other_head = architectures and not any(
        name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures
    )
    if config.is_encoder_decoder or not known or other_head:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a causal language model"
        what = f"{', '.join(architectures) or config.model_type} (model type {config.model_type}) is {kind}"
        fix = "loratune adapts decoder-only language models"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, section.name_or_path, fix=fix))


def has_images(config: Any) -> bool:
    """Whether transformers loads a configuration only as a model of text and images, which computes text alone too."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    arguments = signature(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].forward).parameters.values()
    return {one.name for one in arguments if one.default is one.empty} <= {"self", "input_ids", "kwargs"}


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a base with this configuration."""
    return AutoModelForImageTextToText if has_images(config) else AutoModelForCausalLM


_ROUNDING = 0.05
"""By how much of their spread logits may differ by rounding."""


def check_text(model: PreTrainedModel, name: str) -> None:
    """Check that a model of text and images computes causal logits of text alone, in training too.

    Raises:
        ModelError: It does not.
    """
    weight = model.get_input_embeddings().weight
    if not has_images(model.config) or not weight.numel():  # DeepSpeed keeps the weights elsewhere
        return
    ids = torch.ones(2, 8, dtype=torch.long, device=weight.device)
    ids[1, -1] = 2
    try:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []), torch.no_grad():
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            one, other = model.eval()(input_ids=ids, use_cache=False).logits[:, :-1].float()
        is_causal = float((one - other).abs().max()) <= _ROUNDING * float(one.std())
        reason = "" if is_causal else "what it predicts depends on later tokens"
    except Exception as error:  # whatever a model does that expects an image
        reason = summary(error)
    model.eval()
    if reason:
        what, fix = f"{type(model).__name__} cannot be trained on text alone: {reason}", "use a language model"
        raise ModelError(Problem(Code.MODEL_UNSUPPORTED, what, name, fix=fix))


# --- Weights

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@progress("checking the weights of the base")
def check_finite(model: PreTrainedModel, name: str) -> None:
    """Check that all weights are finite.

    Raises:
        ModelError: A weight is NaN or inf.
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
    shapes = (f"{key} {tuple(actual)} for {tuple(expected)}" for key, actual, expected in info["mismatched_keys"])
    found = {
        "the files lack {} tensors of the model": sorted(info["missing_keys"]),
        "{} tensors have another shape than config.json asks for": sorted(shapes),
        "the files hold {} tensors more than config.json asks for": sorted(_relevant(model, info["unexpected_keys"])),
    }
    fix = "use all weights and config.json of the same model"
    if problems := [
        Problem(Code.MODEL_DAMAGED, f"{what.format(len(keys))}, among them {', '.join(keys[:3])}", name, fix=fix)
        for what, keys in found.items()
        if keys
    ]:
        raise ModelError(problems)


def _relevant(model: PreTrainedModel, unexpected: Iterable[str]) -> Iterator[str]:
    """The unexpected tensors that matter: those of a further layer or expert like the model's own, biases, and scales.

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
        is_own = f"{module}.weight" in known and (last == "bias" or last.startswith("weight_"))
        if further or is_own or name.removesuffix("_scale_inv") in known:
            yield name


# --- Chat template


def read_template(tokenizer: Any, path: str) -> None:
    """Read a tokenizer's chat template from a file, and compile it. It is rendered later, with the user's rows.

    Raises:
        ConfigError: The file cannot be read, or is not a template.
    """
    key, where = "data.chat_template", path
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        upstream.compile_chat_template(tokenizer.chat_template)
        what = "" if tokenizer.chat_template.strip() else "the file is empty"
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read: {error.strerror if isinstance(error, OSError) else 'it is not UTF-8'}"
    except (TemplateSyntaxError, SyntaxError, RecursionError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, TemplateSyntaxError) else path
        what = f"not a Jinja template: {template_error_reason(error)}"
    except ValueError:  # a number of too many digits, which is reported where the template is rendered
        _log.debug("the chat template cannot be compiled", exc_info=True)
        what = ""
    if what:
        raise ConfigError(Problem(Code.TEMPLATE_INVALID, what, where, key, "name a file with a Jinja template"))


# --- Code that a model's files name
#
# transformers runs a class that `auto_map` names as `module.Class` from the model's own repository, at the pinned
# revision, but one named as `other/repo--module.Class` from another repository, at its newest revision
# (transformers.dynamic_module_utils). The latter is refused, wherever it is in a JSON file of the model. So are the
# names of hub kernels, which transformers downloads and runs without asking (transformers.integrations.hub_kernels).

FILES = (
    "config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json",
    "image_processor_config.json", "chat_template.json", "special_tokens_map.json", "adapter_config.json",
)  # fmt: skip
"""Files of a repository in which transformers looks for the names of classes, or of another repository."""


_CLASS = re.compile(r"(?:\w+/)*\w+\.\w+")  # a module of the repository, in it or below, and a class
_FIX = "copy that code into the model's directory once you have read it, and name it there as module.Class"
_CODE = ("auto_map", "custom_generate", "custom_pipelines")


def check_directory(directory: Path) -> None:
    """`check_files` for a model's directory, at any depth; and no link to code leads out of it."""
    check_files(path for path in sorted(directory.rglob("*.json")) if path.is_file())
    root = directory.resolve()
    if outside := [path for path in sorted(directory.rglob("*.py")) if not path.resolve().is_relative_to(root)]:
        what, fix = "this code lies outside of the model's directory", "copy it there once you have read it"
        raise ModelError([Problem(Code.MODEL_FOREIGN_CODE, what, str(path), fix=fix) for path in outside])


def check_repository(name: str, revision: str | None) -> None:
    """`check_files` for those files of a repository that may name code, downloaded if they are not in the cache."""
    check_files(_downloads(name, revision), name)


def _downloads(name: str, revision: str | None) -> Iterator[Path]:
    """Files that the repository does not have, or that cannot be downloaded now, are left out; transformers does not
    get them either."""
    offline = False
    for file in FILES:
        try:
            yield Path(hf_hub_download(name, file, revision=revision, local_files_only=offline))
        except errors.LocalEntryNotFoundError:
            offline = True  # the library has tried several times, and would again for each file
        except errors.EntryNotFoundError:
            continue


def check_files(files: Iterable[Path], own: str = "") -> None:
    """Check that these JSON files name no code of another repository. Files that are not JSON are ignored.

    Args:
        files: The files.
        own: The id of the repository that they come from; empty for a directory.

    Raises:
        ModelError: With every name of such code.
    """
    problems = []
    for file in files:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            _log.debug("%s is not looked at for code", file, exc_info=True)
            continue
        names = _code_names(values)
        if own and file.name == "adapter_config.json" and isinstance(values, dict):
            names = chain(names, _code_names(values.get(key := "base_model_name_or_path"), (key,), inside=True))
        problems += [
            Problem(Code.MODEL_FOREIGN_CODE, what, str(file), ".".join(keys), _FIX)
            for keys, text in names
            if (what := _objection(keys, text, own))
        ]
    if problems:
        raise ModelError(problems)


_OWN_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
"""Implementations of experts that are not downloaded."""


def check_hub_kernels(config: Any, where: str) -> None:
    """Check that a model's configuration names no kernel of the hub.

    Raises:
        ModelError: With every kernel that it names.
    """
    parts = [("", config), *((f"{name}.", vars(config).get(name)) for name in config.sub_configs)]
    kernels = dict[str, str]()
    for prefix, part in parts:
        if part is not None and "/" in str(attention := upstream.attention(part)):
            kernels[f"{prefix}attn_implementation"] = attention
        if part is not None and (experts := upstream.experts(part)) not in _OWN_EXPERTS:
            kernels[f"{prefix}experts_implementation"] = experts
    if kernels:
        what, fix = "names a kernel of another repository, {}", "take it out of config.json"
        found = [Problem(Code.MODEL_FOREIGN_CODE, what.format(one), where, key, fix) for key, one in kernels.items()]
        raise ModelError(found)


def _code_names(
    value: Any, keys: tuple[str, ...] = (), *, inside: bool = False
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and text of everything that names code, at any depth. inside: the keys say that all texts do."""
    if isinstance(value, str) and inside:
        yield keys, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _code_names(inner, (*keys, str(key)), inside=inside or key in _CODE)


def _objection(keys: tuple[str, ...], text: str, own: str) -> str:
    """Why code of this name would not be that of the model's own repository; empty if it would."""
    repository, separator, rest = text.rpartition("--")
    if "base_model_name_or_path" in keys:
        return f"names another repository, {text}, whose code would be run"
    if separator and repository != own:
        return f"names code of another repository, {text}"
    is_module = "auto_map" not in keys or _CLASS.fullmatch(rest)
    return "" if is_module else f"names code in no module of this repository, {text}"
