"""Logs: one line per event, one format for all loggers, and no secrets."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import sys
import time
import warnings
from contextlib import redirect_stderr
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from followups.delivery import events
from followups.delivery.attempts import Attempt, Begun
from followups.json_encoding import encode_json
from followups.states import ReasonCode, Status, finish
from followups.store.leases import Lease
from followups.telemetry.escaping import escape, escape_json
from followups.telemetry.logs import OWN_HANDLERS, TALKATIVE, configure_logging, get_logger, log_batch
from followups.telemetry.redaction import HIDDEN, clean, redact
from followups.transports.answers import Answer, outcome_of
from followups.transports.http import DIALECT
from followups.transports.port import Delivery, Rejected, Retry, Sent, Snoozed, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.transports.port import Outcome

RFC_3339_UTC = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")


class TerminalStream(io.StringIO):
    """A stderr that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class FullDisk(io.StringIO):
    """A stderr on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Restore the logging configuration after the test."""
    root = logging.getLogger()
    before = {name: (logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in _touched()}
    configuration, root_level, root_handlers = structlog.get_config(), root.level, list(root.handlers)
    yield
    structlog.configure(**configuration)
    structlog.contextvars.clear_contextvars()
    root.setLevel(root_level)
    root.handlers[:] = root_handlers
    for name, (level, handlers) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers
    logging.captureWarnings(capture=False)


def _touched() -> set[str]:
    return {*OWN_HANDLERS, *TALKATIVE}


def _lines(written: pytest.CaptureFixture[str] | io.StringIO) -> list[dict[str, Any]]:
    text = written.getvalue() if isinstance(written, io.StringIO) else written.readouterr().err
    return [json.loads(line) for line in text.splitlines()]


def _log_one(logger: str, event: str, **fields: object) -> None:
    log_batch(logger, {event: [(time.time_ns(), fields)]})


def test_an_event_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal, a log event is one JSON object on stderr with a UTC time."""
    configure_logging(None, "info")
    get_logger("followups.delivery").info("attempt", outcome="sent", note="two\nlines \N{SNOWMAN}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    line = json.loads(err)
    assert list(line)[:4] == ["timestamp", "level", "logger", "event"]
    assert RFC_3339_UTC.match(line.pop("timestamp"))
    assert line == {
        "level": "info",
        "logger": "followups.delivery",
        "event": "attempt",
        "outcome": "sent",
        "note": "two\nlines \N{SNOWMAN}",
    }


@pytest.mark.parametrize("name", ["celery.worker.consumer", "kombu", "uvicorn.access", "anything"])
def test_libraries_log_in_the_same_format(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A library's record from `logging` has the same keys as the project's own, and is logged once.

    The handlers that the library itself installs do not write the record again.
    """
    if name in OWN_HANDLERS:
        logging.getLogger(name).addHandler(logging.StreamHandler(sys.stderr))
    configure_logging("json", "info")
    logging.getLogger(name).warning("lost %s of %d\nconnections", "one", 3)
    (line,) = _lines(capsys)
    assert RFC_3339_UTC.match(line.pop("timestamp"))
    assert line == {"level": "warning", "logger": name, "event": "lost one of 3\nconnections"}


def test_warnings_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """A Python warning is logged as a line instead of being printed as plain text."""
    configure_logging("json", "info")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = _lines(capsys)
    assert line["logger"] == "py.warnings"
    assert "old" in line["event"]


@pytest.mark.parametrize("own", [True, False])
def test_an_exception_is_in_its_line_without_local_variables(capsys: pytest.CaptureFixture[str], *, own: bool) -> None:
    """An exception is logged as text in its event's line, with passwords hidden.

    The traceback is logged without the values of local variables.
    """
    configure_logging("json", "info")
    private = "a private word"
    logger = get_logger("x") if own else logging.getLogger("x")
    try:
        raise ValueError(f"no redis://me:pa55@host ({len(private)})")  # noqa: EM102, TRY003, TRY301 - the test needs this message
    except ValueError:
        logger.exception("it broke")
    (line,) = _lines(capsys)
    assert (line["level"], line["event"]) == ("error", "it broke")
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ValueError: no redis://me:***@host (14)")
    assert "a private word" not in line["exception"].replace(f'private = "{private}"', "")


def test_a_terminal_gets_columns_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, log lines have readable columns by default; NO_COLOR removes the colours."""
    terminal = TerminalStream()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    configure_logging(None, "info")
    get_logger("x").info("tick", claimed=3)
    assert "\x1b[" in terminal.getvalue()
    assert "tick" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging("console", "info")
    terminal.truncate(0)
    get_logger("x").info("tick", message="a private word")
    assert "\x1b[" not in terminal.getvalue()
    assert "private" not in terminal.getvalue()


def test_json_can_be_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON can be selected as the log format even for output to a terminal."""
    terminal = TerminalStream()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging("json", "info")
    get_logger("x").info("tick")
    assert _lines(terminal)[0]["event"] == "tick"


def test_the_level_is_the_lowest_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """If an event is below the configured level, it is not logged.

    Libraries log from level info upwards, and verbose libraries from level warning upwards.
    """
    configure_logging("json", "warning")
    get_logger("x").info("no")
    logging.getLogger("x").info("no")
    configure_logging("json", "debug")
    get_logger("x").debug("yes")
    logging.getLogger("x").debug("no")
    logging.getLogger("celery.app.trace").info("no")
    logging.getLogger("celery.app.trace").error("yes")
    assert [line["event"] for line in _lines(capsys)] == ["yes", "yes"]


def test_configuring_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    """If logging is configured twice, only the last configuration applies, and unrelated handlers are kept."""
    foreign = logging.NullHandler()
    logging.getLogger().addHandler(foreign)
    for _ in range(2):
        configure_logging("json", "info")
    get_logger("x").info("once")
    logging.getLogger("x").info("once")
    assert len(_lines(capsys)) == 2
    assert foreign in logging.getLogger().handlers


@pytest.mark.parametrize("stderr", [FullDisk(), TerminalStream()])
def test_a_full_stderr_raises_no_error(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """If stderr is full or closed, log lines are lost, but no error is raised."""
    configure_logging("json", "info")
    if isinstance(stderr, TerminalStream):
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    get_logger("x").warning("one")
    _log_one("x", "many")


@pytest.mark.parametrize("form", ["json", "console"])
def test_batch_lines_have_the_usual_format(capsys: pytest.CaptureFixture[str], form: Any) -> None:
    """A batch's lines have the same format as other lines, and are written only if level info is logged."""
    configure_logging(form, "warning")
    _log_one("x", "not_logged")
    configure_logging(form, "info")
    get_logger("x").info("attempt", attempt=1, outcome="sent", status_code=None)
    alone = capsys.readouterr().err
    _log_one("x", "attempt", attempt=1, outcome="sent", status_code=None)
    gathered = capsys.readouterr().err
    assert re.sub(r"\d\S+Z", "now", gathered) == re.sub(r"\d\S+Z", "now", alone)
    assert gathered.count("\n") == 1


def test_context_variables_are_in_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Log lines of this package and of libraries contain the context variables."""
    configure_logging("json", "info")
    with structlog.contextvars.bound_contextvars(task_id="7"):
        get_logger("x").info("own")
        logging.getLogger("x").info("theirs")
    assert [line["task_id"] for line in _lines(capsys)] == ["7", "7"]


SECRETS = [
    "authorization",
    "Authorization",
    "api_key",
    "X-Api-Key",
    "secret",
    "transport_secret",
    "password",
    "message",
]


@given(key=st.sampled_from(SECRETS), value=st.text(min_size=4) | st.lists(st.text(), min_size=1) | st.integers())
def test_secrets_are_hidden_wherever_they_are(key: str, value: object) -> None:
    """If a field has a secret's name, its value is hidden, even in a nested field."""
    event = redact(None, "info", {"event": "e", key: value, "headers": {key: value}, "all": [{"in": ({key: value},)}]})
    assert event == {"event": "e", key: HIDDEN, "headers": {key: HIDDEN}, "all": [{"in": [{key: HIDDEN}]}]}


def test_other_values_are_unchanged() -> None:
    """Ids, numbers, null values, and fields whose names only resemble a secret's are logged unchanged."""
    event = {"event": "e", "chat_message_id": "1", "message_count": 2, "password": None, "ok": True, "lag_ms": 0.5}
    assert redact(None, "info", dict(event)) == event


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("amqp://me:pa55@host/x and redis://:pa55@host", "amqp://me:***@host/x and redis://:***@host"),
        ("redis://me:p@ss@host/0", "redis://me:***@host/0"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("Authorization: Bearer fu_abc.def", "Authorization: Bearer ***"),
        ("the bearer of news", "the bearer *** news"),
    ],
)
def test_passwords_in_texts_are_hidden(text: str, cleaned: str) -> None:
    """In every logged text, passwords in URLs and tokens after 'Bearer' are hidden."""
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    "body", [b'{"ok": false, "why": "secret"}', b"<!doctype html><title>secret</title>", b'{"chatMessageId": "secret"}']
)
def test_an_invalid_body_is_not_quoted(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """If a 2xx response has an invalid body, the log describes the body without quoting it."""
    configure_logging("json", "info")
    now = datetime.now(UTC)
    lease = Lease(uuid4(), 1, now, task_id="task")
    begun = Begun(lease, Delivery(lease.id, uuid4(), uuid4(), "api", None, uuid4(), "text", now, 1), 0)
    outcome = outcome_of(Answer(200, body=body), DIALECT)
    events.attempted(Attempt(begun, outcome, 1.0, 0.0, 0.0), "http")
    events.flush()
    (line,) = _lines(capsys)
    assert (line["event"], line["outcome"], line["status_code"]) == ("attempt", "sent", 200)
    assert line["odd"]
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize("text", ["\x1b]8;;http://evil\x07", "a\x9b31m", "left \u202e", "a\nb", "see [/b]"])
def test_the_console_format_escapes_control_characters(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console format prints any event on one line without control characters, except colour codes."""
    for terminal in (io.StringIO(), TerminalStream()):
        monkeypatch.setattr(sys, "stderr", terminal)
        configure_logging("console", "info")
        get_logger("x").info(text, reason=text, spaced=f"{text} !", inner={"one": [text]})
        logging.getLogger("foreign").warning("said %s", text)
        _log_one("y", text, reason=text)
        get_logger("x").error(text, exc_info=ValueError(text))
        written = re.sub(r"\x1b\[\d*m", "", terminal.getvalue())
        assert escape(written, lines=True) == written
        assert escape(text) in written
        assert written.count("\n") == 4 + 1 + text.count("\n")  # four events and one exception


def test_json_lines_have_no_raw_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """C1 and bidirectional control characters are escaped in JSON log lines."""
    configure_logging("json", "info")
    for info in (get_logger("x").info, partial(_log_one, "x")):
        info("a", reason="\x9b31m \u202e \x7f")
    written = capsys.readouterr().err
    assert written.replace("\n", "").isascii()
    assert "\x7f" not in written
    assert [json.loads(line)["reason"] for line in written.splitlines()] == ["\x9b31m \u202e \x7f"] * 2


@pytest.mark.parametrize("value", ['say "no"\\\n\x00', "é\u200b", "", None, True, 7, 0.25, uuid4(), {"a": [1]}])
def test_a_batch_line_is_valid_json(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch's line contains each field unchanged, or as text if JSON has no suitable type."""
    configure_logging("json", "info")
    _log_one("y", "e", field=value)
    _log_one("y", "e")
    first, second = _lines(capsys)
    assert first.pop("timestamp") <= second.pop("timestamp")
    assert first == {**second, "field": str(value) if isinstance(value, UUID) else value}
    assert second == {"level": "info", "logger": "y", "event": "e"}


OUTCOMES = st.one_of(
    st.builds(Sent, st.none(), st.none() | st.integers(0, 999), st.text()),
    *(
        st.builds(kind, st.text(), status_code=st.none() | st.integers(0, 999))
        for kind in (Retry, Snoozed, Rejected, Unknown)
    ),
)


@given(outcome=OUTCOMES, task_id=st.text(), seconds=st.floats(0, 1e9), lag=st.floats(-1e9, 1e9))
def test_lines_of_attempts_and_transitions(outcome: Outcome, task_id: str, seconds: float, lag: float) -> None:
    """The log line of each attempt and transition contains exactly its fields, in the documented order.

    An attempt's line has the time of the attempt's end, and a transition's line the time at which it was logged.
    """
    configure_logging("json", "info")
    due = datetime(2026, 1, 1, tzinfo=UTC)
    delivery = Delivery(uuid4(), uuid4(), uuid4(), "api", None, uuid4(), "text", due, 1)
    begun = Begun(Lease(delivery.follow_up_id, 1, due, task_id=task_id), delivery, 0)
    before = datetime.now(UTC)
    with redirect_stderr(io.StringIO()) as written:
        events.attempted(Attempt(begun, outcome, seconds, 0.0, lag), "http")
        after = datetime.now(UTC)
        time.sleep(0.00001)  # so that the transition has a later time
        events.ended([(delivery.follow_up_id, finish(Status.FAILED, ReasonCode.REJECTED, task_id))])
    attempt, transition = written.getvalue().removesuffix("\n").split("\n")
    assert before <= datetime.fromisoformat(attempt[14:41]) <= after < datetime.fromisoformat(transition[14:41])
    odd = {"odd": outcome.detail} if isinstance(outcome, Sent) and outcome.detail else {}
    fields = {
        "follow_up_id": delivery.follow_up_id,
        "chat_id": delivery.chat_id,
        "workspace_id": delivery.workspace_id,
        "attempt": 1,
        "outcome": type(outcome).__name__.lower(),
        "status_code": outcome.status_code,
        "duration_ms": round(seconds * 1000, 2),
        "lag_ms": round(lag * 1000, 2),
        "task_id": task_id,
    }
    assert attempt == _document(attempt[14:41], "attempt", fields | odd)
    ended = {"follow_up_id": delivery.follow_up_id, "status": "failed", "code": "rejected"}
    assert transition == _document(transition[14:41], "transition", ended)


def _document(timestamp: str, event: str, fields: dict[str, object]) -> str:
    shared = {"timestamp": timestamp, "level": "info", "logger": events.__name__, "event": event}
    return escape_json(encode_json(shared | fields).decode())


def test_lines_that_cannot_be_written_raise_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """If a line cannot be written, deliveries continue, and the log reports the loss."""
    configure_logging("json", "info")
    not_final: Any = object()
    events.ended([(uuid4(), not_final)])
    assert [line["event"] for line in _lines(capsys)] == ["log_lines_lost"]
