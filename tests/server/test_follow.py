"""`%serve RUN --follow`: the newest checkpoint of a run that trains is served, and its final model in the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder, seal
from jupyter_llmcloud.storage.models.followed_model import SERVING, WEIGHTS
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore
from tests.support.server_parts import Server, make_model, until

pytest_plugins = ["tests.support.server_fixtures"]

SHAPES = {"embed.weight": [2, 2]}


def begin_run(**spec: Any) -> tuple[RunFolder, RunRecord]:
    """A run that trains."""
    folder = RunStore().folder("run-1-train")
    record = RunRecord(run_id="run-1-train", name="train", state="running", spec=spec)
    folder.create(record, "pass")
    return folder, record


def add_checkpoint(run: RunFolder, step: int) -> None:
    """A checkpoint whose model is wrapped as DistributedDataParallel does."""
    if not (run.path / SERVING).exists():
        make_model(run.path / SERVING)
        (run.path / SERVING / "model.safetensors").unlink()
        (run.path / SERVING / WEIGHTS).write_text(json.dumps(SHAPES))
    checkpoints = CheckpointFolder(run.path / "checkpoints")
    staging = checkpoints.staging(step, 0)
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = json.dumps({"module.embed.weight": entry}).encode()
    file = staging / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    checkpoints.commit(staging, step, {file.name: seal(file)})
    checkpoints.retain(1)


async def told(server: Server) -> dict[str, Any]:
    return (await server.ask("GET", "llmcloud/api/endpoints/train")).json()


async def test_each_checkpoint_is_swapped_in_and_the_final_model_stays(server: Server, own_root: Path) -> None:
    run, record = begin_run(checkpoint_every=2)
    body = {"target": "train", "follow": True}
    waits = await server.ask("POST", "llmcloud/api/endpoints", body)
    assert waits.status_code == 409 and waits.json()["error"] == "Busy", waits.text
    add_checkpoint(run, 2)
    assert (await server.ask("POST", "llmcloud/api/endpoints", body)).status_code == 201
    first = (await server.ask("GET", "llmcloud/api/endpoints/train?wait_s=20")).json()
    assert (first["state"], first["step"], first["follows"]) == ("ready", 2, "run-1-train"), first
    add_checkpoint(run, 4)

    async def serves(step: int | None) -> bool:
        now = await told(server)
        revisions = [replica["revision"] for replica in now["replicas"]]
        return now["step"] == step and revisions == [now["revisions"][-1]["number"]]

    await until(lambda: serves(4), "the next checkpoint is served")
    assert [row["pid"] for row in (await told(server))["replicas"]] == [row["pid"] for row in first["replicas"]]
    header = (run.path / "served" / "step-4" / "model.safetensors").read_bytes()
    assert b'"embed.weight"' in header and b"module." not in header
    make_model(run.path / "model")
    record.state, record.artifacts = "finished", {"model": "model"}
    run.write(record)
    await until(lambda: serves(None), "the final model is served")

    async def is_over() -> bool:
        return (await told(server))["follows"] is None

    await until(is_over, "nothing is followed any more")
    now = await told(server)
    assert now["model"] == str(run.path / "model") and now["state"] == "ready"
    assert {row["target"] for row in now["revisions"]} == {"train"}
    assert (await server.complete("hello", model="train")).status_code == 200


async def test_a_revision_whose_checkpoint_is_gone_leaves_its_number_to_no_other(
    server: Server, own_root: Path
) -> None:
    run, _ = begin_run(checkpoint_every=2)
    add_checkpoint(run, 2)
    await server.ask("POST", "llmcloud/api/endpoints", {"target": "train", "follow": True})
    await server.ask("GET", "llmcloud/api/endpoints/train?wait_s=20")

    async def serves(number: int) -> bool:
        now = await told(server)
        return [replica["revision"] for replica in now["replicas"]] == [number]

    add_checkpoint(run, 4)
    await until(lambda: serves(2), "the next checkpoint is served")
    answer = await server.ask("POST", "llmcloud/api/endpoints/train/rollback", {})
    assert answer.status_code == 200, answer.text
    await until(lambda: serves(1), "the one before it is served again")
    shutil.rmtree(run.path / "served" / "step-4")
    add_checkpoint(run, 6)
    await until(lambda: serves(3), "the newest checkpoint is served, under a number of its own")


async def test_a_run_without_checkpoints_cannot_be_followed_and_says_how_it_could(
    server: Server, own_root: Path
) -> None:
    begin_run()
    refused = await server.ask("POST", "llmcloud/api/endpoints", {"target": "train", "follow": True})
    assert refused.status_code == 422 and "--checkpoint-every" in refused.json()["message"]
    missing = await server.ask("POST", "llmcloud/api/endpoints", {"target": "nothing", "follow": True})
    assert missing.status_code == 404
