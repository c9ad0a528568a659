"""Draws the picture of the page in docs/serve.md: python -m tests.browser.screenshot [FILE]"""

import sys
from pathlib import Path

from tests.browser import find_browser

ROOT = Path(__file__).parents[2]
SEED = "1"
PROMPTS = (
    "a large red circle on the left, white background",
    "a small yellow star on a blue background",
    "a purple square on the right, a small white cross on the left, green background",
    "a large red diamond, yellow background",
)
EDIT = "make the diamond blue"


def main() -> None:
    from playwright.sync_api import sync_playwright

    from tests.browser.conftest import Studio
    from tests.server import Server

    file = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "serve.png"
    with Server("--model", "nano") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 700}, device_scale_factor=2)
        studio = Studio(page, server)
        page.get_by_role("spinbutton", name="Seed").fill(SEED)
        for prompt in PROMPTS:
            studio.prompt.fill(prompt)
            studio.picture(prompt).wait_for()
            studio.wait_drawn()
        studio.button("Use as reference", exact=True).click()
        studio.prompt.fill(EDIT)
        studio.picture(EDIT).wait_for()
        studio.wait_drawn()
        page.mouse.move(0, 0)
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    main()
