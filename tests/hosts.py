"""Two hosts on one machine: network namespaces with a host name, an address and a cable."""

import os
import shutil
import signal
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Self

_ADDRESSES = ("198.51.100.1", "198.51.100.2")  # RFC 5737: for documentation, routed nowhere
_HOSTS = Path("/etc/netns")  # `ip netns exec` mounts a namespace's files over those of /etc
_NAME_AND_RUN = 'hostname "$0" && exec "$@"'


def why_not() -> str | None:
    """Why hosts cannot be created here; None if they can."""
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
    """A context with hosts `host-a` and `host-b`; its exit kills every process on them.

    Each resolves its own name to 127.0.1.1, as on Debian, and the other's to its address.
    """

    names = ("host-a", "host-b")
    addresses = _ADDRESSES

    def __enter__(self) -> Self:
        tag = uuid.uuid4().hex[:8]
        self._spaces = [f"rz{tag}a", f"rz{tag}b"]
        for space in self._spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            known = "127.0.0.1 localhost\n"
            for host, name in enumerate(self.names):
                own = space == self._spaces[host]
                known += f"{'127.0.1.1' if own else self.addresses[host]} {name}\n"
            (_HOSTS / space).mkdir(parents=True)
            (_HOSTS / space / "hosts").write_text(known)
        one, other = self._spaces
        _ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", other)
        for space, address in zip(self._spaces, _ADDRESSES, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
        self.plug_in()
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
            shutil.rmtree(_HOSTS / space)

    def command(self, host: int, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        inside = ["unshare", "--uts", "sh", "-c", _NAME_AND_RUN, self.names[host]]
        return ["ip", "netns", "exec", self._spaces[host], *inside, *command]

    def cut(self) -> None:
        """Unplug the cable from both hosts: packets are lost, and no connection is reset."""
        for space in self._spaces:
            _ip("-n", space, "link", "set", "cable", "down")

    def plug_in(self) -> None:
        """Plug the cable in again."""
        for space in self._spaces:
            _ip("-n", space, "link", "set", "cable", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
