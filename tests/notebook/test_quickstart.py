"""The quickstart: its model learns what it always learned, on any number of ranks, and the notebook runs as a whole."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest

from tests.support import quickstart
from tests.support.leaks import REPOSITORY
from tests.support.worlds import Ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "quickstart_losses.json"
# Between processors and versions of the libraries, float32 sums differ in their last digits; a changed model or recipe
# moves the losses by more than this.
GOLDEN_TOLERANCE = 1e-3
# One process and two add the same numbers up in another order.
RANKS_TOLERANCE = 1e-4
ALL_TEXT, LESS_TEXT = 'library.rglob("*.py")', 'library.glob("[a-d]*.py")'


def mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], dict[str, list[float]]]]:
    """The losses of the training cell as a script of one process; it runs on one core, beside what else is tested."""
    told = tmp_path_factory.mktemp("script") / "losses.json"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.quickstart", str(told)]
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL) as process:

        def losses() -> dict[str, list[float]]:
            assert process.wait(120) == 0
            return dict(json.loads(told.read_text()))

        yield losses
        process.kill()


@pytest.mark.story
@pytest.mark.usefixtures("script")
def test_two_ranks_give_the_losses_of_one_rank_with_the_doubled_batch(new_world: Callable[..., Ranks]) -> None:
    """The cell splits each global batch of 16 over the ranks: two train on 8 each, one on all 16."""
    _, body = quickstart.training_cell()
    by_size = {}
    for size in (1, 2):
        world = new_world(size)
        world.ok("import torch; torch.set_num_threads(1)")
        world.push(**quickstart.made_up_data(num_steps=3))
        outcome = world.ok(body)
        of_ranks = [outcome.values("loss", rank) for rank in range(size)]
        by_size[size] = [mean(row) for row in zip(*of_ranks, strict=True)] + outcome.values("valid_loss")
    assert len(by_size[1]) == 4
    assert by_size[2] == pytest.approx(by_size[1], abs=RANKS_TOLERANCE)


@pytest.mark.story
def test_the_quickstart_s_model_learns_as_the_golden_losses_say(script: Callable[[], dict[str, list[float]]]) -> None:
    """One process, without launcher and without this package, on a text that the test makes."""
    losses, golden = script(), json.loads(GOLDEN.read_text())
    assert losses["loss"] == pytest.approx(golden["loss"], abs=GOLDEN_TOLERANCE)
    assert losses["valid_loss"] == pytest.approx(golden["valid_loss"], abs=GOLDEN_TOLERANCE)


def test_the_training_cell_is_an_ordinary_script() -> None:
    """Nothing in it comes from this package, and nothing launches it."""
    line, body = quickstart.training_cell()
    assert line.startswith("%%distribute -n 2 --name pydoc-gpt ")
    assert "llmcloud" not in body
    assert "launch" not in body


def test_the_notebook_is_saved_without_outputs() -> None:
    notebook = nbformat.read(quickstart.NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_runs_in_a_real_server_and_nothing_of_it_stays(tmp_path: Path) -> None:
    """Shortened, with less text: from that to the endpoint's answers; what it started has ended when it returns."""
    notebook = nbformat.read(quickstart.NOTEBOOK, as_version=4)
    text_cell = next(cell for cell in notebook.cells if cell.id == "text")
    text_cell.source = text_cell.source.replace(ALL_TEXT, LESS_TEXT)
    assert LESS_TEXT in text_cell.source
    nbformat.write(notebook, tmp_path / "quickstart.ipynb")
    shutil.copy(REPOSITORY / "notebooks" / "run_quickstart.py", tmp_path)
    saved = tmp_path / "saved.ipynb"
    command = [sys.executable, str(tmp_path / "run_quickstart.py"), "--steps", "4", "--output", str(saved)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("Validation loss:", "of the bigram model:", "The endpoint's answer: The for statement"):
        assert line in done.stdout
    assert str(saved) in done.stdout
    text = saved.read_text()
    assert "sk-llmc-" not in text
    train = next(cell for cell in nbformat.reads(text, as_version=4).cells if cell.id == "train")
    shown = [output.data for output in train.outputs if output.output_type == "display_data"]
    assert any("image/svg+xml" in data.get("text/html", "") and "valid_loss" in data["text/plain"] for data in shown)


def test_the_demo_waits_for_a_server_that_has_announced_itself_but_does_not_listen_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Jupyter server does for a moment, which is long on a machine that has never run one."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "notebooks"))
    demo = importlib.import_module("run_quickstart")
    with socket.socket() as server, subprocess.Popen(["sleep", "60"]) as process:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        told = {"port": port, "url": f"http://127.0.0.1:{port}/"}
        (tmp_path / f"jpserver-{process.pid}.json").write_text(json.dumps(told))
        waits: list[float] = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            server.listen()

        monkeypatch.setattr(demo.time, "sleep", wait)
        try:
            assert demo._announced_url(process, tmp_path, tmp_path / "log") == told["url"]
        finally:
            process.kill()
    assert len(waits) == 1


FAILS = 'assert num_steps > 0, "no steps"'


def test_a_failing_cell_ends_the_script_with_an_error(tmp_path: Path) -> None:
    """Of any notebook that stands beside the script."""
    notebook = nbformat.read(quickstart.NOTEBOOK, as_version=4)
    kept = [cell for cell in notebook.cells if cell.id in ("load", "parameters", "train", "bigram")]
    next(cell for cell in kept if cell.id == "train").source = FAILS
    nbformat.write(nbformat.v4.new_notebook(cells=kept), tmp_path / "quickstart.ipynb")
    shutil.copy(REPOSITORY / "notebooks" / "run_quickstart.py", tmp_path)
    saved = tmp_path / "saved.ipynb"
    command = [sys.executable, str(tmp_path / "run_quickstart.py"), "--steps", "-1", "--output", str(saved)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"{FAILS!r} failed" in done.stderr and "AssertionError: no steps" in done.stderr
    last = nbformat.read(saved, as_version=4).cells
    assert [bool(cell.outputs) for cell in last] == [False, False, True, False]
