"""Prometheus metrics under the names that dashboards and gateways know (`vllm:`); a registry per app."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from quire.server.admission import Admission
from quire.server.context import context_of
from quire.server.local_metrics import LocalCounter, LocalHistogram

if TYPE_CHECKING:
    from quire.engine.client import EngineClient

router = APIRouter()

_LABELS: Final = ("model_name", "engine")
_ENGINE: Final = "0"
_FIRST_TOKEN: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_CHOICES: Final = (1, 2, 5, 10, 20)


class Metrics:
    """Counters and histograms fed by the routes; gauges read from the engine's latest figures when scraped."""

    def __init__(self, client: EngineClient, admission: Admission, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(client, admission, model_name))
        self._model_name = model_name
        tokens = _one_two_five(client.info.max_model_len)
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "First token", _FIRST_TOKEN)
        labels = dict(zip(_LABELS, (model_name, _ENGINE), strict=True))
        self.inter_token_latency = LocalHistogram(
            "vllm:inter_token_latency_seconds", "Between tokens", labels, _BETWEEN_TOKENS
        )
        self.generation_tokens = LocalCounter("vllm:generation_tokens", "Tokens generated", labels)
        self.registry.register(self.inter_token_latency)
        self.registry.register(self.generation_tokens)
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens of a request", _BETWEEN_TOKENS
        )
        self.latency = self._histogram("e2e_request_latency_seconds", "Whole request", _LATENCY)
        self.queue_time = self._histogram("request_queue_time_seconds", "Arrival to first step", _LATENCY)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "First step to first token", _LATENCY)
        self.inference_time = self._histogram("request_inference_time_seconds", "First step to last token", _LATENCY)
        self.decode_time = self._histogram("request_decode_time_seconds", "First to last token", _LATENCY)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request", tokens)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of a choice", tokens)
        self.iteration_tokens = LocalHistogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step", labels, tokens
        )
        self.registry.register(self.iteration_tokens)
        client.on_step = self.iteration_tokens.observe
        self.params_n = self._histogram("request_params_n", "Choices asked for", _CHOICES)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens asked for", tokens)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache")
        self._success = Counter(
            "vllm:request_success", "Finished choices", (*_LABELS, "finished_reason"), registry=self.registry
        )

    def finished(self, reason: str) -> None:
        self._success.labels(self._model_name, _ENGINE, reason).inc()

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, _LABELS, buckets=tuple(buckets), registry=self.registry)
        return histogram.labels(self._model_name, _ENGINE)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(self._model_name, _ENGINE)


class _EngineCollector(Collector):
    def __init__(self, client: EngineClient, admission: Admission, model_name: str) -> None:
        self._client = client
        self._admission = admission
        self._values = (model_name, _ENGINE)

    def collect(self) -> Iterator[Metric]:
        stats, info = self._client.stats(), self._client.info
        num_blocks = stats.num_used_blocks + stats.num_free_blocks
        gauges = (
            ("num_requests_running", "Sequences in the running batch", stats.num_running),
            ("num_requests_waiting", "Sequences waiting to run", stats.num_waiting),
            ("kv_cache_usage_perc", "Used share of the KV-cache, 0 to 1", stats.num_used_blocks / max(1, num_blocks)),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric(self._values, value)
            yield gauge
        counters = (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_cache_hits),
            ("num_preemptions", "Preempted sequences", stats.num_preemptions),
            ("spec_decode_num_drafts", "Runs of guessed tokens that were verified", stats.num_draft_steps),
            ("spec_decode_num_draft_tokens", "Guessed tokens", stats.num_drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that were right", stats.num_accepted_tokens),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            counter.add_metric(self._values, value)
            yield counter
        rejections = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused because the queue was full", labels=(*_LABELS, "reason")
        )
        for reason, count in self._admission.rejections.items():
            rejections.add_metric((*self._values, reason), count)
        yield rejections
        config = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "enable_prefix_caching": str(info.enable_prefix_caching),
            "cache_dtype": info.dtype,
        }
        cache_config = GaugeMetricFamily(
            "vllm:cache_config_info", "Configuration of the KV-cache", labels=(*_LABELS, *config)
        )
        cache_config.add_metric((*self._values, *config.values()), 1)
        yield cache_config


def _one_two_five(highest: int) -> list[float]:
    """1, 2, 5, 10, ... up to `highest`."""
    buckets: list[float] = []
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power > highest:
                return buckets or [1.0]
            buckets.append(float(factor * power))
        power *= 10


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    data = generate_latest(context_of(request).metrics.registry)
    return Response(data, headers={"content-type": CONTENT_TYPE_LATEST})
