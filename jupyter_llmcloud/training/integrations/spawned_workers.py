"""Workers of loaders and pools know the classes and functions of the cell, however they are started."""

from __future__ import annotations

import functools
import os
import tempfile
from multiprocessing import util
from typing import Any

from jupyter_llmcloud.system import main_by_value
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.group import own_groups
from jupyter_llmcloud.training.run import Run

_MAIN_MODULE = ("init_main_from_name", "init_main_from_path")


def install(run: Run) -> None:
    """For the processes that this one starts. Called once, in a rank."""

    def prepare(original: Any) -> Any:
        def get_preparation_data(name: str) -> dict[str, Any]:
            # A cell, and a script on a rank, is executed by its rank alone.
            return {key: value for key, value in original(name).items() if key not in _MAIN_MODULE}

        return get_preparation_data

    def replace_dump(_: Any) -> Any:
        def dump(obj: Any, file: Any, protocol: int | None = None) -> None:
            main_by_value.dump(obj, file, protocol)

        return dump

    def replace_init(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.reducer_override = main_by_value.reduce_message  # asked by its C code, where a pickler has one

        return __init__

    def have_own_groups() -> functools.partial[None]:
        return functools.partial(own_groups.install_in_child, own_groups.RankPlace(run.rank, run.world_size))

    main_by_value.call_first(have_own_groups)
    patches.SPAWNED_WORKERS.apply(
        {
            "multiprocessing.reduction:dump": replace_dump,
            "multiprocessing.reduction:ForkingPickler.__init__": replace_init,
            "multiprocessing.spawn:get_preparation_data": prepare,
        }
    )


def keep_sockets_in(folder: str) -> None:
    """The sockets by which workers hand over tensors lie in this folder. Called once, in a rank.

    Each process would make a folder among the temporary files, which it removes at its end: those that are killed do
    not, and the workers of a killed rank are. The children of a process inherit its folder.
    """
    if not folder:
        return
    os.makedirs(folder, mode=0o700, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        util.get_temp_dir()  # which keeps what it has made
    finally:
        tempfile.tempdir = before
