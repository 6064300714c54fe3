"""An endpoint that follows a run: the model of each new checkpoint is served, and in the end the one it has saved."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jupyter_llmcloud.errors import LLMCloudError, ModelError, NotFound
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.storage.models import followed_model

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.storage.runs import RunFolder

EVERY_S = 1.0
LAST_TRIES = 60  # to serve the last model of a run, where a disk refuses it


@dataclass(frozen=True)
class RunModel:
    """The newest model of a run; `step` is None for the one that it has saved, and `is_final` when none will follow."""

    folder: Path
    step: int | None
    is_final: bool


def newest_model(run: RunFolder, than: int | None = None) -> RunModel | None:
    """The newest model of a run, when it is of a later step `than` that; None when there is none yet.

    Raises ModelError when a checkpoint cannot be served, or when a run has ended and left nothing.
    """
    record = run.read()
    saved = record.artifacts.get("model")
    if not record.is_active and saved:
        return RunModel(run.path / saved, None, True)
    newest, _ = CheckpointFolder(run.path / "checkpoints").newest()
    if newest is None or (than is not None and newest.step <= than):
        if newest is None and not record.is_active:
            raise ModelError(f"run {record.name!r} has {record.state} without a checkpoint or a saved model.")
        return None
    return RunModel(followed_model.make(run.path, newest), newest.step, not record.is_active)


class FollowedRun:
    """Looks at a run, and hands on each new model of it.

    Args:
        run: the run.
        serve: has the endpoint serve a model.
        serving: the step and the folder that are served now; None while the last model is on its way to the replicas,
            which would else be replaced before they have begun to answer.
    """

    def __init__(
        self,
        run: RunFolder,
        serve: Callable[[RunModel], Awaitable[None]],
        serving: Callable[[], tuple[int | None, Path] | None],
        log: Logger,
    ) -> None:
        self._run = run
        self._serve = serve
        self._serving = serving
        self._log = log
        self._tried: Path | None = None  # which may have been withdrawn, or rolled back, since: it is not served again

    async def follow(self) -> str:
        """Until the run has ended and its last model is served; returns what became of it."""
        said, num_tries = "", 0
        while True:
            if (now := self._serving()) is None:
                await asyncio.sleep(EVERY_S)
                continue
            # Asked first: what ends while its model is looked for has left one that was not seen.
            is_active = await asyncio.to_thread(self._is_active)
            try:
                newer = await self._serve_newer(*now)
                if newer is not None and newer.is_final:
                    return "the run has ended"
                if newer is None and not is_active:
                    return "the run has ended without a saved model"
            except (LLMCloudError, OSError) as error:
                if str(error) != said:
                    said = str(error)
                    self._log.warning("following run %s: %s", self._run.run_id, error)
                num_tries += not is_active
                if not is_active and (isinstance(error, LLMCloudError) or num_tries >= LAST_TRIES):
                    return f"the run has ended: {error}"
            await asyncio.sleep(EVERY_S)

    async def _serve_newer(self, step: int | None, folder: Path) -> RunModel | None:
        """Have the newest model served, unless it is or has been; returns it when it is newer."""
        newer = await asyncio.to_thread(newest_model, self._run, step)
        if newer is not None and newer.folder not in (folder, self._tried):
            await self._serve(newer)
            self._tried = newer.folder
            await asyncio.to_thread(followed_model.retain, self._run.path, {newer.folder, folder})
        return newer

    def _is_active(self) -> bool:
        try:
            return self._run.read().is_active
        except NotFound:
            return False
        except OSError:  # that it has ended is not known
            return True
