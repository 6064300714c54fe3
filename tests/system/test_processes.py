"""A process that was started for a while ends with the one that has started it; one may have many files open."""

from __future__ import annotations

import os
import resource
import select
import subprocess
import sys
from pathlib import Path

PARENT = """\
import os, subprocess, sys, time
alive, _kept = os.pipe()
command = [sys.executable, "-c", sys.argv[2], str(alive), sys.argv[1]]
subprocess.Popen(command, pass_fds=[alive], start_new_session=True)
time.sleep(600)
"""
# Starts another process in turn; both hold the pipe to the test open for as long as they live.
CHILD = """\
import subprocess, sys, time
from pathlib import Path
from jupyter_llmcloud.system.processes import end_with_parent
end_with_parent(int(sys.argv[1]), Path(sys.argv[2]))
subprocess.Popen(["sleep", "600"])
print("ready", flush=True)
time.sleep(600)
"""


def test_a_killed_parent_takes_its_processes_and_their_folder_along(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "request.json").write_text("{}")
    command = [sys.executable, "-c", PARENT, str(folder), CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        assert select.select([parent.stdout], [], [], 60)[0] and os.read(parent.stdout.fileno(), 1) == b""
    assert not folder.exists()


RAISES_LIMIT = """
import resource, sys
from jupyter_llmcloud.system.processes import allow_many_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))
print(allow_many_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_soft_limit_becomes_the_hard_one() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    told = subprocess.run([sys.executable, "-c", RAISES_LIMIT, str(limit)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(limit)] * 3
