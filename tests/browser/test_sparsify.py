"""A person joins neurons: from the form over the Sparsify page to a bundle that answers."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser.test_looks import serious
from tests.browser.test_main_job import idle, wait_for
from tests.browser.test_own_data import open_form, train_and_open, upload

pytestmark = pytest.mark.slow


def test_neurons_are_joined_from_the_form_to_a_bundle(page, app_url, tiny_backbone_folder, toy_csv):
    open_form(page, app_url, tiny_backbone_folder)
    upload(page, toy_csv)
    page.get_by_text("More options").click()
    page.locator(".st-key-stc").get_by_text("Sparsify-then-Classify").click()
    # What the switch brings moves the button that starts: a click on its way would miss.
    expect(page.get_by_role("radiogroup", name="Importance of a neuron")).to_be_visible()
    run = train_and_open(page)

    page.goto(f"{app_url}/sparsify?run={run}&cut=2&pooling=all-mean&chip=stc")
    expect(page.get_by_text("Chosen on validation: joined up to layer")).to_be_visible()
    for key in ("depth", "www", "neuron_0"):
        expect(page.locator(f".st-key-{key}_chart .main-svg").first).to_be_visible()
    expect(page.locator(".cv-texts li").first).to_be_visible()
    idle(page)
    assert serious(page) == []

    page.goto(f"{app_url}/tokens?run={run}&cut=2&pooling=all-mean&chip=stc")
    expect(page.get_by_text("outside of what their classifier was trained on")).to_be_visible()
    expect(page.locator(".cv-words .cv-t").first).to_be_visible()

    page.goto(f"{app_url}/bundle?run={run}&cut=2&pooling=all-mean&chip=stc")
    page.get_by_role("button", name="Build the bundle").click()
    wait_for(page, page.get_by_role("link", name=re.compile("^Download")))
    page.get_by_role("textbox", name="Try it on a text").fill("we saw the goal near a river")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".cv-bars span").first).to_have_text("sport")


def test_a_run_without_joined_neurons_says_how_to_get_them(page, app_url, seeded):
    page.goto(f"{app_url}/sparsify?run={seeded.run_id}")
    expect(page.get_by_text("This run has not joined neurons")).to_be_visible()
