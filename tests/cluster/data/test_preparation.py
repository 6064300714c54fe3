"""A preparation on a real Dask cluster: restarted, gone on with, stopped; a process of it killed; out of and into S3."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import httpx
import pytest
from distributed import Client, LocalCluster

from jupyter_llmcloud.cluster.data import planning, preparation
from jupyter_llmcloud.cluster.data.preparation import Preparation, PreparationProgress
from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.datasets import filesystem, manifest
from jupyter_llmcloud.storage.datasets.manifest import CleaningStep, Manifest
from jupyter_llmcloud.storage.datasets.shards import ShardReader, read_all
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer
from tests.support.worlds import alive, until

NUM_FILES = 6


def recipe(out: str, own: Callable[[str], Any] | None = None, **options: Any) -> Recipe:
    """Tokens are the codes of letters."""
    told, packed = pack_tokenizer(lambda text: [ord(letter) for letter in text])
    steps = (CleaningStep(name="own", source_hash="1"),) if own is not None else ()
    content = cloudpickle.dumps({"steps": {"own": own}, "tokenizer": packed})
    return Recipe("text", out, seq_len=16, tokenizer=told, steps=steps, own=content, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(NUM_FILES):
        (folder / f"{number}.txt").write_text("".join(f"file {number} line {line}\n" for line in range(100)))
    return folder


@asynccontextmanager
async def dask(num_workers: int = 1) -> AsyncIterator[Client]:
    """A cluster whose worker has one thread, as ours have."""
    async with (
        LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=False,
            asynchronous=True,
            dashboard_address=None,
            protocol="inproc://",
        ) as cluster,
        Client(cluster, asynchronous=True, set_as_default=False) as client,
    ):
        yield client


async def prepare(
    client: Client, made: Recipe, source: str, progress: PreparationProgress | None = None, partition_bytes: int = 1500
) -> Manifest:
    plan = planning.plan(made, [source], partition_bytes)
    return await Preparation(client, plan, progress or PreparationProgress(), processes=2).run()


def tokens_of(found: Manifest, out: str, storage: dict[str, Any] | None = None) -> str:
    """The text that the rows stand for."""
    rows = [row for table in read_all(out, found, storage) for row in table.to_pylist()]
    return "".join(chr(token) for row in rows for token in row["input_ids"][: row["length"]])


def test_a_preparation_is_stopped_gone_on_with_and_grows_with_its_source(source: Path, tmp_path: Path) -> None:
    out, marks = str(tmp_path / "out"), tmp_path / "marks"
    marks.mkdir()
    folder = str(marks)

    def own(text: str) -> str:
        """Notes that it was asked, and waits in the fourth file until it may go on."""
        import time

        if text.endswith("line 0"):
            Path(folder, f"{text} {time.time_ns()}").touch()
            while text.startswith("file 3") and not Path(folder, "go").exists():
                time.sleep(0.01)
        return text

    made = recipe(out, own)

    async def scenario() -> None:
        async with dask() as client:
            progress = PreparationProgress()
            work = asyncio.ensure_future(prepare(client, made, str(source), progress))
            async with asyncio.timeout(60):
                while progress.done < 4:
                    await asyncio.sleep(0.02)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            assert manifest.read_if_there(out) is None, "what is not finished is no data set"
            asked = {path.name.rsplit(" ", 1)[0]: path for path in marks.iterdir()}
            (marks / "go").touch()
            found = await prepare(client, made, str(source))
            again = [name for name in asked if len(list(marks.glob(f"{name} *"))) > 1]
            assert "file 0 line 0" in asked and "file 0 line 0" not in again, "a finished shard is not made again"
            lines = [f"file {number} line {line}" for number in range(NUM_FILES) for line in range(100)]
            assert tokens_of(found, out) == "".join(lines)
            assert not Path(out, "staged").exists()

            assert planning.plan(made, [str(source)], 1500).is_done
            (source / "0-new.txt").write_text("one more\n")
            plan = planning.plan(made, [str(source)], 1500)
            assert (plan.note, len(plan.partitions)) == ("1 new files", 1)
            grown = await prepare(client, made, str(source))
            assert tokens_of(grown, out) == "".join([*lines, "one more"])
            assert grown.shards[:-1] == found.shards

            Path(out, "shards", grown.shards[0].name).unlink()
            (source / "5.txt").write_text("changed\n")
            mended = await prepare(client, made, str(source))
            assert sorted(tokens_of(mended, out)) == sorted("".join([*lines[:500], "one more", "changed"]))
            ShardReader(out, mended).check()

    asyncio.run(scenario())


def test_what_crashes_or_raises_in_a_step_ends_it_with_a_word_and_takes_no_worker_with_it(
    source: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")

    def crashes(text: str) -> str:
        if text == "file 4 line 50":
            os.kill(os.getpid(), signal.SIGSEGV)
        return text

    def raises(text: str) -> str:
        if text == "file 4 line 50":
            raise ValueError("not this one")
        return text

    async def scenario() -> None:
        async with dask() as client:
            with pytest.raises(UsageError, match="killed by signal 11: a step or the tokenizer has crashed it"):
                await prepare(client, recipe(out, crashes), str(source))
            told = "the step 'own' failed with ValueError: not this one on 'file 4 line 50'"
            with pytest.raises(UsageError, match=told):
                await prepare(client, recipe(out, raises), str(source))
            assert (await prepare(client, recipe(out, lambda text: text), str(source))).num_rows

    asyncio.run(scenario())


def test_partitions_for_a_worker_that_was_lost_go_to_the_one_that_comes_after_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "LOOK_S", 0.2)
    found = Preparation._room
    lost = {"inproc://127.0.0.1/1/9999": 2}

    async def scenario() -> None:
        async with dask(num_workers=0) as client:

            async def room(self: Preparation) -> dict[str, int]:
                monkeypatch.setattr(Preparation, "_room", found)
                client.cluster.scale(1)
                return lost

            monkeypatch.setattr(Preparation, "_room", room)
            out = str(tmp_path / "out")
            made = await asyncio.wait_for(prepare(client, recipe(out), str(source)), 60)
            assert tokens_of(made, out).count("line") == NUM_FILES * 100

    asyncio.run(scenario())


def test_a_partition_ends_with_the_worker_that_was_to_carry_it_out(source: Path, tmp_path: Path) -> None:
    at_work = tmp_path / "pid"

    def waits(text: str) -> str:
        import time

        at_work.write_text(str(os.getpid()))
        time.sleep(600)
        return text

    made = planning.plan(recipe(str(tmp_path / "out"), waits), [str(source)], 1 << 20)
    arguments = (made.partitions[0], b"", ([], []), {}, None)
    told = tmp_path / "told"
    told.write_bytes(cloudpickle.dumps((cloudpickle.dumps(made.recipe), arguments)))
    code = (
        "import pickle, sys; from jupyter_llmcloud.cluster.data.worker_process import carry_out\n"
        "recipe, arguments = pickle.load(open(sys.argv[1], 'rb')); carry_out('one', recipe, 'shard', arguments)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(told)])
    until(lambda: at_work.exists() and at_work.read_text(), "a partition at work", 60)
    worker.kill()
    worker.wait()
    until(lambda: not alive(int(at_work.read_text())), "the end of its process")


def test_data_that_was_prepared_otherwise_is_not_mixed_with(source: Path, tmp_path: Path) -> None:
    made = recipe(str(tmp_path / "out"))
    told = manifest.Manifest(kind="tokens", columns={}, recipe=made.described(), sources=[], shards=[])
    manifest.write(made.out, told)
    other = replace(made, seq_len=32, dedup="exact")
    with pytest.raises(UsageError, match="prepared otherwise: dedup none -> exact, seq_len 16 -> 32"):
        planning.plan(other, [str(source)], 1500)
    assert planning.plan(other, [str(source)], 1500, overwrite=True).partitions


# --- S3 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def s3() -> Iterator[dict[str, Any]]:
    """A server that speaks S3's protocol, and the options with which fsspec reaches it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    httpx.post(
        f"http://{host}:{port}/moto-api/reset", trust_env=False
    ).raise_for_status()  # it keeps all in this process
    options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    filesystem.filesystem("s3://bucket", options)[0].mkdir("bucket")
    yield options
    server.stop()


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_data_comes_out_of_s3_and_goes_into_it(s3: dict[str, Any], source: Path) -> None:
    fs, _ = filesystem.filesystem("s3://bucket", s3)
    fs.put(str(source), "bucket/in", recursive=True)
    out = "s3://bucket/out"
    made = recipe(out, storage=s3)

    async def scenario() -> None:
        async with dask() as client:
            found = await prepare(client, made, "s3://bucket/in/*.txt", partition_bytes=4000)
            lines = [f"file {number} line {line}" for number in range(NUM_FILES) for line in range(100)]
            assert tokens_of(found, out, s3) == "".join(lines)
            reader = ShardReader(out, found, s3)
            reader.check()
            name = found.shards[1].name
            fs.rm_file(f"bucket/out/shards/{name}")
            with pytest.raises(UsageError, match=f"lacks 1 of its {len(found.shards)} shards .{name}"):
                reader.check()

    run(scenario)
    with pytest.raises(Exception, match=r"'s3://bucket/wrong/\*.txt' matches no file"):
        planning.plan(made, ["s3://bucket/wrong/*.txt"], 1500)
    assert b"key" not in filesystem.read_bytes(f"{out}/manifest.json", s3).replace(b'"key":', b""), "no secret is kept"


