"""An adapter directory as a repository of the hub: one commit, of files that are then downloaded and compared.

A repository is created, or one of the same visibility that holds an adapter, or nothing yet, is brought up to date.
Files of the former adapter that the new one does not have are removed in the same commit; others stay, unless they
would be read beside the adapter. So what is downloaded afterwards is this adapter, or the one that was there before.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, errors, get_session, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, and exported lazily

from loratune.codes import Code
from loratune.errors import AdapterError, ConfigError, ModelError, Problem, ResourceError
from loratune.events import note, progress
from loratune.export import portable
from loratune.export.hub_errors import LOGIN, explained, without
from loratune.export.portable import CARD, PortableCopy
from loratune.lora import adapter_files
from loratune.lora.adapter_files import CONFIG_FILE, AdapterFiles
from loratune.model import source
from loratune.system import directories
from loratune.system.files import sha256
from loratune.system.records import ROW_HASHES

_SECONDS = 120.0
"""How long a single read or write on a connection may take; the client itself has no limit."""
_NEW = (".gitattributes", CARD)
"""What the hub itself puts into a new repository."""


@dataclass(frozen=True)
class UploadedFile:
    """A file in the repository. bytes: its size. sha256: of what was sent, and of what was downloaded again."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """What was uploaded.

    Attributes:
        repository: USER/NAME.
        url: Where it can be seen.
        public: Whether everyone can see it; else only its owners.
        created: The repository is new.
        commit: The commit that holds these files.
        unchanged: The repository held them already, and no commit was made.
        base: The id of the base that the uploaded configuration names.
        files: Each was downloaded again, and is equal.
        paths_replaced: The files in which paths of this machine were replaced.
        removed: Files of the former adapter.
        left_out: What the directory holds and is no part of the adapter.
    """

    repository: str
    url: str
    public: bool
    created: bool
    commit: str
    unchanged: bool
    base: str
    files: tuple[UploadedFile, ...]
    paths_replaced: tuple[str, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the sums."""
        totals = {"bytes": sum(file.bytes for file in self.files), "files_equal": len(self.files)}
        return asdict(self) | totals


def check_name(name: str, key: str = "") -> None:
    """Raises ConfigError: this cannot be the name of a repository, with its owner. key: the option that gives it."""
    if name.count("/") == 1:
        with suppress(errors.HFValidationError):
            validate_repo_id(name)
            return
    what = "not the name of a repository on the hub"
    fix = "give it as USER/NAME, at most 96 letters and digits with single - _ . between them"
    raise ConfigError(Problem(Code.PUSH_REPOSITORY, what, name or "''", key, fix))


