"""Undocumented names of other libraries that this package uses.

Each name is used only here, with the reason why no documented one is sufficient. tests/test_upstream_model.py fails if
a release removes one. This module does not import torch, which the checks before a run rely on.
"""

import copy
import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2
import transformers
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    are_progress_bars_disabled,
    disable_progress_bars,
)

from loratune.system import hub_kernels

_log = logging.getLogger(__name__)


def attention(config: Any) -> Any:
    """The attention implementation that a configuration asks for.

    transformers documents `attn_implementation` as an argument only, and keeps it under a private name.
    """
    return config._attn_implementation


def experts(config: Any) -> Any:
    """The implementation of experts that a configuration asks for, which is kept as `attention` is."""
    return config._experts_implementation


def is_trainable(record: Mapping[str, Any]) -> bool:
    """Whether transformers has a backward for the quantization that a configuration records. Imports torch.

    `is_trainable` of its quantizers is documented, but not how to ask before a model is loaded. Where a package is
    missing, loading reports it.
    """
    try:
        quantizer = transformers.quantizers.AutoHfQuantizer.from_config(dict(record), pre_quantized=True)
        return bool(quantizer.is_trainable)
    except Exception:
        _log.debug("the quantizer cannot be made", exc_info=True)
        return True


def is_quantization_known(method: str) -> bool:
    """Whether transformers knows a `quant_method` of config.json. Imports torch.

    It ignores unknown methods and treats the weights as plain ones. Its documentation has a table of methods, but no
    function that lists the methods of a release.
    """
    return bool(transformers.quantizers.AutoHfQuantizer.supports_quant_method({"quant_method": method}))


def is_4bit(tensor: Any) -> bool:
    """Whether bitsandbytes packed this tensor in 4 bits; its dtype is then that of the storage, whatever that is.

    To ask for the documented class `Params4bit` would import bitsandbytes, which most models do not need.
    """
    return hasattr(tensor, "quant_state")


def is_8bit(tensor: Any) -> bool:
    """Whether bitsandbytes packed this tensor in 8 bits: `SCB` holds the scales of `Int8Params`."""
    return hasattr(tensor, "SCB")


def is_packed(tensor: Any) -> bool:
    """Whether bitsandbytes packed this tensor, in 4 or 8 bits."""
    return is_4bit(tensor) or is_8bit(tensor)


def is_stored_quantized(model: Any) -> bool:
    """Whether the files of a model hold it quantized, rather than that it was quantized as it was loaded."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and bool(quantizer.pre_quantized)


def is_quant_state(value: Any) -> bool:
    """Whether a value is the record that bitsandbytes keeps of a 4-bit tensor; the class is in no public module."""
    return type(value).__name__ == "QuantState"


def has_8bit_layers(model: Any) -> bool:
    """Whether a model has layers that bitsandbytes packed in 8 bits."""
    return any(map(is_8bit, model.parameters()))


def bitsandbytes_lacks() -> str:
    """Why bitsandbytes cannot be used here; empty if it can. Imports bitsandbytes, and with it torch.

    Its import succeeds without its native library, which then is a stand-in that fails at the first call.
    """
    try:
        with hub_kernels.hidden_from_bitsandbytes():
            extension = importlib.import_module("bitsandbytes.cextension")
    except Exception as error:  # a library that does not load, a version that does not fit torch
        return f"bitsandbytes cannot be imported ({error})"
    if isinstance(extension.lib, extension.ErrorHandlerMockBNBNativeLibrary):
        return "bitsandbytes has no native library for this machine"
    return ""


def compile_chat_template(source: str) -> None:
    """Compile a chat template with the tags, filters and functions of `apply_chat_template`, whose environment has no
    documented name.

    Expressions of constants are not computed, as Jinja does otherwise: `'x' * 6000000000`. Imports torch.

    Raises:
        jinja2.TemplateSyntaxError, SyntaxError, RecursionError, ValueError: The source cannot be compiled.
    """
    module = importlib.import_module("transformers.utils.chat_template_utils")
    environment: Any = module._compile_jinja_template("").environment.overlay()
    environment.intercepted_binops = frozenset(environment.binop_table)
    environment.filters, environment.tests = (
        dict.fromkeys(known, jinja2.pass_context(lambda context, value: value))
        for known in (environment.filters, environment.tests)
    )
    environment.compile(source)


class CheckpointLayout:
    """How transformers makes the tensors of a model from those of a checkpoint, and back.

    Both are done within `from_pretrained` and `save_pretrained`, for a whole model that is in memory; of the documented
    classes of conversions (`WeightConverter`, `WeightRenaming`) no method says which tensors of a file belong together.
    """

    def __init__(self, model: Any):
        """Look up the conversions of a model, which may be on the meta device."""
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        self._loading, self._model, self._mapping = loading, model, mapping
        self._renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        self._shapes = model.state_dict()

    @property
    def only_renames(self) -> bool:
        """Whether each tensor of the model is one of the checkpoint."""
        return not self._converters

    def target(self, stored: str) -> tuple[str, str | None]:
        """The tensor of the model that a stored one becomes, or becomes a part of; and the pattern of its conversion,
        None where it is only renamed. As `convert_and_load_state_dict_in_model` decides it."""
        prefix, shapes = self._model.base_model_prefix, self._shapes
        rename = self._loading.rename_source_key
        name, pattern = rename(stored, self._renamings, self._converters, prefix, shapes)
        if name not in shapes and stored in shapes:
            name, pattern = rename(stored, [], [], base_model_prefix=prefix, meta_state_dict=shapes)
        return str(name), pattern

    def convert(self, first: str, parts: dict[str, tuple[str, Any]]) -> dict[str, Any]:
        """The tensors of the model that some stored ones become.

        Args:
            first: The name that `target` gives for them.
            parts: The pattern and the tensor of each, in the order of the checkpoint's names.
        """
        patterns = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        converter = copy.deepcopy(patterns[next(iter(parts.values()))[0]])
        for name, (pattern, tensor) in parts.items():
            converter.add_tensor(first, name, pattern, tensor)
        made = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The stored tensors that some of the model become as it is saved. All names must have been looked up before:
        only conversions that were used are reverted."""
        self._model._weight_conversions = [entry for entry in self._mapping if entry.was_used()]
        reverted: dict[str, Any] = self._loading.revert_weight_conversion(self._model, tensors)
        return reverted

    def saved(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The stored tensors that some of the model become as it is saved, had it not been read from files."""
        self._model._weight_conversions = None
        saved: dict[str, Any] = self._loading.revert_weight_conversion(self._model, tensors)
        return saved

    def in_order(self, names: Any) -> list[str]:
        """Names in the order in which transformers collects what it stacks: numbers count as numbers."""
        return sorted(names, key=self._loading.dot_natural_key)


def hooks(module: Any) -> int:
    """How many hooks a module has. torch lists them in no documented place."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return sum(map(len, kinds))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers logs nothing but errors and shows no progress bars; at the end it does as before.

    transformers switches the bars of huggingface_hub together with its own.
    """
    settings = transformers.logging
    level, has_bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    hub_has_none = are_progress_bars_disabled()
    settings.set_verbosity_error()
    if has_bars:
        settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if has_bars:
            settings.enable_progress_bar()
        if has_bars and hub_has_none:
            disable_progress_bars()
