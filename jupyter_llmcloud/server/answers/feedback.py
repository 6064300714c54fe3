"""`POST /llmcloud/v1/feedback`, and what comes of it: the data set for the next training, and drift."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.core.serving.drift import drift_of
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.protocol.http.openai.feedback import (
    Drift,
    DriftQuery,
    DriftRow,
    FeedbackGiven,
    FeedbackQuery,
    FeedbackRow,
    FeedbackRows,
    GiveFeedback,
)
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.operation import operation
from jupyter_llmcloud.server.gateway.auth import GatewayHandler
from jupyter_llmcloud.server.gateway.operation import gateway_operation
from jupyter_llmcloud.storage.serving.feedback import Feedback

if TYPE_CHECKING:
    from jupyter_llmcloud.server.answers.keeper import Keeper
    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
    from jupyter_llmcloud.server.gateway.open_requests import OpenRequests
    from jupyter_llmcloud.storage.server_state import ServerState

_RATINGS = {"up": 1.0, "down": -1.0}
_EARLIER = 10  # times as many as the recent ones
_COMPARED = ("prompt_tokens", "completion_tokens", "first_byte_s")
MAX_TEXT = 200_000


class GiveFeedbackHandler(GatewayHandler):
    """What a client says of an answer it got."""

    def initialize(self, requests: OpenRequests, keeper: Keeper, **shared: Any) -> None:  # type: ignore[override]
        """`requests` knows what was answered, `keeper` has the store."""
        super().initialize(**shared)
        self.requests = requests
        self.store = keeper.store

    @gateway_operation("execute", FeedbackGiven, body=GiveFeedback)
    async def post(self, body: GiveFeedback) -> FeedbackGiven:
        """Say that an answer was right or wrong, or what it should have been. A key can judge its own requests."""
        rating = self._rating(body)
        if rating is None and body.correction is None and body.comment is None:
            raise ApiError(400, "say something: a rating, a correction or a comment.", param="rating")
        if (
            body.correction is not None and not body.correction.strip()
        ):  # a form that was left empty: no answer to learn
            raise ApiError(400, "correction is empty: say what should have been answered.", param="correction")
        await self.requests.write()  # the request may have ended just now
        asked = self.state.request(body.request_id)
        if asked is None or (self.key is not None and asked["actor"] != self.actor):
            message = f"no request {body.request_id[:80]!r} was answered here: see the header x-request-id."
            raise ApiError(404, message, param="request_id", code="request_not_found")
        prompt = None if body.prompt is None else json.dumps(body.prompt)
        for name, text in (("correction", body.correction), ("prompt", prompt), ("answer", body.answer)):
            if text is not None and len(text) > MAX_TEXT:
                raise ApiError(400, f"{name} has {len(text)} characters: at most {MAX_TEXT}.", param=name)
        feedback = Feedback(
            body.request_id, self.actor, time.time(), asked["endpoint"], rating, body.correction, body.comment,
            prompt, body.answer, json.dumps(body.metadata),
        )  # fmt: skip
        await asyncio.to_thread(self.store.add, feedback)
        return FeedbackGiven(request_id=body.request_id, endpoint=asked["endpoint"], rating=rating)

    def _rating(self, body: GiveFeedback) -> float | None:
        if body.rating is None:
            return None
        rating = _RATINGS[body.rating] if isinstance(body.rating, str) else float(body.rating)
        if not math.isfinite(rating) or abs(rating) > 1:
            raise ApiError(400, f"rating is {rating:g}: up, down, or a number from -1 to 1.", param="rating")
        return rating


class _OfEndpoint(LLMCloudHandler):
    def initialize(  # type: ignore[override]
        self, endpoints: EndpointRegistry, keeper: Keeper, state: ServerState, **shared: Any
    ) -> None:
        super().initialize(**shared)
        self.endpoints = endpoints
        self.keeper = keeper
        self.store = keeper.store
        self.state = state


class FeedbackHandler(_OfEndpoint):
    """What was said of the answers of an endpoint."""

    @operation("read", FeedbackRows, query=FeedbackQuery)
    async def get(self, name: str, query: FeedbackQuery) -> FeedbackRows:
        """What was said of the answers of an endpoint, the newest first."""
        rows = await asyncio.to_thread(self.store.list, name, query.limit)
        return FeedbackRows(feedback=[_told(row) for row in rows])


class FeedbackDatasetHandler(_OfEndpoint):
    """The data set that feedback makes."""

    @operation("read", "application/x-ndjson")
    async def get(self, name: str) -> None:
        """Corrections and good answers, a row of JSON a line: {"messages"} or {"prompt", "completion"}."""
        await self.keeper.written()
        self.set_header("Content-Type", "application/x-ndjson")
        rows = await asyncio.to_thread(lambda: list(self.store.training_rows(name)))
        for row in rows:
            self.write(json.dumps(row) + "\n")
        self.finish(set_content_type="application/x-ndjson")


class DriftHandler(_OfEndpoint):
    """Whether an endpoint is used in another way than before."""

    @operation("read", Drift, query=DriftQuery)
    async def get(self, name: str, query: DriftQuery) -> Drift:
        """Compare the newest requests to an endpoint with those before: their lengths, first tokens and ratings."""
        self.endpoints.get(name)
        rows = await asyncio.to_thread(self.state.answered, name, query.recent * (1 + _EARLIER))
        ratings = await asyncio.to_thread(self.store.ratings, name)
        told = [{**row, "rating": ratings.get(row["request_id"])} for row in rows]
        recent, earlier = told[: query.recent], told[query.recent :]
        found = [
            drift_of(column, _values(earlier, column), _values(recent, column)) for column in (*_COMPARED, "rating")
        ]
        return Drift(
            drift=[
                DriftRow(
                    name=one.name, num_earlier=one.num_earlier, num_recent=one.num_recent,
                    mean_earlier=one.mean_earlier, mean_recent=one.mean_recent, psi=one.psi,
                    verdict=one.verdict,  # type: ignore[arg-type]
                )
                for one in found
            ]
        )  # fmt: skip


def _values(rows: list[dict[str, Any]], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row[column] is not None]


def _told(row: Feedback) -> FeedbackRow:
    return FeedbackRow(
        request_id=row.request_id, actor=row.actor, t=row.t, rating=row.rating, correction=row.correction,
        comment=row.comment, metadata=msgspec.json.decode(row.metadata, type=dict[str, str]),
    )  # fmt: skip
