"""One JupyterLab and one browser for the modules of this folder: starting them takes longer than most of its tests.

So each test knows its runs, clusters and endpoints by names of its own, and expects nothing of what else there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext

from tests.conftest import new_browser, own_folders
from tests.support.lab import Lab, running_lab

TOGETHER = pytest.mark.xdist_group("labextension")  # in one worker
OWN_SERVER = ("test_other_front_ends", "test_built_package")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares the JupyterLab runs in one worker."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem not in OWN_SERVER:
            item.add_marker(TOGETHER)


@pytest.fixture
def jp_asyncio_loop() -> None:
    """None of a test's own: the browser's runs in this thread."""


@pytest.fixture(scope="package")
def root() -> Iterator[Path]:
    """Where the runs and clusters of this JupyterLab are, and no others."""
    with pytest.MonkeyPatch.context() as patch, own_folders(patch) as folder:
        yield folder


@pytest.fixture(scope="package")
def notebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of notebooks."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    return folder


@pytest.fixture(scope="package")
def lab(notebooks: Path, root: Path) -> Iterator[Lab]:
    """A JupyterLab under a base URL with a space, as JupyterHub gives it to a user of such a name."""
    with running_lab(notebooks, {"ServerApp": {"base_url": "/user/ann%20lee/"}}) as running:
        yield running
        running.end_clusters()


@pytest.fixture(scope="package")
def browser(pictures: Path) -> Iterator[Browser]:
    """A headless browser."""
    yield from new_browser()


@pytest.fixture(scope="package")
def context(browser: Browser) -> BrowserContext:
    """Pages of one user, whose clipboard can be read: what JupyterLab consists of is loaded once."""
    return browser.new_context(permissions=["clipboard-read", "clipboard-write"])
