"""Ids of responses, which tell the replica that keeps what was said: a request that goes on from one is sent there."""

from __future__ import annotations

import re
import uuid

from jupyter_llmcloud.core.serving.openai_errors import ApiError

REPLICA_HEADER = "X-LLMC-Replica"  # tells a replica how it is called
_REPLICA = re.compile(r"[\w.-]{1,64}", re.ASCII)
_ID = re.compile(rf"resp_({_REPLICA.pattern})_[0-9a-f]{{32}}", re.ASCII)


def new_response_id(replica: str = "") -> str:
    """`resp_REPLICA_UNIQUE`, or `resp_UNIQUE` of a replica that was not told its id."""
    unique = uuid.uuid4().hex
    return f"resp_{replica}_{unique}" if _REPLICA.fullmatch(replica) else f"resp_{unique}"


def unknown_response(response_id: str) -> ApiError:
    """What is told of a response that is not kept."""
    message = (
        f"response {response_id[:128]!r} is not known here, or it is gone: a response is kept for an hour at most, in"
        " the memory of the replica that gave it, for the key that asked."
    )
    return ApiError(404, message, param="response_id", code="response_not_found")


def replica_of(response_id: str) -> str:
    """The id of the replica that gave a response; "" when the id does not tell."""
    found = _ID.fullmatch(response_id)
    return found[1] if found else ""
