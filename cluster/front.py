"""The front: hands requests to workers, streams tokens, and outlives the workers.

A request whose worker dies is replayed from its prompt on another one: greedy steps with the same
row groups give the same bits, so the replay repeats what was delivered and goes on. (Continuing
from the delivered tokens would prefill them in one pass, whose bits may differ.)
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray

from hotset.actors.messages import GenerateRequest, TokenChunk, decode, encode
from hotset.actors.requestlog import RequestLog
from hotset.errors import ClusterError, HotsetError
from hotset.transport.records import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.cluster.launch import Deployment

MOST_REPLAYS = 5


@dataclass(slots=True)
class Served:
    """How one request went; `traceparent` is that of its span."""

    tokens: list[int] = field(default_factory=list)
    wall_ns: int = 0
    first_token_ns: int = 0
    replays: int = 0
    workers: list[str] = field(default_factory=list)
    traceparent: str = ""


class Front:
    """Serves requests on a deployment's workers, least busy first."""

    def __init__(self, deployment: Deployment) -> None:
        """Workers may come and go while it serves."""
        self._deployment = deployment
        self._busy: Counter[str] = Counter()
        self._avoid: dict[str, float] = {}
        self._lock = threading.Lock()
        self._log = RequestLog(self._send)

    def generate(  # noqa: PLR0913 - what is asked, and who is told
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        on_tokens: Callable[[list[int]], None] = lambda _tokens: None,
        worker: str | None = None,
        traceparent: str = "",
        on_begin: Callable[[str], None] = lambda _header: None,
    ) -> Served:
        """Serve one request; returns after its last token. Raises what cannot be replayed.

        `traceparent` is the caller's (W3C trace context); without one the request is a new trace.
        `on_begin` gets that of the request's own span, before the first token.
        """
        span = self._log.begin(traceparent, prompt_tokens=len(prompt_ids))
        served = Served(traceparent=span.context.header)
        on_begin(served.traceparent)
        code = Code.FAILED
        try:
            self._replayed(prompt_ids, served, max_new_tokens, on_tokens, worker)
            code = Code.OK
        finally:
            span.tokens, span.replays = len(served.tokens), served.replays
            span.first_token_ns = served.first_token_ns
            span.worker = served.workers[-1] if served.workers else ""
            self._log.end(span, code=code)
        return served

    def _replayed(
        self,
        prompt_ids: Sequence[int],
        served: Served,
        max_new_tokens: int,
        on_tokens: Callable[[list[int]], None],
        worker: str | None,
    ) -> None:
        began_ns = time.monotonic_ns()
        request_id = secrets.token_hex(8)
        while True:
            name = self._pick(worker)
            served.workers.append(name)
            request = GenerateRequest(
                request_id=request_id,
                traceparent=served.traceparent,
                prompt_ids=tuple(prompt_ids),
                max_new_tokens=max_new_tokens,
                skip=len(served.tokens),
            )
            try:
                self._stream(name, request, served, on_tokens, began_ns)
            except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ClusterError):
                served.replays += 1
                if served.replays > MOST_REPLAYS:
                    raise ClusterError(
                        f"request {request_id} lost {served.replays} workers",
                        remedy="look at `ray list actors` for workers that keep dying",
                    ) from None
                self._avoid[name] = time.monotonic() + 5
                worker = None
                continue
            finally:
                with self._lock:
                    self._busy[name] -= 1
            served.wall_ns = time.monotonic_ns() - began_ns
            return

    def _stream(
        self,
        name: str,
        request: GenerateRequest,
        served: Served,
        on_tokens: Callable[[list[int]], None],
        began_ns: int,
    ) -> None:
        try:
            for reference in self._deployment.workers[name].generate.remote(encode(request)):
                chunk = decode(ray.get(reference), TokenChunk)
                if chunk.tokens and not served.first_token_ns:
                    served.first_token_ns = time.monotonic_ns() - began_ns
                served.tokens.extend(chunk.tokens)
                on_tokens(list(chunk.tokens))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, HotsetError):
                raise cause from None
            raise

    def _send(self, rows: bytes) -> None:
        """Send rows to a telemetry actor, the head's if there is one."""
        actors = self._deployment.telemetry
        actors.get("head", next(iter(actors.values()))).ingest.remote(rows)

    def _pick(self, wanted: str | None) -> str:
        with self._lock:
            names = list(self._deployment.workers)
            if not names:
                raise ClusterError("no worker is left", remedy="add one or start a new run")
            now = time.monotonic()
            fit = [name for name in names if self._avoid.get(name, 0) < now] or names
            best = min(fit, key=lambda name: (self._busy[name], name))
            name = wanted if wanted in fit else best
            self._busy[name] += 1
            return name

    def generate_many(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> list[Served]:
        """Serve requests at once, one thread each; results in the order of the prompts."""
        results: list[Served | BaseException | None] = [None] * len(prompts)

        def one(index: int, prompt: Sequence[int]) -> None:
            try:
                results[index] = self.generate(prompt, max_new_tokens=max_new_tokens)
            except BaseException as error:  # noqa: BLE001 - raised again below, on the caller
                results[index] = error

        threads = [
            threading.Thread(target=one, args=item, daemon=True) for item in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done: list[Served] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            assert result is not None  # noqa: S101 - every thread writes its place
            done.append(result)
        return done


__all__ = ["Front", "Served"]
