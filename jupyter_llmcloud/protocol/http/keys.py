"""Scoped keys: what they allow, and when they end."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.http.base import Body, Response

DEFAULT_EXPIRY_S = 30 * 86400.0
MAX_EXPIRY_S = 10 * 365 * 86400.0


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


class NewKey(Key, frozen=True):
    """A key with its secret, which is told here and nowhere else."""

    key: Annotated[str, Meta(description="What goes into the header Authorization: Bearer KEY.")]


class Keys(Response, frozen=True):
    """All keys of this user."""

    keys: list[Key]


class KeyRevoked(Response, frozen=True):
    """The key opens nothing any more, and the streams that it had open are cut."""

    id: str
    state: Literal["revoked"] = "revoked"
