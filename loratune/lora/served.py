"""The names that LoRA keys need in the newest release of vLLM and SGLang, and what is ignored there.

A server loads the class that config.json of the base names. For many bases that is a model of text and images, in which
the modules of the language model have other names than in the language model alone, on which the adapter was trained.
vLLM renames keys by a mapping of the class, and ignores those that address no module, without an error; SGLang only
compares the layer and the last part of a name. `served_modules.json` records, for each class, the mapping and the names
that keys may address, as `scripts/record_servers.py` reads them from the source of the newest release.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.lora.merging import PlainAdapter
from loratune.lora.module_names import WRAPPER_PREFIX, join_first, last, pattern
from loratune.lora.tensors import PARAMETERS

TABLE = Path(__file__).with_name("served_modules.json")
SERVERS = {"vllm": "vLLM", "sglang": "SGLang"}
"""The clients in the table, with their names."""
_OUTER = r"^(model\.language_model\.|language_model\.model\.|model\.)"
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
"""How the classes of transformers, those of vLLM, and language models alone spell the path of the decoder."""
_SUFFIX = ".lora_A.weight"
_STACKED = (".experts", ".experts.base_layer")
"""The ends of paths of stacked experts."""
_PARAMETERS = tuple(f".experts.{name}_proj" for name in ("gate_up", "up", "down"))
"""The ends of names of their parameters, which `export.experts` names as a class reads them."""


@dataclass(frozen=True)
class Served:
    """How the modules of an adapter are called in a server.

    Attributes:
        client: A key of `SERVERS`.
        architecture: The class that the server loads for the base.
        names: Path of a module in our base → its path in the keys for the server.
        release: The release that applies all keys; empty if the class is not recorded.
    """

    client: str
    architecture: str
    names: Mapping[str, str]
    release: str

    def __str__(self) -> str:
        if self.release:
            return f"loaded as {self.architecture}; all names apply in {SERVERS[self.client]} {self.release}"
        return f"loaded as {self.architecture}, whose names are not recorded: whether it applies all was not checked"

    @property
    def is_renamed(self) -> bool:
        """Whether any name differs from that in our base."""
        return any(ours != theirs for ours, theirs in self.names.items())


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def names_for(client: str, config: Any, own: str, paths: Iterable[str], where: str) -> Served:
    """The names of modules in the keys for a server.

    Of several spellings that it applies, that of transformers' own class of this architecture is chosen.

    Args:
        client: A key of `SERVERS`.
        config: The configuration in the directory of the base.
        own: The class of our model of it.
        paths: The adapted modules.
        where: The adapter, for errors.

    Raises:
        AdapterError: The server applies nothing to a module, or serves the class without LoRA, or its names are not
            recorded and differ from ours.
    """
    name, paths, server = str((config.architectures or [own])[0]), tuple(paths), SERVERS[client]
    is_own, entry = name == own, _entry(client, name, config)
    if entry is None and is_own:
        return Served(client, name, {path: path for path in paths}, "")
    if not entry:
        known = "calls its modules by names that are not recorded" if entry is None else "does not serve it with LoRA"
        raise _unserved(f"for this base {server} loads {name}, and {known}", where)
    spellings = [{path: _spelled(path, prefix) for path in paths} for prefix in _PREFIXES]
    spellings.insert(0 if is_own else 3, {path: path for path in paths})
    for spelling in spellings:
        kinds = {pattern(name): name for name in spelling.values()}.values()  # one of each layer
        if all(_applies(client, entry, kind) for kind in kinds):
            return Served(client, name, spelling, _table()[client]["release"])
    missing = [path for path in paths if not any(_applies(client, entry, one[path]) for one in spellings)]
    what = f"in {server}, {name} has no {join_first(missing or list(paths), 3)}, and keys for it would be ignored"
    raise _unserved(what, where)


def servers(config: Any, own: str, paths: Iterable[str]) -> dict[str, Served | str]:
    """Each client of `SERVERS` → the names of some modules there, or why it does not apply them all.

    Arguments as in `names_for`.
    """
    found: dict[str, Served | str] = {}
    for client in SERVERS:
        try:
            found[client] = names_for(client, config, own, paths, "")
        except AdapterError as error:
            found[client] = error.problems[0].what
    return found


def remarks(found: Mapping[str, Served | str]) -> Iterator[str]:
    """What the user has to know of servers, as `servers` gives them, before an adapter is trained."""
    for client, one in found.items():
        if isinstance(one, str):
            yield f"{SERVERS[client]} is not known to apply this adapter: {one}"
        elif one.is_renamed and client == "vllm":  # SGLang compares only the last parts of names
            yield f"vLLM loads this base as {one.architecture}, with other module names: serve an `export --to vllm`"


def _unserved(what: str, where: str) -> AdapterError:
    fix = "merge it: loratune merge; or adapt other modules (lora.target_modules)"
    return AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, where, fix=fix))


def _spelled(path: str, prefix: str) -> str:
    """A path with another spelling of the decoder's path. That of the output layer is the same for all of them."""
    return re.sub(_OUTER, prefix, path)


