"""Signed descriptions, where the token comes from, and the handshake between two sockets."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.errors import ConfigError, PeerGoneError, TransferTimeout, TransportError
from hotset.transport.base import LinkProfile, PeerInfo
from hotset.transport.handshake import ANY, Identity, greet, welcome
from hotset.transport.token import check, load_token, make_token, save_token, sign
from hotset.transport.wire import pieces

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKEN = b"0123456789abcdef0123456789abcdef"
INFO = PeerInfo(
    name="pool-0",
    incarnation=7,
    backend="tcp",
    backend_metadata=b"\x92\xa1x\x01",
    base_address=4096,
    nbytes=1 << 21,
    link=LinkProfile(bandwidth_bytes_per_s=10**9, latency_ns=1000, emulated=True),
    pace=b"pace",
)
ME = Identity(name="pool-0", incarnation=7)
OTHER_VALUES = {
    "name": "pool-1", "incarnation": 8, "backend": "nixl", "backend_metadata": b"",
    "base_address": 0, "nbytes": 1, "device": "cuda:0", "link": None, "pace": b"",
}  # fmt: skip


def _soon(seconds: float = 5.0) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


# --- descriptions ---------------------------------------------------------------------------------


def test_a_signed_description_is_believed_and_signing_again_changes_nothing() -> None:
    signed = sign(INFO, TOKEN)
    check(signed, TOKEN)
    assert len(signed.proof) == 32
    assert sign(signed, TOKEN) == signed


@pytest.mark.parametrize("field", [f.name for f in fields(PeerInfo) if f.name != "proof"])
def test_a_proof_covers_every_other_field(field: str) -> None:
    forged = replace(sign(INFO, TOKEN), **{field: OTHER_VALUES.get(field, b"x")})
    with pytest.raises(TransportError, match="not made with"):
        check(forged, TOKEN)


@pytest.mark.parametrize(("signed_with", "error"), [(b"", "no proof"), (TOKEN[::-1], "not made")])
def test_an_absent_or_foreign_proof_is_refused(signed_with: bytes, error: str) -> None:
    with pytest.raises(TransportError, match=error) as caught:
        check(sign(INFO, signed_with), TOKEN)
    assert caught.value.remedy


def test_without_a_token_nothing_is_checked() -> None:
    assert sign(INFO, b"").proof == b""
    check(INFO, b"")
    check(sign(INFO, TOKEN), b"")


# --- where the token comes from -------------------------------------------------------------------


def test_tokens_are_long_random_and_survive_a_file(tmp_path: Path) -> None:
    token = make_token()
    assert len(token) == 64
    assert token != make_token()
    path = tmp_path / "token"
    save_token(path, token)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_token(path) == token
    with pytest.raises(ConfigError, match="cannot be written"):
        save_token(path, token)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    save_token(path, TOKEN)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="only this user"):
        load_token(path)


def test_no_file_a_folder_and_a_short_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_token(tmp_path / "absent")
    with pytest.raises(ConfigError):
        load_token(tmp_path)
    save_token(tmp_path / "short", b"abc")
    with pytest.raises(ConfigError, match="fewer than"):
        load_token(tmp_path / "short")


def test_the_environment_is_the_second_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOTSET_TOKEN", raising=False)
    assert load_token() == b""
    monkeypatch.setenv("HOTSET_TOKEN", TOKEN.decode() + "\n")
    assert load_token() == TOKEN
    save_token(tmp_path / "token", TOKEN[::-1])
    assert load_token(tmp_path / "token") == TOKEN[::-1]


# --- the handshake --------------------------------------------------------------------------------


def _caught(action: Callable[[], object]) -> BaseException | None:
    try:
        action()
    except TransportError as error:
        return error
    return None


def _shake(
    client_token: bytes, listener_token: bytes, *, wanted: Identity = ANY, purpose: str = "read"
) -> tuple[BaseException | None, BaseException | None]:
    """How a handshake ended for the client and for the listener."""
    near, far = socket.socketpair()
    ends: list[BaseException | None] = []
    with near, far:

        def listen() -> None:
            ends.append(
                _caught(
                    lambda: welcome(
                        far, purpose="read", token=listener_token, identity=ME, deadline_ns=_soon()
                    )
                )
            )
            far.close()

        thread = threading.Thread(target=listen)
        thread.start()
        mine = _caught(
            lambda: greet(
                near, purpose=purpose, token=client_token, wanted=wanted, deadline_ns=_soon()
            )
        )
        near.close()
        thread.join(10)
    return mine, ends[0]


def test_ends_with_the_same_token_or_none_trust_each_other() -> None:
    assert _shake(TOKEN, TOKEN, wanted=ME) == (None, None)
    assert _shake(b"", b"") == (None, None)


@pytest.mark.parametrize(("client", "listener"), [(TOKEN, b""), (b"", TOKEN), (TOKEN, TOKEN[::-1])])
def test_a_token_on_one_side_or_two_tokens_are_refused(client: bytes, listener: bytes) -> None:
    mine, theirs = _shake(client, listener)
    assert isinstance(mine, TransportError)
    assert isinstance(theirs, TransportError)
    assert "token" in str(mine)


def test_another_incarnation_or_purpose_is_refused() -> None:
    mine, theirs = _shake(TOKEN, TOKEN, wanted=replace(ME, incarnation=6))
    assert isinstance(mine, PeerGoneError)
    assert "pool-0:7" in str(mine)
    assert isinstance(theirs, TransportError)
    mine, _ = _shake(TOKEN, TOKEN, purpose="exchange")
    assert "version or purpose" in str(mine)


def test_a_recorded_answer_is_worth_nothing_in_another_handshake() -> None:
    """Relay one client's frames, then say the same to a listener again."""
    near, far = socket.socketpair()
    spoken: list[bytes] = []

    class Tap:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def __getattr__(self, name: str) -> object:
            return getattr(self.sock, name)

        def sendall(self, data: bytes) -> None:
            spoken.append(data)
            self.sock.sendall(data)

    for step in ("record", "replay"):
        ends: list[BaseException | None] = []

        def listen(sock: socket.socket = far, into: list[BaseException | None] = ends) -> None:
            into.append(
                _caught(
                    lambda: welcome(
                        sock, purpose="read", token=TOKEN, identity=ME, deadline_ns=_soon()
                    )
                )
            )

        thread = threading.Thread(target=listen)
        thread.start()
        if step == "record":
            greet(Tap(near), purpose="read", token=TOKEN, wanted=ME, deadline_ns=_soon())  # type: ignore[arg-type]
        else:
            for data in spoken:
                near.sendall(data)
        thread.join(10)
        assert (ends[0] is None) == (step == "record"), step
        near.close()
        far.close()
        near, far = socket.socketpair()
    near.close()
    far.close()


