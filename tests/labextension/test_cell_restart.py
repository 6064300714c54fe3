"""JupyterLab drops what an old kernel says once Restart was clicked: the card of its run asks the server instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.notebook.test_kernel_ends import LET_GO, num_steps, record, training
from tests.support import browser
from tests.support.lab import Lab, open_lab
from tests.support.worlds import until

pytestmark = [pytest.mark.story, pytest.mark.browser, pytest.mark.slow]

RESTART = "() => { void window.jupyterapp.commands.execute('kernelmenu:restart'); }"


def test_the_card_follows_the_run_without_its_kernel_until_it_ends(
    context: BrowserContext, lab: Lab, notebooks: Path, pictures: Path
) -> None:
    (notebooks / LET_GO).unlink(missing_ok=True)
    browser.write_notebook(notebooks / "restart.ipynb", ["%load_ext jupyter_llmcloud", training("long"), "%world stop"])
    page = open_lab(context, lab, "restart.ipynb")
    browser.run_cell(page, 0)
    browser.start_cell(page, 1)
    card = page.locator(".llmc-run")
    expect(card.locator(".llmc-chart")).to_be_visible(timeout=90_000)
    until(lambda: num_steps("long") > 10, "the run is well under way", 90)
    page.evaluate(RESTART)
    page.locator(".jp-Dialog .jp-mod-accept").click()
    seen = num_steps("long")
    plot = card.locator(".llmc-plot")
    expect(plot).to_be_visible()
    page.wait_for_function(  # the view goes on, as the run does
        "(seen) => Number(document.querySelector('.llmc-run .llmc-plot')?.dataset.to) > seen", arg=seen
    )
    (notebooks / LET_GO).touch()
    expect(card.locator(".llmc-state")).to_have_text("finished", timeout=60_000)
    expect(card.get_by_role("button", name="Stop long")).to_be_hidden()
    page.screenshot(path=pictures / "after-restart.png")
    assert record("long").state == "finished"
    browser.run_cell(page, 0)
    browser.run_cell(page, 2)
    browser.end_kernel(page)
    page.close()
