"""A person takes layers out of a model, trains on what is left, and compares both."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser.test_looks import serious
from tests.browser.test_main_job import idle, wait_for
from tests.browser.test_own_data import open_form, upload

pytestmark = pytest.mark.slow


def train(page):
    page.get_by_role("button", name="Train chips on all layers").click()
    expect(page).to_have_url(re.compile(r"/train\?run=[\d-]+"))
    run = re.search(r"run=([\w-]+)", page.url)[1]
    wait_for(page, page.get_by_role("link", name="Open the layers"))
    return run


def test_a_model_is_pruned_probed_and_compared(page, app_url, tiny_backbone_folder, toy_csv):
    open_form(page, app_url, tiny_backbone_folder)
    upload(page, toy_csv)
    dense = train(page)

    page.goto(f"{app_url}/models?new=1")
    page.get_by_text("File or folder").click()
    page.get_by_role("textbox", name="Path on this computer").fill(str(tiny_backbone_folder))
    page.get_by_role("spinbutton", name="Layers to take out").fill("1")
    page.get_by_text("Text to calibrate on").click()
    page.get_by_role("textbox", name="Data with a text column").fill(str(toy_csv))
    page.get_by_role("spinbutton", name="Tokens of a row of text").fill("16")
    page.get_by_role("textbox", name="Name of the new model").fill("shorter")
    page.get_by_role("textbox", name="Name of the new model").press("Enter")
    idle(page)
    page.get_by_role("button", name="Make it").click()
    link = page.get_by_role("link", name="Train chips")
    wait_for(page, link)
    expect(page.get_by_text("3 of 4 layers")).to_be_visible()
    idle(page)
    assert serious(page) == []

    link.click()
    expect(page.get_by_text("influence of")).to_be_visible()
    page.locator(".st-key-data_source").get_by_text("Upload").click()
    upload(page, toy_csv)
    short = train(page)

    page.goto(f"{app_url}/compare?runs={dense},{short}")
    expect(page.locator(".st-key-comparison .main-svg").first).to_be_visible()
    expect(page.get_by_text("Differences are to the best chip on the last layer")).to_be_visible()
    expect(page.get_by_role("button", name="CSV", exact=True)).to_be_visible()
    idle(page)
    assert serious(page) == []
