"""The monitor of a run as a tab, by mouse and keyboard, over recorded runs: compared, pinned, zoomed, in trouble."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from jupyter_llmcloud.storage.runs import RunFolder
from tests.support.axe import look
from tests.support.keyboard import unreachable
from tests.support.lab import Lab, open_lab, running_lab
from tests.support.recorded_runs import record_run, report_late

pytestmark = pytest.mark.browser

CARD = ".jp-MainAreaWidget:not(.lm-mod-hidden) .llmc-Tab .llmc-run"
MARKUP = "<img src=x onerror=window.broken=1>"
LONG = "n" * 64 + "-" + "m" * 63


SAVED_S = 60.0
LAYOUT = """async () => {
    const workspace = location.pathname.match(/workspaces\\/([^/]+)/)[1];
    const saved = await window.jupyterapp.serviceManager.workspaces.fetch(workspace);
    return JSON.stringify(saved.data["layout-restorer:data"]?.main ?? "");
}"""


@pytest.fixture(scope="module")
def page(context: BrowserContext, lab: Lab) -> Iterator[Page]:
    """One page for all tests: each opens a run of its own."""
    page = open_lab(context, lab)
    yield page
    page.close()


def open_run(page: Page, run_id: str, name: str = "") -> Locator:
    """The monitor of a run in a tab, once it shows what is there."""
    script = "async (args) => { await window.jupyterapp.commands.execute('llmcloud:open-run', args); }"
    page.evaluate(script, {"id": run_id, "name": name or run_id})
    card = page.locator(CARD)
    expect(card.locator(".llmc-state")).not_to_be_empty()
    return card


def plot_of(card: Locator, metric: str) -> Locator:
    return card.locator(f'[data-metric="{metric}"] .llmc-plot')


def shown(card: Locator, metric: str = "loss") -> tuple[float, float]:
    """From where to where a chart is shown, in units of its axis."""
    plot = plot_of(card, metric)
    return float(plot.get_attribute("data-from") or 0), float(plot.get_attribute("data-to") or 0)


def losses(rate: float, steps: int = 300) -> list[dict[str, float]]:
    return [{"loss": 2 * math.exp(-at * rate / 100) + math.sin(at) / 9, "epoch": at / 100} for at in range(steps)]


def test_a_tab_is_there_again_after_a_reload_and_all_of_it_is_reached_by_keyboard(page: Page) -> None:
    record_run("again-1", "again", lambda _: losses(1, 20), output={0: ["a line\n"]})
    card = open_run(page, "again-1", "again")
    expect(plot_of(card, "loss")).to_be_visible()
    assert unreachable(page, card) == []
    deadline = time.monotonic() + SAVED_S  # the layout is saved a moment after it changed
    while "again-1" not in page.evaluate(LAYOUT):
        assert time.monotonic() < deadline, "the layout was not saved"
        page.wait_for_timeout(200)
    page.reload()
    page.wait_for_function("() => window.jupyterapp !== undefined")
    page.evaluate("async () => { await window.jupyterapp.restored; }")
    expect(page.locator(".lm-TabBar-tabLabel", has_text="again").first).to_be_visible()
    expect(plot_of(page.locator(CARD), "loss")).to_be_visible()


def test_two_runs_are_compared_in_their_curves_their_settings_and_their_source(page: Page, pictures: Path) -> None:
    versions = {"torch": "2.13.0", "python": "3.11.2"}
    record_run("base-1", "base", lambda _: losses(1), num_ranks=4, spec={"nproc": 4, "lr": 1}, versions=versions,
               source="%%distribute -n 4\nlr = 1\ntrain(lr)\n")  # fmt: skip
    record_run("fast-1", "fast", lambda _: losses(2), spec={"nproc": 2, "lr": 2}, versions={**versions, "torch": "2.12.0"},
               source="%%distribute -n 2\nlr = 2\ntrain(lr)\n")  # fmt: skip
    card = open_run(page, "base-1")
    card.get_by_role("button", name="compare").click()
    choice = card.get_by_label("compare with")
    expect(choice.locator("option", has_text="fast")).to_have_count(1)
    choice.select_option(value="fast-1")
    expect(card.get_by_label("curves").locator("li")).to_have_text(["base", "fast"])
    card.locator("summary", has_text="Differences").click()
    rows = card.locator(".llmc-comparison tbody tr")
    expect(rows.filter(has_text="lr")).to_have_text(re.compile("lr12"))
    expect(rows.filter(has_text="ranks")).to_have_text(re.compile("ranks42"))
    expect(rows.filter(has_text="torch")).to_contain_text("2.12.0")
    expect(rows.filter(has_text="python")).to_have_count(0)  # the same in both
    expect(card.locator(".llmc-diff [data-kind=added]")).to_contain_text(["%%distribute -n 4", "lr = 1"])
    expect(card.locator(".llmc-diff [data-kind=same]")).to_contain_text(["train(lr)"])
    look(page, pictures, "run-compared", ".llmc-Tab")
    card.get_by_role("button", name="end comparison").click()
    expect(card.get_by_label("curves")).to_have_count(0)


def test_a_chart_is_zoomed_moved_and_read_by_mouse(page: Page) -> None:
    record_run("zoomed-1", "zoomed", lambda rank: [{"loss": at + rank / 4} for at in range(1001)])
    card = open_run(page, "zoomed-1")
    plot = plot_of(card, "loss")
    expect(plot).to_have_attribute("data-to", re.compile(r"^(99\d|1000)"))
    whole = shown(card)
    over = plot.locator(".u-over")
    box = over.bounding_box()
    assert box
    x, y, width = box["x"], box["y"] + box["height"] / 2, box["width"]
    page.mouse.move(x + width / 4, y)
    page.mouse.down()
    page.mouse.move(x + width / 2, y, steps=5)
    page.mouse.up()
    expect(card.get_by_role("button", name="show the whole of loss")).to_be_visible()
    low, high = shown(card)
    assert low == pytest.approx(250, abs=12) and high == pytest.approx(500, abs=12)
    page.keyboard.down("Shift")  # which moves the stretch
    page.mouse.move(x + width / 2, y)
    page.mouse.down()
    page.mouse.move(x + width / 4, y, steps=5)
    page.mouse.up()
    page.keyboard.up("Shift")
    moved = shown(card)
    assert moved[0] > low + 30 and moved[1] - moved[0] == pytest.approx(high - low, rel=0.01)
    page.mouse.move(x + width / 3, y)
    values = card.locator('[data-metric="loss"] .llmc-rank-values')
    expect(values).to_have_text(re.compile(r"^at step [\d,]+ · rank 0: \d+ · rank 1: [\d.]+$"))
    step = int(re.findall(r"step ([\d,]+)", values.inner_text())[0].replace(",", ""))
    assert values.inner_text() == f"at step {step} · rank 0: {step} · rank 1: {step + 0.25:g}"
    page.keyboard.down("Control")
    page.mouse.wheel(0, 100)
    page.keyboard.up("Control")
    page.wait_for_function("([low, high]) => true", arg=list(moved))
    assert shown(card)[1] - shown(card)[0] > moved[1] - moved[0]
    over.dblclick()
    expect(card.get_by_role("button", name="show the whole of loss")).to_have_count(0)
    assert shown(card) == whole


def test_a_chart_is_read_and_zoomed_by_keyboard(page: Page) -> None:
    record_run("keyed-1", "keyed", lambda rank: [{"loss": float(at)} for at in range(101)])
    card = open_run(page, "keyed-1")
    plot = plot_of(card, "loss")
    plot.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(card.locator('[data-metric="loss"] .llmc-readout')).to_have_text(re.compile("^step 2"))
    expect(card.locator('[data-metric="loss"] [role=status]')).to_have_text("loss, step 2: 2")
    whole = shown(card)
    page.keyboard.press("+")
    expect(card.get_by_role("button", name="show the whole of loss")).to_be_visible()
    near = shown(card)
    assert near[1] - near[0] == pytest.approx((whole[1] - whole[0]) / 2, rel=0.01)
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_function("(from) => Number(document.activeElement.dataset.from) > from", arg=near[0])
    page.keyboard.press("0")
    expect(card.get_by_role("button", name="show the whole of loss")).to_have_count(0)
    expect(plot).to_be_focused()


def test_a_pinned_layout_is_inherited_by_the_next_run_of_the_name(page: Page, pictures: Path) -> None:
    record_run("pinned-1", "pinned", lambda _: losses(1))
    card = open_run(page, "pinned-1")
    card.get_by_label("over").select_option("epoch")
    expect(plot_of(card, "loss")).to_have_attribute("data-to", re.compile(r"^2\.9"))
    card.get_by_label("over").select_option("time")
    expect(plot_of(card, "loss")).to_have_attribute("data-to", re.compile(r"^59\d"))  # seconds
    card.get_by_label("smoothing").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    pin = card.get_by_role("button", name="pin layout")
    pin.click()
    expect(card.get_by_role("button", name="layout pinned")).to_have_attribute("aria-pressed", "true")
    page.locator(CARD).screenshot(path=pictures / "run-tab-pinned.png")
    record_run("pinned-2", "pinned", lambda _: losses(2))
    record_run("plain-1", "plain", lambda _: losses(2))
    card = open_run(page, "pinned-2")
    expect(card.get_by_label("over")).to_have_value("time")
    expect(card.get_by_label("smoothing")).to_have_value("0.05")
    expect(card.get_by_role("button", name="layout pinned")).to_be_visible()
    card = open_run(page, "plain-1")
    expect(card.get_by_label("over")).to_have_value("step")


def test_powers_of_ten_are_switched_on_and_kept_with_the_run(page: Page) -> None:
    record_run("scaled-1", "scaled", lambda _: [{"loss": 10.0 ** -(at / 50), "epoch": float(at)} for at in range(300)])
    card = open_run(page, "scaled-1")
    log = card.get_by_role("button", name="logarithmic scale for loss")
    with page.expect_response(lambda answer: answer.url.endswith("/runs/scaled-1/view")) as kept:
        log.click()
    assert kept.value.ok
    expect(log).to_have_attribute("aria-pressed", "true")
    expect(card.get_by_role("button", name="logarithmic scale for epoch")).to_have_count(0)  # it begins at 0
    page.evaluate("() => window.jupyterapp.shell.currentWidget.close()")
    card = open_run(page, "scaled-1")
    expect(card.get_by_role("button", name="logarithmic scale for loss")).to_have_attribute("aria-pressed", "true")


def test_three_hundred_metrics_are_grouped_folded_and_filtered(page: Page, pictures: Path) -> None:
    names = [f"{['train', 'eval', 'grad'][at % 3]}/metric-{at:03d}" for at in range(300)]
    record_run("wide-1", "wide", lambda _: [{name: float(at) for name in names} for at in range(20)])
    card = open_run(page, "wide-1")
    expect(card.locator(".llmc-group > summary")).to_have_text(["train 100", "eval 100", "grad 100"])
    expect(card.locator(".llmc-chart").first).to_be_visible()
    assert card.locator(".llmc-chart").count() < 60  # only what can be seen is drawn
    card.locator(".llmc-group > summary", has_text="train").click()
    expect(card.locator('[data-metric="eval/metric-001"]')).to_be_visible()
    page.screenshot(path=pictures / "run-tab-wide.png")
    card.get_by_label("Filter metrics").fill("grad 299")
    expect(card.locator(".llmc-chart")).to_have_attribute("data-metric", "grad/metric-299")
    card.get_by_label("Filter metrics").fill("no such thing")
    expect(card).to_contain_text("No metric has “no such thing” in its name.")


def troubled(at: int) -> dict[str, float]:
    return {
        "holes": math.nan if 40 < at < 60 else float(at),
        "infinite": math.inf if at % 50 == 7 else math.sin(at / 9),
        "huge": 1e300 if at == 77 else 1 + at / 100,
        "spike": 1e6 if at == 0 else 1 / (at + 1),
        "never": math.nan,
        MARKUP: float(at),
        LONG: float(at),
    }


def test_what_is_in_trouble_is_shown_as_what_it_is(page: Page, pictures: Path) -> None:
    record_run("trouble-1", f"trouble {MARKUP}", lambda _: [troubled(at) for at in range(200)])
    card = open_run(page, "trouble-1", MARKUP)
    expect(card.locator(".llmc-name")).to_have_attribute("title", f"trouble {MARKUP}")
    assert page.evaluate("() => window.broken") is None
    notes = {
        name: card.locator(f'[data-metric="{name}"] .llmc-chart-note')
        for name in ("holes", "infinite", "huge", "spike")
    }
    expect(notes["holes"]).to_contain_text("38 values are NaN or infinite")  # 19 steps of two ranks
    expect(notes["infinite"]).to_contain_text("8 values are NaN or infinite")
    expect(notes["huge"]).to_contain_text("up to 1e300 above")
    expect(notes["spike"]).to_contain_text("up to 1,000,000 above")
    expect(card.locator('[data-metric="never"] .llmc-warning')).to_contain_text("NaN since step 0")
    chart = card.locator('[data-metric="spike"]')
    chart.get_by_role("button", name="show all").click()
    expect(notes["spike"]).not_to_contain_text("above")
    look(page, pictures, "run-trouble", ".llmc-Tab")
    expect(card.locator(f'[data-metric="{LONG}"] .llmc-chart-name')).to_have_attribute("title", LONG)
    for name in (LONG, MARKUP):
        head = card.locator(f'[data-metric="{name}"] .llmc-chart-head')
        assert head.evaluate("head => head.scrollWidth <= head.clientWidth"), "the head of the chart is too wide"


def test_a_name_of_128_characters_leaves_the_states_and_the_buttons_where_they_are(page: Page) -> None:
    record_run("long-1", LONG, lambda _: losses(1, 20))
    card = open_run(page, "long-1", LONG)
    expect(card.get_by_role("link", name="Log")).to_be_visible()
    header = card.locator(".llmc-header")
    assert header.evaluate("header => header.scrollWidth <= header.clientWidth")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    row = page.locator("#llmcloud-sidebar .llmc-runrow[data-run-id='long-1']")
    row.scroll_into_view_if_needed()
    assert row.evaluate("row => row.scrollWidth <= row.clientWidth && row.getBoundingClientRect().height < 70")


@pytest.fixture
def goes_on(tmp_path: Path) -> Iterator[str]:
    """The socket of an agent that says the run of the world `goes-on` does."""
    address = str(tmp_path / "agent.sock")
    command = [sys.executable, "-m", "tests.support.recorded_runs", address, "goes-on"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout and process.stdin and process.stdout.readline()
    yield address
    process.communicate(timeout=60)


@pytest.fixture
def many(goes_on: str) -> Iterator[RunFolder]:
    """A run of 64 ranks of which two are late, as long as the test goes on."""
    folder = record_run("many-1", "many", lambda rank: [{"loss": 1 / (at + 1) + rank / 64} for at in range(50)], num_ranks=64,
                        state="running", world_id="goes-on", agent=goes_on)  # fmt: skip
    yield folder
    record = folder.read()
    record.state, record.ended = "stopped", time.time()
    folder.write(record)


def test_of_64_ranks_the_slow_and_the_dead_stand_out(page: Page, pictures: Path, many: RunFolder) -> None:
    report_late(many, [17, 40])
    toast = page.locator(".Toastify__toast").filter(
        has_text="The run many does not go on: ranks 17, 40 have not made a step"
    )
    expect(toast.first).to_be_visible()
    toast.get_by_role("button", name="Hide notification").click()
    card = open_run(page, "many-1")
    row = page.locator("#llmcloud-sidebar .llmc-runrow[data-run-id='many-1']")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    expect(row).to_contain_text("hangs")
    cells = card.locator(".llmc-cell")
    expect(cells).to_have_count(64)
    expect(card.locator(".llmc-rank-summary")).to_contain_text("2 late")
    late = card.locator(".llmc-cell[data-state=late] button")
    expect(late).to_have_text(["17", "40"])
    assert late.first.evaluate("cell => getComputedStyle(cell).borderTopWidth") == "2px"
    strip = card.locator(".llmc-strip")
    assert strip.evaluate(
        "strip => strip.scrollWidth <= strip.clientWidth && strip.getBoundingClientRect().height < 160"
    )
    expect(card.get_by_role("alert")).to_contain_text("17")
    cells.first.get_by_role("button").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(card.locator(".llmc-rank-details")).to_contain_text("rank 3")
    look(page, pictures, "run-64-ranks", ".llmc-Tab")


def test_the_output_is_folded_chosen_by_rank_and_searched(page: Page, pictures: Path) -> None:
    output = {rank: [f"line {at} of rank {rank}\n" for at in range(400)] for rank in range(2)}
    record_run("spoken-1", "spoken", lambda _: losses(1, 20), output=output)
    card = open_run(page, "spoken-1")
    expect(card.locator(".llmc-text")).to_have_count(0)
    card.locator("summary", has_text="Output of the ranks").click()
    text = card.locator(".llmc-text")
    expect(text).to_contain_text("[1] line 399 of rank 1")
    page.wait_for_function(
        "text => text.scrollTop + text.clientHeight >= text.scrollHeight - 4", arg=text.element_handle()
    )
    text.evaluate("text => { text.scrollTop = 0; }")
    follow = card.get_by_role("button", name="follow")
    follow.click()
    page.wait_for_function(
        "text => text.scrollTop + text.clientHeight >= text.scrollHeight - 4", arg=text.element_handle()
    )
    tabs = card.get_by_role("tablist", name="output of")
    tabs.get_by_role("tab", name="all ranks").focus()
    page.keyboard.press("ArrowRight")
    expect(tabs.get_by_role("tab", name="rank 0")).to_have_attribute("aria-selected", "true")
    expect(text).not_to_contain_text("rank 1")
    card.get_by_role("searchbox", name="Search the output").fill("line 39 ")
    expect(text.locator("> div")).to_have_text(["line 39 of rank 0"])
    look(page, pictures, "run-output", ".llmc-Tab")


def test_what_happened_is_marked_on_the_charts_and_told(page: Page, pictures: Path) -> None:
    marks = [{"mark": "checkpoint", "step": 50, "text": ""}, {"mark": "restart", "step": 120, "text": "rank 1 was lost"},
             {"mark": "resize", "step": 200, "text": "from 2 to 4 ranks"}]  # fmt: skip
    record_run("marked-1", "marked", lambda _: losses(1), marks=marks)
    card = open_run(page, "marked-1")
    card.locator("summary", has_text="Events").click()
    expect(card.locator(".llmc-story li")).to_contain_text(
        ["checkpoint", "restart rank 1 was lost", "resize from 2 to 4 ranks"]
    )
    look(page, pictures, "run-marks", ".llmc-Tab")


def test_a_run_that_is_deleted_elsewhere_is_said_and_its_last_view_stays(page: Page, lab: Lab) -> None:
    record_run("deleted-1", "deleted", lambda _: losses(1, 50))
    card = open_run(page, "deleted-1")
    expect(plot_of(card, "loss")).to_be_visible()
    lab.ask("DELETE", "runs/deleted-1")
    expect(card.get_by_role("alert")).to_contain_text("This run was deleted")
    expect(plot_of(card, "loss")).to_be_visible()
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    expect(page.locator("#llmcloud-sidebar .llmc-runrow[data-run-id='deleted-1']")).to_have_count(0)


@pytest.mark.soak
def test_a_server_that_is_restarted_is_found_again_without_a_reload(
    browser: Browser, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    record_run("survivor-1", "survivor", lambda _: losses(1, 50))
    context = browser.new_context()
    with running_lab(folder) as first:
        page = open_lab(context, first)
        card = open_run(page, "survivor-1")
        expect(plot_of(card, "loss")).to_be_visible()
    expect(card).to_contain_text("The connection to the Jupyter server is cut")
    expect(plot_of(card, "loss")).to_be_visible()
    record_run("meanwhile-1", "meanwhile", lambda _: losses(1, 5))
    with running_lab(folder, again=first):
        expect(card).not_to_contain_text("is cut", timeout=60_000)
        page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
        expect(page.locator("#llmcloud-sidebar .llmc-runrow[data-run-id='meanwhile-1']")).to_be_visible()
        context.close()
