"""Health asks for progress, metrics carry the names that dashboards know."""

from __future__ import annotations

from typing import Any

import pytest


def test_ready(serve: Any) -> None:
    server = serve()
    for path in ("/health", "/ping", "/health/live", "/health/ready"):
        assert server.http.get(path).status_code == 200
        assert server.http.head(path).status_code == 200
    assert server.http.get("/health").content == b""
    assert server.http.post("/ping").status_code == 200
    assert server.http.get("/health/ready").json() == {
        "status": "ready",
        "reason": None,
        "progress_age_s": 0.0,
        "running": 0,
        "waiting": 0,
        "free_blocks": 48,
    }


@pytest.mark.parametrize(
    ("change", "reason"), [({"alive": False}, "engine_unavailable"), ({"age": 5.1}, "no_progress")]
)
def test_dead_or_stuck_engine(serve: Any, change: dict[str, Any], reason: str) -> None:
    server = serve()
    for name, value in change.items():
        setattr(server.client, name, value)
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/ping").status_code == 503
    ready = server.http.get("/health/ready")
    assert (ready.status_code, ready.json()["status"], ready.json()["reason"]) == (503, "unready", reason)
    assert server.http.get("/health/live").status_code == 200


def test_progress_within_the_limit_is_ready(serve: Any) -> None:
    server = serve()
    server.client.age = 4.9
    assert server.http.get("/health/ready").status_code == 200


def test_version_and_load(serve: Any, fake_client: Any, eventually: Any) -> None:
    import threading

    from quire import __version__

    server = serve(fake_client(hold=True))
    assert server.http.get("/version").json() == {"version": __version__}
    assert server.http.get("/load").json() == {"server_load": 0}
    waiting = threading.Thread(target=server.complete)
    waiting.start()
    eventually(lambda: server.client.num_open == 1)
    assert server.http.get("/load").json() == {"server_load": 1}
    server.client.hold = False
    waiting.join()


GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"]
COUNTERS = [
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prompt_tokens_cached_total",
    "request_success_total",
    "admission_rejections_total",
]
HISTOGRAMS = [
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "iteration_tokens_total",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
]


def samples(server: Any) -> dict[str, float]:
    text = server.http.get("/metrics").text
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")
    }


def test_metrics_have_their_names_and_count(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(num_cached_tokens=2))
    server.complete(n=2, max_tokens=5)
    server.complete(stream=True, max_tokens=3)
    found = samples(server)
    labels = 'model_name="fake",engine="0"'
    assert all(key.startswith("vllm:") and 'model_name="fake"' in key and 'engine="0"' in key for key in found)
    for name in (*GAUGES, *COUNTERS):
        assert any(key.startswith(f"vllm:{name}{{") for key in found), name
    for name in HISTOGRAMS:
        assert any(key.startswith(f"vllm:{name}_bucket{{") for key in found), name
    keys = {key.replace('engine="0",model_name="fake"', labels): value for key, value in found.items()}
    assert keys[f"vllm:prompt_tokens_total{{{labels}}}"] == 12
    assert keys[f"vllm:generation_tokens_total{{{labels}}}"] == 13
    assert keys[f"vllm:prompt_tokens_cached_total{{{labels}}}"] == 4
    assert keys[f"vllm:time_to_first_token_seconds_count{{{labels}}}"] == 3
    assert keys[f"vllm:inter_token_latency_seconds_count{{{labels}}}"] == 10
    assert keys[f"vllm:kv_cache_usage_perc{{{labels}}}"] == pytest.approx(15 / 63)
    success = {key: value for key, value in keys.items() if key.startswith("vllm:request_success_total")}
    assert list(success.values()) == [3]
    assert 'finished_reason="length"' in next(iter(success))


@pytest.mark.parametrize(
    ("name", "buckets"),
    [
        ("time_to_first_token_seconds", [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5]),
        ("inter_token_latency_seconds", [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]),
        ("e2e_request_latency_seconds", [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120]),
    ],
)
def test_buckets(shared: Any, name: str, buckets: list[float]) -> None:
    import re

    found = [
        float(match)
        for match in re.findall(rf'vllm:{name}_bucket{{[^}}]*le="([0-9.]+)"', shared.http.get("/metrics").text)
    ]
    assert found[: len(buckets)] == buckets


def test_apps_share_no_registry(serve: Any) -> None:
    one, two = serve(), serve()
    one.complete()
    assert any("generation_tokens_total" in key and value == 4 for key, value in samples(one).items())
    assert any("generation_tokens_total" in key and value == 0 for key, value in samples(two).items())
