"""A look at a page by axe-core, in both themes, and the pictures that are kept of it."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page

from tests.support.browser import DARK, LIGHT, set_theme

AXE = Path(__file__).parents[2] / "labextension" / "node_modules" / "axe-core" / "axe.min.js"


def faults(page: Page, selector: str) -> list[str]:
    """What axe-core finds that is serious, below `selector`."""
    if not page.evaluate("() => 'axe' in window"):
        page.add_script_tag(path=AXE)
    found = page.evaluate("async (selector) => (await axe.run(selector)).violations", selector)
    serious = [row for row in found if row["impact"] in ("serious", "critical")]
    return [f"{row['id']}: {node['html'][:200]} {node['failureSummary']}" for row in serious for node in row["nodes"]]


def look(page: Page, pictures: Path, name: str, selector: str) -> None:
    """Keep a picture in both themes, and let axe-core look."""
    for theme, word in ((DARK, "dark"), (LIGHT, "light")):
        set_theme(page, theme)
        page.screenshot(path=pictures / f"panels-{name}-{word}.png")
        assert faults(page, selector) == [], f"{name}, {word}"
