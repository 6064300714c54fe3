"""What people say of answers, what comes of it, and whether an endpoint is asked other things than before."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.http.base import Body, Query, Response


class GiveFeedback(Body, frozen=True):
    """What is said of an answer: at least a rating, a correction or a comment."""

    request_id: Annotated[str, Meta(description="From the header x-request-id of the answer.")]
    rating: Annotated[Literal["up", "down"] | float | None, Meta(description="up, down, or a number from -1 to 1.")] = (
        None
    )
    correction: Annotated[str | None, Meta(description="What should have been answered.")] = None
    comment: str | None = None
    prompt: Annotated[
        str | list[dict[str, Any]] | None,
        Meta(description="What was asked (a text or messages), where the endpoint does not keep its requests."),
    ] = None
    answer: Annotated[str | None, Meta(description="What was answered, where it is not kept.")] = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] = {}


class FeedbackGiven(Response, frozen=True):
    """It is kept."""

    request_id: str
    endpoint: str
    rating: float | None


class FeedbackQuery(Query, frozen=True):
    """How much."""

    limit: Annotated[int, Meta(ge=1, le=100_000, description="The newest.")] = 1000


class FeedbackRow(Response, frozen=True):
    """What somebody said of an answer. Times are seconds since the epoch."""

    request_id: str
    actor: str
    t: float
    rating: float | None
    correction: str | None
    comment: str | None
    metadata: dict[str, str]


class FeedbackRows(Response, frozen=True):
    """The newest first."""

    feedback: list[FeedbackRow]


class DriftQuery(Query, frozen=True):
    """What is compared."""

    recent: Annotated[int, Meta(ge=1, le=10_000, description="How many of the newest requests count as recent.")] = 200


class DriftRow(Response, frozen=True):
    """How far a quantity has moved between the earlier requests and the recent ones."""

    name: Annotated[str, Meta(description="prompt_tokens, completion_tokens, first_byte_s or rating.")]
    num_earlier: int
    num_recent: int
    mean_earlier: float | None
    mean_recent: float | None
    psi: Annotated[
        float | None, Meta(description="Population stability index; null with fewer than 50 values on either side.")
    ]
    verdict: Annotated[
        Literal["unknown", "none", "minor", "major"], Meta(description="From 0.1 minor, from 0.25 major.")
    ]


class Drift(Response, frozen=True):
    """Whether an endpoint is asked other things than before, and answers them in another way."""

    drift: list[DriftRow]
