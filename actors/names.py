"""Every name that hotset shows to the outside: spans, attributes, metrics, resources.

Decides spelling, unit and meaning, and nothing else. Must not know who records or who reads. A name
that is not here is not written; the tables of the documentation are made from these tuples.

Invariants: names are append-only, since traces and panels outlive versions; a metric's labels are
bounded (stores, tiers, reasons), never an expert or a request; sizes are in bytes and times in ns,
except where Prometheus wants seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """A key of a span, a scope or a resource. `unit` is empty for text and plain counts."""

    name: str
    unit: str = ""
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A kind of span, with the attributes that it may carry."""

    name: str
    meaning: str
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric for `ray.util.metrics`: `labels` are its `tag_keys`, `meaning` its description.

    Every metric has the label `run`, so that runs on one cluster do not add up.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    labels: tuple[str, ...] = ()
    meaning: str


SCOPE = "hotset"
"""Name of the instrumentation scope of every span."""

# --- resource: who wrote the spans of one line of a trace file ------------------------------------

SERVICE_NAME = Attribute(name="service.name", meaning="always `hotset`")
SERVICE_INSTANCE = Attribute(name="service.instance.id", meaning="the store, as in hotset.store")
HOST_NAME = Attribute(name="host.name", meaning="the node that the store lives on")
RUN = Attribute(name="hotset.run", meaning="id of the run; its requests are traces of their own")
STORE = Attribute(name="hotset.store", meaning="the store whose rows these are")
TIER = Attribute(name="hotset.tier", meaning="tier of the store: hbm, host, cxl, storage")
EMULATED = Attribute(name="hotset.emulated", meaning="what is emulated, for instance `cxl: paced`")

LINK_BOUND = Attribute(
    name="hotset.link.bytes_per_s",
    unit="By/s",
    meaning="what the emulated link to this store gives all its readers together; absent when real",
)
CLOCK_OFFSET = Attribute(
    name="hotset.clock.offset_ns",
    unit="ns",
    meaning="wall clock of the controller minus this node's, at the least round trip seen",
)
CLOCK_ERROR = Attribute(
    name="hotset.clock.error_ns", unit="ns", meaning="half of that round trip: bound of the error"
)

RESOURCE = (
    SERVICE_NAME, SERVICE_INSTANCE, HOST_NAME, RUN, STORE, TIER, EMULATED, LINK_BOUND, CLOCK_OFFSET,
    CLOCK_ERROR,
)  # fmt: skip

# --- scope: numbers about one line of a trace file ------------------------------------------------

DROPPED = Attribute(
    name="hotset.telemetry.dropped", meaning="rows lost since the line before of this store"
)
SAMPLED_OUT = Attribute(
    name="hotset.telemetry.sampled_out",
    meaning="ordinary transfers, and their uses, left out by ratio since the line before",
)
SCOPE_ATTRIBUTES = (DROPPED, SAMPLED_OUT)

# --- span attributes ------------------------------------------------------------------------------

