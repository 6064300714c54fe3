"""An sshd of a test's own on loopback: its own port, host key and the one key that it lets in."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.worlds import until

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
CONFIGURATION = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 20
"""


@dataclass
class Sshd:
    """It runs; `connect_options` are asyncssh's."""

    folder: Path
    port: int

    @property
    def connect_options(self) -> dict[str, object]:
        key, known = str(self.folder / "user"), str(self.folder / "known_hosts")
        return {"port": self.port, "username": getpass.getuser(), "client_keys": [key], "known_hosts": known}


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
        return connection.recv(4) == b"SSH-"
    return False


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[Sshd]:
    """Start it; skips the test, saying why, where there is none."""
    if not os.access(SSHD, os.X_OK) or shutil.which("ssh-keygen") is None:
        pytest.skip("NOT TESTED: a cluster over SSH; there is no sshd (Debian: openssh-server)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, for the privileges that it gives up
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True, timeout=30, stdin=subprocess.DEVNULL)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    (folder / "sshd_config").write_text(CONFIGURATION.format(port=port, folder=folder))
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    with (folder / "log").open("wb") as log:
        words = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: daemon.poll() is not None or _answers(port), "sshd answers", 20)
        if daemon.poll() is not None:
            pytest.skip(f"NOT TESTED: a cluster over SSH; sshd does not start: {(folder / 'log').read_text().strip()}")
        yield Sshd(folder, port)
    finally:
        daemon.terminate()
        daemon.wait(10)
