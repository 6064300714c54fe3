"""`%serve RUN --follow`: the newest checkpoint of a run that trains is served, and its final model in the end."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.server.endpoints import follow
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


async def test_a_checkpoint_that_cannot_be_loaded_is_tried_once(
    server: Server, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, look = [], follow.newest_model

    def newest_model(*arguments: Any) -> Any:
        looked.append(arguments)
        return look(*arguments)

    monkeypatch.setattr(follow, "newest_model", newest_model)
    monkeypatch.setattr(follow, "EVERY_S", 0.05)
    run, _ = begin_run(checkpoint_every=2)
    add_checkpoint(run, 2)
    await server.ask("POST", "llmcloud/api/endpoints", {"target": "train", "follow": True})
    await server.ask("GET", "llmcloud/api/endpoints/train?wait_s=20")
    (run.path / SERVING / "broken").touch()
    (run.path / SERVING / "config.json").write_text('{"model_type": "llama", "other": 1}')  # not in place
    add_checkpoint(run, 4)

    async def is_withdrawn() -> bool:
        return any(row["note"] for row in (await told(server))["revisions"])

    await until(is_withdrawn, "the model that cannot be loaded is withdrawn")
    seen = len(looked)
    await until(lambda: len(looked) > seen + 3, "it was looked for newer ones")
    now = await told(server)
    assert [row["number"] for row in now["revisions"]] == [1, 2] and now["step"] == 2
    (run.path / SERVING / "broken").unlink()
    add_checkpoint(run, 6)

    async def serves_the_next() -> bool:
        now = await told(server)
        return now["step"] == 6 and [row["revision"] for row in now["replicas"]] == [3]

    await until(serves_the_next, "the next checkpoint is served")


async def test_a_run_without_checkpoints_cannot_be_followed_and_says_how_it_could(
    server: Server, own_root: Path
) -> None:
    begin_run()
    refused = await server.ask("POST", "llmcloud/api/endpoints", {"target": "train", "follow": True})
    assert refused.status_code == 422 and "--checkpoint-every" in refused.json()["message"]
    missing = await server.ask("POST", "llmcloud/api/endpoints", {"target": "nothing", "follow": True})
    assert missing.status_code == 404


# --- without a server ---


async def followed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], str]:
    """What an endpoint that serves step 2 is given of a run until that has ended, and what became of it."""
    monkeypatch.setattr(follow, "EVERY_S", 0.01)
    served = [run.path / "served" / "step-2"]

    async def serve(model: follow.RunModel) -> None:
        served.append(model.folder)

    following = follow.FollowedRun(run, serve, lambda: (2, served[-1]), logging.getLogger("test"))
    return served, await asyncio.wait_for(following.follow(), 20)


async def test_the_model_of_a_run_that_ends_in_the_moment_in_which_it_is_looked_at_is_served(
    own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had left one after the look and before the question whether it goes on: nothing was served any more."""
    run, record = begin_run(checkpoint_every=2)
    look, looks = follow.newest_model, list[int]()

    def ends_after_the_first(folder: RunFolder, than: int | None = None) -> follow.RunModel | None:
        found = look(folder, than)
        if not looks:
            record.state, record.artifacts = "finished", {"model": "model"}
            run.write(record)
        looks.append(1)
        return found

    monkeypatch.setattr(follow, "newest_model", ends_after_the_first)
    served, outcome = await followed(run, monkeypatch)
    assert (served[-1], outcome) == (run.path / "model", "the run has ended")


@pytest.mark.parametrize(("num_refused", "is_served"), [(3, True), (100, False)], ids=["for-a-moment", "for-good"])
async def test_the_last_model_of_a_run_is_served_after_a_disk_has_refused_it_for_a_moment(
    own_root: Path, monkeypatch: pytest.MonkeyPatch, num_refused: int, is_served: bool
) -> None:
    run, record = begin_run(checkpoint_every=2)
    record.state, record.artifacts = "finished", {"model": "model"}
    run.write(record)
    look, looks = follow.newest_model, list[int]()

    def refuses(folder: RunFolder, than: int | None = None) -> follow.RunModel | None:
        looks.append(1)
        if len(looks) <= num_refused:
            raise OSError(errno.EIO, "Input/output error")
        return look(folder, than)

    monkeypatch.setattr(follow, "newest_model", refuses)
    served, outcome = await followed(run, monkeypatch)
    assert (served[-1] == run.path / "model") is is_served
    assert outcome == "the run has ended" if is_served else "Input/output error" in outcome
