"""The answer to POST /v1/responses: one object, or events that are numbered."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from jupyter_llmcloud.inference.openai.chat.answer_parser import AnswerParser, CallDelta
from jupyter_llmcloud.inference.openai.chat.message_reader import MessageReader, ToldDelta
from jupyter_llmcloud.inference.openai.detokenize import TextPiece
from jupyter_llmcloud.inference.openai.responses import DONE, Envelope, TokenUsage, chat_logprobs, encode
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from jupyter_llmcloud.protocol.openai.responses import ResponseRequest


class ResponseAnswer:
    """One response: its items open and close as the model writes reasoning, text and calls.

    Args:
        on_complete: called with the id, the output and the whole response, as JSON, once the answer is complete.
    """

    def __init__(
        self, vocabulary: Vocabulary, envelope: Envelope, request: ResponseRequest, parser: AnswerParser,
        on_complete: Callable[[str, list[dict[str, Any]], bytes], None], *, logprobs: bool,
    ) -> None:  # fmt: skip
        self.envelope = envelope
        self._vocabulary = vocabulary
        self._request = request
        self._reader = MessageReader(parser)
        self._on_complete = on_complete
        self._wants_logprobs = logprobs
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None
        self._number = 0
        self._finish_reason: str | None = None

    def opening(self, usage: TokenUsage) -> bytes:
        """It is there, and goes on."""
        response = self._response("in_progress", None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, index: int, piece: TextPiece, usage: TokenUsage) -> bytes:
        """The events of a piece."""
        entries = chat_logprobs(self._vocabulary, piece.logprobs) if self._wants_logprobs else []
        events = self._told(self._reader.read(piece, entries))
        usage.num_reasoning = self._reader.num_reasoning
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            if not self._output and self._item is None:  # an answer without any text is still a message
                events += self._open(self._new_message())
            events += self._close()
        return events

    def _told(self, deltas: Sequence[ToldDelta]) -> bytes:
        events = b""
        for delta, logprobs in deltas:
            if delta.reasoning:
                events += self._say("reasoning", delta.reasoning, logprobs)
            elif delta.call is not None:
                events += self._call(delta.call)
            elif delta.content:
                events += self._say("message", delta.content, logprobs)
        return events

    def closing(self, usage: TokenUsage) -> bytes:
        """The whole response, and the end."""
        body = self.whole(usage)
        return self._event(f"response.{body['status']}", response=body) + DONE

    def whole(self, usage: TokenUsage) -> dict[str, Any]:
        """The response."""
        status = "incomplete" if self._finish_reason == "length" else "completed"
        response = self._response(status, usage)
        self._on_complete(self.envelope.id, self._output, encode(response))
        return response

    # --- items ---

    def _say(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        events = b""
        if self._item is None or self._item["type"] != kind:
            events = self._close() + self._open(self._new_message() if kind == "message" else self._new_reasoning())
        assert self._item is not None
        self._item["content"][0]["text"] += text
        if kind == "reasoning":
            return events + self._event("response.reasoning_text.delta", **self._place(), content_index=0, delta=text)
        self._item["content"][0]["logprobs"] += logprobs
        return events + self._event(
            "response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=logprobs
        )

    def _call(self, call: CallDelta) -> bytes:
        events = b""
        if call.name is not None:
            item = {"type": "function_call", "id": _new_id("fc"), "call_id": call.id, "name": call.name,
                    "arguments": "", "status": "in_progress"}  # fmt: skip
            events = self._close() + self._open(item)
        assert self._item is not None
        self._item["arguments"] += call.arguments
        if call.arguments:
            delta = call.arguments
            events += self._event("response.function_call_arguments.delta", **self._place(), delta=delta)
        return events

    def _open(self, item: dict[str, Any]) -> bytes:
        self._item = item
        self._output.append(item)
        content = item.pop("content", None)
        shown = {**item, "content": []} if content is not None else dict(item)
        events = self._event("response.output_item.added", output_index=len(self._output) - 1, item=shown)
        if content is not None:
            item["content"] = content
            events += self._event(
                "response.content_part.added", **self._place(), content_index=0, part=dict(content[0])
            )
        return events

    def _close(self) -> bytes:
        if self._item is None:
            return b""
        item, place = self._item, self._place()
        cut = self._finish_reason == "length"
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "function_call":
            events = self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            )
        else:
            part = item["content"][0]
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            more = {"logprobs": self._last_logprobs(part)} if name == "output_text" else {}
            events = self._event(f"response.{name}.done", **place, content_index=0, text=part["text"], **more)
            events += self._event("response.content_part.done", **place, content_index=0, part=part)
        events += self._event("response.output_item.done", output_index=place["output_index"], item=item)
        self._item = None
        return events

    def _last_logprobs(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        """Of tokens without a text, which no event has told."""
        fresh = self._reader.rest()
        part["logprobs"] += fresh
        return fresh

    def _new_message(self) -> dict[str, Any]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return {"type": "message", "id": _new_id("msg"), "status": "in_progress", "role": "assistant",
                "content": [part]}  # fmt: skip

    def _new_reasoning(self) -> dict[str, Any]:
        part = {"type": "reasoning_text", "text": ""}
        return {"type": "reasoning", "id": _new_id("rs"), "status": "in_progress", "summary": [], "content": [part]}

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self._output) - 1}

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode(body) + b"\n\n"

    def _response(self, status: str, usage: TokenUsage | None) -> dict[str, Any]:
        request = self._request
        ended = status in ("completed", "incomplete")
        return {
            "id": self.envelope.id,
            "object": "response",
            "created_at": self.envelope.created,
            "completed_at": int(time.time()) if ended else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "error": None,
            "model": self.envelope.model,
            "output": self._output if ended else [],
            "usage": usage.input_output() if usage is not None else None,
            **_echoed(request),
        }


def _echoed(request: ResponseRequest) -> dict[str, Any]:
    """What was asked, with what counts where it was not said."""
    text, reasoning = request.text, request.reasoning
    form = text.format if text is not None else None
    return {
        "previous_response_id": request.previous_response_id,
        "instructions": request.instructions,
        "tools": [
            {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters,
             "strict": tool.strict}
            for tool in request.tools or ()
        ],
        "tool_choice": _echoed_choice(request),
        "truncation": request.truncation or "disabled",
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "text": {
            "format": {"type": "text"} if form is None else _without_nulls(msgspec.to_builtins(form)),
            "verbosity": text.verbosity or "medium" if text is not None else "medium",
        },
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "top_logprobs": request.top_logprobs or 0,
        "reasoning": {"effort": reasoning.effort if reasoning is not None else None, "summary": None},
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "store": request.store is not False,
        "background": False,
        "service_tier": "default",
        "metadata": request.metadata or {},
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }  # fmt: skip


def _echoed_choice(request: ResponseRequest) -> Any:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return _without_nulls(msgspec.to_builtins(choice))


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if entry is not None}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
