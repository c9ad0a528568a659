"""A browser, a server and a page for these tests: each has the page to itself, loaded anew.

In a context of its own a page has the browser start a process, which takes three times a test's own CPU time.
Playwright keeps an event loop running in the tests' thread, so that nothing else there could run one: it ends with the
last of these tests, before any other.
"""

import contextlib
import json
import re
from urllib.parse import urlsplit

import pytest

from tests.browser import find_browser
from tests.server import nano_server

# Every state of the stage that was to be seen, and what the picture was, however short.
WATCH = """() => {
  const stage = document.getElementById("stage");
  const picture = document.getElementById("picture");
  window.seen = [];
  const note = () => window.seen.push(
    [stage.dataset.shows, picture.alt, stage.classList.contains("is-old"), picture.src.slice(0, 16)]);
  new MutationObserver(note).observe(stage, { attributes: true, subtree: true, attributeFilter: ["src", "class"] });
}"""
VIEWPORT = {"width": 900, "height": 700}
NAMELESS = re.compile(
    r" *- (button|checkbox|combobox|img|link|progressbar|slider|spinbutton|textbox|application)\b(?! \")"
)
DONE = "#stage[aria-busy=false][data-shows=image]:not(.is-old)"


@pytest.fixture(scope="package")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no chromium or Chrome is installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason='playwright is not there (pip install -e ".[dev]")')
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("LD_PRELOAD", raising=False)  # OpenBLAS is for MLX
            started = stack.enter_context(playwright.sync_playwright())
            opened = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="package")
def page(browser):
    """The page that tests share, one after the other."""
    return browser.new_page(viewport=VIEWPORT)


@pytest.fixture(scope="package")
def server():
    with nano_server() as running:
        yield running


class Studio:
    """A page, and what tests do with it.

    Attributes:
        bodies: of the requests for images, in order.
        hung_up: bodies of those that were hung up.
        faults: what the console told, and requests to other hosts.
        expected: words of faults that a test brings about.
    """

    def __init__(self, page, server):
        self.page, self.server = page, server
        self.bodies, self.hung_up, self.faults, self.expected = [], [], [], None
        self._listeners = {
            "request": self._note,
            "requestfailed": lambda request: self.hung_up.append(request.post_data_json),
            "console": lambda message: self.faults.append(message.text) if message.type == "error" else None,
            "pageerror": lambda error: self.faults.append(str(error)),
        }
        for event, listener in self._listeners.items():
            page.on(event, listener)
        page.goto(server.address)
        self.prompt = page.get_by_role("textbox", name="Prompt", exact=True)
        self.status = page.get_by_role("status")
        page.evaluate(WATCH)

    def _note(self, request):
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.netloc != urlsplit(self.server.address).netloc:
            self.faults.append(f"a request to {request.url}")
        if url.path == "/api/images":
            self.bodies.append(json.loads(request.post_data))

    def leave(self):
        """Leave nothing of this test on the page, where each control must have a name at last."""
        found = self.page.locator("body").aria_snapshot().splitlines()
        self.faults += [f"without a name: {line.strip()}" for line in found if NAMELESS.match(line)]
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)
        self.page.unroute_all(behavior="ignoreErrors")
        self.page.mouse.up()
        self.page.evaluate("() => sessionStorage.clear()")
        self.page.goto("about:blank")

    def button(self, name, **how):
        return self.page.get_by_role("button", name=name, **how)

    def picture(self, prompt):
        return self.page.get_by_role("img", name=prompt, exact=True)

    def wait_drawn(self):
        self.page.wait_for_selector(DONE)

    def draw(self, prompt, steps=1):
        """Draw a prompt, and wait for its image."""
        self.set_steps(steps)
        self.prompt.fill(prompt)
        self.picture(prompt).wait_for()
        self.wait_drawn()

    def set_steps(self, steps):
        self.open_more()
        self.page.get_by_role("spinbutton", name="Steps").fill(str(steps))

    def open_more(self):
        more = self.button("More")
        if more.get_attribute("aria-expanded") == "false":
            more.click()

    def add_reference(self, *files):
        """Pick files, as (name, content) of PNG."""
        with self.page.expect_file_chooser() as chooser:
            self.button("Add reference image").click()
        chooser.value.set_files([{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files])

    def drop(self, place, name, content):
        """Drop a file on a place, as a selector."""
        transfer = self.page.evaluate_handle(
            """([name, bytes]) => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
              return transfer;
            }""",
            [name, list(content)],
        )
        self.page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
        self.page.dispatch_event(place, "drop", {"dataTransfer": transfer})

    def download(self):
        """The file of the image that is shown."""
        with self.page.expect_download() as download:
            self.button("Download").click()
        return download.value

    def seen(self):
        """What was to be seen since the last call: (kind, alt, whether it was dimmed, the source's beginning)."""
        return [tuple(one) for one in self.page.evaluate("() => window.seen.splice(0)")]


@pytest.fixture
def studio(page, server):
    """The page, opened, on which nothing must go wrong that the test does not expect."""
    studio = Studio(page, server)
    yield studio
    studio.leave()
    check(studio)


@pytest.fixture
def phone(browser, server):
    """The same on a phone, in the dark."""
    with browser.new_context(
        viewport={"width": 375, "height": 667},
        has_touch=True,
        is_mobile=True,
        color_scheme="dark",
        reduced_motion="reduce",
    ) as context:
        studio = Studio(context.new_page(), server)
        yield studio
        studio.leave()
    check(studio)


def check(studio):
    unexpected = [fault for fault in studio.faults if studio.expected is None or studio.expected not in fault]
    assert unexpected == []
    studio.server.settle()
