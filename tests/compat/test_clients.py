"""Client libraries as people use them, each in an environment of its own, against a real server, a key and a model.

The programs are tests/compat/clients/use_*: each ends by saying ok.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from tests.compat.environments import NotInstalled, node_with, python_with
from tests.compat.served import PROGRAMS, Served, fuzz, talking_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROGRAM_S = 600
Made = TypeVar("Made")
PYTHON = {
    "use_litellm": ["litellm"],
    "use_langchain": ["langchain-openai"],
    "use_instructor": ["instructor"],  # takes another jiter than the openai client of today
    "use_openai_agents": ["openai-agents"],
    "use_pydantic_ai": ["pydantic-ai-slim[openai]"],
    "use_llama_index": ["llama-index-llms-openai-like"],
    "use_lm_eval": ["lm-eval[api]", "transformers"],
}
NODE = {
    "use_openai": ["openai"],
    "use_vercel_ai": ["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"],
}


@pytest.fixture(scope="module")
def served(module_root: Path) -> Iterator[Served]:
    """A Jupyter server with an endpoint `talker`, and a key for it."""
    with talking_server(module_root.parent) as server:
        yield server


def made(make: Callable[[str, Sequence[str]], Made], name: str, packages: Sequence[str]) -> Made:
    """An environment; the test is skipped where its packages cannot be had."""
    try:
        return make(name, packages)
    except NotInstalled as reason:
        pytest.skip(str(reason))


def run(command: list[str], served: Served) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PROGRAM_S, check=False, env=served.environment
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("program", PYTHON)
def test_a_client_in_python_does_what_its_users_do(served: Served, program: str) -> None:
    python = made(python_with, program, PYTHON[program])
    assert run([str(python), str(PROGRAMS / f"{program}.py")], served).endswith("ok\n")


@pytest.mark.parametrize("program", NODE)
def test_a_client_in_javascript_does_what_its_users_do(served: Served, program: str) -> None:
    node, folder = made(node_with, program, NODE[program])
    copied = shutil.copy(PROGRAMS / f"{program}.mjs", folder)  # packages are looked for beside a program
    assert run([str(node), str(copied)], served).endswith("ok\n")


def test_curl_asks_and_streams(served: Served) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = '{"model": "talker", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "stream": true}'
    headers = ["-H", f"Authorization: Bearer {served.key}", "-H", "Content-Type: application/json"]
    told = run(["curl", "-sSN", "--fail", f"{served.url}/chat/completions", *headers, "-d", body], served)
    assert told.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]  # as many as a slow reader leaves
    assert len(events) >= 3 and "".join(pieces) == "Good day, I am a tiny model."


def test_whatever_schemathesis_makes_of_the_document_is_answered_as_it_says(served: Served, tmp_path: Path) -> None:
    try:
        done = fuzz(served, tmp_path)
    except NotInstalled as reason:
        pytest.skip(str(reason))
    assert done.returncode == 0, done.stdout[-8000:]
    print(done.stdout[-1500:], file=sys.stderr)
