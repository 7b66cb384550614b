"""What the hub's client raises, as problems with a code and what to do.

What the user can settle, such as a login, a name or a permission, is a ConfigError. What needs time or room, such as
the network, a limit or a failure of the hub, is a ResourceError. The token is removed from every text, as a server may
send it back.
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

_LONGEST = 300  # characters of a server's message that are shown
_QUOTA = ("storage limit", "storage quota", "quota exceeded", "out of storage", "payment required")
_PARSING = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What the client raises where an answer is not what it expects; json.JSONDecodeError is a ValueError."""

LOGIN = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"
AGAIN = "try again later; what the hub has already is not sent again"


@contextmanager
def explained(repository: str, token: str = "") -> Iterator[None]:
    """Translate errors of the hub's client. repository: what it is asked about. token: what must not be shown.

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
        is_local = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
        if is_local or is_disk_full(error) or is_out_of_memory(error):
            raise
        _log.debug("the hub's client: %s", without("".join(traceback.format_exception(error)), token))
        raise _translated(_cause(error), repository, token) from None


def _cause(error: BaseException) -> BaseException:
    """The cause of an error of the client that only names a file, or says that the file is not in the cache."""
    while isinstance(error, RuntimeError | errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _translated(error: BaseException, where: str, token: str) -> LoratuneError:
    said = without(_message(error), token)
    response = getattr(error, "response", None)
    if response is not None:
        return _refused(response.status_code, response.headers, said, where)
    if "LFS batch API returned errors" in said:
        return _refused(400, {}, said, where)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return ConfigError(Problem(Code.PUSH_LOGIN, "no login to the hub is found", fix=LOGIN))
    if "Invalid metadata in README.md" in said:
        fix = "correct the lines between --- at the start of the card"
        return ConfigError(Problem(Code.PUSH_REPOSITORY, f"the hub does not accept the card: {said}", where, fix=fix))
    if isinstance(error, errors.OfflineModeIsEnabled):
        what, fix = "the hub's client is set to be offline", "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    elif isinstance(error, _PARSING):
        what = f"the answer is not that of a hub ({type(error).__name__}: {said})"
        fix = "check HF_ENDPOINT and the proxy"
    else:
        what = f"the connection to the hub failed ({type(error).__name__}: {said})"
        xet = "set HF_HUB_DISABLE_XET=1, as this hub has no Xet storage"
        fix = f"{xet if 'xet' in said else 'check the connection'}, and {AGAIN}"
    return ResourceError(Problem(Code.PUSH_HUB, what, where, fix=fix))


def _refused(status: int, headers: Any, said: str, where: str) -> LoratuneError:
    """The error of an HTTP status."""
    is_quota = status in (400, 403) and any(words in said.lower() for words in _QUOTA)
    if status in (402, 413, 507) or is_quota:
        what, fix = "the hub has no room for it", "make room on the hub, or let others see it with --public"
        return ResourceError(Problem(Code.PUSH_HUB, f"{what}: {said}", where, fix=fix))
    if status in (408, 429) or status >= 500:
        what, wait = "too many requests" if status == 429 else "the hub failed", str(headers.get("Retry-After", ""))
        fix = f"wait {wait} s, and try again" if status == 429 and wait.isdecimal() and len(wait) < 9 else AGAIN
        return ResourceError(Problem(Code.PUSH_HUB, f"{what}: {said}", where, fix=fix))
    if status in (409, 412):
        what = f"somebody else has changed the repository meanwhile: {said}"
        return LockedError(Problem(Code.PUSH_HUB, what, where, fix="look at it, and push again"))
    if status == 401:
        return ConfigError(Problem(Code.PUSH_LOGIN, f"the hub does not accept the login: {said}", where, fix=LOGIN))
    what, fix = {
        403: ("the login may not write there", "use a token with write permission, or push under your own name"),
        404: ("the hub has no such place", "check the name; the part before the / is a user or an organization"),
    }.get(status, (f"the hub refuses it, HTTP {status}", "" if status >= 400 else "check HF_ENDPOINT and the proxy"))
    return ConfigError(Problem(Code.PUSH_REPOSITORY, f"{what}: {said}", where, fix=fix))


def _message(error: BaseException) -> str:
    """The server's message; else the client's, on one line without addresses."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [...]"


def without(text: str, token: str) -> str:
    """A text in which the token is not shown."""
    return text.replace(token, "[token]") if token else text
