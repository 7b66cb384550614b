"""Two "machines" for the tests: two network namespaces with a cable between them that can be cut and mended.

The cable runs through a bridge in a third namespace, the switch. To cut it is to put the bridge down: no packet comes
through any more, while both machines still see a live link and no socket hears of an error, as when a cable is pulled
behind a switch. Each namespace lives as long as a small process that holds it, and that process ends when its stdin
closes. So nothing has a name on the host, and even if the tests themselves are killed, nothing stays behind but what
they had started in there.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "eth0"  # the name of the network card in both machines
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CARDS = ("02:00:00:4d:00:01", "02:00:00:4d:00:02")  # the hardware addresses of the two network cards


@dataclass(frozen=True)
class Machine:
    """One network namespace: the process that holds it, and its address on the cable."""

    holder: int
    address: str = ""

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command in this machine, in the same process (nsenter forks nothing here)."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", f"--target={self.holder}", *user, "--net", "--uts", "--", *command]

    def popen(self, command: Sequence[str], **keywords: Any) -> subprocess.Popen[str]:
        """Start a command here, in text mode and as the head of a new session: its pid is also its process group."""
        process = subprocess.Popen(self.inside(command), **{"text": True, "start_new_session": True, **keywords})
        while process.poll() is None and not self.holds(process.pid):
            time.sleep(0.001)  # nsenter is still outside, where kill() would not see it
        return process

    def run(self, command: str) -> str:
        """Run a command of plain words here to its end and give what it printed; it must not fail."""
        done = subprocess.run(self.inside(command.split()), capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def holds(self, pid: int) -> bool:
        """Whether a process runs here; False for one that has ended or belongs to another user."""
        try:
            return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/proc/{self.holder}/ns/net").st_ino
        except OSError:
            return False

    def pids(self) -> list[int]:
        """All processes that run here, whatever session they moved to; without the holder."""
        everywhere = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [pid for pid in everywhere if pid != self.holder and self.holds(pid)]

    def kill(self, within_s: float = 10.0) -> None:
        """SIGKILL all that runs here, as when the power fails, and wait until it is gone."""
        end = time.monotonic() + within_s
        while pids := self.pids():
            if time.monotonic() > end:
                raise TimeoutError(f"processes {pids} do not end")
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)

    def bytes_moved(self, interface: str = INTERFACE) -> tuple[int, int]:
        """The bytes received and sent so far over an interface ("lo": between processes of this machine)."""
        table = Path(f"/proc/{self.holder}/net/dev").read_text()
        counts = re.search(rf"^\s*{re.escape(interface)}:(.*)$", table, re.MULTILINE)
        if counts is None:
            raise ValueError(f"no interface {interface}")
        numbers = counts[1].split()
        return int(numbers[0]), int(numbers[8])


@dataclass(frozen=True)
class Machines:
    """The two machines and the switch between them."""

    one: Machine
    two: Machine
    switch: Machine

    def cut(self) -> None:
        """Pull the cable: from now on each packet between the two is lost without a word."""
        self.switch.run("ip link set br0 down")

    def mend(self) -> None:
        """Plug the cable in again."""
        self.switch.run("ip link set br0 up")


@contextmanager
def two_machines(own_names: bool = True) -> Iterator[Machines]:
    """Two machines, 10.77.0.1 and 10.77.0.2, with a cable; at the end all that still runs there is killed.

    With own names the host name of each is its address: names then resolve as in a cluster that is set up well, and
    torchrun and gloo find the right interface by themselves. Without, both have this computer's name, which usually
    resolves to 127.0.0.1, or to an address that no machine has.
    """
    with ExitStack() as stack:
        switch = stack.enter_context(_namespace())
        one, two = (stack.enter_context(_namespace(switch, address)) for address in ADDRESSES)
        switch.run("ip link add br0 type bridge forward_delay 0 mcast_snooping 0")
        for number, machine in enumerate((one, two)):
            _plug_in(switch, machine, number)
            if own_names:
                machine.run(f"hostname {machine.address}")
        switch.run("ip link set br0 up")
        yield Machines(one, two, switch)


@contextmanager
def _namespace(inside: Machine | None = None, address: str = "") -> Iterator[Machine]:
    """A new network namespace; for a user who is not root, the first one also brings a user namespace for all."""
    new = ["unshare", "--net", "--uts", *([] if inside or os.geteuid() == 0 else ["--map-root-user"])]
    command = [*new, "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(
        inside.inside(command) if inside else command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as holder:
        assert holder.stdin and holder.stdout and holder.stderr
        machine = Machine(holder.pid, address)
        try:
            if holder.stdout.readline() != "ready\n":
                raise RuntimeError(holder.stderr.read().strip() or "unshare failed")
            yield machine
        finally:
            if holder.poll() is None:
                machine.kill()
            holder.stdin.close()


def _plug_in(switch: Machine, machine: Machine, number: int) -> None:
    """Lay a cable from the switch to a machine, and set up the machine's network."""
    port = f"port{number}"
    peer = f"peer name {INTERFACE} address {CARDS[number]} netns {machine.holder}"
    switch.run(f"ip link add {port} type veth {peer}")
    switch.run(f"ip link set {port} addrgenmode none master br0 up")  # none: no IPv6 chatter of its own
    machine.run("ip link set lo up")
    machine.run(f"ip address add {ADDRESSES[number]}/24 dev {INTERFACE}")
    machine.run(f"ip link set {INTERFACE} addrgenmode none up")
    # With the other's hardware address known for good, a cut shows as silence only, never as "No route to host".
    other = 1 - number
    neighbour = f"ip neighbour replace {ADDRESSES[other]} lladdr {CARDS[other]} dev {INTERFACE} nud permanent"
    machine.run(neighbour)


@functools.cache
def available() -> str:
    """Why there can be no machines here, in one line for pytest.skip; empty if there can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} here"
    try:
        with two_machines():
            return ""
    except (OSError, RuntimeError) as error:
        return f"no network namespaces here: {' '.join(str(error).split())}"
