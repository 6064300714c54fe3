"""Which answers may be given again: those that the same request would get again, to whoever got them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_NO_EFFECT = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier"})
_ALWAYS = frozenset({"embeddings"})
_TOLD_BACK = frozenset({"responses"})  # whose answers repeat what was asked, word for word


def cache_key(actor: str, endpoint: str, revision: str, route: str, body: bytes) -> str | None:
    """Where the answer to a request is kept; None for one whose answer may be another one the next time.

    A request has one answer when it is greedy (`temperature` 0), has a `seed`, or asks for embeddings. The key holds
    who asks: nobody gets what another one was answered, nor learns from the time it takes that it was. A response that
    its replica stores is none that may be given again: its id names what is kept there, for a while.

    Args:
        actor: a key's id or a user, as usage names them.
        revision: what answers, as `Revision.answers_by` names it.
        body: of the request: JSON.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict) or not (route in _ALWAYS or _has_one_answer(asked)):
        return None
    if route in _TOLD_BACK and asked.get("store") is not False:
        return None
    left_out = frozenset[str]() if route in _TOLD_BACK else _NO_EFFECT
    told = {name: value for name, value in asked.items() if name not in left_out and value is not None}
    text = json.dumps([actor, endpoint, revision, route, told], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _has_one_answer(asked: dict[str, Any]) -> bool:
    temperature, seed = asked.get("temperature"), asked.get("seed")
    greedy = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0
    return greedy or (isinstance(seed, int) and not isinstance(seed, bool))
