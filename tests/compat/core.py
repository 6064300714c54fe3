"""The core of the suite, in minutes: `python -m pytest -p tests.compat.core` runs it and nothing else.

It touches what depends on the versions of torch, accelerate, transformers, distributed and IPython: ranks and their
shell, metrics, launchers, every replaced function, resume to the last bit, Dask, a notebook, both serving engines.
"""

from __future__ import annotations

import pytest

CORE = {
    "test_patching": "",
    "test_patches": "",
    "test_typing_constructs": "",
    "test_world_cells": "",
    "test_world_accelerate": "",
    "test_resume": "final_state_is_that_of_an_undisturbed_run",
    "test_low_overhead": "",
    "test_distribute_notebook": "",
    "test_inference_engines": "",
}


def _is_core(item: pytest.Item) -> bool:
    module = item.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
    words = CORE.get(module)
    return words is not None and words in item.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of the core."""
    left_out = [item for item in items if not _is_core(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if _is_core(item)]
    missing = set(CORE) - {item.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py") for item in items}
    if missing and not config.getoption("keyword"):
        raise pytest.UsageError(f"the core names modules that no test is in: {', '.join(sorted(missing))}")
