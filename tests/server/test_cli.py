"""`jupyter llmcloud` in a terminal."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.core.output.columns import format_table
from jupyter_llmcloud.errors import CapacityError
from jupyter_llmcloud.server import cli
from jupyter_llmcloud.server.cli import main
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.search.sweeps import SweepRecord, SweepStore, TrialRow
from tests.server.test_server_routes import make_run
from tests.support.server_parts import Server, make_model, until

pytest_plugins = ["tests.support.server_fixtures"]
START_DEADLINE_S = 120


@pytest.fixture
def named(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, named by the environment."""
    monkeypatch.setenv("LLMCLOUD_SERVER_URL", server.url)
    monkeypatch.setenv("LLMCLOUD_SERVER_TOKEN", server.token)
    return server


async def run(*words: str) -> int:
    """Run a command off the loop, which the server needs."""
    return await asyncio.to_thread(main, words)


async def test_endpoints_are_listed_read_and_stopped(named: Server, model: Path, capsys: pytest.CaptureFixture) -> None:
    await named.serve(model)
    assert await run("endpoints") == 0
    assert "tiny  ready" in capsys.readouterr().out
    assert await run("endpoints", "logs", "tiny") == 0
    assert await run("endpoints", "stop", "tiny") == 0
    await run("endpoints", "list")
    assert "tiny  stopped" in capsys.readouterr().out


async def test_a_key_is_made_printed_once_and_revoked(named: Server, capsys: pytest.CaptureFixture) -> None:
    assert await run("keys", "create", "--scope", "infer:t*", "--expires", "1h", "--label", "mine") == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("sk-llmc-")
    key_id = key.split("-")[2]
    await run("keys")
    listed = capsys.readouterr().out
    assert key_id in listed and "mine" in listed and key.split("-")[3] not in listed
    assert await run("keys", "revoke", key_id) == 0
    await run("keys", "list")
    assert "revoked" in capsys.readouterr().out


async def test_runs_and_clusters_are_listed(named: Server, capsys: pytest.CaptureFixture) -> None:
    make_run()
    make_run("active", "running", agent=named.agent.address)
    assert await run("runs") == 0
    assert "train-1" in capsys.readouterr().out
    await run("runs", "logs", "train")
    assert "[1] line 4 of rank 1" in capsys.readouterr().out
    assert await run("runs", "stop", "active") == 0
    assert await run("runs", "delete", "train") == 0
    assert await run("clusters", "start", "--name", "c1", "--workers", "2") == 0
    await run("clusters")
    assert "c1" in capsys.readouterr().out
    assert await run("clusters", "scale", "c1", "3") == 0
    assert await run("clusters", "adapt", "c1", "1", "4") == 0
    assert capsys.readouterr().out.startswith("c1  3 workers\nc1  ")
    assert await run("clusters", "stop", "c1") == 0
    assert await run("clusters", "start", "local", "nonsense") == 1
    assert "clusters start: one KIND only, not local and nonsense." in capsys.readouterr().err


async def test_the_trials_of_a_sweep_are_one_row(named: Server, capsys: pytest.CaptureFixture) -> None:
    make_run()
    for number in range(3):
        make_run(f"tuned-{number:04d}", owner="sweep:tuned")
    make_run("old-0000", owner="sweep:deleted")
    trials = [TrialRow(number, state="done", value=3.0 - number) for number in range(3)]
    record = SweepRecord("tuned", "finished", created=1.0, ended=9.0, spec={"metric": "loss"}, trials=trials)
    SweepStore().folder("tuned").create(record, {"source": "1"}, b"")
    await run("runs")
    listed = capsys.readouterr().out
    assert "train-1" in listed and "tuned  " in listed and "tuned-0001" not in listed
    assert "old-0000" in listed, "nothing else tells of it"
    await run("runs", "--trials")
    assert "tuned-0001" in capsys.readouterr().out
    await run("runs", "--json")
    assert {row["sweep"] for row in json.loads(capsys.readouterr().out)} == {"", "tuned", "deleted"}
    rows = await asyncio.to_thread(ServerClient(named.url, named.token).runs_and_sweeps, 20)
    [row] = [row for row in rows if row["run_id"] == "tuned"]
    assert (row["name"], row["metrics"]) == ("sweep of 3 trials", {"best loss": 1.0})


