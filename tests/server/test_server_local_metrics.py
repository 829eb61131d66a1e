"""Metrics that are counted without locks are exposed as prometheus-client's own would be."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from quire.server.local_metrics import LocalCounter, LocalHistogram

LABELS = {"model_name": "m", "engine": "0"}
BOUNDS = (0.01, 0.5, 1.0, 80.0)
VALUES = (0.0, 0.01, 0.010001, 0.5, 3.0, 80.0, 81.0)


def exposed(registry: CollectorRegistry) -> list[str]:
    """All lines but the moments of creation."""
    lines = generate_latest(registry).decode().split("\n")
    return [line.rsplit(" ", 1)[0] if "_created{" in line else line for line in lines]


def test_exposition_equals_that_of_the_library() -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("vllm:gap_seconds", "Gap", list(LABELS), buckets=BOUNDS, registry=theirs).labels(**LABELS)
    counter = Counter("vllm:tokens", "Tokens", list(LABELS), registry=theirs).labels(**LABELS)
    local_histogram = LocalHistogram("vllm:gap_seconds", "Gap", LABELS, BOUNDS)
    local_counter = LocalCounter("vllm:tokens", "Tokens", LABELS)
    ours.register(local_histogram)
    ours.register(local_counter)
    assert exposed(ours) == exposed(theirs)
    for value in VALUES:
        histogram.observe(value)
        local_histogram.observe(value)
        counter.inc(3)
        local_counter.inc(3)
    assert exposed(ours) == exposed(theirs)
