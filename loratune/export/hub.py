"""Uploads an adapter directory to a hub repository in one commit, then downloads and compares the files.

The repository is created, or updated if it has the same visibility and is empty or holds an adapter. Files of the
former adapter that the new one does not have are removed in the same commit; other files stay, and files that would be
read with the adapter are an error. A download therefore yields either this adapter or the former one.
"""

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, errors, get_session, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, and exported lazily

from loratune.codes import Code
from loratune.errors import AdapterError, ConfigError, LockedError, LoratuneError, ModelError, Problem, ResourceError
from loratune.events import note, progress
from loratune.export.portable import CARD, PortableCopy, is_local
from loratune.lora import adapter_files
from loratune.lora.adapter_files import CONFIG_FILE, AdapterFiles
from loratune.model import source
from loratune.system import directories
from loratune.system.files import sha256
from loratune.text import without_userinfo

_log = logging.getLogger(__name__)

_SECONDS = 120.0
"""Timeout of a single read or write on a connection; the client itself has none."""
_NEW = (".gitattributes", CARD)
"""Files that the hub puts into a new repository."""
_QUOTA = ("storage limit", "storage quota", "quota exceeded", "out of storage", "payment required")
_REFUSALS = ("LFS batch API returned errors", "Invalid metadata in README.md")
"""Errors without an HTTP status, for a file and for the metadata of the card."""


