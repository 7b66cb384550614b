"""How the processes of a run meet in a store of their own, to which no other program can write.

torch's `TCPStore` accepts every connection, so what is read from it is not trusted: every value is JSON, never a
pickle, and carries an HMAC (RFC 2104, SHA-256) over its key and its bytes, made with a secret that only the processes
of this run have. A value that another program wrote, or moved from another key or another run, is refused. A program
that reaches the port can still delete values or fill the memory: then the run ends, with exit code 10.

The secret is not the launcher's run id: torchrun keeps that as a key in a store that answers everybody who reaches its
endpoint.
"""

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loratune.codes import Code
from loratune.errors import LostError, Problem
from loratune.system.signals import exit_while_blocked

_log = logging.getLogger(__name__)

SECRET_VARIABLE = "LORATUNE_SECRET"
"""The environment variable that gives one secret to machines without a common directory."""
_SHORTEST = 16  # characters of a secret that a user sets
_CHUNK = 4 << 20  # bytes; torch refuses values of more than 8 MiB
_TAG = hashlib.sha256().digest_size


def open_store(rank: int, count: int, device: torch.device) -> tuple["SignedStore", Callable[[], None]]:
    """Open a store beside torch's, which the main process serves at a free port.

    It listens on the loopback of one machine, or on the address by which the other machines know the main process. What
    crosses torch's own connections before the store is open is public.

    Returns:
        The store, and a function that removes the file which the processes needed to meet.

    Raises:
        LostError: There is no address to listen on, or the processes have no secret in common.
    """
    path: Path | None = None

    def clean_up() -> None:
        if path is not None:
            path.unlink(missing_ok=True)

    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(count)
    address = ipaddress.ip_address("127.0.0.1") if one_machine else _resolved(os.environ["MASTER_ADDR"])
    try:
        with exit_while_blocked(clean_up):
            messages = _exchange(secrets.token_bytes(16) + _as_ipv6(address).packed, count, device)
            nonces = [message[:16] for message in messages]
            addresses = [ipaddress.IPv6Address(message[16:]) for message in messages]
            name, secret = nonces[0].hex(), secret_of_user()
            if secret is None and rank == 0:
                path = write_secret(name, one_machine=one_machine)
            meeting = next((address for address in addresses if not _is_loopback(address)), addresses[0])
            listener = _listen(meeting) if rank == 0 else None
            own_port = listener.getsockname()[1] if listener else 0
            port = int.from_bytes(_exchange(own_port.to_bytes(2, "big"), count, device)[0], "big")
            secret = secret or read_secret(name, one_machine=one_machine)
            if b"\0" in _exchange(bytes([secret is not None]), count, device):
                raise _no_secret_error(one_machine=one_machine)
            raw = TCPStore(
                str(meeting.ipv4_mapped or meeting), port, is_master=rank == 0, wait_for_workers=False,
                master_listen_fd=listener.detach() if listener else None,
            )  # fmt: skip
    except BaseException:
        clean_up()
        raise
    assert secret is not None
    return SignedStore(raw, run_secret(secret, nonces)), clean_up


def _exchange(message: bytes, count: int, device: torch.device) -> list[bytes]:
    """Send bytes to all processes, and receive as many of each, by rank.

    They are sent as a tensor, as torch's collectives of objects would pickle them.
    """
    tensor = torch.tensor(list(message), dtype=torch.uint8, device=device)
    received = [torch.empty_like(tensor) for _ in range(count)]
    dist.all_gather(received, tensor)
    return [bytes(other.tolist()) for other in received]


