"""Tests of traces, from the POST to the transport's call, with real processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stack import CELERY, wait_until
from web import FOLLOW_UPS, Api, in_days, start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    from stack import Stack

TEXT = "a text that belongs into no trace"


@dataclass
class Received:
    """The requests received by one server that acts as both trace collector and chat."""

    url: str = ""
    exports: list[bytes] = field(default_factory=list)
    deliveries: list[dict[str, str]] = field(default_factory=list)
    """The headers of each delivery, in lower case."""
    status: int = 200
    """The status code of the chat's answer."""

    def spans(self) -> list[tuple[str, Span]]:
        """Return the received spans, each with the name of its service."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.exports]
        return [
            (attributes(resource.resource)["service.name"], span)
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> list[Span]:
        """Return the spans with this name."""
        return [span for _, span in self.spans() if span.name == name]


def attributes(spanned: Any) -> dict[str, Any]:
    """Return a span's attributes by name."""
    return {each.key: each.value.string_value or each.value.int_value for each in spanned.attributes}


@pytest.fixture
def received() -> Iterator[Received]:
    """Return a running server that acts as both the trace collector and the chat server."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collects = self.path == "/v1/traces"
            if collects:
                received.exports.append(body)
            else:
                received.deliveries.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200 if collects else received.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield received
        server.shutdown()
        thread.join()


@pytest.fixture
def traced(stack: Stack, received: Received) -> Stack:
    """Return the system with tracing enabled."""
    stack.options |= {
        "FOLLOWUPS_TRANSPORT_URL": f"{received.url}/messages",
        "OTEL_EXPORTER_OTLP_ENDPOINT": received.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    return stack


def create(stack: Stack, **headers: str) -> str:
    """Send a POST request that creates a follow-up due now; return the follow-up's id."""
    api = Api(start(stack.processes, stack.environment())[1], stack.world)
    with api.client:
        chat_id = str(uuid4())
        api.message(chat_id, "agent")
        answer = api.post(FOLLOW_UPS, {"chatId": chat_id, "dueDate": in_days(0), "message": TEXT}, **headers)
        assert answer.status_code == 201
        created: str = answer.json()["id"]
        return created


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_one_trace_from_the_post_to_the_transport(traced: Stack, received: Received, pool: str) -> None:
    """One trace leads from the client's POST to the transport's request, even after a fork."""
    traced.beat()
    worker = [*CELERY, "worker", "--pool", pool, "--concurrency", "1"]
    traced.processes.spawn("worker", worker, environment=traced.environment())
    trace_id = uuid4().hex
    follow_up = create(traced, traceparent=f"00-{trace_id}-00f067aa0ba902b7-01")

    (delivery,) = wait_until(lambda: received.deliveries, within=60)
    (attempt,) = wait_until(lambda: received.named("attempt"))
    (claim,) = wait_until(lambda: received.named("claim"))
    (post,) = wait_until(lambda: received.named(f"POST {FOLLOW_UPS}"))
    assert {span.trace_id.hex() for span in (post, claim, attempt)} == {trace_id}
    assert post.parent_span_id.hex() == "00f067aa0ba902b7"
    assert claim.parent_span_id == attempt.parent_span_id == post.span_id
    assert delivery["traceparent"] == f"00-{trace_id}-{attempt.span_id.hex()}-01"
    told = attributes(attempt)
    assert (told["followups.follow_up_id"], told["followups.outcome"]) == (follow_up, "sent")
    assert attributes(post)["http.response.status_code"] == 201
    services = {span.name: service for service, span in received.spans()}
    assert (services["attempt"], services[post.name]) == ("followups-worker", "followups-web")
    assert TEXT.encode() not in b"".join(received.exports)


def test_created_outside_a_trace(traced: Stack, received: Received) -> None:
    """If a follow-up was created outside a trace, each attempt starts a trace. A failed attempt has an error span."""
    received.status = 500
    follow_up = traced.world.follow_up(message=TEXT)
    traced.beat()
    traced.worker()
    attempts = wait_until(lambda: len(found := received.named("attempt")) >= 2 and found)
    assert len({span.trace_id for span in attempts}) == len(attempts)
    assert {attributes(span)["followups.outcome"] for span in attempts} == {"retry"}
    assert {span.status.code for span in attempts} == {2}  # the status code 2 means an error
    assert {attributes(span)["followups.follow_up_id"] for span in attempts} == {str(follow_up)}
    assert TEXT.encode() not in b"".join(received.exports)


def test_a_refusal_that_is_not_final(traced: Stack, received: Received) -> None:
    """If the breaker defers a refused follow-up, the attempt's span has the outcome ``snoozed``."""
    received.status = 401
    traced.options["FOLLOWUPS_BREAKER_FAILURES"] = "2"
    follow_ups = [traced.world.follow_up() for _ in range(2)]
    traced.beat()
    traced.worker()
    attempts = wait_until(lambda: len(found := received.named("attempt")) > 1 and found)
    assert sorted(str(attributes(each)["followups.outcome"]) for each in attempts[:2]) == ["rejected", "snoozed"]
    wait_until(lambda: sum(traced.world.row(each).snoozes for each in follow_ups))
    assert {row.status for row in traced.world.rows(*follow_ups)} == {"failed", "pending"}


def test_tracing_is_off_by_default(stack: Stack, received: Received) -> None:
    """If the environment names no collector, nothing is traced and requests have no traceparent."""
    stack.options["FOLLOWUPS_TRANSPORT_URL"] = f"{received.url}/messages"
    stack.beat()
    stack.worker()
    follow_up = create(stack, traceparent=f"00-{uuid4().hex}-00f067aa0ba902b7-01")
    (delivery,) = wait_until(lambda: received.deliveries)
    assert "traceparent" not in delivery
    assert stack.world.scalar(f"SELECT traceparent IS NULL FROM follow_ups WHERE id = '{follow_up}'")  # noqa: S608 - ours
    assert received.exports == []


def test_without_the_extra() -> None:
    """If a collector is configured but the extra `otel` is missing, there is only a warning."""
    script = """
import sys
sys.modules["opentelemetry.sdk"] = None
sys.modules["opentelemetry.exporter"] = None
from followups.telemetry import logs, traces
logs.configure_logging("json", "info")
traces.start("followups-worker")
with traces.attempt("00-1-2-01", dict) as note:
    note({})
print(traces.current_traceparent())
"""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "None\n"
    assert ran.stderr.count("\n") == 1
    assert "pip install chat-followups[otel]" in ran.stderr


def test_an_unreachable_collector(traced: Stack, received: Received) -> None:
    """If the trace collector is unreachable, no delivery is lost and no shutdown is delayed."""
    traced.options["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    traced.beat()
    worker = traced.worker()
    traced.world.follow_up()
    wait_until(lambda: received.deliveries)
    worker.ask()
    wait_until(lambda: worker.exit_code is not None, within=15)
    assert worker.exit_code == 0
