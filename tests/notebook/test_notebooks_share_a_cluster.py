"""Notebooks of one server share the slots of a cluster: who holds them is said, and nobody's variables are lost."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.notebook_server import NotebookServer, notebook_server
from tests.support.worlds import until

pytestmark = pytest.mark.slow

LEASE_S = 600.0
GRACE_S = 10.0


@pytest.fixture(scope="module")
def server(module_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookServer]:
    """With a cluster of four slots, and the long lease that notebooks have outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCLOUD_LEASE_S", str(LEASE_S))
        with notebook_server(tmp_path_factory.mktemp("server") / "project") as server:
            starts = server.open("starts.ipynb")
            starts.ok("%cluster start slots=4")
            starts.shut_down()
            yield server


@pytest.fixture(autouse=True)
def _every_slot_is_given_back(server: NotebookServer) -> Iterator[None]:
    yield
    for world in server.worlds():
        server.ask("DELETE", f"llmcloud/api/worlds/{world['world_id']}")
    for session in server.ask("GET", "api/sessions"):
        server.ask("DELETE", f"api/sessions/{session['id']}")


@pytest.mark.soak
def test_a_restart_for_more_slots_than_there_are_ends_nothing_and_names_who_has_them(server: NotebookServer) -> None:
    first, second = server.open("first.ipynb"), server.open("second.ipynb")
    first.ok("%%distribute -n 2\nkept = 7 + rank")
    second.ok("%%distribute -n 2\nother = 1")
    refused = first.run("%world restart -n 4", timeout_s=20)
    [theirs] = [world for world in server.worlds() if world["holder"] == "project/second.ipynb"]
    assert f"2 ranks of project/second.ipynb (world {theirs['world_id']})" in refused.error
    assert "2 of 4 slots" in refused.error and "nothing was ended" in refused.error
    assert "%world stop" in refused.error
    assert sorted(first.ok("%%distribute\nkept").text.splitlines()) == ["Out[0]: 7", "Out[1]: 8"]

    rows = first.ok("%world list").results[0].splitlines()
    assert any("this notebook" in row and " idle " in row for row in rows)
    assert any("project/second.ipynb" in row and theirs["world_id"] in row for row in rows)
    assert str(server.folder) not in "".join(rows)

    first.ok("%world restart -n 2")  # its own slots count as free
    said = first.ok("%world stop second.ipynb").text
    assert "Ended the world" in said and "2 ranks and their variables are gone" in said
    first.ok("%world restart -n 4")
    assert len(first.ok("%%distribute\nrank").text.splitlines()) == 4


@pytest.mark.story
def test_who_waits_for_slots_is_no_error_in_the_log_of_the_server(server: NotebookServer) -> None:
    first, second = server.open("first.ipynb"), server.open("second.ipynb")
    before = len(server.log.read_text())
    first.ok("%%distribute -n 4\nx = 1")
    began = time.monotonic()
    second.begin("%%distribute -n 2\nprint('has', 'come')")
    heard = second.shown_so_far()
    until(lambda: "Waiting for free slots" in _more(heard, second), "it says that it waits")
    assert "4 ranks of project/first.ipynb" in heard.text
    until(lambda: time.monotonic() - began > 3, "it has asked several times", 10)
    first.ok("%world stop")
    until(lambda: "has come" in _more(heard, second), "it has its ranks", 60)
    assert heard.text.count("Waiting for free slots") == 1
    log = server.log.read_text()[before:]
    assert not re.findall(r"^\[W .*(?:40\d|placement).*$", log, re.MULTILINE)


def _more(heard: object, notebook: object) -> str:
    more = notebook.shown_so_far()  # type: ignore[attr-defined]
    heard.text += more.text  # type: ignore[attr-defined]
    return str(heard.text)  # type: ignore[attr-defined]


@pytest.mark.story
def test_a_notebook_that_is_shut_down_gives_its_ranks_back_and_a_restarted_one_keeps_them(
    server: NotebookServer,
) -> None:
    first, second = server.open("first.ipynb"), server.open("second.ipynb")
    first.ok("%%distribute -n 2\nkept = 7 + rank")
    second.ok("%%distribute -n 1\nother = 1")
    [kept] = [world for world in server.worlds() if world["holder"] == "project/first.ipynb"]
    second.ok("%%distribute -b --name goes-on\nimport os, time\nwhile not os.path.exists('let-go'): time.sleep(0.02)")
    [busy] = [world for world in server.worlds() if world["holder"] == "project/second.ipynb"]

    first.restart()
    second.shut_down()
    shown = first.ok("%%distribute\nkept")
    assert "was still there" in shown.text and "Out[0]: 7" in shown.text
    [row] = [world for world in server.worlds() if world["world_id"] == busy["world_id"]]
    assert row["state"].startswith("executes goes-on")  # a run in the background is seen through

    first.shut_down()
    server.until_gone(kept["world_id"], GRACE_S + 5)
    assert busy["world_id"] in [world["world_id"] for world in server.worlds()]
    (server.folder / "let-go").touch()
    server.until_gone(busy["world_id"], GRACE_S + 5)
    again = server.open("first.ipynb")
    assert "NameError" in again.run("%%distribute -n 2\nkept").error
    third = server.open("third.ipynb")
    third.ok("%%distribute -n 1\nx = 3")
    third.shut_down()
    found = server.open("third.ipynb").ok("%%distribute\nx")  # opened again at once
    assert "Out: 3" in found.text
