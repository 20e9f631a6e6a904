"""Hosts as network namespaces on one machine: a bridge, a link of a set rate for each, and counters of what it sent.

Each host is a namespace with one interface, ``eth0``, of 10.77.0.0/24, one end of a veth pair whose other end is a port
of a bridge. What a host sends is limited by a token bucket (``tc ... tbf``) on its own interface; what it receives is
limited by the others' sending. Needs root, iproute2, and a kernel with namespaces, veth, bridge and tbf; a delay needs
netem, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

INTERFACE = "eth0"
_NETWORK = "10.77.0"
_PREFIX = "fxmn"


class UnavailableError(RuntimeError):
    """This machine or user cannot make namespaces with limited links; says why."""


def run(*command: str) -> str:
    """What ``command`` printed.

    Raises:
        UnavailableError: It is not there, or failed; with its message.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        raise UnavailableError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def shaper(rate: float, delay: float = 0.0, interface: str = INTERFACE) -> list[list[str]]:
    """The ``tc`` commands that limit ``interface`` to ``rate`` Mb/s, and hold back each packet for ``delay`` ms.

    The bucket holds what the link carries in 2 ms, at least 64 KiB (the largest frame that TCP hands down), so that the
    first 2 ms after a pause are not limited; the queue holds 50 ms.
    """
    burst = max(65_600, int(rate * 1e6 / 8 * 0.002))
    bucket = ["tbf", "rate", f"{rate:g}mbit", "burst", f"{burst}b", "latency", "50ms"]
    commands = [["tc", "qdisc", "replace", "dev", interface, "root", "handle", "1:", *bucket]]
    if delay:
        limit = ["limit", "100000"]
        commands.append(
            ["tc", "qdisc", "replace", "dev", interface, "parent", "1:1", "netem", *limit, "delay", f"{delay:g}ms"]
        )
    return commands


def limit(rate: float, delay: float = 0.0, interface: str = INTERFACE) -> None:
    """Limits the host this process runs on."""
    for command in shaper(rate, delay, interface):
        run(*command)


def sent_bytes(interface: str = INTERFACE) -> int:
    """That the host this process runs on has sent, headers included, as the interface counts them.

    A frame that TCP hands down in one piece (up to 64 KiB, segmentation offload) is counted once, with one header.
    """
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text(encoding="ascii"))


class Hosts:
    """A bridge and ``count`` hosts on it, for as long as the ``with`` block runs.

    Names contain the process id, so that two runs do not meet; all are removed at the end, whatever happened, and so
    are leftovers of runs that were killed.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"{_PREFIX}{os.getpid()}-{index}" for index in range(count)]
        self.addresses = [f"{_NETWORK}.{index + 1}" for index in range(count)]
        self._bridge = f"{_PREFIX}{os.getpid()}"

    def __enter__(self) -> Hosts:
        """Makes them.

        Raises:
            UnavailableError: Something of it is not allowed or not there.
        """
        check()
        remove_leftovers()
        try:
            run("ip", "link", "add", self._bridge, "type", "bridge", "forward_delay", "0")
            run("ip", "link", "set", self._bridge, "up")
            for index, name in enumerate(self.names):
                self._add(name, index)
        except BaseException:
            self._remove()
            raise
        return self

    def _add(self, name: str, index: int) -> None:
        port, other = f"{_PREFIX}{os.getpid()}p{index}", f"{_PREFIX}{os.getpid()}h{index}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", port, "type", "veth", "peer", "name", other)
        run("ip", "link", "set", other, "netns", name)
        run("ip", "-n", name, "link", "set", other, "name", INTERFACE)
        run("ip", "link", "set", port, "master", self._bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{self.addresses[index]}/24", "dev", INTERFACE)
        run("ip", "-n", name, "link", "set", INTERFACE, "up")
        run("ip", "-n", name, "link", "set", "lo", "up")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in self.names:
            _try("ip", "netns", "del", name)
        for index in range(len(self.names)):
            _try("ip", "link", "del", f"{_PREFIX}{os.getpid()}p{index}")
        _try("ip", "link", "del", self._bridge)

    def start(self, index: int, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """A process on one host."""
        whole = ["ip", "netns", "exec", self.names[index], *command]
        return subprocess.Popen(whole, text=True, **options)  # type: ignore[call-overload, no-any-return]


def check(delay: float = 0.0) -> None:
    """Raises UnavailableError, with the reason, where this process cannot make namespaces with limited links."""
    if os.name != "posix" or not hasattr(os, "geteuid"):
        raise UnavailableError("network namespaces are there on Linux only")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} is not installed (package iproute2)")
    if os.geteuid() != 0:
        raise UnavailableError("network namespaces need root")
    probe, pair = f"{_PREFIX}{os.getpid()}-probe", f"{_PREFIX}{os.getpid()}q"
    try:
        run("ip", "netns", "add", probe)
        run("ip", "link", "add", pair, "type", "veth", "peer", "name", f"{pair}o")
        for command in shaper(100.0, delay, interface=pair):
            run(*command)
    except UnavailableError as error:
        raise UnavailableError(f"namespaces with limited links are not possible here: {error}") from error
    finally:
        _try("ip", "link", "del", pair)
        _try("ip", "netns", "del", probe)


def remove_leftovers() -> None:
    """Removes namespaces, ports and bridges of runs that are no more."""
    found = [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.strip()]
    for name in found:
        if _abandoned(name):
            _try("ip", "netns", "del", name)
    for line in run("ip", "-o", "link", "show").splitlines():
        name = line.split(":")[1].strip().partition("@")[0]
        if _abandoned(name):
            _try("ip", "link", "del", name)


def _abandoned(name: str) -> bool:
    """Whether it bears the number of a process that is no more."""
    match = re.match(rf"{_PREFIX}(\d+)", name)
    return match is not None and not Path(f"/proc/{match[1]}").exists()


def _try(*command: str) -> None:
    subprocess.run(command, capture_output=True, timeout=30, check=False)
