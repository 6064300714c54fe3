"""Slurm's early signal to a batch script becomes a notice, although the script waits for the worker all the time."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from jupyter_llmcloud.cluster.kinds.slurm import PROLOGUE, with_notice
from tests.support.worlds import until

EARLY = ["--gres=gpu:4", "--signal=B:USR1@60"]
WORK = """
echo "$LLMCLOUD_PREEMPTION_NOTICE" > where
until [ -e "$LLMCLOUD_PREEMPTION_NOTICE" ]; do sleep 0.05; done
until [ -e end ]; do sleep 0.05; done
exit 7
"""


def test_only_jobs_that_are_signalled_early_have_the_prologue_and_what_was_asked_for_comes_after_it() -> None:
    asked = {"cores": 2, "job_extra_directives": EARLY, "job_script_prologue": ["module load cuda"]}
    assert with_notice(asked)["job_script_prologue"] == [*PROLOGUE, "module load cuda"]
    assert with_notice({"job_extra_directives": ["--gres=gpu:4"]}) == {"job_extra_directives": ["--gres=gpu:4"]}
    assert with_notice({"cores": 2}) == {"cores": 2}


@pytest.mark.parametrize("early", ["USR1", "USR2", "TERM"])
def test_the_signal_makes_the_file_at_once_and_the_job_ends_as_its_worker_does(tmp_path: Path, early: str) -> None:
    script = tmp_path / "job.sh"
    script.write_text("\n".join(["#!/usr/bin/env bash", *PROLOGUE, WORK]))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LLMCLOUD_")}
    job = subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=environ)
    try:
        where = tmp_path / "where"
        until(lambda: where.exists() and where.read_text().strip(), "the work begins")
        notice = Path(where.read_text().strip())
        assert not notice.exists()
        job.send_signal(getattr(signal, f"SIG{early}"))
        until(notice.exists, "the notice is there")
        job.send_signal(signal.SIGTERM)  # which the worker gets, too, and has its time for
        (tmp_path / "end").touch()
        assert job.wait(20) == 7
        assert not notice.parent.exists()
    finally:
        (tmp_path / "end").touch()
        job.kill()
        job.wait()