def base_on_hub(adapter: AdapterFiles, given: str | None) -> str:
    """The id on the hub of the base that the uploaded adapter is to name.

    Args:
        adapter: The adapter.
        given: The id that the user gives for a base that the adapter knows by its path.

    Raises:
        ConfigError: The base is only a path, and no id is given; or another id than that of the adapter.
        ModelError: The hub has no such model.
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
    check_name(given, "--base")
    recorded = adapter.record.get("base")
    file = recorded.get("gguf_file") if isinstance(recorded, dict) else None
    try:
        source.check_repository(given, None, file if isinstance(file, str) else "config.json", perhaps_path=False)
    except ModelError as error:
        problem = replace(error.problems[0], what=without(error.problems[0].what, get_token() or ""), key="--base")
        if problem.code is Code.MODEL_HUB_UNREACHABLE:
            raise ResourceError(replace(problem, code=Code.PUSH_HUB)) from None
        raise ModelError(problem) from None
    return given


def push(adapter: AdapterFiles, repository: str, *, public: bool, base: str | None) -> Upload:
    """Upload an adapter, and compare what the hub then holds with it.

    Args:
        adapter: The adapter, whose files are as its record says.
        repository: USER/NAME.
        public: Whether everyone is to see it.
        base: See `base_on_hub`.

    Raises:
        ConfigError: The repository is of the other visibility, has another name by now, or holds something else; see
            also `check_name`, `base_on_hub`, `explained`.
        AdapterError: See `portable.copy`; a file that was downloaded again is not what was sent.
        ResourceError, LockedError: See `explained`.
    """
    check_name(repository)
    with tempfile.TemporaryDirectory(prefix="loratune-push-", ignore_cleanup_errors=True) as scratch:
        base = base_on_hub(adapter, base)
        copy = portable.copy(adapter, Path(scratch) / "copy", repository, base)
        if adapter.record.get(portable.PROMPTS):
            note("prompts of the training rows are left out of loratune.json; the card is uploaded with its example")
        if (adapter.path / ROW_HASHES).is_file():
            note(f"{ROW_HASHES}, hashes of the training rows, is left out")
        with explained(repository):
            token = get_token() or ""
        if re.fullmatch(r"[!-~]+", token) is None:
            what = "the token has characters that no token has" if token else "no login to the hub is found"
            raise ConfigError(Problem(Code.PUSH_LOGIN, what, fix=LOGIN))
        with explained(repository, token):
            return _upload(HfApi(token=token), repository, copy, public)


def _upload(api: HfApi, repository: str, copy: PortableCopy, public: bool) -> Upload:
    get_session().timeout = _SECONDS
    info = _info(api, repository)
    created = info is None
    if info is None:
        api.create_repo(repository, private=not public)
        info = _info(api, repository)
        if info is None:
            raise ValueError("the repository that was just created does not exist")
    url = f"{api.endpoint}/{repository}"
    _check_visibility(info, repository, url, public, created)
    removed = _stale_files([file.rfilename for file in info.siblings or ()], copy, repository)

    sizes = {name: (copy.path / name).stat().st_size for name in copy.files}
    note(f"{repository}: uploading {len(sizes)} files, {sum(sizes.values()):,} bytes")
    additions = [CommitOperationAdd(name, copy.path / name) for name in copy.files]
    _interruptible(lambda: _send(api, repository, additions))
    deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
    commit = api.create_commit(
        repository,
        [*additions, *deletions],
        commit_message="Upload adapter with loratune",
        parent_commit=info.sha,
    )
    _interruptible(lambda: _check_equal(api, repository, copy, commit.oid))
    return Upload(
        repository=repository, url=url, public=public, created=created, commit=commit.oid,
        unchanged=commit.oid == info.sha, base=copy.base, removed=removed, left_out=copy.left_out,
        files=tuple(UploadedFile(name, sizes[name], digest) for name, digest in copy.files.items()),
        paths_replaced=copy.changed,
    )  # fmt: skip


@progress("uploading")
def _send(api: HfApi, repository: str, additions: Sequence[CommitOperationAdd]) -> None:
    """Send large files to their storage, one at a time: for several, the client has threads that Python would wait for
    at the end."""
    for addition in additions:
        api.preupload_lfs_files(repository, [addition], free_memory=False)


def _interruptible(work: Callable[[], None]) -> None:
    """Work in a thread that is abandoned at Ctrl-C: while Xet waits for the network, no signal is handled."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _info(api: HfApi, repository: str) -> ModelInfo | None:
    """The hub's record of a repository; None if it does not exist, or this login cannot see it.

    Raises:
        ValueError: The answer is incomplete.
    """
    try:
        info = api.model_info(repository, timeout=_SECONDS)
    except errors.RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return None
    if type(info.private) is not bool or not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise ValueError("it lacks the visibility of the repository or its last commit")
    return info


def _check_visibility(info: ModelInfo, repository: str, url: str, public: bool, created: bool) -> None:
    if info.id != repository:
        what, fix = f"is called {info.id} on the hub", "push to that name"
    elif info.private is not public:
        return
    elif created:
        what = f"the hub created the repository as {'private' if info.private else 'public'}; nothing was uploaded"
        fix = f"look at {url}/settings"
    elif public:
        what, fix = "exists and is private", f"leave out --public, or first make it public on {url}/settings"
    else:
        what = "exists and is public, so everyone would see the adapter"
        fix = f"add --public, or first make it private on {url}/settings"
    raise ConfigError(Problem(Code.PUSH_REPOSITORY, what, repository, fix=fix))


def _stale_files(present: Sequence[str], copy: PortableCopy, repository: str) -> tuple[str, ...]:
    """The files of a former adapter in the repository that this one does not have.

    Raises:
        ConfigError: The repository holds something else than an adapter, or what would be read beside one.
    """
    others = [name for name in present if name not in copy.files]
    stale = tuple(sorted(name for name in others if directories.is_adapter_file(name) and name != CARD))
    if CONFIG_FILE in present:
        foreign = [name for name in others if name not in stale and adapter_files.is_read(name)]
        what = "holds files that would be read beside the adapter"
    else:
        foreign = [name for name in present if name not in _NEW]
        what = f"holds something else than an adapter, as it has no {CONFIG_FILE}"
    if foreign:
        shown = ", ".join(sorted(foreign)[:3]) + (f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else "")
        fix = "push to another name, or remove them there"
        raise ConfigError(Problem(Code.PUSH_REPOSITORY, f"{what}: {shown}", repository, fix=fix))
    return stale


@progress("comparing the upload")
def _check_equal(api: HfApi, repository: str, copy: PortableCopy, commit: str) -> None:
    """Download what was uploaded, as others will. Raises AdapterError: a file is missing or differs."""
    problems = []
    for name, digest in copy.files.items():
        what = ""
        try:
            path = Path(api.hf_hub_download(repository, name, revision=commit, local_dir=copy.path.parent / "again"))
        except errors.RemoteEntryNotFoundError:
            what = "is not in the repository after the upload"
        else:
            what = "" if sha256(path) == digest else "is not in the repository as it was sent"
            path.unlink()
        if what:
            fix = f"do not use {repository} at {commit[:10]}; push again"
            problems.append(Problem(Code.EXPORT_DIFFERS, what, name, fix=fix))
    if problems:
        raise AdapterError(problems)
