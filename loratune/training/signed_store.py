"""A key-value store for the processes of one run, in which no other program can speak.

torch's `TCPStore` answers whoever connects, so what is read from it is not trusted: every value is JSON, never a
pickle, and carries an HMAC (RFC 2104, SHA-256) over its key and its bytes, made with a secret that only the processes
of this run have. A value that a stranger wrote, or moved from another key or another run, is refused. A stranger who
reaches the port can still delete values or fill the memory: then the run ends, by exit code 10.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from loratune.errors import LostError, Problem

_PIECE = 4 << 20  # bytes; torch refuses values of more than 8 MiB
_TAG = hashlib.sha256().digest_size


class _Raw(Protocol):
    """What is used of torch.distributed.TCPStore."""

    def set(self, key: str, value: Any) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: Any) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...


class SignedStore:
    """Values by name. raw: a store that anyone may write to; secret: what the processes of this run share.

    All methods raise RuntimeError or OSError if the store cannot be reached.
    """

    def __init__(self, raw: _Raw, secret: bytes):
        self._raw, self._secret = raw, secret

    def put(self, key: str, value: Any) -> None:
        """Keep a value that `json` can write, of any size."""
        content = json.dumps(value).encode()
        pieces = [content[start : start + _PIECE] for start in range(0, len(content), _PIECE)]
        for number, piece in enumerate(pieces if len(pieces) > 1 else ()):
            self._raw.set(f"{key}/{number}", piece)
        self._raw.set(key, self._sealed(key, content if len(pieces) == 1 else _Pieces.named(pieces)))

    def has(self, key: str) -> bool:
        """Whether there is something by this name; it may be a stranger's."""
        return self._raw.check([key])

    def get(self, key: str) -> Any:
        """The value; it must be there. Raises LostError: no process of this run wrote it."""
        content = self._opened(key, self._raw.get(key))
        if not content.startswith(_Pieces.MARK):
            return json.loads(content)
        pieces = []
        for number, digest in enumerate(_Pieces.digests(content)):
            piece = self._raw.get(f"{key}/{number}")
            if hashlib.sha256(piece).digest() != digest:
                raise _forged(f"{key}/{number}")
            pieces.append(piece)
        return json.loads(b"".join(pieces))

    def first(self, key: str, value: Any) -> Any:
        """Keep a small value, if there is none by this name yet. Returns the one that is kept. Raises LostError."""
        sealed = self._sealed(key, json.dumps(value).encode())
        return json.loads(self._opened(key, self._raw.compare_set(key, "", sealed)))

    def forget(self, keys: Iterable[str]) -> None:
        """Remove values. Raises LostError: one of them is there no more."""
        for key in keys:
            if not self.has(key):
                raise deleted(key)
            content = self._opened(key, self._raw.get(key))
            count = len(_Pieces.digests(content)) if content.startswith(_Pieces.MARK) else 0
            for name in (*(f"{key}/{number}" for number in range(count)), key):
                self._raw.delete_key(name)

    def _sealed(self, key: str, content: bytes) -> bytes:
        return self._tag(key, content) + content

    def _opened(self, key: str, sealed: bytes) -> bytes:
        content = sealed[_TAG:]
        if not hmac.compare_digest(sealed[:_TAG], self._tag(key, content)):
            raise _forged(key)
        return content

    def _tag(self, key: str, content: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._secret, len(name).to_bytes(8, "big") + name + content, "sha256")


class _Pieces:
    """The list of the digests of a long value's pieces, which stands in its place. JSON never begins with the mark."""

    MARK = b"pieces:"

    @classmethod
    def named(cls, pieces: Sequence[bytes]) -> bytes:
        return cls.MARK + b"".join(hashlib.sha256(piece).digest() for piece in pieces)

    @classmethod
    def digests(cls, content: bytes) -> list[bytes]:
        listed = content[len(cls.MARK) :]
        return [listed[start : start + _TAG] for start in range(0, len(listed), _TAG)]


def deleted(key: str) -> LostError:
    """The error of a value that no process of this run has removed."""
    return _stranger(f"the value `{key}` in the store of this run was not removed by one of its processes")


def _forged(key: str) -> LostError:
    return _stranger(f"the value `{key}` in the store of this run was not written by one of its processes")


def _stranger(what: str) -> LostError:
    fix = "another program reaches its port: keep the network of the machines private, then go on with --resume"
    return LostError(Problem(what, fix=fix))
