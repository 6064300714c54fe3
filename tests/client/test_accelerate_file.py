"""The file of `accelerate config` beside the other options and the world that is there."""

from __future__ import annotations

import json

import pytest

from jupyter_llmcloud.client import accelerate_file
from jupyter_llmcloud.client.accelerate_file import with_content


def test_a_file_for_another_number_of_ranks_runs_on_the_world_that_is_there() -> None:
    given = {"accelerate_config": json.dumps({"distributed_type": "MULTI_GPU", "num_processes": 8})}
    assert with_content(given)[0]["nproc"] == 8
    options, notes = with_content(given, world_size=2)
    assert "nproc" not in options
    assert "num_processes 8 is not used: this world has 2 ranks. %world restart -n 8 makes another." in notes[0]


@pytest.mark.parametrize("has_gpus", [True, False], ids=["with a GPU", "without one"])
def test_that_ranks_compute_on_the_cpu_is_no_news_where_there_is_nothing_else(
    has_gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate_file, "_may_have_gpus", lambda: has_gpus)
    file = json.dumps({"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True})
    assert len(with_content({"accelerate_config": file})[1]) == has_gpus
