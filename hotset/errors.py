"""The errors that hotset raises. Every message names the remedy.

    HotsetError
    |-- ConfigError           the user's configuration or arguments cannot work          (exit 2)
    |-- CheckpointError       the checkpoint is missing, truncated or of an unknown kind (exit 2)
    |-- FormatError           an encoded block is truncated, damaged or of another layout  (exit 1)
    |-- DependencyError       an optional package or a service is absent                 (exit 1)
    |-- ClusterError          Ray or an actor of ours is not there                       (exit 1)
    |-- TransportError        a transfer ended without its bytes
    |   |-- PeerGoneError     the peer died, left, or came back as another incarnation   (retryable)
    |   |-- StaleCopyError    the slot no longer holds the copy that was asked for       (retryable)
    |   |-- TransferTimeout   the deadline passed; the buffers stay quarantined          (retryable)
    |   `-- QuarantineFull    too many abandoned transfers: restart as a new incarnation
    |-- InvalidTransition     a block was asked to make an illegal change of state
    `-- StaleEpochError       a command of an older epoch or incarnation was refused

`HotsetError` survives pickling with its fields (Ray carries errors between processes).
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "UNREADABLE",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DependencyError",
    "FormatError",
    "HotsetError",
    "InvalidTransition",
    "PeerGoneError",
    "QuarantineFull",
    "StaleCopyError",
    "StaleEpochError",
    "TransferTimeout",
    "TransportError",
]

UNREADABLE: Final = (ValueError, RecursionError)
"""What msgspec raises for bytes that are not the message that is wanted: its own DecodeError, a
UnicodeDecodeError for text that is none, and RecursionError for lists in lists in lists."""


class HotsetError(Exception):
    """Root of hotset's errors: what happened, and what to do about it."""

    exit_code = 1
    retryable = False

    def __init__(self, what: str, *, remedy: str = "") -> None:
        """Keep the parts apart so that a caller can show or test them alone."""
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        """One line: the fact, then the remedy."""
        return f"{self.what}: {self.remedy}" if self.remedy else self.what

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild with the keyword argument, which plain `Exception` pickling loses."""
        return _rebuild, (type(self), self.what, self.remedy)


def _rebuild(kind: type[HotsetError], what: str, remedy: str) -> HotsetError:
    return kind(what, remedy=remedy)


class ConfigError(HotsetError):
    """The user's configuration or arguments cannot work."""

    exit_code = 2


class CheckpointError(HotsetError):
    """The checkpoint is missing, truncated or of a kind that hotset does not know."""

    exit_code = 2


class FormatError(HotsetError):
    """An encoded block is truncated, damaged, of another layout, or newer than this version."""


class DependencyError(HotsetError):
    """An optional package or a service is absent."""


class ClusterError(HotsetError):
    """Ray, or an actor of ours, is not there."""


class TransportError(HotsetError):
    """A transfer ended without its bytes."""


class PeerGoneError(TransportError):
    """The peer died, left, or came back as another incarnation."""

    retryable = True


class StaleCopyError(TransportError):
    """The slot no longer holds the copy that was asked for; try the next source."""

    retryable = True


class TransferTimeout(TransportError):  # noqa: N818 - the field's word for it
    """The deadline passed. The wait is over, the transfer may not be."""

    retryable = True


class QuarantineFull(TransportError):  # noqa: N818 - a state, named as in the design
    """Too many abandoned transfers hold buffers; the store must restart as a new incarnation."""


class InvalidTransition(HotsetError):  # noqa: N818 - named as in the design
    """A block was asked to make an illegal change of state."""


class StaleEpochError(HotsetError):
    """A command of an older epoch or incarnation was refused."""
