"""A browser for tests: Debian's chromium, driven by Playwright.

Without chromium, the browser tests are skipped. Playwright's pytest plug-in is not used, because its event loop breaks
asynchronous tests.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from console.person import make_link

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from playwright.sync_api import Browser, Page
    from sqlalchemy import Engine

CHROMIUM = shutil.which("chromium")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, as of Debian's package of that name")

PATIENCE = 15_000
"""Timeout of a browser operation in milliseconds, long enough for a busy machine."""


@contextmanager
def browsing() -> Iterator[Browser]:
    """Start the browser, and stop it together with its driver."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class BrowserWindow:
    """A browser window that shows the console. Any error that the browser reports fails the test."""

    def __init__(self, browser: Browser, url: str, engine: Engine, **options: Any) -> None:
        self.url = f"{url}/console"
        self._engine = engine
        self.complaints: list[str] = []
        self.context = browser.new_context(locale="en-US", timezone_id="America/Sao_Paulo", **options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.open()

    def open(self) -> Page:
        """Open another tab in the browser window."""
        page = self.context.new_page()
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        return page

    def sign_in(self, role: str, workspace_id: UUID | None = None) -> Page:
        """Open a sign-in link."""
        token = make_link(self._engine, role, workspace_id)
        self.page.goto(f"{self.url}/login#token={token}")
        self.page.wait_for_url(lambda url: "/login" not in url)
        return self.page

    def go(self, path: str) -> Page:
        """Open a page of the console."""
        self.page.goto(f"{self.url}{path}", wait_until="load")
        return self.page

    def violations(self) -> list[str]:
        """Return the accessibility violations that axe finds on the page, by the rules of WCAG 2.2 AA."""
        options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
        found = Axe().run(self.page, options=options).response["violations"]
        return [f"{each['id']}: {[node['html'] for node in each['nodes']][:3]}" for each in found]
