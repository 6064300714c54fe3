"""Runs at the URL of a root: copied while they go on, fetched where they are not, each checkpoint whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.magics.session import environment_check
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder, seal
from jupyter_llmcloud.storage.datasets import filesystem
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.remote import run_copy
from jupyter_llmcloud.storage.remote.run_copy import RunCopy, run_url
from jupyter_llmcloud.storage.resume import resume
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore

URL = "s3://roots/mine"


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """A server that speaks S3's protocol, to which fsspec goes by its configuration."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", {"key": "a", "secret": "b", "endpoint_url": f"http://{host}:{port}"})
        filesystem.filesystem("s3://roots")[0].mkdir("roots")
        yield
    server.stop()


@pytest.fixture
def make_store(s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RunStore]]:
    """Makes stores of runs as another machine each would have them."""
    monkeypatch.setenv("LLMCLOUD_ROOT", f"{URL}-{tmp_path.name}/")
    yield RunStore


def on_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / name))
    return RunStore()


def save(folder: RunFolder, step: int, content: bytes = b"weights") -> None:
    checkpoints = CheckpointFolder(folder.path / "checkpoints")
    staging = checkpoints.staging(step, 0)
    (staging / "rank-0000.pt").write_bytes(content)
    checkpoints.commit(staging, step, {"rank-0000.pt": seal(staging / "rank-0000.pt")})
    checkpoints.retain(2)


def a_run(store: RunStore, run_id: str = "gpt-1", state: str = "running", created: float = 1.0) -> RunFolder:
    folder = store.folder(run_id)
    folder.create(RunRecord(run_id, "gpt", state, created, ranks=[0], spec={"checkpoint_every": 10}), "pass")
    writer = JournalWriter(folder.metrics(0))
    writer.append([{"t": 1.0, "step": 1, "values": {"loss": 2.5}}])
    writer.close()
    return folder


def test_a_run_goes_on_on_another_machine_from_what_was_copied(
    make_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_machine("one", tmp_path, monkeypatch)
    assert store.url == config.root_url() == f"{URL}-{tmp_path.name}"
    assert store.path.is_relative_to(tmp_path / "one")
    folder = a_run(store)
    copy = RunCopy(folder, run_url(store.url, folder.run_id))
    for step in (10, 20, 30):
        save(folder, step, b"of %d" % step)
        assert copy.send_checkpoints()
    assert not copy.send_checkpoints(), "what is there is not sent again"
    copy.send_files()
    fs, path = filesystem.filesystem(run_url(store.url, folder.run_id))
    assert sorted(name.rsplit("/")[-1] for name in fs.ls(f"{path}/checkpoints", refresh=True)) == ["step-20", "step-30"]

    other = on_machine("two", tmp_path, monkeypatch)
    assert other.list() == []
    resumption = resume(other, "gpt", {})
    assert resumption.checkpoint.step == 30 and resumption.spec.checkpoint_every == 10
    assert (resumption.checkpoint.path / "rank-0000.pt").read_bytes() == b"of 30"
    assert [
        found.step for found in CheckpointFolder(resumption.earlier.path / "checkpoints").newest()[:1] if found
    ] == [30]
    record = resumption.earlier.read()
    assert record.state == "lost" and "running elsewhere" in record.notes[-1]
    assert [row["values"] for _, row in resumption.earlier.records("metrics")] == [{"loss": 2.5}]


def test_a_checkpoint_that_was_not_copied_whole_does_not_count(
    make_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_machine("one", tmp_path, monkeypatch)
    folder = a_run(store)
    save(folder, 10)
    copy = RunCopy(folder, run_url(store.url, folder.run_id))
    copy.send_checkpoints()
    copy.send_files()
    fs, path = filesystem.filesystem(run_url(store.url, folder.run_id))
    fs.pipe_file(f"{path}/checkpoints/step-20/rank-0000.pt", b"half")
    other = on_machine("two", tmp_path, monkeypatch)
    fetched = run_copy.fetch(other, "gpt-1")
    assert [path.name for path in (fetched.path / "checkpoints").iterdir()] == ["step-10"]


def test_the_newest_run_of_a_name_is_fetched_with_its_model_and_an_unknown_one_refused(
    make_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_machine("one", tmp_path, monkeypatch)
    for number in (1, 2):
        folder = a_run(store, f"gpt-{number}", "finished", float(number))
        (folder.model).mkdir()
        (folder.model / "config.json").write_text(json.dumps({"number": number}))
        RunCopy(folder, run_url(store.url, folder.run_id)).send_files()
    other = on_machine("two", tmp_path, monkeypatch)
    assert run_copy.is_fetched(other, "gpt")
    found = other.find("gpt")
    assert found.run_id == "gpt-2" and json.loads((found.model / "config.json").read_text()) == {"number": 2}
    assert found.read().state == "finished"
    assert not run_copy.is_fetched(other, "gpt-2"), "it is here"
    with pytest.raises(NotFound, match="neither here nor at s3://roots/mine"):
        run_copy.find(other, "bert")


def test_a_root_that_is_a_folder_has_no_copies(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.url == ""
    with pytest.raises(UsageError, match="a folder, not a URL"):
        run_copy.fetch(store, "gpt")


def test_a_bucket_that_is_not_there_is_said(make_store: None, tmp_path: Path) -> None:
    folder = a_run(RunStore(tmp_path))
    with pytest.raises((UsageError, NotFound), match="s3://"):
        RunCopy(folder, "s3://no-such-Bucket_/runs/gpt-1").send_files()


@pytest.mark.parametrize(
    ("url", "refusal"), [("s4://bucket/a", "'s4' is no protocol"), ("dvc://a", "needs dvc: pip install dvc")]
)
def test_a_root_that_nothing_here_speaks_with_is_refused_before_anything_starts(
    url: str, refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LLMCLOUD_ROOT", url)
    with pytest.raises(UsageError, match=f"LLMCLOUD_ROOT={url}.*{refusal}"):
        environment_check.check()
    monkeypatch.setenv("LLMCLOUD_ROOT", "s3://roots/a")
    environment_check.check()


def test_what_is_here_of_a_run_stays_when_its_copy_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copying was cut off, say: the record is written last."""
    monkeypatch.setenv("LLMCLOUD_ROOT", f"memory://cut-off-{tmp_path.name}")
    store = on_machine("one", tmp_path, monkeypatch)
    folder = a_run(store, state="finished")
    copy = RunCopy(folder, run_url(store.url, folder.run_id))
    copy.send_files()
    fs, path = filesystem.filesystem(copy.url)
    record = fs.cat_file(f"{path}/run.json")
    fs.rm_file(f"{path}/run.json")
    with pytest.raises(NotFound):
        run_copy.fetch(store, folder.run_id)
    assert folder.read().state == "finished" and folder.metrics(0).exists()
    fs.pipe_file(f"{path}/run.json", record.replace(b'"finished"', b'"stopped"', 1))
    assert run_copy.fetch(store, folder.run_id).read().state == "stopped"
    assert [path.name for path in store.path.iterdir()] == [folder.run_id]
