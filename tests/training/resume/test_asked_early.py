"""A checkpoint that the agent asks for before a rank's main thread has come to the cell is saved all the same."""

from __future__ import annotations

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.group.stop_barrier import Steps
from jupyter_llmcloud.training.resume.checkpointer import Checkpointer


class Sender:
    muted = False

    def warning(self, stream: str, text: str) -> None:
        raise AssertionError(text)


def test_what_was_asked_for_before_the_cell_began_is_due_in_it_and_not_in_the_next_one() -> None:
    checkpointer = Checkpointer(Sender(), Steps(), lambda: None, 0)  # type: ignore[arg-type]
    cell = Execute(
        world_id="w", run_id="r", name="r", folder="/nowhere", code="pass", filename="<cell>", max_restarts=1
    )
    checkpointer.save_at(174)
    checkpointer.begin(cell, {}, set())
    assert checkpointer._schedule.asked_at == 174
    checkpointer.close()
    checkpointer.begin(cell, {}, set())
    assert checkpointer._schedule.asked_at == -1
    checkpointer.close()
