"""The events of a server: its topics with their sources, and the runs that are watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jupyter_llmcloud.protocol.http.events import HEARTBEAT_S, Hello, Topic
from jupyter_llmcloud.server.api.status import package_version
from jupyter_llmcloud.server.events.hub import EventHub
from jupyter_llmcloud.server.watches.follower import RunFollower
from jupyter_llmcloud.server.watches.watch import RunWatch, SharedColumns

if TYPE_CHECKING:
    from jupyter_llmcloud.server.api.run_states import RunStates
    from jupyter_llmcloud.server.events.resources import Resources
    from jupyter_llmcloud.server.events.sources import TopicSource
    from jupyter_llmcloud.storage.runs import RunStore


class EventService:
    """Of one server.

    Args:
        epoch: names this life of the server.
        sources: one for each topic.
        resources: what is known of processes.
    """

    def __init__(self, epoch: str, store: RunStore, states: RunStates, resources: Resources) -> None:
        self.hub = EventHub(epoch)
        self._store = store
        self._states = states
        self._resources = resources
        self._sources: dict[Topic, TopicSource] = {}
        self._followed: dict[str, tuple[RunFollower, SharedColumns]] = {}

    def add(self, source: TopicSource) -> None:
        """A topic can be read from now on."""
        self._sources[source.topic] = source

    def hello(self) -> Hello:
        """What a client is told first."""
        return Hello(epoch=self.hub.epoch, version=package_version(), heartbeat_s=HEARTBEAT_S, now=time.time())

    def wake(self, *topics: Topic) -> None:
        """Something was done that may have changed these."""
        for topic in topics:
            if topic in self._sources:
                self._sources[topic].wake()

    def hold(self, topic: Topic) -> None:
        """Somebody follows this topic."""
        self._sources[topic].hold()

    def release(self, topic: Topic) -> None:
        """One less follows it."""
        self._sources[topic].release()

    def watch(self, run_id: str, points: int, on_news: Callable[[], None]) -> RunWatch:
        """Follow a run, for one more client. Raises UsageError when that is no name of a run."""
        if run_id not in self._followed:
            follower = RunFollower(self._store.folder(run_id), self._states)
            self._followed[run_id] = (follower, SharedColumns(follower))
        follower, columns = self._followed[run_id]
        follower.listen(on_news)
        return RunWatch(follower, columns, points, lambda: self._resources.of_ranks(follower.record))

    def unwatch(self, run_id: str, on_news: Callable[[], None]) -> None:
        """One client less follows it."""
        if run_id in self._followed and self._followed[run_id][0].unlisten(on_news):
            del self._followed[run_id]

    def source(self, topic: Topic) -> TopicSource:
        """What reads this topic."""
        return self._sources[topic]

    @property
    def watched(self) -> dict[str, RunFollower]:
        """The runs that somebody watches."""
        return {run_id: follower for run_id, (follower, _) in self._followed.items()}

    def close(self) -> None:
        """The server ends."""
        for source in self._sources.values():
            source.stop()
        self._resources.close()
        for follower, _ in self._followed.values():
            follower.stop()
        self._followed.clear()
