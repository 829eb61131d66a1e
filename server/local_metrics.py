"""Metrics of what happens for every token: plain numbers of one thread, where prometheus-client takes locks."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class LocalCounter(Collector):
    """As prometheus_client.Counter, for the thread that is also scraped."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._created = time.time()
        self.value = 0

    def inc(self, count: int) -> None:
        self.value += count

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), self.value, created=self._created)
        yield family


class LocalHistogram(Collector):
    """As prometheus_client.Histogram, for the thread that is also scraped.

    Args:
        bounds: upper ends of the buckets, inclusive and ascending, without infinity.
    """

    def __init__(self, name: str, text: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._created = time.time()
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        family.add_sample(f"{self._name}_created", dict(self._labels), self._created)
        yield family