def _entry(client: str, name: str, config: Any) -> dict[str, Any] | None:
    """What is recorded of a class: empty if it is served without LoRA; None if nothing is.

    With the names inside a language model whose class follows from the configuration of the base.
    """
    classes = _table()[client]["classes"]
    entry: dict[str, Any] | None = classes.get(name)
    if not entry or "text" not in entry:
        return entry
    text = config.get_text_config()
    inner = (text.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)])[0]
    modules = classes.get(str(inner), {}).get("modules", ())
    return entry | {"modules": [*entry["modules"], *(f"{entry['text']}.{module}" for module in modules)]}


def _applies(client: str, entry: Mapping[str, Any], name: str) -> bool:
    """Whether a server applies a key of this name. An entry with `own` stands for the class of transformers itself."""
    if "modules" not in entry:
        return "own" in entry and name.startswith("model.") and ".language_model." not in name
    if name.endswith(_PARAMETERS):
        return any(".experts" in module for module in entry["modules"])
    if client == "sglang":
        return last(name) in map(last, entry["modules"])
    if name.endswith(_STACKED) and entry.get("experts") != "3d":
        return False
    name = pattern(_renamed(name + _SUFFIX, entry.get("rename", {})).removesuffix(_SUFFIX))
    return name in entry["modules"] or re.sub(r"\.experts\..*", ".experts", name) in entry["modules"]


def reads_stacked_experts(architecture: str) -> bool:
    """Whether vLLM reads A and B of experts of a class as PEFT stores them."""
    return bool(_table()["vllm"]["classes"].get(architecture, {}).get("experts") == "3d")


def _renamed(key: str, renames: Mapping[str, Mapping[str, str]]) -> str:
    """A key as vLLM's `WeightsMapper` renames it: by regular expressions, parts, prefixes, endings, in this order."""
    for expression, new in renames.get("regex", {}).items():
        key = re.sub(expression, new, key)
    for old, new in renames.get("substr", {}).items():
        key = key.replace(old, new, 1)
    for old, new in renames.get("prefix", {}).items():
        key = new + key.removeprefix(old) if key.startswith(old) else key
    for old, new in renames.get("suffix", {}).items():
        key = key.removesuffix(old) + new if key.endswith(old) else key
    return key


# Tensors

_TOGETHER = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")) | {"up_proj": ("gate_proj",)}
"""Last part of a name → the modules without which SGLang ignores it, or fails."""


def renamed(adapter: PlainAdapter, served: Served, model: nn.Module) -> PlainAdapter:
    """The adapter with the keys for a server. For SGLang, modules that it expects together are completed with zeros.

    Args:
        adapter: The adapter, with names of our base.
        served: See `names_for`.
        model: Our model of the base, which may be on the meta device.
    """
    tensors, names = dict(adapter.tensors), dict(served.names)
    modules = dict(model.named_modules())
    for path in served.names if served.client == "sglang" else ():
        for other in (path.removesuffix(last(path)) + name for name in _TOGETHER.get(last(path), ())):
            if other not in names and isinstance(layer := modules.get(other), nn.Linear):
                names[other] = served.names[path].removesuffix(last(path)) + last(other)
                for factor, size in (
                    ("A", (adapter.rank, layer.in_features)),
                    ("B", (layer.out_features, adapter.rank)),
                ):
                    dtype = tensors[f"{WRAPPER_PREFIX}{path}.lora_{factor}.weight"].dtype
                    tensors[f"{WRAPPER_PREFIX}{other}.lora_{factor}.weight"] = torch.zeros(size, dtype=dtype)
    if not served.is_renamed and len(names) == len(served.names):
        return adapter
    chosen = [name for name in names.values() if not (adapter.config.get(PARAMETERS) and ".experts" in name)]
    targets = sorted(chosen) if served.is_renamed else sorted({*map(last, chosen)})
    moved = {_moved(key, names): tensor for key, tensor in tensors.items()}
    return replace(adapter, tensors=moved, config={**adapter.config, "target_modules": targets})


def _moved(key: str, names: Mapping[str, str]) -> str:
    """The key of a tensor with the name of its module in the server."""
    path, factor = key.removeprefix(WRAPPER_PREFIX).rsplit(".lora_", 1)
    return f"{WRAPPER_PREFIX}{names[path]}.lora_{factor}"
