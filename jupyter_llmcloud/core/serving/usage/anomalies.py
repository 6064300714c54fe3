"""What is unusual in the use of a key. Values in, values out; time is passed in.

Three rules, each stated by a constant, each told once until it no longer holds:

new address     A key that has asked at least MIN_REQUESTS times asks from a network (IPv4 /24, IPv6 /48) from which it
                has not asked before. Each network is told once.
sudden load     Within PERIOD_S a key asks RATIO times as often, or spends RATIO times as many tokens, as on average in
                its last MAX_PERIODS periods in which it was used, at least MIN_PERIODS of them; and at least
                MIN_LOAD_REQUESTS requests or MIN_LOAD_TOKENS tokens.
only refused    The last NUM_REFUSED requests of a key were refused (400, 401, 403, 404, 413, 429), without one that was
                answered between them.
"""

from __future__ import annotations

import functools
import ipaddress
from collections import deque
from dataclasses import dataclass

MIN_REQUESTS = 20
MAX_NETWORKS = 64
PERIOD_S = 300.0
RATIO = 10
MIN_PERIODS = 3
MAX_PERIODS = 12
MIN_LOAD_REQUESTS = 50
MIN_LOAD_TOKENS = 20_000
NUM_REFUSED = 20
REFUSED = (400, 401, 403, 404, 413, 429)
RULES = ("new address", "sudden load", "only refused")


@dataclass(frozen=True)
class KeyAlert:
    """Something unusual: which of RULES, and what was seen."""

    rule: str
    what: str


@functools.lru_cache(maxsize=1024)  # it is asked with every request
def network_of(address: str) -> str:
    """The network that an address belongs to, as far as one holder's addresses change: `192.0.2.0/24`."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    prefix = 24 if parsed.version == 4 else 48
    return str(ipaddress.ip_network(f"{parsed}/{prefix}", strict=False))


class KeyUse:
    """How one key is used, as far as the rules need it. Bounded, whatever its holder does."""

    def __init__(self) -> None:
        self._num_requests = 0
        self._networks: dict[str, None] = {}  # in the order in which they came
        self._period = 0
        self._current = [0, 0]  # requests and tokens of this period
        self._earlier: deque[tuple[int, int]] = deque(maxlen=MAX_PERIODS)
        self._told_load = False
        self._num_refused = 0

    def asked(self, address: str, now: float) -> list[KeyAlert]:
        """A request has come."""
        self._num_requests += 1
        alerts = []
        network = network_of(address)
        if network not in self._networks:
            if self._networks and self._num_requests > MIN_REQUESTS:
                known = ", ".join(list(self._networks)[:3])
                alerts.append(KeyAlert("new address", f"it asks from {network}, until now from {known}"))
            self._networks[network] = None
            if len(self._networks) > MAX_NETWORKS:
                del self._networks[next(iter(self._networks))]
        return alerts + self._spend(1, 0, now)

    def answered(self, status: int) -> list[KeyAlert]:
        """A request has its answer."""
        self._num_refused = self._num_refused + 1 if status in REFUSED else 0
        if self._num_refused != NUM_REFUSED:
            return []
        return [KeyAlert("only refused", f"its last {NUM_REFUSED} requests were refused, the last one with {status}")]

    def spent(self, num_tokens: int, now: float) -> list[KeyAlert]:
        """What a request has cost is known."""
        return self._spend(0, num_tokens, now)

    def _spend(self, num_requests: int, num_tokens: int, now: float) -> list[KeyAlert]:
        if (period := int(now // PERIOD_S)) != self._period:
            if any(self._current):
                self._earlier.append((self._current[0], self._current[1]))
            self._period, self._current, self._told_load = period, [0, 0], False
        self._current[0] += num_requests
        self._current[1] += num_tokens
        if self._told_load or len(self._earlier) < MIN_PERIODS:
            return []
        for index, (unit, least) in enumerate((("requests", MIN_LOAD_REQUESTS), ("tokens", MIN_LOAD_TOKENS))):
            usual = sum(row[index] for row in self._earlier) / len(self._earlier)
            if self._current[index] >= max(least, RATIO * usual):
                self._told_load = True
                what = f"{self._current[index]} {unit} in {PERIOD_S:.0f} s, {usual:.0f} on average before"
                return [KeyAlert("sudden load", what)]
        return []
