"""A long output in JupyterLab: the cell stays short, a link in it opens all of it in the browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import BrowserContext

from tests.support import browser
from tests.support.lab import Lab, open_lab

pytestmark = [pytest.mark.story, pytest.mark.browser, pytest.mark.slow]

LINES = 6_000
CELLS = (
    "%load_ext jupyter_llmcloud",
    f"%%distribute -n 2 --name flood\nfor n in range({LINES}): print('<b>line</b>', n, rank)\nprint('the end')",
    "%runs logs flood",
    "import os\nos.environ['LLMCLOUD_ROOT'] = '/elsewhere'\nfrom jupyter_llmcloud.magics.output.log_link import log_url\n"
    "log_url('flood')",
    "del os.environ['LLMCLOUD_ROOT']\n%world stop",
)


def test_a_long_output_links_to_all_of_it(context: BrowserContext, lab: Lab, notebooks: Path) -> None:
    path = browser.write_notebook(notebooks / "flood.ipynb", CELLS)
    page = open_lab(context, lab, path.name)
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
    page.close()


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
