"""What the hub's client raises, as problems with a code and what to do.

What the user can settle, a login, a name, a permission, is a ConfigError. What only time or room can, the network, a
limit, a failure of the hub, is a ResourceError. The token is taken out of every text: a server may send it back.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import errors

from loratune.codes import Code
from loratune.errors import (
    ConfigError,
    LockedError,
    LoratuneError,
    Problem,
    ResourceError,
    is_disk_full,
    is_out_of_memory,
)

_log = logging.getLogger(__name__)

_LONGEST = 300  # characters of what a server says that are shown
_QUOTA = ("storage limit", "storage quota", "quota exceeded", "out of storage", "payment required")
_PARSING = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What the client raises where an answer is not what it expects; json.JSONDecodeError is a ValueError."""

LOGIN = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"
AGAIN = "try again later; what the hub has already is not sent again"


@contextmanager
def explained(repository: str, token: str = "") -> Iterator[None]:
    """Inside, the hub is asked. repository: what it is asked about. token: what must not be shown.

    Raises:
        ConfigError: No login, no permission, no such name.
        LockedError: Somebody else has changed the repository.
        ResourceError: The hub cannot be reached or fails, or a limit is reached.
    """
    try:
        yield
    except LoratuneError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # of the disk on this machine
        if is_disk_full(error) or is_out_of_memory(error):
            raise
        _log.debug("the hub's client: %s", without("".join(traceback.format_exception(error)), token))
        raise _explain(_cause(error), repository, token) from None


def _cause(error: BaseException) -> BaseException:
    """What is behind an error of the client that only names a file, or says that the file is not in the cache."""
    while isinstance(error, RuntimeError | errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain(error: BaseException, where: str, token: str) -> LoratuneError:
    said = without(_said(error), token)
    response = getattr(error, "response", None)
    if response is not None:
        return _refused(response.status_code, response.headers, said, where)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return ConfigError(Problem(Code.PUSH_NO_TOKEN, "no login to the hub is found", fix=LOGIN))
    if isinstance(error, errors.OfflineModeIsEnabled):
        what, fix = "the hub's client is set to be offline", "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        return ResourceError(Problem(Code.PUSH_OFFLINE, what, where, fix=fix))
    if "Invalid metadata in README.md" in said:
        fix = "correct the lines between --- at the start of the card"
        return ConfigError(Problem(Code.PUSH_BAD_CARD, f"the hub does not accept the card: {said}", where, fix=fix))
    if "LFS batch API returned errors" in said:
        return _refused(403 if any(words in said.lower() for words in _QUOTA) else 400, {}, said, where)
    if isinstance(error, _PARSING):
        what = f"the answer is not that of a hub ({type(error).__name__}: {said})"
        return ResourceError(Problem(Code.PUSH_BAD_ANSWER, what, where, fix="check HF_ENDPOINT and the proxy"))
    what = f"the connection to the hub failed ({type(error).__name__}: {said})"
    fix = "set HF_HUB_DISABLE_XET=1, as this hub has no Xet storage" if "xet" in said else "check the connection"
    return ResourceError(Problem(Code.PUSH_UNREACHABLE, what, where, fix=f"{fix}, and {AGAIN}"))


def _refused(status: int, headers: Any, said: str, where: str) -> LoratuneError:
    """The error of an HTTP status."""
    if status in (402, 413, 507) or (status == 403 and any(words in said.lower() for words in _QUOTA)):
        fix = "make room on the hub, or let others see it with --public"
        return ResourceError(Problem(Code.PUSH_QUOTA, f"the hub has no room for it: {said}", where, fix=fix))
    if status == 429:
        wait = str(headers.get("Retry-After", ""))
        fix = f"wait {wait} s, and try again" if wait.isdecimal() and len(wait) < 9 else AGAIN
        return ResourceError(Problem(Code.PUSH_RATE_LIMIT, f"too many requests: {said}", where, fix=fix))
    if status >= 500 or status == 408:
        return ResourceError(Problem(Code.PUSH_HUB_FAILED, f"the hub failed: {said}", where, fix=AGAIN))
    if status in (409, 412):
        what = f"somebody else has changed the repository meanwhile: {said}"
        return LockedError(Problem(Code.PUSH_CHANGED_MEANWHILE, what, where, fix="look at it, and push again"))
    if status == 401:
        return ConfigError(
            Problem(Code.PUSH_UNAUTHORIZED, f"the hub does not accept the login: {said}", where, fix=LOGIN)
        )
    if status == 403:
        fix = "use a token with write permission there, or push under your own name"
        return ConfigError(Problem(Code.PUSH_FORBIDDEN, f"the login may not write there: {said}", where, fix=fix))
    if status == 404:
        fix = "check the name; the part before the / is a user or an organization"
        return ConfigError(Problem(Code.PUSH_NOT_FOUND, f"the hub has no such place: {said}", where, fix=fix))
    fix = "check HF_ENDPOINT and the proxy" if status < 400 else ""
    return ConfigError(Problem(Code.PUSH_REFUSED, f"the hub refuses it, HTTP {status}: {said}", where, fix=fix))


def _said(error: BaseException) -> str:
    """What the server says in words; else what the client does, on one line without addresses."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [...]"


def without(text: str, token: str) -> str:
    """A text in which the token, if there is one, is not shown."""
    return text.replace(token, "[token]") if token else text
