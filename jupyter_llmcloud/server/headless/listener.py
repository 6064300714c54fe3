"""Where a server of our own listens, and with which certificate (TLS)."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from dataclasses import dataclass

from tornado.netutil import bind_sockets

from jupyter_llmcloud.errors import UsageError

ADDRESS = "127.0.0.1"
MAX_PORT = 65_535
ANY_ADDRESS = ("0.0.0.0", "::", "", "*")


@dataclass(frozen=True)
class Listener:
    """Where a server listens, and with which certificate. Loopback and any free port, unless asked."""

    port: int = 0
    ip: str = ADDRESS
    certfile: str = ""
    keyfile: str = ""

    @property
    def is_local(self) -> bool:
        """Does nobody but this machine reach it?"""
        return self.ip == "localhost" or (_is_address(self.ip) and ipaddress.ip_address(self.ip).is_loopback)

    @property
    def host(self) -> str:
        """By which this machine reaches it."""
        host = {"::": "::1"}.get(self.ip, ADDRESS) if self.ip in ANY_ADDRESS else self.ip
        return f"[{host}]" if ":" in host else host

    def tls(self) -> ssl.SSLContext | None:
        """The context of its certificate; raises UsageError when that cannot be read, or does not fit the key."""
        if not self.certfile:
            if self.keyfile:
                raise UsageError("--keyfile needs --certfile: the certificate that belongs to the key.")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certfile, self.keyfile or None, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            given = f"--certfile {self.certfile}" + (f" --keyfile {self.keyfile}" if self.keyfile else "")
            raise UsageError(f"{given}: they cannot be used: {reason}.") from None
        return context

    def sockets(self) -> list[socket.socket]:
        """Bound; raises UsageError when that cannot be."""
        if not 0 <= self.port <= MAX_PORT:  # of which the system would take the lower 16 bits
            raise UsageError(f"--port {self.port} is not possible: 0 (any free one) to {MAX_PORT}.")
        try:
            return bind_sockets(self.port, self.ip)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--ip {self.ip} --port {self.port}: nothing can listen there: {reason}.") from None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _no_password() -> str:
    raise ValueError("the key is encrypted: write it without a passphrase, readable by you alone")


LOOPBACK = Listener()
