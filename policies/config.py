"""Every number that steers the policies, with its unit and the reason for its default.

Decides nothing and must not know who reads it. All values are plain ints and floats, so that a
journal can carry them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from hotset.errors import ConfigError
from hotset.policies.types import BlockId, Format

if TYPE_CHECKING:
    from collections.abc import Mapping


FRUGAL_LOAD_RATIO = 1.25
"""Prefetching may load this many times what LRU would: the setting `frugal`."""
DENSE_LOAD_RATIO = 1.45
"""The same where most experts of a layer are needed each time."""
EAGER_LOAD_RATIO = 1.9
"""The setting `eager`, for links that would otherwise idle."""


PLAN_NS = 10_000_000_000
PAYBACK_NS = 60_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyConfig:
    """Steers the caching of one device."""

    prefetch_depth: int = 3
    """Rows ahead of which a visit refines the estimate; 0 turns prefetching off. Each row more
    sharpens the next one's estimate (recall at 8 of 64: .75, .79, .81) and costs memory."""
    prefetch_per_layer: int = 64
    """Most prefetches proposed at one visit; the bars are what limits them."""
    prefetch_min_probability: float = 0.02
    """Candidates below this chance of use are never worth a transfer."""
    load_ratio: float = FRUGAL_LOAD_RATIO
    """Loads, as a share of what LRU would load, while nobody says how busy the link is."""
    idle_load_ratio: float = EAGER_LOAD_RATIO
    """The same while the caller measures the link, whose bars then do most of the limiting."""
    dense_load_ratio: float = DENSE_LOAD_RATIO
    """The same while nobody says how busy the link is and more than `dense_ratio` of a layer's
    experts are needed at each visit: there LRU loads most of them anyway, and few guesses fail."""
    dense_ratio: float = 0.3
    """Share of a layer's experts needed at a visit above which the regime is dense. Single requests
    of known models stay below (top 2 of 8: .25), batches of eight lie above."""
    learning_rate: float = 0.24
    """Share of an error that one pass corrects. Half of it learns too slowly for traces of a few
    thousand tokens, twice of it forgets rare experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Steers the brain of the cluster."""

    popularity_half_life_tokens: int = 4096
    """Tokens after which a routed token counts half, to begin with: an eighth and eight times of it
    are tried as well. Ageing follows tokens, not time, so an idle cluster forgets nothing."""
    tick_ns: int = 2_000_000_000
    """Shortest time between two reconsiderations of the placement."""
    min_dwell_ns: int = 10_000_000_000
    """A copy in a pool stays at least this long before a hotter block may take its place."""
    cool_down_ns: int = 10_000_000_000
    """A block that has left a pool does not come back to it by popularity before this."""
    min_gain_ratio: float = 1.5
    """A block must be this many times as popular as the copy that it would displace."""
    bytes_per_tick: int = 1 << 30
    """Most bytes that one reconsideration may ask to move between pools."""
    warm_bytes_in_flight: int = 8 << 30
    """Most bytes on their way to one store during its first fill."""
    fill_ns: int = 60_000_000_000
    """A worker's first fill must land within this time: later, demand has fetched what it needs."""
    background_bytes_in_flight: int = 256 << 20
    """Most bytes of background work on their way to one store."""
    payback_ns: int = PAYBACK_NS
    """A move between pools must save more stall than it takes within this time."""
    plan_ns: int = PLAN_NS
    """Time between two plans for the workers' replicas; 0: there are none."""
    plan_gain: float = 0.02
    """Balancedness that a plan must gain to be worth an epoch, so that noise in loads is none."""
    keep_ratio: float = 0.5
    """Share of a worker's memory that plans may promise to replicas; the rest is its own cache."""
    dense_at: int = 600
    """Share of all blocks, in thousandths, that a step must touch for the regime to be dense."""
    dense_leave: int = 500
    """Share below which it is sparse again."""
    pause_at: int = 700
    """Share of a store's time, in thousandths, that demand takes before background work waits."""
    resume_at: int = 500
    """Share at which it goes on."""
    telemetry_ttl_ns: int = 10_000_000_000
    """A report older than this says nothing any more."""
    sensitivity: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    """Measured divergence by layer of a cheap format, nats; orders changes of format."""
    changes_per_tick: int = 4
    """Most changes of format that one reconsideration asks of one store."""
    retry_ns: int = 10_000_000_000
    """Wait before a transfer that failed is asked for again."""
    transfer_timeout_ns: int = 120_000_000_000
    """A transfer that nobody reported on for this long is taken for failed."""
    max_host_copies: int = 2
    """Most copies of one hot block over all host pools."""
    replicate_ratio: float = 4.0
    """A block is worth a second host copy when it is this many times as popular as the mean."""
    formats: Mapping[BlockId, Format] = field(default_factory=lambda: MappingProxyType({}))
    """Formats planned for blocks near compute; those that are absent stay at full precision."""
    hbm_reduced_ratio: float = 0.0
    """Share of a worker's memory that the brain offers to reduced copies of cooler blocks."""
    floor: Mapping[int, Format] = field(default_factory=lambda: MappingProxyType({}))
    """Cheapest format allowed, by layer; layers that are absent take `default_floor`."""
    default_floor: Format = Format.BF16
    """Exact mode unless the user allows less."""
    slot_header_bytes: int = 64
    """Bytes in front of each payload in a store."""
    slot_align_bytes: int = 64
    """Slots start at multiples of this."""
    story_lines: int = 32
    """Lines kept of each block's story."""
    changes_kept: int = 65_536
    """Changes of the directory kept for deltas; readers further behind get the whole."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.min_gain_ratio < 1 or not 0 <= self.hbm_reduced_ratio <= 1:
            raise ConfigError(
                f"min_gain_ratio {self.min_gain_ratio} or hbm_reduced_ratio "
                f"{self.hbm_reduced_ratio} is out of range",
                remedy="min_gain_ratio is at least 1, hbm_reduced_ratio lies in 0..1",
            )
        if self.popularity_half_life_tokens < 8:
            raise ConfigError(
                f"popularity_half_life_tokens {self.popularity_half_life_tokens} is too short",
                remedy="use at least 8 tokens",
            )
