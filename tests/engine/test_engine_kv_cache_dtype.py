"""int8 pages in the engine: a request's tokens depend on nothing but the request, and half the memory holds them."""

from __future__ import annotations

import random

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import ConfigError, EngineConfig
from quire.engine.device import choose_kv_cache_dtype
from quire.engine.kv_storage import KVStorage
from quire.kernels.targets import A100, B200, H100, MI300
from quire.models.config import ModelConfig
from quire.tales import MODEL_DIR


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(5, 900) for _ in range(40)]
    return [
        shared[: rng.randrange(41)] + [rng.randrange(5, 900) for _ in range(rng.randrange(1, 60))] for _ in range(12)
    ]


def run(llm: LLM, each: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    return [result.outputs[0].token_ids for result in llm.generate(each, params)]


def make(**options: object) -> LLM:
    options = {"kv_cache_dtype": "int8", "num_blocks": 300, "dtype": "float32", **options}
    return LLM(MODEL_DIR, max_model_len=256, **options)


def test_tokens_are_the_same_in_every_batch_chunk_hit_and_after_preemption() -> None:
    each = prompts()
    alone = make(enable_prefix_caching=False)
    expected = [run(alone, [prompt])[0] for prompt in each]
    assert run(make(), each) == expected
    warm = make(max_num_batched_tokens=7)
    assert run(warm, each) == expected
    assert run(warm, each) == expected
    assert warm.stats().prefix_cache_hits > 0
    tight = make(num_blocks=17)
    assert run(tight, each) == expected
    assert tight.stats().num_preemptions > 0
    assert run(make(block_size=32), each) == expected


def test_choices_that_share_a_partial_block_copy_its_scales() -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    (prompt,) = prompts()[:1]
    results = [make(num_blocks=size).generate([prompt], params)[0] for size in (40, 300)]
    alone = [choice.token_ids for choice in results[0].outputs]
    assert alone == [choice.token_ids for choice in results[1].outputs]
    assert len({tuple(token_ids) for token_ids in alone}) == 3


def test_memory_and_perplexity() -> None:
    """Less than a third of float32's memory, and a text about as probable."""
    text = "Once upon a time there lived a king who had three daughters, and the youngest was the most beautiful. " * 2
    codes, floats = make(), LLM(MODEL_DIR, max_model_len=256, num_blocks=300, dtype="float32")
    assert codes.info.kv_cache_dtype == "int8"
    assert floats.info.kv_cache_dtype == "float32"
    exact, rounded = (llm.score([text[:20]], [text[20:]])[0] for llm in (floats, codes))
    assert rounded.log_prob == pytest.approx(exact.log_prob, rel=0.01)
    assert rounded.log_prob != exact.log_prob


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_without_bfloat16_pages_are_as_the_checkpoint(monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool) -> None:
    """Where float32 only stands in for what the processor lacks; a request still gets the same tokens everywhere."""
    monkeypatch.setattr("quire.engine.device.cpu_has_bfloat16", lambda: has_bfloat16)
    each, auto = prompts(), {"dtype": "auto", "kv_cache_dtype": "auto"}
    alone = make(**auto, enable_prefix_caching=False)
    assert (alone.info.dtype, alone.info.kv_cache_dtype) == ("bfloat16" if has_bfloat16 else "float32", "bfloat16")
    asked = make(dtype="float32", kv_cache_dtype="auto", num_blocks=20)
    assert asked.info.kv_cache_dtype == "float32"
    if has_bfloat16:
        return  # as everywhere else in these tests
    expected = [run(alone, [prompt])[0] for prompt in each]
    for options in ({}, {"max_num_batched_tokens": 7}, {"num_blocks": 17}):
        llm = make(**auto, **options)
        assert run(llm, each) == expected
        assert run(llm, each) == expected


def test_fp8_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"fp8 needs an NVIDIA GPU of .* 8.9 or newer.* use --kv-cache-dtype int8"):
        make(kv_cache_dtype="fp8")
    config, gpu = EngineConfig(model="-", kv_cache_dtype="fp8"), torch.device("cuda")
    for target, dtype in ((H100, torch.float8_e4m3fn), (B200, torch.float8_e4m3fn), (MI300, torch.float8_e4m3fnuz)):
        monkeypatch.setattr("quire.engine.device.current_target", lambda _, target=target: target)
        assert choose_kv_cache_dtype(config, "bfloat16", torch.bfloat16, gpu) == dtype
    monkeypatch.setattr("quire.engine.device.current_target", lambda _: A100)
    with pytest.raises(ConfigError, match="use --kv-cache-dtype int8"):
        choose_kv_cache_dtype(config, "bfloat16", torch.bfloat16, gpu)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_copies_of_blocks_take_codes_and_scales_along(dtype: torch.dtype) -> None:
    config = ModelConfig.from_hf(MODEL_DIR)
    storage = KVStorage(config, 5, 16, dtype, torch.device("cpu"), max_logprobs=1)
    parts = [part for layer in storage.layers for part in layer if part is not None]
    for part in parts:
        part.view(torch.int8).random_(1, 100)
    storage.copy_blocks([(1, 3), (2, 4)])
    assert len(parts) == 4 * config.num_layers
    for codes in (part.view(torch.int8) for part in parts):
        assert torch.equal(codes[3:], codes[1:3])
        assert not torch.equal(codes[1], codes[2])


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-cache-dtype must be auto, int8 or fp8"):
        make(kv_cache_dtype="fp4")
