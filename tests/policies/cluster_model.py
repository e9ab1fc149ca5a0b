"""A tiny honest cluster for tests of the brain: carries commands out and reports events."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hotset.policies.brain import ClusterBrain
from hotset.policies.types import (
    BlockId,
    BlockInfo,
    CancelTransfer,
    ChangeFormat,
    Command,
    Copy,
    CopyDropped,
    CopyLanded,
    DropCopy,
    Event,
    Format,
    Reason,
    StartTransfer,
    StoreInfo,
    StoreJoined,
    StoreLost,
    Tier,
    TransferFailed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotset.policies.config import PolicyConfig

Order = StartTransfer | CancelTransfer | DropCopy | ChangeFormat

FULL = 1024
REDUCED = 576
SLOT = 2 * (64 + REDUCED)  # of a store: for a full copy, or two reduced ones


def blocks_of(layers: int, experts: int) -> list[BlockInfo]:
    return [
        BlockInfo(block=BlockId(layer, index), nbytes=FULL, reduced_nbytes=REDUCED)
        for layer in range(layers)
        for index in range(experts)
    ]


@dataclass
class ClusterModel:
    """Stores that do what they are told; `todo` holds commands not carried out yet."""

    brain: ClusterBrain
    now_ns: int = 0
    generation: int = 0
    incarnations: dict[str, int] = field(default_factory=dict)
    todo: list[Order] = field(default_factory=list)
    log: list[Event] = field(default_factory=list)
    answers: list[list[Command]] = field(default_factory=list)

    @classmethod
    def of(
        cls, *, layers: int = 4, experts: int = 8, config: PolicyConfig | None = None
    ) -> ClusterModel:
        return cls(brain=ClusterBrain(blocks_of(layers, experts), config=config))

    def send(self, event: Event) -> list[Command]:
        """Hand over one event, check every invariant, remember both sides."""
        commands = self.brain.handle(event)
        self.brain.validate()
        self.log.append(event)
        self.answers.append(commands)
        self.todo += [c for c in commands if isinstance(c, Order)]
        return commands

    def join(
        self, name: str, tier: Tier, *, slots: float, copies: Iterable[Copy] = (), node: str = "n0"
    ) -> list[Command]:
        incarnation = self.incarnations[name] = self.incarnations.get(name, 0) + 1
        info = StoreInfo(
            name=name,
            tier=tier,
            node=node,
            incarnation=incarnation,
            capacity_bytes=int(slots * SLOT),
        )
        held = tuple(replace(copy, store=name, incarnation=incarnation) for copy in copies)
        return self.send(StoreJoined(now_ns=self.now_ns, store=info, copies=held))

    def lose(self, name: str) -> list[Command]:
        self.todo = [command for command in self.todo if command.store != name]
        return self.send(
            StoreLost(now_ns=self.now_ns, store=name, incarnation=self.incarnations[name])
        )

    def carry_out(self, command: Order, *, works: bool = True) -> list[Command]:
        """Report the end of one command."""
        match command:
            case DropCopy():
                return self._dropped(command, command.format)
            case CancelTransfer():
                return self._give_up(command)
            case ChangeFormat() if works:
                return self._change(command)
            case ChangeFormat():
                return self._failed(command, command.into, reason=Reason.STALE)
            case StartTransfer() if works:
                self.make_room(command)
                return self._landed(command, command.format, source=command.sources[0])
        return self._failed(command, command.format, reason=Reason.TIMEOUT)

    def _change(self, command: ChangeFormat) -> list[Command]:
        """A promotion makes before it breaks; a demotion is made of the copy that it replaces."""
        if command.into is Format.BF16:
            self.make_room(command)
            landed = self._landed(command, command.into, source=command.store)
            return landed + self._dropped(command, command.format)
        dropped = self._dropped(command, command.format)
        return dropped + self._landed(command, command.into, source=command.store)

    def make_room(self, command: StartTransfer | ChangeFormat) -> None:
        """A worker gives up what no plan has asked it to keep, as it does for its own fetches."""
        (info,) = [store for store in self.brain.stores() if store.name == command.store] or [None]
        own = isinstance(command, ChangeFormat) or command.reason is Reason.REPLICATE
        if info is None or info.tier is not Tier.HBM or not own:
            return
        if self.brain.used_bytes(info.name) + SLOT <= info.capacity_bytes:
            return
        kept = {*self.brain.keeps(info.name), command.block}
        mine = [copy for copy in self.brain.directory() if copy.store == info.name]
        victim = min(
            (copy for copy in mine if copy.block not in kept),
            key=lambda copy: (copy.block.index == 0, copy.block),
            default=None,
        )
        if victim is None:
            return
        self.send(
            CopyDropped(
                now_ns=self.now_ns, store=info.name, block=victim.block, format=victim.format,
                reason=Reason.EVICT, incarnation=victim.incarnation,
            )
        )  # fmt: skip

    def _give_up(self, command: CancelTransfer) -> list[Command]:
        """A transfer that has not begun ends; one that has, ends by itself."""
        for one in self.todo:
            same = (one.store, one.block, one.format)
            if isinstance(one, StartTransfer) and same == (
                command.store, command.block, command.format,
            ):  # fmt: skip
                self.todo.remove(one)
                return self._failed(command, command.format, reason=Reason.CANCELLED)
        return []

    def _dropped(self, command: Order, form: Format) -> list[Command]:
        return self.send(
            CopyDropped(
                now_ns=self.now_ns,
                store=command.store,
                block=command.block,
                format=form,
                reason=command.reason,
                incarnation=self.incarnations[command.store],
            )
        )

    def _failed(self, command: Order, form: Format, *, reason: Reason) -> list[Command]:
        return self.send(
            TransferFailed(
                now_ns=self.now_ns,
                store=command.store,
                block=command.block,
                format=form,
                reason=reason,
                incarnation=self.incarnations[command.store],
            )
        )

    def _landed(self, command: Order, form: Format, *, source: str) -> list[Command]:
        return self.send(
            CopyLanded(
                now_ns=self.now_ns,
                copy=self.copy(command.block, store=command.store, form=form),
                reason=command.reason,
                source=source,
            )
        )

    def settle(self) -> None:
        """Carry out all that is asked for, and what that leads to."""
        for _ in range(10_000):
            if not self.todo:
                return
            self.carry_out(self.todo.pop(0))
        raise AssertionError("the brain never comes to rest")

    def copy(self, block: BlockId, *, store: str, form: Format = Format.BF16) -> Copy:
        self.generation += 1
        return Copy(
            block=block,
            format=form,
            store=store,
            offset=0,
            nbytes=FULL if form is Format.BF16 else REDUCED,
            generation=self.generation,
            checksum=self.generation,
            incarnation=self.incarnations.get(store, 1),
        )

    def held(self, store: str) -> set[BlockId]:
        return {copy.block for copy in self.brain.directory() if copy.store == store}
