"""GET /v1/responses/ID/input_items: what a response answers, in pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jupyter_llmcloud.protocol.openai.decoding import invalid
from jupyter_llmcloud.protocol.openai.responses import DEFAULT_LISTED, MAX_LISTED, InputItem, InputPart

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def page_of_items(items: Sequence[InputItem], response_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The items that a query asks for: `limit`, `order` and `after`; raises `ApiError` 400."""
    limit, order, after = query.get("limit", str(DEFAULT_LISTED)), query.get("order", "desc"), query.get("after", "")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= MAX_LISTED):
        raise invalid("limit", f"limit must be a number from 1 to {MAX_LISTED}, not {limit[:40]!r}.")
    if order not in ("asc", "desc"):
        raise invalid("order", f"order must be asc or desc, not {order[:40]!r}.")
    listed = [_listed(item, response_id, number) for number, item in enumerate(items)]
    if order == "desc":
        listed.reverse()
    if after:
        names = [item["id"] for item in listed]
        if after not in names:
            raise invalid("after", f"after names {after[:128]!r}, which is none of these items.")
        listed = listed[names.index(after) + 1 :]
    page = listed[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(listed) > len(page)}


def _listed(item: InputItem, response_id: str, number: int) -> dict[str, Any]:
    kind = item.type or "message"
    unique = response_id.rpartition("_")[2]
    told: dict[str, Any] = {"id": item.id or f"{_PREFIXES.get(kind, 'item')}_{unique}_{number}", "type": kind}
    told["status"] = item.status or "completed"
    if kind == "message":
        told |= {"role": item.role, "content": _parts(item)}
    elif kind == "function_call":
        told |= {"call_id": item.call_id or "", "name": item.name, "arguments": item.arguments or ""}
    elif kind == "function_call_output":
        output = (
            item.output if isinstance(item.output, str) else [_part(part, "input_text") for part in item.output or ()]
        )
        told |= {"call_id": item.call_id or "", "output": output}
    else:
        told["summary"] = [_part(part, "summary_text") for part in item.summary or ()]
    return told


def _parts(item: InputItem) -> list[dict[str, Any]]:
    kind = "output_text" if item.role == "assistant" else "input_text"
    if isinstance(item.content, str):
        return [_part(InputPart(type=kind, text=item.content), kind)]
    return [_part(part, kind) for part in item.content or ()]


def _part(part: InputPart, kind: str) -> dict[str, Any]:
    if part.refusal is not None and part.text is None:
        return {"type": "refusal", "refusal": part.refusal}
    more = {"annotations": part.annotations or [], "logprobs": part.logprobs or []} if kind == "output_text" else {}
    return {"type": kind, "text": part.text or "", **more}
