"""A headless server of its own, with a cluster, as the command line starts one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from tests.support.worlds import until


@contextmanager
def headless_server(name: str, **options: Any) -> Iterator[ServerClient]:
    """One with a cluster of one worker; it ends with the block. `name` is of the file by which it is found."""
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path = config.runtime_dir() / f"headless-{name}.json"
    command = [sys.executable, "-P", "-m", "jupyter_llmcloud.server.headless", "--owner-pid", str(owner.pid)]
    process = subprocess.Popen([*command, "--announce", str(path)], stderr=subprocess.DEVNULL, start_new_session=True)
    told = json.loads(until(lambda: path.exists() and path.read_text(), "the server is there", 60))
    client = ServerClient(told["url"], told["token"])
    client.start_cluster(workers=1, options=options)
    yield client
    client.close()
    owner.communicate(b"")
    process.wait(timeout=60)
