"""Runs at the URL that a root stands for: copied there while they go on, fetched from there where they are not.

    <url>/runs/<run-id>/                       as the run's folder (see storage.runs), and
                        checkpoints/step-<n>/manifest.json   written last and deleted first: without it none counts

What is written again and again stays on the disk of whoever writes it: a journal cannot be appended to in an object
store. `<root>/root.json` tells of which URL a root is the local part.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.checkpoints import MANIFEST
from jupyter_llmcloud.storage.datasets.filesystem import filesystem, join, translated
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore
from jupyter_llmcloud.system.atomic_files import publish_folder

RECORD = "run.json"  # written last: a folder with a record is complete
CHECKPOINTS = "checkpoints"
NAMES = ("cell.py", "marks.jsonl", "times.json")
FOLDERS = ("metrics", "logs", "model", "serving")
_STEP = "step-"
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "adl", "oss"}  # no folders: what would be made is a bucket


@contextlib.contextmanager
def _unless_gone(path: Path) -> Iterator[None]:
    """A file that is deleted here meanwhile is not copied; one that finds no place there is an error."""
    try:
        yield
    except FileNotFoundError:
        if path.exists():
            raise


class RunCopy:
    """The copy of one run.

    Args:
        folder: of the run.
        url: where its copy is, of the run itself.
    """

    def __init__(self, folder: RunFolder, url: str) -> None:
        self.url = url
        self._folder = folder
        self._fs, self._path = filesystem(url)
        self._is_bucket = url.partition("://")[0] in _BUCKETS
        self._sent: dict[str, tuple[int, int]] = {}  # time and size of each file as it was sent last
        self._steps: set[str] | None = None  # the complete checkpoints that are there

    # --- there ---

    def send_checkpoints(self) -> bool:
        """Copy those that are complete and not there yet, delete those that are not kept here; whether any was sent."""
        with translated(self.url):
            if self._steps is None:
                self._steps = set(self._complete())
            here = self._committed()
            new = [path for path in here if path.name not in self._steps]
            for path in new:
                with _unless_gone(path):  # not kept any longer: a newer one is there
                    self._send_checkpoint(path)
            for name in self._steps - {path.name for path in here} if here else ():
                self._remove_checkpoint(name)
        return bool(new)

    def send_files(self) -> None:
        """Copy everything else that has changed since it was sent last."""
        with translated(self.url):
            for path in self._files():
                with _unless_gone(path):
                    self._send_changed(path)

    def _files(self) -> Iterator[Path]:
        here = self._folder.path
        yield from (here / name for name in NAMES if (here / name).exists())
        for folder in FOLDERS:
            yield from (path for path in sorted((here / folder).rglob("*")) if path.is_file())
        yield from (path for path in [here / RECORD] if path.exists())

    def _send_changed(self, path: Path) -> None:
        name, about = path.relative_to(self._folder.path).as_posix(), path.stat()
        version = (about.st_mtime_ns, about.st_size)
        if self._sent.get(name) != version:
            self._put(path, name)
            self._sent[name] = version

    def _committed(self) -> list[Path]:
        """The newest first: it is what a crash now would go back to."""
        found = [path for path in (self._folder.path / CHECKPOINTS).glob(f"{_STEP}*") if (path / MANIFEST).exists()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(_STEP)), reverse=True)

    def _send_checkpoint(self, path: Path) -> None:
        assert self._steps is not None
        files = [file for file in sorted(path.iterdir()) if file.name != MANIFEST]
        for file in [*files, path / MANIFEST]:
            self._put(file, f"{CHECKPOINTS}/{path.name}/{file.name}")
        self._steps.add(path.name)

    def _remove_checkpoint(self, name: str) -> None:
        assert self._steps is not None
        folder = f"{self._path}/{CHECKPOINTS}/{name}"
        self._fs.rm_file(f"{folder}/{MANIFEST}")
        self._fs.rm(folder, recursive=True)
        self._steps.discard(name)

    def _put(self, path: Path, name: str) -> None:
        target = f"{self._path}/{name}"
        if not self._is_bucket:
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._fs.put_file(str(path), target)

    # --- back ---

    def _complete(self) -> list[str]:
        """The names of the complete checkpoints that are there, the newest first."""
        self._fs.invalidate_cache()
        found = self._fs.glob(f"{self._path}/{CHECKPOINTS}/{_STEP}*/{MANIFEST}")
        names = [str(path).rsplit("/", 2)[-2] for path in found]
        return sorted(names, key=lambda name: int(name.removeprefix(_STEP)), reverse=True)

    def read_record(self) -> RunRecord:
        """The record of the copy. Raises NotFound."""
        with translated(self.url):
            told = json.loads(self._fs.cat_file(f"{self._path}/{RECORD}"))
        return RunRecord(**{key: value for key, value in told.items() if key in RunRecord.__dataclass_fields__})

    def fetch(self) -> None:
        """Have all of it here but older checkpoints. Raises NotFound, UsageError."""
        record = self.read_record()
        if record.is_active:
            where = f"it was {record.state} elsewhere when it was copied to {self.url}"
            record.state = "lost"
            record.history = [*record.history, {"t": record.created, "state": "lost", "why": where}]
        self._folder.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetched-", dir=self._folder.path.parent) as staging:
            with translated(self.url):
                self._get(Path(staging))
            RunFolder(Path(staging)).write(record)
            Path(staging).chmod(0o700)
            publish_folder(Path(staging), self._folder.path, durable=False)  # what is here stays until all is here
            Path(staging).mkdir()  # to be removed

    def _get(self, staging: Path) -> None:
        newest = [f"{CHECKPOINTS}/{name}/" for name in self._complete()[:1]]
        for path in self._fs.find(self._path):
            name = str(path)[len(self._path) :].lstrip("/")
            if name == RECORD or (name.startswith(f"{CHECKPOINTS}/") and not name.startswith(tuple(newest) or "\0")):
                continue
            if ".." in name.split("/"):
                raise UsageError(f"{self.url} holds a file {name!r}, which is in no folder of a run.")
            (staging / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fs.get_file(path, str(staging / name))


def find(store: RunStore, name: str) -> RunFolder:
    """The run of this id or name: here, else at the URL of the root, from where it is fetched. Raises NotFound."""
    try:
        return store.find(name)
    except NotFound:
        if not store.url:
            raise
    return fetch(store, name)


def is_fetched(store: RunStore, name: str) -> bool:
    """Whether a run that is not here was at the URL of the root, and is here now. Raises UsageError."""
    if not store.url or not NAME_PATTERN.fullmatch(name):
        return False
    with contextlib.suppress(NotFound):
        return not store.find(name).exists
    with contextlib.suppress(NotFound):
        return fetch(store, name).exists
    return False


def fetch(store: RunStore, name: str) -> RunFolder:
    """Have a run here that is at the URL of the root, in place of what is here of it. Raises NotFound, UsageError."""
    if not store.url:
        raise UsageError("the runs here are no copies: LLMCLOUD_ROOT is a folder, not a URL.")
    run_id = _id_of(store.url, name)
    folder = store.folder(run_id)
    if folder.exists and folder.read().is_active:
        raise UsageError(f"run {run_id!r} goes on here: stop it first (%runs stop {run_id}).")
    RunCopy(folder, run_url(store.url, run_id)).fetch()
    return folder


def run_url(url: str, run_id: str) -> str:
    """Where the copy of a run is."""
    return join(url, "runs", run_id)


def _id_of(url: str, name: str) -> str:
    """The id of the run with this id, else of the newest with this name."""
    fs, path = filesystem(join(url, "runs"))
    with translated(url):
        fs.invalidate_cache()
        ids = [str(found).rstrip("/").rsplit("/", 1)[-1] for found in (fs.ls(path, False) if fs.exists(path) else ())]
    if name in ids:
        return name
    found: list[tuple[float, str]] = []
    for run_id in filter(NAME_PATTERN.fullmatch, ids):
        with contextlib.suppress(NotFound, ValueError, TypeError):
            record = _record(url, run_id) if run_id.startswith(name) else None
            found += [(record.created, run_id)] if record is not None and record.name == name else []
    if not found:
        raise NotFound(f"there is no run {name!r}, neither here nor at {url}.")
    return max(found)[1]


def _record(url: str, run_id: str) -> Any:
    return RunCopy(RunFolder(Path(run_id)), run_url(url, run_id)).read_record()
