"""The record of a run whose ranks are not there yet."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.magics.session.run_start import STARTING, RunStart
from jupyter_llmcloud.storage.runs import RunRecord, RunStore


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_run_that_the_hosts_of_its_ranks_keep_elsewhere_is_told(
    own_root: Path, capsys: pytest.CaptureFixture[str], is_shared: bool
) -> None:
    folder = RunStore().folder("r-1")
    start = RunStart(folder, "r", "x = 1", RunSpec(background=True), "nobody", time.time())
    start.phase(STARTING)
    if is_shared:
        folder.write(RunRecord("r-1", "r", state="finished"))
    start.check_kept()
    said = capsys.readouterr().err
    assert (said == "") == is_shared and folder.path.exists() == is_shared
    if not is_shared:
        assert (
            f"Nothing of this run has come to {own_root}" in said and "Set LLMCLOUD_ROOT to a folder that all" in said
        )


def test_a_cell_that_found_its_ranks_has_nothing_to_look_at(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunStart(RunStore().folder("r-2"), "r", "x = 1", RunSpec(), "nobody", time.time()).check_kept()
    assert capsys.readouterr().err == ""
