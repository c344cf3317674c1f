"""Signals that stop `up` and `demo`."""

from __future__ import annotations

import os
import signal

import pytest

from followups.embedded.stop_signals import STOPPING, StopSignals


def send(number: signal.Signals) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_handled_between_two_steps(number: signal.Signals) -> None:
    """The first signal interrupts `up` or `demo` at the next check, not at once."""
    with StopSignals() as signals:
        signals.check()
        send(number)
        with pytest.raises(KeyboardInterrupt):
            signals.check()


def test_a_second_signal_does_not_wait() -> None:
    """A second signal raises the exception immediately, without waiting for the next check."""
    with StopSignals():
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_shutdown_ignores_further_signals() -> None:
    """During shutdown, further signals have no effect."""
    with StopSignals() as signals:
        signals.quieten()
        send(signal.SIGINT)
        send(signal.SIGTERM)


def test_the_handlers_are_restored() -> None:
    """After the `with` block, the previous signal handlers are restored."""
    before = [signal.getsignal(number) for number in STOPPING]
    with StopSignals():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before
