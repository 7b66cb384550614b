"""How the processes of a run come by their store: its address, its port and its secret."""

import ipaddress
import os
import secrets
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loratune.errors import LostError, Problem
from loratune.training import secret
from loratune.training.signed_store import SignedStore


def own_store(rank: int, count: int, device: torch.device) -> tuple[SignedStore, Callable[[], None]]:
    """A store beside torch's, which the main process keeps at a port that is free.

    It listens on the loopback of one machine, or on the address by which the other machines know the main process. What
    crosses torch's own connections before it stands is public. Returns the store, and what removes a file that was
    needed to begin. Raises LostError: no address to listen on, or no secret in common.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(count)
    address = ipaddress.ip_address("127.0.0.1") if one_machine else _address_of(os.environ["MASTER_ADDR"])
    own = secrets.token_bytes(16) + _mapped(address).packed
    seen = _exchanged(own, count, device)
    nonces, addresses = [one[:16] for one in seen], [ipaddress.IPv6Address(one[16:]) for one in seen]
    name, path, shared = nonces[0].hex(), None, secret.given()
    if shared is None and rank == 0:
        path = secret.write(name, one_machine=one_machine)

    def clear() -> None:
        if path is not None:
            path.unlink(missing_ok=True)

    try:
        meeting = next((one for one in addresses if not _is_loopback(one)), addresses[0])
        listener = _listener(meeting) if rank == 0 else None
        port = listener.getsockname()[1] if listener else 0
        port = int.from_bytes(_exchanged(port.to_bytes(2, "big"), count, device)[0], "big")
        shared = shared or secret.read(name, one_machine=one_machine)
        if b"\0" in _exchanged(bytes([shared is not None]), count, device):
            raise _no_secret(one_machine=one_machine)
        raw = TCPStore(
            str(meeting.ipv4_mapped or meeting), port, is_master=rank == 0, wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )  # fmt: skip
    except BaseException:
        clear()
        raise
    assert shared is not None
    return SignedStore(raw, secret.derived(shared, nonces)), clear


def _exchanged(own: bytes, count: int, device: torch.device) -> list[bytes]:
    """Bytes of all processes, by rank, as many of each: a tensor, where torch's collectives of objects would pickle."""
    tensor = torch.tensor(list(own), dtype=torch.uint8, device=device)
    found = [torch.empty_like(tensor) for _ in range(count)]
    dist.all_gather(found, tensor)
    return [bytes(one.tolist()) for one in found]


def _address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address that a host name stands for on this machine."""
    return ipaddress.ip_address(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


def _mapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv6Address:
    return ipaddress.IPv6Address(f"::ffff:{address}") if address.version == 4 else ipaddress.IPv6Address(address)


def _is_loopback(address: ipaddress.IPv6Address) -> bool:
    return (address.ipv4_mapped or address).is_loopback


def _listener(address: ipaddress.IPv6Address) -> socket.socket:
    """A socket that listens at a free port of this address, and of no other."""
    plain = address.ipv4_mapped
    try:
        listener = socket.socket(socket.AF_INET if plain else socket.AF_INET6)
        listener.bind((str(plain or address), 0))
    except OSError as error:
        what = f"the main process cannot listen on {plain or address}, as which the others know it: {error.strerror}"
        fix = "set MASTER_ADDR, or --rdzv-endpoint and --local-addr, to an address of its machine"
        raise LostError(Problem(what, fix=fix)) from None
    return listener


def _no_secret(*, one_machine: bool) -> LostError:
    if one_machine:
        what = "the processes find no directory in which to share a secret (/run/user, /dev/shm, /tmp)"
        return LostError(Problem(what, fix=f"set {secret.VARIABLE}=$(openssl rand -hex 32) for all of them"))
    what = "the machines share no secret, as neither the home nor the working directory is one that all of them see"
    return LostError(Problem(what, fix=f"set {secret.VARIABLE} to the same long random text on all of them"))
