"""A notice that a host will be taken away: where it is looked for, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from jupyter_llmcloud.agent.preemption import PreemptionNotice, watch
from jupyter_llmcloud.protocol.agent_messages import Describe
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from tests.support.resuming import cell, results, same
from tests.support.worlds import AgentProcess, Ranks, until

RARELY = 1000  # steps: more than there are


class MetadataService(HTTPServer):
    """Of a cloud: what it answers at any path."""

    status, said = 404, ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/preempted"


class _Answer(BaseHTTPRequestHandler):
    server: MetadataService

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.said.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def service() -> Iterator[MetadataService]:
    with MetadataService(("127.0.0.1", 0), _Answer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def given(where: str) -> bool:
    return asyncio.run(PreemptionNotice(where).is_given())


def test_a_file_that_is_there_is_a_notice(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    assert not given(str(notice))
    notice.touch()
    assert given(str(notice))


@pytest.mark.parametrize(
    ("status", "said", "is_notice"),
    [(404, "", False), (200, "FALSE", False), (200, "TRUE", True), (200, '{"action": "terminate"}', True),
     (500, "TRUE", False)],
)  # fmt: skip
def test_a_metadata_service_gives_notice_by_an_answer(
    service: MetadataService, status: int, said: str, is_notice: bool
) -> None:
    service.status, service.said = status, said
    assert given(service.url) is is_notice


def test_a_service_that_cannot_be_reached_and_a_command_that_fails_give_none(service: MetadataService) -> None:
    assert not given("http://127.0.0.1:1/preempted")
    assert not given("http://[")
    assert not given("/no/such/program --preempted")


def test_a_command_gives_notice_by_its_status() -> None:
    assert given("test 1 = 1")
    assert not given("false")


def test_a_notice_may_be_taken_back(tmp_path: Path) -> None:
    told: list[bool] = []

    async def watched() -> None:
        task = asyncio.create_task(watch(str(tmp_path / "notice"), told.append, 0.001))
        for wanted in ([True], [True, False]):
            (tmp_path / "notice").touch() if wanted[-1] else (tmp_path / "notice").unlink()
            async with asyncio.timeout(10):
                while told != wanted:
                    await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(watched())
    asyncio.run(watch("", told.append))  # nowhere to look: it returns


# Slow until it is told to hurry, which it is when the notice has had its effect.
SLOW = cell("accelerate").replace(
    "turn += 1\n",
    """turn += 1
        if not (run.folder / "hurry").exists(): time.sleep(PAUSE)
        print("turn", turn, flush=True)
""".lstrip(),
)


@pytest.mark.slow
def test_a_host_with_a_notice_is_left_after_a_checkpoint_and_no_restart_is_used_up(
    own_agent: Callable[..., AgentProcess], node_agent: AgentProcess, tmp_path: Path
) -> None:
    """The rank that it hosts for a leader elsewhere goes on at the leader's, from the step that was saved."""
    notice = tmp_path / "notice"
    doomed = own_agent(slots=2, env={"LLMCLOUD_PREEMPTION_NOTICE": str(notice)})
    undisturbed = Ranks(node_agent, 2, shares=[(node_agent, 1), (doomed, 1)])  # where ranks have as many threads
    undisturbed.ok(f"PAUSE = 0\n{SLOW}")
    wanted = results(undisturbed)
    undisturbed.end()
    ranks = Ranks(node_agent, 2, shares=[(node_agent, 1), (doomed, 1)])
    running = ranks.send(f"PAUSE = 0.5\n{SLOW}", checkpoint_every=RARELY, max_restarts=1).wait_for("turn 9")
    folder = running.outcome.folder
    notice.touch()
    until(lambda: folder.read().num_resizes, "the rank has moved", 60)
    (folder.path / "hurry").touch()
    outcome = running.end()
    record = outcome.record
    assert outcome.state == "finished", record.errors
    assert (record.num_restarts, record.num_resizes) == (0, 1)
    found, _ = CheckpointFolder(folder.path / "checkpoints").newest(True)
    assert found is not None and found.step  # none was due: it was saved when the notice came
    assert all(same(*pair) for pair in zip(wanted, results(ranks), strict=True))
    with contextlib.closing(doomed.channel()) as channel:
        assert channel.request(Describe()).free_slots == 0  # it lives on until its host goes, and takes nothing new
    doomed.process.send_signal(signal.SIGTERM)
    until(lambda: doomed.process.poll() == 0, "the agent ends")
    ranks.end()
