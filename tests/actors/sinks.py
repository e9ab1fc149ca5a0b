"""OTLP collectors in the test's process, over gRPC and over HTTP."""

from __future__ import annotations

import contextlib
import gzip
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sink:
    """Spans that have arrived, as protobuf messages, with their resource."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def take(self, request: Any) -> None:
        with self._lock:
            for group in request.resource_spans:
                self.resources.append(plain(group.resource.attributes))
                for part in group.scope_spans:
                    self.spans += part.spans


def plain(attributes: Any) -> dict[str, Any]:
    found = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = (
            tuple(v.string_value for v in value.values) if kind == "array_value" else value
        )
    return found


class _Service(service.TraceServiceServicer):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - gRPC's name
        self._sink.take(request)
        return messages.ExportTraceServiceResponse()


@contextlib.contextmanager
def grpc_sink() -> Iterator[tuple[Sink, str]]:
    sink = Sink()
    server = grpc.server(ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(_Service(sink), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield sink, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def http_sink() -> Iterator[tuple[Sink, str]]:
    sink = Sink()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            sink.take(messages.ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield sink, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


SINKS = {"grpc": grpc_sink, "http/protobuf": http_sink}
