"""`%%distribute` as a user meets it: in a real kernel, with the server and cluster that it starts by itself."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from jupyter_llmcloud.storage.runs import RunStore
from tests.support.worlds import until

pytestmark = pytest.mark.slow


@dataclass
class Shown:
    """What a cell left below itself."""

    text: str = ""
    results: list[str] = field(default_factory=list)
    error: str = ""
    name: str = ""

    @property
    def last_line(self) -> str:
        return self.error.rstrip().splitlines()[-1]


class Notebook:
    """A kernel; cells in, what is shown out."""

    def __init__(self) -> None:
        self.manager: KernelManager
        self.client: BlockingKernelClient
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.ok("%load_ext jupyter_llmcloud")

    def run(self, code: str, timeout_s: float = 90) -> Shown:
        """Execute a cell and wait for its end."""
        shown = Shown()

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            match message["msg_type"]:
                case "stream":
                    shown.text += content["text"]
                case "execute_result":
                    shown.results.append(content["data"]["text/plain"])
                case "error":
                    shown.error = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(content["traceback"]))
                    shown.name = content["ename"]

        self.client.execute_interactive(code, timeout=timeout_s, output_hook=hear)
        return shown

    def ok(self, code: str) -> Shown:
        shown = self.run(code)
        assert not shown.error, shown.error
        return shown

    def refused(self, code: str) -> str:
        """The one line by which a cell is refused; nothing was run."""
        before = len(RunStore().list())
        shown = self.run(code)
        assert shown.name.endswith("Error") or shown.name in ("NotFound", "NameTaken"), shown
        assert len(RunStore().list()) == before
        assert "Traceback" not in shown.error
        return shown.error

    def end(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook() -> Iterator[Notebook]:
    notebook = Notebook()
    yield notebook
    notebook.end()


def test_what_cannot_be_meant_is_refused_before_anything_starts(notebook: Notebook) -> None:
    for cell, words in {
        "%%distribute --nam x\n1": r"no option --nam.*Did you mean --name",
        "%%distribute --precision fp17\n1": r"'fp17'.*no, bf16",
        "%%distribute -n 0\n1": r"at least 1",
        "%%distribute --name a/b\n1": r"'a/b' is not a valid name",
        "%%distribute --timeout soon\n1": r"30m",
        "%%distribute --push no_such\n1": r"no variable 'no_such'",
        "%%distribute -b --pull x\nx = 1": r"--pull waits",
        "%%distribute extra\n1": r"'extra'",
        "%%distribute\n\nx = (1": r"Cell In\[\d+\], line 3\n.*\n.*\nSyntaxError: '\(' was never closed",
        "%pull x": r"no world yet",
        "%world stop": r"no world",
    }.items():
        assert re.search(words, notebook.refused(cell)), (cell, words)
    assert "no world yet" in notebook.ok("%world").text + str(notebook.ok("%world").results)


def test_a_pushed_value_that_cannot_be_pickled_is_named_before_anything_starts(notebook: Notebook) -> None:
    notebook.ok("import threading\nlock = threading.Lock()")
    assert re.search(r"'lock' \(lock\)", notebook.refused("%%distribute --push lock\n1"))


def test_the_first_cell_starts_cluster_and_ranks_and_says_so(notebook: Notebook) -> None:
    shown = notebook.ok("%%distribute -n 2 --name first\nkept = rank * 10\nprint('hello from', rank)")
    assert "Started the cluster 'local'" in shown.text
    assert "hello from 0" in shown.text
    assert "hello from 1" in shown.text
    assert RunStore().find("first").read().state == "finished"


def test_variables_go_and_come(notebook: Notebook) -> None:
    notebook.ok("base = 100")
    assert "--push base in the cell's first line" in notebook.run("%%distribute\nbase + kept").error
    notebook.ok("%%distribute --push base --pull total\ntotal = base + kept")
    assert notebook.ok("total").results == ["100"]
    notebook.ok("%pull kept@1")
    assert notebook.ok("kept").results == ["10"]
    notebook.ok("%pull kept@all,total@1")
    assert notebook.ok("kept, total").results == ["([0, 10], 110)"]
    notebook.ok("extra = 7\n%push extra --ranks 1")
    notebook.ok("%pull extra@1")
    assert "no rank 5" in notebook.run("%push extra --ranks 5").error
    assert re.search("'extra'", notebook.run("%pull extra@0").error)


def test_names_that_nobody_makes_are_refused_before_the_run(notebook: Notebook) -> None:
    assert "'mdoel'" in notebook.refused("%%distribute --save mdoel\nmodel = 1")
    assert "'nothing'" in notebook.refused("%%distribute --pull nothing\n1")
    assert "'inner'" in notebook.refused("%%distribute --pull inner\ndef f(): inner = 1")
    assert "ranks 0-1" in notebook.refused("%%distribute --ranks 2\n1")
    assert re.search("-n 3.*2 ranks", notebook.refused("%%distribute -n 3\n1"))


def test_an_error_is_drawn_with_the_notebooks_lines_and_the_rank(notebook: Notebook) -> None:
    shown = notebook.run("%%distribute\nimport torch.distributed as dist\n\nif rank == 1:\n    1 / 0\ndist.barrier()")
    assert shown.name == "RankError"
    assert re.search(r"Cell In\[\d+\], line 5", shown.error)
    assert "ZeroDivisionError: division by zero" in shown.error
    assert "the cell failed on rank 1" in shown.error
    assert "rank 0: " in shown.error
    notebook.ok("%%distribute --pull kept\ndist.barrier()")
    assert notebook.ok("kept").results == ["0"]


def test_stop_in_the_notebook_ends_the_cell_and_keeps_everything(notebook: Notebook) -> None:
    message = notebook.client.execute(
        "%%distribute --name endless\nimport time\nprint('in it')\nwhile True: time.sleep(0.01)"
    )
    until(lambda: _printed("endless", "in it"), "the ranks are in it", 30)
    pressed = time.monotonic()
    notebook.manager.interrupt_kernel()
    reply = notebook.client.get_shell_msg(timeout=30)
    assert reply["parent_header"]["msg_id"] == message
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert time.monotonic() - pressed < 2
    assert RunStore().find("endless").read().state == "stopped"
    assert "variables kept" in "\n".join(reply["content"]["traceback"])
    notebook.ok("%%distribute --pull kept\npass")


def test_a_background_run_has_a_handle(notebook: Notebook) -> None:
    notebook.ok(
        "handle = get_ipython().run_cell_magic('distribute', '-b --name behind', 'run.log(x=rank)\\nx = 1 / 2')"
    )
    assert notebook.ok("handle.result(30).state").results == ["'finished'"]
    assert notebook.ok("sorted(handle.metrics()['x'])").results == ["[0.0, 1.0]"]
    notebook.ok("bad = get_ipython().run_cell_magic('distribute', '-b --name bad', 'no_such_name')")
    assert "NameError" in notebook.run("bad.result(30)").error
    notebook.ok("slow = get_ipython().run_cell_magic('distribute', '-b --name slow', 'import time; time.sleep(60)')")
    assert notebook.ok("slow.cancel()").results == ["True"]
    assert "CancelledError: run slow-" in notebook.run("slow.result(30)").error
    assert notebook.ok("slow.done(), slow.cancelled(), slow.state").results == ["(True, True, 'stopped')"]


def test_the_python_twin_does_the_same(notebook: Notebook) -> None:
    notebook.ok("import jupyter_llmcloud as lc")
    notebook.ok("result = lc.distribute('''\n\ny = rank + 5\n''', pull=['y'])")
    assert notebook.ok("result.pulled, result.state").results == ["({'y': 5}, 'finished')"]
    notebook.ok("lc.push(z=3)")
    assert notebook.ok("lc.pull('z@1')").results == ["3"]
    assert notebook.ok("lc.run.log(a=1)").results == []


def test_a_whole_script_has_its_own_process_and_arguments(notebook: Notebook) -> None:
    notebook.ok("%%distribute\nimport os\nflag = os.environ['MY_FLAG'] = 'set'")
    script = """
