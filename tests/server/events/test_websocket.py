"""The websocket of events: who may open it, what it tells of topics and of runs, to fast and to slow clients."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from jupyter_server.auth import Authorizer
from tornado.httpclient import HTTPClientError

from jupyter_llmcloud.server.events import handler
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore
from tests.support.event_client import EventClient
from tests.support.plain_http import PLAIN
from tests.support.proxies import Wire
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]


def make_run(name: str = "train", state: str = "finished", num_ranks: int = 2, **fields: Any) -> RunFolder:
    """A run without an agent; an active one counts as about to be started by another server that lives."""
    record = RunRecord(
        f"{name}-1",
        name,
        state,
        created=time.time(),
        ended=None if state in ("queued", "running") else time.time(),
        world_size=num_ranks,
        ranks=list(range(num_ranks)),
        cluster="local",
        **fields,
    )
    folder = RunStore().folder(record.run_id)
    folder.create(record, "print(1)\n")
    return folder


@pytest.fixture
def all_go_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no agents here that could be asked: what a record says is true."""

    async def true_state(record: RunRecord) -> str:
        return record.state

    monkeypatch.setattr(server.context.run_states, "true_state", true_state)


def log(folder: RunFolder, rank: int, steps: range, value: Any = lambda step: 1 / (step + 1)) -> None:
    journal = JournalWriter(folder.metrics(rank))
    journal.append([{"step": step, "values": {"loss": value(step), "epoch": step / 10}} for step in steps])
    journal.close()


async def connected(server: Server) -> EventClient:
    return await EventClient.connect(server.url, server.token)


async def subscribed(server: Server, *topics: str) -> EventClient:
    client = await connected(server)
    await client.say("subscribe", topics=list(topics))
    await client.until(lambda: set(topics) <= set(client.items))
    return client


# --- who may ---


async def test_nobody_opens_it_without_a_token(server: Server) -> None:
    for token in ("", "wrong"):
        with pytest.raises(HTTPClientError) as refused:
            await EventClient.connect(server.url, token)
        assert refused.value.code == 403


async def test_a_page_of_another_origin_does_not_open_it(server: Server) -> None:
    async with httpx.AsyncClient(trust_env=False, verify=PLAIN) as browser:
        await browser.get(f"{server.url}/llmcloud/api/status?token={server.token}")  # signs in: sets the cookie
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    own = server.url.split("/")[2]
    await (await EventClient.connect(server.url, "", Cookie=cookie, Origin=f"http://{own}")).close()
    with pytest.raises(HTTPClientError) as refused:
        await EventClient.connect(server.url, "", Cookie=cookie, Origin="http://elsewhere.example")
    assert refused.value.code == 403


class _NoReading(Authorizer):
    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return resource != "llmcloud"


async def test_who_may_not_read_does_not_open_it(server: Server, jp_serverapp: Any) -> None:
    jp_serverapp.web_app.settings["authorizer"] = _NoReading()
    with pytest.raises(HTTPClientError) as refused:
        await connected(server)
    assert refused.value.code == 403


async def test_a_login_that_ends_ends_the_connection(
    server: Server, jp_serverapp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler.EventsHandler, "recheck_s", 0.05)
    client = await connected(server)
    with pytest.raises(TimeoutError):
        await client.read(0.3)  # it stays as long as the login holds
    jp_serverapp.identity_provider.token = "another"
    # The read that timed out above has taken the place of the next one.
    async with asyncio.timeout(10):
        while client.connection.close_code is None:
            await asyncio.sleep(0.02)
    assert client.connection.close_code == handler.LOGIN_ENDED


async def test_what_is_not_understood_is_refused_and_the_connection_stays(server: Server) -> None:
    client = await connected(server)
    for text in ("nonsense", "[]", '{"type":"dance"}', '{"type":"watch"}', "[" * 10_000):
        await client.connection.write_message(text)
    await client.say("watch", run_id="train-1", points=1)
    await client.until(lambda: len(client.of("refused")) == 6)
    assert "dance" in client.of("refused")[2]["message"]
    await client.say("subscribe", topics=["keys"])
    await client.until(lambda: "keys" in client.items)
    await client.close()


# --- topics ---


async def test_every_topic_is_told_as_the_rest_api_tells_it(server: Server) -> None:
    await server.ask("POST", "llmcloud/api/clusters", {"kind": "local", "name": "c1", "workers": 2})
    await server.key()
    make_run()
    client = await subscribed(server, "clusters", "worlds", "runs", "endpoints", "keys")
    assert list(client.items["clusters"]) == ["c1"]
    runs = (await server.ask("GET", "llmcloud/api/runs")).json()["runs"]
    assert list(client.items["runs"].values()) == runs
    keys = (await server.ask("GET", "llmcloud/api/keys")).json()["keys"]
    assert list(client.items["keys"].values()) == keys
    await client.close()


