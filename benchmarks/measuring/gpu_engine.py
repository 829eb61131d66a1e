"""Whole engines on a GPU: a batch of requests at once, and one alone, on models of random weights."""

from __future__ import annotations

import gc
import importlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from measuring import engines, loads
from quire import LLM, SamplingParams


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens with as many tokens to make, all there at the beginning."""

    prompts: list[list[int]]
    num_output_tokens: list[int]


def many(num_requests: int, shortest: int, longest: int, vocab_size: int) -> Workload:
    """Lengths of nano-vllm's own benchmark: prompts and outputs of 100 to 1,024 tokens each, 256 requests, seed 0."""
    generator = random.Random(0)
    prompts = [
        [generator.randint(300, vocab_size - 1) for _ in range(generator.randint(shortest, longest))]
        for _ in range(num_requests)
    ]
    return Workload(prompts, [generator.randint(shortest, longest) for _ in range(num_requests)])


def run_quire(model: Path, work: Workload, rounds: int, **options: Any) -> dict[str, float]:
    """Output tokens a second (median of the rounds) and milliseconds a step of a single stream."""
    llm = LLM(str(model), enable_prefix_caching=False, **options)
    params = [SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True) for n in work.num_output_tokens]
    short = SamplingParams(temperature=0.6, max_tokens=8, ignore_eos=True)
    llm.generate([prompt[:32] for prompt in work.prompts], [short] * len(work.prompts))
    rates = []
    for _ in range(rounds):
        begin = time.perf_counter()
        outputs = llm.generate(work.prompts, params)
        rates.append(_num_made(outputs) / (time.perf_counter() - begin))
    figures = {"output_tokens_per_s": statistics.median(rates), "ms_per_step_alone": _alone(llm, work)}
    if torch.cuda.is_available():
        figures["gpu_busy_share"] = _busy_share(partial(llm.generate, work.prompts, params))
    del llm
    _release()
    return figures


def _num_made(outputs: Any) -> int:
    return sum(len(choice.token_ids) for output in outputs for choice in output.outputs)


def _alone(llm: LLM, work: Workload, num_tokens: int = 512) -> float:
    """From the difference of a long and a short answer: what the prompt costs falls out."""
    prompt, seconds = work.prompts[0][:128], {}
    for count in (num_tokens // 8, num_tokens):
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate([prompt], [params])
        seconds[count] = time.perf_counter() - begin
    return 1e3 * (seconds[num_tokens] - seconds[num_tokens // 8]) / (num_tokens - num_tokens // 8)


def _busy_share(run: Callable[[], object]) -> float:
    """Share of the wall time in which a kernel or copy runs, as the profiler's timeline has it."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy / (reached - spans[0][0])


def run_http(model: Path, num_requests: int, prompt_len: int, output_len: int, rate: float) -> dict[str, float]:
    """All requests at once, then as many again at `rate` a second, over loopback, streamed."""
    work = loads.Workload(num_requests, None, prompt_len, output_len)
    word_ids = range(300, json.loads((model / "config.json").read_text())["vocab_size"])
    bursts = [loads.draw_requests(word_ids, work, seed, rate) for seed in ("burst", "rate")]
    bursts[0] = [replace(request, arrival=0.0) for request in bursts[0]]
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--max-num-queued-tokens {2 * num_requests * prompt_len}"
        server = engines.quire(model, torch.get_num_threads(), Path(folder), flags)
        server.begin(list(word_ids))
        try:
            at_once, at_rate = (server.send(requests, None).figures for requests in bursts)
        finally:
            server.end()
    return {
        "requests_per_s": at_once.requests_per_s,
        "failed": float(at_once.failed + at_rate.failed),
        "ttft_p50_ms": at_rate.ttft_p50_ms or 0.0,
        "tpot_p50_ms": at_rate.tpot_p50_ms or 0.0,
    }


def run_transformers(model: Path, work: Workload) -> dict[str, float]:
    """Continuous batching of transformers, its asynchronous form with CUDA graphs."""
    package: Any = importlib.import_module("transformers")
    loaded = package.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="paged|sdpa"
    ).cuda()
    config = package.ContinuousBatchingConfig(use_cuda_graph=True, use_async_batching=True, block_size=256)
    generation = package.GenerationConfig(
        max_new_tokens=max(work.num_output_tokens), do_sample=True, temperature=0.6, eos_token_id=-1
    )
    begin = time.perf_counter()
    found = loaded.generate_batch(work.prompts, generation_config=generation, continuous_batching_config=config)
    seconds = time.perf_counter() - begin
    made = sum(len(output.generated_tokens) for output in found.values())
    del loaded
    _release()
    return {"output_tokens_per_s": made / seconds}


def run_nano_vllm(model: Path, work: Workload) -> dict[str, float]:
    package: Any = importlib.import_module("nanovllm")
    llm = package.LLM(str(model), enforce_eager=False, max_model_len=4096)
    params = [
        package.SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count) for count in work.num_output_tokens
    ]
    llm.generate(["Benchmark: "], package.SamplingParams())
    begin = time.perf_counter()
    llm.generate(work.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    del llm
    _release()
    return {"output_tokens_per_s": sum(work.num_output_tokens) / seconds}


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
