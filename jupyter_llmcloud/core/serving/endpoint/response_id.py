"""Ids of responses, which tell the replica that keeps what was said: a request that goes on from one is sent there."""

from __future__ import annotations

import re
import uuid

REPLICA_HEADER = "X-LLMC-Replica"  # tells a replica how it is called
_REPLICA = re.compile(r"[\w.-]{1,64}", re.ASCII)
_ID = re.compile(rf"resp_({_REPLICA.pattern})_[0-9a-f]{{32}}", re.ASCII)


def new_response_id(replica: str = "") -> str:
    """`resp_REPLICA_UNIQUE`, or `resp_UNIQUE` of a replica that was not told its id."""
    unique = uuid.uuid4().hex
    return f"resp_{replica}_{unique}" if _REPLICA.fullmatch(replica) else f"resp_{unique}"


def replica_of(response_id: str) -> str:
    """The id of the replica that gave a response; "" when the id does not tell."""
    found = _ID.fullmatch(response_id)
    return found[1] if found else ""
