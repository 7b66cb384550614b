"""The public function `loratune.load_config`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune import config as configs
from loratune.api import Overrides, StrPath, assignments
from loratune.config import RunConfig
from loratune.config.arguments import checked, plain


@checked
def load_config(source: StrPath | Mapping[str, Any], overrides: Overrides = ()) -> RunConfig:
    """Read a config from a YAML file, or from plain values.

    Args:
        source: The file; or its values as a nested mapping: `{"model": {"name_or_path": ...}}`.
        overrides: Dotted key → value, such as `{"training.max_steps": 50}`.

    Raises:
        ConfigError: The config is not valid; lists every problem. (`RunConfig(...)` raises pydantic's
            `ValidationError`.)
    """
    if isinstance(source, Mapping):
        return configs.from_values(plain(source), "the config", assignments(overrides))
    return configs.load(Path(source), assignments(overrides))
