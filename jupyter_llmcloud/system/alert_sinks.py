"""Where alerts go beside the run or the server that they are of: webhooks and e-mail, named by the environment.

    LLMCLOUD_ALERT_WEBHOOK=https://hooks.example.com/team      several are separated by commas
    LLMCLOUD_ALERT_EMAIL=me@example.com,you@example.com
    LLMCLOUD_SMTP_URL=smtps://user:password@mail.example.com   default: smtp://localhost

They stand in the environment, not in a run: such an address is often a secret, and a run's record is read by many.
A thread of its own sends: a sink that is slow or down never holds up a run. What it could not send is told once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import smtplib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

ENV_WEBHOOK = "LLMCLOUD_ALERT_WEBHOOK"
ENV_EMAIL = "LLMCLOUD_ALERT_EMAIL"
ENV_SMTP = "LLMCLOUD_SMTP_URL"
TIMEOUT_S = 10.0
TRIES = 3
PAUSES_S = (1.0, 5.0)  # between the tries
MAX_WAITING = 100  # alerts; a sink that is down for long loses the oldest
SMTP_PORTS = {"smtp": 25, "smtps": 465}


class AlertSink(Protocol):
    """Somewhere an alert can be sent to."""

    @property
    def name(self) -> str:
        """For people, without what is secret in its address."""

    def send(self, alert: dict[str, Any]) -> None:
        """Send it. Raises OSError or ValueError with the reason when that failed."""


@dataclass(frozen=True)
class Webhook:
    """POSTs an alert as JSON; `text` alone is what Slack, Mattermost and Teams show."""

    url: str

    @property
    def name(self) -> str:
        """The host alone: the path of such a URL is a secret as a rule."""
        return f"the webhook at {urlsplit(self.url).hostname}"

    def send(self, alert: dict[str, Any]) -> None:
        """POST it; raises OSError when the answer is no success."""
        import httpx

        try:
            answer = httpx.post(self.url, json=alert, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            raise OSError(str(error) or type(error).__name__) from None
        if not answer.is_success:
            raise OSError(f"it answered with status {answer.status_code}")


@dataclass(frozen=True)
class Mail:
    """Sends an alert as an e-mail by a mail server."""

    addresses: tuple[str, ...]
    server: str

    @property
    def name(self) -> str:
        """The mail server, without its user."""
        return f"the mail server {urlsplit(self.server).hostname}"

    def send(self, alert: dict[str, Any]) -> None:
        """Hand it to the mail server. Raises OSError (smtplib's errors are such)."""
        where = urlsplit(self.server)
        connect = smtplib.SMTP_SSL if where.scheme == "smtps" else smtplib.SMTP
        with connect(where.hostname or "", where.port or SMTP_PORTS[where.scheme], timeout=TIMEOUT_S) as connection:
            if where.username:
                if where.scheme == "smtp":
                    connection.starttls()  # a password is not sent in the clear
                connection.login(unquote(where.username), unquote(where.password or ""))
            connection.send_message(self._message(alert))

    def _message(self, alert: dict[str, Any]) -> EmailMessage:
        message = EmailMessage()
        message["Subject"] = f"{alert.get('run') or alert['endpoint']}: {alert['detector']}"
        message["From"] = self.addresses[0]
        message["To"] = ", ".join(self.addresses)
        rows = [f"{key}: {value}" for key, value in alert.items() if key != "text" and value not in (None, "", [])]
        message.set_content("\n".join([alert["text"], "", *rows, ""]))
        return message


def sinks_of(env: dict[str, str]) -> list[AlertSink]:
    """Those that an environment names. Raises ValueError with the variable that is wrong."""
    sinks: list[AlertSink] = [Webhook(_checked(ENV_WEBHOOK, url)) for url in _listed(env, ENV_WEBHOOK)]
    if addresses := _listed(env, ENV_EMAIL):
        if wrong := [address for address in addresses if "@" not in address.strip("@")]:
            raise ValueError(f"{ENV_EMAIL} names {wrong[0]!r}, which is no e-mail address")
        server = env.get(ENV_SMTP) or "smtp://localhost"
        where = urlsplit(server)
        if where.scheme not in SMTP_PORTS or not where.hostname:
            raise ValueError(f"{ENV_SMTP} must be like smtp://host:25 or smtps://user:password@host")
        sinks.append(Mail(tuple(addresses), server))
    return sinks


def _listed(env: dict[str, str], variable: str) -> list[str]:
    return [word for word in (word.strip() for word in env.get(variable, "").split(",")) if word]


def _checked(variable: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{variable} must be an http:// or https:// URL")  # not shown: it may be a secret
    return url


class AlertSender:
    """Sends alerts from a thread of its own, in order.

    Args:
        sinks: where each alert goes.
    """

    def __init__(self, sinks: list[AlertSink]) -> None:
        self._sinks = sinks
        self._waiting: queue.Queue[tuple[dict[str, Any], Callable[[str], None]]] = queue.Queue(MAX_WAITING)
        self._failed: set[AlertSink] = set()
        if sinks:
            threading.Thread(target=self._serve, name="alert sinks", daemon=True).start()

    def send(self, alert: dict[str, Any], failed: Callable[[str], None]) -> None:
        """Have it sent; returns at once. `failed` is called from the thread, once for a sink until it works again."""
        if not self._sinks:
            return
        while True:
            try:
                return self._waiting.put_nowait((alert, failed))
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()

    def _serve(self) -> None:
        while True:
            alert, failed = self._waiting.get()
            for sink in self._sinks:
                self._send(sink, alert, failed)

    def _send(self, sink: AlertSink, alert: dict[str, Any], failed: Callable[[str], None]) -> None:
        problem = ""
        for pause_s in (0.0, *PAUSES_S)[:TRIES]:
            time.sleep(pause_s)
            try:
                sink.send(alert)
            except (OSError, ValueError) as error:
                problem = str(error)
            else:
                self._failed.discard(sink)
                return
        if sink not in self._failed:
            self._failed.add(sink)
            failed(f"an alert could not be sent to {sink.name}: {problem}. Alerts are in the run all the same.")


@functools.cache
def alert_sender() -> AlertSender:
    """The one of this process. Raises ValueError when a variable is wrong."""
    return AlertSender(sinks_of(dict(os.environ)))
