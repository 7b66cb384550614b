"""Undocumented names of other libraries that this package uses, each with the reason.

tests/test_upstream_data.py has one test for each name, which fails if a release removes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
from datasets import ReadInstruction
from datasets import config as datasets_config
from datasets.naming import camelcase_to_snakecase
from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    render_jinja_template,
)


def datasets_cache_dir() -> Path:
    """Returns the cache directory of `datasets`, as HF_DATASETS_CACHE or HF_HOME set it.

    The environment variables are documented; the module with the derived value is not. It is read at each call, because
    a program may change it.
    """
    return Path(datasets_config.HF_DATASETS_CACHE)


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, `load_dataset` tells no server what it loads, which it does for local files, too.

    The variable HF_UPDATE_DOWNLOAD_COUNTS, which is documented, is read as the library is imported.
    """
    before, datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = datasets_config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = before


def hub_dataset_cache(hub_id: str) -> Path:
    """Returns the directory in which `datasets` caches a hub dataset, whether it exists or not.

    No public function tells whether a dataset is cached, and without a connection `load_dataset` retries for 20 s
    before it looks into its cache.
    """
    *owner, name = hub_id.split("/")
    return datasets_cache_dir() / "___".join([*owner, camelcase_to_snakecase(name)])


def dataset_fingerprint(dataset: Any) -> str:
    """Returns the hash by which `datasets` distinguishes the contents of two datasets; it has no public name."""
    return str(dataset._fingerprint)


def is_media(feature: Any) -> bool:
    """Whether values of a dataset's feature are or contain images, audio, video or files that `datasets` decodes.

    Features with the attribute `decode` are decoded when a row is read; only `Json` of them is decoded to plain values.
    That lists have `feature`, and that objects are mappings, is documented; that all others have `decode` is not.
    """
    if isinstance(feature, Mapping):
        return any(map(is_media, feature.values()))
    if isinstance(feature, list):
        return any(map(is_media, feature))
    is_decoded = getattr(feature, "decode", False) is True and type(feature).__name__ != "Json"
    return is_decoded or (hasattr(feature, "feature") and is_media(feature.feature))


def slice_bounds(split: str, rows: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of each slice of `split`; `train` is the only split, and has `rows` rows.

    `ReadInstruction` is public, but the fields of the result of `to_absolute` are not documented. It accepts digits of
    any script.

    Raises:
        ValueError, AssertionError: It is not a slice of `train`.
    """
    if not split.isascii():
        raise ValueError("not ASCII")
    slices = ReadInstruction.from_spec(split).to_absolute({"train": rows})
    return [(part.from_, part.to) for part in slices]


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Returns the constructor arguments of a tokenizer; the attribute that holds them is not documented.

    They determine how a slow tokenizer encodes; unlike a fast one, it cannot be serialized to text.
    """
    return dict(tokenizer.init_kwargs)


def chat_template_environment() -> jinja2.Environment:
    """Returns the Jinja environment of `apply_chat_template`, with its filters, functions and extensions.

    A template must be rendered with the same, which transformers does not expose.
    """
    environment: jinja2.Environment = _compile_jinja_template("").environment
    return environment


def alias_reasoning_fields(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with their reasoning under every field name that `apply_chat_template` passes to templates.

    A template that is rendered without `apply_chat_template` must see the same fields.
    """
    return list(_alias_reasoning_fields(list(messages)))


def generation_ranges(
    messages: Sequence[dict[str, Any]], tools: Sequence[Any], source: str, values: dict[str, Any]
) -> list[tuple[int, int]]:
    """Returns the ranges of characters that a template marks with `{% generation %}`. values: its other variables.

    `apply_chat_template` turns these ranges into a mask of tokens and does not return them; `render_jinja_template`
    does, and is not documented.
    """
    _, ranges = render_jinja_template(
        conversations=[list(messages)],
        tools=list(tools) or None,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **values,
    )
    return [(start, end) for start, end in ranges[0]]
