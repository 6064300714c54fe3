"""The folders of runs: made, found by id and by name, deleted, and never mistaken for anything else."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore
from jupyter_llmcloud.storage.search.sweeps import SweepRecord, SweepStore, TrialRow


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def made(store: RunStore, run_id: str, name: str = "gpt", **more: object) -> RunFolder:
    folder = store.folder(run_id)
    folder.create(RunRecord(run_id, name, **{"state": "finished", **more}), "print(1)\n")  # type: ignore[arg-type]
    return folder


def test_a_run_is_read_as_it_was_written(store: RunStore) -> None:
    folder = made(store, "gpt-1", ranks=[0, 1], spec={"nproc": 2}, script={"file": "x.py"}, created=5.0)
    assert folder.read() == RunRecord(
        "gpt-1", "gpt", "finished", 5.0, ranks=[0, 1], spec={"nproc": 2}, script={"file": "x.py"}
    )
    assert folder.source() == "print(1)\n"
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_state_is_replaced_in_one_step(store: RunStore) -> None:
    folder = made(store, "gpt-1", state="running")
    record = folder.read()
    record.state = "stopped"
    folder.write(record)
    assert folder.read().state == "stopped"
    assert sorted(path.name for path in folder.path.iterdir()) == ["cell.py", "run.json"]


def test_a_field_of_a_later_version_is_passed_over(store: RunStore) -> None:
    folder = made(store, "gpt-1")
    data = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps({**data, "invented_later": 1}))
    assert folder.read().run_id == "gpt-1"


def test_runs_are_listed_newest_first(store: RunStore) -> None:
    for number in (2, 3, 1):
        made(store, f"gpt-{number}", created=float(number))
    assert [record.run_id for record in store.list()] == ["gpt-3", "gpt-2", "gpt-1"]


def test_what_is_no_run_is_not_listed(store: RunStore) -> None:
    made(store, "gpt-1")
    (store.path / "half").mkdir()
    (store.path / "broken").mkdir()
    (store.path / "broken" / "run.json").write_text("{")
    (store.path / "file").write_text("x")
    assert [record.run_id for record in store.list()] == ["gpt-1"]


def test_no_runs_at_all_is_an_empty_list(store: RunStore) -> None:
    assert store.list() == []


def test_a_run_is_found_by_its_id_and_the_newest_by_its_name(store: RunStore) -> None:
    made(store, "gpt-1", created=1.0)
    made(store, "gpt-2", created=2.0)
    assert store.find("gpt-1").run_id == "gpt-1"
    assert store.find("gpt").run_id == "gpt-2"


def test_an_id_goes_before_a_name(store: RunStore) -> None:
    made(store, "a", name="other", created=1.0)
    made(store, "b", name="a", created=2.0)
    assert store.find("a").run_id == "a"


def test_a_run_that_is_not_there_is_named_with_those_that_are(store: RunStore) -> None:
    with pytest.raises(NotFound, match=r"'gtp'.*no runs yet"):
        store.find("gtp")
    made(store, "gpt-1")
    with pytest.raises(NotFound, match=r"'gtp'.*gpt"):
        store.find("gtp")


def test_the_name_of_a_sweep_leads_to_the_run_of_its_best_trial(store: RunStore, tmp_path: Path) -> None:
    rows = [TrialRow(0, "done", 2.0, run_id="tuned-0000-x"), TrialRow(1, "done", 1.0, run_id="tuned-0001-x")]
    folder = SweepStore(tmp_path).folder("tuned")
    folder.path.mkdir(parents=True)
    folder.write(SweepRecord("tuned", trials=rows))
    with pytest.raises(NotFound, match="'tuned' is a sweep: the run of its best trial is tuned-0001-x"):
        store.find("tuned")
    folder.write(SweepRecord("tuned"))
    with pytest.raises(NotFound, match="'tuned' is a sweep: no trial is done"):
        store.find("tuned")


@pytest.mark.parametrize("name", ["", ".", "..", "../runs", "/etc", "a/b", ".hidden", "a\0b"])
def test_a_name_cannot_lead_out_of_the_folder(store: RunStore, name: str) -> None:
    made(store, "gpt-1")
    with pytest.raises(UsageError):
        store.folder(name)
    with pytest.raises((NotFound, UsageError)):
        store.find(name)
    with pytest.raises((NotFound, UsageError)):
        store.delete(name)


def test_a_run_that_has_ended_can_be_deleted(store: RunStore) -> None:
    made(store, "gpt-1")
    assert store.delete("gpt") == "gpt-1"
    assert store.list() == []


@pytest.mark.parametrize("state", ["queued", "running", "stopping"])
def test_an_active_run_cannot_be_deleted(store: RunStore, state: str) -> None:
    made(store, "gpt-1", state=state)
    with pytest.raises(UsageError, match="%runs stop gpt"):
        store.delete("gpt")
    assert store.find("gpt").read().is_active


def test_records_of_all_ranks_come_in_order_of_time(store: RunStore) -> None:
    folder = made(store, "gpt-1")
    for rank in (0, 1):
        writer = JournalWriter(folder.logs(rank))
        writer.append([{"text": f"{rank}{number}", "t": number + rank / 2} for number in range(3)])
        writer.close()
    assert [(rank, row["text"]) for rank, row in folder.records("logs")] == [
        (0, "00"), (1, "10"), (0, "01"), (1, "11"), (0, "02"), (1, "12"),
    ]  # fmt: skip
    assert list(folder.records("metrics")) == []


def test_a_record_of_an_earlier_version_is_read(store: RunStore) -> None:
    folder = made(store, "old-1", name="old")
    told = json.loads((folder.path / "run.json").read_text())
    old = {key: value for key, value in told.items() if key not in ("spec", "script")}
    (folder.path / "run.json").write_text(json.dumps({**old, "options": {"ranks": "0-1"}}))
    record = store.find("old").read()
    assert (record.run_id, record.spec, record.script) == ("old-1", {}, {})
