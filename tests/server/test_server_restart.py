"""A real Jupyter server that is killed and started again: its cluster and its endpoint are there as before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.storage.server_state import ServerState
from tests.support.plain_http import PLAIN

pytest_plugins = ["tests.support.server_fixtures"]
START_DEADLINE_S = 60
REQUESTS_ANSWERED = threading.Semaphore(0)


@contextmanager
def jupyter_server(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], ServerClient]]:
    """`jupyter server` as a user starts it, and a client of it."""
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    extension = "--ServerApp.jpserver_extensions={'jupyter_llmcloud': True}"
    with (folder / "jupyter.log").open("ab") as log:
        process = subprocess.Popen([*command, extension], cwd=folder, stdout=log, stderr=log)
    path = config.jupyter_runtime_dir() / f"jpserver-{process.pid}.json"
    try:
        yield process, wait_for_client(path, process)
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for_client(path: Path, process: subprocess.Popen[bytes]) -> ServerClient:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            told = json.loads(path.read_text())
            client = ServerClient(told["url"], told["token"])
            client.status()
            return client
        except (OSError, ValueError, LLMCloudError):  # not there yet; the deadline decides
            time.sleep(0.05)
    raise AssertionError(f"the Jupyter server did not start: {process.poll()}")


def greedy_answers(url: str, key: str, at_most: int = 1000) -> list[str]:
    """What the model says to one prompt, again and again until nobody answers; refusals are no answers."""
    answers: list[str] = []
    body = {"model": "tiny", "prompt": "The for", "max_tokens": 8, "temperature": 0}
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False, verify=PLAIN) as http:
        for _ in range(at_most):
            try:
                answer = http.post(url, json=body)
            except httpx.TransportError:
                break
            if answer.status_code == 200:
                answers.append(answer.json()["choices"][0]["text"])
                REQUESTS_ANSWERED.release()
            else:
                assert answer.status_code in (429, 503), answer.text
    return answers


@pytest.mark.story
@pytest.mark.slow
def test_a_jupyter_server_that_is_killed_under_load_finds_its_endpoint_and_cluster_again_within_ten_seconds(
    own_root: Path, real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCLOUD_LEASE_S", "30")
    folder = own_root.parent
    with jupyter_server(folder) as (process, client):
        client.create_endpoint(str(real_model), name="tiny")
        while (before := client.endpoint("tiny", wait_s=20))["state"] == "starting":
            continue
        assert before["state"] == "ready", before
        key = client.create_key(["infer:tiny"])["key"]
        with ThreadPoolExecutor(16) as threads:
            asking = [threads.submit(greedy_answers, f"{client.openai_url}/completions", key) for _ in range(16)]
            for _ in range(12):
                assert REQUESTS_ANSWERED.acquire(timeout=60)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            answers = [answer for one in asking for answer in one.result()]
        assert len(set(answers)) == 1, answers
        client.close()
    with jupyter_server(folder) as (_, client):
        began = time.monotonic()
        after = client.endpoint("tiny", wait_s=20)
        assert time.monotonic() - began < 10
        assert (after["state"], after["replicas"][0]["pid"]) == ("ready", before["replicas"][0]["pid"])
        assert after["rates"]["num_in_flight"] == 0
        state = ServerState()
        counted = [row["request_id"] for row in state.usage(limit=10_000)]
        state.close()
        assert len(set(counted)) == len(counted)  # what the server before had written is not written again
        headers = {"Authorization": f"Bearer {key}"}
        body = {"model": "tiny", "prompt": "The for", "max_tokens": 4}
        assert greedy_answers(f"{client.openai_url}/completions", key, at_most=1) == answers[:1]
        answer = httpx.post(f"{client.openai_url}/completions", json=body, headers=headers, timeout=30, trust_env=False)
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert len(Endpoint("tiny", client).complete("The for", max_tokens=4)) > 0
        [cluster] = client.clusters()
        client.stop_endpoint("tiny")
        client.stop_cluster(cluster["name"])
        client.close()


@pytest.mark.story
@pytest.mark.slow
def test_a_stream_of_a_jupyter_server_that_is_terminated_is_told_that_it_restarts(
    own_root: Path, real_model: Path
) -> None:
    with jupyter_server(own_root.parent) as (process, client):
        client.create_endpoint(str(real_model), name="tiny")
        told = client.endpoint("tiny")
        while told["state"] == "starting":
            told = client.endpoint("tiny", wait_s=10)
        assert told["state"] == "ready", told["reason"]
        endpoint = Endpoint("tiny", client)
        body = {"model": "tiny", "prompt": "The for", "max_tokens": 200, "stream": True, "logit_bias": {"1": -100}}
        lines = []
        with httpx.stream(
            "POST", f"{endpoint.base_url}/completions", json={**body, "n": 8}, timeout=60,
            headers={"Authorization": f"Bearer {endpoint.api_key}"},
        ) as response:  # fmt: skip
            for line in response.iter_lines():
                if not lines:
                    process.terminate()
                lines.append(line)
        last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
        assert last["error"]["code"] == "server_restarting", last
