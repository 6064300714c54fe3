"""A replica that serves by the Open Inference Protocol, in the loop of a test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from jupyter_llmcloud.core.serving.models.cell_source import CellSource
from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.kind import kind_of
from jupyter_llmcloud.inference.open_inference.opening import PredictorSpec, open_predictor
from jupyter_llmcloud.inference.open_inference.routes import ServedPredictor
from jupyter_llmcloud.storage.model_folder import check_folder
from jupyter_llmcloud.storage.models import served_code

TOKEN = "the-bearer"
DEADLINE_S = 60.0


class Replica:
    """What the test asks."""

    def __init__(self, client: TestClient[Any, Any], served: ServedPredictor, status: ReplicaStatus) -> None:
        self.client = client
        self.served = served
        self.status = status

    async def infer(self, body: Any, status: int = 200, path: str = "infer") -> Any:
        """The JSON of an answer, which has this status."""
        async with self.client.post(f"/v2/models/it/{path}", json=body) as response:
            told = await response.json(content_type=None)
            assert response.status == status, told
            return told

    async def outputs(self, *inputs: tuple[str, str, Any], **more: Any) -> dict[str, Any]:
        """The outputs for tensors (name, datatype, nested list), by name, as (shape, data)."""
        told = await self.infer({"inputs": [tensor(*item) for item in inputs], **more})
        return {row["name"]: (row["shape"], row["data"]) for row in told["outputs"]}

    async def events(self, body: Any) -> list[Any]:
        """The events of a stream."""
        async with self.client.post("/v2/models/it/infer_stream", json=body) as response:
            assert response.status == 200, await response.text()
            lines = (await response.text()).split("\n\n")
        found = [line.removeprefix("data: ") for line in lines if line]
        return [line if line == "[DONE]" else json.loads(line) for line in found]


def tensor(name: str, datatype: str, data: Any) -> dict[str, Any]:
    """A tensor of a nested list."""
    shape, level = [], data
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def folder_spec(folder: Path, *, is_own: bool = False, **options: Any) -> PredictorSpec:
    """How the model in a folder is served."""
    layout = check_folder(folder, is_own=is_own)
    return PredictorSpec("it", kind_of(layout), layout, "own" if is_own else "", **options)


def cell_spec(text: str, root: Path, first_line: int = 2) -> PredictorSpec:
    """How a cell is served."""
    path = served_code.write_cell(CellSource(text, "Cell In[4]", first_line, str(root)), root)
    return PredictorSpec("it", "python", None, str(path))


def serve(spec: PredictorSpec, body: Callable[[Replica], Awaitable[None]]) -> None:
    """Serve it while `body` asks."""

    async def run() -> None:
        status = ReplicaStatus("it", "it", spec.max_rows)
        application = Application(status, TOKEN)
        application.kind = spec.kind
        served = application.predictions.served = await open_predictor(spec)
        status.state = "ready"
        server = TestServer(application.build(), handler_cancellation=True)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        try:
            async with TestClient(server, headers=headers) as client, asyncio.timeout(DEADLINE_S):
                await body(Replica(client, served, status))
        finally:
            await served.close()

    asyncio.run(run())
