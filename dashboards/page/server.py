"""The page's server: static files, a few JSON addresses, and one WebSocket for each viewer.

Read-only: no request changes anything, in the run or here. Must not know what a journal says or how
a page looks. Only names of this machine are answered to (a page of another site that has its name
point here gets 403), and a WebSocket must come from this page.

Invariants: the run is read and asked by one thread at a time; a viewer gets one moment after
another, so a slow one delays itself only; nothing is loaded from anywhere but here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from aiohttp import WSMsgType, web

from hotset.dashboards.page import wire
from hotset.errors import UNREADABLE
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiohttp.typedefs import Handler, Middleware

    from hotset.dashboards.page.moment import Moment
    from hotset.dashboards.page.run import Source
    from hotset.dashboards.page.timeline import Cells
    from hotset.dashboards.page.wire import Ask

STATIC = Path(__file__).resolve().parent / "static"
POLL_S = 0.5
SERIES_S = 2.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class PageServer:
    """Serves one source. `hosts` are the names that a browser may call it by, None for any."""

    def __init__(
        self,
        source: Source,
        *,
        poll_s: float = POLL_S,
        hosts: frozenset[str] | None = LOOPBACK,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Nothing is read before the server starts."""
        self._source = source
        self._poll_s = poll_s
        self._hosts = hosts
        self._clock_ns = clock_ns
        self._lock = asyncio.Lock()
        self._viewers: set[_Viewer] = set()
        self.trouble = ""

    def app(self) -> web.Application:
        """The application, to be run by aiohttp."""
        app = web.Application(middlewares=[self._guard()])
        app.router.add_get("/", _index)
        app.router.add_get("/ws", self._socket)
        app.router.add_get("/api/moment", self._moment_json)
        app.router.add_get("/api/why/{block}", self._why_json)
        app.router.add_static("/static", STATIC, follow_symlinks=False)
        app.cleanup_ctx.append(self._polling)
        return app

    async def moment(self, ask: Ask) -> tuple[Moment, Cells]:
        """The run at the moment that was asked for."""
        run = self._source.run
        at_ns = None if ask.offset_ns is None else run.timeline.from_ns + ask.offset_ns

        def read() -> tuple[Moment, Cells]:
            return run.moment(
                at_ns=at_ns,
                now_ns=self._clock_ns(),
                live=self._source.live,
                plan_epoch=ask.plan,
            )

        async with self._lock:
            return await asyncio.to_thread(read)

    async def series(self) -> str:
        """Time series of the run so far."""
        run = self._source.run
        async with self._lock:
            found = await asyncio.to_thread(run.series)
        return wire.series(found, from_ns=run.timeline.from_ns)

    async def why(self, ask: Ask) -> str:
        """Story of a block up to the moment that was asked for."""
        run = self._source.run
        try:
            block = BlockId.parse(ask.block)
        except ValueError as error:
            return wire.trouble(str(error))
        start_ns = run.timeline.from_ns
        at_ns = None if ask.offset_ns is None else start_ns + ask.offset_ns
        async with self._lock:
            found = await asyncio.to_thread(lambda: run.why(block, at_ns=at_ns))
        return wire.why(found, block=ask.block, from_ns=start_ns)

    def hello(self) -> str:
        """The run's shape."""
        return wire.hello(self._source.run)

    # --- handlers -------------------------------------------------------------------------------

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise web.HTTPForbidden(text="this address serves its own page only")
        socket = web.WebSocketResponse(heartbeat=20, max_msg_size=1 << 16)
        await socket.prepare(request)
        viewer = _Viewer(self, socket)
        self._viewers.add(viewer)
        try:
            await viewer.run()
        finally:
            self._viewers.discard(viewer)
        return socket

    async def _moment_json(self, request: web.Request) -> web.StreamResponse:
        text = request.query.get("offset_ns")
        if text is not None and not text.isdigit():
            raise web.HTTPBadRequest(text="offset_ns counts nanoseconds from the run's start")
        now, _ = await self.moment(wire.Ask(kind="show", offset_ns=int(text) if text else None))
        return web.Response(body=msgspec.json.encode(now), content_type="application/json")

    async def _why_json(self, request: web.Request) -> web.StreamResponse:
        said = await self.why(wire.Ask(kind="why", block=request.match_info["block"]))
        return web.Response(text=said, content_type="application/json")

    def _guard(self) -> Middleware:
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            name = request.host.rpartition(":")[0] if _has_port(request.host) else request.host
            if self._hosts is not None and name not in self._hosts:
                raise web.HTTPForbidden(text=f"not served under the name {name!r}")
            response = await handler(request)
            if not response.prepared:
                response.headers.update(HEADERS)
            return response

        return guard

    # --- following ------------------------------------------------------------------------------

    async def _polling(self, _app: web.Application) -> AsyncIterator[None]:
        await self._poll()
        task = asyncio.create_task(self._follow())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for viewer in list(self._viewers):
            await viewer.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            news = await self._poll()
            if news or self._source.live:
                for viewer in self._viewers:
                    viewer.wake()

    async def _poll(self) -> bool:
        """Read on; a source that fails keeps what it has and says so until it answers again."""
        try:
            async with self._lock:
                news = await asyncio.to_thread(self._source.poll)
        except Exception as error:  # noqa: BLE001 - Ray and file systems raise many kinds; shown
            self.trouble = f"the run cannot be read on: {type(error).__name__}: {error}"[:300]
            return True
        self.trouble = ""
        return news


class _Viewer:
    """One connection: what it looks at, and what it was sent last."""

    def __init__(self, server: PageServer, socket: web.WebSocketResponse) -> None:
        self._server = server
        self._socket = socket
        self._ask = wire.Ask(kind="show")
        self._cells: Cells | None = None
        self._wanted = asyncio.Event()
        self._series_at = 0.0

    def wake(self) -> None:
        """There are news."""
        self._wanted.set()

    async def close(self) -> None:
        """End the connection."""
        await self._socket.close()

    async def run(self) -> None:
        """Serve until the page goes away."""
        await self._socket.send_str(self._server.hello())
        self._wanted.set()
        sender = asyncio.create_task(self._send())
        try:
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    await self._take(message.data)
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await sender

    async def _take(self, text: str) -> None:
        try:
            ask = wire.decode_ask(text)
        except UNREADABLE as error:
            await self._socket.send_str(wire.trouble(str(error)))
            return
        if ask.kind == "why":
            await self._socket.send_str(await self._server.why(ask))
            return
        self._ask = ask
        self._wanted.set()

    async def _send(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            now, cells = await self._server.moment(self._ask)
            await self._socket.send_bytes(wire.moment(now, cells, before=self._cells))
            self._cells = cells
            if self._server.trouble:
                await self._socket.send_str(wire.trouble(self._server.trouble))
            if time.monotonic() >= self._series_at:
                self._series_at = time.monotonic() + SERIES_S
                await self._socket.send_str(await self._server.series())


async def _index(_request: web.Request) -> web.StreamResponse:
    return web.FileResponse(STATIC / "index.html")


def _has_port(host: str) -> bool:
    return host.rpartition(":")[2].isdigit() and not host.endswith("]")


async def serve(server: PageServer, *, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Serve until cancelled; `ready` gets the port (which differs when 0 was asked for)."""
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound: int = runner.addresses[0][1]
        ready(bound)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
