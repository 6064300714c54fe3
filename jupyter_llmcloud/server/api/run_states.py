"""Whether a run that its record calls active goes on: its leading agent knows, as long as there is one.

An agent that has ended cannot write so into the record. Whoever finds that out for certain does it in its place; of a
run with restarts not before another agent has had the time to lead it, and only by claiming to lead it (see
storage.leadership), so that none does from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, NotFound, WorldError
from jupyter_llmcloud.protocol.agent_messages import Describe, StopRun
from jupyter_llmcloud.storage.leadership import Claim, Leadership
from jupyter_llmcloud.storage.runs import RunRecord
from jupyter_llmcloud.system.processes import is_process

if TYPE_CHECKING:
    from jupyter_llmcloud.protocol.client import AgentConnection
    from jupyter_llmcloud.server.context import ServerContext

ASK_TIMEOUT_S = 5.0
SILENT_S = 60.0  # an agent of another host that nobody reaches for so long counts as gone, until it is heard again
TAKEOVER_S = 90.0  # for another agent to lead a run whose leader has gone: see core.link.TAKES_OVER
STOP_ATTEMPTS = 3
SERVER = "server:"  # what the owner of a run begins with that no kernel started
_GONE = "its node agent has gone."


async def true_state(record: RunRecord, context: ServerContext) -> str:
    """The state of a run; an active one whose agent has gone, or does not know it any more, is lost."""
    if not record.is_active:
        return record.state
    if not record.agent and record.owner.startswith(SERVER):
        if _is_starting(record, context):
            return record.state
        return await asyncio.to_thread(_end, record, context, "lost", "the server that was to start it has gone.")
    try:
        async with await _leader(record, context) as connection, asyncio.timeout(ASK_TIMEOUT_S):
            worlds = (await connection.request(Describe())).worlds
    except (ConnectionLost, TimeoutError) as error:
        if isinstance(error, ConnectionLost) and not connected(error):
            return await _leaderless(record, context, _GONE)
        since = context.silent_since.setdefault(record.agent, time.monotonic())
        return "lost" if time.monotonic() - since > SILENT_S else record.state
    except NotFound:
        return await _leaderless(record, context, _GONE)
    except LLMCloudError:
        return record.state
    context.silent_since.pop(record.agent, None)
    if record.world_id and record.world_id not in (world["world_id"] for world in worlds):
        return await _leaderless(record, context, "its node agent was replaced; its ranks are gone.")
    context.leaderless_since.pop(record.run_id, None)
    return record.state


def _is_starting(record: RunRecord, context: ServerContext) -> bool:
    """Whether a server that lives is about to start it."""
    if record.run_id in context.starts:
        return True
    server_id = record.owner.removeprefix(SERVER)
    return server_id != context.server_id and any(
        server["id"] == server_id and is_process(server["pid"], server["started"]) for server in context.state.servers()
    )


async def stop(record: RunRecord, context: ServerContext) -> str:
    """Press Stop for an active run, also when no agent leads it now; returns its state. Raises LLMCloudError."""
    if record.run_id in context.starts and await context.starts.stop(record.run_id):
        return context.runs.folder(record.run_id).read().state
    record = context.runs.folder(record.run_id).read()
    for _ in range(STOP_ATTEMPTS):
        try:
            async with await _leader(record, context) as connection:
                await connection.request(StopRun(run_id=record.run_id))
            return "stopping"
        except (ConnectionLost, NotFound) as error:
            gone = isinstance(error, NotFound) or not connected(error)
            if not gone or not Leadership(context.runs.folder(record.run_id).path).can_be_taken:
                raise
        state = await asyncio.to_thread(_end, record, context, "stopped", "stopped while no agent led it.")
        if state == "stopped":
            return state
        record = context.runs.folder(record.run_id).read()  # another agent leads it by now
    raise WorldError(f"run {record.run_id!r} changes its leading agent now. Press Stop again.")


async def leader_address(record: RunRecord, context: ServerContext) -> str:
    """A socket on this host for the agent that leads a run. Raises NotFound when the cluster does not know it."""
    if not record.host or (record.host == socket.gethostname() and os.path.exists(record.agent)):
        return record.agent
    key = (record.host, record.agent)
    if key not in context.leaders:
        pool = await context.pool()
        agents = await pool.agents(record.cluster or None)
        found = [agent.address for agent in agents if (agent.host, agent.home) == key]
        if not found:
            raise NotFound(f"the agent at {record.agent} on {record.host} is not in cluster {record.cluster!r}.")
        context.leaders[key] = found[0]
    return context.leaders[key]


async def _leader(record: RunRecord, context: ServerContext) -> AgentConnection:
    return await context.open_agent(await leader_address(record, context))


def connected(error: ConnectionLost) -> bool:
    """Whether somebody listened at all: nobody does at the socket of an agent that has ended."""
    return not isinstance(error.__context__, FileNotFoundError | ConnectionRefusedError)


async def _leaderless(record: RunRecord, context: ServerContext, why: str) -> str:
    """No agent leads the run now: another one may still come to lead it, or it is lost."""
    if Leadership(context.runs.folder(record.run_id).path).can_be_taken:
        now = time.monotonic()
        if now - context.leaderless_since.setdefault(record.run_id, now) < TAKEOVER_S:
            return record.state
    return await asyncio.to_thread(_end, record, context, "lost", why)


def _end(record: RunRecord, context: ServerContext, state: str, why: str) -> str:
    """Write the end down, unless the run has ended or got another leader in the meantime; returns its state."""
    folder = context.runs.folder(record.run_id)
    now = folder.read()
    if not now.is_active:
        return now.state
    leadership = Leadership(folder.path)
    with contextlib.suppress(OSError):
        if (newest := leadership.newest()) is not None and not leadership.claim(Claim(newest.term + 1)):
            return now.state
        now.state, now.ended = state, time.time()
        now.history.append({"t": round(now.ended, 3), "state": state, "why": why})
        folder.write(now)
        leadership.forget()
    return state
