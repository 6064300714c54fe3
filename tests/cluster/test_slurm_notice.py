"""What a batch script of Slurm makes of signals: a notice, and time for the node agents to save."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jupyter_llmcloud.cluster.kinds.slurm import prologue, with_prologue
from tests.support.worlds import until

EARLY = ["--gres=gpu:4", "--signal=B:USR1@60"]
WORK = """
echo "$LLMCLOUD_PREEMPTION_NOTICE" > where
until [ -e "$LLMCLOUD_PREEMPTION_NOTICE" ]; do sleep 0.05; done
until [ -e end ]; do sleep 0.05; done
exit 7
"""


@contextlib.contextmanager
def job(folder: Path, early: str, work: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A batch script that runs, with this in its environment."""
    script = folder / "job.sh"
    script.write_text("\n".join(["#!/usr/bin/env bash", *prologue(early), work]))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LLMCLOUD_")}
    running = subprocess.Popen(["bash", str(script)], cwd=folder, env={**environ, **env})
    try:
        yield running
    finally:
        for name in ("end", "saved"):
            (folder / name).touch()
        running.kill()
        running.wait()


def test_what_was_asked_for_comes_after_the_prologue_and_only_an_early_signal_takes_the_place_of_another_notice() -> (
    None
):
    asked = {"cores": 2, "job_extra_directives": EARLY, "job_script_prologue": ["module load cuda"]}
    assert with_prologue(asked)["job_script_prologue"] == [*prologue("USR1"), "module load cuda"]
    for options in ({"job_extra_directives": ["--gres=gpu:4"]}, {"cores": 2}):
        assert with_prologue(options) == {**options, "job_script_prologue": prologue()}
    for name in ("TERM", "SIGTERM"):
        asked = {"job_extra_directives": [f"--signal=B:{name}@60"]}
        assert with_prologue(asked)["job_script_prologue"] == prologue("TERM")


@pytest.mark.parametrize(("early", "where"), [("", "http://metadata/preempted"), ("USR1", "/notice")])
def test_where_a_notice_is_looked_for(tmp_path: Path, early: str, where: str) -> None:
    work = 'echo "$LLMCLOUD_PREEMPTION_NOTICE" > where'
    with job(tmp_path, early, work, LLMCLOUD_PREEMPTION_NOTICE="http://metadata/preempted") as it:
        assert it.wait(20) == 0
    assert (tmp_path / "where").read_text().strip().endswith(where)


@pytest.mark.parametrize("early", ["USR1", "USR2", "TERM"])
def test_the_signal_makes_the_file_at_once_and_the_job_ends_as_its_worker_does(tmp_path: Path, early: str) -> None:
    with job(tmp_path, early, WORK) as running:
        where = tmp_path / "where"
        until(lambda: where.exists() and where.read_text().strip(), "the work begins")
        notice = Path(where.read_text().strip())
        assert not notice.exists()
        running.send_signal(getattr(signal, f"SIG{early}"))
        until(notice.exists, "the notice is there")
        running.send_signal(signal.SIGTERM)  # which the worker gets, too, and has its time for
        (tmp_path / "end").touch()
        assert running.wait(20) == 7
        assert not notice.parent.exists()


# What the agent is called counts, not what it does; like that it has a session of its own.
AGENT = """
exec -a python -- setsid bash -c '
trap "echo told >> said; until [ -e saved ]; do sleep 0.02; done; exit" TERM
echo $$ > agent.new; mv agent.new agent
while :; do sleep 0.02; done' x jupyter_llmcloud.agent &
until [ -e agent ]; do sleep 0.02; done
bash -c 'until [ -e end ]; do sleep 0.02; done'
exit 3
"""


@pytest.mark.parametrize("ends", ["by SIGTERM to all", "by SIGTERM to the script", "by itself"])
def test_a_job_whose_worker_has_ended_lasts_until_its_agents_have_saved(tmp_path: Path, ends: str) -> None:
    """Slurm kills what a job has started when its script ends."""
    with job(tmp_path, "", AGENT) as running:
        until((tmp_path / "agent").exists, "the agent runs")
        agent = psutil.Process(int((tmp_path / "agent").read_text()))
        (worker,) = psutil.Process(running.pid).children()
        match ends:
            case "by itself":
                (tmp_path / "end").touch()
            case "by SIGTERM to all":
                worker.terminate()
                running.terminate()
            case _:
                running.terminate()
        until((tmp_path / "said").exists, "the agent is told to end")
        assert running.poll() is None and agent.is_running()
        assert worker.is_running() is (ends == "by SIGTERM to the script")  # the agent may need its worker
        (tmp_path / "saved").touch()
        assert running.wait(20) == 3 or ends != "by itself"
        assert not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE
