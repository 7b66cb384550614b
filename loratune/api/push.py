"""The verb `push` of an adapter."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import loratune
from loratune.adapter.directory import SYSTEM
from loratune.adapter.options import UNNAMED
from loratune.api import StrPath, libraries
from loratune.codes import Code
from loratune.config.arguments import checked
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.events import Listener, listening, note
from loratune.system.directories import ROW_HASHES

if TYPE_CHECKING:
    from loratune.export.hub import Upload


@checked
def push(
    adapter: "loratune.Adapter | StrPath",
    repository: str,
    *,
    public: bool = False,
    base: str | None = None,
    with_system: bool = False,
    on_event: Listener | None = None,
) -> "Upload":
    """Upload the adapter to the hub in one commit, and verify the upload.

    Args:
        adapter: The adapter, or its directory.
        repository: USER/NAME.
        public: Make the repository public.
        base: The base's name on the hub; required if the adapter names it by a local path.
        with_system: Upload the system message that all training rows had, too.
        on_event: Receives events.

    Raises:
        AdapterError: Its files have changed, or contain a local path.
        ConfigError, ModelError, ResourceError, LockedError: The hub refuses the upload or cannot be reached.
    """
    with listening(on_event):
        with libraries():
            from huggingface_hub import get_token

            from loratune.export import hub, portable
            from loratune.lora import adapter_files

        hub.check_name(repository)
        if isinstance(adapter, loratune.Adapter):
            files = adapter.opened.verified[UNNAMED][0].files
        else:
            files = adapter_files.inspect(Path(adapter))
        if edits := files.edits():
            raise AdapterError(
                [replace(edit, fix="restore it: an adapter is pushed as it was saved") for edit in edits]
            )
        if not files.record:
            note(f"{files.path}: keeps no record of its files and its base, so neither was verified")
        with tempfile.TemporaryDirectory(prefix="loratune-push-", ignore_cleanup_errors=True) as scratch:
            place, named = Path(scratch) / "copy", hub.base_name(files, base)
            copy = portable.copy(files, place, repository, named, with_system=with_system)
            if files.record.get(portable.PROMPTS):
                note(
                    "prompts of the training rows are left out of loratune.json; the card is uploaded with its example"
                )
            if files.record.get(SYSTEM) and not with_system:
                what = "the system message of the training rows is left out of loratune.json"
                note(f"{what}; `with_system=True` uploads it")
            if ROW_HASHES in files.states:
                note(f"{ROW_HASHES}, hashes of the training rows, is left out")
            with hub.explained(repository):
                token = get_token() or ""
            if re.fullmatch(r"[!-~]+", token) is None:
                what = "the token has characters that no token has" if token else "no login to the hub is found"
                fix = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"
                raise ConfigError(Problem(Code.PUSH_LOGIN, what, fix=fix))
            with hub.explained(repository, token):
                return hub.upload(token, repository, copy, public=public)
