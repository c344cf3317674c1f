"""The histogram has the same samples as that of prometheus_client, except for the time of its creation."""

from __future__ import annotations

from itertools import count

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st

from followups.telemetry import metrics

BUCKETS = (0.001, 0.5, 1, 60, 86400)
UNIQUE = count()

VALUES = st.lists(st.sampled_from(BUCKETS) | st.floats(0, 1e6))


@given(batches=st.lists(VALUES))
def test_the_histogram_matches_that_of_prometheus_client(batches: list[list[float]]) -> None:
    """Recording values in batches gives the same samples as recording them one by one with prometheus_client."""
    name = f"tested_{next(UNIQUE)}_seconds"
    ours = metrics.Histogram(name, "Duration of a test.", BUCKETS)
    theirs = prometheus_client.Histogram(name, "Duration of a test.", buckets=BUCKETS, registry=None)
    try:
        for batch in batches:
            ours.observe(*batch)
            for value in batch:
                theirs.observe(value)
        (mine,), (expected,) = ours.collect(), theirs.collect()
    finally:
        metrics.COUNTED.unregister(ours)
    expected.samples = [sample for sample in expected.samples if not sample.name.endswith("_created")]
    assert mine == expected
