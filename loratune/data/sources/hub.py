"""Datasets of the hub, loaded by `datasets` into its cache of Arrow files, which are read without loading them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import config as datasets_config
from datasets import load_dataset
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loratune.config import Source
from loratune.data.sources.rows import Advance, Row, batch_rows, unseen
from loratune.errors import DataError, Problem


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub dataset, or a slice of one; see `Opened`."""

    name: str
    dataset: Any

    @property
    def digest(self) -> str:
        """SHA-256 of the fingerprint by which `datasets` tells contents apart."""
        return hashlib.sha256(f"{self.dataset._fingerprint} {self.dataset.num_rows}".encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of its Arrow table."""
        return int(self.dataset.data.nbytes)

    def rows(self, advance: Advance = unseen) -> Iterator[Row]:
        """See `Opened.rows`."""
        size, total, number = self.size, self.dataset.num_rows, 0
        for batch in self.dataset.iter(batch_rows(size, total)):
            first = number
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(f"{self.name}:{number}", dict(zip(batch, values, strict=True)))
            advance(size * number // total - size * first // total)


def load(source: Source) -> HubSplit:
    """A dataset of the hub, from the cache or fetched into it.

    Raises DataError: no such dataset or split; no connection, and not in the cache.
    """
    split = source.split or "train"
    _check_reachable(source.path)
    try:
        dataset = load_dataset(source.path, split=split)
    except Exception as error:  # every kind of failure of the hub, its cache and its builders ends up here
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        what = f"no such file, and it cannot be loaded as a hub dataset ({reason})"
        raise DataError(Problem(what, source.path, fix="check the path, or the hub id")) from None
    return HubSplit(f"{source.path}[{split}]", dataset)


def _check_reachable(hub_id: str) -> None:
    """Without a connection `load_dataset` retries for 20 s before it looks into its cache; say it at once instead.

    Raises DataError: not a hub id; no connection, and the dataset is not cached.
    """
    *owner, name = hub_id.split("/")
    if Path(datasets_config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(name)])).is_dir():
        return
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "README.md", repo_type="dataset"), timeout=10)
    except HFValidationError:
        what = "no such file, and not the id of a hub dataset"
    except HfHubHTTPError:
        return  # the hub answers; `load_dataset` tells what it says
    except Exception as error:  # whatever the network stack of the day raises
        what = f"no such file; the hub cannot be reached and no such dataset is cached ({error})"
    else:
        return
    raise DataError(Problem(what, hub_id, fix="check the path, or the connection"))
