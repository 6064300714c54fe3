"""Whether a run that its record calls active goes on: its leading agent knows, as long as there is one.

An agent that has ended cannot write so into the record. Whoever finds that out for certain does it in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from jupyter_llmcloud.core.messages import Describe
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, NotFound
from jupyter_llmcloud.storage.runs import RunRecord

if TYPE_CHECKING:
    from jupyter_llmcloud.server.context import ServerContext

ASK_TIMEOUT_S = 5.0
SILENT_S = 60.0  # an agent of another host that nobody reaches for so long counts as gone, until it is heard again


async def true_state(record: RunRecord, context: ServerContext) -> str:
    """The state of a run; an active one whose agent has gone, or does not know it any more, is lost."""
    if not record.is_active:
        return record.state
    try:
        async with await context.open_agent(record.agent) as connection, asyncio.timeout(ASK_TIMEOUT_S):
            worlds = (await connection.request(Describe())).values.get("worlds", [])
    except (ConnectionLost, TimeoutError) as error:
        if isinstance(error, ConnectionLost) and not connected(error):
            return await asyncio.to_thread(_lost, record, context, "its node agent has gone.")
        since = context.silent_since.setdefault(record.agent, time.monotonic())
        return "lost" if time.monotonic() - since > SILENT_S else record.state
    except NotFound:
        return await asyncio.to_thread(_lost, record, context, "its node agent has gone.")
    except LLMCloudError:
        return record.state
    context.silent_since.pop(record.agent, None)
    if record.world_id and record.world_id not in (world["world_id"] for world in worlds):
        return await asyncio.to_thread(_lost, record, context, "its node agent was replaced; its ranks are gone.")
    return record.state


def connected(error: ConnectionLost) -> bool:
    """Whether somebody listened at all: nobody does at the socket of an agent that has ended."""
    return not isinstance(error.__context__, FileNotFoundError | ConnectionRefusedError)


def _lost(record: RunRecord, context: ServerContext, why: str) -> str:
    """Write it down, unless the run has ended in the meantime."""
    folder = context.runs.folder(record.run_id)
    now = folder.read()
    if not now.is_active:
        return now.state
    now.state, now.ended = "lost", time.time()
    now.history.append({"t": round(now.ended, 3), "state": "lost", "why": why})
    with contextlib.suppress(OSError):
        folder.write(now)
    return "lost"