def _resolved(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of a host name on this machine."""
    return ipaddress.ip_address(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


def _as_ipv6(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv6Address:
    return ipaddress.IPv6Address(f"::ffff:{address}") if address.version == 4 else ipaddress.IPv6Address(address)


def _is_loopback(address: ipaddress.IPv6Address) -> bool:
    return (address.ipv4_mapped or address).is_loopback


def _listen(address: ipaddress.IPv6Address) -> socket.socket:
    """A socket that listens at a free port of this address, and of no other."""
    ipv4 = address.ipv4_mapped
    try:
        listener = socket.socket(socket.AF_INET if ipv4 else socket.AF_INET6)
        listener.bind((str(ipv4 or address), 0))
    except OSError as error:
        what = f"the main process cannot listen on {ipv4 or address}, its address for the others: {error.strerror}"
        fix = "set MASTER_ADDR, or --rdzv-endpoint and --local-addr, to an address of its machine"
        raise LostError(Problem(Code.DISTRIBUTED_CANNOT_LISTEN, what, fix=fix)) from None
    return listener


def _no_secret_error(*, one_machine: bool) -> LostError:
    if one_machine:
        what = "the processes find no directory in which they can share a secret (/run/user, /dev/shm, /tmp)"
        fix = f"set {SECRET_VARIABLE}=$(openssl rand -hex 32) for all of them"
    else:
        what = "the machines share no secret, as neither the home nor the working directory is common to all of them"
        fix = f"set {SECRET_VARIABLE} to the same long random text on all of them"
    return LostError(Problem(Code.DISTRIBUTED_NO_SECRET, what, fix=fix))


def secret_of_user() -> bytes | None:
    """The secret that the user set, None without one.

    Raises:
        LostError: The secret can be guessed.
    """
    text = os.environ.get(SECRET_VARIABLE)
    if text is None:
        return None
    if len(text) < _SHORTEST or len(set(text)) < _SHORTEST // 2:
        what = f"is shorter than {_SHORTEST} characters, or repeats itself, so it can be guessed"
        fix = f"set {SECRET_VARIABLE}=$(openssl rand -hex 32), the same on all machines"
        raise LostError(Problem(Code.DISTRIBUTED_WEAK_SECRET, what, SECRET_VARIABLE, fix=fix))
    return os.fsencode(text)


def write_secret(name: str, *, one_machine: bool) -> Path | None:
    """Write a new secret to a file that no other user can read, where the processes of this run look for it.

    Args:
        name: A random text that all of them know.
        one_machine: Whether no other machine needs to see the file.

    Returns:
        The path of the file, which the caller removes; None if no directory can be written.
    """
    for directory in _common_directories(one_machine=one_machine):
        path = directory / _secret_file(name)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(secrets.token_hex(32))
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return path
        except OSError:
            _log.debug("no secret can be shared in %s", directory, exc_info=True)
    return None


def read_secret(name: str, *, one_machine: bool) -> bytes | None:
    """What `write_secret` wrote in another process of the same user; None if it cannot be found from here."""
    for directory in _common_directories(one_machine=one_machine):
        with suppress(OSError):
            handle = os.open(directory / _secret_file(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(handle, "rb") as file:
                status = os.fstat(handle)
                private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077 and status.st_uid == os.geteuid()
                if private and len(content := file.read(65)) == 64:
                    return content
    return None


def run_secret(secret: bytes, nonces: Iterable[bytes]) -> bytes:
    """The secret of one run. nonces: random bytes of each of its processes, so that no earlier run had the same."""
    return hmac.digest(secret, b"loratune run" + b"".join(nonces), "sha256")


def _secret_file(name: str) -> str:
    return f".loratune-{name}.secret"


def _common_directories(*, one_machine: bool) -> list[Path]:
    """Directories that all processes of a user see, whatever their environments say of temporary files."""
    if one_machine:
        return [Path(f"/run/user/{os.geteuid()}"), Path("/dev/shm"), Path("/tmp")]
    with suppress(RuntimeError):
        return [Path.home(), Path.cwd()]
    return [Path.cwd()]


class _RawStore(Protocol):
    """What is used of torch.distributed.TCPStore."""

    def set(self, key: str, value: Any) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: Any) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...


class SignedStore:
    """Values by key, each with a signature. All methods raise RuntimeError or OSError if the store is out of reach.

    Args:
        raw: A store to which anyone may write.
        secret: What only the processes of this run know.
    """

    def __init__(self, raw: _RawStore, secret: bytes):
        self._raw, self._secret = raw, secret

    def put(self, key: str, value: Any) -> None:
        """Store a value that `json` can write, of any size."""
        content = json.dumps(value).encode()
        chunks = [content[start : start + _CHUNK] for start in range(0, len(content), _CHUNK)]
        for number, chunk in enumerate(chunks if len(chunks) > 1 else ()):
            self._raw.set(f"{key}/{number}", chunk)
        self._raw.set(key, self._sign(key, content if len(chunks) == 1 else _ChunkList.of(chunks)))

    def has(self, key: str) -> bool:
        """Whether there is a value, which another program may have written."""
        return self._raw.check([key])

    def get(self, key: str) -> Any:
        """The value, which must be there.

        Raises:
            LostError: No process of this run wrote it.
        """
        content = self._verify(key, self._raw.get(key))
        if not content.startswith(_ChunkList.MARK):
            return json.loads(content)
        chunks = []
        for number, digest in enumerate(_ChunkList.digests(content)):
            chunk = self._raw.get(f"{key}/{number}")
            if hashlib.sha256(chunk).digest() != digest:
                raise _forged_error(f"{key}/{number}")
            chunks.append(chunk)
        return json.loads(b"".join(chunks))

    def put_first(self, key: str, value: Any) -> Any:
        """Store a small value unless the key has one. Returns the value that the key has then.

        Raises:
            LostError: No process of this run wrote it.
        """
        signed = self._sign(key, json.dumps(value).encode())
        return json.loads(self._verify(key, self._raw.compare_set(key, "", signed)))

    def remove(self, keys: Iterable[str]) -> None:
        """Remove values.

        Raises:
            LostError: A value is no longer there, or no process of this run wrote it.
        """
        for key in keys:
            if not self.has(key):
                raise removed_error(key)
            content = self._verify(key, self._raw.get(key))
            count = len(_ChunkList.digests(content)) if content.startswith(_ChunkList.MARK) else 0
            for name in (*(f"{key}/{number}" for number in range(count)), key):
                self._raw.delete_key(name)

    def _sign(self, key: str, content: bytes) -> bytes:
        return self._tag(key, content) + content

    def _verify(self, key: str, signed: bytes) -> bytes:
        content = signed[_TAG:]
        if not hmac.compare_digest(signed[:_TAG], self._tag(key, content)):
            raise _forged_error(key)
        return content

    def _tag(self, key: str, content: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._secret, len(name).to_bytes(8, "big") + name + content, "sha256")


class _ChunkList:
    """The digests of a long value's chunks, which are stored in its place. JSON never begins with the mark."""

    MARK = b"chunks:"

    @classmethod
    def of(cls, chunks: Sequence[bytes]) -> bytes:
        return cls.MARK + b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)

    @classmethod
    def digests(cls, content: bytes) -> list[bytes]:
        digests = content[len(cls.MARK) :]
        return [digests[start : start + _TAG] for start in range(0, len(digests), _TAG)]


def removed_error(key: str) -> LostError:
    """The error of a value that disappeared although no process of this run removed it."""
    return _tampered_error(Code.DISTRIBUTED_VALUE_REMOVED, f"removed the value `{key}` from")


def _forged_error(key: str) -> LostError:
    return _tampered_error(Code.DISTRIBUTED_VALUE_FORGED, f"wrote the value `{key}` to")


def _tampered_error(code: Code, action: str) -> LostError:
    what = f"another program {action} the store in which the processes of this run exchange values"
    fix = "keep the network of the machines private, then continue with --resume"
    return LostError(Problem(code, what, fix=fix))