SOURCE = Attribute(name="hotset.source", meaning="store, or `storage`, that the bytes came from")
SOURCE_TIER = Attribute(name="hotset.source.tier", meaning="tier of the source")
FORMAT = Attribute(name="hotset.format", meaning="format of the block's bytes")
LAYER = Attribute(name="hotset.layer", meaning="decoder layer of the block")
INDEX = Attribute(name="hotset.index", meaning="expert of the layer")
TOKENS = Attribute(name="hotset.tokens", meaning="tokens in this step, layer or dispatch")
REASON = Attribute(name="hotset.reason", meaning="why: a policies.types.Reason")
CODE = Attribute(
    name="hotset.code", meaning="how it ended: ok, failed, stale, timed_out, cancelled"
)
NBYTES = Attribute(name="hotset.bytes", unit="By", meaning="bytes of payload moved")
QUEUE = Attribute(name="hotset.queue_ns", unit="ns", meaning="time between submit and post")
WIRE = Attribute(
    name="hotset.wire_ns", unit="ns", meaning="time between post and the backend's end"
)
VERIFY = Attribute(name="hotset.verify_ns", unit="ns", meaning="time to check header and checksum")
ACTIVATE = Attribute(
    name="hotset.activate_ns", unit="ns", meaning="time until the slot was readable and told of"
)
USED = Attribute(
    name="hotset.used",
    meaning="of a use: whether compute read the bytes before they were dropped; older traces have "
    "it at transfers",
)
ATTEMPT = Attribute(name="hotset.attempt", meaning="number of earlier attempts; absent when none")
REQUEST = Attribute(
    name="hotset.request.trace_id",
    meaning="trace id of the request, 32 hex digits; in older traces, where a run was one trace",
)
WORKER = Attribute(name="hotset.worker", meaning="worker that served the request, the last of them")
PROMPT_TOKENS = Attribute(name="hotset.prompt.tokens", meaning="tokens of the prompt")
FIRST_TOKEN = Attribute(
    name="hotset.first_token_ns", unit="ns", meaning="time from the request to its first token"
)
EPOCH = Attribute(name="hotset.epoch", meaning="epoch in force when the span ended")
TARGET = Attribute(name="hotset.target", meaning="store that joined, left, was lost or was refused")
STARTS = Attribute(name="hotset.plan.transfers", meaning="transfers that the plan asked for")
DROPS = Attribute(name="hotset.plan.drops", meaning="copies that the plan asked to drop")
BALANCE_BEFORE = Attribute(
    name="hotset.plan.balance_before_ppm",
    meaning="of a plan for replicas: mean by largest load of a worker before it, in millionths",
)
BALANCE_AFTER = Attribute(
    name="hotset.plan.balance_after_ppm", meaning="the same after it; of a refused one, had it come"
)
PLAN_MOVED = Attribute(
    name="hotset.plan.moves", meaning="copies that a plan for replicas moves, or would have moved"
)
BOUND = Attribute(name="hotset.bound", meaning="the bound that a veto protects, as a sentence")
LINK = Attribute(name="hotset.link", meaning="of a link: `waited_on` or `used`, from compute")

WAITED_ON = "waited_on"
"""Value of `hotset.link`: this span waited for the linked one, a transfer or a dispatch."""
USED_LINK = "used"
"""Value of `hotset.link`: this span tells what became of the bytes of the linked transfer."""

SPAN_ATTRIBUTES = (
    SOURCE, SOURCE_TIER, FORMAT, LAYER, INDEX, TOKENS, REASON, CODE, NBYTES, QUEUE, WIRE, VERIFY,
    ACTIVATE, USED, ATTEMPT, REQUEST, EPOCH, TARGET, STARTS, DROPS, BALANCE_BEFORE,
    BALANCE_AFTER, PLAN_MOVED, BOUND, LINK, WORKER,
    PROMPT_TOKENS, FIRST_TOKEN,
)  # fmt: skip

# --- spans ----------------------------------------------------------------------------------------

SPAN_PLAN = Span(
    name="hotset.plan",
    meaning="an event made the controller ask for transfers or drops, or publish an epoch; or a "
    "plan for replicas was judged, in force or refused",
    attributes=(
        EPOCH,
        REASON,
        NBYTES,
        STARTS,
        DROPS,
        BALANCE_BEFORE,
        BALANCE_AFTER,
        PLAN_MOVED,
        CODE,
    ),
)
SPAN_TRANSFER = Span(
    name="hotset.transfer",
    meaning="one block arrived at a store, or did not",
    attributes=(
        SOURCE, SOURCE_TIER, FORMAT, LAYER, INDEX, REASON, CODE, NBYTES, QUEUE, WIRE, VERIFY,
        ACTIVATE, USED, ATTEMPT,
    ),
)  # fmt: skip
SPAN_REQUEST = Span(
    name="hotset.request",
    meaning="a request from its arrival at the front to its last token; child of the caller's span",
    attributes=(WORKER, TOKENS, PROMPT_TOKENS, FIRST_TOKEN, ATTEMPT, CODE),
)
SPAN_STEP = Span(
    name="hotset.compute.step",
    meaning="one forward pass of one request; links to each transfer that it waited for",
    attributes=(TOKENS, CODE),
)
SPAN_LAYER = Span(
    name="hotset.compute.layer",
    meaning="one MoE layer of one step (sampled), or a layer computed for a peer",
    attributes=(LAYER, TOKENS, CODE),
)
SPAN_WAIT = Span(
    name="hotset.wait",
    meaning="a stall: compute of the parent step waited; link to the transfer or dispatch",
    attributes=(SOURCE, SOURCE_TIER, FORMAT, LAYER, INDEX, REASON, CODE),
)
SPAN_DISPATCH = Span(
    name="hotset.dispatch",
    meaning="tokens went to a peer that has the expert, and its result came back",
    attributes=(SOURCE, SOURCE_TIER, FORMAT, LAYER, INDEX, REASON, CODE, NBYTES),
)
SPAN_SCALE = Span(
    name="hotset.scale",
    meaning="a store joined (from the birth of its process), was asked to leave, or was lost",
    attributes=(TARGET, REASON, EPOCH, CODE),
)
SPAN_VETO = Span(
    name="hotset.veto",
    meaning="the guardrail refused a decision",
    attributes=(TARGET, LAYER, INDEX, FORMAT, REASON, BOUND, CODE),
)
SPAN_USE = Span(
    name="hotset.use",
    meaning="the first time that compute read what a transfer brought, or its drop unread; from "
    "the landing; link to the transfer",
    attributes=(LAYER, INDEX, FORMAT, REASON, NBYTES, USED, CODE),
)
SPANS = (
    SPAN_REQUEST, SPAN_PLAN, SPAN_TRANSFER, SPAN_STEP, SPAN_LAYER, SPAN_WAIT, SPAN_DISPATCH,
    SPAN_SCALE, SPAN_VETO, SPAN_USE,
)  # fmt: skip

