"""Late ranks, stacks and local variables as a user meets them: in a real kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from jupyter_llmcloud.client.rest import ServerClient
from tests.notebook.test_distribute_notebook import Notebook

pytestmark = [pytest.mark.story, pytest.mark.slow]


@pytest.fixture(scope="module")
def notebook(shared_server: ServerClient) -> Iterator[Notebook]:
    notebook = Notebook()
    notebook.ok("%world start -n 2")
    assert "No cell of this world has failed" in notebook.ok("%world locals").results[0]
    yield notebook
    notebook.end()


def test_the_cell_shows_who_is_late_and_that_it_goes_on(notebook: Notebook) -> None:
    shown = notebook.ok(
        "%%distribute --hang-after 2s\n"
        "import time, torch.distributed as dist\n"
        "if rank == 1:\n"
        "    time.sleep(4)\n"
        "dist.barrier()\n"
        "time.sleep(1.5)\n"
        "print('through')"
    )
    late = next(line for line in shown.text.splitlines() if "is late" in line)
    place = re.search(r"rank 1 is late: at (In \[\d+\]), line 4 \(time\.sleep\(4\)\) for", late)
    assert place, late
    assert "rank 0 waits in barrier #" in late and f"at {place[1]}, line 5. Press Stop to interrupt, or wait." in late
    assert "rank 1 goes on after" in shown.text
    assert "[0-1] through" in shown.text


def test_stacks_are_shown_while_a_background_run_goes_on(notebook: Notebook) -> None:
    notebook.ok(
        "%%distribute -b --name held\nimport time, torch.distributed as dist\n"
        "if rank == 0:\n    time.sleep(1000)\ndist.barrier()"
    )
    notebook.ok("import time; time.sleep(1.5)")
    shown = notebook.ok("%world stacks").results[0]
    assert "rank 0: running" in shown and "line 4: time.sleep(1000)" in shown
    assert "rank 1: in barrier #" in shown
    assert notebook.ok("import jupyter_llmcloud as lc\n'line 4' in str(lc.world.stacks())").results == ["True"]
    notebook.ok("lc.runs.get('held').cancel()")
    notebook.run("lc.runs.get('held').result(30)")


def test_the_local_variables_of_a_failed_line_are_shown_on_request(notebook: Notebook) -> None:
    failed = notebook.run("%%distribute\ndef divide(number, api_key):\n    return number / rank\ndivide(7, 'canary')")
    assert failed.name == "RankError"
    shown = notebook.ok("%world locals").results[0]
    assert "on rank 0" in shown.splitlines()[0] and "line 3 in divide" in shown.splitlines()[0]
    assert [line.split() for line in shown.splitlines()[1:]] == [["number", "7"], ["api_key", "***"]]
