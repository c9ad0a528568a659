"""The page in a real browser, Debian's chromium or Chrome, by Playwright, against a server of nano."""

import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_browser() -> str | None:
    """A browser's program; Playwright's own downloads are not needed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (str(MAC) if MAC.exists() else None)
