"""A person takes a bundle elsewhere: build, export to ONNX, try it, download the zip."""

import re
import zipfile

import pytest
from playwright.sync_api import expect
from transformers import PreTrainedTokenizerFast

from chipviz.bundle import graph
from tests.browser.test_looks import serious
from tests.browser.test_main_job import idle, wait_for
from tests.cli.test_cli import chipviz

pytestmark = pytest.mark.slow


def test_a_bundle_goes_to_onnx_and_home(
    page, app_url, app_home, tiny_backbone_folder, toy_csv, tmp_path
):
    trained = chipviz(
        app_home, "train", "--backbone", tiny_backbone_folder, "--data", toy_csv,
        "--pooling", "mean", "--max-length", "24", "--json",
    )  # fmt: skip
    run = trained.json["run_id"]
    page.goto(f"{app_url}/bundle?run={run}&cut=1&pooling=mean")
    page.get_by_role("button", name="Build the bundle").click()
    wait_for(page, page.get_by_role("link", name=re.compile("^Download")))
    page.get_by_text("Take it elsewhere").click()
    expect(page.get_by_text("one graph from token ids", exact=False).first).to_be_visible()
    idle(page)
    assert serious(page) == []
    page.locator(".st-key-export_onnx button").click()
    link = page.get_by_role("link", name=re.compile("^Download for onnx"))
    wait_for(page, link)
    expect(page.get_by_text(re.compile(r"(\d+) of \1 texts get the same label"))).to_be_visible()
    idle(page)
    assert serious(page) == []
    with page.expect_download() as got:
        link.click()
    got.value.save_as(tmp_path / "onnx.zip")
    with zipfile.ZipFile(tmp_path / "onnx.zip") as archive:
        archive.extractall(tmp_path)
    (model,) = tmp_path.rglob("model.onnx")
    folder = model.parent.parent
    read = PreTrainedTokenizerFast.from_pretrained(folder)
    given = read(["the old red house", "we"], padding=True, return_tensors="np")
    scores = graph.open_graph(folder, "onnx")(
        {name: given[name] for name in ("input_ids", "attention_mask")}
    )
    assert scores.shape == (2, 3)
    # Before the page is drawn: colours that are on their way from light to dark are of neither.
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 900})
    page.reload()
    page.get_by_text("Take it elsewhere").click()
    expect(page.get_by_role("link", name=re.compile("^Download for onnx"))).to_be_visible()
    idle(page)
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
