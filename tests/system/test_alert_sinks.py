"""Alerts are sent to webhooks and mail servers, in order, and a sink that is down holds up nobody and is told once."""

from __future__ import annotations

import asyncio
import json
import queue
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.agent.runs.run_feed import RunFeed
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.system import alert_sinks
from jupyter_llmcloud.system.alert_sinks import (
    ENV_EMAIL,
    ENV_SMTP,
    ENV_WEBHOOK,
    AlertSender,
    Mail,
    Webhook,
    sinks_of,
)

WITHIN_S = 30.0
ALERT = {"text": "run r: loss-spike: loss jumped", "run": "r", "detector": "loss-spike", "step": 3, "evidence": "z 9"}


class _Hook(ThreadingHTTPServer):
    """A webhook that keeps what it is sent."""

    late_s = 0.0

    def __init__(self, *statuses: int) -> None:
        self.heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self.statuses = list(statuses)
        super().__init__(("127.0.0.1", 0), _HookHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/secret"


class _HookHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hook = self.server
        assert isinstance(hook, _Hook)
        hook.heard.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(hook.late_s)
        self.send_response(hook.statuses.pop(0) if hook.statuses else 200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


class _MailServer(socketserver.ThreadingTCPServer):
    """Speaks as much SMTP as a client needs to hand over one message."""

    daemon_threads = True
    late_s = 0.0

    def __init__(self) -> None:
        self.heard: queue.Queue[str] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _MailHandler)


class _MailHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _MailServer)
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            word = line.split()[0].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                server.heard.put(b"".join(lines).decode())
                time.sleep(server.late_s)
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")


@pytest.fixture
def hook() -> Iterator[_Hook]:
    with _serving(_Hook()) as server:
        yield server


class _serving:
    def __init__(self, server: Any) -> None:
        self.server = server
        self.thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Any:
        self.thread.start()
        return self.server

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_sinks, "PAUSES_S", (0.0, 0.0))


def test_a_webhook_hears_each_alert_in_order(hook: _Hook) -> None:
    sender = AlertSender([Webhook(hook.url)])
    for step in range(3):
        sender.send({**ALERT, "step": step}, pytest.fail)
    assert [hook.heard.get(timeout=WITHIN_S)["step"] for _ in range(3)] == [0, 1, 2]


def test_what_a_webhook_refuses_is_sent_again(hook: _Hook) -> None:
    hook.statuses = [500, 503]
    AlertSender([Webhook(hook.url)]).send(ALERT, pytest.fail)
    assert [hook.heard.get(timeout=WITHIN_S) for _ in range(3)] == [ALERT] * 3


