"""Which OTLP exporter a run uses, from the standard `OTEL_*` variables.

Decides protocol and share only; endpoint, headers, certificates, compression and timeout are read
by OpenTelemetry's own exporters, which come with the extra `otlp`. Must not know Ray or rows.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hotset.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace.export import SpanExporter


def wanted(settings: Mapping[str, str]) -> str:
    """Protocol that the standard variables ask for: `grpc`, `http/protobuf`, or empty for none.

    Spans are sent when an endpoint is named or `OTEL_TRACES_EXPORTER=otlp` asks for the default
    one. Raises ConfigError for a protocol or exporter that there is not.
    """
    if settings.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    named = {one.strip() for one in settings.get("OTEL_TRACES_EXPORTER", "").split(",")} - {""}
    if unknown := named - {"otlp", "none"}:
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER={','.join(sorted(unknown))} is not supported",
            remedy="use otlp or none; the trace file is written in any case",
        )
    endpoint = _either(settings, "ENDPOINT")
    if "none" in named or not (endpoint or "otlp" in named):
        return ""
    protocol = _either(settings, "PROTOCOL") or "http/protobuf"
    if protocol not in {"grpc", "http/protobuf"}:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not supported",
            remedy="use grpc or http/protobuf",
        )
    return protocol


def sample_ratio(settings: Mapping[str, str]) -> float:
    """Share of ordinary transfers to send, from `OTEL_TRACES_SAMPLER` and its `_ARG`; 1 is all.

    Raises ConfigError for a share that is not a number from 0 to 1.
    """
    if "traceidratio" not in settings.get("OTEL_TRACES_SAMPLER", ""):
        return 1.0
    text = settings.get("OTEL_TRACES_SAMPLER_ARG", "1")
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ConfigError(
            f"OTEL_TRACES_SAMPLER_ARG={text} is not a share",
            remedy="use a number from 0 to 1, for instance 0.1",
        )
    return ratio


def make_exporter(settings: Mapping[str, str]) -> SpanExporter | None:
    """Build the SDK's exporter for these variables, or None when they ask for none.

    Sets the variables in this process, because that is where the SDK reads them. Raises ConfigError
    as `wanted`, and DependencyError when the exporter's package is absent.
    """
    protocol = wanted(settings)
    if not protocol:
        return None
    os.environ.update(settings)
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
                OTLPSpanExporter as Grpc,
            )

            return Grpc()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    except ImportError as error:
        raise DependencyError(
            f"the OTLP exporter for {protocol} is not installed ({error})",
            remedy="pip install 'hotset[otlp]', or unset OTEL_EXPORTER_OTLP_ENDPOINT",
        ) from None


def _either(settings: Mapping[str, str], what: str) -> str:
    own = settings.get(f"OTEL_EXPORTER_OTLP_TRACES_{what}", "")
    return own or settings.get(f"OTEL_EXPORTER_OTLP_{what}", "")
