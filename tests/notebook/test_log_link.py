"""A long output in JupyterLab: the cell stays short, a link in it opens all of it in the browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Browser

from tests.support import browser
from tests.support.lab import Lab, open_lab, running_lab

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BASE = "/user/ana@home/"
LINES = 20_000
CELLS = (
    "%load_ext jupyter_llmcloud",
    f"%%distribute -n 2 --name flood\nfor n in range({LINES}): print('<b>line</b>', n, rank)\nprint('the end')",
    "%runs logs flood",
    "import os\nos.environ['LLMCLOUD_ROOT'] = '/elsewhere'\nfrom jupyter_llmcloud.magics.output.log_link import log_url\n"
    "log_url('flood')",
    "del os.environ['LLMCLOUD_ROOT']\n%world stop\n%cluster stop",
)


@pytest.fixture
def lab(own_root: Path, tmp_path: Path) -> Iterator[Lab]:
    """A JupyterLab below a base URL, as a hub gives it."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    with running_lab(folder, {"ServerApp": {"base_url": BASE}}) as running:
        yield running


def test_a_long_output_links_to_all_of_it(chromium: Browser, lab: Lab, tmp_path: Path) -> None:
    path = browser.write_notebook(tmp_path / "notebooks" / "long.ipynb", CELLS)
    page = open_lab(chromium, lab, path.name)
    for index in range(len(CELLS)):
        output = browser.run_cell(page, index, 120)
        if index in (1, 2):
            with page.context.expect_page() as opened:
                output.locator("a").filter(has_text="full log of flood").click()
            log = opened.value
            log.wait_for_function("() => document.body.innerText.includes('the end')")
            text = log.evaluate("() => document.body.innerText")
            assert f"[1] <b>line</b> {LINES - 1} 1" in text and text.count("<b>line</b>") == 2 * LINES
            assert log.evaluate("() => document.contentType") == "text/plain"
            assert log.url.startswith(lab.url) and "token" not in log.url
            log.close()
    browser.save(page)
    _is_short_and_tells_no_secret(lab, path)
    browser.end_kernel(page)


def _is_short_and_tells_no_secret(lab: Lab, path: Path) -> None:
    saved = path.read_text(encoding="utf-8")
    assert lab.token not in saved and "token=" not in saved
    notebook = nbformat.read(path, 4)
    _, flood, logs, elsewhere, _ = notebook.cells
    assert len(json.dumps(flood, indent=1, ensure_ascii=False).encode()) < 200_000
    exported, _ = HTMLExporter().from_notebook_node(notebook)
    for cell in (flood, logs):
        (link,) = re.findall(r'href="([^"]*)"', str([out.get("data", {}).get("text/html") for out in cell.outputs]))
        assert link.startswith("/") and link.endswith("/log") and f'href="{link}"' in exported
    assert "further output is in the full log: %runs logs flood · $LLMCLOUD_ROOT/" in str(flood.outputs)
    assert elsewhere.outputs[0].data["text/plain"] == "''"  # this server would look among other runs
