"""The delivery of a follow-up, step by step.

========= ==========================================================================
claim     `dispatcher`, `claim`: lease due follow-ups
publish   `dispatcher`, `hints`: send the leases to the workers
enqueue   `due_queue`: keep each lease until its due time and until a slot is free
begin     `begin`: check again, and record that an attempt is in flight
send      `send`: call the transport
settle    `settle`: record the outcome
========= ==========================================================================

`pipeline` connects the steps from enqueue to settle. When begin or settle ends a follow-up, the next one of its chat is
leased and enters the due queue directly.
"""
