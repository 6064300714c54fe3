"""What a client that knows a topic up to a cursor is told, by values."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.protocol.http.events import Changed, Problem, Removed, Snapshot, Synced
from jupyter_llmcloud.server.events.hub import MAX_MISSED, EventHub, Subscription


def items(**values: int) -> dict[str, bytes]:
    return {name: msgspec.json.encode({"name": name, "value": value}) for name, value in values.items()}


def told(subscription: Subscription) -> list[Any]:
    """[(kind, what)] of everything there is to tell."""
    rows: list[Any] = []
    for message in subscription.take():
        match message:
            case Snapshot():
                rows.append(("snapshot", [msgspec.json.decode(item)["name"] for item in message.items]))
            case Changed():
                rows.append(("changed", msgspec.json.decode(message.item)["name"]))
            case Removed():
                rows.append(("removed", message.id))
            case Problem():
                rows.append(("problem", message.message))
            case Synced():
                rows.append(("synced", message.topic))
    return rows


def following(hub: EventHub, epoch: str = "", cursor: int = 0) -> Subscription:
    subscription = Subscription(hub)
    subscription.follow("clusters", epoch, cursor)
    return subscription


def test_who_comes_first_gets_a_snapshot_and_then_each_change_once() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1, b=1))
    client = following(hub)
    assert told(client) == [("snapshot", ["a", "b"])]
    assert told(client) == []
    hub.replace("clusters", items(a=2, c=1))
    assert told(client) == [("removed", "b"), ("changed", "a"), ("changed", "c")]
    hub.replace("clusters", items(a=2, c=1))
    assert told(client) == []


def test_nothing_is_told_before_the_topic_was_read() -> None:
    hub = EventHub("e1")
    client = following(hub)
    assert told(client) == []
    hub.replace("clusters", {})
    assert told(client) == [("snapshot", [])]


def test_who_was_away_gets_what_it_missed_and_nothing_else() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1, b=1))
    known = hub.cursor
    hub.change("clusters", "a", items(a=2)["a"])
    hub.change("clusters", "a", items(a=3)["a"])
    hub.remove("clusters", "b")
    assert told(following(hub, "e1", known)) == [("changed", "a"), ("removed", "b"), ("synced", "clusters")]
    assert told(following(hub, "e1", hub.cursor)) == [("synced", "clusters")]


def test_an_item_that_came_back_is_not_told_as_removed() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1, b=1))
    known = hub.cursor
    hub.remove("clusters", "a")
    hub.change("clusters", "a", items(a=1)["a"])
    assert told(following(hub, "e1", known)) == [("changed", "a"), ("synced", "clusters")]


def test_a_cursor_of_another_life_of_the_server_gives_a_snapshot() -> None:
    hub = EventHub("e2")
    hub.replace("clusters", items(a=1))
    assert told(following(hub, "e1", 1)) == [("snapshot", ["a"])]
    assert told(following(hub, "e2", 999)) == [("snapshot", ["a"])]


def test_who_was_away_too_long_gets_a_snapshot() -> None:
    hub = EventHub("e1", max_removed=3)
    hub.replace("clusters", items(a=1))
    known = hub.cursor
    for number in range(4):
        hub.change("clusters", f"x{number}", b"{}")
        hub.remove("clusters", f"x{number}")
    assert told(following(hub, "e1", known)) == [("snapshot", ["a"])]


def test_who_has_missed_very_much_gets_a_snapshot() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1))
    client = following(hub)
    told(client)
    hub.replace("clusters", {f"n{number}": b'{"name":"n"}' for number in range(MAX_MISSED + 1)})
    assert [kind for kind, _ in told(client)] == ["snapshot"]


def test_however_often_an_item_changes_a_slow_client_gets_it_once() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1))
    client = following(hub)
    told(client)
    for value in range(10_000):
        hub.change("clusters", "a", items(a=value + 2)["a"])
    assert told(client) == [("changed", "a")]


def test_a_topic_that_cannot_be_read_keeps_its_items_and_says_why() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1))
    client = following(hub)
    told(client)
    hub.fail("clusters", "the scheduler does not answer.")
    hub.fail("clusters", "the scheduler does not answer.")
    assert told(client) == [("problem", "the scheduler does not answer.")]
    assert told(following(hub)) == [("snapshot", ["a"]), ("problem", "the scheduler does not answer.")]
    hub.replace("clusters", items(a=1))
    assert told(client) == [("synced", "clusters")]


def test_who_resumes_a_topic_that_nobody_reads_waits_until_it_is_read_again() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1, b=1))
    known = hub.cursor
    hub.rest("clusters")
    client = following(hub, "e1", known)
    assert told(client) == []
    hub.replace("clusters", items(b=1))
    assert told(client) == [("removed", "a"), ("synced", "clusters")]


def test_topics_do_not_mix() -> None:
    hub = EventHub("e1")
    hub.replace("clusters", items(a=1))
    client = following(hub)
    told(client)
    hub.replace("keys", items(k=1))
    assert told(client) == []
    client.follow("keys", "e1", 0)
    assert told(client) == [("snapshot", ["k"])]
    client.leave("clusters")
    hub.replace("clusters", items(a=2))
    assert told(client) == []