# --- metrics --------------------------------------------------------------------------------------

TRANSFER_BYTES = Metric(
    name="hotset_transfer_bytes_total",
    kind="counter",
    unit="By",
    labels=("run", "store", "tier_from", "tier_to"),
    meaning="bytes of payload that arrived",
)
TRANSFER_SECONDS = Metric(
    name="hotset_transfer_seconds_total",
    kind="counter",
    unit="s",
    labels=("run", "store", "tier_from", "tier_to"),
    meaning="sum of the life times of transfers; transfers overlap, so this can outrun the clock",
)
QUEUE_SECONDS = Metric(
    name="hotset_transfer_queue_seconds_total",
    kind="counter",
    unit="s",
    labels=("run", "store", "tier_from", "tier_to"),
    meaning="part of the life times of transfers between submit and post",
)
WIRE_SECONDS = Metric(
    name="hotset_transfer_wire_seconds_total",
    kind="counter",
    unit="s",
    labels=("run", "store", "tier_from", "tier_to"),
    meaning="part of the life times of transfers between post and the backend's end",
)
ACTIVATE_SECONDS = Metric(
    name="hotset_transfer_activate_seconds_total",
    kind="counter",
    unit="s",
    labels=("run", "store", "tier_from", "tier_to"),
    meaning="part of the life times of transfers for checking the bytes and making them readable",
)
TRANSFERS = Metric(
    name="hotset_transfers_total",
    kind="counter",
    unit="",
    labels=("run", "store", "code"),
    meaning="transfers by how they ended",
)
STALL_SECONDS = Metric(
    name="hotset_stall_seconds_total",
    kind="counter",
    unit="s",
    labels=("run", "store", "reason"),
    meaning="time in which compute waited for a block",
)
DISPATCHED_BYTES = Metric(
    name="hotset_dispatched_bytes_total",
    kind="counter",
    unit="By",
    labels=("run", "store"),
    meaning="bytes of activations sent to peers and back in place of weights",
)
EXPERT_HITS = Metric(
    name="hotset_expert_hits_total",
    kind="counter",
    unit="",
    labels=("run", "store", "tier"),
    meaning="expert look-ups by the tier in which the block was found",
)
EXPERT_QUERIES = Metric(
    name="hotset_expert_queries_total",
    kind="counter",
    unit="",
    labels=("run", "store"),
    meaning="expert look-ups",
)
RESIDENT_BYTES = Metric(
    name="hotset_resident_bytes",
    kind="gauge",
    unit="By",
    labels=("run", "store", "tier"),
    meaning="bytes of copies that the store holds",
)
CAPACITY_BYTES = Metric(
    name="hotset_capacity_bytes",
    kind="gauge",
    unit="By",
    labels=("run", "store", "tier"),
    meaning="bytes that the store may hold",
)
EPOCH_NUMBER = Metric(
    name="hotset_epoch",
    kind="gauge",
    unit="",
    labels=("run",),
    meaning="number of the placement in force",
)
EPOCH_AGE = Metric(
    name="hotset_epoch_age_seconds",
    kind="gauge",
    unit="s",
    labels=("run",),
    meaning="time since the placement in force was published",
)
BLOCKS = Metric(
    name="hotset_blocks",
    kind="gauge",
    unit="",
    labels=("run", "state"),
    meaning="blocks by their best state in the cluster; the sum is the number of blocks",
)
TOKENS_SERVED = Metric(
    name="hotset_tokens_total",
    kind="counter",
    unit="",
    labels=("run", "store"),
    meaning="tokens generated",
)
TELEMETRY_DROPPED = Metric(
    name="hotset_telemetry_dropped_total",
    kind="counter",
    unit="",
    labels=("run", "store"),
    meaning="rows that telemetry lost; every other number misses them",
)
TELEMETRY_SPANS = Metric(
    name="hotset_telemetry_spans_total",
    kind="counter",
    unit="",
    labels=("run", "store"),
    meaning="spans written to the trace file",
)
VETOES = Metric(
    name="hotset_vetoes_total",
    kind="counter",
    unit="",
    labels=("run", "reason"),
    meaning="decisions that the guardrail refused",
)
QUARANTINED_BYTES = Metric(
    name="hotset_quarantined_bytes",
    kind="gauge",
    unit="By",
    labels=("run", "store"),
    meaning="bytes of slots that an abandoned transfer may still write to",
)
DECISIONS = Metric(
    name="hotset_decisions_total",
    kind="counter",
    unit="",
    labels=("run", "reason"),
    meaning="transfers and drops that the controller asked for, by reason",
)
IMBALANCE = Metric(
    name="hotset_load_imbalance_ratio",
    kind="gauge",
    unit="",
    labels=("run",),
    meaning="largest over mean number of tokens routed at a worker, over about a minute; 1 is even",
)
PLANS = Metric(
    name="hotset_plans_total",
    kind="counter",
    unit="",
    labels=("run", "reason"),
    meaning="plans for replicas by what became of them: rebalance, balanced, veto_cost",
)
PLAN_MOVES = Metric(
    name="hotset_plan_moves_total",
    kind="counter",
    unit="",
    labels=("run", "reason"),
    meaning="copies that plans for replicas moved, or would have moved, by what became of the plan",
)
PLAN_BALANCE = Metric(
    name="hotset_plan_balancedness_ratio",
    kind="gauge",
    unit="",
    labels=("run", "when"),
    meaning="mean by largest load of a worker, mean over layers, before and after the last plan",
)
DRIFT = Metric(
    name="hotset_drift_nats",
    kind="gauge",
    unit="nats",
    labels=("run", "kind"),
    meaning="divergence a token: budget, by the table, measured by the live check, its upper bound",
)
OLDEST_TRANSFER = Metric(
    name="hotset_oldest_transfer_seconds",
    kind="gauge",
    unit="s",
    labels=("run", "store"),
    meaning="age of the oldest transfer in flight towards the store; 0 when there is none",
)
ALERT = Metric(
    name="hotset_alert",
    kind="gauge",
    unit="",
    labels=("run", "alert"),
    meaning="1 while the progress watchdog holds this alert state, else 0",
)
SPANS_EXPORTED = Metric(
    name="hotset_telemetry_exported_total",
    kind="counter",
    unit="",
    labels=("run", "node"),
    meaning="spans that the OTLP collector took",
)
EXPORT_DROPPED = Metric(
    name="hotset_telemetry_export_dropped_total",
    kind="counter",
    unit="",
    labels=("run", "node"),
    meaning="spans that the OTLP collector did not take; the trace file has them",
)
METRICS = (
    TRANSFER_BYTES, TRANSFER_SECONDS, QUEUE_SECONDS, WIRE_SECONDS, ACTIVATE_SECONDS, TRANSFERS,
    STALL_SECONDS, DISPATCHED_BYTES, EXPERT_HITS, EXPERT_QUERIES, RESIDENT_BYTES, CAPACITY_BYTES,
    EPOCH_NUMBER, EPOCH_AGE, BLOCKS, TOKENS_SERVED, TELEMETRY_DROPPED, TELEMETRY_SPANS, VETOES,
    QUARANTINED_BYTES, DECISIONS, IMBALANCE, PLANS, PLAN_MOVES,
    PLAN_BALANCE, DRIFT, OLDEST_TRANSFER, ALERT, SPANS_EXPORTED, EXPORT_DROPPED,
)  # fmt: skip