async def test_what_is_done_over_rest_is_told_at_once(server: Server) -> None:
    client = await subscribed(server, "keys", "clusters")
    began = time.monotonic()
    await server.key()
    await client.until(lambda: client.items["keys"])
    key_id = next(iter(client.items["keys"]))
    await server.ask("DELETE", f"llmcloud/api/keys/{key_id}")
    await client.until(lambda: client.items["keys"][key_id]["state"] == "revoked")
    assert time.monotonic() - began < 1.5, "it was told by the next reading only"
    await client.close()


async def test_a_run_is_seen_at_once_when_it_begins_and_when_it_ends(server: Server, all_go_on: None) -> None:
    client = await subscribed(server, "runs")
    began = time.monotonic()
    folder = make_run(state="running")
    await client.until(lambda: "train-1" in client.items["runs"])
    assert time.monotonic() - began < 0.3
    record = folder.read()
    record.state, record.ended = "finished", time.time()
    began = time.monotonic()
    folder.write(record)
    await client.until(lambda: client.items["runs"]["train-1"]["state"] == "finished")
    assert time.monotonic() - began < 0.3
    shutil.rmtree(folder.path)  # by somebody elsewhere
    await client.until(lambda: not client.items["runs"])
    await client.close()


async def test_the_figures_of_a_run_follow(server: Server, all_go_on: None) -> None:
    folder = make_run(state="running")
    client = await subscribed(server, "runs")
    log(folder, 0, range(3))
    await client.until(lambda: client.items["runs"]["train-1"]["metrics"].get("loss") == pytest.approx(1 / 3))
    await client.close()


async def test_a_connection_that_was_cut_goes_on_where_it_was(server: Server, all_go_on: None) -> None:
    make_run("first")
    client = await subscribed(server, "runs", "keys")
    client.connection.stream.close()  # cut, without a word
    keeper = await subscribed(server, "keys")
    make_run("second")
    await server.key()
    again = await connected(server)
    again.items = {topic: dict(items) for topic, items in client.items.items()}
    await again.say("subscribe", topics=["runs", "keys"], epoch=client.epoch, cursor=client.cursor)
    await again.until(lambda: len(again.of("synced")) == 2)
    assert not again.of("snapshot") and len(again.of("changed")) == 2
    assert set(again.items["runs"]) == {"first-1", "second-1"} and len(again.items["keys"]) == 1
    await keeper.close()
    await again.close()


async def test_a_restarted_server_sends_snapshots(server: Server) -> None:
    make_run()
    client = await connected(server)
    await client.say("subscribe", topics=["runs"], epoch="an earlier life", cursor=5)
    await client.until(lambda: client.of("snapshot"))
    assert set(client.items["runs"]) == {"train-1"}
    await client.close()


async def test_nothing_is_read_while_nobody_follows(server: Server) -> None:
    client = await subscribed(server, "runs", "keys")
    await client.say("unsubscribe", topics=["keys"])
    source = server.context.events.source("keys")
    async with asyncio.timeout(10):
        while source.is_read:
            await asyncio.sleep(0.01)
    assert server.context.events.source("runs").is_read
    await client.close()
    async with asyncio.timeout(10):
        while server.context.events.source("runs").is_read:
            await asyncio.sleep(0.01)


async def test_a_topic_that_cannot_be_read_says_why_and_recovers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await subscribed(server, "keys")
    with monkeypatch.context() as patched:

        def broken() -> list[Any]:
            raise OSError("no disk")

        patched.setattr(server.context.state, "list_keys", broken)
        server.context.events.wake("keys")
        await client.until(lambda: client.of("problem"))
        assert "no disk" in client.of("problem")[0]["message"]
    server.context.events.wake("keys")
    await client.until(lambda: client.of("synced"))
    await client.close()


# --- a run that is watched ---


async def test_an_ended_run_is_told_whole(server: Server) -> None:
    folder = make_run()
    for rank in (0, 1):
        log(folder, rank, range(50))
    logs = JournalWriter(folder.logs(1))
    logs.append([{"kind": "stdout", "text": f"line {number}\n"} for number in range(30)])
    logs.close()
    client = await connected(server)
    await client.say("watch", run_id="train-1")
    await client.until(lambda: client.output and client.columns and client.info)
    assert client.info["state"] == "finished" and client.info["phase"] == "ended"
    assert client.columns["loss"] == [(step, pytest.approx(1 / (step + 1))) for step in range(50)]
    assert [record["text"] for record in client.output] == [f"line {number}\n" for number in range(30)]
    series = client.of("run_series")[0]["series"][0]
    assert series["n"] == [2] * 50 and series["ranks"] == [0, 1]
    assert series["epoch"][10] == 1.0 and abs(series["time"][0] - time.time()) < 60
    await client.close()


