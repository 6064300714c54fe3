"""How the revisions of an endpoint follow each other: replaced, split, shadowed, rolled back. Lists in, lists out.

At most one revision is stable, one the canary, one the shadow, one the previous one, whose replicas wait for a while to
be gone back to. The others are retired: kept without replicas, so that one can go back to them as well. Weights are
percent of the requests; those of the stable one and the canary make 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.errors import UsageError

STABLE, CANARY, SHADOW, PREVIOUS, RETIRED = "stable", "canary", "shadow", "previous", "retired"
ROLES = (STABLE, CANARY, SHADOW, PREVIOUS)
_WHOLE = 100

Revisions = Sequence[Revision]


def with_role(revisions: Revisions, role: str) -> Revision | None:
    """The revision that has this role."""
    for item in reversed(revisions):  # a generator would cost each request more
        if item.role == role:
            return item
    return None


def served(revisions: Revisions) -> tuple[Revision, ...]:
    """Those that have replicas, or may have some as soon as somebody asks."""
    return tuple(item for item in revisions if item.role != RETIRED)


def next_number(revisions: Revisions) -> int:
    """The number of a new revision."""
    return max((item.number for item in revisions), default=0) + 1


def updated(revisions: Revisions, new: Revision, now: float = 0.0) -> list[Revision]:
    """`new` takes the place of all that is served. `now`: in seconds since the epoch."""
    return [*(_replaced(item, new, now) for item in revisions), replace(new, role=STABLE, weight=_WHOLE)]


def _replaced(item: Revision, new: Revision, now: float) -> Revision:
    """Without requests; with its replicas for a while, when those are its own and that was asked for."""
    if item.role != STABLE:
        return _retired(item)
    item = replace(item, was_stable=True)
    if not new.keep_previous or new.in_place_of:
        return _retired(item)
    return replace(item, role=PREVIOUS, weight=0, in_place_of=0, kept_until=now + new.keep_previous)


def expired(revisions: Revisions, now: float) -> list[Revision] | None:
    """Without replicas that have been kept long enough; None when there are none."""
    over = [item.number for item in revisions if item.role == PREVIOUS and (item.kept_until or 0) <= now]
    return [_retired(item) if item.number in over else item for item in revisions] if over else None


def with_canary(revisions: Revisions, new: Revision, percent: int) -> list[Revision]:
    """`new` gets so many percent of the requests, the stable one the others; an earlier canary goes."""
    if not 1 <= percent <= 99:
        raise UsageError(f"canary {percent} is not possible: 1 to 99 percent of the requests.")
    rest = [_retired(item) if item.role == CANARY else item for item in revisions]
    canary = replace(new, role=CANARY, weight=percent, in_place_of=0, was_stable=False)
    return [*(_weighted(item, _WHOLE - percent) if item.role == STABLE else item for item in rest), canary]


def split(revisions: Revisions, shares: Mapping[str, int], now: float = 0.0) -> list[Revision]:
    """The requests shared out anew: `{"stable": 95, "canary": 5}`, or revisions by their numbers.

    A canary that gets everything is the stable one from then on, and the other one goes, as after an update. Raises
    UsageError. `now`: in seconds since the epoch.
    """
    total = sum(shares.values())
    if not shares or any(share < 0 for share in shares.values()) or total != _WHOLE:
        raise UsageError(f"the shares {_written(shares)} make {total}: they are percent, and make 100 together.")
    chosen = {find(revisions, name).number: share for name, share in shares.items()}
    if len(chosen) < len(shares):
        raise UsageError(f"the shares {_written(shares)} name one revision twice.")
    answering = {number: share for number, share in chosen.items() if share}
    if len(answering) > 2:
        raise UsageError(f"the shares {_written(shares)}: requests are split between two revisions at most.")
    before = with_role(revisions, STABLE)
    if len(answering) == 1:
        stable = next(iter(answering))
    elif before is not None and before.number in answering:
        stable = before.number
    else:
        stable = max(answering, key=lambda number: (answering[number], number))
    heir = next(item for item in revisions if item.number == stable)
    return [_as_split(item, answering, heir, now) for item in revisions]


def _as_split(item: Revision, answering: Mapping[int, int], heir: Revision, now: float) -> Revision:
    if item.number not in answering:
        return item if item.role == SHADOW else _replaced(item, heir, now)
    role = STABLE if item.number == heir.number else CANARY
    return replace(_revived(item), role=role, weight=answering[item.number], in_place_of=0)


def shadowed(revisions: Revisions, new: Revision | None) -> list[Revision]:
    """Requests are copied to `new`, one that is here already or not; None ends that."""
    rest = [_retired(item) if item.role == SHADOW else item for item in revisions]
    if new is None:
        return rest
    known = next((item for item in rest if item.number == new.number), None)
    if known is not None and known.role in (STABLE, CANARY):
        raise UsageError(f"revision {new.number} answers requests already ({known.role}): it cannot be their shadow.")
    shadow = replace(_revived(new), role=SHADOW, weight=0, in_place_of=0)
    if known is None:
        return [*rest, replace(shadow, was_stable=False)]
    shadow = replace(shadow, was_stable=known.was_stable)
    return [shadow if item.number == new.number else item for item in rest]


def rolled_back(revisions: Revisions) -> list[Revision]:
    """Without the canary; where there is none, the stable one gives its place back to the one before it."""
    if (canary := with_role(revisions, CANARY)) is not None:
        return withdrawn(revisions, canary.number, "")
    stable = with_role(revisions, STABLE)
    earlier = _before(revisions, stable.number) if stable is not None else []
    if stable is None or not earlier:
        raise UsageError("there is no earlier revision to go back to.")
    return _back_to(revisions, max(earlier, key=lambda item: item.number), stable, "rolled back")


def withdrawn(revisions: Revisions, number: int, reason: str) -> list[Revision]:
    """Without a revision that fails (`reason`), or is not wanted (none): the others answer in its place."""
    failed = next(item for item in revisions if item.number == number)
    if failed.role == STABLE:
        heirs = [item for item in revisions if item.role == CANARY] or _before(revisions, number)
        if not heirs:
            return list(revisions)
        return _back_to(revisions, max(heirs, key=lambda item: item.number), failed, reason)
    out = [_retired(item, reason) if item.number == number else item for item in revisions]
    return [_weighted(item, _WHOLE) if failed.role == CANARY and item.role == STABLE else item for item in out]


def _before(revisions: Revisions, number: int) -> list[Revision]:
    """Those that one can go back to: they were the stable one. A canary or a shadow was only tried, or has failed."""
    gone = [item for item in revisions if item.role in (PREVIOUS, RETIRED) and item.number < number]
    return [item for item in gone if not item.note and item.was_stable is not False]


def _back_to(revisions: Revisions, heir: Revision, failed: Revision, reason: str) -> list[Revision]:
    """`in_place_of` is for whoever calls: only that one knows whether the weights can be taken back in place."""
    back = replace(_revived(heir), role=STABLE, weight=_WHOLE, in_place_of=0)
    changed = {heir.number: back, failed.number: _retired(failed, reason)}
    return [changed.get(item.number, item) for item in revisions]


def scaled(revisions: Revisions, num_replicas: int) -> list[Revision]:
    """The stable revision with so many replicas; the canary keeps its own."""
    return [replace(item, num_replicas=num_replicas) if item.role == STABLE else item for item in revisions]


def find(revisions: Revisions, name: str) -> Revision:
    """A revision by its role or its number; raises UsageError that names those there are."""
    found = with_role(revisions, name) if name in ROLES else None
    if found is None and name.isascii() and name.isdigit():
        found = next((item for item in revisions if item.number == int(name)), None)
    if found is None:
        known = ", ".join(f"{item.number} ({item.role})" for item in revisions)
        raise UsageError(f"there is no revision {name!r} here. There is: {known}.")
    return found


def parse_shares(text: str) -> dict[str, int]:
    """`stable:95,canary:5` -> {"stable": 95, "canary": 5}. Raises UsageError."""
    shares: dict[str, int] = {}
    for part in text.split(","):
        name, colon, share = part.strip().partition(":")
        if not (name and colon and share.isascii() and share.isdigit()) or name in shares:
            raise UsageError(f"{text!r} is no split of requests: write it as in stable:95,canary:5, in percent.")
        shares[name] = int(share)
    return shares


def _written(shares: Mapping[str, int]) -> str:
    return ",".join(f"{name}:{share}" for name, share in shares.items())


def _weighted(item: Revision, weight: int) -> Revision:
    return replace(item, weight=weight)


def _retired(item: Revision, note: str = "") -> Revision:
    return replace(item, role=RETIRED, weight=0, in_place_of=0, kept_until=None, note=note or item.note)


def _revived(item: Revision) -> Revision:
    return replace(item, num_replicas=max(1, item.num_replicas), kept_until=None, note="")


# --- the health of a canary -----------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """What became of the requests to a revision since it answers: how many, and how many failed by its own fault."""

    num_requests: int = 0
    num_errors: int = 0

    def note(self, failed: bool) -> None:
        """One is over."""
        self.num_requests += 1
        self.num_errors += failed

    @property
    def rate(self) -> float:
        """The share that failed."""
        return self.num_errors / self.num_requests if self.num_requests else 0.0


MIN_ERRORS = 3
MIN_REQUESTS = 10
MORE_THAN_STABLE = 0.1


def why_unhealthy(canary: Outcomes, stable: Outcomes) -> str:
    """Why a canary has to go; "" when it may stay.

    It fails when at least 3 requests and more than twice the stable one's share of them fail, and 10 percent more than
    there: of its first 10 requests at the earliest, or of its first 3 when all of them do.
    """
    if canary.num_errors < MIN_ERRORS:
        return ""
    if canary.num_requests < MIN_REQUESTS and canary.num_errors < canary.num_requests:
        return ""
    if canary.rate <= max(2 * stable.rate, stable.rate + MORE_THAN_STABLE):
        return ""
    return (
        f"{canary.num_errors} of its {canary.num_requests} requests failed, and {stable.num_errors} of "
        f"{stable.num_requests} of the stable revision's"
    )