def test_a_silent_end_times_out() -> None:
    near, far = socket.socketpair()
    with near, far, pytest.raises(TransferTimeout):
        greet(near, purpose="read", token=TOKEN, wanted=ANY, deadline_ns=_soon(0.05))
    near, far = socket.socketpair()
    far.send(b"\x40")  # one byte of a length, then nothing
    with near, far, pytest.raises(TransferTimeout):
        welcome(near, purpose="read", token=TOKEN, identity=ME, deadline_ns=_soon(0.05))


@settings(max_examples=150)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_a_typed_error_on_both_sides(garbage: bytes, framed: bool) -> None:  # noqa: FBT001 - drawn by hypothesis
    data = len(garbage).to_bytes(4, "little") + garbage if framed else garbage
    ends = (
        lambda sock: welcome(sock, purpose="read", token=TOKEN, identity=ME, deadline_ns=_soon()),
        lambda sock: greet(sock, purpose="read", token=TOKEN, wanted=ANY, deadline_ns=_soon()),
    )
    for end in ends:
        near, far = socket.socketpair()
        with near, far:
            far.sendall(data)
            far.shutdown(socket.SHUT_WR)
            with pytest.raises(TransportError):
                end(near)


# --- pieces ---------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 30), st.sampled_from([0, 1, 70_000, 1 << 20, 5_000_001])),
        max_size=40,
    )
)
def test_pieces_hold_every_byte_once_and_in_order(ranges: list[tuple[int, int]]) -> None:
    flat = [part for group in pieces(ranges, size=1 << 20) for part in group]
    joined: list[tuple[int, int]] = []
    wanted = iter([r for r in ranges if r[1]])
    at, left = 0, 0
    for offset, nbytes in flat:
        if not left:
            at, left = next(wanted)
            joined.append((at, left))
        assert offset == at
        assert 0 < nbytes <= left
        at, left = at + nbytes, left - nbytes
    assert not left
    assert joined == [r for r in ranges if r[1]]
