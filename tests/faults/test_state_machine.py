"""Tests that compare the store with the model, for event orders that Hypothesis generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import HealthCheck, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from faults.machine import DrivenStore
from followups.errors import AlreadyFinishedError, DeliveryInProgressError

if TYPE_CHECKING:
    from followups.settings import Settings
    from world import World

KINDS = ("claim", "expire", "read", "die", "begin", "send", "settle", "cancel", "reply", "create")


def machine(world: World, settings: Settings) -> type[RuleBasedStateMachine]:
    """Return the state machine for a database."""

    class Machine(RuleBasedStateMachine):
        """A state machine with one rule for each kind of step in the model, and one for a client's changes."""

        driven: DrivenStore | None = None

        @initialize(deduplicates=strategies.booleans(), creates_late=strategies.booleans())
        def start(self, *, deduplicates: bool, creates_late: bool) -> None:
            """Delete all follow-ups, and create a new chat."""
            world.sql("DELETE FROM failed_attempts")
            world.sql("DELETE FROM follow_ups")
            self.driven = DrivenStore(world, settings, deduplicates=deduplicates, creates_late=creates_late)

        @invariant()
        def agree(self) -> None:
            """Check that the database agrees with the model."""
            if self.driven:
                self.driven.compare()

        @precondition(lambda self: self.driven)
        @rule(data=strategies.data(), number=strategies.integers(0, 1))
        def change(self, data: Any, number: int) -> None:
            """Change the message or due date unless the follow-up is in flight or has ended."""
            driven = self.driven
            assert driven
            if number >= len(driven.ids):
                return
            row = driven.model.rows[number]
            if not row.pending or row.begun:
                with pytest.raises(DeliveryInProgressError if row.pending else AlreadyFinishedError):
                    driven.amend(number, {"message": "Never mind."})
            elif data.draw(strategies.booleans()) and not driven.model.replied:
                driven.reschedule(number)
            else:
                driven.amend(number, {"message": data.draw(strategies.sampled_from(["Hello?", "Still there?"]))})

    for kind in KINDS:
        setattr(Machine, f"take_{kind}", _rule_of(kind))
    return Machine


def _rule_of(kind: str) -> Any:
    @precondition(lambda self: self.driven and kind in self.driven.kinds())
    @rule(data=strategies.data())
    def step(self: Any, data: Any) -> None:
        self.driven.take(data.draw(strategies.sampled_from(self.driven.choices(kind))))

    step.__name__ = f"take_{kind}"
    return step


def drive(world: World, settings: Settings, seed: int, examples: int) -> None:
    """Run examples of up to forty steps, generated from the seed."""
    how = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=40,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(hypothesis.seed(seed)(machine(world, settings)), settings=how)


def test_store_against_model(world: World, settings: Settings, seed: int) -> None:
    """In any order of events, the store behaves as the model predicts."""
    drive(world, settings, seed, examples=25)


@pytest.mark.faults_long
def test_store_against_model_for_long(world: World, settings: Settings, seed: int) -> None:
    """In a thousand generated orders of events, the store behaves as the model predicts."""
    drive(world, settings, seed, examples=1000)
