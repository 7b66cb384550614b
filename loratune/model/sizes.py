"""Values of a model's configuration that are looked at before any library does: those that say how many of something
are made, one by one, and those that our own messages show."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loratune.errors import ModelError, Problem

_MOST = {
    re.compile(r"(num|n)(_\w+)?_(layers?|blocks)|(en|de)coder_layers"): 4096,
    re.compile(r"(num|n)(_\w+)?_experts"): 65_536,
    re.compile(r"num_labels"): 1_000_000,
}
"""Key → the largest number that is believed. The largest models have some hundred layers, and some hundred experts in
each; transformers makes an object for each of them, and a name for each label."""


def check_sizes(values: Any, where: str) -> None:
    """Raises ModelError: `architectures` is no list of names; a number is so large that the model would take hours to
    be built, or all memory. values: what stands in config.json."""
    if not isinstance(values, Mapping):
        return
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or any(not isinstance(name, str) for name in architectures):
        fix = 'write it as ["LlamaForCausalLM"]'
        raise ModelError(Problem("must be a list of names of classes", where, "architectures", fix))
    problems = []
    for key, count in _counts(values):
        name = key.rpartition(".")[2]
        most = next((most for pattern, most in _MOST.items() if pattern.fullmatch(name)), None)
        if most is not None and count > most:
            shown = f"{count:,}" if count < 10**18 else "beyond all bounds"
            problems.append(Problem(f"is {shown}; at most {most:,} are built", where, key, "mend config.json"))
    if problems:
        raise ModelError(problems)


def _counts(values: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers above 1 with their keys, those of configurations within too."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{within}{key}.")
        elif isinstance(value, int) and value > 1:
            yield f"{within}{key}", value