@pytest.mark.parametrize("noun", ["runs", "endpoints", "keys", "clusters", "worlds"])
async def test_every_listing_is_json_with_all_there_is(
    named: Server, model: Path, noun: str, capsys: pytest.CaptureFixture
) -> None:
    make_run()
    await named.serve(model)
    await named.key()
    await named.ask("POST", "llmcloud/api/clusters", {"name": "c1"})
    rows = (await named.ask("GET", f"llmcloud/api/{noun}")).json()[noun]
    assert len(rows) == 1
    for words in ((noun, "--json"), (noun, "list", "--json"), (noun, "--json", "list")):
        assert await run(*words) == 0
        assert [set(row) for row in json.loads(capsys.readouterr().out)] == [set(row) for row in rows]


async def test_one_run_and_one_endpoint_are_shown(named: Server, model: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(
        history=[{"t": 1.0, "state": "running"}, {"t": 2.0, "why": "it waited"}],
        errors=[{"rank": 1, "ename": "ValueError", "evalue": "no", "traceback": []}],
    )
    await named.serve(model)
    assert await run("runs", "show", "train", "--json") == 0
    assert json.loads(capsys.readouterr().out)["source"] == "print(1)\n"
    assert await run("runs", "show", "train") == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["state"], shown["note"], shown["error"]) == ("finished", "it waited", "rank 1: ValueError: no")
    assert "loss=0.333" in shown["metrics"]
    assert await run("runs", "metrics", "train") == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["2", "0", "loss", "0.333333"]
    assert await run("runs", "metrics", "train", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert await run("runs", "logs", "train", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 10
    assert await run("endpoints", "show", "tiny") == 0
    assert "url  " in capsys.readouterr().out
    assert await run("runs", "show", "nothing") == 1


async def test_a_run_is_written_as_a_script_and_compared(
    named: Server, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    make_run("one", spec={"seed": 1})
    make_run("two", spec={"seed": 2})
    script = tmp_path / "train.py"
    assert await run("runs", "export", "one", str(script)) == 0
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().out
    compile(script.read_text(encoding="utf-8"), "train.py", "exec", dont_inherit=True)
    assert await run("runs", "export", "one", str(tmp_path / "train.txt")) == 1
    assert "expected a file that ends in .py" in capsys.readouterr().err
    assert await run("runs", "compare", "one", "two") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["one-1", "two-1"], ["seed", "1", "2"], ["loss", "(last)", "0.333333", "0.333333", "the", "same"]]
    assert await run("runs", "compare", "one", "two", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"] == [{"name": "seed", "values": [1, 2]}] and told["code"] == [""]
    assert told["metrics"] == [{"name": "loss", "last": [1 / 3, 1 / 3], "apart_from": None}]
    assert await run("runs", "compare", "one") == 1
    assert "at least two" in capsys.readouterr().err


async def test_a_refusal_is_one_line_and_status_1(named: Server, capsys: pytest.CaptureFixture) -> None:
    assert await run("endpoints", "stop", "nothing") == 1
    assert capsys.readouterr().err.startswith("NotFound: there is no endpoint 'nothing'")


def test_without_a_server_it_is_said_how_to_get_one(
    own_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    assert main(["endpoints"]) == 1
    assert "LLMCLOUD_SERVER_URL" in capsys.readouterr().err


def test_nothing_in_a_table_can_move_the_cursor() -> None:
    assert "\x1b" not in format_table(["name"], [["\x1b[2Jgone\x07"]])


@pytest.mark.story
@pytest.mark.slow
def test_serve_answers_with_a_real_model_until_ctrl_c_and_leaves_nothing(headless_root: Path, real_model: Path) -> None:
    import httpx

    command = [sys.executable, "-m", "jupyter_llmcloud.server.cli", "serve", str(real_model), "--name", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LLMCLOUD_LEASE_S": "5"})
    watchdog = threading.Timer(START_DEADLINE_S, process.kill)
    watchdog.start()
    try:
        told = dict(process.stdout.readline().split() for _ in range(3))
        answer = httpx.post(
            f"{told['base_url']}/completions",
            json={"model": "tiny", "prompt": "The for", "max_tokens": 4},
            headers={"Authorization": f"Bearer {told['api_key']}"},
            timeout=60,
            trust_env=False,
        )
        assert answer.status_code == 200 and json.loads(answer.text)["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


async def test_an_endpoint_is_changed_from_a_terminal(
    named: Server, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    await named.serve(model)
    better = str(make_model(tmp_path / "better"))
    assert await run("endpoints", "update", "tiny", better, "--canary", "20") == 0
    told = capsys.readouterr().out
    assert "revision 1  stable  80 %" in told and f"revision 2  canary  20 %  {better}" in told
    capsys.readouterr()
    assert await run("endpoints", "revisions", "tiny") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[1:]] == [["2", "canary", "20"], ["1", "stable", "80"]]
    for listing in ("revisions", "adapters"):
        assert await run("endpoints", listing, "tiny", "--json") == 0
        assert len(json.loads(capsys.readouterr().out)) == {"revisions": 2, "adapters": 0}[listing]
    assert await run("endpoints", "split", "tiny", "stable:50,canary:50") == 0
    assert await run("endpoints", "rollback", "tiny") == 0
    assert await run("endpoints", "scale", "tiny", "1:2") == 0
    assert await run("endpoints", "shadow", "tiny", better) == 0
    assert "shadow" in capsys.readouterr().out
    assert await run("endpoints", "shadow", "tiny") == 0
    assert await run("endpoints", "split", "tiny", "stable") == 1
    assert "stable:95,canary:5" in capsys.readouterr().err


async def test_a_sweep_is_listed_shown_stopped_and_deleted(
    named: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("optuna")

    async def place(*_: object, **__: object) -> None:
        raise CapacityError("-n 5: the cluster holds 2 ranks.")

    monkeypatch.setattr(named.pool, "place", place)
    body = {"source": "1", "nproc": 5, "metric": "loss", "name": "big"}
    assert (await named.ask("POST", "llmcloud/api/sweeps", body)).status_code == 201
    await until(lambda: not len(named.context.sweeps), "it has ended")
    assert await run("sweeps") == 0
    assert "big   failed" in capsys.readouterr().out
    for words in (("sweeps", "--json"), ("sweeps", "list", "--json")):
        assert await run(*words) == 0
        assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["big"]
    assert await run("sweeps", "show", "big") == 0
    assert "-n 5: the cluster holds 2 ranks." in capsys.readouterr().out
    assert await run("sweeps", "show", "big", "--json") == 0
    assert json.loads(capsys.readouterr().out)["spec"]["nproc"] == 5
    assert await run("sweeps", "stop", "big") == 1
    assert "it is failed" in capsys.readouterr().err
    assert await run("sweeps", "delete", "big") == 0
    assert await run("sweeps", "show", "big") == 1


async def test_the_log_of_a_run_is_printed_whole_in_its_lines(named: Server, capsys: pytest.CaptureFixture) -> None:
    make_run()
    folder = named.context.runs.find("train")
    writer = JournalWriter(folder.logs(0))
    pieces = [piece for number in range(1500) for piece in (f"number {number}", " is", " there\n")]
    writer.append([{"kind": "stdout", "text": text, "t": time.time()} for text in pieces])
    writer.close()
    assert await run("runs", "logs", "train") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "number" in line] == [f"[0] number {number} is there" for number in range(1500)]
    assert await run("runs", "logs", "train", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 10 + len(pieces)
    assert await run("runs", "logs", "nothing") == 1
    assert "there is no run 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name", "found"),
    [
        ("clusters start slurm --workers 2 queue=gpu", "option", ["queue=gpu"]),
        ("clusters start slurm a=1 --workers 2 queue=gpu", "option", ["a=1", "queue=gpu"]),
        ("runs compare a --tolerance 0.1 b c", "names", ["a", "b", "c"]),
        ("prepare a --out o b", "source", ["a", "b"]),
        ("explain m --new 2 two words", "words", ["two", "words"]),
    ],
)
def test_words_may_stand_behind_an_option(
    words: str, name: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[argparse.Namespace] = []
    top = cli.parser()
    parse = top.parse_known_args

    def known(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
        arguments, unknown = parse(given)
        arguments.run = told.append
        return arguments, unknown

    monkeypatch.setattr(top, "parse_known_args", known)
    monkeypatch.setattr(cli, "parser", lambda: top)
    assert main(words.split()) == 0
    assert getattr(told[0], name) == found


def test_a_reader_who_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    server = SimpleNamespace(run_log=lambda name: iter(["a line\n" * 100_000]))
    monkeypatch.setattr(discovery, "find_running", lambda: server)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["runs", "logs", "train"]) == 128 + signal.SIGPIPE
