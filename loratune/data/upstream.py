"""What this package needs of other libraries beyond their documented interfaces, each name with its reason.

tests/test_upstream_data.py has one test for each of them, which fails when a release takes the name away.
"""

from pathlib import Path
from typing import Any

from datasets import ReadInstruction
from datasets import config as datasets_config
from datasets.naming import camelcase_to_snakecase


def datasets_cache_dir() -> Path:
    """Returns the cache directory of `datasets`, as HF_DATASETS_CACHE or HF_HOME set it.

    The environment variables are documented; the value that `datasets` derives from them is in a module that is not.
    It is read at each call, because a program may change it.
    """
    return Path(datasets_config.HF_DATASETS_CACHE)


def hub_dataset_cache(hub_id: str) -> Path:
    """Returns the directory in which `datasets` caches a hub dataset, whether it is there or not.

    Nothing public says whether a dataset is cached, and without a connection `load_dataset` retries for 20 s before it
    looks into its cache.
    """
    *owner, name = hub_id.split("/")
    return datasets_cache_dir() / "___".join([*owner, camelcase_to_snakecase(name)])


def dataset_fingerprint(dataset: Any) -> str:
    """Returns the hash by which `datasets` tells the contents of two datasets apart; it has no public name."""
    return str(dataset._fingerprint)


def slice_bounds(split: str, rows: int) -> list[tuple[int, int]]:
    """Returns first row and end of each slice that `split` adds up, over one split `train` of so many rows.

    `ReadInstruction` is public; the fields of what its `to_absolute` returns are not documented.

    Raises:
        ValueError, AssertionError: It is not a slice of `train`.
    """
    slices = ReadInstruction.from_spec(split).to_absolute({"train": rows})
    return [(part.from_, part.to) for part in slices]
