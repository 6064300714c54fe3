"""A Jupyter server with an endpoint that talks and a key for it, as client libraries find it; and what fuzzes it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.compat.environments import python_with
from tests.server.test_server_restart import jupyter_server
from tests.support.talking_model import save_talking_llama

PROGRAMS = Path(__file__).parent / "clients"
NUM_EXAMPLES = 30
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


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


@contextmanager
def talking_server(folder: Path) -> Iterator[Served]:
    """The endpoint `talker`; it and its server end with the block."""
    model = save_talking_llama(folder / "model")
    with jupyter_server(folder) as (_, server):
        server.create_endpoint(str(model), name="talker")
        while (told := server.endpoint("talker", wait_s=20))["state"] == "starting":
            continue
        assert told["state"] == "ready", told
        key = server.create_key(["infer:*", "models:read"])["key"]
        yield Served(server.openai_url, key, model)
        server.stop_endpoint("talker")
        for cluster in server.clusters():
            server.stop_cluster(cluster["name"])
        server.close()


def fuzz(
    served: Served, folder: Path, num_examples: int = NUM_EXAMPLES, paths: Sequence[str] = (), num_threads: int = 4
) -> subprocess.CompletedProcess[str]:
    """Schemathesis over the OpenAPI document of a server. Raises NotInstalled.

    Args:
        folder: where it keeps what it writes.
        num_examples: requests for each operation.
        paths: of the operations; none: all of them.
    """
    python = python_with("schemathesis", ["schemathesis>=4"])
    command = [
        str(python.with_name("st")), "run", f"{served.url}/openapi.json", "-H", f"Authorization: Bearer {served.key}",
        "--checks", _CHECKS, "-n", str(num_examples), "--phases", "fuzzing", "--workers", str(num_threads),
        "--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "60", "--no-color",
        *(part for path in paths for part in ("--include-path", path)),
    ]  # fmt: skip
    told = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(PROGRAMS)}
    folder.mkdir(exist_ok=True)
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, env=told)
