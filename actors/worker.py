"""Ray shell of a GPU worker: the dense part of the model, expert slots, requests and peers' tokens.

Four groups of threads: `ctl` answers operators at once, `serve` runs requests (one thread each),
`peer` computes for other workers, and the membership thread talks to the controller. On a machine
without a GPU the worker's HBM is a byte budget in host memory; on a GPU it is device memory. The
code is one: the spec names a torch device.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import ray
import torch

from hotset.actors import cgroup
from hotset.actors.assembly import Assembly, StoreSpec, peak_rss_bytes
from hotset.actors.cache import HotCache
from hotset.actors.canary import Canary, FullExperts
from hotset.actors.context import RowIds
from hotset.actors.formatchoice import FormatChoice
from hotset.actors.messages import (
    ComputeReply,
    ComputeRequest,
    ExpertRows,
    GenerateRequest,
    TokenChunk,
    decode,
    encode,
)
from hotset.actors.observe import Observer
from hotset.actors.peers import RayPeers, rows_from_bytes, rows_to_bytes
from hotset.actors.quality import QualitySpec  # noqa: TC001 - msgspec reads annotations
from hotset.actors.reformer import Reformer
from hotset.actors.tokenpath import PathConfig, TokenPath
from hotset.actors.tracecontext import child_of, parse
from hotset.actors.uses import Uses
from hotset.actors.weights import WeightViews
from hotset.actors.wiremeter import WireMeter
from hotset.blocks.checkpoint import Catalog
from hotset.blocks.generate import TokenStream, generate
from hotset.blocks.hf import import_model_code, load_skeleton
from hotset.errors import ClusterError
from hotset.policies.charge import Charge, gauges_of
from hotset.policies.config import ResidencyConfig
from hotset.policies.device import DeviceShape
from hotset.policies.live_share import LiveShare, ShareBounds
from hotset.policies.residency import DeviceResidency, make_policy
from hotset.policies.standin import StandInPurse
from hotset.policies.types import (
    LOSSLESS,
    BlockId,
    CancelTransfer,
    ChangeFormat,
    Command,
    DropCopy,
    Event,
    Format,
    Reason,
    RouterCounts,
    StartTransfer,
    State,
)
from hotset.transport.bulk import KERNELS
from hotset.transport.slots import part_bytes, slot_parts, slot_stride

if TYPE_CHECKING:
    from collections.abc import Iterator


_REFUSED = frozenset({Reason.VETO_PRECISION, Reason.VETO_DRIFT})


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told at birth."""

    store: StoreSpec
    threads: int = 1
    policy: str = "hotset"
    reference: Literal["eager", "grouped_mm"] = "eager"
    numerics: Literal["exact", "tiled"] = "exact"
    move: Literal["auto", "weights", "tokens"] = "auto"
    record: bool = False
    quality: QualitySpec | None = None
    live_check_ratio: float = 0.02  # share of the time that steps take; 0: nothing is checked

    @property
    def live_check(self) -> bool:
        """Whether steps are computed again: where nothing may be lost there is nothing to check."""
        lossy = self.quality is not None and self.quality.budget_nats > 0
        return lossy and self.live_check_ratio > 0

    @property
    def decodes(self) -> bool:
        """Whether compute needs a scratch slot for formats that it cannot read."""
        return self.quality is not None and bool(self.quality.planned())


