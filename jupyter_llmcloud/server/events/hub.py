"""What is known of each topic, and what somebody who knew it up to a cursor has missed. Decided by values.

Every change of an item gets the next number, its cursor. Kept are the items with the cursor of their last change, and
the last removals: whoever is behind gets each item once, as it is now, however often it has changed meanwhile. So
there is no queue for a slow client, and nothing grows with the time that it is away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from msgspec import Raw

from jupyter_llmcloud.protocol.http.events import (
    Changed,
    Problem,
    Removed,
    ServerMessage,
    Snapshot,
    Synced,
    Topic,
)

MAX_REMOVED = 1000  # of each topic; who is further behind gets a snapshot
MAX_MISSED = 200  # so does who has missed more changes than this


@dataclass
class TopicState:
    """One topic.

    Attributes:
        items: {id: (its JSON, the cursor of its last change)}.
        forgotten: the cursor of the newest removal that is not kept any more.
        is_fresh: whether the items are those of now; not while nobody reads the topic.
        problem: why it cannot be read; empty when it can.
    """

    items: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    removed: deque[tuple[str, int]] = field(default_factory=deque)
    forgotten: int = 0
    is_fresh: bool = False
    problem: str = ""


class EventHub:
    """All topics of a server.

    Args:
        epoch: names this life of the server; a cursor means something only within it.
        max_removed: removals of a topic that are remembered.
    """

    def __init__(self, epoch: str, max_removed: int = MAX_REMOVED) -> None:
        self.epoch = epoch
        self.cursor = 0
        self._max_removed = max_removed
        self._topics: dict[Topic, TopicState] = {}
        self._listeners: set[Callable[[], None]] = set()

    def topic(self, name: Topic) -> TopicState:
        """What is known of one."""
        return self._topics.setdefault(name, TopicState())

    def listen(self, listener: Callable[[], None]) -> None:
        """Have this called after every change."""
        self._listeners.add(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """No more."""
        self._listeners.discard(listener)

    # --- what sources tell ---

    def replace(self, name: Topic, items: Mapping[str, bytes]) -> None:
        """The whole topic as it is now."""
        topic = self.topic(name)
        is_news = self._make_fresh(topic)
        for key in [key for key in topic.items if key not in items]:
            is_news |= self._remove(topic, key)
        for key, item in items.items():
            is_news |= self._change(topic, key, item)
        self._tell(is_news)

    def change(self, name: Topic, key: str, item: bytes) -> None:
        """One item as it is now."""
        self._tell(self._change(self.topic(name), key, item))

    def remove(self, name: Topic, key: str) -> None:
        """An item is no more."""
        self._tell(self._remove(self.topic(name), key))

    def readable(self, name: Topic) -> None:
        """The topic was read, and is as it is known."""
        self._tell(self._make_fresh(self.topic(name)))

    def fail(self, name: Topic, problem: str) -> None:
        """The topic cannot be read now; what is known of it stays."""
        topic = self.topic(name)
        if topic.problem != problem:
            topic.problem = problem
            self._tell(True)

    def rest(self, name: Topic) -> None:
        """Nobody reads the topic from now on."""
        self.topic(name).is_fresh = False

    @staticmethod
    def _make_fresh(topic: TopicState) -> bool:
        was_readable = topic.is_fresh and not topic.problem
        topic.is_fresh, topic.problem = True, ""
        return not was_readable

    def _change(self, topic: TopicState, key: str, item: bytes) -> bool:
        known = topic.items.get(key)
        if known is not None and known[0] == item:
            return False
        self.cursor += 1
        topic.items[key] = (item, self.cursor)
        return True

    def _remove(self, topic: TopicState, key: str) -> bool:
        if topic.items.pop(key, None) is None:
            return False
        self.cursor += 1
        topic.removed.append((key, self.cursor))
        if len(topic.removed) > self._max_removed:
            topic.forgotten = topic.removed.popleft()[1]
        return True

    def _tell(self, is_news: bool) -> None:
        if is_news:
            for listener in list(self._listeners):
                listener()


class Subscription:
    """Who follows some topics, and how far it has come in each.

    Args:
        hub: where the topics are.
    """

    def __init__(self, hub: EventHub) -> None:
        self._hub = hub
        self._reached: dict[Topic, int | None] = {}  # None: it knows nothing yet
        self._problems: dict[Topic, str] = {}  # as told
        self._greets: set[Topic] = set()  # topics of which it is to be told that it goes on from its cursor

    @property
    def topics(self) -> frozenset[Topic]:
        """Those that it follows."""
        return frozenset(self._reached)

    def follow(self, topic: Topic, epoch: str, cursor: int) -> None:
        """Go on after `cursor`, where that is of this epoch; else begin with a snapshot."""
        knows = epoch == self._hub.epoch and 0 < cursor <= self._hub.cursor
        self._reached[topic] = cursor if knows else None
        self._problems[topic] = ""
        if knows:
            self._greets.add(topic)

    def leave(self, topic: Topic) -> None:
        """Follow it no more."""
        self._reached.pop(topic, None)
        self._greets.discard(topic)

    def take(self) -> list[ServerMessage]:
        """What there is to tell now, of all its topics in order; empty when it knows everything."""
        return [message for topic in self._reached for message in self._of(topic)]

    def _of(self, name: Topic) -> list[ServerMessage]:
        topic, reached = self._hub.topic(name), self._reached[name]
        told = self._problem(name, topic)
        if not topic.is_fresh:
            return told
        missed = self._missed(name, topic, reached) if reached is not None and reached >= topic.forgotten else None
        self._reached[name] = self._hub.cursor
        if missed is None:
            self._greets.discard(name)
            items = [Raw(item) for item, _ in topic.items.values()]
            return [Snapshot(topic=name, cursor=self._hub.cursor, items=items), *told]
        if name in self._greets:
            self._greets.discard(name)
            missed.append(Synced(topic=name, cursor=self._hub.cursor))
        return [*missed, *told]

    def _problem(self, name: Topic, topic: TopicState) -> list[ServerMessage]:
        if topic.problem == self._problems[name]:
            return []
        self._problems[name] = topic.problem
        if topic.problem:
            return [Problem(topic=name, message=topic.problem)]
        return [Synced(topic=name, cursor=self._hub.cursor)]

    @staticmethod
    def _missed(name: Topic, topic: TopicState, reached: int) -> list[ServerMessage] | None:
        """Each change after a cursor, in order; None when there are too many of them."""
        changed = [(at, key, item) for key, (item, at) in topic.items.items() if at > reached]
        removed = [(at, key, None) for key, at in topic.removed if at > reached and key not in topic.items]
        if len(changed) + len(removed) > MAX_MISSED:
            return None
        return [
            Removed(topic=name, cursor=at, id=key) if item is None else Changed(topic=name, cursor=at, item=Raw(item))
            for at, key, item in sorted([*changed, *removed], key=lambda row: row[0])
        ]
