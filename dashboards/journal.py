"""Reads a controller's journal: frames as they were written, up to a torn tail.

Must not know what a frame says: the controller's decoder turns payloads into events. The form of a
frame stands in `hotset.actors.frames`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hotset.actors import frames
from hotset.errors import ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator


def read_frames(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Payloads, oldest first. Raises ConfigError when the file is not there."""
    _require(path)
    return frames.read_frames(path)


def scan(path: str | os.PathLike[str]) -> frames.Scan:
    """Whole frames, and how many bytes of the file they are. Raises ConfigError as above."""
    _require(path)
    return frames.scan(path)


def _require(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise ConfigError(
            f"no journal at {path}", remedy="give the run's folder as `hotset status` prints it"
        )
