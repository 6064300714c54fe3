"""Whether all that can be done in a part of a page can be done without a mouse."""

from __future__ import annotations

from playwright.sync_api import Locator, Page

# What can be used now. Of parts that are one stop for Tab (tabs, the strip of ranks), arrow keys reach the others.
_CONTROLS = """part => {
    const all = part.querySelectorAll('button, input, select, textarea, summary, a[href], [tabindex], [role=button]');
    const usable = [...all].filter(one => !one.disabled && one.tabIndex >= 0 && one.checkVisibility());
    usable.forEach((one, at) => { one.dataset.testControl = String(at); });
    const idle = [...part.querySelectorAll('[onclick], [role=button], [role=tab]')].filter(one => one.tabIndex < 0);
    return [usable.length, usable.map(one => one.getAttribute('aria-label') || one.textContent || one.tagName),
            idle.filter(one => !one.closest('[role=tablist], .llmc-strip')).length];
}"""
_FOCUSED = "part => part.contains(document.activeElement) ? document.activeElement.dataset.testControl : null"


def unreachable(page: Page, part: Locator) -> list[str]:
    """The controls of a part that Tab does not come to from the first of them on, by their names."""
    count, names, idle = part.evaluate(_CONTROLS)
    assert count, "there is nothing to use"
    assert not idle, f"{idle} things can be clicked only"
    part.locator("[data-test-control='0']").focus()
    reached = {part.evaluate(_FOCUSED)}
    for _ in range(2 * count):  # the page may have others between
        page.keyboard.press("Tab")
        reached.add(part.evaluate(_FOCUSED))
    return [name for at, name in enumerate(names) if str(at) not in reached]