def test_a_bucket_whose_name_is_wrong_is_said_and_not_made(s3: dict[str, Any]) -> None:
    with pytest.raises(NotFound, match=r"'s3://buckett/out/manifest\.json' is not there"):
        filesystem.replace("s3://buckett/out/manifest.json", b"{}", s3)
    assert not filesystem.filesystem("s3://buckett", s3)[0].exists("buckett")


def ask_moto(url: str, body: bytes) -> None:
    """After so many requests it looks at the keys."""
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, body, headers, method="POST")).close()


def test_a_key_that_s3_refuses_is_said_before_anything_is_done(s3: dict[str, Any], tmp_path: Path) -> None:
    fs, _ = filesystem.filesystem("s3://bucket", s3)
    fs.pipe_file("bucket/in/a.txt", b"text")
    check_keys = f"{s3['client_kwargs']['endpoint_url']}/moto-api/reset-auth"
    ask_moto(check_keys, b"0")
    try:
        for source in ("s3://bucket/in/a.txt", "s3://bucket/in", "s3://bucket/in/*.txt"):
            with pytest.raises(UsageError, match=r"may not be read or written: .*Check the key"):
                planning.plan(recipe(str(tmp_path / "out"), storage={**s3, "key": "wrong"}), [source], 1500)
    finally:
        ask_moto(check_keys, b"1000000")


@pytest.mark.parametrize(
    "wrong", [{"kee": "a"}, {"client_kwargs": {"endpoint": "http://127.0.0.1:9"}}], ids=["s3fs", "client"]
)
def test_an_option_that_s3_does_not_know_is_said(wrong: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    for source in ("s3://bucket/in/a.txt", "s3://bucket/in/*.txt"):
        with pytest.raises(UsageError, match=r"does not know an option of storage_options: .*unexpected keyword"):
            planning.plan(recipe(str(tmp_path / "out"), storage=wrong), [source], 1500)


def test_a_recipe_does_not_show_its_secrets() -> None:
    made = Recipe("text", "out", own=pickle.dumps("hidden"), storage={"secret": "hidden"})
    assert "hidden" not in repr(made)
