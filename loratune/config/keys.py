"""The keys of a config, taken from its schema: listing, explaining, searching, suggestions, and the JSON schema."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel

from loratune import __version__
from loratune.config.schema import RunConfig
from loratune.config.sections import Source
from loratune.text import shell_word

KeyPath = tuple[str | int, ...]
Schema = Mapping[str, Any]

MEMORY_AND_TIME = {
    "model.name_or_path": "the base dominates both: 2 bytes of memory per parameter in 16 bit, 4 in float32",
    "model.gguf_file": "like an unquantized base in dtype",
    "model.dtype": "float32 takes twice the memory; the others are slow on hardware without native support",
    "model.quantization": "linear layers take 1 byte per parameter in 8bit, 0.5 in 4bit; dequantization slows steps",
    "model.attn_implementation": "eager stores the attention scores of all pairs of tokens; the others do not",
    "model.device_map": "auto: the base is distributed over several GPUs, which compute one after another",
    "model.torch_compile": "compilation takes time at the start, steps are faster",
    "model.use_liger_kernel": "intended to save both: fewer intermediate values, and fewer passes over memory",
    "lora.r": "the adapter, its gradients, its optimizer states and the file grow with it; little next to the base",
    "lora.lora_dropout": "above 0: each adapted module keeps a mask for the backward pass",
    "lora.target_modules": "each adapted module adds A and B, and keeps its input for the backward pass",
    "lora.target_parameters": "each step recomputes the adapted tensors, and keeps them for the backward pass",
    "lora.use_dora": "slower steps: each computes the norms of all adapted weights",
    "lora.init_lora_weights": "only at the start: pissa, olora, loftq decompose the weights, eva reads rows",
    "lora.use_lorafa": "saves the gradients and optimizer states of A",
    "lora.layers_to_transform": "as target_modules: fewer layers take less of both",
    "lora.rank_pattern": "as r, for these modules",
    "lora.modules_to_save": "each is copied in float32: 16 bytes a parameter with gradients and AdamW",
    "lora.trainable_token_indices": "little to train, but each step makes a copy of the embeddings",
    "lora.start_from": "only at the start, when its files are read and checked",
    "data.train": "time grows with the tokens of all rows, memory with those of the longest",
    "data.validation": "each evaluation is a forward pass over its rows, see training.eval_steps",
    "data.test": "one forward pass over its rows, at the end",
    "data.max_train_samples": "time grows with it, memory does not",
    "data.reasoning": "train and mask: more rows where the template drops the reasoning of earlier answers",
    "data.loss_on": "all takes most: accelerated models compute logits of supervised tokens only",
    "data.max_length": "the longest rows determine peak memory; attention time grows with the square of the length",
    "data.truncation": "drop leaves fewer rows, which take less time; split keeps all tokens",
    "data.stride": "repeated tokens are computed again: max_length / (max_length - stride) times the time",
    "data.packing": "none computes padding too; full fills all batches: more memory, fewer steps",
    "data.share_prefixes": "both fall with the number of computed tokens: often by half with a long prompt",
    "data.replay": "adds rows and their time: 0.05 makes the run about 5 % longer",
    "training.objective": "dpo, orpo, simpo: two answers per prompt; dpo, kto: a forward pass over all rows first",
    "training.num_train_epochs": "time grows with it, memory does not",
    "training.max_steps": "time grows with it, memory does not",
    "training.max_minutes": "the command takes about this long, including loading, evaluations and publishing",
    "training.per_device_train_batch_size": "activations and logits grow with it, and so does the time of a step",
    "training.gradient_accumulation_steps": "step time is multiplied by this number; memory is that of one micro-step",
    "training.optim": "bytes per trained parameter: AdamW 8, 8-bit AdamW about 2, adafactor few, sgd 0",
    "training.save_steps": "each checkpoint writes the trained weights and the states of the optimizer to disk",
    "training.eval_steps": "each evaluation is a forward pass over all validation rows",
    "training.keep": "best keeps another copy of the trained weights in host memory",
    "training.activation_checkpointing": "keeps activations of one layer at a time; adds a forward pass to each step",
    "retention.kl_weight": "above 0: texts beside the rows of a step, about a fifth of their tokens, and some memory",
    "retention.num_samples": "only at the start, when they are written; kept in the cache for later runs of the base",
    "retention.max_new_tokens": "as num_samples; fewer of longer texts go with each step",
    "output_dir": "disk for the adapter, and for checkpoints while the run lasts",
}
"""Key → its effect on memory and time, for keys that have one."""

_AUTO = (
    "model.dtype", "model.use_liger_kernel", "lora.r", "lora.lora_alpha", "lora.target_modules",
    "data.sample_by", "data.format", "data.empty_reasoning", "data.truncation", "data.share_prefixes",
    "training.learning_rate", "training.num_train_epochs", "training.warmup_steps", "training.lr_scheduler_type",
    "retention.kl_weight", "retention.num_samples",
)  # fmt: skip
_NULL = ("model.attn_implementation", "preferences.beta", "training.eval_steps", "training.keep")
DECIDED_BY_RUN = dict.fromkeys(_AUTO, "auto") | dict.fromkeys(_NULL, "null") | {"training.max_steps": "-1"}
"""Key → the value, as in YAML, that lets the run choose the effective value."""

TECHNICAL_LIMIT = 1e6
"""Bounds from this value on are technical limits of torch, and are not shown."""
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}

_OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs",
    "per_device_train_batch_size": "batch_size micro_batch_size",
    "optim": "optimizer",
    "r": "lora_r lora_rank rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "lora_target lora_target_modules",
    "start_from": "adapter_name_or_path lora_model_dir",
    "activation_checkpointing": "gradient_checkpointing",
    "warmup_steps": "warmup_ratio",
    "name_or_path": "base_model model_name_or_path",
    "quantization": "load_in_8bit load_in_4bit quantization_bit",
    "dtype": "bf16 fp16",
    "max_length": "max_seq_length sequence_len cutoff_len block_size",
    "stride": "overlap doc_stride",
    "packing": "sample_packing neat_packing",
    "chat_template": "template",
    "chat_template_kwargs": "template_kwargs chat_template_args",
    "train": "dataset datasets",
    "max_train_samples": "max_samples",
    "validation": "val_size val_set_size",
    "lr_scheduler_type": "scheduler",
    "objective": "stage rl rlhf_type",
    "beta": "objective_beta pref_beta rl_beta",
    "sft_weight": "pref_ftx rpo_alpha cpo_alpha",
}
OTHER_NAMES = {other: own for own, others in _OTHER_NAMES.items() for other in others.split()}
"""Name of a key in other tools → its name here."""

REMOVED = {
    "training.adapter_scale": (
        1,
        "scale the trained adapter: `--adapter-scale` of evaluate, generate, merge and export",
    ),
}
"""Key of earlier releases → the value with which it did nothing, and what to use instead."""


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        label: Its full name, e.g. `training.learning_rate`, or `Source.path` in a structure.
        places: Its places in a config, e.g. `training.learning_rate`; several for a key of a structure that several
            keys use.
        schema: The JSON schema of its values.
        required: Whether it must be set.
    """

    label: str
    places: tuple[str, ...]
    schema: Schema
    required: bool

    @property
    def name(self) -> str:
        """The last part of its label."""
        return self.label.rpartition(".")[2]

    @property
    def meaning(self) -> str:
        """Its description."""
        return str(self.schema.get("description", ""))

    @property
    def kind(self) -> str:
        """Type, allowed values and range, as text."""
        return kind(self.schema)

    @property
    def default(self) -> str:
        """The default as in YAML, or `required`."""
        return "required" if self.required else yaml_flow(self.schema["default"])

    @property
    def costs(self) -> str:
        """Its effect on memory and time; `none` if negligible."""
        return MEMORY_AND_TIME.get(self.label, "none")

    @property
    def other_names(self) -> tuple[str, ...]:
        """Its names in other tools."""
        return tuple(other for other, own in OTHER_NAMES.items() if own == self.name)

    def is_decided_by_run(self, value: Any) -> bool:
        """Whether the run chooses the effective value if the key has this value."""
        return DECIDED_BY_RUN.get(self.label) == yaml_flow(value)


