"""A page server on a thread, and a Chromium that can reach nothing but it."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from hotset.dashboards.page.server import PageServer, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.dashboards.page.run import Source

DEADLINE_S = 45.0
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a browser."""
    for item in items:
        if "browser" in item.nodeid.split("/")[:-1]:
            item.add_marker(pytest.mark.browser)


@contextmanager
def page_server(source: Source, *, now_ns: int) -> Iterator[str]:
    """The address of a server of this source."""
    started = threading.Event()
    state: dict[str, Any] = {}

    async def main() -> None:
        server = PageServer(source, poll_s=0.05, clock_ns=lambda: now_ns)
        state["loop"] = asyncio.get_running_loop()
        state["task"] = asyncio.current_task()

        def ready(port: int) -> None:
            state["port"] = port
            started.set()

        await serve(server, host="127.0.0.1", port=0, ready=ready)

    def run() -> None:
        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            pass
        finally:
            started.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(DEADLINE_S)
    try:
        yield f"http://127.0.0.1:{state['port']}/"
    finally:
        state["loop"].call_soon_threadsafe(state["task"].cancel)
        thread.join(DEADLINE_S)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium under Playwright, with every name but loopback cut off."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            timeout=1000 * DEADLINE_S,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield browser
        browser.close()


class Visit:
    """A page that was opened: what it logged and what it asked for."""

    def __init__(self, context: Any, url: str) -> None:
        self.console: list[str] = []
        self.outside: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(1000 * DEADLINE_S)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        self.page.route("**/*", self._route)
        self.page.goto(url)
        self.until("window.hotset?.link.moments > 0 && hotset.grid.frames > 0")
        self.until("!hotset.grid.dirty && document.getElementById('cell').textContent")  # and lists

    def _said(self, message: Any) -> None:
        asked_by_the_test = "willReadFrequently" in message.text
        if message.type in {"error", "warning"} and not asked_by_the_test:
            self.console.append(f"{message.type}: {message.text}")

    def _route(self, route: Any) -> None:
        if urlsplit(route.request.url).hostname in {"127.0.0.1", None}:
            route.continue_()
            return
        self.outside.append(route.request.url)
        route.abort()

    def until(self, condition: str) -> None:
        """Wait for a condition; as a function, since the page's policy forbids eval."""
        self.page.wait_for_function(f"() => Boolean({condition})")

    def at(self, offset_ns: int) -> None:
        """Show a moment and wait until it has been drawn."""
        self.page.evaluate(
            """(offset) => {
              const { state, link, grid } = hotset;
              state.follow = false; state.offset = offset;
              window.goal = grid.frames;
              link.show({ offset_ns: offset, plan: null });
            }""",
            offset_ns,
        )
        self.until(
            f"hotset.state.model.moment.offset_ns === {offset_ns} && hotset.grid.frames > goal"
        )


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Open pages; each must have been quiet and have asked for nothing outside at the end."""
    contexts, visits = [], []

    def open_page(url: str, **options: Any) -> Visit:
        options.setdefault("viewport", {"width": 1360, "height": 1500})
        context = chromium.new_context(**options)
        contexts.append(context)
        visits.append(Visit(context, url))
        return visits[-1]

    yield open_page
    said = [(one.console, one.outside) for one in visits]
    for context in contexts:
        context.close()
    assert said == [([], [])] * len(said)
