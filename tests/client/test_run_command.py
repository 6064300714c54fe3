"""`jupyter llmcloud run`: real scripts, on real ranks of a real server, from a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.core.run.lifecycle import Ladder
from jupyter_llmcloud.errors import CapacityError, UsageError
from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.headless import headless_server
from tests.support.worlds import until

pytest_plugins = ["tests.support.server_fixtures"]
pytestmark = pytest.mark.slow
DEADLINE_S = 120
SCRIPT = """\
    from __future__ import annotations

    import argparse
    import os
    import sys

    import beside
    from accelerate import Accelerator


    def main():
        parser = argparse.ArgumentParser()
        parser.add_argument("--lr", type=float)
        arguments = parser.parse_args()
        accelerator = Accelerator()
        accelerator.print("lr", arguments.lr, "of", accelerator.num_processes)
        accelerator.print("file", __file__, "argv", sys.argv[1:], "cwd", os.getcwd(), "path", sys.path[0])
        accelerator.print("beside", beside.VALUE)
        print("rank", accelerator.process_index)
        return "not shown"


    if __name__ == "__main__":
        main()
    "nor is this"
    """
TRAINING = """\
    import os, signal, sys, time
    import torch
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = Accelerator()
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.arange(96.0).reshape(24, 4) / 96)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=2))
    step = 0
    for epoch in range(2):
        for (batch,) in loader:
            loss = model(batch).pow(2).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if "--fail" in sys.argv and step == 7 and not os.path.exists("failed"):
                accelerator.wait_for_everyone()
                if accelerator.process_index == 1:
                    open("failed", "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
    accelerator.print("weights", [round(value, 9) for value in accelerator.unwrap_model(model).weight[0].tolist()])
    """
ENDLESS = 'import time\nprint("it runs", flush=True)\nwhile True:\n    time.sleep(0.05)\n'


@dataclass
class Shell:
    """A user's terminal in a folder with scripts."""

    folder: Path
    server: ServerClient
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def script(self, name: str, text: str) -> None:
        (self.folder / name).write_text(textwrap.dedent(text), encoding="utf-8")

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start a command, in a process group of its own."""
        environment = {
            **os.environ,
            "LLMCLOUD_SERVER_URL": self.server.url,
            "LLMCLOUD_SERVER_TOKEN": self.server._token,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_llmcloud.server.cli", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *words: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a command."""
        process = self.begin(*words)
        out, err = process.communicate(timeout=DEADLINE_S)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def server() -> Iterator[ServerClient]:
    """A headless server with its cluster, for the tests of this module."""
    with headless_server("of-this-module") as client:
        yield client


@pytest.fixture
def shell(server: ServerClient, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, server)
    yield shell
    for process in shell.processes:
        process.kill()
        process.wait()
        for stream in process.stdout, process.stderr:
            stream.close()


def newest(name: str) -> RunRecord:
    return RunStore().find(name).read()


def test_a_script_is_run_as_python_would(shell: Shell) -> None:
    (shell.folder / "scripts").mkdir()
    shell.script("scripts/hello.py", SCRIPT)
    shell.script("scripts/beside.py", "VALUE = 7")
    status, out, err = shell.run("run", "scripts/hello.py", "-n", "2", "--", "--lr", "0.5")
    assert status == 0, err
    folder = shell.folder / "scripts"
    assert sorted(out.splitlines()) == sorted(
        [
            "[0] lr 0.5 of 2",
            f"[0] file {folder}/hello.py argv ['--lr', '0.5'] cwd {shell.folder} path {folder}",
            "[0] beside 7",
            "[0] rank 0",
            "[1] rank 1",
        ]
    )
    record = newest("hello")
    assert record.spec == {"nproc": 2, "name": "hello"}
    assert record.script == {"file": f"{folder}/hello.py", "arguments": ["--lr", "0.5"], "folder": str(shell.folder)}


def test_a_failing_script_ends_with_the_line_of_the_rank_that_failed(shell: Shell) -> None:
    shell.script("bad.py", "x = 1\n\ndef f():\n    1 / 0\n\nif rank == 1:\n    f()\n")
    status, _, err = shell.run("run", "bad.py", "-n", "2")
    assert status == 1
    assert "ZeroDivisionError: division by zero" in err
    assert f"rank 1 failed at {shell.folder}/bad.py:4 in f." in err


@pytest.mark.parametrize(("code", "status"), [("0", 0), ("", 0), ("3", 3), ("'why'", 1)])
def test_the_exit_status_is_that_of_the_script(shell: Shell, code: str, status: int) -> None:
    shell.script("leave.py", f"import sys\nsys.exit({code})")
    assert shell.run("run", "leave.py", "-n", "1")[0] == status


def test_ctrl_c_stops_the_run_and_its_ranks_are_gone(shell: Shell) -> None:
    shell.script("endless.py", ENDLESS)
    process = shell.begin("run", "endless.py", "-n", "2")
    assert process.stdout.readline() == "[0-1] it runs\n"
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - pressed < 8
    assert "Ctrl-C again" in err
    assert newest("endless").state == "stopped"
    until(lambda: _free_slots(shell.server) == _slots(shell.server), "its ranks have ended", 20)


def test_ctrl_c_again_is_harder(shell: Shell) -> None:
    shell.script(
        "stubborn.py",
        'import time\nprint("it runs", flush=True)\nwhile True:\n'
        "    try:\n        time.sleep(9)\n    except BaseException:\n        print('no', flush=True)\n",
    )
    process = shell.begin("run", "stubborn.py", "-n", "1")
    assert process.stdout.readline() == "it runs\n"
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "no\n"
    for _ in range(3):
        time.sleep(Ladder().again_s)  # sooner it would be the same press
        with contextlib.suppress(ProcessLookupError):  # ended by the one before
            os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - pressed < 5  # by itself it is killed after 6.5 s


@pytest.mark.story
def test_a_run_in_the_background_is_attached_to_and_stopped(shell: Shell) -> None:
    shell.script("endless.py", ENDLESS)
    status, out, _ = shell.run("run", "endless.py", "-n", "1", "-b", "--name", "behind")
    assert status == 0
    run_id = out.strip()
    watching = shell.begin("runs", "attach", "behind")
    assert watching.stdout.readline() == "it runs\n"
    os.killpg(watching.pid, signal.SIGINT)
    _, err = watching.communicate(timeout=20)
    assert "The run goes on" in err
    listed = json.loads(shell.run("runs", "--json")[1])
    assert [row["state"] for row in listed if row["run_id"] == run_id] == ["running"]
    assert_its_stacks_are_told(shell, run_id)
    assert shell.run("runs", "stop", run_id)[0] == 0
    until(lambda: newest("behind").state == "stopped", "it has stopped", 20)


def assert_its_stacks_are_told(shell: Shell, run_id: str) -> None:
    """In the terminal by the world, over MCP by the run."""
    told = json.loads(shell.run("runs", "show", run_id, "--json")[1])
    world_id = told["world_id"]
    assert told["versions"]["torch"] == version("torch") and told["versions"]["python"] == platform.python_version()
    [world] = [row for row in json.loads(shell.run("worlds", "--json")[1]) if row["run_id"] == run_id]
    assert world["world_id"] == world_id and world["num_ranks"] == 1
    status, out, _ = shell.run("worlds", "stacks", world_id)
    assert status == 0 and out.startswith("rank 0: running") and "endless.py" in out
    answer = asyncio.run(_ask_tool(shell, "stacks", {"name": run_id}))
    assert answer.startswith("rank 0: running") and "endless.py" in answer


async def _ask_tool(shell: Shell, tool: str, arguments: dict[str, str]) -> str:
    server = {"LLMCLOUD_SERVER_URL": shell.server.url, "LLMCLOUD_SERVER_TOKEN": shell.server._token}
    words = ["-m", "jupyter_llmcloud.server.cli", "mcp"]
    command = StdioServerParameters(command=sys.executable, args=words, env={**os.environ, **server})
    async with Client(command) as client:
        return str((await client.call_tool(tool, arguments)).content[0].text)


def test_a_notebook_attaches_to_a_run_of_a_terminal(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from jupyter_llmcloud.magics.commands import runs
    from jupyter_llmcloud.magics.session import session

    shell.script("words.py", 'for i in range(3):\n    print("line", i)\n')
    assert shell.run("run", "words.py", "-n", "2", "--name", "words")[0] == 0
    monkeypatch.setattr(session, "_session", None)
    monkeypatch.setattr(session.Session, "server", shell.server)
    capsys.readouterr()
    runs.get("words").attach()
    assert [line for line in capsys.readouterr().out.splitlines() if "line" in line] == [
        f"[0-1] line {number}" for number in range(3)
    ]


def test_a_script_goes_on_from_its_checkpoint_with_the_same_weights(shell: Shell) -> None:
    shell.script("train.py", TRAINING)
    calm = shell.run("run", "train.py", "-n", "2")
    supervision = ("--checkpoint-every", "3", "--max-restarts", "1")
    broken = shell.run("run", "train.py", "-n", "2", *supervision, "--name", "broken", "--", "--fail")
    assert (calm[0], broken[0]) == (0, 0), broken[2]
    assert re.search("resumed from step [36] ", broken[2])  # the newest that was complete when the rank died
    assert calm[1].splitlines()[-1] == broken[1].splitlines()[-1]


def test_a_killed_script_is_resumed_by_its_run_alone(shell: Shell) -> None:
    shell.script("train.py", TRAINING)
    calm = shell.run("run", "train.py", "-n", "2")
    first = shell.run("run", "train.py", "-n", "2", "--checkpoint-every", "3", "--name", "first", "--", "--fail")
    assert first[0] == 1
    status, out, err = shell.run("run", "--resume", "first", "-n", "2", "--name", "second")
    assert status == 0, err
    assert re.search("Resuming from step [36] of .*, with --checkpoint-every 3 as before", err)
    assert out.splitlines()[-1] == calm[1].splitlines()[-1]
    assert newest("second").spec["checkpoint_every"] == 3


def test_what_cannot_be_run_is_refused_before_anything_starts(shell: Shell) -> None:
    shell.script("bad.py", "if x\n")
    for words, said in (
        (("run", "bad.py"), "SyntaxError: expected ':'"),
        (("run", "none.py"), "none.py cannot be read"),
        (("run",), "which script?"),
        (("run", "bad.py", "--precision", "fp7"), "Choose one of no, bf16"),
        (("run", "bad.py", "--lr", "1"), "comes after --"),
        (("run", "bad.py", "--nprocs", "2"), "what does --nprocs mean? Did you mean --nproc? What"),
    ):
        status, _, err = shell.run(*words)
        assert status in (1, 2) and said in err
        assert "Traceback" not in err


def test_a_run_that_waits_for_slots_says_so_and_can_be_stopped(shell: Shell) -> None:
    slots = _slots(shell.server)
    shell.script("endless.py", ENDLESS)
    first = shell.begin("run", "endless.py", "-n", str(slots), "--name", "holds")
    assert "it runs" in first.stdout.readline()
    told = shell.server.start_run("pass", {"nproc": 1, "name": "waits"})
    assert told["state"] == "queued"
    assert any("waits for free slots" in entry.get("why", "") for entry in newest("waits").history)
    assert shell.server.run("waits")["state"] == "queued"
    assert shell.server.stop_run("waits")["state"] == "stopped"
    again = shell.server.start_run("pass", {"nproc": 1, "name": "turn"})
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=20)
    until(lambda: RunStore().folder(again["run_id"]).read().state == "finished", "it got its turn", 60)


def test_rest_refuses_by_name(shell: Shell) -> None:
    start: Callable[..., object] = shell.server.start_run
    with pytest.raises(UsageError, match=r"spec\.push is not known here: nproc, cluster,"):
        start("pass", {"push": "a"})
    with pytest.raises(UsageError, match=r"script\.argv is not known"):
        start("pass", {}, {"argv": []})
    with pytest.raises(UsageError, match="SyntaxError"):
        start("if", {})
    with pytest.raises(CapacityError, match="-n 5000"):
        start("pass", {"nproc": 5000})


def _slots(server: ServerClient) -> int:
    return int(server.clusters()[0]["num_slots"])


def _free_slots(server: ServerClient) -> int:
    from jupyter_llmcloud.errors import Busy

    try:  # a place for all of them is only named while all are free
        return int(server.place("local", _slots(server))["num_ranks"])
    except Busy:
        return 0


@pytest.fixture
def alone(headless_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """Starts commands where no server runs."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "none"))

    def begin(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jupyter_llmcloud.server.cli", *words]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return begin


def test_without_a_server_a_script_has_one_of_its_own(
    alone: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "words.py").write_text("print('here')\n", encoding="utf-8")
    process = alone("run", "words.py", "-n", "2")
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (0, "[0-1] here\n"), err
    assert "Starting a server and a cluster on this machine" in err


def test_ctrl_c_while_the_cluster_starts_leaves_no_run(
    alone: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS, encoding="utf-8")  # on a busy machine this process may come late
    process = alone("run", "endless.py", "-n", "2")
    assert "Starting a server" in process.stderr.readline()
    until(lambda: list(config.runtime_dir().glob("headless-*.json")), "the server is there", 60)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert out in ("", "[0-1] it runs\n")
    assert [record for record in RunStore().list() if record.state != "stopped"] == []