async def test_a_run_that_goes_on_is_followed_by_tails(server: Server, all_go_on: None) -> None:
    folder = make_run(state="running", num_ranks=1)
    client = await connected(server)
    await client.say("watch", run_id="train-1")
    await client.until(lambda: client.info)
    journal = JournalWriter(folder.metrics(0))
    for step in range(40):
        journal.append([{"step": step, "values": {"loss": float(step)}}])
        await client.until(lambda step=step: len(client.columns.get("loss", ())) > step)
    journal.close()
    assert client.columns["loss"] == [(step, step) for step in range(40)]
    tails = [tail for message in client.of("run_series") for tail in message["series"]]
    assert max(len(tail["step"]) for tail in tails[1:]) <= 2, "whole series are sent again and again"
    record = folder.read()
    record.state, record.ended = "failed", time.time()
    record.errors = [{"rank": 0, "ename": "ValueError", "evalue": "no", "traceback": ["a", "b"]}]
    folder.write(record)
    await client.until(lambda: client.info["state"] == "failed")
    assert client.info["errors"] == [{"rank": 0, "ename": "ValueError", "evalue": "no", "traceback": "a\nb"}]
    assert client.info["ranks"][0]["state"] == "failed"
    await client.close()


async def test_values_that_are_not_finite_are_gaps_with_a_count(server: Server) -> None:
    folder = make_run(num_ranks=1)
    log(folder, 0, range(10), lambda step: math.nan if step == 4 else math.inf if step == 5 else 1.0)
    client = await connected(server)
    await client.say("watch", run_id="train-1")
    await client.until(lambda: client.columns)
    tail = next(tail for tail in client.of("run_series")[0]["series"] if tail["name"] == "loss")
    assert [mean is None for mean in tail["mean"]] == [step in (4, 5) for step in range(10)]
    assert tail["not_finite"] == [int(step in (4, 5)) for step in range(10)]
    await client.close()


async def test_many_steps_come_as_so_many_columns_as_were_asked_for(server: Server) -> None:
    folder = make_run(num_ranks=1)
    log(folder, 0, range(5000), float)
    client = await connected(server)
    await client.say("watch", run_id="train-1", points=100)
    await client.until(lambda: client.columns)
    steps = [step for step, _ in client.columns["loss"]]
    assert 40 <= len(steps) <= 100 and steps == sorted(steps)
    assert all(mean == pytest.approx(step) for step, mean in client.columns["loss"])
    await client.close()


async def test_three_hundred_metrics_with_odd_names_are_all_told(server: Server) -> None:
    folder = make_run(num_ranks=1)
    names = [f"group/{number}" for number in range(298)] + ["<b>loss</b>", "n" * 128]
    journal = JournalWriter(folder.metrics(0))
    journal.append([{"step": step, "values": {name: 1e300 for name in names}} for step in range(20)])
    journal.close()
    client = await connected(server)
    await client.say("watch", run_id="train-1")
    await client.until(lambda: len(client.columns) == 300)
    assert set(client.columns) == set(names) and client.info["num_left_out"] == 0
    await client.close()


async def test_a_run_that_is_deleted_elsewhere_is_gone(server: Server) -> None:
    folder = make_run()
    client = await connected(server)
    for name in ("never-was", "../etc"):
        await client.say("watch", run_id=name)
    await client.until(lambda: len(client.of("run_gone")) == 2)
    await client.say("watch", run_id="train-1")
    await client.until(lambda: client.info)
    shutil.rmtree(folder.path)
    await client.until(lambda: len(client.of("run_gone")) == 3)
    await client.close()


async def test_two_clients_see_the_same_and_the_folder_is_read_once(server: Server, all_go_on: None) -> None:
    folder = make_run(state="running", num_ranks=1)
    clients = [await connected(server), await connected(server)]
    for client in clients:
        await client.say("watch", run_id="train-1")
        await client.until(lambda client=client: client.info)
    assert len(server.context.events.watched) == 1
    log(folder, 0, range(20))
    for client in clients:
        await client.until(lambda client=client: len(client.columns.get("loss", ())) == 20)
    assert clients[0].columns == clients[1].columns
    await clients[0].close()
    await clients[1].say("unwatch", run_id="train-1")
    async with asyncio.timeout(10):
        while server.context.events.watched:
            await asyncio.sleep(0.01)
    await clients[1].close()


