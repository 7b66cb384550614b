"""`loratune push`: an adapter directory becomes a repository of the hub."""

from dataclasses import replace
from pathlib import Path

from loratune.errors import AdapterError
from loratune.events import note
from loratune.export import hub
from loratune.export.hub import Upload
from loratune.lora import adapter_files


def push(directory: Path, repository: str, *, public: bool, base: str | None) -> Upload:
    """Check an adapter directory, and upload it.

    Args:
        directory: The adapter directory.
        repository: USER/NAME.
        public: Whether everyone is to see it.
        base: What the base is called on the hub, if the adapter knows it by a path.

    Raises:
        AdapterError: See `adapter_files.inspect`; files have changed since the adapter was saved; see `hub.push`.
        ConfigError, ModelError, ResourceError, LockedError: See `hub.push`.
    """
    hub.check_name(repository)
    adapter = adapter_files.inspect(directory)
    if edits := adapter.edits():
        raise AdapterError([replace(edit, fix="restore it: an adapter is pushed as it was saved") for edit in edits])
    if not adapter.record:
        note(f"{directory}: keeps no record of its files and its base, so neither was verified")
    return hub.push(adapter, repository, public=public, base=base)
