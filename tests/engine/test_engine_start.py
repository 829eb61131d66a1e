"""What a start says: the memory budget line by line, and one line with the flag and the value when it does not fit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.config import ConfigError, EngineConfig
from quire.engine.device import choose_device, require_kernels
from quire.engine.engine import Engine
from quire.engine.process import load_engine
from quire.kernels.cpu_compiler import ELSEWHERE
from quire.kernels.cpu_workers import Worker
from quire.models.config import ModelConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.request import Request
from quire.tales import MODEL_DIR

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4 + 16 * (4 + 20 * 8)
"""K and V, layers, heads, tokens, head dim, float32; and a log-probability and 20 ids with theirs for each token."""


@pytest.fixture
def start(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        settings = {"model": str(tiny_checkpoint("llama")), "device": "cpu", "max_num_seqs": 4, **options}
        return Engine(EngineConfig(**settings))

    return make


def test_budget_is_printed_line_by_line(start: Callable[..., Engine]) -> None:
    info = start(kv_cache_memory_bytes=50 * BLOCK_BYTES).info
    assert info.num_blocks == 50
    assert info.dtype == "float32"
    assert [line.split()[0] for line in info.memory_budget] == [
        "weights",
        "activations",
        "KV-cache",
        "log-probs",
        "context",
    ]
    assert "49 blocks of 16 = 784 tokens" in info.memory_budget[2]


def test_pool_is_no_larger_than_all_sequences_need(start: Callable[..., Engine]) -> None:
    assert start().info.num_blocks == 4 * (512 // 16) + 1


def test_a_small_pool_shortens_the_context_that_nobody_asked_for(start: Callable[..., Engine]) -> None:
    assert start(num_blocks=6).info.max_model_len == 80


def test_progress_is_reported_in_bytes_and_ends(tiny_checkpoint: Callable[..., Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    config = EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu", num_blocks=8)
    Engine(config, lambda *progress: seen.append(progress))
    weights = [(done, total) for stage, done, total in seen if stage == "weights"]
    assert weights[-1][0] == weights[-1][1] > 10_000
    assert weights == sorted(weights)
    assert seen[-1] == ("kernels", 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 513}, "--max-model-len 513 is longer than the 512 positions of this model; use at most 512"),
        (
            {"max_model_len": 100, "num_blocks": 4},
            f"holds 48 tokens. Use --max-model-len 48 or --kv-cache-memory-bytes {8 * BLOCK_BYTES}",
        ),
        ({"kv_cache_memory_bytes": 10}, f"--kv-cache-memory-bytes 10 holds no block; use at least {2 * BLOCK_BYTES}"),
        ({"kv_cache_memory_bytes": 2**50}, "--kv-cache-memory-bytes 1125899906842624 does not fit"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, "Without chunked prefill"),
        ({"target_itl_ms": 0.0}, "--target-itl-ms must be above 0 and at most 60000, not 0.0."),
        ({"target_itl_ms": float("nan")}, "--target-itl-ms must be above 0 and at most 60000, not nan."),
        ({"target_itl_ms": 50.0, "enable_chunked_prefill": False}, "leave out --no-enable-chunked-prefill"),
    ],
    ids=str,
)
def test_what_does_not_fit_names_the_flag_and_a_value(
    start: Callable[..., Engine], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        start(**options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["block_size", "max_num_seqs", "num_blocks", "gpu_memory_utilization"])
def test_flags_out_of_bounds_are_named(field: str) -> None:
    with pytest.raises(ConfigError, match="--"):
        EngineConfig(model="x", **{field: 0})


def test_nothing_is_left_to_compile_for_the_first_request(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(num_blocks=64)
    monkeypatch.setattr(Worker, "compile", lambda *_: pytest.fail("A kernel was compiled while serving."))
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    engine.add(Request(request_id="r", prompt_token_ids=list(range(40)), params=params, seed=0))
    tokens = [token_id for _ in range(3) for output in engine.step() for token_id in output.token_ids]
    assert len(tokens) == 3


def test_collection_of_garbage_rests_during_the_start_and_leaves_out_what_it_made(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    enabled: list[bool] = []
    config = EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu", num_blocks=8)
    try:
        load_engine(config, lambda *_: enabled.append(gc.isenabled()))
        assert not any(enabled)
        assert gc.isenabled()
        assert gc.get_freeze_count() > 10_000
        with pytest.raises(ConfigError):
            load_engine(EngineConfig(model="/nowhere", device="cpu"), lambda *_: None)
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_served_engine_leaves_compiling_to_another_process(tiny_checkpoint: Callable[..., Path]) -> None:
    elsewhere: list[bool] = []
    config = EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu", num_blocks=8)
    try:
        load_engine(config, lambda *_: elsewhere.append(ELSEWHERE.compiler is not None))
    finally:
        gc.unfreeze()
    assert elsewhere
    assert all(elsewhere)
    assert ELSEWHERE.compiler is None


def test_old_gpus_and_heads_without_a_kernel_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match=r"capability 7\.5; the kernels need 8\.0 or newer\. Use --device cpu"):
        choose_device(EngineConfig(model="anything"))
    config = ModelConfig.from_hf(MODEL_DIR)
    require_kernels(replace(config, head_dim=256), torch.device("cuda"))
    require_kernels(replace(config, head_dim=512), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"512 dimensions; the kernels for GPUs take up to 256\. Use --device cpu"):
        require_kernels(replace(config, head_dim=512), torch.device("cuda"))


def test_memory_that_runs_out_at_the_start_names_a_flag_and_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("quire.engine.engine.warm_up", no_memory)
    with pytest.raises(ConfigError, match=r"Use --gpu-memory-utilization 0\.82"):
        load_engine(EngineConfig(model=str(MODEL_DIR)), lambda *_: None)
