"""What becomes of the answer to one request beside its being passed on: kept for feedback, or given again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jupyter_llmcloud.core.serving.cached_answers import cache_key
from jupyter_llmcloud.server.answers.capturing_sink import CapturingSink
from jupyter_llmcloud.server.answers.response_cache import CachedAnswer

if TYPE_CHECKING:
    from jupyter_llmcloud.server.answers.keeper import Keeper
    from jupyter_llmcloud.server.answers.response_cache import ResponseCache
    from jupyter_llmcloud.server.endpoints.controller import EndpointController
    from jupyter_llmcloud.server.gateway.proxy import GatewayRequest, ResponseSink

CACHE = "jupyter_llmcloud_response_cache"  # in the settings of the server, where there is one


class CopiedAnswers:
    """Of one request.

    Args:
        cache: where the server has one.
        keeper: for an endpoint that keeps its requests.
    """

    def __init__(self, cache: ResponseCache | None, keeper: Keeper, endpoint: EndpointController) -> None:
        self._cache = cache if cache is not None and cache.is_on and _has_one_model(endpoint) else None
        self._keeper = keeper if endpoint.stored.current.keep_requests else None
        self._endpoint = endpoint
        self._place: str | None = None
        self._copy: CapturingSink | None = None

    @property
    def may_be_known(self) -> bool:
        """Whether it is worth asking for the answer that the same request got before."""
        return self._cache is not None

    async def find(self, request: GatewayRequest) -> CachedAnswer | None:
        """The answer that the same request got before."""
        if self._cache is None:
            return None
        self._place = _place(request, self._endpoint)
        return None if self._place is None else await self._cache.get(self._place)

    def sink(self, request: GatewayRequest, sink: ResponseSink) -> ResponseSink:
        """Where the answer goes: by way of a copy, when one is wanted."""
        if self._keeper is None and self._place is None:
            return sink
        self._copy = CapturingSink(sink)
        return self._copy

    def keep_again(self, request: GatewayRequest, found: CachedAnswer) -> None:
        """What is given again is an answer to this request, too."""
        if self._keeper is not None:
            self._keeper.keep(request, self._endpoint, found.body)

    def keep(self, request: GatewayRequest) -> None:
        """The answer is over."""
        answer = self._copy.answer() if self._copy is not None else None
        if self._copy is None or answer is None:
            return
        if self._keeper is not None:
            self._keeper.keep(request, self._endpoint, answer)
        # Asked again: another revision may have come while the answer was made.
        if self._cache is None or self._place is None or not _has_one_model(self._endpoint):
            return
        if self._place == _place(request, self._endpoint):
            self._cache.put(self._place, CachedAnswer(self._copy.content_type, answer))


def _has_one_model(endpoint: EndpointController) -> bool:
    """Whether all requests are answered by the same weights: neither a canary's nor an adapter's."""
    answering = [revision for revision in endpoint.stored.revisions if revision.num_replicas and revision.weight]
    return len(answering) == 1 and not endpoint.stored.adapters


def _place(request: GatewayRequest, endpoint: EndpointController) -> str | None:
    revision = endpoint.stored.current
    return cache_key(request.actor, endpoint.name, revision.answers_by, request.route, request.body)
