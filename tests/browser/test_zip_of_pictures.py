"""A person brings pictures: a zip on the form, patches, a bundle that sees; bombs are refused."""

import re
import zipfile

import pytest
from playwright.sync_api import expect

from tests.browser.test_looks import serious
from tests.browser.test_main_job import idle, wait_for
from tests.browser.test_own_data import open_form, train_and_open, upload
from tests.seeing import COLOURS, NAMED, as_bytes, class_folders, picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eyes") / "tiny-eyes"
    NAMED["dinov2"].build(folder)
    return folder


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    root = tmp_path_factory.mktemp("zipped")
    folder = class_folders(root / "colours", 30)
    path = root / "colours.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"colours/{file.relative_to(folder)}")
        archive.writestr("colours/red/torn.png", as_bytes(picture(COLOURS["red"], 1))[:90])
    return path


def test_pictures_go_from_a_zip_to_a_bundle_in_hand(page, app_url, eyes, zipped, tmp_path):
    open_form(page, app_url, eyes)
    upload(page, zipped)
    expect(
        page.get_by_text("Training pictures; what the model does not see is dark")
    ).to_be_visible()
    expect(page.get_by_text("pictures: 63 train, 9 validation (made here)")).to_be_visible()
    expect(page.get_by_text("Left out, for they cannot be read: 1 pictures.")).to_be_visible()
    expect(page.get_by_role("textbox", name="Template")).to_have_count(0)
    idle(page)
    assert serious(page) == []
    run = train_and_open(page)

    page.goto(f"{app_url}/tokens?run={run}&cut=2&pooling=mean")
    expect(page.locator(".st-key-patches .main-svg").first).to_be_visible()
    expect(page.get_by_text("Settled at layer")).to_be_visible()
    expect(page.get_by_role("link", name="Patches")).to_be_visible()
    idle(page)
    assert serious(page) == []
    own = tmp_path / "own.png"
    picture(COLOURS["blue"], 77).save(own)
    page.locator(".st-key-patch_upload input[type=file]").set_input_files(own)
    expect(page.locator("strong", has_text="blue")).to_be_visible()

    page.goto(f"{app_url}/bundle?run={run}&cut=2&pooling=first%2Bmean")
    expect(page.get_by_text('pipeline("image-classification", PATH)')).to_be_visible()
    page.get_by_role("button", name="Build the bundle").click()
    download = page.get_by_role("link", name=re.compile("^Download"))
    wait_for(page, download)
    page.locator(".st-key-try_picture input[type=file]").set_input_files(own)
    expect(page.locator(".cv-bars span").first).to_have_text("blue")
    with page.expect_download() as got:
        download.click()
    got.value.save_as(tmp_path / "bundle.zip")
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names


def test_a_broken_zip_and_a_bomb_are_refused_in_a_sentence(page, app_url, eyes, zipped, tmp_path):
    open_form(page, app_url, eyes)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(zipped.read_bytes()[:-40])
    upload(page, broken)
    expect(page.get_by_text("is no zip that can be read")).to_be_visible()
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("red/a.bmp", b"\0" * (48 << 20))
    upload(page, bomb)
    expect(page.get_by_text("and unpacks to")).to_be_visible()
