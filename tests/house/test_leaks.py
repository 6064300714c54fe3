"""The look at what a test left behind sees what it should, and cleans up after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.support import leaks

WAIT = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def snapshot(request: pytest.FixtureRequest) -> leaks.Snapshot:
    """A snapshot with a mark of its own, so that the leaks made here are not taken for the test's."""
    return leaks.Snapshot(uuid.uuid4().hex)


def _until_seen(snapshot: leaks.Snapshot) -> None:
    """A process that has just begun has no environment yet for others to read."""
    deadline = time.monotonic() + 10
    while not leaks.marked_processes(snapshot.mark):
        assert time.monotonic() < deadline, "the process never showed its mark"


def test_a_process_in_a_session_of_its_own_is_found_and_ended(snapshot: leaks.Snapshot) -> None:
    with leaks.marked(snapshot.mark):
        process = subprocess.Popen(WAIT, start_new_session=True)
    _until_seen(snapshot)
    assert [line.split(":")[0] for line in snapshot.leaks(0.0)] == [f"process {process.pid}"]
    process.wait(5)


def test_a_process_whose_parent_is_gone_is_found(snapshot: leaks.Snapshot) -> None:
    program = f"import subprocess; subprocess.Popen({WAIT!r}, start_new_session=True, stdout=-3, stderr=-3)"
    with leaks.marked(snapshot.mark):
        subprocess.run([sys.executable, "-c", program], check=True)
    _until_seen(snapshot)
    assert len(snapshot.leaks(0.0)) == 1
    assert leaks.marked_processes(snapshot.mark) == []


def test_a_forked_child_is_found_although_it_carries_no_mark(snapshot: leaks.Snapshot) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    assert [line.split(":")[0] for line in snapshot.leaks(0.0)] == [f"process {child}"]
    assert not psutil.pid_exists(child)


def test_a_child_of_what_was_started_for_the_session_is_the_sessions(snapshot: leaks.Snapshot) -> None:
    """Though it carries no mark, as a page that Chromium opens in a browser of several tests."""
    program = "import os, time\nif os.fork(): print('forked', flush=True)\nelse: os.execve('/bin/sleep', ['sleep', '60'], {})\ntime.sleep(60)"
    with leaks.marked(f"{uuid.uuid4().hex}session"):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    family = psutil.Process(process.pid).children()
    assert snapshot.leaks(0.0) == []
    leaks.end([psutil.Process(process.pid), *family])
    process.stdout.close()


def test_a_process_that_ends_within_the_grace_is_no_leak(snapshot: leaks.Snapshot) -> None:
    with leaks.marked(snapshot.mark):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert snapshot.leaks(10.0) == []
    assert process.wait(5) == 0


def test_what_the_session_owns_is_not_held_against_a_test(snapshot: leaks.Snapshot) -> None:
    with leaks.marked("owned-by-the-session"):
        process = subprocess.Popen(WAIT)
    try:
        assert snapshot.leaks(0.0) == []
    finally:
        process.kill()
        process.wait(5)


def test_a_listening_port_is_found(snapshot: leaks.Snapshot) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert snapshot.leaks(0.0) == [f"listening port 127.0.0.1:{port}"]


def test_changed_variables_are_found_and_put_back(snapshot: leaks.Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCLOUD_LEASE_S", "1000")
    monkeypatch.setenv("A_NEW_VARIABLE", "x")
    found = snapshot.leaks(0.0)
    assert [line.partition(":")[0] for line in found] == [
        "variable A_NEW_VARIABLE",
        "variable LLMCLOUD_LEASE_S",
    ]
    assert "A_NEW_VARIABLE" not in os.environ
    assert os.environ["LLMCLOUD_LEASE_S"] == snapshot.variables["LLMCLOUD_LEASE_S"]


def test_a_stray_file_is_found(snapshot: leaks.Snapshot) -> None:
    """In the home folder, which is this worker's own: beside the sources other workers would find it as well."""
    stray = Path.home() / f"stray-{uuid.uuid4().hex}"
    stray.touch()
    try:
        assert f"file {stray}" in snapshot.leaks(0.0)
    finally:
        stray.unlink()


def test_the_folders_of_the_sources_are_watched_but_not_the_sources() -> None:
    folders = leaks.watched_folders()
    assert {str(leaks.REPOSITORY / name) for name in ("", "tests", "notebooks")} <= set(folders)
    found = leaks.new_files(set())
    assert leaks.REPOSITORY / "Makefile" in found
    assert not {*found} & {leaks.REPOSITORY / "README.md", leaks.REPOSITORY / "tests" / "conftest.py", leaks.OUTPUT}
