"""A rank for which the others wait, and ranks that wait for their data: by the shares of core.run.time_split.

Steps of ranks that train together take equally long, whoever is slow. What differs is how long each is blocked in the
collectives that they share, by its own clock: the slow one waits for nobody while the others wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.run.time_split import Split

WAITING_SHARE = 0.25  # of their time that the others wait: a rank at three quarters of their speed
DATA_SHARE = 0.3  # of the time of the median rank
LASTS_S = 20.0  # twice the ten seconds that shares are made of
MIN_READINGS = 5
OVER = 0.6  # times the threshold: below, the trouble is over


@dataclass(frozen=True)
class Shares:
    """How ranks have spent their last seconds, by rank and part, at `now` (seconds of any clock)."""

    now: float
    ranks: Mapping[int, Split]


class _Lasting:
    """A condition is told once it has held for LASTS_S and MIN_READINGS, and again only after it was over."""

    def __init__(self) -> None:
        self._key: object = None
        self._since = 0.0
        self._readings = 0
        self._told = False

    def hold(self, key: object, now: float) -> None:
        if key != self._key:
            self._key, self._since, self._readings, self._told = key, now, 0, False
        self._readings += 1
        self.lasts_s = now - self._since

    def over(self) -> None:
        self._key = None

    def news(self) -> bool:
        if self._key is None or self._told or self._readings < MIN_READINGS or self.lasts_s < LASTS_S:
            return False
        self._told = True
        return True


class StragglerDetector:
    """Names the rank that keeps the others waiting. What it spends in checkpoints is not held against it."""

    def __init__(self) -> None:
        self._lasting = _Lasting()
        self._rank = 0
        self._lead = 0.0
        self._own: Split = {}

    def feed(self, observation: Shares) -> None:
        """Take in the next shares."""
        ranks = observation.ranks
        if len(ranks) < 2:
            self._lasting.over()
            return
        slow = min(ranks, key=lambda rank: ranks[rank]["waiting"])
        own = ranks[slow]
        others = median(parts["waiting"] for rank, parts in ranks.items() if rank != slow)
        lead = others - own["waiting"] - own["checkpoint"]
        if lead > WAITING_SHARE or (lead > OVER * WAITING_SHARE and slow == self._rank and self._lead > 0):
            self._rank, self._lead, self._own = slow, lead, own
            self._lasting.hold(slow, observation.now)
        else:
            self._lead = 0.0
            self._lasting.over()

    def check(self) -> Alert | None:
        """The rank that is late for LASTS_S."""
        if self._lead <= WAITING_SHARE or not self._lasting.news():
            return None
        why = "its data loader takes" if self._own["data"] > self._own["compute"] else "it computes for"
        share = max(self._own["data"], self._own["compute"])
        return Alert(
            "straggler",
            f"rank {self._rank} is slow: the others wait for it {100 * self._lead:.0f} % of their time"
            f" ({why} {100 * share:.0f} % of its own)",
            f"{self._lasting.lasts_s:.0f} s of waits in shared collectives",
            self._lead,
            WAITING_SHARE,
            ranks=(self._rank,),
        )


class DataBoundDetector:
    """Says when the ranks wait for their data loaders."""

    def __init__(self) -> None:
        self._lasting = _Lasting()
        self._share = 0.0

    def feed(self, observation: Shares) -> None:
        """Take in the next shares."""
        self._share = median(parts["data"] for parts in observation.ranks.values()) if observation.ranks else 0.0
        if self._share > DATA_SHARE:
            self._lasting.hold("data", observation.now)
        elif self._share < OVER * DATA_SHARE:
            self._lasting.over()

    def check(self) -> Alert | None:
        """The share of the median rank, when it is much for LASTS_S."""
        if self._share <= DATA_SHARE or not self._lasting.news():
            return None
        return Alert(
            "data-bound",
            f"the ranks spend {100 * self._share:.0f} % of their time waiting for data: more workers of the DataLoader,"
            " or data prepared beforehand, would make the steps shorter",
            f"{self._lasting.lasts_s:.0f} s, the median rank",
            self._share,
            DATA_SHARE,
        )
