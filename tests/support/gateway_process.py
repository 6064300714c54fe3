"""A Jupyter server of its own process, whose endpoint `tiny` is served by a stand-in replica: for measuring the gateway.

python -m tests.support.gateway_process FOLDER     tells where it is in one line of JSON, and serves until its
                                                   standard input ends
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
READY_S = 120


@dataclass(frozen=True)
class GatewayProcess:
    """Where it is: the server, a key for its endpoint, and the replica behind that."""

    url: str
    token: str
    key: str
    pid: int
    replica_socket: str
    replica_token: str
    rounds: str

    @property
    def as_user(self) -> dict[str, str]:
        """Headers of a request of whom Jupyter knows."""
        return {"Authorization": f"token {self.token}"}

    def round_seconds(self) -> list[float]:
        """Processor seconds of each round of its event loop so far: what somebody waits who asks for something now.

        It does not count how long others kept the processor, so it is the same on a busy machine.
        """
        return array("f", Path(self.rounds).read_bytes()).tolist()


@contextmanager
def gateway_process(folder: Path, *, keep_rounds: bool = False) -> Iterator[GatewayProcess]:
    """One that ends with the block. `keep_rounds`: for `GatewayProcess.round_seconds`, which costs a little."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "LLMCLOUD_ROOT": str(folder / "root"), "LLMCLOUD_RUNTIME_DIR": str(folder / "run")}
    environment |= {"JUPYTER_RUNTIME_DIR": str(folder / "jupyter"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.gateway_process", str(folder)]
    command += ["--keep-rounds"] if keep_rounds else []
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT
        )
    watchdog = threading.Timer(READY_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        assert line, (folder / "server.log").read_text()
        watchdog.cancel()
        yield GatewayProcess(**json.loads(line))
    finally:
        watchdog.cancel()
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


def _keep_rounds(loop: Any, path: Path) -> None:
    """Write down, as float32, what each further round of the loop takes."""
    run_once, kept = loop._run_once, path.open("wb", buffering=0)

    def timed() -> None:
        began = time.thread_time()
        run_once()
        kept.write(array("f", [time.thread_time() - began]).tobytes())

    loop._run_once = timed


def main() -> None:
    """Serve until standard input ends."""
    from jupyter_llmcloud.server.cluster_access import Identity
    from jupyter_llmcloud.server.headless.app import base_url, context_of, make_app, remove_folder
    from tests.support.server_parts import StandInAgent, StandInPool, make_model

    folder = Path(sys.argv[1])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    token = secrets.token_urlsafe(16)
    app = make_app(Identity(headless=True, owner_pid=os.getpid()), token, log_level="ERROR")
    context = context_of(app)
    agent = StandInAgent(folder / "a", max_concurrent=1000)

    async def begin() -> None:
        from jupyter_llmcloud.server.api.keys import mint

        await agent.start()
        pool = StandInPool(agent)

        async def make_pool() -> Any:
            return pool

        context.clusters.make_pool = make_pool
        await context.started()
        endpoint = await context.endpoints.create(str(make_model(folder / "model")), EndpointSpec(name="tiny"))
        await asyncio.wait_for(endpoint.wait("starting", READY_S), READY_S)
        key, _ = mint(context.state, ["infer:tiny", "models:read"], "bench")
        replica = endpoint.ready_replicas()[0].stored
        rounds = folder / "rounds"
        if "--keep-rounds" in sys.argv:
            _keep_rounds(asyncio.get_running_loop(), rounds)
        told = GatewayProcess(
            base_url(app), token, key.text, os.getpid(), replica.socket, replica.token, str(rounds)
        )  # fmt: skip
        print(json.dumps(vars(told)), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await agent.close()
        app.stop()

    from jupyter_llmcloud.core.spec import EndpointSpec

    app.io_loop.add_callback(begin)
    try:
        app.start()
    finally:
        remove_folder(app)


if __name__ == "__main__":
    main()
