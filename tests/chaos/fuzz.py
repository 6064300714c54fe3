"""Ten thousand requests that Schemathesis makes of the OpenAPI document: each is answered as it says, none with a 5xx.

What it takes is the processor time of Schemathesis, so that several processes of it share the operations. LLMC_EXAMPLES is
how many requests there are for each operation of a model (1430); what the server answers itself (files, batches, feedback)
takes a tenth of them. All that they say is in test-output/fuzz-*.log.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.shell import REPOSITORY
from tests.compat.environments import NotInstalled, python_with
from tests.compat.served import Served, fuzz, talking_server

NUM_EXAMPLES = 1430  # of seven operations; the list of models can be asked for in one way only
# The operations of each process, so that all end at about the same time, and which part of the requests each of them gets.
SHARES = (
    (("/chat/completions", "/models/{model}", "/models"), 1.0),
    (("/responses", "/completions", "/embeddings", "/tokenize", "/detokenize"), 1.0),
    (("/files", "/files/{name}", "/files/{name}/content", "/batches", "/batches/{name}", "/batches/{name}/cancel",
      "/feedback", "/responses/{response_id}", "/responses/{response_id}/input_items"), 0.1),
)  # fmt: skip


def main() -> bool:
    """True when every answer was one of those that the document names."""
    num_examples, began = int(os.environ.get("LLMC_EXAMPLES", NUM_EXAMPLES)), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            python_with("schemathesis", ["schemathesis>=4"])
        except NotInstalled as reason:
            print(f"fuzz: not tried: {reason}")
            return True
        with talking_server(Path(folder)) as served:
            ended = _fuzz_all(served, Path(folder), num_examples)
    counted = [_counted(done.stdout) for done in ended]
    num_made, num_passed = (sum(numbers) for numbers in zip(*counted, strict=True))
    took_s = time.monotonic() - began
    print(f"fuzz: {num_made} requests made of the document, {num_passed} answered as it says, in {took_s:.0f} s")
    return num_made > 0 and num_made == num_passed and not any(done.returncode for done in ended)


def _fuzz_all(served: Served, folder: Path, num_examples: int) -> list[subprocess.CompletedProcess[str]]:
    logs = REPOSITORY / "test-output"
    logs.mkdir(exist_ok=True)

    def one(number: int) -> subprocess.CompletedProcess[str]:
        paths, part = SHARES[number]
        num_each = max(1, round(part * num_examples))
        done = fuzz(served, folder / f"share-{number}", num_each, paths, num_threads=2)
        (logs / f"fuzz-{number}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            print(f"fuzz: {logs / f'fuzz-{number}.log'} tells which answers were none of those in the document")
        return done

    with ThreadPoolExecutor(len(SHARES)) as pool:
        return list(pool.map(one, range(len(SHARES))))


def _counted(output: str) -> tuple[int, int]:
    """How many requests were made, and how many of them were answered as the document says."""
    made = re.search(r"(\d+) generated", output)
    passed = re.search(r"(\d+) passed\s*(?:,|$)", output[made.start() :] if made else "", re.MULTILINE)
    return int(made[1]) if made else 0, int(passed[1]) if passed else 0
