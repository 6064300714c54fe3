"""A replica as its agent and OpenAI's own client see it: a process, a line on stdin, a unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.tiny_models import save_tiny_llama

TOKEN = "the-bearer"
DEADLINE_S = 60.0


class Running:
    """A replica process and a client for its socket."""

    def __init__(self, folder: Path, model: Path, **spec: Any) -> None:
        self.socket = folder / "replica.sock"
        self.log = folder / "log"
        line = {
            "endpoint": "tiny", "model": str(model), "socket": str(self.socket), "token": TOKEN,
            "served_name": "tiny", "dtype": "auto", "device": "cpu", "num_threads": 1, **spec,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_llmcloud.inference"],
            stdin=subprocess.PIPE,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self.stdin = self.process.stdin
        self.stdin.write(json.dumps(line).encode() + b"\n")
        self.stdin.flush()
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)),
            base_url="http://replica",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=DEADLINE_S,
        )

    def readyz(self) -> httpx.Response:
        """The first answer that is not "loading"."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                response = self.http.get("/readyz")
                if response.json()["state"] != "loading":
                    return response
            time.sleep(0.02)
        pytest.fail(f"the replica did not get ready:\n{self.log.read_text()}")

    def stats(self) -> dict[str, Any]:
        return dict(self.http.get("/stats").json())

    def close(self) -> int:
        """Let go of its stdin; returns its exit status."""
        self.http.close()
        self.stdin.close()
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()


def short_folder() -> AbstractContextManager[str]:
    # Short, since a unix socket's path holds 107 bytes.
    return tempfile.TemporaryDirectory(prefix="llmc-", dir="/tmp" if os.path.isdir("/tmp") else None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), context_length=4096)


@pytest.fixture(scope="module")
def replicas(model: Path, for_the_session: Callable[[], AbstractContextManager[None]]) -> Iterator[dict[str, Running]]:
    """Those of this module, started at the same time: what they import takes seconds."""
    specs: dict[str, dict[str, Any]] = {"used": {}, "abandoned": {}, "terminated": {"drain_s": 30}}
    with contextlib.ExitStack() as folders:
        own = {name: Path(folders.enter_context(short_folder())) for name in specs}
        with for_the_session():
            started = {name: Running(own[name], model, **spec) for name, spec in specs.items()}
        yield started
        for running in started.values():
            assert running.close() == 0


@pytest.fixture(scope="module")
def replica(replicas: dict[str, Running]) -> Running:
    """One for all who leave it as it is."""
    assert replicas["used"].readyz().status_code == 200
    return replicas["used"]


@pytest.fixture
def client(replica: Running) -> Iterator[Any]:
    import httpx2
    from openai import OpenAI

    transport = httpx2.HTTPTransport(uds=str(replica.socket))
    with OpenAI(
        base_url="http://replica/v1",
        api_key=TOKEN,
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    ) as opened:
        yield opened


def settles(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not settle"
        time.sleep(0.01)


def test_the_socket_is_closed_to_others(replica: Running) -> None:
    assert replica.socket.stat().st_mode & 0o777 == 0o600


def test_readyz_tells_what_is_served(replica: Running) -> None:
    body = replica.readyz().json()
    assert (body["state"], body["engine"], body["context_length"]) == ("ready", "slots", 4096)
    assert (body["dtype"], body["chat_template"], body["num_threads"]) == ("float32", "plain", 1)


def test_openais_client_completes_and_chats(client: Any) -> None:
    reply = client.completions.create(model="tiny", prompt="The for", max_tokens=8, temperature=0)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "The for"}], max_tokens=8, temperature=0
    )
    assert reply.usage.total_tokens == 10
    assert chat.choices[0].message.content == reply.choices[0].text
    assert chat.choices[0].finish_reason == "length"


def test_openais_client_streams(client: Any) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "The for"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, usage = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert usage.usage.completion_tokens == 8
    whole = client.completions.create(model="tiny", prompt="The for", max_tokens=8, temperature=0)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].text


def test_openais_client_reads_the_errors(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=5000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], tools=[{"type": "function"}]
        )
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").completions.create(model="tiny", prompt="x")


def test_the_first_token_is_quick(replica: Running) -> None:
    fields = {"model": "tiny", "prompt": "The for", "stream": True, "max_tokens": 2}
    begin = time.monotonic()
    with replica.http.stream("POST", "/v1/completions", json=fields) as response:
        next(response.iter_bytes())
        assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_stops_the_tokens_and_every_gauge_returns_to_zero(replica: Running, stream: bool) -> None:
    fields = {"model": "tiny", "prompt": "The for", "max_tokens": 4000, "stream": stream, "n": 4, "ignore_eos": True}
    begin = replica.stats()["engine"]["num_tokens"]
    if stream:
        with replica.http.stream("POST", "/v1/completions", json=fields) as response:
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            replica.http.post("/v1/completions", json=fields, timeout=0.3)
    gauges = ("num_open", "num_sequences")
    settles(lambda: not any(replica.stats()[name] for name in gauges))
    stats = replica.stats()
    assert stats["engine"]["num_active"] == 0
    assert stats["engine"]["num_tokens"] - begin < 4 * 4000
    # Two looks, some steps apart, at an engine that has nothing to do.
    replica.http.post("/v1/completions", json={**fields, "n": 1, "max_tokens": 5, "stream": False})
    assert replica.stats()["engine"]["num_tokens"] - stats["engine"]["num_tokens"] <= 5 + 4


def test_a_replica_ends_when_its_agent_is_gone_even_while_it_answers(replicas: dict[str, Running]) -> None:
    running = replicas["abandoned"]
    running.readyz()
    fields = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "stream": True}
    with running.http.stream("POST", "/v1/completions", json=fields) as response:
        next(response.iter_bytes())
        begin = time.monotonic()
        running.stdin.close()
        assert running.process.wait(DEADLINE_S) == 0
        assert time.monotonic() - begin < 5
    assert not running.socket.exists()


def test_a_replica_that_is_terminated_finishes_what_it_has_begun(replicas: dict[str, Running]) -> None:
    running = replicas["terminated"]
    running.readyz()
    fields = {"model": "tiny", "prompt": "x", "max_tokens": 300, "stream": True}
    with running.http.stream("POST", "/v1/completions", json=fields) as response:
        lines = response.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert running.process.wait(DEADLINE_S) == 0


def test_a_model_that_cannot_be_loaded_is_said_by_readyz_the_log_and_the_exit_status(tmp_path: Path) -> None:
    with short_folder() as folder:
        running = Running(Path(folder), tmp_path)
        response = running.readyz()
        assert response.status_code == 500
        assert "no config.json" in response.json()["reason"]
        assert running.process.wait(DEADLINE_S) == 1
        assert "no config.json" in running.log.read_text()
        running.close()


def test_a_spec_that_makes_no_sense_is_refused_at_once() -> None:
    for line in (b"", b"{}\n", b'{"endpoint": 3}\n'):
        done = subprocess.run(
            [sys.executable, "-m", "jupyter_llmcloud.inference"],
            input=line,
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 2
        assert b"the spec on stdin is not valid" in done.stderr
