"""The page's server: what it sends, what it refuses, and that it follows a run that grows."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from aiohttp import ClientSession, WSMsgType
from aiohttp.test_utils import TestServer
from click.testing import CliRunner

from hotset.actors.frames import encode_frame
from hotset.actors.messages import pack
from hotset.cluster.cli import main
from hotset.dashboards.page.folder import FORGOTTEN_NS, FolderSource
from hotset.dashboards.page.progress import SILENT_NS
from hotset.dashboards.page.server import STATIC, PageServer
from hotset.errors import ConfigError
from hotset.policies.types import BlockId
from tests.dashboards.recorded import (
    SECOND_NS,
    START_NS,
    landed,
    small_run,
    span,
    trace_line,
    write_journal,
    write_run,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

DEADLINE_S = 60
END_NS = START_NS + 9 * SECOND_NS


def on_server(
    folder: Path,
    ask: Callable[[ClientSession, TestServer], Awaitable[None]],
    *,
    now_ns: int = END_NS,
) -> None:
    """Run `ask` against a server of the folder."""

    async def served() -> None:
        source = FolderSource(folder, clock_ns=lambda: now_ns)
        page = PageServer(source, poll_s=0.01, clock_ns=lambda: now_ns)
        async with TestServer(page.app()) as server, ClientSession() as session:
            await asyncio.wait_for(ask(session, server), DEADLINE_S)

    asyncio.run(served())


class Viewer:
    """A WebSocket client that keeps the cells as the page does."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.cells = np.zeros(0, np.uint16)
        self.forms: list[str] = []

    async def text(self, kind: str) -> dict[str, Any]:
        while True:
            message = await self.socket.receive()
            if message.type is WSMsgType.BINARY:
                self.take(message.data)
                continue
            assert message.type is WSMsgType.TEXT, message
            found: dict[str, Any] = json.loads(message.data)
            if found["kind"] == kind:
                return found

    async def moment(self) -> dict[str, Any]:
        while True:
            message = await self.socket.receive()
            if message.type is WSMsgType.BINARY:
                return self.take(message.data)
            assert message.type is WSMsgType.TEXT, message

    def take(self, data: bytes) -> dict[str, Any]:
        (length,) = struct.unpack_from("<I", data)
        header: dict[str, Any] = msgspec.json.decode(data[4 : 4 + length])
        payload = data[4 + length :]
        count = header["count"]
        self.forms.append(header["cells"])
        if header["cells"] == "full":
            self.cells = np.frombuffer(payload, "<u2").copy()
        else:
            places = np.frombuffer(payload, "<u4", count)
            self.cells[places] = np.frombuffer(payload, "<u2", count, offset=4 * count)
        return header

    async def show(self, offset_ns: int | None) -> dict[str, Any]:
        await self.socket.send_str(json.dumps({"kind": "show", "offset_ns": offset_ns}))
        while True:
            header = await self.moment()
            if offset_ns is None or header["offset_ns"] == offset_ns:
                return header


def test_moments_and_deltas_are_the_runs_cells(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    source = FolderSource(folder, clock_ns=lambda: END_NS)
    source.poll()

    async def ask(session: ClientSession, server: TestServer) -> None:
        async with session.ws_connect(server.make_url("/ws")) as connection:
            viewer = Viewer(connection)
            hello = await viewer.text("hello")
            assert (hello["layers"], hello["experts"], hello["run"]) == ([1, 2, 3, 4], 8, "r")
            await viewer.moment()
            for second in (0, 9, 3, 8, 7, 5):
                header = await viewer.show(second * SECOND_NS)
                at_ns = START_NS + second * SECOND_NS
                _, cells = source.run.moment(at_ns=at_ns, now_ns=0, live=False)
                assert (viewer.cells == cells.reshape(-1)).all()
                assert header["epoch"] == sum(
                    plan.at_ns <= at_ns for plan in source.run.timeline.plans
                )
            assert set(viewer.forms) == {"full", "delta"}

    on_server(folder, ask)


def test_a_run_that_grows_is_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ended=False)
    extra = landed("worker-1", BlockId(4, 7), at_ns=END_NS + 1)

    async def ask(session: ClientSession, server: TestServer) -> None:
        async with session.ws_connect(server.make_url("/ws")) as connection:
            viewer = Viewer(connection)
            first = await viewer.moment()
            assert first["live"]
            place = 2 * 32 + 3 * 8 + 7
            assert viewer.cells[place] & 1 == 0
            frame = encode_frame(msgspec.msgpack.encode(pack(extra)))
            with (folder / "journal.msgpack").open("ab") as file:
                file.write(frame[:9])
                file.flush()
                await viewer.moment()
                assert viewer.cells[place] & 1 == 0
                file.write(frame[9:])
            line = trace_line("worker-1", "hbm", [span("hotset.wait", START_NS, END_NS, linked=1)])
            (folder / "trace-n.jsonl").write_bytes(line)
            header = first
            while not (header["stall_ns"] and viewer.cells[place] & 1):
                header = await viewer.moment()

    on_server(folder, ask)


