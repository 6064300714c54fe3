"""What the requests and replies of the REST API have in common, and how it refuses."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta


class Body(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of what a request carries as JSON. A field that is null counts as left out."""


class Query(msgspec.Struct, kw_only=True, frozen=True):
    """Base of what a request says behind its path. Other names there are not ours, and are let be."""


class Response(msgspec.Struct, kw_only=True, frozen=True):
    """Base of what is answered."""


class Refusal(Response, frozen=True, omit_defaults=True):
    """Why a request was not carried out; nothing was changed, unless the message says so."""

    error: Annotated[str, Meta(description="The class of the error, such as UsageError, NotFound or Busy.")]
    message: Annotated[str, Meta(description="What happened, the value seen, what to do next: one or two sentences.")]
    detail: Annotated[dict[str, Any], Meta(description="More, where the class of the error has more.")] = {}
