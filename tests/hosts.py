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
# `ip netns exec NAME` mounts the files of /etc/netns/NAME over those of /etc.
_NETNS_ETC = Path("/etc/netns")
# Code for `sh -c CODE HOST_NAME COMMAND...`: $0 is the host name and $@ the command.
_SET_NAME_AND_RUN = 'hostname "$0" && exec "$@"'


def reason_unavailable() -> str | None:
    """Reason why hosts cannot be emulated on this machine; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"network namespaces need the command {tool} (Debian: iproute2, util-linux)"
    namespace = f"rz{uuid.uuid4().hex[:8]}"
    for command in (
        ["netns", "add", namespace],
        ["-n", namespace, "link", "add", "name", "cable", "type", "veth"],
    ):
        created = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
        if created.returncode:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
            return f"no network namespaces here: {created.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", namespace], check=True)
    return None


class TwoHosts:
    """Context manager: hosts `host-a` and `host-b`; its exit kills every process on them.

    Each host resolves its own name to 127.0.1.1, as on Debian, and the name of the other host to
    that host's address. Methods take the index of a host, 0 or 1.
    """

    names = ("host-a", "host-b")
    addresses = _ADDRESSES

    def __enter__(self) -> Self:
        unique_part = uuid.uuid4().hex[:8]
        self._namespaces = [f"rz{unique_part}a", f"rz{unique_part}b"]
        for own_host, namespace in enumerate(self._namespaces):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            etc_hosts = "127.0.0.1 localhost\n"
            for host, name in enumerate(self.names):
                address = "127.0.1.1" if host == own_host else self.addresses[host]
                etc_hosts += f"{address} {name}\n"
            (_NETNS_ETC / namespace).mkdir(parents=True)
            (_NETNS_ETC / namespace / "hosts").write_text(etc_hosts)
        first, second = self._namespaces
        _ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", second)
        for namespace, address in zip(self._namespaces, _ADDRESSES, strict=True):
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "cable")
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in self._namespaces:
            listed = subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
            )
            for process_id in listed.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process_id), signal.SIGKILL)
            _ip("netns", "del", namespace)
            shutil.rmtree(_NETNS_ETC / namespace)

    def command(self, host: int, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        with_host_name = ["unshare", "--uts", "sh", "-c", _SET_NAME_AND_RUN, self.names[host]]
        return ["ip", "netns", "exec", self._namespaces[host], *with_host_name, *command]

    def disconnect(self) -> None:
        """Take the link down on both hosts: packets are dropped, and no connection is reset."""
        for namespace in self._namespaces:
            _ip("-n", namespace, "link", "set", "cable", "down")

    def connect(self) -> None:
        """Bring the link up on both hosts."""
        for namespace in self._namespaces:
            _ip("-n", namespace, "link", "set", "cable", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
