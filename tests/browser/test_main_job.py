"""The main job in a real browser: start the example, watch, cut, read words, take a bundle home."""

import re
import zipfile

import pytest
from playwright.sync_api import Page, expect

from tests.example_run import EVIL, LAYERS

pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)
RUN_MS = 300_000
"""What a whole run may take where two cores are shared and the backbone is not fetched yet."""

STAGE = re.compile(r"after [\d,]+ of 800 texts")


def idle(page: Page) -> None:
    page.wait_for_selector(
        "[data-testid='stApp'][data-test-script-state='notRunning']", state="attached"
    )


def stage_of(page: Page):
    return page.locator(".st-key-live_curve").get_by_text(STAGE).first


def wait_for(page: Page, wanted) -> None:
    """Wait for something slow, but give up at once when the page reports an error instead.

    Warnings are alerts too, and a run may well have some.
    """
    error = page.get_by_test_id("stAlertContentError")
    expect(wanted.or_(error).first).to_be_visible(timeout=RUN_MS)
    assert error.count() == 0, error.first.inner_text()


def texts_read(words: str) -> int:
    return int(re.search(r"after ([\d,]+) of", words).group(1).replace(",", ""))


def point(page: Page, layer: int, pooling: str):
    """The marker of one chip: `last` is drawn first, `mean` second."""
    place = layer + LAYERS * ("last", "mean").index(pooling)
    return page.locator(".st-key-curve .scatterlayer path.point").nth(place)


def expect_cut(page: Page, layer: int, pooling: str) -> None:
    """Headline, slider, stack and address name the same cut."""
    expect(page.get_by_text(f"Cut at layer {layer} of {LAYERS}")).to_be_visible()
    expect(page.get_by_role("slider")).to_have_value(str(layer))
    expect(page.get_by_role("img", name=f"{layer + 1} of {LAYERS} layers kept")).to_be_visible()
    expect(page).to_have_url(re.compile(rf"cut={layer}&pooling={pooling}"))


def facts(page: Page) -> str:
    return " ".join(page.locator(".cv-fact").all_inner_texts())


def start_the_example(page: Page, app_url: str) -> str:
    page.goto(app_url)
    page.get_by_role("button", name=re.compile("Try it: BBC news on SmolLM2")).click()
    expect(page).to_have_url(re.compile(r"/train\?run=[\d-]+"), timeout=RUN_MS)
    return re.search(r"run=([\w-]+)", page.url).group(1)


def watch_it_grow(page: Page) -> list[int]:
    """Three different stages of the curve; then a reload, after which nothing is lost."""
    wait_for(page, stage_of(page))
    seen = [stage_of(page).text_content()]
    while len(seen) < 3:
        expect(stage_of(page)).not_to_have_text(seen[-1], timeout=RUN_MS)
        seen.append(stage_of(page).text_content())
    page.reload()
    expect(stage_of(page)).to_be_visible()
    read = [texts_read(words) for words in seen]
    assert texts_read(stage_of(page).text_content()) >= read[-1]
    return read


def cut_by_click(page: Page) -> None:
    expect(point(page, 12, "mean")).to_be_attached()
    idle(page)
    before = facts(page)
    point(page, 12, "mean").click(force=True)
    expect_cut(page, 12, "mean")
    assert facts(page) != before
    page.reload()
    expect_cut(page, 12, "mean")


def read_words(page: Page) -> None:
    page.get_by_role("link", name="See it word by word").click()
    wait_for(page, page.locator(".cv-words .cv-t").first)
    assert page.locator(".cv-words .cv-t").count() > 10
    colours = page.locator(".cv-words .cv-t").evaluate_all(
        "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
    )
    assert "rgba(0, 0, 0, 0)" not in colours
    expect(page.get_by_text(re.compile("Settled at layer"))).to_be_visible()
    expect(page.get_by_role("slider")).to_have_value("12")


def read_a_hostile_article(page: Page) -> None:
    area = page.get_by_role("textbox", name="Text")
    area.fill(f"{EVIL} says the minister")
    area.press("Control+Enter")
    expect(page.locator(".cv-words")).to_contain_text("<script>window.__pwn=1</script>")
    assert page.evaluate("window.__pwn") is None


def take_the_bundle(page: Page, folder) -> None:
    page.get_by_role("link", name="Bundle", exact=True).first.click()
    page.get_by_role("button", name="Build the bundle").click()
    link = page.get_by_role("link", name=re.compile(r"Download \(.*MB\)"))
    wait_for(page, link)
    expect(page.get_by_text(re.compile(r"(\d\d) of \1 agree"))).to_be_visible()
    assert page.evaluate("window.__pwn") is None
    with page.expect_download() as download:
        link.evaluate("a => { a.removeAttribute('target'); a.click() }")
    path = folder / "bundle.zip"
    download.value.save_as(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = [name.rsplit("/", 1)[-1] for name in archive.namelist()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chip.json"} <= set(names)


def try_the_bundle(page: Page) -> None:
    page.get_by_role("textbox", name="Try it on a text").fill(
        "The striker scored twice as United won the cup final on Saturday."
    )
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".cv-bars span").first).to_have_text("sports", timeout=RUN_MS)


def test_a_person_goes_from_the_first_page_to_a_bundle_in_hand(page, app_url, tmp_path):
    run_id = start_the_example(page, app_url)
    read = watch_it_grow(page)
    assert read == sorted(set(read))
    done = page.get_by_role("link", name="Open the layers")
    wait_for(page, done)
    done.click()
    expect(page).to_have_url(re.compile(f"/layers.*run={run_id}"))
    cut_by_click(page)
    read_words(page)
    read_a_hostile_article(page)
    take_the_bundle(page, tmp_path)
    try_the_bundle(page)
    page.goto(app_url)
    expect(page.locator(f".st-key-run_{run_id}")).to_contain_text("fewer parameters")


def test_click_slider_and_address_stay_in_step(page, app_url, seeded):
    page.goto(f"{app_url}/layers?run={seeded.run_id}&cut=3&pooling=last")
    expect(point(page, 3, "last")).to_be_attached()
    expect_cut(page, 3, "last")
    for layer, pooling in ((21, "last"), (8, "mean"), (21, "last")):
        point(page, layer, pooling).click(force=True)
        expect_cut(page, layer, pooling)
        idle(page)
    page.get_by_role("slider").press("ArrowRight")
    expect_cut(page, 22, "last")
    idle(page)
    point(page, 21, "last").click(force=True)
    expect_cut(page, 21, "last")
    page.reload()
    expect_cut(page, 21, "last")
    page.get_by_role("link", name="Bundle", exact=True).first.click()
    expect(page).to_have_url(re.compile("/bundle.*cut=21&pooling=last"))
    expect(page.get_by_role("slider")).to_have_value("21")


def test_b7_hostile_labels_and_texts_stay_text_on_every_page(page, app_url, seeded):
    foreign = []
    page.on("request", lambda request: foreign.append(request.url))
    for path in ("", "train", "layers", "bundle"):
        page.goto(f"{app_url}/{path}?run={seeded.run_id}")
        idle(page)
        expect(page.get_by_text(seeded.name).first).to_be_visible()
    page.goto(f"{app_url}/layers?run={seeded.run_id}")
    page.get_by_role("tab", name="Confusion").click()
    expect(
        page.locator(".st-key-confusion_chart").get_by_text(re.compile("<img")).first
    ).to_be_attached()
    assert page.evaluate("window.__pwn") is None
    assert [url for url in foreign if not url.startswith((app_url, "data:", "blob:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_u1_every_page_fits_a_telephone(browser, app_url, seeded, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    for path in ("", "train", "layers", "bundle"):
        page.goto(f"{app_url}/{path}" + (f"?run={seeded.run_id}" if path else ""))
        expect(page.get_by_role("heading").first).to_be_visible()
        idle(page)
        overflow = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow <= 0, path
    context.close()
