"""Requests over HTTP on a real cluster: one trace from the caller's header to the transfers."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiohttp.test_utils import TestClient, TestServer

from hotset.actors.spans import run_trace_id
from hotset.actors.tracecontext import parse
from hotset.cluster.front import Front
from hotset.cluster.http_front import HttpFront
from hotset.cluster.serve import load_tokenizer
from tests.cluster.world import deployed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{CALLER}-01"
BODY = {"prompt": "def __init__(self", "max_tokens": 12}
SECONDS = 120


class Ran(NamedTuple):
    """What the callers got, and what the run's files say."""

    answers: dict[str, Any]
    spans: list[dict[str, Any]]
    run: str
    folder: Path


@pytest.fixture(scope="module")
def ran(
    cluster: LocalCluster, models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    """One run: requests with and without a trace, in one answer and as a stream, and bad ones."""
    assert cluster.nodes
    folder = tmp_path_factory.mktemp("run")
    model = models("demo")
    with deployed(model, folder, workers=2, hbm_ratio=0.2) as deployment:
        front = HttpFront(Front(deployment), load_tokenizer(str(model)), model="demo")
        answers = asyncio.run(ask(front))
        deployment.totals()  # every store has shipped
        run = deployment.run
    lines = [
        json.loads(line)["resourceSpans"][0]
        for path in sorted(folder.glob("trace-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    parts = [scope for line in lines for scope in line["scopeSpans"]]
    spans = [span for part in parts for span in part.get("spans", [])]
    return Ran(answers, spans, run, folder)


async def ask(front: HttpFront) -> dict[str, Any]:
    async with TestClient(TestServer(front.app())) as client:
        found: dict[str, Any] = {}

        async def post(name: str, body: Any, **headers: str) -> None:
            async with asyncio.timeout(SECONDS):
                answer = await client.post("/v1/completions", json=body, headers=headers)
                found[name] = (answer.status, dict(answer.headers), await answer.text())

        many = [post(f"more {at}", BODY | {"prompt": f"class A{at}:"}) for at in range(3)]
        await asyncio.gather(post("traced", BODY, traceparent=HEADER), *many)
        await post("alone", BODY)
        await post("stream", BODY | {"stream": True}, traceparent=HEADER)
        await post("broken header", BODY | {"max_tokens": 1}, traceparent="00-zz-01")
        await post("sampling", BODY | {"temperature": 0.7})
        await post("no prompt", {"max_tokens": 3})
        await post("ids", {"prompt": [5, 9, 4], "max_tokens": 2})
        await post("wrong ids", {"prompt": [-1], "max_tokens": 2})
        await post("not json", "x")
        found["health"] = await (await client.get("/health")).json()
        found["models"] = await (await client.get("/v1/models")).json()
        return found


def test_answers_are_completions(ran: Ran) -> None:
    status, _, text = ran.answers["alone"]
    body = json.loads(text)
    assert status == 200
    assert body["usage"]["completion_tokens"] == 12
    assert body["choices"][0]["finish_reason"] == "length"
    assert ran.answers["health"] == {"status": "ok", "requests": 0}
    assert ran.answers["models"]["data"][0]["id"] == "demo"
    assert json.loads(ran.answers["ids"][2])["usage"]["prompt_tokens"] == 3
    for name in ("sampling", "no prompt", "wrong ids", "not json"):
        status, _, text = ran.answers[name]
        assert (name, status) == (name, 400)
        assert json.loads(text)["error"]["message"]


def test_a_stream_gives_the_same_text(ran: Ran) -> None:
    status, headers, text = ran.answers["stream"]
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event)["choices"][0] for event in events[:-1]]
    whole = json.loads(ran.answers["alone"][2])["choices"][0]["text"]
    assert "".join(part["text"] for part in parts) == whole
    assert [part["finish_reason"] for part in parts[-2:]] == [None, "length"]


def test_one_trace_runs_from_the_header_to_the_transfers(ran: Ran) -> None:
    mine = [span for span in ran.spans if span["traceId"] == TRACE]
    by_id = {(span["traceId"], span["spanId"]): span for span in ran.spans}
    requests = {span["spanId"]: span for span in mine if span["name"] == "hotset.request"}
    answered = {parse(ran.answers[name][1]["traceparent"]) for name in ("traced", "stream")}
    assert {f"{one.span_id:016x}" for one in answered if one} == set(requests)
    assert all(span["parentSpanId"] == CALLER and span["kind"] == 2 for span in requests.values())
    steps = {span["spanId"]: span for span in mine if span["name"] == "hotset.compute.step"}
    assert len(steps) == 2 * BODY["max_tokens"]  # type: ignore[operator] # it is a number
    assert {span["parentSpanId"] for span in steps.values()} == set(requests)
    for step in steps.values():
        request = requests[step["parentSpanId"]]
        assert int(request["startTimeUnixNano"]) <= int(step["startTimeUnixNano"])
        assert int(step["endTimeUnixNano"]) <= int(request["endTimeUnixNano"])
    linked = [
        by_id[link["traceId"], link["spanId"]]
        for step in steps.values()
        for link in step.get("links", [])
    ]
    assert any(span["name"] == "hotset.transfer" for span in linked)
    caused = [span for span in mine if span["name"] == "hotset.transfer"]
    assert caused, "what the request asked for is in its trace"
    assert {span["parentSpanId"] for span in caused} <= set(steps)


def test_every_target_of_a_link_exists_in_the_trace_that_it_names(ran: Ran) -> None:
    present = {(span["traceId"], span["spanId"]): span["name"] for span in ran.spans}
    links = [
        (span["name"], (link["traceId"], link["spanId"]))
        for span in ran.spans
        for link in span.get("links", [])
    ]
    assert {name for name, _ in links} >= {"hotset.wait", "hotset.compute.step", "hotset.use"}
    assert [target for _, target in links if target not in present] == []
    told = {present[target] for _, target in links}
    assert told <= {"hotset.transfer", "hotset.dispatch"}


def test_each_request_is_a_trace_and_the_rest_is_the_run(ran: Ran) -> None:
    own = f"{run_trace_id(ran.run):032x}"
    traces = {span["traceId"] for span in ran.spans}
    roots = {
        span["traceId"]
        for span in ran.spans
        if span["name"] == "hotset.request" and span["traceId"] != TRACE
    }
    served = ("alone", "more 0", "more 1", "more 2", "broken header", "ids")
    told = {ran.answers[name][1]["traceparent"].split("-")[1] for name in served}
    assert roots == told
    assert traces == {own, TRACE, *told}
    inside = {span["name"] for span in ran.spans if span["traceId"] == own}
    assert {"hotset.plan", "hotset.scale", "hotset.transfer"} <= inside
    assert not inside & {"hotset.request", "hotset.compute.step", "hotset.wait", "hotset.dispatch"}
    parents = {span["spanId"] for span in ran.spans}
    orphans = [
        span
        for span in ran.spans
        if span.get("parentSpanId") and span["parentSpanId"] not in parents | {CALLER}
    ]
    assert orphans == []
