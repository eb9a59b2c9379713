"""What a person must be told, sees: warnings above the start button, the rules as a table, and a
form that is still filled after a reload."""

import csv
import re

import pytest
from playwright.sync_api import expect

from chipviz.runs.store import Store
from tests.browser.test_main_job import idle
from tests.browser.test_own_data import open_form, upload
from tests.conftest import planted_rows
from tests.example_run import EVIL, finished_run

pytestmark = pytest.mark.slow


@pytest.fixture
def troubled_csv(tmp_path):
    """Blanks around labels, classes that differ in case, repeats, and one text with two labels."""
    path = tmp_path / "troubled.csv"
    rows = [(text, label) for text, label in planted_rows(150)]
    rows += [(text, f"{label} ") for text, label in planted_rows(150)[:6]]
    rows += [(rows[0][0], "Sport"), (EVIL, "sport"), (EVIL, "money")]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_warnings_stand_above_the_start_button(
    page, app_url, tiny_backbone_folder, troubled_csv, width, scheme
):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    open_form(page, app_url, tiny_backbone_folder)
    upload(page, troubled_csv)
    start = page.get_by_role("button", name="Train chips on all layers")
    expect(start).to_be_enabled()
    warnings = page.locator("[data-testid=stAlertContentWarning]")
    for words in ("Blanks around labels", "several labels", "alike", "repeat"):
        warning = warnings.filter(has_text=words).first
        expect(warning).to_be_visible()
        assert warning.bounding_box()["y"] < start.bounding_box()["y"]
    assert page.evaluate("window.__pwn") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_rules_stand_in_a_table_the_recommended_one_first(
    page, app_url, app_home, width, scheme
):
    run = finished_run(Store(app_home))
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{app_url}/layers?run={run.run_id}")
    table = page.locator(".cv-rules table")
    expect(table).to_be_visible()
    heads = table.locator("tr").first.locator("th").all_inner_texts()
    assert [head.split()[0] for head in heads] == [
        "Rule",
        "Cut",
        "Validation",
        "To",
        "Size",
        "Speed",
    ]
    first = table.locator("tr").nth(1)
    expect(first).to_contain_text("(recommended)")
    expect(first).to_have_class("cv-here")
    page.get_by_role("button", name="Half the size").first.click()
    idle(page)
    expect(table.locator("tr.cv-here", has_text="Half the size")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_filled_form_is_filled_after_a_reload_and_after_going_back(
    page, app_url, tiny_backbone_folder, troubled_csv
):
    open_form(page, app_url, tiny_backbone_folder)
    upload(page, troubled_csv)
    template = page.locator("textarea").first
    template.fill("Text: {text}\nKind:")
    template.press("Control+Enter")
    idle(page)
    expect(page).to_have_url(re.compile("draft="))
    for come_back in (page.reload, lambda: (page.goto(app_url), page.go_back())):
        come_back()
        idle(page)
        expect(page.locator("textarea").first).to_have_value("Text: {text}\nKind:")
        expect(page.locator(".st-key-data_path input")).to_have_value(re.compile("troubled"))
        expect(page.locator(".st-key-backbone_path input")).to_have_value(str(tiny_backbone_folder))
        expect(page.get_by_role("button", name="Train chips on all layers")).to_be_enabled()


def test_no_script_of_streamlit_is_refused(page, app_url):
    refused = []
    page.on(
        "console",
        lambda message: (
            refused.append(message.text) if "Content Security Policy" in message.text else None
        ),
    )
    page.goto(app_url)
    idle(page)
    assert refused == []
