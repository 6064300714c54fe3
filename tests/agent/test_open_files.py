"""The limit of open files is raised as far as the system lets a process."""

from __future__ import annotations

import resource
import subprocess
import sys

CODE = """
import resource, sys
from jupyter_llmcloud.agent.open_files import allow_many_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))
print(allow_many_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_soft_limit_becomes_the_hard_one() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    told = subprocess.run([sys.executable, "-c", CODE, str(limit)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(limit)] * 3
