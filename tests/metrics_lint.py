"""Checks a metrics page by Prometheus's rules, like a small `promtool check metrics`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

NAME = re.compile(r"[a-z][a-z0-9_]*")
OTHER_UNITS = re.compile(
    r"_(milliseconds|microseconds|nanoseconds|ms|minutes|hours|days|kilobytes|megabytes|percent)(_|$)"
)


def flaws(text: str) -> list[str]:
    """Return a message for each flaw in a metrics page.

    Raises ValueError if the page cannot be parsed.
    """
    families = [family for family in text_string_to_metric_families(text) if family.samples]
    found = [flaw for family in families for flaw in _flaws_of(family)]
    names = [family.name for family in families]
    found += [f"{name} is there twice" for name in sorted({each for each in names if names.count(each) > 1})]
    lines = text.splitlines()
    found += [f"{line!r} is there twice" for line in sorted({each for each in lines if lines.count(each) > 1})]
    return found if text.endswith("\n") else [*found, "the last line has no end"]


def _flaws_of(family: Metric) -> Iterator[str]:
    name = family.name
    if not family.documentation.strip():
        yield f"{name} has no HELP"
    if family.type in {"unknown", "untyped"}:
        yield f"{name} has no TYPE"
    if not NAME.fullmatch(name):
        yield f"{name} is not in snake_case"
    if OTHER_UNITS.search(name):
        yield f"{name} is not in a base unit"
    if family.type == "counter" and not all(sample.name.endswith(("_total", "_created")) for sample in family.samples):
        yield f"{name} is a counter and does not end in _total"
    if family.type == "gauge" and name.endswith(("_total", "_count", "_sum", "_bucket")):
        yield f"{name} is a gauge and is named like a counter"
    for label in {label for sample in family.samples for label in sample.labels}:
        if not NAME.fullmatch(label):
            yield f"{name} has a label {label}"
    if family.type == "histogram":
        yield from _flaws_of_histogram(family)


def _flaws_of_histogram(family: Metric) -> Iterator[str]:
    series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            others = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
            series.setdefault(others, []).append((float(sample.labels["le"]), sample.value))
    for buckets in series.values():
        bounds, counts = [bound for bound, _ in buckets], [count for _, count in buckets]
        if bounds != sorted(set(bounds)) or bounds[-1:] != [float("inf")]:
            yield f"{family.name} has buckets that do not ascend to +Inf"
        if counts != sorted(counts):
            yield f"{family.name} has buckets that do not add up"
    suffixes = {sample.name.removeprefix(family.name) for sample in family.samples}
    if not {"_sum", "_count"} <= suffixes:
        yield f"{family.name} lacks its sum or its count"
