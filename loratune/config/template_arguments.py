"""The arguments of a chat template that a user may set, in the config and in rows: `{enable_thinking: false}`."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

FIELD = "chat_template_kwargs"
"""The name of the key in `data`, and of the field of a row."""
WRITTEN = frozenset({
    "messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
    "cls_token", "mask_token", "additional_special_tokens",
})  # fmt: skip
"""Variables of a template that rows, commands and the tokenizer set."""
RESERVED = WRITTEN | {
    "chat_template", "compiled_template", "continue_final_message", "conversation", "conversations", "max_length",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "self",
    "tokenize", "tokenizer_kwargs", "truncation",
}  # fmt: skip
"""Names that a user cannot set: those, and the parameters of `apply_chat_template`."""
_BOOLEANS, _OFF = {"true", "false", "yes", "no"}, {"off", "0", "none", "null", "disable", "disabled"}
_LEVEL = re.compile("effort|level|mode")
"""In the names of arguments that are texts, such as `reasoning_effort: none`."""
_LONGEST = 100_000


def problem(arguments: Mapping[str, Any]) -> str:
    """Why a chat template cannot get these arguments; empty if it can."""
    documents = arguments.get("documents", [])
    if not isinstance(documents, list) or not all(isinstance(one, Mapping) for one in documents):
        return "`documents` must be a list of objects"
    for name in arguments:
        if not (isinstance(name, str) and name.isidentifier() and len(name) < 100):
            return f"{name!r:.60} is not the name of a variable of a chat template"
        if name in RESERVED:
            return f"`{name}` is not an argument of a chat template that can be set"
        word = value.strip().lower() if isinstance(value := arguments[name], str) else ""
        if word in _BOOLEANS or (word in _OFF and not _LEVEL.search(name)):
            return f"`{name}` is the text {value!r}, which a template takes for true: write true or false"
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if json.loads(text) != arguments or len(text.encode()) > _LONGEST:
            return f"the values must be JSON of at most {_LONGEST:,} characters, with text as keys"
    except (TypeError, ValueError, RecursionError) as error:  # a date of YAML, a lone surrogate, NaN, a cycle
        return f"the values must be JSON: {error}"
    return ""


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    if reason := problem(arguments):
        raise ValueError(reason)
    return arguments


TemplateArguments = Annotated[
    dict[str, Any], AfterValidator(_checked), WithJsonSchema({"type": "object", "additionalProperties": {}})
]
"""Arguments as the value of a key."""