@dataclass(frozen=True)
class KeyGroup:
    """Keys that are documented together.

    Attributes:
        name: The name of a section, e.g. `training`, or of a structure, e.g. `Source`; empty for the other keys.
        is_section: Whether it is a section.
        description: Its description.
        keys: The keys, in the order of the schema.
    """

    name: str
    is_section: bool
    description: str
    keys: tuple[Key, ...]


@cache
def groups(config: type[BaseModel] = RunConfig) -> tuple[KeyGroup, ...]:
    """The keys of a configuration: its sections, then other structures, then the keys outside the sections."""
    schema = config.model_json_schema()
    definitions: dict[str, Schema] = schema.get("$defs", {})
    single = dict(schema["properties"])
    sections = {
        name: definitions.pop(reference_of(single.pop(name))) for name in list(single) if "$ref" in single[name]
    }
    places: dict[str, list[str]] = {name: [] for name in definitions}
    for name, section in sections.items():
        for key, values in section["properties"].items():
            for structure in _structures_in(values):
                places[structure].append(f"{name}.{key}.")
    found = [_group(name, section, [f"{name}."], is_section=True) for name, section in sections.items()]
    found += [_group(name, structure, places[name]) for name, structure in definitions.items()]
    return (*found, _group("", {"properties": single, "required": schema.get("required", [])}, [""]))


