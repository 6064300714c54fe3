"""Hosts of one network on this machine: network namespaces joined by a bridge, each with a hostname of its own.

Between them is real TCP over real interfaces; a cable can be pulled. Making them takes root. Two traps of real
networks are part of it: the interface has another name on each host, and a host's own name means 127.0.1.1 there, as
Debian writes it into /etc/hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.worlds import until


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    interface: str
    cable: str  # the end of its cable on the bridge's side
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, words: Sequence[str]) -> list[str]:
        """The same, on this host."""
        inside = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", inside, "sh", *words]

    def start(self, words: Sequence[str], log: Path, **environ: str) -> subprocess.Popen[bytes]:
        """Start a process there."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **environ},
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def pids(self) -> list[int]:
        """Everything that runs there."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def unplug(self) -> None:
        """Pull its cable: what is sent to it or from it is lost, and nobody is told."""
        _ip("link", "set", self.cable, "down")

    def plug_in(self) -> None:
        _ip("link", "set", self.cable, "up")

    def listening(self) -> set[str]:
        """The addresses on which somebody listens for TCP there."""
        found = subprocess.run(["ip", "netns", "exec", self.name, "cat", "/proc/net/tcp", "/proc/net/tcp6"],
                               capture_output=True, text=True, check=True)  # fmt: skip
        rows = [line.split() for line in found.stdout.splitlines()]
        return {_address(row[1].split(":")[0]) for row in rows if len(row) > 3 and row[3] == "0A"}

    def end(self) -> None:
        """Take its power away."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for process in self.processes:
            process.wait(10)
        until(lambda: not self.pids(), f"nothing runs on {self.name}")


def _address(digits: str) -> str:
    if len(digits) == 8:
        return ".".join(str(byte) for byte in reversed(bytes.fromhex(digits)))
    return "::" + digits.lstrip("0")


def _name_host(host: Host) -> Callable[[], None]:
    """Have its name mean 127.0.1.1 there (`ip netns exec` lays this file over /etc/hosts); returns what undoes it."""
    folder = Path("/etc/netns") / host.name
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
    return lambda: shutil.rmtree(folder)


def _wiring(host: Host) -> list[str]:
    name = host.interface
    return ["link set lo up", f"addr add {host.address}/24 dev {name}", f"link set {name} up"]


@contextlib.contextmanager
def network(*names: str) -> Iterator[list[Host]]:
    """Hosts with these names and the machine itself on one network; without the rights the test is skipped."""
    number = os.getpid() % 200
    bridge, subnet = f"lc{number}", f"10.91.{number}"
    hosts = [
        Host(f"lc{number}-{name}", f"{subnet}.{i}", f"net{i}", f"lc{number}v{i}") for i, name in enumerate(names, 1)
    ]
    with contextlib.ExitStack() as stack:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            stack.callback(_ip, "link", "del", bridge)
            _ip("addr", "add", f"{subnet}.254/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for host in hosts:
                _ip("netns", "add", host.name)
                stack.callback(_ip, "netns", "del", host.name)
                stack.callback(_name_host(host))
                _ip("link", "add", host.cable, "type", "veth", "peer", "name", host.interface, "netns", host.name)
                _ip("link", "set", host.cable, "master", bridge, "up")
                for words in _wiring(host):
                    _ip("-n", host.name, *words.split())
        except OSError as error:
            say = pytest.fail if os.environ.get("CI") and os.getuid() == 0 else pytest.skip
            say(f"NOT TESTED: a world over several hosts; network namespaces cannot be made here ({error})")
        for host in hosts:
            stack.callback(host.end)
        yield hosts


@dataclass
class DaskOverHosts:
    """A scheduler on the first host, a worker on each of the others, with TLS unless another scheme is given."""

    head: Host
    nodes: list[Host]
    folder: Path
    environ: dict[str, str]
    port: int = 8786
    scheme: str = "tls"

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self.head.address}:{self.port}"

    def start(self) -> None:
        log = self.folder / "scheduler.log"
        words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", self.address, "--no-dashboard"]
        self.head.start(words, log, **self.environ)
        until(lambda: "Scheduler at" in log.read_text(), "the scheduler listens", 60)
        for node in self.nodes:
            self.start_worker(node)

    def start_ended_workers(self) -> None:
        """What a service manager does there: Dask ends a nanny whose worker was not heard of for half a minute."""
        for node in self.nodes:
            if all(process.poll() is not None for process in node.processes):
                self.start_worker(node)

    def start_worker(self, node: Host) -> None:
        """A worker with the slots that the cluster's plugin says."""
        words = [
            sys.executable,
            "-m",
            "distributed.cli.dask_worker",
            self.address,
            "--host",
            f"{self.scheme}://{node.address}",
        ]
        words += ["--name", node.name, "--nthreads", "1", "--memory-limit", "0"]
        words += ["--dashboard-address", f"{node.address}:0"]  # even without one a worker listens for it
        words += ["--local-directory", str(self.folder / node.name)]
        runtime = {"LLMCLOUD_RUNTIME_DIR": str(self.folder / f"run-{node.name}")}  # not shared, unlike the root
        node.start(words, self.folder / f"{node.name}.log", **self.environ, **runtime)