async def test_who_does_not_acknowledge_gets_no_more_than_a_few_batches(server: Server, all_go_on: None) -> None:
    folder = make_run(state="running", num_ranks=1)
    slow, fast = await connected(server), await connected(server)
    slow.acknowledges = False
    for client in (slow, fast):
        await client.say("watch", run_id="train-1")
        await client.until(lambda client=client: client.info)
    journal = JournalWriter(folder.metrics(0))
    for step in range(30):
        journal.append([{"step": step, "values": {"loss": float(step)}}])
        await fast.until(lambda step=step: len(fast.columns.get("loss", ())) > step)
    journal.close()
    with pytest.raises(TimeoutError):
        while True:
            await slow.read(0.3)
    batches = {message["cursor"] for message in slow.messages if "run_id" in message}
    assert len(batches) <= 4
    # One batch that joins all that it has missed.
    slow.acknowledges = True
    await slow.say("ack", cursor=max(batches))
    await fast.close()
    slow.connection.close()


async def test_a_client_that_reads_nothing_costs_no_memory_and_holds_nobody_up(server: Server, all_go_on: None) -> None:
    folder = make_run(state="running", num_ranks=1)
    stuck, fast = await connected(server), await subscribed(server, "runs")
    await stuck.say("subscribe", topics=["runs"])
    await stuck.say("watch", run_id="train-1")
    await fast.say("watch", run_id="train-1")
    await fast.until(lambda: fast.info)
    logs = JournalWriter(folder.logs(0))
    for _ in range(20):
        logs.append([{"kind": "stdout", "text": "x" * 100_000} for _ in range(10)])
        seen = len(fast.output)
        await fast.until(lambda seen=seen: len(fast.output) > seen or fast.skipped)
    logs.close()
    assert len(fast.output) + fast.skipped == 200
    follower = server.context.events.watched["train-1"]
    assert follower.output.num_chars <= 4 << 20
    stuck.connection.close()
    await fast.close()


# --- the URL of an endpoint ---


async def test_each_client_is_told_the_url_under_which_it_reaches_an_endpoint(server: Server, model: Path) -> None:
    """As the REST route tells it; told again when the endpoint changes, and by a snapshot."""
    await server.serve(model)
    by_rest = await server.ask("GET", "llmcloud/api/endpoints/tiny")
    client = await subscribed(server, "endpoints")
    assert client.items["endpoints"]["tiny"]["url"] == by_rest.json()["url"] == f"{server.url}/llmcloud/v1"
    elsewhere = await EventClient.connect(server.url, server.token, Host="localhost:8000")
    await elsewhere.say("subscribe", topics=["endpoints"])
    await elsewhere.until(lambda: "endpoints" in elsewhere.items)
    url = elsewhere.items["endpoints"]["tiny"]["url"]
    assert url.startswith("http://localhost:8000/") and url.endswith("/llmcloud/v1")
    await server.ask("DELETE", "llmcloud/api/endpoints/tiny")
    await elsewhere.until(lambda: elsewhere.items["endpoints"]["tiny"]["state"] == "stopped")
    assert elsewhere.items["endpoints"]["tiny"]["url"] == url
    await client.close()
    await elsewhere.close()


# --- proxies ---


async def test_a_proxy_that_lets_through_in_lumps_changes_nothing_of_what_is_told(
    server: Server, all_go_on: None
) -> None:
    """It holds everything back for a while, again and again; what had been sent comes in order, once, and is joined."""
    folder = make_run(state="running")
    log(folder, 0, range(50))
    log(folder, 1, range(50))
    port = int(server.url.partition("://")[2].partition(":")[2].partition("/")[0])
    wire = Wire(("127.0.0.1", port))
    client = await EventClient.connect(server.url.replace(str(port), str(wire.port)), server.token)
    try:
        await client.say("subscribe", topics=["runs"])
        await client.say("watch", run_id="train-1", points=500)
        await client.until(lambda: len(client.columns.get("loss", ())) == 50)
        for first in (50, 100, 150):
            wire.hold()
            for rank in (0, 1):
                log(folder, rank, range(first, first + 50))
            await asyncio.sleep(0.5)
            wire.mend()
            await client.until(lambda upto=first + 50: len(client.columns["loss"]) == upto)
        assert [step for step, _ in client.columns["loss"]] == list(range(200))
    finally:
        await client.close()
        await asyncio.to_thread(wire.close)
