"""The lint check finds each type of mistake in a metrics page."""

from __future__ import annotations

import pytest

from metrics_lint import flaws

HEAD = "# HELP {0} Says something.\n# TYPE {0} {1}\n"


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("# TYPE x gauge\nx 1\n", "no HELP"),
        ("# HELP x Says something.\nx 1\n", "no TYPE"),
        (HEAD.format("xMax", "gauge") + "xMax 1\n", "snake_case"),
        (HEAD.format("x_milliseconds", "gauge") + "x_milliseconds 1\n", "base unit"),
        (HEAD.format("x_count", "gauge") + "x_count 1\n", "named like a counter"),
        (HEAD.format("x", "gauge") + 'x{anId="1"} 1\n', "a label"),
        (HEAD.format("x", "gauge") + "x 1\nx 1\n", "twice"),
        (HEAD.format("x", "gauge") + "x 1", "no end"),
        (HEAD.format("x", "histogram") + 'x_bucket{le="1"} 1\nx_sum 1\nx_count 1\n', r"ascend to \+Inf"),
        (HEAD.format("x", "histogram") + 'x_bucket{le="1"} 2\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n', "add up"),
        (HEAD.format("x", "histogram") + 'x_bucket{le="+Inf"} 1\n', "its sum"),
    ],
)
def test_a_flaw_is_found(text: str, flaw: str) -> None:
    """The lint check names every rule that a metrics page violates."""
    with pytest.raises(AssertionError, match=flaw):
        assert flaws(text) == []


def test_a_valid_page_has_no_flaws() -> None:
    """A metrics page with a valid gauge, counter and histogram has no flaws."""
    page = HEAD.format("a", "gauge") + "a 1\n" + HEAD.format("b_total", "counter") + 'b_total{code="x"} 1\n'
    page += HEAD.format("c_seconds", "histogram")
    page += 'c_seconds_bucket{le="1"} 1\nc_seconds_bucket{le="+Inf"} 2\nc_seconds_sum 3\nc_seconds_count 2\n'
    assert flaws(page) == []
