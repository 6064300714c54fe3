"""Client libraries as people use them, each in an environment of its own, against a real server, a key and a model.

The programs are tests/compat/clients/use_*: each ends by saying ok. LLMC_EXAMPLES is how many requests Schemathesis
makes for each operation (30; 1250 are 10,000 in all).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.compat.environments import node_with, python_with
from tests.server.test_server_restart import jupyter_server
from tests.support.talking_model import save_talking_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROGRAMS = Path(__file__).parent / "clients"
PROGRAM_S = 600
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
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


class Served(NamedTuple):
    """Where the model answers, with what, and its folder."""

    url: str
    key: str
    model: Path

    @property
    def environment(self) -> dict[str, str]:
        """For a program that asks it."""
        told = {"LLMC_URL": self.url, "LLMC_KEY": self.key, "LLMC_MODEL": str(self.model)}
        return {**os.environ, **told, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="module")
def served(module_root: Path) -> Iterator[Served]:
    """A Jupyter server with an endpoint `talker`, and a key for it."""
    model = save_talking_llama(module_root.parent / "model")
    with jupyter_server(module_root.parent) as (_, server):
        server.create_endpoint(str(model), name="talker")
        while (told := server.endpoint("talker", wait_s=20))["state"] == "starting":
            continue
        assert told["state"] == "ready", told
        key = server.create_key(["infer:talker", "models:read"])["key"]
        yield Served(server.openai_url, key, model)
        server.stop_endpoint("talker")
        for cluster in server.clusters():
            server.stop_cluster(cluster["name"])
        server.close()


def run(command: list[str], served: Served) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PROGRAM_S, check=False, env=served.environment
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("program", PYTHON)
def test_a_client_in_python_does_what_its_users_do(served: Served, program: str) -> None:
    python = python_with(program, PYTHON[program])
    assert run([str(python), str(PROGRAMS / f"{program}.py")], served).endswith("ok\n")


@pytest.mark.parametrize("program", NODE)
def test_a_client_in_javascript_does_what_its_users_do(served: Served, program: str) -> None:
    node, folder = node_with(program, NODE[program])
    copied = shutil.copy(PROGRAMS / f"{program}.mjs", folder)  # packages are looked for beside a program
    assert run([str(node), str(copied)], served).endswith("ok\n")


def test_curl_asks_and_streams(served: Served) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = '{"model": "talker", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "stream": true}'
    headers = ["-H", f"Authorization: Bearer {served.key}", "-H", "Content-Type: application/json"]
    told = run(["curl", "-sSN", "--fail", f"{served.url}/chat/completions", *headers, "-d", body], served)
    assert told.count("data: ") > 5 and told.endswith("data: [DONE]\n\n")


def test_whatever_schemathesis_makes_of_the_document_is_answered_as_it_says(served: Served, tmp_path: Path) -> None:
    python = python_with("schemathesis", ["schemathesis>=4"])
    command = [
        str(python.with_name("st")), "run", f"{served.url}/openapi.json", "-H", f"Authorization: Bearer {served.key}",
        "--checks", CHECKS, "-n", os.environ.get("LLMC_EXAMPLES", "30"), "--phases", "fuzzing",
        "--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "60", "--no-color",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCHEMATHESIS_HOOKS", "schemathesis_hooks")
        patch.setenv("PYTHONPATH", str(PROGRAMS))
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    print(done.stdout[-1500:], file=sys.stderr)
