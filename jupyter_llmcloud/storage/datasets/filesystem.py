"""Folders and files of data sets, wherever fsspec reaches: opened, listed and replaced, with errors in plain words."""

from __future__ import annotations

import contextlib
import io
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from jupyter_llmcloud.core.data.partitions import SourceFile, format_of
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError

_EXTRA = "pip install 'jupyter-llmcloud[data]'"
_MODULES = {
    "pyarrow": "pyarrow",
    "datasketch": "datasketch",
    "fsspec": "fsspec",
    "PIL": "pillow",
    "s3fs": "s3fs",
    "gcsfs": "gcsfs",
    "adlfs": "adlfs",
    "zstandard": "zstandard",
    "lz4": "lz4",
}
_VERSIONS = ("ETag", "etag", "md5Hash", "checksum", "mtime", "LastModified", "last_modified", "modified", "created")
_MARKS = ("*", "?", "[")
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
_CHUNK = 1 << 20


def require(*modules: str, what: str) -> None:
    """Raise UsageError that names the packages which `what` needs and which are not installed."""
    import importlib.util

    missing = [_MODULES.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"{what} needs {' and '.join(missing)}: {_EXTRA}.")


def check_package(url: str, what: str) -> None:
    """Raise UsageError where a URL has a protocol that nothing here speaks; nothing heavy is imported for that."""
    import importlib.util

    require("fsspec", what=what)
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    if (known := known_implementations.get(protocol)) is None:
        raise UsageError(f"{what}: {protocol!r} is no protocol that fsspec knows, such as s3, gs, hdfs.")
    package = known["class"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{what} needs {package}: pip install {package}, where ranks run, too.")


def filesystem(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """The file system of a URL or a path, and the path there. Raises UsageError where its package is missing."""
    require("fsspec", what="reading data")
    from fsspec.core import url_to_fs

    try:
        with translated(url):
            found: tuple[Any, str] = url_to_fs(url, **(options or {}))
    except ImportError as error:
        words = str(error).split(". ")[0].rstrip(".")
        raise UsageError(f"{url!r}: {words}, or {_EXTRA} for S3.") from None
    except ValueError as error:
        raise UsageError(f"{url!r} is no place that fsspec knows: {_reason(error)}.") from None
    return found


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """What a storage refuses within the block, as an error that says which URL and what to look at."""
    try:
        yield
    except LLMCloudError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"{url!r} is not there: {_reason(error)}.") from None
    except PermissionError as error:
        raise UsageError(
            f"{url!r} may not be read or written: {_reason(error)}. Check the key and its rights "
            "(storage_options={'key': ..., 'secret': ...}, or the environment of the workers)."
        ) from None
    except (IsADirectoryError, NotADirectoryError, OSError) as error:
        raise UsageError(f"{url!r} cannot be reached: {_reason(error)}.") from None
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UsageError(
            f"{url!r} cannot be reached: its storage does not know an option of storage_options: {_reason(error)}."
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp", "google", "azure", "gcsfs")):
            raise
        raise UsageError(
            f"{url!r} cannot be reached: {_reason(error)}. Check the key, the endpoint and the region "
            "(storage_options=..., or the environment of the workers)."
        ) from None


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().rstrip(".")


def join(url: str, *parts: str) -> str:
    """A URL below another one."""
    return "/".join([url.rstrip("/"), *parts])


# --- files of ours --------------------------------------------------------------------------------------------------


def read_bytes(url: str, options: Mapping[str, Any] | None = None) -> bytes:
    """All of a file. Raises NotFound, UsageError."""
    fs, path = filesystem(url, options)
    with translated(url):
        content: bytes = fs.cat_file(path)
    return content


def replace(url: str, content: bytes, options: Mapping[str, Any] | None = None) -> None:
    """Write a file that is there whole or not at all, also for whoever reads meanwhile."""
    with _aside(url, options) as (fs, staged):
        fs.pipe_file(staged, content)


def scratch() -> io.BufferedRandom:
    """A file for what is put somewhere later. It has no name, so that nothing of it is left whoever is killed."""
    return tempfile.TemporaryFile(prefix="llmcloud-")


def put(file: IO[bytes], url: str, options: Mapping[str, Any] | None = None) -> None:
    """Copy an open file to its place, where it is whole or not at all, also when two processes write it."""
    with _aside(url, options) as (fs, staged), fs.open(staged, "wb") as target:
        file.seek(0)
        shutil.copyfileobj(file, target, _CHUNK)


@contextlib.contextmanager
def _aside(url: str, options: Mapping[str, Any] | None) -> Iterator[tuple[Any, str]]:
    """A file system and the path of a file there that is renamed to its place in the end; each writer has its own."""
    fs, path = filesystem(url, options)
    staged = f"{path}.{secrets.token_hex(4)}.part"
    with translated(url):
        if not _is_object_store(fs):  # no folders: what would be made is a bucket
            fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        try:
            yield fs, staged
            _move(fs, staged, path)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(staged)
            raise


def _move(fs: Any, source: str, target: str) -> None:
    """Rename a file over another one, if there is one."""
    if "file" in _protocols(fs):
        import os

        os.replace(source, target)
        return
    if not _is_object_store(fs):  # there a copy takes the place of what is there at once
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(target)
    if any(mark in source for mark in _MARKS):  # which mv() would match
        fs.cp_file(source, target)
        fs.rm_file(source)
    else:
        fs.mv(source, target)


def _is_object_store(fs: Any) -> bool:
    return not _OBJECT_STORES.isdisjoint(_protocols(fs))


def _protocols(fs: Any) -> Sequence[str]:
    return [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)


def remove_files(url: str, names: Sequence[str], options: Mapping[str, Any] | None = None) -> None:
    """Remove files of a folder, and the folder itself if nothing else is in it."""
    fs, path = filesystem(url, options)
    paths = [f"{path}/{name}" for name in names]
    with translated(url):
        in_bulk = _is_object_store(fs) and not any(mark in path for mark in _MARKS)  # which rm() would match
        if in_bulk and paths:
            fs.rm(paths)
        for each in () if in_bulk else paths:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(each)
        fs.invalidate_cache()
        if not _is_object_store(fs) and fs.exists(path) and not fs.ls(path, detail=False):
            fs.rmdir(path)


def names_in(url: str, options: Mapping[str, Any] | None = None) -> dict[str, int]:
    """The sizes of the files in a folder by their names; empty when there is no such folder."""
    fs, path = filesystem(url, options)
    with translated(url):
        fs.invalidate_cache()
        if not fs.exists(path):
            return {}
        rows = fs.ls(path, detail=True, refresh=True) if "s3" in _protocols(fs) else fs.ls(path, detail=True)
        return {row["name"].rsplit("/", 1)[-1]: int(row["size"] or 0) for row in rows if row["type"] == "file"}


# --- files of a source ----------------------------------------------------------------------------------------------


def list_source(
    sources: Sequence[str],
    kind: str = "auto",
    options: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
) -> tuple[str, list[SourceFile]]:
    """The format of a source and its files, in order: those of each URL, path, folder or glob by name.

    Args:
        without: what is no source: files and folders to which prepared data is written.

    Raises:
        NotFound: there is nothing at one of them.
        UsageError: no format can be told, or several; or a source lies in `without`.
    """
    files: dict[str, SourceFile] = {}
    written = [_as_listed(*filesystem(url, options)) for url in without]
    below = tuple(f"{url}/" for url in written)
    for source in sources:
        listed = _list(source, options)
        found = [file for file in listed if file.url not in written and not file.url.startswith(below)]
        if not found:
            raise UsageError(
                f"{source!r} is where the prepared data itself is written ({listed[0].url!r}). Choose another "
                "folder for it: --out URL (out=)."
            )
        if kind != "auto" and any(mark in source for mark in _MARKS) is False and len(found) > 1:
            found = [file for file in found if format_of(file.name) in (kind, None)] or found
        files |= {file.url: file for file in found}
    if not files:
        raise NotFound(f"there is nothing to prepare: {', '.join(sources) or 'no source was given'}.")
    _refuse_arrow(files.values())
    kinds = {file.url: format_of(file.name) for file in files.values()}
    if kind == "auto":
        known = {found for found in kinds.values() if found is not None}
        if len(known) != 1:
            told = " and ".join(sorted(known)) if known else f"{next(iter(files))!r}, whose name tells none"
            raise UsageError(
                f"the format of the source is not clear: there is {told}. Say it: format='text', 'jsonl', 'csv', "
                "'parquet' or 'images'; files of other formats in a folder are then left out."
            )
        kind = known.pop()
    if sum(file.size for file in files.values()) == 0:
        raise UsageError(f"the source is empty: all {len(files)} of its files have no content ({next(iter(files))!r}).")
    return kind, [file for file in files.values() if file.size]


def _refuse_arrow(files: Iterable[SourceFile]) -> None:
    """Beside Arrow files `datasets` writes JSON about them, which would be taken for the rows."""
    arrow = next((file.url for file in files if file.name.endswith((".arrow", ".feather"))), None)
    if arrow is not None:
        raise UsageError(
            f"{arrow!r} is an Arrow file, as save_to_disk() of Hugging Face's datasets writes them, and no format that "
            "is prepared. Write it as Parquet, load_from_disk(FOLDER).to_parquet('rows.parquet'), and prepare that; or "
            "hand the data set itself to lc.data.load()."
        )


def _list(source: str, options: Mapping[str, Any] | None) -> list[SourceFile]:
    fs, path = filesystem(source, options)
    with translated(source):
        fs.invalidate_cache()
        if any(mark in path for mark in _MARKS) and not fs.exists(path):  # names may have brackets of their own
            found = fs.glob(path, detail=True)
            if not (rows := [row for row in found.values() if row["type"] == "file"]):
                raise NotFound(f"{source!r} matches no file.")
        elif fs.isfile(path):
            rows = [fs.info(path)]
        else:
            rows = [row for row in fs.find(path, detail=True).values() if _is_visible(row["name"], path)]
            if not rows:
                raise NotFound(f"{source!r} is not there, or is a folder without files.")
    listed = [SourceFile(_as_listed(fs, row["name"]), int(row["size"] or 0), _version(row)) for row in rows]
    return sorted(listed, key=lambda file: file.url)


def _as_listed(fs: Any, path: str) -> str:
    """The URL of a file there, as it is kept; on this host its path."""
    return path if "file" in _protocols(fs) else str(fs.unstrip_protocol(path))


def _is_visible(name: str, folder: str) -> bool:
    below = name[len(folder) :] if name.startswith(folder) else name
    return not any(part.startswith((".", "_")) for part in below.split("/") if part)


def _version(row: Mapping[str, Any]) -> str:
    for name in _VERSIONS:
        if row.get(name):
            return str(row[name]).strip('"')
    return ""