@dataclass(frozen=True)
class Upload:
    """The result of an upload.

    Attributes:
        repository: USER/NAME.
        url: The URL of the repository.
        public: Whether everyone can see it; otherwise only its owners.
        created: Whether the repository is new.
        commit: The commit that holds these files.
        unchanged: Whether the repository held these files already, so that no commit was made.
        base: The id of the base in the uploaded configuration.
        files: Name, bytes and SHA-256 of each file. All were downloaded again, and are equal.
        paths_replaced: The files in which local paths were replaced.
        removed: Removed files of the former adapter.
        left_out: Files in the directory that do not belong to the adapter.
    """

    repository: str
    url: str
    public: bool
    created: bool
    commit: str
    unchanged: bool
    base: str
    files: tuple[Mapping[str, Any], ...]
    paths_replaced: tuple[str, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with totals."""
        totals = {"bytes": sum(file["bytes"] for file in self.files), "files_equal": len(self.files)}
        return asdict(self) | totals


def check_name(name: str, key: str = "") -> None:
    """Raises ConfigError: the name is not a valid USER/NAME. key: the parameter that sets it."""
    if name.count("/") == 1:
        with suppress(errors.HFValidationError):
            validate_repo_id(name)
            return
    what = "not the name of a repository on the hub"
    fix = "give it as USER/NAME, at most 96 letters and digits with single - _ . between them"
    raise ConfigError(Problem(Code.PUSH_REPOSITORY, what, name or "''", key, fix))


def base_name(adapter: AdapterFiles, given: str | None) -> str:
    """The hub id of the base for the uploaded adapter. given: the name that the user gives.

    Raises:
        ConfigError: The adapter names a local path, and no id is given; or the id differs from that of the adapter.
        ModelError: The model does not exist on the hub.
        ResourceError: The hub cannot be reached.
    """
    if not is_local(adapter.base):
        if given in (None, adapter.base):
            return adapter.base
        what, fix = f"the adapter was trained on {adapter.base}", "leave the option out"
        raise ConfigError(Problem(Code.PUSH_LOCAL_PATH, what, given or "", "base", fix))
    if given is None:
        what = f"names the base by a path of this machine, {adapter.base}, so nobody else could load the adapter"
        where, fix = str(adapter.path / CONFIG_FILE), "give its name on the hub, with `base='USER/MODEL'`"
        raise ConfigError(Problem(Code.PUSH_LOCAL_PATH, what, where, "base_model_name_or_path", fix))
    check_name(given, "base")
    recorded = adapter.record.get("base")
    file = recorded.get("gguf_file") if isinstance(recorded, dict) else None
    try:
        source.check_repository(given, None, file if isinstance(file, str) else "config.json", perhaps_path=False)
    except ModelError as error:
        what = without(error.problems[0].what, get_token() or "")
        problem = replace(error.problems[0], what=what, key="base")
        if problem.code is Code.MODEL_HUB_UNREACHABLE:
            raise ResourceError(replace(problem, code=Code.PUSH_HUB)) from None
        raise ModelError(problem) from None
    return given


def upload(token: str, repository: str, copy: PortableCopy, *, public: bool) -> Upload:
    """Upload a copy of an adapter in one commit, and compare what the hub then holds with it.

    Args:
        token: The access token.
        repository: USER/NAME.
        copy: The copy to upload.
        public: Whether the repository is public.

    Raises:
        ConfigError: The repository has the other visibility, was renamed, or holds something else; or see `explained`.
        AdapterError: A file that was downloaded again is not what was sent.
        ResourceError, LockedError: See `explained`.
    """
    get_session().timeout = _SECONDS
    api = HfApi(token=token)
    url = without_userinfo(f"{api.endpoint}/{repository}")
    found = _info(api, repository)
    if found is None:
        api.create_repo(repository, private=not public)
    info = found or _info(api, repository)
    if info is None:
        raise ValueError("the repository that was just created does not exist")
    _check_visibility(info, repository, url, public=public)
    removed = _stale_files([file.rfilename for file in info.siblings or ()], copy, repository)
    sizes = {name: (copy.path / name).stat().st_size for name in copy.files}
    note(f"{repository}: uploading {len(sizes)} files, {sum(sizes.values()):,} bytes")
    additions = [CommitOperationAdd(name, copy.path / name) for name in copy.files]
    _interruptible(lambda: _send(api, repository, additions))
    deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
    message = "Upload adapter with loratune"
    commit = api.create_commit(repository, [*additions, *deletions], commit_message=message, parent_commit=info.sha).oid
    _interruptible(lambda: _check_equal(api, repository, copy, commit))
    return Upload(
        repository=repository, url=url, public=public, created=found is None, commit=commit,
        unchanged=commit == info.sha, base=copy.base, removed=removed, left_out=copy.left_out,
        files=tuple({"name": name, "bytes": sizes[name], "sha256": copy.files[name]} for name in copy.files),
        paths_replaced=copy.changed,
    )  # fmt: skip


@progress("uploading")
def _send(api: HfApi, repository: str, additions: Sequence[CommitOperationAdd]) -> None:
    """Upload large files to their storage, one at a time: for several, the client starts threads that Python would wait
    for on exit."""
    for addition in additions:
        api.preupload_lfs_files(repository, [addition], free_memory=False)


def _interruptible(work: Callable[[], None]) -> None:
    """Run `work` in a thread that is abandoned at Ctrl-C: while Xet waits for the network, no signal is handled."""
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


def _check_visibility(info: ModelInfo, repository: str, url: str, *, public: bool) -> None:
    """Raises ConfigError: the repository has another name or visibility."""
    if info.id != repository:
        what, fix = f"is called {info.id} on the hub", "push to that name"
    elif info.private is public:
        what = f"is {'private' if info.private else 'public'} on the hub; nothing was uploaded"
        fix = f"{'leave out' if public else 'add'} `public=True`, or first change that on {url}/settings"
    else:
        return
    raise ConfigError(Problem(Code.PUSH_REPOSITORY, what, repository, fix=fix))


def _stale_files(present: Sequence[str], copy: PortableCopy, repository: str) -> tuple[str, ...]:
    """The files of a former adapter in the repository that the new one does not have.

    Raises:
        ConfigError: The repository holds something else than an adapter, or files that would be read with it.
    """
    others = [name for name in present if name not in copy.files]
    stale = tuple(sorted(name for name in others if directories.is_adapter_file(name) and name != CARD))
    if CONFIG_FILE in present:
        foreign = [name for name in others if name not in stale and adapter_files.is_read(name)]
        what = "holds files that would be read with the adapter"
    else:
        foreign = [name for name in present if name not in _NEW]
        what = f"holds something else than an adapter, as it has no {CONFIG_FILE}"
    if foreign:
        what, fix = f"{what}: {directories.shortened(sorted(foreign))}", "push to another name, or remove them there"
        raise ConfigError(Problem(Code.PUSH_REPOSITORY, what, repository, fix=fix))
    return stale


@progress("comparing the upload")
def _check_equal(api: HfApi, repository: str, copy: PortableCopy, commit: str) -> None:
    """Download the uploaded files and compare them. Raises AdapterError: a file is missing or differs."""
    problems = []
    for name, digest in copy.files.items():
        what = "is not in the repository after the upload"
        with suppress(errors.RemoteEntryNotFoundError):
            path = Path(api.hf_hub_download(repository, name, revision=commit, local_dir=copy.path.parent / "again"))
            what = "" if sha256(path) == digest else "is not in the repository as it was sent"
            path.unlink()
        if what:
            fix = f"do not use {repository} at {commit[:10]}; push again"
            problems.append(Problem(Code.EXPORT_DIFFERS, what, name, fix=fix))
    if problems:
        raise AdapterError(problems)


# Errors


@contextmanager
def explained(repository: str, token: str = "") -> Iterator[None]:
    """Translate errors of the hub's client. repository: its name, for messages. token: removed from messages, as a
    server may echo it.

    Raises:
        ConfigError: Errors that the user can fix: no login, no permission, no such name.
        LockedError: Somebody else has changed the repository.
        ResourceError: The hub cannot be reached or fails, or a limit is reached.
    """
    try:
        yield
    except LoratuneError:
        raise
    except Exception as error:
        is_local = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
        if is_local or isinstance(error, MemoryError):
            raise
        _log.debug("the hub's client: %s", without("".join(traceback.format_exception(error)), token))
        cause: BaseException = error  # some errors only name a file, or say that it is not in the cache
        while isinstance(cause, RuntimeError | errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join((getattr(cause, "server_message", None) or str(cause)).split())
        raise _translated(cause, without(text, token), repository) from None


def _translated(error: BaseException, said: str, where: str) -> LoratuneError:
    """An error of the hub's client as a LoratuneError, by its HTTP status. said: its message."""
    response: Any = getattr(error, "response", None)
    status = response.status_code if response is not None else 400 if any(one in said for one in _REFUSALS) else 0
    is_full = status in (402, 413, 507) or (status in (400, 403) and any(one in said.lower() for one in _QUOTA))
    if status == 401:
        fix = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"
        return ConfigError(Problem(Code.PUSH_LOGIN, f"the hub does not accept the login: {said}", where, fix=fix))
    if status in (409, 412):
        what = f"somebody else has changed the repository: {said}"
        return LockedError(Problem(Code.PUSH_HUB, what, where, fix="look at it, and push again"))
    if status and status < 500 and status not in (408, 429) and not is_full:
        fix = "check the name, what the message names, and whether the token may write there"
        what = f"the hub refuses it (HTTP {status}): {said}"
        return ConfigError(Problem(Code.PUSH_REPOSITORY, what, where, fix=fix))
    fix = "try again later; what the hub has already is not sent again"
    if is_full:
        what, fix = f"the hub has no room for it: {said}", "make room there, or push with `public=True`"
    elif status:
        what, wait = f"the hub failed (HTTP {status}): {said}", str(response.headers.get("Retry-After", ""))
        fix = f"wait {wait} s, and {fix}" if wait.isdecimal() and len(wait) < 9 else fix
    else:
        what = f"the hub cannot be reached, or does not answer as a hub does ({type(error).__name__}: {said})"
        xet = "set HF_HUB_DISABLE_XET=1, as this hub has no Xet storage" if "xet" in said else "check the connection"
        fix = f"{xet}, HF_HUB_OFFLINE, HF_ENDPOINT and the proxy, and {fix}"
    return ResourceError(Problem(Code.PUSH_HUB, what, where, fix=fix))


def without(text: str, token: str) -> str:
    """A text with the token masked, and without passwords in URLs."""
    return without_userinfo(text.replace(token, "[token]") if token else text)
