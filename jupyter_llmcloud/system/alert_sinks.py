"""Where alerts go beside the run or the server that they are of: webhooks and e-mail, named by the environment.

    LLMCLOUD_ALERT_WEBHOOK=https://hooks.example.com/team      several are separated by commas
    LLMCLOUD_ALERT_EMAIL=me@example.com,you@example.com
    LLMCLOUD_SMTP_URL=smtps://user:password@mail.example.com   default: smtp://localhost

They stand in the environment, not in a run: such an address is often a secret, and a run's record is read by many.
A thread for each of them sends: a sink that is slow or down never holds up a run, nor another sink. What it could not
send is told once. A process that ends waits a few seconds for what is not sent yet.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from email.message import EmailMessage

ENV_WEBHOOK = "LLMCLOUD_ALERT_WEBHOOK"
ENV_EMAIL = "LLMCLOUD_ALERT_EMAIL"
ENV_SMTP = "LLMCLOUD_SMTP_URL"
TIMEOUT_S = 10.0
TRIES = 3
PAUSES_S = (1.0, 5.0)  # between the tries
FINISH_S = 5.0
MAX_WAITING = 100  # alerts; a sink that is down for long loses the oldest
SMTP_PORTS = {"smtp": 25, "smtps": 465}


class Unanswered(OSError):
    """An alert was handed over whole, and no answer has come: who has it may not get it again."""

    def __init__(self) -> None:
        super().__init__(f"it has not answered within {TIMEOUT_S:g} s, and may have it")


class AlertSink(Protocol):
    """Somewhere an alert can be sent to."""

    @property
    def name(self) -> str:
        """For people, without what is secret in its address."""

    def send(self, alert: dict[str, Any]) -> None:
        """Send it. Raises OSError or ValueError with the reason when that failed; Unanswered is not tried again."""


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
        except httpx.ReadTimeout:
            raise Unanswered from None
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
        import smtplib

        where = urlsplit(self.server)
        connect = smtplib.SMTP_SSL if where.scheme == "smtps" else smtplib.SMTP
        with connect(where.hostname or "", where.port or SMTP_PORTS[where.scheme], timeout=TIMEOUT_S) as connection:
            if where.username:
                if where.scheme == "smtp":
                    connection.starttls()  # a password is not sent in the clear
                connection.login(unquote(where.username), unquote(where.password or ""))
            try:
                connection.send_message(self._message(alert))
            except smtplib.SMTPServerDisconnected as error:
                if isinstance(error.__context__, TimeoutError):  # which smtplib tells as a connection that was closed
                    raise Unanswered from None
                raise

    def _message(self, alert: dict[str, Any]) -> EmailMessage:
        from email.message import EmailMessage

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
    """Sends alerts, in order, each sink from a thread of its own: one that is down holds up no other.

    Args:
        sinks: where each alert goes.
    """

    def __init__(self, sinks: list[AlertSink]) -> None:
        self._lines = [_Line(sink) for sink in sinks]

    def send(self, alert: dict[str, Any], failed: Callable[[str], None]) -> None:
        """Have it sent; returns at once. `failed` is called from a thread, once for a sink until it works again."""
        for line in self._lines:
            line.send(alert, failed)

    def finish(self, timeout_s: float) -> None:
        """Wait until all is sent, so long at the most: this process is about to end."""
        until = time.monotonic() + timeout_s
        for line in self._lines:
            line.finish(until - time.monotonic())


class _Line:
    """The alerts that wait for one sink."""

    def __init__(self, sink: AlertSink) -> None:
        self._sink = sink
        self._waiting: queue.Queue[tuple[dict[str, Any], Callable[[str], None]]] = queue.Queue(MAX_WAITING)
        self._has_failed = False
        threading.Thread(target=self._serve, name=f"alerts to {sink.name}", daemon=True).start()

    def send(self, alert: dict[str, Any], failed: Callable[[str], None]) -> None:
        while True:
            try:
                return self._waiting.put_nowait((alert, failed))
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()
                    self._waiting.task_done()

    def finish(self, timeout_s: float) -> None:
        waiting = self._waiting
        with waiting.all_tasks_done:
            waiting.all_tasks_done.wait_for(lambda: not waiting.unfinished_tasks, max(0.0, timeout_s))

    def _serve(self) -> None:
        while True:
            alert, failed = self._waiting.get()
            if (problem := self._send(alert)) and not self._has_failed:
                words = (
                    f"an alert could not be sent to {self._sink.name}: {problem}. Alerts are in the run all the same."
                )
                with contextlib.suppress(Exception):  # who was to be told has gone
                    failed(words)
            self._has_failed = bool(problem)
            self._waiting.task_done()

    def _send(self, alert: dict[str, Any]) -> str:
        """Try a few times; returns why it could not be sent, "" when it was."""
        problem = ""
        for pause_s in (0.0, *PAUSES_S)[:TRIES]:
            time.sleep(pause_s)
            try:
                self._sink.send(alert)
            except Unanswered as error:
                return str(error)
            except Exception as error:  # of whatever library sends it: the next alert has its chance, too
                problem = str(error) or type(error).__name__
            else:
                return ""
        return problem


@functools.cache
def alert_sender() -> AlertSender:
    """The one of this process. Raises ValueError when a variable is wrong."""
    return AlertSender(sinks_of(dict(os.environ)))


def finish(timeout_s: float = FINISH_S) -> None:
    """Wait until all alerts of this process are sent, so long at the most."""
    if alert_sender.cache_info().currsize:
        alert_sender().finish(timeout_s)
