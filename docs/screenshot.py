"""Take docs/layers.png from a running app: `python docs/screenshot.py [URL] [RUN]`.

Start the app and finish a run first; without RUN the newest finished one is shown. Needs the test
extras and Chromium (`apt-get install -y chromium`, or CHIPVIZ_CHROMIUM).
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

URL = "http://127.0.0.1:8501"
TARGET = Path(__file__).parent / "layers.png"


def main(url: str = URL, run: str = "") -> None:
    """Open the Layers page at its recommended cut and save what a person sees first."""
    chromium = os.environ.get("CHIPVIZ_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(f"{url}/layers{f'?run={run}' if run else ''}")
        page.locator(".st-key-curve .scatterlayer path.point").first.wait_for(state="attached")
        page.wait_for_selector(
            "[data-testid='stApp'][data-test-script-state='notRunning']", state="attached"
        )
        page.evaluate("document.fonts.ready")
        page.mouse.move(0, 0)
        page.screenshot(path=TARGET)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
