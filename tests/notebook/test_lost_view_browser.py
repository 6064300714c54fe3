"""A page that is loaded again in the middle of a run: what stands where the live view was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.support import browser
from tests.support.lab import Lab, open_lab, running_lab

pytestmark = [pytest.mark.browser, pytest.mark.slow]

RUN = """%%distribute -n 2 --name reloaded
import pathlib, time
for step in range(100_000):
    run.log(loss=1 / (step + 1) + rank, step=step)
    if pathlib.Path("let-go").exists():
        break
    time.sleep(0.05)
"""


@pytest.fixture
def lab(own_root: Path, tmp_path: Path) -> Iterator[Lab]:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    with running_lab(folder) as running:
        yield running


def test_the_static_form_and_a_hint_stand_where_the_live_view_was(
    chromium: Browser, lab: Lab, tmp_path: Path, pictures: Path
) -> None:
    cells = ["%load_ext jupyter_llmcloud", RUN, "%cluster stop"]
    path = browser.write_notebook(tmp_path / "notebooks" / "long.ipynb", cells)
    page = open_lab(chromium, lab, path.name)
    browser.run_cell(page, 0)
    browser.start_cell(page, 1)
    expect(page.locator(".llmc-card .llmc-line").first).to_be_attached(timeout=60_000)
    browser.save(page)
    page.reload()
    form = page.locator(".llmc-LostView")
    expect(form).to_contain_text("%runs attach reloaded in another notebook shows it live", timeout=60_000)
    expect(form).to_contain_text("reloaded · running")
    expect(form).to_contain_text("mean of 2 ranks")
    expect(form.locator("img")).to_have_count(1)
    for words in ("Loading widget", "Error displaying widget"):
        expect(page.locator(".jp-OutputArea-output:visible").filter(has_text=words)).to_have_count(0)
    page.screenshot(path=pictures / "lost-view.png")
    (tmp_path / "notebooks" / "let-go").touch()
    expect(form).to_contain_text("reloaded · finished in", timeout=60_000)
    expect(page.locator(".jp-OutputArea-output:visible").filter(has_text="model not found")).to_have_count(0)
    browser.run_cell(page, 2)
    browser.end_kernel(page)
