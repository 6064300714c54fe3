"""Whether somebody has announced that this host, or its place in a batch system, is taken away soon.

A cloud says so in a metadata service, Slurm by a signal to the batch script (which makes a file of it), an
administrator however he likes. All of it is asked for in one way: by `LLMCLOUD_PREEMPTION_NOTICE`, every other second.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

CHECK_S = 2.0
PATIENCE_S = 5.0
_NOT_YET = {"", "false", "none", "null", "no", "0", "{}", "[]"}  # answers of a metadata service that say no
_HEADERS = {"Metadata-Flavor": "Google"}  # without which that service refuses; others do not mind


class PreemptionNotice:
    """Where a notice would be given.

    Args:
        where: a URL (that answers 200, and not just "FALSE"), the absolute path of a file (that is there), or a command
            (that ends with status 0).
    """

    def __init__(self, where: str) -> None:
        self._where = where.strip()

    async def is_given(self) -> bool:
        """Ask. What cannot be asked has given no notice."""
        if self._where.startswith(("http://", "https://")):
            return await asyncio.to_thread(self._answers)
        if self._where.startswith("/") and " " not in self._where and not _is_program(self._where):
            return Path(self._where).exists()
        return await self._succeeds()

    def _answers(self) -> bool:
        import urllib.request  # two megabytes, of an agent that mostly looks nowhere

        try:
            request = urllib.request.Request(self._where, headers=_HEADERS)
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                said = answer.read(4096).decode(errors="replace").strip().lower()
                return bool(answer.status == 200 and said not in _NOT_YET)
        except (OSError, ValueError):  # of urllib, too: 404 is how a cloud says that there is none
            return False

    async def _succeeds(self) -> bool:
        nowhere = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_shell(self._where, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await process.wait() == 0
        except TimeoutError:
            return False
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


def _is_program(path: str) -> bool:
    file = Path(path)
    return file.is_file() and bool(file.stat().st_mode & 0o111)


async def watch(where: str, tell: Callable[[bool], None], every_s: float = CHECK_S) -> None:
    """Tell when a notice is given, and when it is taken back. Returns at once where none can be given."""
    if not where.strip():
        return
    notice, is_given = PreemptionNotice(where), False
    while True:
        if await notice.is_given() != is_given:
            is_given = not is_given
            tell(is_given)
        await asyncio.sleep(every_s)