import os, pathlib, sys
assert "flag" not in globals() and "MY_FLAG" not in os.environ
print(rank, sys.argv[1:], "MY_FLAG" in pathlib.Path(__file__).read_text())
"""
    shown = notebook.ok(f"%%distribute --fresh --args \"--lr '3e-4 x'\" --name script{script}")
    assert shown.text.count("['--lr', '3e-4 x'] True") == 2
    assert "set" in notebook.ok("%%distribute\nprint(flag, os.environ['MY_FLAG'])").text
    assert "No closing quotation" in notebook.refused('%%distribute --args "\'"\n1')


def test_tables_of_runs_and_ranks(notebook: Notebook) -> None:
    runs = "".join(notebook.ok("%runs").results)
    assert "endless" in runs and "stopped" in runs and "behind" in runs
    world = "".join(notebook.ok("%world").results)
    assert "idle" in world
    assert "no run 'gtp'" in notebook.run("%runs show gtp").error
    assert "hello from 1" in str(notebook.ok("%runs logs first"))


def test_a_killed_rank_is_named_and_the_next_cell_says_what_is_missing(notebook: Notebook) -> None:
    shown = notebook.run("%%distribute\nimport os, signal\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)")
    assert "rank 1" in shown.error
    assert "SIGKILL" in shown.error
    text = notebook.ok("%%distribute\nprint('alive')").text
    assert re.search(r"rank 1 .*new process.*Not restored: .*kept", text)


def test_a_world_can_be_ended_and_begun_again(notebook: Notebook) -> None:
    notebook.ok("%world restart -n 3")
    assert "again 2" in notebook.ok("%%distribute\nprint('again', rank)").text
    assert re.search("-n 99.*8.*nothing was ended", notebook.run("%world restart -n 99").error)
    assert "still 2" in notebook.ok("%%distribute -n 3\nprint('still', rank)").text
    notebook.ok("%world stop")
    notebook.ok("%%distribute -n 2\nprint('back', rank)")
    notebook.ok("%world stop")
    assert "no world yet" in str(notebook.ok("%world"))


def _printed(name: str, text: str) -> bool:
    runs = [record for record in RunStore().list() if record.name == name]
    records = RunStore().folder(runs[0].run_id).records("logs") if runs else iter(())
    return sum(text in record.get("text", "") for _, record in records) == 2


def test_a_resize_says_what_new_ranks_lack_and_a_cell_that_asks_for_it_warns(notebook: Notebook) -> None:
    notebook.ok("%world start -n 2")
    guarded = '%%distribute\nimport torch\nif "model" not in globals():\n    model = torch.nn.Linear(3, 1)'
    together = '%%distribute\nif "whole" not in globals():\n    torch.distributed.barrier()\n    whole = 1'
    notebook.ok(guarded)
    notebook.ok(together)
    said = notebook.ok("%world resize 3").text
    assert re.search(r"rank 2 is a new process; 1 definition cells.*Not restored: 1 variable \(whole\)\. Made by", said)
    assert notebook.ok("%%distribute --pull model\nmodel.in_features").text.count("3") >= 1
    shown = notebook.run("%%distribute --timeout 2s\n" + together.partition("\n")[2])
    assert "Only ranks 0-1 have 'whole'" in shown.text and "ranks 2 take another way" in shown.text
    assert "Only ranks" not in notebook.ok(guarded).text
