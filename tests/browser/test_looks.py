"""Looks for everybody: contrast, names and the keyboard, on every page, light and dark."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from chipviz.runs.store import Store
from chipviz.ui import result_tabs
from tests.browser.test_main_job import idle
from tests.example_run import active_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def working(app_home):
    store = Store(app_home)
    job = active_run(store)
    yield job
    store.finish(job.job_id, "stopped")


def serious(page):
    """What axe finds that keeps people out, as words."""
    found = Axe().run(page).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_u1_axe_finds_nothing_serious_on_any_page(browser, app_url, seeded, working, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    run = seeded.run_id
    pages = ["", "train", f"train?run={working.run_id}", f"layers?run={run}", f"bundle?run={run}"]
    pages += ["models", "models?new=1", f"compare?runs={run}"]
    for path in [*pages, "layers?run=nosuch"]:
        page.goto(f"{app_url}/{path}")
        expect(page.get_by_role("link", name="Bundle", exact=True).first).to_be_visible()
        idle(page)
        assert serious(page) == [], path
    page.goto(f"{app_url}/layers?run={run}")
    for view in result_tabs.VIEWS:
        page.get_by_role("tab", name=view, exact=True).click()
        idle(page)
        assert serious(page) == [], view
    context.close()


def test_b7_an_address_in_a_text_is_no_link(page, app_url):
    evil = "https://evil.example www.evil.example a@evil.example"
    page.goto(f"{app_url}/layers?run={evil}")
    expect(page.get_by_role("alert")).to_contain_text("evil")
    idle(page)
    assert page.locator("a[href*='evil']").count() == 0


def test_u1_from_the_list_to_a_bundle_by_keyboard_alone(page, app_url, seeded):
    page.goto(app_url)
    row = page.locator(f".st-key-run_{seeded.run_id}")
    _press_until(page, row.get_by_role("link", name="Open"))
    page.keyboard.press("Enter")
    slider = page.get_by_role("slider")
    _press_until(page, slider)
    before = int(slider.get_attribute("aria-valuenow") or slider.input_value())
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text(f"Cut at layer {before + 1} of")).to_be_visible()
    page.goto(f"{app_url}/bundle?run={seeded.run_id}")
    _press_until(page, page.get_by_role("link", name="Download"))


def _press_until(page, wanted, most=80):
    """Go on by the tabulator until an element has the focus, which must be seen."""
    expect(wanted).to_be_visible()
    idle(page)
    for _ in range(most):
        page.keyboard.press("Tab")
        if wanted.evaluate("e => e.contains(document.activeElement)"):
            return
    raise AssertionError("the keyboard does not lead there")
