"""A browser for tests of pages: Chromium or Chrome where one is installed."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120_000
"""Milliseconds that a page may take on a busy machine."""


def executable(playwright: Any) -> str | None:
    """Return the path of a browser; None where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


@contextmanager
def launched() -> Iterator[Any]:
    """Yield a browser; skip the test, with the reason, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        path = executable(playwright)
        if path is None:
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page from a file, without a network, and everything that it complained about."""

    def __init__(self, browser: Any, path: Path, width: int = 1000) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.context.set_default_timeout(PATIENCE)
        self.context.set_offline(True)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page = self.context.new_page()

        def only_itself(route: Any) -> None:
            address = route.request.url
            if address == path.as_uri() or address.startswith(("blob:", "data:")):
                route.continue_()
            else:
                self.asked.append(address)
                route.abort()

        self.page.route("**/*", only_itself)
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready=true]")

    def wait_until(self, expression: str) -> None:
        """Wait until an expression is true in the page.

        Playwright's own `wait_for_function` calls eval, which the policy of the pages forbids.
        """
        until = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            self.page.wait_for_timeout(50)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
