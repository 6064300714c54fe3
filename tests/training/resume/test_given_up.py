"""Ranks of which one has given up to save do not wait for each other."""

from __future__ import annotations

from torch.distributed import HashStore

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.group.stop_barrier import Steps
from jupyter_llmcloud.training.resume.checkpointer import Checkpointer
from jupyter_llmcloud.training.resume.schedule import SaveRequest


class Sender:
    muted = False

    def warning(self, stream: str, text: str) -> None:
        raise AssertionError(text)


def test_a_first_rank_that_has_given_up_tells_the_others_that_nothing_is_saved() -> None:
    store = HashStore()
    checkpointer = Checkpointer(Sender(), Steps(), lambda: store, 0)  # type: ignore[arg-type]
    cell = Execute(
        world_id="w",
        run_id="r",
        name="r",
        folder="/nowhere",
        code="pass",
        filename="<cell>",
        max_restarts=1,
        ranks=[0, 1],
    )
    checkpointer.begin(cell, {}, set())
    checkpointer._writer.has_given_up = True
    checkpointer._wanted = SaveRequest(False, None, "min")
    assert checkpointer.save({"kind": "step"})
    assert store.check(["checkpoint/r/0/0"]) and store.get("checkpoint/r/0/0") == b"False"
    checkpointer.close()
