"""Events of real ranks on a real cluster: a run begins, is watched, saves a checkpoint, ends; who holds what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jupyter_llmcloud.client.rest import ServerClient
from tests.support.event_client import EventClient
from tests.support.headless import headless_server

pytest_plugins = ["tests.support.server_fixtures"]
pytestmark = pytest.mark.slow
TRAINING = """\
import time
import torch
from accelerate import Accelerator

accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.arange(80000.0).reshape(20000, 4) / 80000)
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=1))
accelerator.init_trackers("x")
print("it trains", flush=True)
for step, (batch,) in enumerate(loader):
    loss = model(batch).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.log({"loss": loss.item(), "epoch": step / 10000}, step=step)
    time.sleep(0.05)  # it trains for minutes: no test waits for its end
"""


@pytest.fixture(scope="module")
def real_server() -> Iterator[ServerClient]:
    """A headless server with a cluster of one worker."""
    with headless_server("of-events") as client:
        yield client


@pytest.fixture
def events(real_server: ServerClient, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[EventClient]:
    connecting = EventClient.connect(real_server.url.rstrip("/"), real_server._token)
    client = jp_asyncio_loop.run_until_complete(connecting)
    yield client
    jp_asyncio_loop.run_until_complete(client.close())


async def begin(server: ServerClient, **spec: Any) -> str:
    started = await asyncio.to_thread(server.start_run, TRAINING, {"nproc": 2, **spec})
    return str(started["run_id"])


async def _holds_slots(events: EventClient, run_id: str, pids: set[int]) -> None:
    """The cluster and the world tell whose ranks these are."""
    (world,) = await events.until(
        lambda: [
            world
            for world in events.items["worlds"].values()
            if world["run_id"] == run_id and all(row["pid"] for row in world["ranks"])
        ],
        30,
    )
    assert {row["pid"] for row in world["ranks"]} == pids
    (worker,) = await events.until(
        lambda: [
            worker
            for worker in next(iter(events.items["clusters"].values()))["workers"] or ()
            if len([row for row in worker["processes"] if row["kind"] == "rank" and row["run_id"] == run_id]) == 2
        ],
        30,
    )
    assert worker["num_slots"] - worker["free_slots"] == 2 and worker["total_memory_bytes"] > worker["memory_bytes"] > 0
    texts = [row["text"] for row in worker["processes"]]
    assert f"rank 0 of run {run_id}" in texts and "node agent" in texts


async def test_a_run_is_seen_from_its_first_phase_to_its_end(real_server: ServerClient, events: EventClient) -> None:
    await events.say("subscribe", topics=["runs", "worlds", "clusters"])
    await events.until(lambda: {"runs", "worlds", "clusters"} <= set(events.items), 60)
    run_id = await begin(real_server, name="seen", checkpoint_every=1000)
    await events.say("watch", run_id=run_id)
    await events.until(lambda: len(events.columns.get("loss", ())) >= 10, 90)
    assert events.items["runs"][run_id]["state"] == "running"
    assert any("it trains" in record["text"] for record in events.output)

    # What its ranks are, and what they take.
    await events.until(lambda: all(rank["memory_bytes"] for rank in events.info["ranks"]), 30)
    ranks = events.info["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1] and all(rank["pid"] and rank["host"] for rank in ranks)
    assert [phase["name"] for phase in events.info["phases"]] == [
        "finding a cluster",
        "starting ranks",
        "joining",
        "running",
    ]
    began = [phase["began"] for phase in events.info["phases"]]
    assert began == sorted(began) and all(abs(at - time.time()) < 120 for at in began)

    await _holds_slots(events, run_id, {rank["pid"] for rank in ranks})

    # A checkpoint, out of turn.
    assert events.info["actions"] == {"stop": True, "checkpoint": True, "serve": False}
    saved = await asyncio.to_thread(real_server.checkpoint_run, run_id)
    await events.until(lambda: [mark for mark in events.info["marks"] if mark["kind"] == "checkpoint"], 30)
    mark = next(mark for mark in events.info["marks"] if mark["kind"] == "checkpoint")
    assert mark["step"] == saved["step"] and abs(mark["t"] - time.time()) < 60

    # Its end, told at once.
    await asyncio.to_thread(real_server.stop_run, run_id)
    await events.until(lambda: events.info["state"] == "stopped", 60)
    await events.until(lambda: events.items["runs"][run_id]["state"] == "stopped", 30)
    told = next(
        message
        for message in events.messages
        if message["type"] == "changed" and message["topic"] == "runs" and message["item"]["state"] == "stopped"
    )
    assert told["item"]["ended"] is not None
    assert events.info["phase"] == "ended"


async def test_a_connection_that_is_killed_misses_nothing_of_a_run(
    real_server: ServerClient, events: EventClient
) -> None:
    run_id = await begin(real_server, name="cut")
    await events.say("watch", run_id=run_id)
    await events.until(lambda: len(events.columns.get("loss", ())) >= 5, 90)
    second = await EventClient.connect(real_server.url.rstrip("/"), real_server._token)
    await second.say("watch", run_id=run_id)
    await second.until(lambda: second.columns)
    second.connection.stream.close()
    third = await EventClient.connect(real_server.url.rstrip("/"), real_server._token)
    await third.say("watch", run_id=run_id)
    await asyncio.to_thread(real_server.stop_run, run_id)
    for client in (events, third):
        await client.until(lambda client=client: client.info.get("state") == "stopped", 60)
    window = await asyncio.to_thread(real_server.run_series, run_id, "loss")
    num_steps = len(window["columns"]["mean"]["step"])
    for client in (events, third):
        await client.until(lambda client=client: len(client.columns["loss"]) == num_steps, 30)
    steps = [step for step, _ in third.columns["loss"]]
    assert steps == list(range(len(steps))), "a step is missing, or there twice"
    assert events.columns["loss"] == third.columns["loss"]
    assert [row["seq"] for row in third.output if row["rank"] == 0] == [
        row["seq"] for row in events.output if row["rank"] == 0
    ]
    await third.close()


async def test_a_checkpoint_of_a_run_that_saves_none_is_refused(real_server: ServerClient, events: EventClient) -> None:
    run_id = await begin(real_server, name="saves-none")
    await events.say("watch", run_id=run_id)
    await events.until(lambda: events.columns, 90)
    with pytest.raises(Exception, match="--checkpoint-every"):
        await asyncio.to_thread(real_server.checkpoint_run, run_id)
    await asyncio.to_thread(real_server.stop_run, run_id)
    await events.until(lambda: events.info["state"] == "stopped", 60)