class GPUWorker:
    """Serves requests with experts that may be anywhere."""

    def __init__(self, spec: bytes) -> None:
        """Load the dense part, join, and return when the first directory is here."""
        self._spec = msgspec.msgpack.decode(spec, type=WorkerSpec)
        _enter_memory_cgroup(self._spec.store.model)
        KERNELS.want()
        torch.set_num_threads(self._spec.threads)
        torch.set_grad_enabled(mode=False)
        self._parts = Assembly(self._spec.store)
        catalog = self._parts.catalog
        self._skeleton = load_skeleton(
            self._spec.store.model, catalog=catalog, device=self._spec.store.device
        )
        sizes = self._spec.store.payload_nbytes(catalog.block_nbytes)
        stride = slot_stride(catalog.block_nbytes, *self._spec.store.reduced_sizes())
        self._policy = make_policy(
            self._spec.policy,
            DeviceShape(
                layers=catalog.layers,
                num_experts=catalog.num_experts,
                full_nbytes=stride,
                reduced_nbytes=stride // 2,
                capacity_bytes=self._parts.slab.capacity_bytes
                # The live check's own slot, and the room that decoding takes beside the slab.
                - stride * (self._spec.live_check + self._spec.decodes),
                nbytes={
                    form: part_bytes(slot_parts(nbytes, stride=stride), stride=stride)
                    for form, nbytes in sizes.items()
                    if form not in LOSSLESS
                },
            ),
            config=ResidencyConfig(),
        )
        if isinstance(self._policy, DeviceResidency):
            self._policy.charge_predictors(time.thread_time_ns, switch=True)
        row_ids = RowIds(secrets.randbits(62) | 1)
        quality = self._spec.quality
        choice = FormatChoice(quality.planned() if quality else {}, directory=self._parts.directory)
        self._cache = HotCache(
            store=self._parts.store,
            fetcher=self._parts.fetcher,
            policy=self._policy,
            payload_nbytes=sizes,
            uses=Uses(self._parts.ring, take_id=row_ids.take),
            choose=choice.fetched,
            kept=lambda: self._parts.directory.plan.kept,
            arrived=lambda landing: self._reformer.arrived(landing),  # noqa: PLW0108 - made below
        )
        views = WeightViews(catalog=catalog, slab=self._parts.slab, directory=self._parts.directory)
        self._reformer = Reformer(
            catalog=catalog, store=self._parts.store, cache=self._cache, choice=choice, views=views
        )
        self._purse = StandInPurse(quality.meter()) if quality else None
        device = torch.device(self._spec.store.device)
        self._path = TokenPath(
            catalog=catalog,
            views=views,
            cache=self._cache,
            choice=choice,
            reformer=self._reformer,
            purse=self._purse,
            directory=self._parts.directory,
            peers=RayPeers(
                run=self._spec.store.run,
                directory=self._parts.directory,
                dtype=getattr(torch, catalog.dtype),
                device=device,
            ),
            ring=self._parts.ring,
            counters=self._parts.counters,
            row_ids=row_ids,
            config=PathConfig(
                reference=self._spec.reference,
                numerics=self._spec.numerics,
                move=self._spec.move,
            ),
        )
        self._leaves = False
        self._observer = Observer(self._path, layers=catalog.layers, record=self._spec.record)
        self._wire = WireMeter(
            catalog=catalog, fetcher=self._parts.fetcher, directory=self._parts.directory,
            device=device,
        )  # fmt: skip
        self._requests = 0
        self._canary = self._live_check(views) if self._spec.live_check else None
        self._skeleton.bind(self._canary or self._observer)
        self._skeleton.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._skeleton.model.register_forward_hook(self._after)
        self._serial = 0
        self._lock = threading.Lock()
        self._drained = threading.Event()
        self._parts.join(
            command=self._command,
            gauges=self._gauges,
            drained=self._drained.set,
            events=self._events,
            readings=self._wire.readings if self._spec.store.packs else tuple,
        )

    def __repr__(self) -> str:
        """What the Ray dashboard shows beside each log line."""
        slab, store = self._parts.slab, self._spec.store
        emulated = " emulated" if store.device == "cpu" else ""
        return (
            f"{store.name}[hbm{emulated} {slab.used_bytes >> 20}/{slab.capacity_bytes >> 20} MiB, "
            f"{len(self._parts.store.copies())} blocks]"
        )

    # --- serve ----------------------------------------------------------------------------------

    @ray.method(concurrency_group="serve")
    def generate(self, message: bytes) -> Iterator[bytes]:
        """Stream a request's tokens as `TokenChunk`s; the last one is `finished`."""
        request = decode(message, GenerateRequest)
        if not self._parts.may_serve:
            raise ClusterError(
                f"{self._spec.store.name} has lost its lease", remedy="ask another worker"
            )
        with self._lock:
            self._requests += 1
            self._serial += 1
            serial = self._serial
        chunks: SimpleQueue[TokenChunk | BaseException] = SimpleQueue()
        threading.Thread(
            target=self._serve, args=(request, serial, chunks), name=request.request_id, daemon=True
        ).start()
        try:
            finished = False
            while not finished:
                chunk = chunks.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                finished = chunk.finished
                yield encode(chunk)
        finally:
            with self._lock:
                self._requests -= 1

    def _serve(self, request: GenerateRequest, serial: int, chunks: SimpleQueue[Any]) -> None:
        asked = parse(request.traceparent) or child_of(None, span_id=0)
        self._path.begin_request(serial, trace=asked.trace, parent=asked.span_id)
        sent = 0

        def deliver(tokens: list[int]) -> None:
            nonlocal sent
            fresh = tokens[max(0, request.skip - sent) :]
            sent += len(tokens)
            self._parts.counters.tokens += len(tokens)
            if fresh:
                chunks.put(TokenChunk(request_id=request.request_id, tokens=tuple(fresh)))

        try:
            generate(
                self._skeleton.model,
                request.prompt_ids,
                max_new_tokens=request.max_new_tokens,
                stream=TokenStream(deliver),
            )
            chunks.put(TokenChunk(request_id=request.request_id, tokens=(), finished=True))
        except BaseException as error:  # noqa: BLE001 - it crosses to the caller's thread
            chunks.put(error)
        finally:
            self._policy.forget(serial)
            self._observer.ended(serial)
            if self._canary is not None:
                self._canary.ended(serial)

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._canary is not None and self._canary.mine:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._path.begin_step(0 if ids is None else int(ids.shape[-1]))
        if self._canary is not None and ids is not None:
            self._canary.step(self._path.context.request, ids)

    def _after(self, _module: Any, _args: Any, output: Any) -> None:
        if self._canary is not None and self._canary.mine:
            return
        self._path.end_step()
        if self._canary is not None:
            context = self._path.context
            step_ns = time.time_ns() - context.step_start_ns
            self._canary.stepped(context.request, output.logits, step_ns=step_ns)

    def _live_check(self, views: WeightViews) -> Canary:
        full = FullExperts(
            catalog=self._parts.catalog, cache=self._cache, fetcher=self._parts.fetcher,
            slab=self._parts.slab, views=views, reference=self._spec.reference,
            compute=self._path.compute_expert,
        )  # fmt: skip
        return Canary(
            self._skeleton.model, served=self._observer, full=full,
            share=LiveShare(ShareBounds(ratio=self._spec.live_check_ratio)),
            store=self._spec.store.name, requests=lambda: self._requests,
            waiting=lambda: self._cache.waiting,
        )  # fmt: skip

    # --- peer -----------------------------------------------------------------------------------

    @ray.method(concurrency_group="peer")
    def compute(self, message: bytes) -> bytes:
        """Run a peer's rows through experts that are here."""
        request = decode(message, ComputeRequest)
        began_ns = time.monotonic_ns()
        fresh = time.time_ns() < request.deadline_ns and self._parts.may_serve
        if not fresh:
            absent = tuple(
                ExpertRows(expert=p.expert, count=0, data=b"", present=False) for p in request.parts
            )
            return encode(ComputeReply(parts=absent, compute_ns=0))
        dtype = getattr(torch, self._parts.catalog.dtype)
        device = torch.device(self._spec.store.device)
        with torch.inference_mode():
            outputs = self._path.compute_for_peer(
                request.layer,
                self._skeleton.experts[request.layer],
                [
                    (p.expert, rows_from_bytes(p.data, count=p.count, dtype=dtype, device=device))
                    for p in request.parts
                ],
                asked=parse(request.traceparent),
            )
        parts = tuple(
            ExpertRows(expert=expert, count=0, data=b"", present=False)
            if rows is None
            else ExpertRows(expert=expert, count=rows.shape[0], data=rows_to_bytes(rows))
            for expert, rows in outputs.items()
        )
        reply = ComputeReply(parts=parts, compute_ns=time.monotonic_ns() - began_ns)
        return encode(reply)

    # --- ctl ------------------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    def pid(self) -> int:
        """Process id, for tests and for peak memory."""
        return os.getpid()

    @ray.method(concurrency_group="ctl")
    def peak_rss_bytes(self) -> int:
        """Largest resident set so far."""
        return peak_rss_bytes()

    @ray.method(concurrency_group="ctl")
    def dense_bytes(self) -> int:
        """Bytes of the dense part."""
        return self._skeleton.dense_bytes

    @ray.method(concurrency_group="ctl")
    def requests(self) -> int:
        """Requests being served."""
        return self._requests

    @ray.method(concurrency_group="ctl")
    def recording(self) -> bytes:
        """MessagePack of the `Recording` of this worker's requests."""
        return encode(self._observer.recording())

    @ray.method(concurrency_group="ctl")
    def draining(self) -> bool:
        """Whether the controller has asked this worker to leave."""
        return self._drained.is_set()

    @ray.method(concurrency_group="ctl")
    def check_integrity(self) -> bool:
        """Whether slab and policy agree with themselves; raises AssertionError where not."""
        self._parts.slab.check_integrity()
        return True

    @ray.method(concurrency_group="ctl")
    def live_checked(self) -> int:
        """Tokens that were computed again at full precision."""
        return self._canary.pairs if self._canary is not None else 0

    @ray.method(concurrency_group="ctl")
    def trace(self, *, on: bool) -> None:
        """Write rows, or do not: to measure what they cost."""
        self._parts.ring.switch(on=on)

    @ray.method(concurrency_group="ctl")
    def ship(self) -> None:
        """Send telemetry now, and wait until it is written."""
        self._parts.flush()

    @ray.method(concurrency_group="ctl")
    def close(self) -> None:
        """Leave: stop beating, ship what is left."""
        self._leaves = True
        if self._parts.membership is not None:
            self._parts.membership.stop()
        self._parts.flush()
        if self._canary is not None:
            self._canary.close()

    # --- membership thread ----------------------------------------------------------------------

    def _command(self, command: Command) -> None:
        match command:
            case StartTransfer() if command.format not in LOSSLESS:
                self._reformer.demote(command.block, command.format)
            case StartTransfer():
                self._bring(command)
            case DropCopy():
                if command.reason in _REFUSED and command.format not in LOSSLESS:
                    self._reformer.refused(command.block)
                self._cache.drop(command.block, reason=command.reason, only=command.format)
            case CancelTransfer():
                self._cancel(command.block, command.format)
            case ChangeFormat() if command.into is Format.BF16:
                if command.reason is Reason.VETO_DRIFT:
                    self._reformer.distrust()
                self._reformer.promote(command.block)
            case ChangeFormat():
                self._reformer.demote(command.block, command.into)
            case _:
                pass

    def _bring(self, command: StartTransfer) -> None:
        block, form, reason = command.block, command.format, command.reason
        if not self._parts.store.tell_again(block, form, reason=reason) and not (
            self._cache.prefetch([(block.layer, block.index)], reason=reason)
        ):
            self._refuse(block, form, reason=Reason.VETO_MEMORY)

    def _cancel(self, block: BlockId, fmt: Format) -> None:
        """Answer for a transfer that is not under way; one that is answers when it has landed."""
        if self._policy.state(block.layer, block.index) is not State.IN_FLIGHT:
            self._refuse(block, fmt, reason=Reason.CANCELLED)

    def _refuse(self, block: BlockId, fmt: Format, *, reason: Reason) -> None:
        self._parts.store.report_failure(block, fmt, reason=reason)

    def _events(self) -> list[Event]:
        name, catalog = self._spec.store.name, self._parts.catalog
        events = self._observer.reports(
            name,
            requests=self._requests,
            used_bytes=self._parts.slab.used_bytes,
            links=self._parts.fetcher.uses,
            last=self._leaves,
        )
        if self._canary is not None:
            events += self._canary.take_events()
        counts = self._path.routed_since_last()
        if counts:
            uses = sum(count for _, count in counts)
            tokens = -(-uses // (len(catalog.layers) * catalog.top_k))
            events.append(
                RouterCounts(now_ns=time.time_ns(), store=name, counts=counts, tokens=tokens)
            )
        return events

    def _gauges(self) -> dict[str, float]:
        counters = self._parts.counters
        return {
            "requests": self._requests,
            "tokens": counters.tokens,
            "stall_ns": counters.stall_ns,
            **gauges_of(self._charges(), prefetching=self._path.prefetching),
        }

    def _charges(self) -> tuple[Charge, ...]:
        return self._policy.charges() if isinstance(self._policy, DeviceResidency) else ()


def _enter_memory_cgroup(model: str) -> None:
    """Go under the limit that a benchmark has set; what is imported by now does not count."""
    group = os.environ.get(cgroup.ENV)
    if group:
        import_model_code(Catalog.open(model).model_type)
        cgroup.join(group)


@cache
def remote_classes() -> dict[str, Any]:
    """Ray's actor classes of every shell here, by role."""
    from hotset.actors.controller import Controller
    from hotset.actors.pools import CXLPool, HostPool
    from hotset.actors.telemetry import Telemetry

    groups = {"ctl": 2, "peer": 2, "serve": 16}
    return {
        "worker": ray.remote(concurrency_groups=groups)(GPUWorker),
        "controller": ray.remote(concurrency_groups={"ask": 2})(Controller),
        "host": ray.remote(HostPool),
        "cxl": ray.remote(CXLPool),
        "telemetry": ray.remote(Telemetry),
    }
