"""Ten thousand requests that Schemathesis makes of the OpenAPI document: each is answered as it says, none with a 5xx.

LLMC_EXAMPLES is how many it makes for each of the operations (1250).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from tests.bench.shell import REPOSITORY
from tests.compat.environments import NotInstalled
from tests.compat.served import fuzz, talking_server

NUM_EXAMPLES = 1250


def main() -> bool:
    """True when every answer was one of those that the document names."""
    num_examples = int(os.environ.get("LLMC_EXAMPLES", NUM_EXAMPLES))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, talking_server(Path(folder)) as served:
        try:
            done = fuzz(served, Path(folder), num_examples)
        except NotInstalled as reason:
            print(f"fuzz: not tried: {reason}")
            return True
    if done.returncode:
        log = REPOSITORY / "test-output" / "fuzz.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        print(f"fuzz: {log} tells which answers were none of those in the document")
    counted = re.findall(r"^.*(?:generated|passed|failed|found).*$", done.stdout, re.MULTILINE)
    print("fuzz: " + " ".join(line.strip() for line in counted[-4:]))
    return done.returncode == 0
