"""Scoped keys: what they allow, how much, when they end, and what was asked with them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from jupyter_llmcloud.core.spec import KeySpec
from jupyter_llmcloud.protocol.http.base import Body, Query, Response

DEFAULT_EXPIRY_S = 30 * 86400.0
MAX_EXPIRY_S = 10 * 365 * 86400.0
DEFAULT_OVERLAP_S = 3600.0
MAX_OVERLAP_S = 90 * 86400.0
MAX_LIMIT = 10**12
MAX_USAGE_DAYS = 3660
_Limit = Annotated[int, Meta(ge=1, le=MAX_LIMIT)]
_HELP = {option.name: option.help for option in KeySpec.options()}


class CreateKey(Body, frozen=True):
    """A key to mint."""

    scopes: Annotated[
        list[str],
        Meta(
            description="What it opens: infer:NAME, where NAME may hold * and ?, and models:read. At least one.",
            examples=[["infer:*", "models:read"]],
        ),
    ] = []
    expires_s: Annotated[float, Meta(ge=1, le=MAX_EXPIRY_S, description="Seconds until it ends.")] = DEFAULT_EXPIRY_S
    label: Annotated[str, Meta(description="To tell it from others; its first 200 characters are kept.")] = ""
    requests_per_minute: Annotated[_Limit | None, Meta(description=_HELP["requests_per_minute"])] = None
    tokens_per_minute: Annotated[_Limit | None, Meta(description=_HELP["tokens_per_minute"])] = None
    parallel_requests: Annotated[_Limit | None, Meta(description=_HELP["parallel_requests"])] = None


class RotateKey(Body, frozen=True):
    """A key to replace by a new one with the same scopes, limits and length of life."""

    overlap_s: Annotated[
        float,
        Meta(ge=0, le=MAX_OVERLAP_S, description="Seconds that the old key stays valid; none when it ends before."),
    ] = DEFAULT_OVERLAP_S


class Key(Response, frozen=True):
    """A key, without its secret. Times are seconds since the epoch."""

    id: Annotated[str, Meta(description="By which it is listed and revoked; the second part of the key itself.")]
    label: str
    scopes: list[str]
    owner: Annotated[str, Meta(description="Who minted it, as Jupyter names them.")]
    created: float
    expires: float | None
    revoked: float | None
    state: Literal["valid", "expired", "revoked"]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    replaced_by: Annotated[str | None, Meta(description="The key that was made in its place.")] = None
    last_used: Annotated[float | None, Meta(description="When a request with it ended last.")] = None


class NewKey(Key, frozen=True, kw_only=True):
    """A key with its secret, which is told here and nowhere else."""

    key: Annotated[str, Meta(description="What goes into the header Authorization: Bearer KEY.")]


class Keys(Response, frozen=True):
    """The keys of whoever asks; those of all who use this server for who may see them."""

    keys: list[Key]


class KeyRevoked(Response, frozen=True):
    """The key opens nothing any more, and the streams that it had open are cut."""

    id: str
    state: Literal["revoked"] = "revoked"


class KeyUsageQuery(Query, frozen=True):
    """Of which time."""

    days: Annotated[int, Meta(ge=1, le=MAX_USAGE_DAYS, description="How many days, today's being the last.")] = 30


class KeyUsage(Response, frozen=True):
    """What was asked with a key on one day (of UTC)."""

    id: Annotated[str, Meta(description="Of the key.")]
    label: str
    owner: str
    day: Annotated[str, Meta(description="As 2026-11-28.")]
    requests: int
    refused: Annotated[int, Meta(description="Of these, answered with a status from 400 to 498.")]
    prompt_tokens: int
    generated_tokens: int
    last_used: float


class KeysUsage(Response, frozen=True):
    """What was asked with keys, by day, the newest day first. What is asked now is in it within a second of its end."""

    usage: list[KeyUsage]


class KeyAlertsQuery(Query, frozen=True):
    """How many."""

    limit: Annotated[int, Meta(ge=1, le=10_000, description="The newest.")] = 100


class KeyAlert(Response, frozen=True):
    """Something unusual in the use of a key."""

    id: Annotated[str, Meta(description="Of the key.")]
    t: Annotated[float, Meta(description="When it was seen, in seconds since the epoch.")]
    rule: Annotated[str, Meta(description="new address, sudden load, or only refused.")]
    what: Annotated[str, Meta(description="What was seen, in a few words.")]


class KeyAlerts(Response, frozen=True):
    """What was unusual in the use of keys, the newest first."""

    alerts: list[KeyAlert]
