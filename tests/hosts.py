"""Two emulated hosts on this machine: network namespaces, each with host name and address."""

import os
import shutil
import signal
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Self

_ADDRESSES = ("198.51.100.1", "198.51.100.2")  # RFC 5737: for documentation, never routed
_NETNS_ETC = Path("/etc/netns")  # `ip netns exec` mounts a namespace's files from here over /etc
_SET_NAME_AND_RUN = 'hostname "$0" && exec "$@"'


def reason_unavailable() -> str | None:
    """Reason why hosts cannot be emulated on this machine; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"network namespaces need the command {tool} (Debian: iproute2, util-linux)"
    name = f"rz{uuid.uuid4().hex[:8]}"
    for command in (
        ["netns", "add", name],
        ["-n", name, "link", "add", "name", "cable", "type", "veth"],
    ):
        created = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
        if created.returncode:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            return f"no network namespaces here: {created.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class TwoHosts:
    """Context manager: hosts `host-a` and `host-b`; its exit kills every process on them.

    Each host resolves its own name to 127.0.1.1, as on Debian, and the other's name to its address.
    """

    names = ("host-a", "host-b")
    addresses = _ADDRESSES

    def __enter__(self) -> Self:
        tag = uuid.uuid4().hex[:8]
        self._spaces = [f"rz{tag}a", f"rz{tag}b"]
        for space in self._spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            hosts = "127.0.0.1 localhost\n"
            for host, name in enumerate(self.names):
                own = space == self._spaces[host]
                hosts += f"{'127.0.1.1' if own else self.addresses[host]} {name}\n"
            (_NETNS_ETC / space).mkdir(parents=True)
            (_NETNS_ETC / space / "hosts").write_text(hosts)
        first, second = self._spaces
        _ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", second)
        for space, address in zip(self._spaces, _ADDRESSES, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces:
            inside = subprocess.run(
                ["ip", "netns", "pids", space], capture_output=True, text=True, check=True
            )
            for process in inside.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            _ip("netns", "del", space)
            shutil.rmtree(_NETNS_ETC / space)

    def command(self, host: int, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        inside = ["unshare", "--uts", "sh", "-c", _SET_NAME_AND_RUN, self.names[host]]
        return ["ip", "netns", "exec", self._spaces[host], *inside, *command]

    def disconnect(self) -> None:
        """Take the link down on both hosts: packets are dropped, and no connection is reset."""
        for space in self._spaces:
            _ip("-n", space, "link", "set", "cable", "down")

    def connect(self) -> None:
        """Bring the link up on both hosts."""
        for space in self._spaces:
            _ip("-n", space, "link", "set", "cable", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