@pytest.mark.parametrize("kind", ["webhook", "mail"])
def test_a_sink_that_answers_late_gets_an_alert_once(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(alert_sinks, "TIMEOUT_S", 0.3)
    told: queue.Queue[str] = queue.Queue()
    with _serving(_Hook() if kind == "webhook" else _MailServer()) as server:
        server.late_s = 1.5
        port = server.server_address[1]
        sink = Webhook(server.url) if kind == "webhook" else Mail(("me@example.com",), f"smtp://127.0.0.1:{port}")
        sender = AlertSender([sink])
        sender.send(ALERT, told.put)
        assert "it has not answered within 0.3 s, and may have it" in told.get(timeout=WITHIN_S)
        sender.finish(WITHIN_S)
        assert server.heard.get(timeout=WITHIN_S) and server.heard.empty()


def test_a_sink_that_is_down_is_told_once_and_the_others_hear_all(hook: _Hook) -> None:
    with _serving(_Hook()) as gone:
        nowhere = gone.url
    problems: list[str] = []
    sender = AlertSender([Webhook(nowhere), Webhook(hook.url)])
    for _ in range(2):
        sender.send(ALERT, problems.append)
    assert [hook.heard.get(timeout=WITHIN_S) for _ in range(2)] == [ALERT] * 2
    sender.finish(WITHIN_S)
    [problem] = problems
    assert problem.startswith("an alert could not be sent to the webhook at 127.0.0.1: ")
    assert "secret" not in problem


def test_a_slow_sink_does_not_hold_up_who_tells_and_loses_the_oldest() -> None:
    begun, free, sent = threading.Event(), threading.Event(), queue.Queue[int]()

    class Slow:
        name = "a slow one"

        def send(self, alert: dict[str, Any]) -> None:
            begun.set()
            free.wait(WITHIN_S)
            sent.put(alert["step"])

    sender = AlertSender([Slow()])
    sender.send({"step": -1}, pytest.fail)
    assert begun.wait(WITHIN_S)
    for step in range(alert_sinks.MAX_WAITING + 50):
        sender.send({"step": step}, pytest.fail)
    free.set()
    steps = [sent.get(timeout=WITHIN_S) for _ in range(alert_sinks.MAX_WAITING + 1)]
    assert steps == [-1, *range(50, alert_sinks.MAX_WAITING + 50)]


def test_a_sink_that_never_answers_does_not_hold_up_another(hook: _Hook) -> None:
    free = threading.Event()

    class Stuck:
        name = "a stuck one"

        def send(self, alert: dict[str, Any]) -> None:
            free.wait(WITHIN_S)

    sender = AlertSender([Stuck(), Webhook(hook.url)])
    sender.send(ALERT, pytest.fail)
    assert hook.heard.get(timeout=WITHIN_S) == ALERT
    sender.finish(0.0)  # which a process that ends does not wait for, longer than it may
    free.set()
    sender.finish(WITHIN_S)


def test_what_nobody_has_foreseen_in_a_sink_does_not_end_its_thread(hook: _Hook) -> None:
    """httpx says of some URLs only when it is asked that it cannot take them."""
    problems: list[str] = []
    sender = AlertSender([Webhook("http://127.0.0.1:1\x7f/")])
    for _ in range(2):
        sender.send(ALERT, problems.append)
    sender.finish(WITHIN_S)
    assert len(problems) == 1


def test_an_alert_is_an_email_with_its_evidence() -> None:
    with _serving(_MailServer()) as server:
        Mail(("me@example.com", "you@example.com"), f"smtp://127.0.0.1:{server.server_address[1]}").send(ALERT)
        message = server.heard.get(timeout=WITHIN_S)
    assert "Subject: r: loss-spike\r\n" in message and "To: me@example.com, you@example.com\r\n" in message
    assert "run r: loss-spike: loss jumped" in message and "evidence: z 9" in message


def test_sinks_are_named_by_the_environment() -> None:
    env = {
        ENV_WEBHOOK: "https://a.example/1, http://b.example/2",
        ENV_EMAIL: "me@example.com",
        ENV_SMTP: "smtps://u:p@m",
    }
    assert sinks_of(env) == [
        Webhook("https://a.example/1"),
        Webhook("http://b.example/2"),
        Mail(("me@example.com",), "smtps://u:p@m"),
    ]
    assert sinks_of({}) == []


@pytest.mark.parametrize(
    "env", [{ENV_WEBHOOK: "hooks.example"}, {ENV_EMAIL: "me"}, {ENV_EMAIL: "me@example.com", ENV_SMTP: "mail.example"}]
)
def test_a_variable_that_is_wrong_is_named(env: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="LLMCLOUD_"):
        sinks_of(env)


@pytest.mark.parametrize(("url", "told"), [("", "loss-spike"), ("nonsense", "LLMCLOUD_ALERT_WEBHOOK must be an http")])
def test_the_alerts_of_a_run_are_sent_and_counted(
    hook: _Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, told: str
) -> None:
    monkeypatch.setenv(ENV_WEBHOOK, url or hook.url)
    alert_sinks.alert_sender.cache_clear()
    record = RunRecord("r-1", "mine", ranks=[0], world_size=1)

    async def trains() -> None:
        feed = RunFeed(record, RunFolder(tmp_path / "r-1"), "")
        feed.begin(at_once=True)
        losses = [1.0 + 0.01 * (step % 7) for step in range(200)] + [1e6]
        feed.journal("metrics", 0, [{"values": {"loss": loss}, "step": step} for step, loss in enumerate(losses)])
        feed.close()

    asyncio.run(trains())
    alert_sinks.alert_sender.cache_clear()
    assert record.alerts == {"loss-spike": 1}
    assert any(told in note for note in record.notes)
    if not url:
        heard = hook.heard.get(timeout=WITHIN_S)
        assert (heard["run"], heard["detector"], heard["step"], heard["metric"]) == ("mine", "loss-spike", 200, "loss")
        assert heard["text"].startswith("run mine: loss-spike: loss jumped to ")


def test_a_sink_that_is_down_when_the_run_has_ended_already_is_told_in_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_WEBHOOK, "http://127.0.0.1:9/hook")
    monkeypatch.setattr(alert_sinks, "PAUSES_S", (0.1, 0.1))
    alert_sinks.alert_sender.cache_clear()
    folder = RunFolder(tmp_path / "r-1")

    async def trains() -> None:
        feed = RunFeed(RunRecord("r-1", "mine", ranks=[0], world_size=1), folder, "")
        feed.begin(at_once=True)
        losses = [1.0 + 0.01 * (step % 7) for step in range(200)] + [1e6]
        feed.journal("metrics", 0, [{"values": {"loss": loss}, "step": step} for step, loss in enumerate(losses)])
        feed.change("finished")
        feed.write_record()
        feed.close()
        async with asyncio.timeout(WITHIN_S):
            while not any("could not be sent to the webhook at 127.0.0.1" in note for note in folder.read().notes):
                await asyncio.sleep(0.05)

    asyncio.run(trains())
    alert_sinks.alert_sender.cache_clear()
    assert folder.read().state == "finished"
