"""What an environment asks for is looked at before anything is started, so that it is refused in one line."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets import filesystem

MAX_RUNTIME = 72  # bytes: the path of a unix socket holds 107, and ours lie some folders below


def check() -> None:
    """Raise UsageError on a rank, and when the folders or the times that the environment names cannot be used."""
    if "jupyter_llmcloud.training.rank" in sys.modules:
        raise UsageError(
            "this is a rank: it cannot start ranks, clusters or endpoints of its own. %%distribute is the first line "
            "of a notebook's cell, and %push, %pull, %world, %runs, %cluster and %serve stand in cells without it."
        )
    if url := config.root_url():
        filesystem.check_package(url, f"{config.ENV_ROOT}={url}")
    root, runtime = config.root(), _runtime_dir()
    _check_folder(config.ENV_ROOT, root, "runs and models are kept there")
    if len(os.fsencode(runtime)) > MAX_RUNTIME:
        raise UsageError(
            f"the path of the folder for sockets is too long: {runtime} has {len(os.fsencode(runtime))} bytes, "
            f"{MAX_RUNTIME} are possible. Set {config.ENV_RUNTIME} to a shorter one, such as /tmp/llmcloud-me."
        )
    try:
        config.lease_s(0.0)
        config.leave_s()
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def _runtime_dir() -> Path:
    try:
        return config.runtime_dir()
    except PermissionError as error:
        raise UsageError(f"{error}") from None
    except OSError as error:
        raise UsageError(_refusal(config.ENV_RUNTIME, str(error.filename), error, "sockets are kept there")) from None


def _check_folder(variable: str, folder: Path, use: str) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(_refusal(variable, str(folder), error, use)) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise UsageError(_refusal(variable, str(folder), OSError(number, os.strerror(number)), use))


def _refusal(variable: str, folder: str, error: OSError, use: str) -> str:
    return f"{folder} cannot be used ({error.strerror}), but {use}. Set {variable} to a folder of your own."
