"""The topic of runs, whatever else lies beside their folders."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from jupyter_llmcloud.server.events.hub import EventHub
from jupyter_llmcloud.server.events.run_source import RunSource
from jupyter_llmcloud.storage.runs import RunRecord, RunStore


class States:
    """Every run is as its record says."""

    async def true_state(self, record: RunRecord) -> str:
        return record.state


def made(store: RunStore, run_id: str) -> Path:
    store.folder(run_id).create(RunRecord(run_id, "gpt", state="finished", created=1.0), "print(1)\n")
    return store.folder(run_id).path


def told(store: RunStore) -> list[str]:
    """The runs that a client is told of after one look."""
    hub = EventHub("e1")
    source = RunSource(hub, store, States(), lambda: None)  # type: ignore[arg-type]

    async def look() -> None:
        await source.look()

    asyncio.run(look())
    return sorted(hub.topic("runs").items)


def test_a_folder_that_a_file_manager_has_copied_hides_no_run(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    shutil.copytree(made(store, "gpt-1"), store.path / "gpt-1 (copy)")
    assert told(store) == ["gpt-1"]


def test_a_copy_with_a_name_of_a_run_is_told_under_that(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    shutil.copytree(made(store, "gpt-1"), store.path / "gpt-1-copy")
    assert told(store) == ["gpt-1", "gpt-1-copy"]
    assert sorted(record.run_id for record in store.list()) == ["gpt-1", "gpt-1-copy"]


def test_a_record_that_cannot_be_read_hides_no_run(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    made(store, "gpt-1")
    texts: list[Any] = ["null", "[]", "{}", '{"name": "b"', '"x"']
    for number, text in enumerate(texts):
        (store.path / f"odd-{number}").mkdir()
        (store.path / f"odd-{number}" / "run.json").write_text(text)
    (store.path / "closed" / "run.json").mkdir(parents=True)  # it can be looked at, not read
    (store.path / "circle").mkdir()
    (store.path / "circle" / "run.json").symlink_to("run.json")  # nor looked at
    assert told(store) == ["gpt-1"]
    assert [record.run_id for record in store.list()] == ["gpt-1"]
