"""Programs that are forked from where the libraries are imported already: as if they had been started by themselves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from IPython.core.interactiveshell import InteractiveShell

from jupyter_llmcloud.agent.replicas import is_ours_alone
from jupyter_llmcloud.protocol.agent_messages import DescribeReplicas, EndReplica, LaunchReplica
from jupyter_llmcloud.protocol.rank_messages import ForkProgram
from jupyter_llmcloud.training.forked_program import run_program
from jupyter_llmcloud.training.shell.shell import make_shell
from tests.support.tiny_models import save_tiny_llama
from tests.support.worlds import AgentProcess, until


def _forked() -> dict[str, Any]:
    """What a program finds in a fork of a process that has a shell, ignores SIGTERM and has drawn numbers."""
    np.random.seed(0)
    stdin, to_child = os.pipe()
    from_child, stdout = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if InteractiveShell.initialized():  # another test has made one in this process
                InteractiveShell.clear_instance()
            make_shell()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.close(to_child)
            sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)  # as without pytest
            request = ForkProgram(name="p", module="tests.support.forked_probe", env={"ONLY": "this"})
            status = run_program(request, [stdin, stdout, os.dup(2)])
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(stdin)
    os.close(stdout)
    os.write(to_child, b"a line\n")
    os.close(to_child)
    with os.fdopen(from_child) as output:
        told = json.loads(output.read())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    return told


def test_a_forked_program_finds_nothing_of_a_shell_and_draws_numbers_of_its_own() -> None:
    first, second = _forked(), _forked()
    assert (first["line"], first["name"]) == ("a line\n", "__main__")
    assert Path(first["main"]).name == "forked_probe.py"
    assert first["environment"] == {"ONLY": "this"}
    assert not first["shell"] and not first["builtins"]
    assert first["default_signals"] and first["leads"]
    assert first["draw"] != second["draw"]


@pytest.mark.parametrize(
    ("spec", "is_forked"),
    [
        ({}, True),
        ({"engine": "auto", "source": "", "base_model": "/m"}, True),
        ({"engine": "slots"}, True),
        ({"engine": "vllm"}, False),
        ({"engine": "https://example.org/v1"}, False),
        ({"source": "/cell.py"}, False),
    ],
)
def test_code_of_a_user_and_servers_of_others_start_from_nothing(spec: dict[str, Any], is_forked: bool) -> None:
    assert is_ours_alone(spec) is is_forked


def test_a_replica_is_forked_answers_is_told_of_when_it_is_killed_and_stops(
    node_agent: AgentProcess, tmp_path: Path
) -> None:
    model = save_tiny_llama(tmp_path / "model")
    channel = node_agent.channel()
    spec = {
        "endpoint": "e",
        "model": str(model),
        "token": "t",
        "served_name": "e",
        "max_concurrent": 2,
        "num_threads": 1,
    }

    def row(name: str) -> dict[str, Any]:
        return next(one for one in channel.request(DescribeReplicas()).replicas if one["replica_id"] == name)

    def start(name: str) -> httpx.Client:
        started = channel.request(LaunchReplica(endpoint="e", replica_id=name, spec=spec))
        assert "training.zygote" in " ".join(psutil.Process(psutil.Process(started.pid).ppid()).cmdline())
        transport = httpx.HTTPTransport(uds=started.socket)
        client = httpx.Client(
            transport=transport, base_url="http://r", headers={"Authorization": "Bearer t"}, timeout=30
        )

        def is_ready() -> bool:
            assert row(name)["exit_code"] is None, Path(started.log).read_text()
            try:
                return client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        until(is_ready, "the replica is ready")
        return client

    try:
        asked = {"model": "e", "prompt": "The for statement", "max_tokens": 4, "temperature": 0}
        with contextlib.closing(start("r1")) as one, contextlib.closing(start("r2")) as two:
            answers = [client.post("/v1/completions", json=asked).json()["choices"] for client in (one, two)]
        assert answers[0] == answers[1]
        os.kill(row("r1")["pid"], signal.SIGKILL)
        until(lambda: row("r1")["exit_code"] == -signal.SIGKILL, "the agent knows that it was killed")
        pid = row("r2")["pid"]
        channel.request(EndReplica(replica_id="r2"), 30)
        assert not psutil.pid_exists(pid)
        assert [one["replica_id"] for one in channel.request(DescribeReplicas()).replicas] == ["r1"]
    finally:
        for name in [one["replica_id"] for one in channel.request(DescribeReplicas()).replicas]:
            channel.request(EndReplica(replica_id=name), 30)
        channel.close()
