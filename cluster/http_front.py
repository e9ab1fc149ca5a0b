"""`hotset serve`: requests over HTTP, in the shape of OpenAI's completions.

Decides how a request is read and an answer spelled; `Front` serves it. Trace context (W3C): a
`traceparent` that comes with a request is the parent of its span, and every answer carries the
`traceparent` of that span, so that a caller finds the request's trace, down to the transfers that
it waited for.

Greedy decoding only: a request that asks for sampling is refused, not answered otherwise. A caller
that goes away does not end its request. Invariants: a request past the limit is refused at once;
text comes in whole characters.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from hotset.errors import UNREADABLE, ConfigError, HotsetError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hotset.cluster.front import Front, Served

MOST_BODY = 1 << 20
MOST_REQUESTS = 64
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # a character whose last bytes are still to come


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request's body; what is not listed is ignored."""

    prompt: str | list[int]
    max_tokens: int = 16
    stream: bool = False
    temperature: float = 0.0
    n: int = 1
    model: str = ""


@dataclass(frozen=True, slots=True)
class _Ended:
    """The last thing in a request's queue."""

    served: Served | None
    error: BaseException | None


class HttpFront:
    """The addresses of one deployment's front."""

    def __init__(
        self, front: Front, tokenizer: Any, *, model: str, most_requests: int = MOST_REQUESTS
    ) -> None:
        """`model` is the name that answers give."""
        self._front = front
        self._tokenizer = tokenizer
        self._model = model
        self._most = most_requests
        self._busy = 0
        self._threads = ThreadPoolExecutor(max_workers=most_requests, thread_name_prefix="request")

    def app(self) -> web.Application:
        """The application, to be run by aiohttp."""
        app = web.Application(client_max_size=MOST_BODY)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok", "requests": self._busy})

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        one = {"id": self._model, "object": "model", "owned_by": "hotset"}
        return web.json_response({"object": "list", "data": [one]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = msgspec.json.decode(await request.read(), type=Asked)
            ids = self._ids(asked)
        except UNREADABLE as error:
            return _error(400, str(error))
        if self._busy >= self._most:
            return _error(429, f"{self._most} requests are under way; try again")
        caller = request.headers.get("traceparent", "")
        self._busy += 1
        try:
            if asked.stream:
                return await self._stream(request, asked, ids, caller)
            return await self._whole(asked, ids, caller)
        finally:
            self._busy -= 1

    def _ids(self, asked: Asked) -> list[int]:
        """The prompt's tokens. Raises ValueError for what cannot be served."""
        if asked.temperature or asked.n != 1:
            raise ValueError("only greedy decoding is served: leave temperature and n out")
        if asked.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {asked.max_tokens}")
        if isinstance(asked.prompt, str):
            ids: list[int] = self._tokenizer(asked.prompt)["input_ids"]
        else:
            ids = asked.prompt
        vocabulary = len(self._tokenizer)
        if not ids or not all(0 <= one < vocabulary for one in ids):
            raise ValueError(f"the prompt must be text, or ids from 0 to {vocabulary - 1}")
        return ids

    async def _tokens(
        self, asked: Asked, ids: list[int], caller: str, opened: Callable[[str], None]
    ) -> AsyncIterator[list[int] | Served]:
        """Tokens as they come, then how the request went. Raises what the front raises."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | list[int] | _Ended] = asyncio.Queue()

        def put(one: str | list[int] | _Ended) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, one)

        def serve() -> None:
            try:
                served = self._front.generate(
                    ids, max_new_tokens=asked.max_tokens, traceparent=caller,
                    on_begin=put, on_tokens=put,
                )  # fmt: skip
            except BaseException as error:  # noqa: BLE001 - it crosses to the loop's thread
                put(_Ended(None, error))
            else:
                put(_Ended(served, None))

        self._threads.submit(serve)
        while True:
            one = await queue.get()
            if isinstance(one, str):
                opened(one)
            elif isinstance(one, list):
                yield one
            elif one.served is not None:
                yield one.served
                return
            elif one.error is not None:
                raise one.error

    async def _whole(self, asked: Asked, ids: list[int], caller: str) -> web.StreamResponse:
        headers: dict[str, str] = {}
        tokens: list[int] = []
        try:
            async for part in self._tokens(
                asked, ids, caller, lambda header: headers.update(traceparent=header)
            ):
                if isinstance(part, list):
                    tokens += part
        except HotsetError as error:
            return _error(503, str(error), headers=headers)
        text = self._tokenizer.decode(tokens)
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": len(tokens),
            "total_tokens": len(ids) + len(tokens),
        }
        body = self._body(text, reason=_reason(len(tokens), asked)) | {"usage": usage}
        return web.json_response(body, headers=headers)

    async def _stream(
        self, request: web.Request, asked: Asked, ids: list[int], caller: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        tokens: list[int] = []
        shown = ""
        try:
            async for part in self._tokens(
                asked, ids, caller, lambda header: response.headers.update(traceparent=header)
            ):
                if not response.prepared:
                    await response.prepare(request)
                if not isinstance(part, list):
                    continue
                tokens += part
                text = self._tokenizer.decode(tokens)
                if not text.endswith(_BROKEN):
                    await response.write(_event(self._body(text[len(shown) :])))
                    shown = text
            rest = self._tokenizer.decode(tokens)[len(shown) :]
            await response.write(_event(self._body(rest, reason=_reason(len(tokens), asked))))
            await response.write(b"data: [DONE]\n\n")
        except HotsetError as error:
            if not response.prepared:
                return _error(503, str(error), headers=dict(response.headers))
            await response.write(_event({"error": {"message": str(error)}}))
        except ConnectionError:
            return response  # the caller has gone; the request goes on to its end
        await response.write_eof()
        return response

    def _body(self, text: str, *, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        return {
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": [choice],
        }


def _reason(tokens: int, asked: Asked) -> str:
    return "length" if tokens >= asked.max_tokens else "stop"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _error(status: int, text: str, *, headers: dict[str, str] | None = None) -> web.Response:
    kept = {key: value for key, value in (headers or {}).items() if key == "traceparent"}
    return web.json_response({"error": {"message": text}}, status=status, headers=kept)


async def serve_http(
    front: HttpFront, *, host: str, port: int, ready: Callable[[int], None]
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` gets the port, which differs when 0 was asked for.

    Raises ConfigError when the address is taken.
    """
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    runner = web.AppRunner(front.app(), access_log=None, shutdown_timeout=5)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror})",
                remedy="choose another with --port",
            ) from None
        ready(runner.addresses[0][1])
        await over.wait()
    finally:
        await runner.cleanup()
