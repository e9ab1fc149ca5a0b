"""The ucx backend without UCX: who is chosen, who is believed, what a kept receive does."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import sys
from typing import Any

import pytest

from hotset.errors import ConfigError, DependencyError, PeerGoneError, TransportError
from hotset.transport import ucx_bindings
from hotset.transport.base import PeerInfo, PostState
from hotset.transport.slab import Slab
from hotset.transport.ucx import UcxBackend
from hotset.transport.ucx_link import answer, challenge, hello, is_trusted
from hotset.transport.ucx_read import Line, Read, Reads


def _slab() -> Slab:
    return Slab(capacity_bytes=1 << 20, slot_payload_bytes=4096, name="sink", incarnation=1)


@pytest.fixture(autouse=True)
def _no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of NIXL in the same process leave it loaded; nothing here loads a second UCX."""
    monkeypatch.setattr(ucx_bindings, "_nixl_is_here", lambda: False)


def test_the_first_binding_that_imports_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def only(name: str) -> object:
        asked.append(name)
        if name == "ucp":
            return object()
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(importlib, "import_module", only)
    assert ucx_bindings.choose() is ucx_bindings._Ucp
    assert asked == ["ucxx", "ucp"]


def test_no_binding_is_a_typed_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", None)
    monkeypatch.setitem(sys.modules, "ucp", None)
    with pytest.raises(DependencyError) as caught:
        ucx_bindings.choose()
    assert caught.value.remedy == "pip install ucxx-cu12"
    assert "pip install ucxx-cu12" in UcxBackend.available()
    with pytest.raises(DependencyError):
        UcxBackend().register(_slab())


@pytest.mark.skipif(
    importlib.util.find_spec("ucp") is None, reason="ucx-py is not installed (archived upstream)"
)
def test_ucp_opens_a_context() -> None:
    bindings = ucx_bindings._Ucp(ucx_bindings.CONFIG)
    assert bindings.fd >= 0
    bindings.close()


def test_a_host_off_loopback_needs_a_token() -> None:
    with pytest.raises(ConfigError):
        UcxBackend(host="192.0.2.1")
    UcxBackend(host="192.0.2.1", token=secrets.token_bytes(32))


def test_proofs_hold_for_one_conversation_only() -> None:
    token = secrets.token_bytes(32)
    said = hello(name="a", incarnation=3)
    heard, refusal = challenge(said, name="a", incarnation=3, token=token)
    assert refusal == ""
    proof = answer(said, heard, token=token)
    assert is_trusted(said, heard, proof, token=token)
    again, _ = challenge(said, name="a", incarnation=3, token=token)
    assert not is_trusted(said, again, proof, token=token)  # replayed
    assert not is_trusted(said, heard, proof, token=secrets.token_bytes(32))
    for other in (b"", secrets.token_bytes(32)):
        with pytest.raises(TransportError, match="token"):
            answer(said, heard, token=other)
    newer, refusal = challenge(said, name="a", incarnation=4, token=token)
    assert refusal
    with pytest.raises(PeerGoneError, match="a:4"):
        answer(said, newer, token=token)
    no_text = b"\x99\xa5\xdf3+-7"  # a list whose first text is not UTF-8
    nested = bytes([said[0] + 1]) + said[1:] + b"\x91" * 100_000  # and one more field
    for garbage in (b"", b"\xc1", no_text, nested, secrets.token_bytes(40)):
        with pytest.raises(TransportError):
            challenge(garbage, name="a", incarnation=3, token=token)
        with pytest.raises(TransportError):
            answer(said, garbage, token=token)


def test_a_read_that_is_kept_by_ucx_stays_pending_until_it_ends() -> None:
    """A receive that UCX does not give back keeps its slot, whatever happened to the connection."""

    class Stuck(ucx_bindings.Operation):
        ended = False

        def done(self) -> bool:
            return self.ended

        def error(self) -> str:
            return "cancelled"

    bindings: Any = type("Closed", (), {"close_endpoint": lambda *_: None})()
    reads = Reads(bindings, token=b"", view=lambda *_: b"")
    info = PeerInfo(
        name="source", incarnation=1, backend="ucx", backend_metadata=b"", base_address=0, nbytes=1
    )
    line = Line(reads, info)
    read: Read = Read("source", [])
    operation = Stuck()
    read.receives.append(operation)
    line.reads.append(read)
    reads._lines.append(line)
    reads._break(line, "the connection broke")
    reads.step()
    assert read.state is PostState.PENDING
    operation.ended = True
    reads.step()
    assert (read.state, read.error) == (PostState.ERROR, "the connection broke")
