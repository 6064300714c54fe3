"""What `/metrics` tells of runs, read from their records."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jupyter_llmcloud.server.api import runs
from jupyter_llmcloud.server.api.runs import latest
from jupyter_llmcloud.server.recorded.run_metrics import RunCollector
from jupyter_llmcloud.storage.journal import read_last
from jupyter_llmcloud.storage.runs import RunRecord, RunStore


def told(collector: RunCollector) -> dict[tuple[str, ...], float]:
    """Each value by its metric and labels."""
    return {
        (family.name, *sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def test_runs_are_counted_by_state_and_alerts_of_those_that_go_on(tmp_path: Path) -> None:
    store, collector = RunStore(tmp_path), RunCollector()
    going = RunRecord("a-1", "a", "running", 1.0, alerts={"loss-spike": 2, "straggler": 1})
    ended = RunRecord("b-1", "b", "failed", 1.0, 2.0, alerts={"loss-spike": 9})
    for record in (going, ended):
        store.folder(record.run_id).create(record, "")
    collector.add(self := object(), store)
    assert told(collector) == {
        ("llmcloud_runs", "running"): 1,
        ("llmcloud_runs", "failed"): 1,
        ("llmcloud_run_alerts", "a-1", "loss-spike"): 2,
        ("llmcloud_run_alerts", "a-1", "straggler"): 1,
    }
    going.state = "finished"
    store.folder("a-1").write(going)
    assert told(collector) == {("llmcloud_runs", "finished"): 1, ("llmcloud_runs", "failed"): 1}
    collector.discard(self)
    assert told(collector) == {}


def test_a_root_without_runs_and_a_folder_without_a_record_are_no_error(tmp_path: Path) -> None:
    collector = RunCollector()
    collector.add(collector, RunStore(tmp_path))
    assert told(collector) == {}
    (tmp_path / "runs/half").mkdir(parents=True)
    assert told(collector) == {}


def test_what_is_no_run_is_not_counted_and_a_folder_that_cannot_be_read_hides_no_other_metric(tmp_path: Path) -> None:
    store, collector = RunStore(tmp_path), RunCollector()
    store.folder("a-1").create(RunRecord("a-1", "a", "finished", 1.0, 2.0), "")
    shutil.copytree(store.path / "a-1", store.path / "a-1 (copy)")  # as a file manager does
    collector.add(collector, store)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/runs").write_text("no folder")
    collector.add(self := object(), RunStore(tmp_path / "other"))
    assert told(collector) == {("llmcloud_runs", "finished"): 1}
    collector.discard(self)


def test_lists_of_runs_read_a_journal_again_only_when_it_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page with a hundred runs read six megabytes of journals each second or two."""
    record, read = RunRecord("a-1", "a", "running", 1.0), []
    folder = RunStore(tmp_path).folder("a-1")
    folder.create(record, "")
    assert latest(folder, record)["metrics"] == {}
    folder.metrics(0).parent.mkdir(exist_ok=True)
    folder.metrics(0).write_text('{"seq": 1, "values": {"loss": 2.0}, "progress": [1, 4]}\n')
    monkeypatch.setattr(runs, "read_last", lambda *asked: read.append(asked) or read_last(*asked))
    for _ in range(3):
        told = latest(folder, record)
        assert (told["metrics"], told["progress"]) == ({"loss": 2.0}, [1, 4])
        told["metrics"]["loss"] = 9.0  # whoever is told may do with it as they like
    assert len(read) == 1
    with folder.metrics(0).open("a") as journal:
        journal.write('{"seq": 2, "values": {"loss": 1.0}}\n')
    assert (latest(folder, record)["metrics"], len(read)) == ({"loss": 1.0}, 2)
