"""The cluster's token: who may describe a store, and where the token comes from.

Decides whether a peer's description is believed. The token is a secret that all processes of one
cluster share; it authenticates and encrypts nothing. An empty token means that nothing is checked,
which listeners refuse off loopback. This module must not know sockets.

Invariants: a proof covers every field but itself; proofs are compared in constant time; a token in
a file that others may read is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hotset.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from hotset.transport.base import PeerInfo

TOKEN_VARIABLE: Final = "HOTSET_TOKEN"  # noqa: S105 - the variable's name, not a secret
SHORTEST: Final = 16
_LABEL: Final = b"hotset peer info 1\0"


def make_token() -> bytes:
    """Make a new token: 64 hexadecimal digits of 32 random bytes."""
    return secrets.token_hex(32).encode()


def mac(token: bytes, label: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 over `parts`, each with its length, under a `label` that says what they are."""
    made = hmac.new(token, label, hashlib.sha256)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.digest()


def sign(info: PeerInfo, token: bytes) -> PeerInfo:
    """Fill `proof`; with an empty token it stays empty."""
    bare = replace(info, proof=b"")
    return replace(bare, proof=_proof(bare, token)) if token else bare


def check(info: PeerInfo, token: bytes) -> None:
    """Raise TransportError when `info` does not prove that its sender knows the token."""
    if not token:
        return
    if not info.proof:
        raise TransportError(
            f"the description of {info.name}:{info.incarnation} carries no proof of the token",
            remedy="start every process of the cluster with the same token",
        )
    if not hmac.compare_digest(info.proof, _proof(replace(info, proof=b""), token)):
        raise TransportError(
            f"the description of {info.name}:{info.incarnation} was not made with this "
            "cluster's token",
            remedy="start every process of the cluster with the same token",
        )


def _proof(bare: PeerInfo, token: bytes) -> bytes:
    return mac(token, _LABEL, msgspec.msgpack.encode(bare))


def load_token(path: str | Path | None = None) -> bytes:
    """Read the token from the file at `path`, else from HOTSET_TOKEN; b'' when neither is given.

    Raises ConfigError for a token that is too short and for a file that is absent or not private.
    """
    if path is not None:
        return _long_enough(_private_text(Path(path)), str(path))
    text = os.environ.get(TOKEN_VARIABLE, "").strip()
    return _long_enough(text, TOKEN_VARIABLE) if text else b""


def save_token(path: str | Path, token: bytes) -> None:
    """Write a token to a new file with mode 0600. Raises ConfigError when it exists."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the token cannot be written to {path} ({error.strerror})",
            remedy="name a new file in a folder of yours",
        ) from error
    with os.fdopen(handle, "wb") as file:
        file.write(token + b"\n")


def _private_text(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"the token file {path} cannot be read ({error.strerror})",
            remedy="make one with mode 0600 on every node",
        ) from error
    try:
        status = os.fstat(handle)
        private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
        if not private or status.st_uid not in {0, os.geteuid()}:
            raise ConfigError(
                f"the token file {path} is not a file that only this user may read",
                remedy=f"chmod 600 {path}; if others could read it, make a new token",
            )
        return os.read(handle, 4096).decode("utf-8", errors="replace").strip()
    finally:
        os.close(handle)


def _long_enough(text: str, where: str) -> bytes:
    token = text.encode()
    if len(token) < SHORTEST:
        raise ConfigError(
            f"the token in {where} has {len(token)} characters, fewer than {SHORTEST}",
            remedy="use 64 random hexadecimal digits",
        )
    return token
