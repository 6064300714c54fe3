"""Waiting until a new revision of an endpoint answers, or is known not to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.serving.endpoint.rollout import SHADOW
from jupyter_llmcloud.errors import ModelError

if TYPE_CHECKING:
    from jupyter_llmcloud.client.rest import ServerClient

LOOK_EVERY_S = 0.3


def wait_for_revision(
    client: ServerClient,
    record: dict[str, Any],
    progress: Callable[[str], None] | None = None,
    number: int | None = None,
) -> dict[str, Any]:
    """Wait until all replicas of a revision are ready; returns the endpoint's record then.

    Interrupted, the endpoint goes on by itself. Raises ModelError when the revision was withdrawn or all failed.

    Args:
        record: of the endpoint as it was changed.
        progress: told in a few words how far it is.
        number: of the revision; None: the newest in `record`.
    """
    name, number = record["name"], number or record["revisions"][-1]["number"]
    began = time.monotonic()
    while True:
        revision = next((row for row in record["revisions"] if row["number"] == number), None)
        if record["state"] == "failed" or revision is None or revision["role"] == "retired":
            why = (revision or {}).get("note") or record["reason"] or "another one took its place."
            raise ModelError(f"endpoint {name!r} does not serve revision {number}: {why}")
        ready = [row for row in record["replicas"] if row.get("revision") == number and row["state"] == "ready"]
        if (
            len(ready) >= max(1, revision["num_replicas"])
            or record["state"] == "stopped"
            or not revision["num_replicas"]
        ):
            return record
        if progress is not None:
            reason = f" ({record['reason']})" if record["reason"] else ""
            progress(f"revision {number} of {name} is starting: {time.monotonic() - began:.0f} s{reason}")
        time.sleep(LOOK_EVERY_S)
        record = client.endpoint(name)


def wait_for_shadow(
    client: ServerClient, record: dict[str, Any], progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """As `wait_for_revision`, for the one that requests are copied to, if there is one: until then none are."""
    number = next((row["number"] for row in record["revisions"] if row["role"] == SHADOW), None)
    return record if number is None else wait_for_revision(client, record, progress, number)
