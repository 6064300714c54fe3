"""The batches of a server: begun, found again after a restart, and looked up for those they belong to."""

from __future__ import annotations

import asyncio
import builtins
import shutil
import time
from typing import TYPE_CHECKING

from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.server.batches.runner import Asker, BatchRunner
from jupyter_llmcloud.server.gateway.open_requests import INFERENCE_ROUTES
from jupyter_llmcloud.storage.serving.batches import BatchFolder, BatchStore, StoredBatch
from jupyter_llmcloud.storage.serving.uploads import FileStore, StoredFile

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.audit import Audit

ADOPT_EVERY_S = 10.0
URLS = tuple(f"/v1/{route}" for route in INFERENCE_ROUTES)


class BatchRegistry:
    """What a server does for batches.

    A batch belongs to whichever server holds its lock: the one that took it, or, when that is gone, another one of the
    same user that has the endpoints which it asks.
    """

    def __init__(self, asker: Asker, audit: Audit, log: Logger) -> None:
        self.files = FileStore()
        self._store = BatchStore()
        self._asker = asker
        self._audit = audit
        self._log = log
        self._runners: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, StoredBatch] = {}
        self._adopting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go on with what a server before this one has left."""
        if self._adopting is None or self._adopting.done():
            self._adopting = asyncio.ensure_future(self._adopt())

    async def close(self) -> None:
        """The server ends: rows that are asked are given up, and asked again by the next one."""
        tasks = [*self._runners.values(), *([self._adopting] if self._adopting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- files: each belongs to who made it; a Jupyter user sees all ---

    def file(self, file_id: str, owner: str | None) -> StoredFile:
        """A file; raises NotFound, also for who may not see it. `owner` None sees all."""
        file = self.files.find(file_id)
        if owner not in (None, file.owner):
            raise NotFound(f"there is no file {file_id!r}.")
        return file

    def list_files(self, owner: str | None) -> list[StoredFile]:
        """Files, the newest first."""
        return [file for file in self.files.list() if owner in (None, file.owner)]

    # --- batches ---

    def batch(self, batch_id: str, owner: str | None) -> StoredBatch:
        """A batch; raises NotFound, also for who may not see it."""
        stored = self._running.get(batch_id) or self._store.folder(batch_id).read()
        if stored is None or owner not in (None, stored.owner):
            raise NotFound(f"there is no batch {batch_id!r}.")
        return stored

    def list(self, owner: str | None) -> list[StoredBatch]:
        """Batches, the newest first."""
        found = [self._running.get(batch.id, batch) for batch in self._store.list()]
        if any(not batch.is_over and batch.id not in self._running for batch in found):
            self.start()  # whoever worked on it may be gone
        return [batch for batch in found if owner in (None, batch.owner)]

    def create(
        self, actor: str, key_id: str | None, file_id: str, url: str, window_s: float, metadata: dict[str, str]
    ) -> StoredBatch:
        """Begin a batch; raises NotFound and UsageError. Whether its rows can be asked is found out beside that."""
        if url not in URLS:
            raise UsageError(f"endpoint {url!r:.80}: a batch can be one to {', '.join(URLS)}.")
        file = self.file(file_id, actor if key_id is not None else None)
        if file.purpose != "batch":
            raise UsageError(f"file {file_id} was made for {file.purpose}: upload the input with purpose=batch.")
        folder, now = self._store.create(), time.time()
        shutil.copyfile(self.files.path(file_id), folder.input)  # which stays when the file is deleted
        batch = StoredBatch(folder.path.name, actor, key_id, url, file_id, now, now + window_s, metadata)
        folder.save(batch)
        self._audit.tell(actor, "batch.create", batch.id, endpoint=url, input_file=file_id)
        return self._run(folder) or batch

    def cancel(self, batch_id: str, owner: str | None, actor: str) -> StoredBatch:
        """End a batch; what was answered is kept. It is cancelling when this returns."""
        batch = self.batch(batch_id, owner)
        if batch.is_over or batch.status == "finalizing":
            raise UsageError(f"batch {batch_id} is {batch.status} already.")
        folder = self._store.folder(batch_id)
        folder.request_cancel()
        batch.status = "cancelling"
        self._audit.tell(actor, "batch.cancel", batch_id)
        return batch

    def _run(self, folder: BatchFolder) -> StoredBatch | None:
        """Work on a batch from now on; None when another server does, or it is over."""
        if folder.path.name in self._runners or not folder.lock():
            return None
        batch = folder.read()  # only now: whoever held the lock may have changed it
        if batch is None or batch.is_over:
            folder.unlock()
            return None
        self._running[batch.id] = batch
        runner = BatchRunner(folder, batch, self._asker, self.files, self._tell, self._log)
        task = self._runners[batch.id] = asyncio.ensure_future(runner.run())
        task.add_done_callback(lambda task: self._over(batch.id, task))
        return batch

    def _over(self, batch_id: str, task: asyncio.Task[None]) -> None:
        self._runners.pop(batch_id, None)
        self._running.pop(batch_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("batch %s stands still until the next start of a server", batch_id, exc_info=error)

    def _tell(self, batch: StoredBatch) -> None:
        counts = {"completed": batch.num_completed, "failed": batch.num_failed, "total": batch.num_rows}
        self._audit.tell("server", "batch.end", batch.id, outcome=batch.status, **counts)

    async def _adopt(self) -> None:
        """Look for batches that nobody works on, as long as there are any."""
        while left := await asyncio.to_thread(self._unfinished):
            for batch in left:
                folder = self._store.folder(batch.id)
                is_due = time.time() > batch.expires or folder.cancel_requested
                if is_due or batch.status == "validating" or self._asker.has(batch.models):
                    self._run(folder)
            await asyncio.sleep(ADOPT_EVERY_S)

    def _unfinished(self) -> builtins.list[StoredBatch]:
        return [batch for batch in self._store.list() if not batch.is_over and batch.id not in self._runners]
