"""An OTLP collector that answers and keeps nothing, in a process of its own; for measuring.

Speaks gRPC and HTTP, so that what is measured is hotset's side. `Sink` starts one, can stop it as a
collector that hangs does (SIGSTOP), and ends it. Must not know what spans mean.

    python -m hotset.cluster.bench_trace_sink grpc
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from hotset.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Sink:
    """A collector's process; `settings` are the variables that name it."""

    def __init__(self, process: subprocess.Popen[str], *, protocol: str, port: int) -> None:
        """Made by `sink`."""
        self._process = process
        self.settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        }

    def freeze(self) -> None:
        """Stop answering, with open connections."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Close the port. Idempotent."""
        self.thaw()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def sink(protocol: str) -> Iterator[Sink]:
    """A running collector."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hotset.cluster.bench_trace_sink", protocol],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    told = process.stdout.readline().strip()
    if not told.isdigit():
        process.wait()
        raise ClusterError(
            f"the sink for {protocol} did not start", remedy="pip install 'hotset[otlp]'"
        )
    found = Sink(process, protocol=protocol, port=int(told))
    try:
        yield found
    finally:
        found.end()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take a request's spans."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


def _serve_http() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def _serve_grpc() -> None:
    import grpc  # type: ignore[import-untyped] # it has no types

    def export(_spans: bytes, _context: Any) -> bytes:
        return b""  # the answer's message without a field

    server = grpc.server(ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(export)
    handler = grpc.method_handlers_generic_handler(_SERVICE, {"Export": method})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    _serve_grpc() if sys.argv[1] == "grpc" else _serve_http()
