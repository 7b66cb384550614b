"""Records that are written: their versions, and the fields of a row together with results for it.

A record is a JSON object with its version as `schema_version`; without one it is of version 1, as releases wrote it
before there were versions. Keys may be added within a version; a change that an older reader would misread requires a
new version. Readers read all older versions, and refuse newer ones.
"""

from collections.abc import Mapping
from typing import Any

KEY = "schema_version"
ADAPTER, RUN, MANIFEST, ENDED = "loratune.json", "run.json", "manifest.json", "ended"
"""Files: what made an adapter; of a checkpoint, the run and the list of files; the end of a run without an adapter."""
ROW_HASHES = "train_rows.hashes"
"""The file of an adapter with hashes of its training rows. It says itself of which version they are."""
VERSIONS = {ADAPTER: 1, RUN: 1, MANIFEST: 1, ENDED: 1}
"""The version that this release writes, and the newest that it reads."""


def versioned(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A record to be written. kind: a key of `VERSIONS`."""
    return {KEY: VERSIONS[kind], **values}


def newer(kind: str, record: Any) -> str:
    """Why this release cannot read a record, in words; empty if it can, or if it is no JSON object at all."""
    version = record.get(KEY, 1) if isinstance(record, Mapping) else 1
    if type(version) is int and 1 <= version <= VERSIONS[kind]:
        return ""
    return f"has {KEY} {version!r}, and this release of loratune reads versions up to {VERSIONS[kind]}"


def with_own_fields(own: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row, and behind them what a command found out about it.

    No field is lost. One whose name is among the results is called `row_NAME`; a `completion`, which is the expected
    answer, is called `reference` if the row has no other field of that name.
    """
    kept = {}
    for name, value in own.items():
        if name == "completion" and name in found and "reference" not in {*own, *found}:
            name = "reference"
        elif name in found:
            name = f"row_{name}"
            while name in own or name in found:
                name = f"row_{name}"
        kept[name] = value
    return kept | dict(found)
