"""A cell whose connection to its run broke: the run goes on, so the cell finds it and shows what it has missed."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from jupyter_llmcloud.agent.client import AgentChannel
from jupyter_llmcloud.core.messages import DescribeWorld, RunEnded, Subscribe
from jupyter_llmcloud.errors import ConnectionLost, NotFound
from jupyter_llmcloud.magics.stop_signal import StopSignal
from jupyter_llmcloud.storage.journal import Cursor, read_from
from jupyter_llmcloud.storage.runs import RunRecord, RunStore

if TYPE_CHECKING:
    from jupyter_llmcloud.magics.run_view import RunView

PATIENCE_S = 30.0
REFUSED_S = 2.0  # nobody listens any more: a bridge may be opening again, a node agent is not
STOPPED_S = 6.0  # after a Stop the prompt is back in any case
POLL_S = 0.2


def regain(
    address: str, world_id: str, run_id: str, view: RunView, stop: StopSignal
) -> tuple[AgentChannel | None, RunEnded | None]:
    """A connection that follows the run again, or how the run has ended meanwhile; all of its output is in `view`.

    Raises ConnectionLost when neither can be had in time.
    """
    began = time.monotonic()
    said = False
    while True:
        refused = False
        try:
            channel = AgentChannel(address, 2.0)
        except ConnectionLost as error:
            lost, refused = error, True
        else:
            try:
                channel.request(DescribeWorld(world_id=world_id), 5.0)  # this notebook's, as before
                channel.request(Subscribe(run_id=run_id), 5.0)
                show_missed(run_id, view)
                if (record := _record(run_id)) is not None and record.state == "running":
                    stop.passed_on = 0  # a Stop went down with the connection
                return channel, None
            except NotFound as error:
                channel.close()
                if (ended := _ended(run_id, view)) is not None:
                    return None, ended
                lost = ConnectionLost(str(error))
            except ConnectionLost as error:
                channel.close()
                lost = error
        waited = time.monotonic() - began
        limit = REFUSED_S if refused else STOPPED_S if stop.presses else PATIENCE_S
        if waited > limit:
            if (ended := _ended(run_id, view)) is not None:
                return None, ended
            raise ConnectionLost(f"{lost} If run {run_id} goes on, %runs attach {run_id} shows it.") from None
        if not said and waited > 1.0:
            said = True
            print("The connection to the ranks is broken; looking for the run.", flush=True)
        select.select([] if stop.presses else [stop.fd], [], [], POLL_S)


def _record(run_id: str) -> RunRecord | None:
    try:
        return RunStore().folder(run_id).read()
    except NotFound:
        return None


def _ended(run_id: str, view: RunView) -> RunEnded | None:
    """How the run ended, from its folder; None when it has not, or is not there."""
    record = _record(run_id)
    if record is None or record.is_active:
        return None
    show_missed(run_id, view)
    return RunEnded(run_id=run_id, state=record.state, errors=record.errors, artifacts=record.artifacts)


def show_missed(run_id: str, view: RunView) -> None:
    """Everything on disk, which the view shows once."""
    folder = RunStore().folder(run_id)
    for kind in ("metrics", "logs"):
        for path in sorted((folder.path / kind).glob("rank-*.jsonl")):
            rank, cursor = int(path.stem.removeprefix("rank-")), Cursor()
            while records := read_from(path, cursor):
                view.records(kind, rank, records)
