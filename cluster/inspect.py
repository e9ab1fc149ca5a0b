"""Asking a live run's controller, or a recorded run's journal: `hotset status`, `hotset why`."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from hotset.actors.messages import unpack_event
from hotset.dashboards.journal import read_frames
from hotset.dashboards.status import Status, StoryLine
from hotset.errors import ClusterError, ConfigError
from hotset.policies.story import StoryLine as BrainLine
from hotset.policies.types import BlockId, Copy, CopyDropped, CopyLanded, StoreLost, TransferFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hotset.policies.types import Event

CALL_S = 10.0


@contextlib.contextmanager
def connect(address: str, *, run: str | None) -> Iterator[Any]:
    """The controller of a run on a Ray cluster. Raises ClusterError when it cannot be found."""
    from hotset.cluster.local import quiet_environment, require_cluster

    quiet_environment()
    import ray
    from ray.util import list_named_actors

    from hotset.actors.membership import NAMESPACE, controller_name

    require_cluster(address)
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0][:120]})",
            remedy="give --address, or --run FOLDER for a recorded run",
        ) from None
    try:
        names = [name for name in list_named_actors() if name.endswith("-controller")]
        runs = [name.removeprefix("hotset-").removesuffix("-controller") for name in names]
        yield ray.get_actor(controller_name(_one(runs, run)), namespace=NAMESPACE)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"the controller does not answer ({type(error).__name__})",
            remedy="Ray restarts it; try again in a few seconds",
        ) from None
    finally:
        ray.shutdown()


def _one(runs: list[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in runs:
            raise ClusterError(
                f"run {wanted!r} is not on this cluster",
                remedy=f"choose one of: {', '.join(runs) or 'none is there'}",
            )
        return wanted
    if len(runs) != 1:
        raise ClusterError(
            f"{len(runs)} runs are on this cluster",
            remedy=f"choose one with --run: {', '.join(runs)}" if runs else "start one first",
        )
    return runs[0]


def block_id(text: str) -> BlockId:
    """Read LAYER.EXPERT. Raises ConfigError."""
    try:
        return BlockId.parse(text)
    except ValueError as error:
        raise ConfigError(str(error), remedy="see the layers in `hotset status`") from None


def live_status(controller: Any) -> Status:
    """Snapshot of a live run."""
    import ray

    data = ray.get(controller.status.remote(), timeout=CALL_S)
    return msgspec.msgpack.decode(data, type=Status)


def live_story(controller: Any, block: BlockId) -> tuple[list[StoryLine], list[Copy]]:
    """Story and copies of a block, from the controller."""
    import ray

    data = ray.get(controller.why.remote(block.layer, block.index), timeout=CALL_S)
    lines, copies = msgspec.msgpack.decode(data, type=tuple[list[BrainLine], list[Copy]])
    story = [
        StoryLine(
            at_ns=line.at,
            store=line.store,
            what=f"{line.event}, now {line.state.value}",
            reason=line.reason.value if line.reason else "",
        )
        for line in lines
    ]
    return story, copies


def recorded_story(run: Path, block: BlockId) -> tuple[list[StoryLine], list[Copy]]:
    """Story and last copies of a block, from a run's journal."""
    story: list[StoryLine] = []
    copies: dict[tuple[str, str], Copy] = {}
    for frame in read_frames(run / "journal.msgpack"):
        event = unpack_event(msgspec.msgpack.decode(frame))
        line = _line(event, block)
        if line is not None:
            story.append(line)
        _follow(event, block, copies)
    return story, list(copies.values())


def _line(event: Event, block: BlockId) -> StoryLine | None:
    match event:
        case CopyLanded() if event.copy.block == block:
            what = f"{event.copy.format} copy landed from {event.source}"
            store, reason = event.copy.store, event.reason.value
        case CopyDropped() if event.block == block:
            what, store, reason = f"{event.format} copy dropped", event.store, event.reason.value
        case TransferFailed() if event.block == block:
            what, store, reason = f"{event.format} did not come", event.store, event.reason.value
        case StoreLost():
            return None
        case _:
            return None
    return StoryLine(at_ns=event.now_ns, store=store, what=what, reason=reason)


def _follow(event: Event, block: BlockId, copies: dict[tuple[str, str], Copy]) -> None:
    match event:
        case CopyLanded() if event.copy.block == block:
            copies[event.copy.store, event.copy.format] = event.copy
        case CopyDropped() if event.block == block:
            copies.pop((event.store, event.format), None)
        case StoreLost():
            for key in [key for key in copies if key[0] == event.store]:
                del copies[key]
        case _:
            pass
