"""An agent is small: there is one on every host, beside what it starts."""

from __future__ import annotations

import json
import subprocess
import sys

RARE = ("urllib.request", "smtplib", "difflib", "jupyter_llmcloud.core.detect.failure_texts")
IMPORT = "import json, sys; import jupyter_llmcloud.agent.agent; print(json.dumps(sorted(sys.modules)))"


def test_what_few_runs_need_is_imported_when_one_does() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert not set(RARE) & set(json.loads(done.stdout))
