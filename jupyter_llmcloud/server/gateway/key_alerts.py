"""Watches how keys are used, and tells what is unusual: in the audit, in the log and in a counter."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from prometheus_client import Counter

from jupyter_llmcloud.core.serving.usage.anomalies import KeyAlert, KeyUse

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.audit import Audit

MAX_KEYS = 10_000
ALERT = "key.alert"
ALERTS = Counter("llmcloud_key_alerts_total", "Unusual uses of keys", ["rule"])


class KeyMonitor:
    """How each key is used. Kept in memory: after a restart a server learns anew what is usual."""

    def __init__(self, audit: Audit, log: Logger) -> None:
        self._audit = audit
        self._log = log
        self._uses: OrderedDict[str, KeyUse] = OrderedDict()

    def asked(self, key_id: str, address: str) -> None:
        """A request came with a key, valid or not any more."""
        self._tell(key_id, self._use(key_id).asked(address, time.time()))

    def answered(self, key_id: str, status: int) -> None:
        """Such a request has its answer."""
        self._tell(key_id, self._use(key_id).answered(status))

    def spent(self, key_id: str, num_tokens: int) -> None:
        """What a request has cost is known."""
        self._tell(key_id, self._use(key_id).spent(num_tokens, time.time()))

    def _use(self, key_id: str) -> KeyUse:
        use = self._uses.get(key_id)
        if use is None:
            use = self._uses[key_id] = KeyUse()
            if len(self._uses) > MAX_KEYS:
                self._uses.popitem(last=False)
        else:
            self._uses.move_to_end(key_id)
        return use

    def _tell(self, key_id: str, alerts: list[KeyAlert]) -> None:
        for alert in alerts:
            ALERTS.labels(alert.rule).inc()
            self._log.warning("key %s: %s: %s", key_id, alert.rule, alert.what)
            self._audit.tell("server", ALERT, key_id, rule=alert.rule, what=alert.what)