def reference_of(schema: Schema) -> str:
    """The name of the definition that a schema references."""
    return str(schema["$ref"]).rpartition("/")[2]


def _structures_in(schema: Schema) -> Iterator[str]:
    """The names of the definitions that a schema references, without duplicates."""
    found = [reference_of(schema)] if "$ref" in schema else []
    parts = [
        *schema.get("anyOf", []),
        *(part for name in ("items", "additionalProperties") if (part := schema.get(name))),
    ]
    found += [name for part in parts for name in _structures_in(part)]
    yield from dict.fromkeys(found)


def _group(name: str, section: Schema, prefixes: list[str], *, is_section: bool = False) -> KeyGroup:
    required = section.get("required", [])
    keys = tuple(
        Key(f"{name}.{key}".lstrip("."), tuple(f"{prefix}{key}" for prefix in prefixes), values, key in required)
        for key, values in section["properties"].items()
    )
    return KeyGroup(name, is_section, " ".join(section.get("description", "").split()), keys)


def kind(schema: Schema, quote: str = "") -> str:
    """The type of a value as text, e.g. "integer ≥ 1 or null", with choices separated by commas. quote: put around
    choices and names of structures."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(choice, quote) for choice in schema["anyOf"]))
    if "$ref" in schema:
        return f"{quote}{reference_of(schema)}{quote}"
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"{quote}{yaml_flow(value)}{quote}" for value in values)
    if schema["type"] == "array":
        return f"list of {kind(schema['items'], quote)}"
    if schema["type"] == "object":
        values = schema["additionalProperties"]
        return f"mapping of text to {kind(values, quote)}" if values else "mapping"
    name = {"string": "text"}.get(schema["type"], schema["type"])
    limits = [
        f"{sign} {schema[bound]:g}" for bound, sign in BOUNDS.items() if abs(schema.get(bound, 1e300)) < TECHNICAL_LIMIT
    ]
    return f"{name} {', '.join(limits)}".strip()


def yaml_flow(value: Any) -> str:
    """A value as YAML on one line. A string by itself is unchanged."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{yaml_scalar(key)}: {yaml_scalar(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_scalar, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def yaml_scalar(value: Any) -> str:
    """A value inside a list or mapping. A string that YAML could read as another type is quoted, as in JSON."""
    if isinstance(value, str) and not (_PLAIN.fullmatch(value) and yaml.safe_load(value) == value):
        return json.dumps(value, ensure_ascii=False)
    return yaml_flow(value)


_PLAIN = re.compile(r"[\w./][\w./+-]*( [\w./+-]+)*")
"""A text that needs no quotes in YAML, unless it reads as a number, a date or a boolean."""


