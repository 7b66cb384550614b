"""`loratune push`: uploads an adapter directory to a repository of the hub."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import get_token

from loratune.adapter.directory import SYSTEM
from loratune.codes import Code
from loratune.errors import AdapterError, ConfigError, ModelError, Problem, ResourceError
from loratune.events import note
from loratune.export import hub, portable
from loratune.export.hub import Upload
from loratune.lora.adapter_files import CONFIG_FILE, AdapterFiles
from loratune.model import source
from loratune.system.directories import ROW_HASHES


def push(
    adapter: AdapterFiles, repository: str, *, public: bool, base: str | None, with_system: bool = False
) -> Upload:
    """Check an adapter, upload it, and verify the upload.

    Args:
        adapter: The adapter.
        repository: USER/NAME.
        public: Whether to make the repository public.
        base: The base's name on the hub, if the adapter names it by a local path.
        with_system: Whether the system message of the training rows is uploaded.

    Raises:
        AdapterError: See `portable.copy`, `hub.upload`; files have changed since the adapter was saved.
        ConfigError: The name or the base is not valid; there is no login; see `portable.copy`, `hub.upload`.
        ModelError: The base does not exist on the hub.
        ResourceError, LockedError: See `hub.explained`.
    """
    hub.check_name(repository)
    if edits := adapter.edits():
        raise AdapterError([replace(edit, fix="restore it: an adapter is pushed as it was saved") for edit in edits])
    if not adapter.record:
        note(f"{adapter.path}: keeps no record of its files and its base, so neither was verified")
    with tempfile.TemporaryDirectory(prefix="loratune-push-", ignore_cleanup_errors=True) as scratch:
        place, named = Path(scratch) / "copy", _base_on_hub(adapter, base)
        copy = portable.copy(adapter, place, repository, named, with_system=with_system)
        if adapter.record.get(portable.PROMPTS):
            note("prompts of the training rows are left out of loratune.json; the card is uploaded with its example")
        if adapter.record.get(SYSTEM) and not with_system:
            note("the system message of the training rows is left out of loratune.json; --with-system uploads it")
        if ROW_HASHES in adapter.states:
            note(f"{ROW_HASHES}, hashes of the training rows, is left out")
        with hub.explained(repository):
            token = get_token() or ""
        if re.fullmatch(r"[!-~]+", token) is None:
            what = "the token has characters that no token has" if token else "no login to the hub is found"
            fix = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"
            raise ConfigError(Problem(Code.PUSH_LOGIN, what, fix=fix))
        with hub.explained(repository, token):
            return hub.upload(token, repository, copy, public=public)


def _base_on_hub(adapter: AdapterFiles, given: str | None) -> str:
    """The hub id of the base for the uploaded adapter. given: the value of `--base`.

    Raises:
        ConfigError: The adapter names a local path, and no id is given; or the id differs from that of the adapter.
        ModelError: The model does not exist on the hub.
        ResourceError: The hub cannot be reached.
    """
    if not portable.is_local(adapter.base):
        if given in (None, adapter.base):
            return adapter.base
        what, fix = f"the adapter was trained on {adapter.base}", "leave the option out"
        raise ConfigError(Problem(Code.PUSH_LOCAL_PATH, what, given or "", "--base", fix))
    if given is None:
        what = f"names the base by a path of this machine, {adapter.base}, so nobody else could load the adapter"
        where, fix = str(adapter.path / CONFIG_FILE), "give its name on the hub, with --base USER/MODEL"
        raise ConfigError(Problem(Code.PUSH_LOCAL_PATH, what, where, "base_model_name_or_path", fix))
    hub.check_name(given, "--base")
    recorded = adapter.record.get("base")
    file = recorded.get("gguf_file") if isinstance(recorded, dict) else None
    try:
        source.check_repository(given, None, file if isinstance(file, str) else "config.json", perhaps_path=False)
    except ModelError as error:
        what = hub.without(error.problems[0].what, get_token() or "")
        problem = replace(error.problems[0], what=what, key="--base")
        if problem.code is Code.MODEL_HUB_UNREACHABLE:
            raise ResourceError(replace(problem, code=Code.PUSH_HUB)) from None
        raise ModelError(problem) from None
    return given
