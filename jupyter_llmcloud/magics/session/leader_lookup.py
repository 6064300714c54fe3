"""Who leads a run with restarts: the server knows, also when the agent that began it has gone."""

from __future__ import annotations

from collections.abc import Callable

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.storage.runs import RunStore

TIMEOUT_S = 2.0  # a Stop has the prompt back in 8 s in any case


class LeaderLookup:
    """Asked by a notebook whose connection to a run or a world has broken.

    Args:
        server: gives the server as it is now; it may have been started again meanwhile.
    """

    def __init__(self, server: Callable[[], ServerClient]) -> None:
        self._server = server

    def find(self, run_id: str) -> tuple[str, str]:
        """The state of a run and the socket here for the agent that leads it, or has. Raises LLMCloudError."""
        told = self._server().ask("GET", f"runs/{run_id}", timeout_s=TIMEOUT_S)
        return str(told["state"]), str(told["agent"])

    def stop(self, run_id: str) -> None:
        """Press Stop, whoever leads the run. Raises LLMCloudError."""
        self._server().ask("POST", f"runs/{run_id}/stop", {}, timeout_s=TIMEOUT_S)

    def of_world(self, world_id: str) -> str:
        """The socket here for the agent to which a run has taken its world along; "" when none has."""
        for record in RunStore().list():
            if record.world_id == world_id and record.host:
                try:
                    return self.find(record.run_id)[1]
                except LLMCloudError:
                    return ""
        return ""