def assignment(key: str, value: Any) -> str:
    """The command-line option that sets a key, quoted for a shell."""
    return f"--set {key}={shell_word(yaml_flow(value))}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`section.key` → value of a config, as YAML on one line."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0)` → `data.train[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def known_keys() -> Iterator[KeyPath]:
    """The path of every section and of every key, in each of its places."""
    for group in groups():
        if group.is_section:
            yield (group.name,)
        yield from (tuple(place.split(".")) for key in group.keys for place in key.places)


def find(words: str) -> list[KeyGroup | Key]:
    """The sections and keys that match a name.

    Args:
        words: A section; a key with or without its section; the beginning of a key; or another tool's name for one.

    Returns:
        Exact matches; or else all that begin with the name or have it in other tools; or else all whose name, type or
        meaning contains it. A key with several places has only the matching ones.
    """
    place = re.sub(r"\[\d*\]", "", words.strip())
    listed = groups()
    keys = [key for group in listed for key in group.keys]
    prefix, _, name = place.rpartition(".")
    exact: list[KeyGroup | Key] = [group for group in listed if group.name == place != ""]
    exact += [replace(key, places=(place,)) for key in keys if place in key.places]
    exact = exact or [key for key in keys if key.name == place]
    if exact or not name:
        return exact
    there = [
        replace(key, places=places)
        for key in keys
        if (places := tuple(where for where in key.places if not prefix or where.rpartition(".")[0] == prefix))
    ]
    near: list[KeyGroup | Key] = [group for group in listed if group.is_section and group.name.startswith(place)]
    near += [key for key in there if key.name.startswith(name) or name in key.other_names]
    return near or [
        key for key in there if name[2:] and _joined(name) in _joined(f"{key.name} {key.kind} {key.meaning}")
    ]


def _joined(text: str) -> str:
    """The text in lower case, with its words joined by underscores."""
    return re.sub(r"[\s-]", "_", text.lower())


def nearest_name(word: str, choices: list[str], cutoff: float = 0.5) -> str:
    """The choice most similar to a word; empty if none is similar."""
    return next(iter(difflib.get_close_matches(word, choices, n=1, cutoff=cutoff)), "")


def suggestion(path: KeyPath) -> str:
    """The fix for an unknown key: what replaces a removed one, or else the key with that name in another tool, a
    similar sibling, or a key elsewhere."""
    if dotted(path) in REMOVED:
        return REMOVED[dotted(path)][1]
    name, keys = str(path[-1]).lower(), list(known_keys())
    section = tuple(part for part in path[:-1] if isinstance(part, str))  # without list indices
    siblings = [str(key[-1]) for key in keys if key[:-1] == section]
    near = "" if name in OTHER_NAMES else nearest_name(name, siblings, 0.6)
    if near := near or named_elsewhere(name):
        return f"did you mean `{near}`?"
    return f"known here: {', '.join(siblings)}" if siblings else "remove it"


def named_elsewhere(name: str) -> str:
    """The key that has this name, or a similar one, in a section or in another tool; empty if there is none."""
    keys = list(known_keys())
    own_name = OTHER_NAMES.get(name, name)
    if not any(key[-1] == own_name for key in keys):
        own_name = nearest_name(name, [str(key[-1]) for key in keys], 0.8)
    return next((dotted(key) for key in keys if key[-1] == own_name), "")


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The JSON schema of `RunConfig` (draft 2020-12), in which a source may also be a string, its path.

    Descriptions include the effect of a key on memory and time. Titles are the keys themselves. Sections have no
    default, because an editor would insert it.
    """
    schema: dict[str, Any] = _as_read(RunConfig.model_json_schema())
    for group in groups():
        keys = schema["properties"]
        if group.name:
            name = reference_of(keys[group.name]) if group.is_section else group.name
            keys = schema["$defs"][name]["properties"]
        if group.is_section:
            schema["properties"][group.name].pop("default", None)
        for key in group.keys:
            keys[key.name]["title"] = key.label
            if key.costs != "none":
                keys[key.name]["description"] = f"{key.meaning}. Memory and time: {key.costs}."
    return {"$schema": DIALECT, "$id": f"urn:loratune:config:{__version__}", "title": "A run of loratune", **schema}


def _as_read(schema: Any) -> Any:
    """The schema of a config file."""
    if isinstance(schema, list):
        return [_as_read(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    values = {
        name: _as_read(value) for name, value in schema.items() if not (name == "title" and isinstance(value, str))
    }
    if "$ref" in values and reference_of(values) == Source.__name__:
        return {"anyOf": [{"type": "string", "minLength": 1}, values]}
    return values
