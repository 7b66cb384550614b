"""What loratune.data needs of other libraries beyond their documented interfaces; one test for each name."""

from pathlib import Path

import datasets
import pytest

from loratune.data import upstream


def test_datasets_cache_dir() -> None:
    assert upstream.datasets_cache_dir() == Path(datasets.config.HF_DATASETS_CACHE)


def test_hub_dataset_cache_is_where_load_dataset_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that `datasets` gives to its cached hub datasets: of the owner as it is, of the name in snake case."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert upstream.hub_dataset_cache("Some-One/MyRows") == tmp_path / "Some-One___my_rows"
    assert upstream.hub_dataset_cache("plain") == tmp_path / "plain"


def test_dataset_fingerprint() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    digests = [upstream.dataset_fingerprint(part) for part in (rows.select([0]), rows.select([0]), rows.select([1]))]
    assert digests[0] == digests[1] != digests[2]


def test_slice_bounds() -> None:
    assert upstream.slice_bounds("train[:2]+train[50%:]", 8) == [(0, 2), (4, 8)]
    with pytest.raises(ValueError, match="test"):
        upstream.slice_bounds("test", 8)
