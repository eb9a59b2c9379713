"""A person brings a table of odd columns: uploads it, picks columns, sees prompts, trains on it."""

import csv
import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.test_main_job import idle, wait_for
from tests.conftest import planted_rows
from tests.example_run import EVIL

pytestmark = pytest.mark.slow


@pytest.fixture
def odd_csv(tmp_path):
    path = tmp_path / "Meine Texte (1).csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Nr", "Was steht da?", EVIL])
        writer.writerows((i, text, label) for i, (text, label) in enumerate(planted_rows(300)))
    return path


@pytest.fixture
def broken_csv(tmp_path):
    path = tmp_path / "broken.csv"
    path.write_text("text,label\nfine,a\nbroken,b,c\n")
    return path


def open_form(page: Page, app_url: str, backbone) -> None:
    page.goto(f"{app_url}/train")
    page.locator(".st-key-data_source").get_by_text("Upload").click()
    page.locator(".st-key-backbone_source").get_by_text("File or folder").click()
    path = page.locator(".st-key-backbone_path input")
    path.fill(str(backbone))
    path.press("Enter")
    expect(page.get_by_text("layers, 32 wide")).to_be_visible()


def train_and_open(page: Page) -> str:
    """Start the run of the form, wait for it, open its layers. Returns its id."""
    idle(page)
    page.get_by_role("button", name="Train chips on all layers").click()
    expect(page).to_have_url(re.compile(r"/train\?run=[\d-]+"))
    done = page.get_by_role("link", name="Open the layers")
    wait_for(page, done)
    done.click()
    expect(page.get_by_text(re.compile(r"Cut at layer \d of 4"))).to_be_visible()
    found = re.search(r"run=([\w-]+)", page.url)
    assert found
    return found[1]


def pick(page: Page, label: str, option: str) -> None:
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=option).click()


def upload(page: Page, path) -> None:
    idle(page)
    page.locator("input[type=file]").set_input_files(path)
    idle(page)


def test_an_uploaded_table_is_looked_at_and_trained_on(
    page, app_url, tiny_backbone_folder, odd_csv, broken_csv
):
    start = page.get_by_role("button", name="Train chips on all layers")
    open_form(page, app_url, tiny_backbone_folder)
    upload(page, broken_csv)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("line 3 has 3 cells, expected 2 as in the header")
    expect(alert).to_contain_text("Check that it is a well-formed .csv file in UTF-8")
    expect(start).to_be_disabled()

    page.get_by_role("button", name=re.compile("^Remove")).click()
    expect(alert).not_to_be_visible()
    upload(page, odd_csv)
    expect(page.get_by_text(re.compile("No label column was found"))).to_be_visible()
    expect(start).to_be_disabled()
    pick(page, "Label column", EVIL)
    text = page.get_by_role("combobox", name="Text column", exact=True)
    expect(text).to_have_value("Was steht da? (guessed)")
    idle(page)
    template = page.get_by_role("textbox", name="Template")
    template.fill("say {text} now:")
    template.press("Control+Enter")
    probed = page.locator(".cv-probed.cv-p-last")
    expect(probed).to_have_text([":"] * 3)
    expect(page.locator(".cv-read").first).to_contain_text(re.compile("^say .* now:$"))
    splits = "texts: 210 train, 30 validation (made here), 60 test (made here)"
    expect(page.get_by_text(splits)).to_be_visible()
    expect(page.locator(".st-key-lengths .barlayer path").first).to_be_attached()
    assert page.evaluate("window.__pwn") is None

    start.click()
    expect(page).to_have_url(re.compile(r"/train\?run=[\d-]+"))
    done = page.get_by_role("link", name="Open the layers")
    wait_for(page, done)
    expect(page.get_by_role("heading", name=re.compile("meine-texte-1"))).to_be_visible()
    done.click()
    expect(page.get_by_text(re.compile(r"Cut at layer \d of 4"))).to_be_visible()
    points = page.locator(".st-key-curve .scatterlayer path.point")
    expect(points.nth(2 * 4 - 1)).to_be_attached()
