"""What a user sees of metrics, queues and hangs: in a real kernel, on real ranks, read as it would be saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.storage.runs import RunStore

pytestmark = [pytest.mark.story, pytest.mark.slow]

CELLS = {
    "load": "%load_ext jupyter_llmcloud\nimport jupyter_llmcloud as lc, time",
    "twice": """
        %%distribute -n 2 --name twice
        run.log(eval_loss=0.05, step=16)
        run.log(eval_loss=0.003 + rank * 0.002, step=16)
        """,
    "nan": """
        %%distribute --name nan
        for step in range(100):
            run.log({"loss": float("nan") if step >= 60 else 1.41 - rank * 0.01, "only": 1.0 * step} if rank == 0 else
                    {"loss": float("inf") if step >= 70 else 1.40}, step=step)
        import warnings
        warnings.warn("mind the gap")
        """,
    "background": "%%distribute -b --name held\nimport time\nfor n in range(40):\n    run.log(x=n); time.sleep(0.1)",
    "queued": "%%distribute --name behind\nprint('its turn')",
    "late": "%%distribute --name late --hang-after 1s --timeout 8s\n"
    "import torch.distributed as dist\nif rank == 1: time.sleep(60)\ndist.barrier()",
    "runs": "%runs",
    "show nan": "%runs show nan",
    "show late": "%runs show late",
    "records": "lc.runs.get('nan').metrics()['loss'].isna().sum()",
}


def source_of(name: str) -> str:
    return "\n".join(line.removeprefix(" " * 8) for line in CELLS[name].strip("\n").split("\n")).rstrip()


@pytest.fixture(scope="module")
def cells(shared_server: ServerClient) -> Iterator[dict[str, NotebookNode]]:
    """The cells by name, with the outputs that were saved."""
    notebook = new_notebook(cells=[new_code_cell(source_of(name)) for name in CELLS])
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    yield dict(zip(CELLS, notebook.cells, strict=True))


def text(cell: NotebookNode) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def view(cell: NotebookNode) -> dict[str, str]:
    """The one display of a cell, as it reads without the server: the panel's own form only names the run."""
    (found,) = [out.data for out in cell.outputs if out.output_type in ("display_data", "execute_result")]
    return {mime: form for mime, form in found.items() if mime.startswith("text/")}


def record_of(name: str) -> dict[str, Any]:
    path = RunStore().find(name).path / "run.json"
    return dict(json.loads(path.read_text()))


def test_the_last_value_at_a_step_is_shown_as_a_mean_with_that_of_each_rank(cells: dict[str, NotebookNode]) -> None:
    shown = view(cells["twice"])
    for form in shown.values():
        assert "0.004" in form and "mean of 2 ranks" in form and "rank 0: 0.003 · rank 1: 0.005" in form
        assert "0.0265" not in form and "0.05" not in form


def test_a_loss_that_becomes_nan_is_said_wherever_its_run_is(cells: dict[str, NotebookNode]) -> None:
    for cell in ("nan", "show nan"):
        for form in view(cells[cell]).values():
            assert "⚠ loss is NaN since step 60" in form
            assert "rank 0: NaN · rank 1: infinite" in form
            assert "70 not finite, first at step 60" in form
    assert re.search(r"nan .*loss NaN since step 60", view(cells["runs"])["text/plain"])
    assert record_of("nan")["not_finite"] == {"loss": {"count": 70, "first": 60, "since": 60}}
    values = [entry["values"]["loss"] for _, entry in RunStore().find("nan").records("metrics")]
    assert sum(value != value for value in values) == 40 and values.count(float("inf")) == 30


def test_a_run_is_shown_with_its_charts_and_warnings(cells: dict[str, NotebookNode]) -> None:
    shown = view(cells["show nan"])
    assert shown["text/html"].count("<img") == 2
    for form in shown.values():
        assert form.count("ranks 0-1: ") == 1 and form.count("UserWarning: mind the gap") == 1


def test_a_run_in_the_background_shows_a_card_and_a_queued_cell_says_so(cells: dict[str, NotebookNode]) -> None:
    card = view(cells["background"])
    assert "✓ held · finished in" in card["text/plain"] and "<img" in card["text/html"]
    assert text(cells["queued"]).startswith("queued: waits for held-")
    assert "its turn" in text(cells["queued"])
    assert re.search(r"✓ behind · finished in 0\.\d s|finished in [0-3]\.\d s", view(cells["queued"])["text/plain"])


def test_a_hang_is_printed_once_and_nobody_is_asked_to_stop_what_is_over(cells: dict[str, NotebookNode]) -> None:
    outputs = json.dumps([out.get("data", out.get("text", "")) for out in cells["late"].outputs], ensure_ascii=False)
    assert outputs.count("is late: ") == 1, outputs
    assert "Press Stop" not in "".join(view(cells["late"]).values())
    shown = view(cells["show late"])
    for form in shown.values():
        assert "rank 1 is late: " in form and "Press Stop" not in form


def test_a_card_whose_run_ends_between_two_cells_is_saved_as_it_ended(
    shared_server: ServerClient, tmp_path: Path
) -> None:
    end = tmp_path / "end"
    wait = f"import pathlib, time\nrun.log(x=1.0)\nwhile not pathlib.Path({str(end)!r}).exists():\n    time.sleep(0.05)"
    background = new_code_cell(f"%%distribute -n 2 -b --name between\n{wait}")
    cells = [new_code_cell(CELLS["load"]), background, new_code_cell("pass")]
    client = NotebookClient(new_notebook(cells=cells), timeout=120, kernel_name="python3")
    with client.setup_kernel():
        client.execute_cell(cells[0], 0)
        client.execute_cell(background, 1)
        end.touch()
        assert client.kc is not None
        next_message = run_sync(client.kc.get_iopub_msg)
        while (message := next_message(timeout=30))["msg_type"] != "update_display_data":
            pass  # of the widget
        assert "✓ between" in message["content"]["data"]["text/plain"]
        client.execute_cell(cells[2], 2)
    assert "✓ between · finished in" in view(background)["text/plain"]
