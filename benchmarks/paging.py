"""Measure the scheduler and its paging: step times, wasted and shared slots, preemptions, leaks. Prints JSON; no model.

Exits 1 if a promise that does not depend on the machine is broken: waste at page 16, or a leaked block.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import random
import statistics
import sys
import time
from pathlib import Path

from sharing import MEANS, measure_simulated

from quire.config import SchedulerConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.block_pool import BlockPool
from quire.scheduler.output import SampledTokens
from quire.scheduler.prefix_cache import PrefixCache
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

VOCAB_SIZE = 32_000
TOKEN_ID = 7
SIGMA = 0.8
"""Shape of the lognormal lengths; their mean is given."""
MAX_WASTE_AT_16 = 0.02


def make_request(rng: random.Random, request_id: str, num_prompt_tokens: int, num_output_tokens: int) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=rng.choices(range(VOCAB_SIZE), k=num_prompt_tokens),
        params=SamplingParams(max_tokens=num_output_tokens, ignore_eos=True),
        seed=0,
    )


def step(scheduler: Scheduler) -> tuple[int, float]:
    """One step with a free model: how many sequences it had, and the seconds in schedule() and update()."""
    started = time.perf_counter()
    batch = scheduler.schedule()
    scheduled = time.perf_counter()
    if batch is None:
        return 0, 0.0
    sampled = SampledTokens([TOKEN_ID] * len(batch.sampling))
    sampled_at = time.perf_counter()
    scheduler.update(batch, sampled)
    return len(batch.sequences), time.perf_counter() - sampled_at + scheduled - started


def measure_step_time(num_seqs: int, num_steps: int) -> dict[str, float]:
    """Decode steps of `num_seqs` sequences at random positions in their blocks, prefix caching on."""
    rng = random.Random(0)
    config = SchedulerConfig(
        num_blocks=1 + num_seqs * (2 + -(-(100 + num_steps) // 16)),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(8192, num_seqs * 100),
        max_model_len=100 + num_steps + 1,
    )
    scheduler = Scheduler(config)
    for index in range(num_seqs):
        scheduler.add(make_request(rng, str(index), rng.randint(20, 100), num_steps))
    step(scheduler)
    seconds = [step(scheduler)[1] for _ in range(num_steps - 2)]
    milliseconds = sorted(1000 * second for second in seconds)
    return {
        "median_ms": round(statistics.median(milliseconds), 4),
        "p10_ms": round(milliseconds[len(milliseconds) // 10], 4),
        "p99_ms": round(milliseconds[len(milliseconds) * 99 // 100], 4),
    }


def lognormal(rng: random.Random, mean: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)))


def measure_waste(block_size: int, mean_in: float, mean_out: float, num_steps: int) -> dict[str, float]:
    """Slots that are allocated and hold nothing, over live sequences and time, in a closed loop of 64 clients."""
    rng = random.Random(0)
    num_clients = 64
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=1 + num_clients * 8192 // block_size,
            block_size=block_size,
            max_num_seqs=num_clients,
            max_num_batched_tokens=2048,
            max_model_len=16_384,
            enable_prefix_caching=False,
        )
    )
    num_requests = num_slots = num_stored = 0
    for index in range(num_steps):
        while len(scheduler.live) < num_clients:
            lengths = lognormal(rng, mean_in), lognormal(rng, mean_out)
            scheduler.add(make_request(rng, str(num_requests), *lengths))
            num_requests += 1
        step(scheduler)
        if index > num_steps // 4 and index % 4 == 0:
            num_slots += scheduler.stats().num_used_blocks * block_size
            num_stored += sum(sequence.num_computed_tokens for sequence in scheduler.running)
    return {"waste": round(1 - num_stored / num_slots, 5), "requests": num_requests}


def measure_pressure(pool_fraction: float, num_requests: int = 600) -> dict[str, float]:
    """A backlog of chat requests on 128 rows, with a pool that holds only a fraction of what the rows would fill."""
    rng = random.Random(0)
    num_rows, limit = 128, 3000
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=1 + int(pool_fraction * num_rows * 30),
            max_num_seqs=num_rows,
            max_num_batched_tokens=2048,
            max_model_len=2 * limit,
        )
    )
    num_tokens = 0
    for index in range(num_requests):
        lengths = [min(limit, lognormal(rng, mean)) for mean in (161, 338)]
        num_tokens += sum(lengths) - 1
        scheduler.add(make_request(rng, str(index), *lengths))
    sequences = [sequence for choices in scheduler.live.values() for sequence in choices]
    num_running = 0
    while scheduler.has_work():
        num_running += step(scheduler)[0]
    stats = scheduler.stats()
    return {
        "preemptions_per_request": round(stats.num_preemptions / num_requests, 3),
        "most_preemptions_of_one": max(sequence.num_preemptions for sequence in sequences),
        "computed_twice": round(stats.num_scheduled_tokens / num_tokens - 1, 4),
        "steps": stats.num_steps,
        "mean_running": round(num_running / stats.num_steps, 1),
    }


def measure_hashing(num_blocks: int, block_size: int = 16) -> float:
    """Microseconds to extend a chain of keys by one block."""
    cache = PrefixCache(2, block_size, namespace="benchmark", window=None)
    token_ids = random.Random(0).choices(range(VOCAB_SIZE), k=num_blocks * block_size)
    best = math.inf
    for _ in range(5):
        keys = [cache.root_key("")]
        started = time.perf_counter()
        cache.extend_keys(keys, token_ids, num_blocks)
        best = min(best, time.perf_counter() - started)
    return round(best / num_blocks * 1e6, 3)


def measure_leaks(num_events: int, num_blocks: int = 1024) -> dict[str, float]:
    """Allocate, share and release at random, then release what is left: is every block back?"""
    rng = random.Random(0)
    pool = BlockPool(num_blocks, PrefixCache(num_blocks, 16, namespace="", window=None))
    held: list[int] = []
    started = time.perf_counter()
    for _ in range(num_events):
        draw = rng.random()
        if draw < 0.4 and pool.num_free_blocks:
            held += pool.allocate(1)
        elif draw < 0.5 and held:
            block_id = held[int(rng.random() * len(held))]
            pool.share(block_id)
            held.append(block_id)
        elif held:
            index = int(rng.random() * len(held))
            held[index], held[-1] = held[-1], held[index]
            pool.release((held.pop(),))
    seconds = time.perf_counter() - started
    pool.release(held)
    pool.check_count()
    num_free = len(set(pool.free_block_ids()))
    return {
        "events": num_events,
        "leaked_blocks": num_blocks - 1 - num_free + sum(pool.ref_counts),
        "ns_per_event": round(seconds / num_events * 1e9),
    }


def describe_machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = f"{len(models)} x {models[0]}" if models else cpu
    return {"cpu": cpu, "python": platform.python_version(), "system": platform.system()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 32, 128, 256, 512], help="running sequences")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[8, 16, 32], help="tokens in a block")
    parser.add_argument("--steps", type=int, default=1000, help="decode steps to time for each number of sequences")
    parser.add_argument("--waste-steps", type=int, default=4000, help="steps to average the waste over")
    parser.add_argument("--sharing-requests", type=int, default=400, help="requests to average the sharing over")
    parser.add_argument("--events", type=int, default=1_000_000, help="allocator events of the leak test")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    gc.collect()
    gc.freeze()
    result = {
        "machine": describe_machine(),
        "step": {str(n): measure_step_time(n, arguments.steps) for n in arguments.num_seqs},
        "waste": {
            f"{mean_in} in, {mean_out} out": {
                str(size): measure_waste(size, mean_in, mean_out, arguments.waste_steps)
                for size in arguments.block_sizes
            }
            for mean_in, mean_out in ((161, 338), (19, 58))
        },
        "sharing": {trace: measure_simulated(means, arguments.sharing_requests) for trace, means in MEANS.items()},
        "pressure": {str(fraction): measure_pressure(fraction) for fraction in (0.3, 0.6, 0.9)},
        "hash_us_per_block": measure_hashing(2000),
        "leaks": measure_leaks(arguments.events),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    waste = result["waste"]["161 in, 338 out"].get("16", {"waste": 0.0})["waste"]
    return int(waste > MAX_WASTE_AT_16 or result["leaks"]["leaked_blocks"] != 0)


if __name__ == "__main__":
    sys.exit(main())
