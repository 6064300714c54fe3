"""An agent is small: there is one on every host, beside what it starts."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys

from jupyter_llmcloud.agent.runs.library_versions import LIBRARIES

RARE = ("urllib.request", "smtplib", "difflib", "jupyter_llmcloud.core.detect.failure_texts")
FOR_VERSIONS = ("email", "csv", "zipfile", "importlib.metadata")
IMPORT = """
import json, sys
from jupyter_llmcloud.agent import agent
versions = agent.library_versions()
print(json.dumps([sorted(sys.modules), versions]))
"""


def test_what_few_runs_need_is_imported_when_one_does() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    modules, versions = json.loads(done.stdout)
    assert not {*RARE, *FOR_VERSIONS} & set(modules)
    assert versions == {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in LIBRARIES if any(importlib.metadata.distributions(name=name))
    }
