"""A journal survives a crash at any byte, and goes on afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.actors.frames import MAX_FRAME_BYTES, encode_frame
from hotset.actors.journal import JournalWriter
from hotset.dashboards.journal import read_frames, scan
from hotset.errors import ConfigError

PAYLOADS = [b"", b"one", bytes(range(256)), b"\x00" * 40]


def test_frames_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal"
    with JournalWriter(path, fsync=True) as journal:
        lengths = [journal.append(payload) for payload in PAYLOADS]
    assert list(read_frames(path)) == PAYLOADS
    assert lengths[-1] == path.stat().st_size == scan(path).good_bytes


def test_torn_at_every_byte_reads_a_prefix_and_appends_after_it(tmp_path: Path) -> None:
    whole = b"".join(encode_frame(payload) for payload in PAYLOADS)
    for cut in range(len(whole)):
        path = tmp_path / f"journal-{cut}"
        path.write_bytes(whole[:cut])
        before = list(read_frames(path))
        assert before == PAYLOADS[: len(before)]
        with JournalWriter(path) as journal:
            journal.append(b"after")
        assert list(read_frames(path)) == [*before, b"after"]
        torn = Path(f"{path}.torn")
        kept = torn.read_bytes() if torn.exists() else b""
        assert len(kept) == journal.torn_bytes
        assert b"".join(map(encode_frame, before)) + kept == whole[:cut], "no byte is destroyed"


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=6), st.data())
@settings(max_examples=80)
def test_a_damaged_byte_never_yields_a_wrong_frame(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    with JournalWriter(path) as journal:
        for payload in payloads:
            journal.append(payload)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    found = list(read_frames(path))
    assert found == payloads[: len(found)]
    assert len(found) < len(payloads)
    assert scan(path).good_bytes <= at


def test_flush_policy_decides_what_a_reader_sees(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = JournalWriter(path, flush_every=3)
    journal.append(b"a")
    journal.append(b"b")
    assert list(read_frames(path)) == []
    journal.append(b"c")
    assert list(read_frames(path)) == [b"a", b"b", b"c"]
    journal.append(b"d")
    journal.close()
    journal.close()
    assert list(read_frames(path)) == [b"a", b"b", b"c", b"d"]


def test_a_restart_appends(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for name in (b"first", b"second"):
        with JournalWriter(path) as journal:
            journal.append(name)
            assert journal.torn_bytes == 0
    assert list(read_frames(path)) == [b"first", b"second"]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no journal at .*: give the run's folder"):
        read_frames(tmp_path / "nothing")
    with pytest.raises(ValueError, match="over the limit"):
        encode_frame(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(ValueError, match="flush_every"):
        JournalWriter(tmp_path / "j", flush_every=0)
