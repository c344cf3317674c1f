"""Traces (OpenTelemetry): from the request that creates a follow-up to the call that sends it.

By default tracing is off and costs almost nothing. For tracing, install ``chat-followups[otel]`` and set
``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``. The other standard variables work as
OpenTelemetry describes them (``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``, headers, ``OTEL_SDK_DISABLED``, ...).
Spans are exported as OTLP over HTTP.

Each process creates its tracer provider after the fork, because the exporter's thread would not survive a fork. The
tracer provider is not registered globally. With a global tracer provider, spans of libraries could contain texts that
we do not control. Span attributes contain only ids and numbers. Exception messages are left out, because they may
contain a follow-up's message.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

    Attributes = Mapping[str, str | int]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

FLUSH = 3.0
"""Time limit for exporting spans at shutdown, in seconds. An unreachable collector must not delay a drain."""

log = get_logger(__name__)


class Note(Protocol):
    """Records the result of a span: its attributes, and whether it failed."""

    def __call__(self, attributes: Attributes, *, failed: bool = False) -> None:
        """Add attributes to the span, and record whether it failed."""


def _ignore(attributes: Attributes, *, failed: bool = False) -> None:
    pass


NOTHING = nullcontext(_ignore)
"""The span used for anything that is not traced. Creating the span takes 0.4 us. OpenTelemetry's own no-op span takes
5.6 us and exists only if the extra is installed.
"""


class Tracing:
    """The tracing of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        """Store the exporter of the spans."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415 - extra

        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("followups")
        self._propagator = TraceContextTextMapPropagator()

    def context_of(self, headers: Mapping[str, str]) -> Context:
        """Return the trace context of W3C headers, or an empty context without such headers."""
        from opentelemetry.context import Context  # noqa: PLC0415 - the extra's

        return self._propagator.extract(headers, Context())

    @contextmanager
    def span(self, name: str, kind: str, parent: Context, attributes: Attributes) -> Iterator[Note]:
        """Start a span as a child of ``parent``, or start a new trace if there is no parent.

        Inside the block, this span is the current span.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode  # noqa: PLC0415 - the extra's

        with self._tracer.start_as_current_span(
            name,
            parent,
            SpanKind[kind],
            attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:

            def note(attributes: Attributes, *, failed: bool = False) -> None:
                span.set_attributes(attributes)
                if "http.route" in attributes:
                    span.update_name(f"{name} {attributes['http.route']}")
                if failed:
                    span.set_status(Status(StatusCode.ERROR))

            yield note

    def past(self, name: str, parent: Context, attributes: Attributes, seconds: float) -> None:
        """Record a span that has just ended; ``seconds`` is its duration."""
        now = time.time_ns()
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=now - int(seconds * 1e9))
        span.end(now)

    def stop(self) -> None:
        """Export the remaining spans, for `FLUSH` seconds at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(FLUSH)


_tracing: Tracing | None = None


def is_wanted() -> bool:
    """Return whether the environment enables tracing."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    none = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"
    return any(os.environ.get(name) for name in ENDPOINTS) and not disabled and not none


def start(service: str) -> None:
    """Start tracing if the environment enables it; ``service`` replaces a missing ``OTEL_SERVICE_NAME``.

    Call this function in each process, after the fork. Without the package extra `otel`, only a warning is logged.
    """
    global _tracing  # noqa: PLW0603 - one a process, like the logging that goes with it
    if not is_wanted():
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - extra
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - extra
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - extra
    except ImportError as error:
        log.warning("no_traces", missing=error.name, advice="pip install chat-followups[otel]")
        return
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracing = Tracing(provider)


def stop() -> None:
    """Stop tracing."""
    global _tracing
    tracing, _tracing = _tracing, None
    if tracing:
        tracing.stop()


def current_traceparent() -> str | None:
    """Return the current span as a W3C ``traceparent``, or None if there is no current span.

    The span may come from another program's tracer, because other programs call `followups.schedule`.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def request(method: str, headers: Iterable[tuple[bytes, bytes]]) -> AbstractContextManager[Note]:
    """Return the span of a request, as a child of the span in the request's headers."""
    if _tracing is None:
        return NOTHING
    given = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
    return _tracing.span(method, "SERVER", _tracing.context_of(given), {"http.request.method": method})


def attempt(traceparent: str | None, attributes: Callable[[], Attributes]) -> AbstractContextManager[Note]:
    """Return the span of an attempt, in the trace in which the follow-up was created."""
    if _tracing is None:
        return NOTHING
    return _tracing.span("attempt", "CLIENT", _context(_tracing, traceparent), attributes())


def claimed(follow_ups: Iterable[tuple[object, str]], seconds: float) -> None:
    """Record the claim of each lease in the trace of its follow-up."""
    if _tracing is not None:
        for follow_up_id, traceparent in follow_ups:
            attributes = {"followups.follow_up_id": str(follow_up_id)}
            _tracing.past("claim", _context(_tracing, traceparent), attributes, seconds)


def _context(tracing: Tracing, traceparent: str | None) -> Context:
    return tracing.context_of({"traceparent": traceparent} if traceparent else {})
