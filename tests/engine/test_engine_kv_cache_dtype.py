"""int8 pages in the engine: a request's tokens depend on nothing but the request, and half the memory holds them."""

from __future__ import annotations

import random

import pytest

from quire import LLM, SamplingParams
from quire.config import ConfigError
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


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-cache-dtype must be auto or int8"):
        make(kv_cache_dtype="fp4")