def test_silence_raises_the_alarm_while_the_run_is_live(tmp_path: Path) -> None:
    async def said(session: ClientSession, server: TestServer) -> None:
        async with session.get(server.make_url("/api/moment")) as answer:
            found.append((await answer.json())["alarms"])

    found: list[list[str]] = []
    late_ns = END_NS + SILENT_NS + SECOND_NS
    on_server(write_run(tmp_path / "live", ended=False), said, now_ns=late_ns)
    on_server(write_run(tmp_path / "over"), said, now_ns=late_ns)
    on_server(write_run(tmp_path / "old", ended=False), said, now_ns=END_NS + 2 * FORGOTTEN_NS)
    assert [text.split(" for ")[0] for text in found[0]][:1] == [
        "the controller has written nothing"
    ]
    assert found[1:] == [[], []]


def test_questions_are_answered_or_refused_in_words(tmp_path: Path) -> None:
    async def ask(session: ClientSession, server: TestServer) -> None:
        async with session.ws_connect(server.make_url("/ws")) as connection:
            viewer = Viewer(connection)
            await connection.send_str(json.dumps({"kind": "why", "block": "2.3"}))
            told = await viewer.text("why")
            assert told["summary"].startswith("Expert 3 of layer 2 is at worker-1")
            assert told["told"] == len(told["story"]) > 2
            await connection.send_str(json.dumps({"kind": "why", "block": "2"}))
            assert "LAYER.EXPERT" in (await viewer.text("error"))["text"]
            await connection.send_str(json.dumps({"kind": "why", "block": "99.0"}))
            assert (await viewer.text("why"))["summary"] == "no such block"
            await connection.send_str(json.dumps({"kind": "drop", "block": "2.3"}))
            assert "drop" in (await viewer.text("error"))["text"]
        async with session.get(server.make_url("/api/why/2.3")) as answer:
            assert (await answer.json())["block"] == "2.3"
        async with session.get(server.make_url("/api/moment?offset_ns=x")) as answer:
            assert answer.status == 400

    on_server(write_run(tmp_path / "r"), ask)


def test_only_this_machine_and_this_page_are_served(tmp_path: Path) -> None:
    async def ask(session: ClientSession, server: TestServer) -> None:
        async with session.get(server.make_url("/")) as answer:
            assert answer.status == 200
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "http" not in policy
        async with session.get(server.make_url("/"), headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403
        async with session.get(server.make_url("/ws"), headers={
            "Origin": "http://evil.example", "Upgrade": "websocket", "Connection": "Upgrade",
        }) as answer:  # fmt: skip
            assert answer.status == 403
        async with session.get(server.make_url("/static/../server.py")) as answer:
            assert answer.status == 404
        for path in ("/", "/ws", "/api/moment", "/static/page.css"):
            async with session.post(server.make_url(path)) as answer:
                assert answer.status == 405

    on_server(write_run(tmp_path / "r"), ask)


def test_the_page_names_nothing_outside_itself() -> None:
    ours = [path for path in STATIC.rglob("*") if path.suffix in {".html", ".css", ".js"}]
    assert len(ours) >= 9
    for path in ours:
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "vendor":
            assert "http://" not in text
            assert "https://" not in text
            assert "innerHTML" not in text
    assert (STATIC / "vendor" / "uPlot.LICENSE").read_text(encoding="utf-8").startswith("The MIT")


@pytest.mark.parametrize("missing", ["journal", "block", "spec"])
def test_a_folder_that_is_no_run_is_refused_with_a_remedy(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "r"
    if missing == "block":
        write_journal(folder, [])
    elif missing == "spec":
        write_journal(folder, small_run())
        (folder / "run.json").write_text("{}")
    with pytest.raises(ConfigError) as raised:
        FolderSource(folder)
    assert raised.value.remedy


def test_the_command_refuses_what_cannot_work(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["dashboard", str(tmp_path)])
    assert (result.exit_code, "journal.msgpack" in result.output) == (2, True)
    folder = write_run(tmp_path / "r")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["dashboard", str(folder), "--port", port])
    assert (result.exit_code, "--port" in result.output) == (2, True)


def test_a_source_that_fails_is_told_and_asked_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ended=False)
    journal = folder / "journal.msgpack"

    async def ask(session: ClientSession, server: TestServer) -> None:
        async with session.ws_connect(server.make_url("/ws")) as socket_:
            viewer = Viewer(socket_)
            await viewer.moment()
            journal.rename(folder / "away")
            assert "cannot be read on" in (await viewer.text("error"))["text"]
            (folder / "away").rename(journal)
            event = landed("worker-1", BlockId(4, 7), at_ns=END_NS + 1)
            with journal.open("ab") as file:
                file.write(encode_frame(msgspec.msgpack.encode(pack(event))))
            while (await viewer.moment())["to_ns"] <= END_NS:
                pass

    on_server(folder, ask)
