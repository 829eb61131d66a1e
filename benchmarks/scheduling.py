"""What requests would see under another budget or order: the real scheduler, driven by a model of the time of a step.

    python benchmarks/scheduling.py                    # all reports
    python benchmarks/scheduling.py budget long        # some: budget, twins, long, mixed, target, capacity, ...
    python benchmarks/scheduling.py --ms-per-prompt-token 0.2 ...

No model runs and no clock is read: the same arguments give the same figures. A step takes

    fixed + max(weight pass, prompt tokens * ms each) + decodes * ms each + tokens read from the KV-cache * ms each

so prompt tokens cost nothing until they take longer than reading the weights does. The defaults are near those of a
model of 160 million parameters on two CPU cores.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

from quire.config import SchedulerConfig
from quire.engine.step_time import StepPacer
from quire.sampling_params import SamplingParams
from quire.scheduler.batch_builder import BatchBuilder
from quire.scheduler.output import SampledTokens, ScheduledBatch
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.waiting_order import MAX_OVERTAKES

BLOCK_SIZE = 16


@dataclass(frozen=True)
class StepCost:
    """Milliseconds."""

    ms_fixed: float = 0.3
    """Of a step, whatever it computes."""
    ms_weight_pass: float = 4.0
    """To read all weights once."""
    ms_per_prompt_token: float = 0.35
    ms_per_decode: float = 0.3
    us_per_kv_token: float = 0.1
    """For each token that a query attends to, microseconds."""

    def seconds(self, batch: ScheduledBatch) -> float:
        counts = batch.num_scheduled_tokens
        num_prompt_tokens = sum(counts[batch.num_decodes :])
        num_read = 0.0
        for sequence, count in zip(batch.sequences, counts, strict=True):
            num_read += count * (sequence.num_computed_tokens + (count + 1) / 2)
        milliseconds = self.ms_fixed + max(self.ms_weight_pass, num_prompt_tokens * self.ms_per_prompt_token)
        milliseconds += batch.num_decodes * self.ms_per_decode + num_read * self.us_per_kv_token / 1000
        return milliseconds / 1000


@dataclass(frozen=True)
class Arrival:
    time: float
    """Seconds from the start."""
    prompt_token_ids: list[int]
    num_output_tokens: int
    kind: str = ""


@dataclass
class Figures:
    """Of one run; seconds."""

    ttft: dict[str, list[float]] = field(default_factory=dict)
    """Arrival to first token, by kind of request."""
    itl: list[float] = field(default_factory=list)
    """Between two tokens of a request."""
    seconds: float = 0.0
    num_tokens: int = 0
    """Of outputs."""
    num_steps: int = 0
    hit_rate: float = 0.0
    """Prompt tokens found in the prefix cache."""

    def all_ttft(self) -> list[float]:
        return [seconds for times in self.ttft.values() for seconds in times]


class PrefillFirst(Scheduler):
    """As a peer: whole prompts, alone, as soon as they have arrived; nobody decodes meanwhile."""

    def _schedule_decodes(self, candidates: list[Sequence], builder: BatchBuilder) -> list[Sequence]:
        prompts = BatchBuilder(builder.budget)
        self.prompts.schedule_waiting(prompts, self.prompts.budget(prompts))
        if prompts.empty:
            return super()._schedule_decodes(candidates, builder)
        builder.decodes, builder.chunks, builder.started = prompts.decodes, prompts.chunks, prompts.started
        builder.budget = 0
        return []


def simulate(
    scheduler: Scheduler, arrivals: Iterable[Arrival], cost: StepCost, pacer: StepPacer | None = None
) -> Figures:
    """Run until all have ended. An idle machine jumps to the next arrival."""
    pending = sorted(arrivals, key=lambda arrival: arrival.time)[::-1]
    figures = Figures()
    arrived: dict[str, Arrival] = {}
    last_token: dict[str, float] = {}
    now = 0.0
    while pending or scheduler.has_work():
        if not scheduler.has_work():
            now = max(now, pending[-1].time)
        while pending and pending[-1].time <= now:
            arrival = pending.pop()
            request_id = str(len(arrived))
            arrived[request_id] = arrival
            params = SamplingParams(max_tokens=arrival.num_output_tokens, ignore_eos=True, temperature=0.0)
            scheduler.add(
                Request(request_id=request_id, prompt_token_ids=arrival.prompt_token_ids, params=params, seed=0)
            )
        batch = scheduler.schedule()
        if batch is None:
            raise RuntimeError("there is work and nothing is scheduled")
        seconds = cost.seconds(batch)
        if pacer is not None:
            scheduler.prompts.max_num_tokens = pacer.observe(batch, seconds)
        now += seconds
        figures.num_steps += 1
        for output in scheduler.update(batch, SampledTokens([7] * len(batch.sampling))):
            request_id = output.request_id
            if request_id in last_token:
                figures.itl.append(now - last_token[request_id])
            else:
                arrival = arrived[request_id]
                figures.ttft.setdefault(arrival.kind, []).append(now - arrival.time)
            last_token[request_id] = now
            figures.num_tokens += len(output.token_ids)
    figures.seconds = now
    stats = scheduler.stats()
    figures.hit_rate = stats.prefix_cache_hits / max(stats.prefix_cache_queries, 1)
    return figures


def make_scheduler(budget: int, *, num_blocks: int = 8192, scheduler_class: type[Scheduler] = Scheduler) -> Scheduler:
    return scheduler_class(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=64,
            max_num_batched_tokens=budget,
            max_model_len=16384,
        )
    )


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank, in milliseconds."""
    ordered = sorted(values)
    return 1000 * ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def row(name: str, figures: Figures) -> str:
    ttft = figures.all_ttft()
    times = (percentile(ttft, 50), percentile(ttft, 99), percentile(figures.itl, 50), percentile(figures.itl, 99))
    cells = [f"{milliseconds:9.1f}" for milliseconds in times]
    cells.append(f"{figures.num_tokens / figures.seconds:9.1f}")
    return f"  {name:<26}" + "".join(cells) + f"{100 * figures.hit_rate:8.1f} %"


HEADER = f"  {'':<26}{'TTFT p50':>9}{'p99':>9}{'ITL p50':>9}{'p99':>9}{'tokens/s':>9}{'hits':>10}"


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(30000) for _ in range(num_tokens)]


def poisson(rng: random.Random, rate: float, num_requests: int, num_in: range, num_out: range) -> list[Arrival]:
    """Requests that share nothing, `rate` of them a second."""
    now, arrivals = 0.0, []
    for _ in range(num_requests):
        now += rng.expovariate(rate)
        arrivals.append(Arrival(now, prompt_of(rng, rng.choice(num_in)), rng.choice(num_out)))
    return arrivals


def report_budget(cost: StepCost) -> None:
    """Step budgets under three loads: a burst of 16, a stream of requests, and longer prompts."""
    rng = random.Random(1)
    loads = {
        "16 at once, 256 in, 64 out": [Arrival(0.0, prompt_of(rng, 256), 64) for _ in range(16)],
        "3 a second, 128 to 512 in, 64 out": poisson(rng, 3, 120, range(128, 513), range(64, 65)),
        "1 a second, 1024 to 2048 in, 64 out": poisson(rng, 1, 60, range(1024, 2049), range(64, 65)),
    }
    for name, arrivals in loads.items():
        print(f"\n{name}\n{HEADER}")
        for budget in (64, 128, 256, 512, 1024, 2048):
            print(row(f"{budget} tokens a step", simulate(make_scheduler(budget), arrivals, cost)))


def report_twins(cost: StepCost) -> None:
    """Requests that arrive together and begin alike.

    They wait until the first has computed what they share. If they computed their rest in the same step instead, it
    would take as long as one prompt of all these tokens: the bound.
    """
    rng = random.Random(2)
    prefix = prompt_of(rng, 512)
    arrivals = [Arrival(0.0, prefix + prompt_of(rng, 32), 32) for _ in range(8)]
    bound = simulate(make_scheduler(2048), [Arrival(0.0, prompt_of(rng, 512 + 8 * 32), 1)], cost)
    print(f"\n8 at once that share 512 of 544 tokens\n{HEADER}")
    for budget in (256, 512, 2048):
        print(row(f"{budget} tokens a step", simulate(make_scheduler(budget), arrivals, cost)))
        unshared = Scheduler(
            SchedulerConfig(num_blocks=8192, max_num_batched_tokens=budget, enable_prefix_caching=False)
        )
        print(row(f"{budget}, not shared", simulate(unshared, arrivals, cost)))
    print(f"  all in one step, a bound: TTFT {percentile(bound.all_ttft(), 50):.1f}")


def report_long(cost: StepCost) -> None:
    """Short requests beside a prompt of 8192 tokens that came first."""
    rng = random.Random(3)
    long = Arrival(0.0, prompt_of(rng, 8192), 32, "long")
    short = [Arrival(0.1 + 0.5 * index, prompt_of(rng, 64), 32, "short") for index in range(6)]
    print("\n6 prompts of 64 tokens, two a second, beside one of 8192 tokens")
    print(f"  {'':<26}{'short TTFT p50':>16}{'max':>9}{'long TTFT':>11}{'ITL p99':>9}")
    for name, scheduler in (
        ("prefill first, 8192", make_scheduler(8192, scheduler_class=PrefillFirst)),
        ("2048 tokens a step", make_scheduler(2048)),
        ("256 tokens a step", make_scheduler(256)),
    ):
        figures = simulate(scheduler, [long, *short], cost)
        times = figures.ttft["short"]
        print(
            f"  {name:<26}{percentile(times, 50):16.1f}{percentile(times, 100):9.1f}"
            f"{percentile(figures.ttft['long'], 50):11.1f}{percentile(figures.itl, 99):9.1f}"
        )


def report_mixed(cost: StepCost) -> None:
    """A tenth of the prompts is long."""
    rng = random.Random(9)
    now, arrivals = 0.0, []
    for _ in range(200):
        now += rng.expovariate(1.6)
        kind = "long" if rng.random() < 0.1 else "short"
        num_in = rng.randrange(2000, 8001) if kind == "long" else rng.randrange(32, 513)
        arrivals.append(Arrival(now, prompt_of(rng, num_in), 48, kind))
    print("\n1.6 prompts a second of 32 to 512 tokens, of which one in ten has 2000 to 8000")
    print(f"  {'':<26}{'short TTFT p50':>16}{'p90':>9}{'long p50':>10}{'p90':>9}{'ITL p99':>9}")
    for name, scheduler in (
        ("prefill first", make_scheduler(8192, scheduler_class=PrefillFirst)),
        ("2048 tokens a step", make_scheduler(2048)),
        ("256 tokens a step", make_scheduler(256)),
        ("128 tokens a step", make_scheduler(128)),
    ):
        figures = simulate(scheduler, arrivals, cost)
        times = [percentile(figures.ttft[kind], percent) for kind in ("short", "long") for percent in (50, 90)]
        cells = "".join(f"{ms:{width}.1f}" for ms, width in zip(times, (16, 9, 10, 9), strict=True))
        print(f"  {name:<26}{cells}{percentile(figures.itl, 99):9.1f}")


def report_target(cost: StepCost) -> None:
    """--target-itl-ms beside a large budget, which alone would let prompts delay decodes."""
    arrivals = poisson(random.Random(7), 3, 200, range(64, 1025), range(64, 65))
    print(f"\n3 a second, 64 to 1024 in, 64 out; 2048 tokens a step\n{HEADER}")
    print(row("no target", simulate(make_scheduler(2048), arrivals, cost)))
    for milliseconds in (25, 50, 100, 200):
        pacer = StepPacer(milliseconds / 1000, 2048)
        print(row(f"target {milliseconds} ms", simulate(make_scheduler(2048), arrivals, cost, pacer)))


def capacity(make: Callable[[], Scheduler], cost: StepCost, max_itl: float, max_ttft: float) -> float:
    """Most requests a second, to a tenth, at which 99 % of ITL and 90 % of TTFT are within their limits, seconds."""
    low, high = 0, 200
    while high - low > 1:
        middle = (low + high) // 2
        arrivals = poisson(random.Random(4), middle / 10, 300, range(64, 513), range(32, 97))
        figures = simulate(make(), arrivals, cost)
        kept = percentile(figures.itl, 99) <= 1000 * max_itl and percentile(figures.all_ttft(), 90) <= 1000 * max_ttft
        low, high = (middle, high) if kept else (low, middle)
    return low / 10


def report_capacity(cost: StepCost) -> None:
    print("\nRequests a second (64 to 512 in, 32 to 96 out) with 99 % of ITL within a limit, 90 % of TTFT within 2 s")
    names = ("prefill first", "2048", "256", "128", "64")
    print(f"  {'ITL limit':<12}" + "".join(f"{name:>15}" for name in names))
    for limit in (0.05, 0.1, 0.2):
        makers: list[Callable[[], Scheduler]] = [lambda: make_scheduler(2048, scheduler_class=PrefillFirst)]
        makers += [lambda budget=int(name): make_scheduler(budget) for name in names[1:]]
        cells = [f"{capacity(make, cost, limit, 2.0):15.1f}" for make in makers]
        print(f"  {1000 * limit:<9.0f} ms" + "".join(cells))


def tree(rng: random.Random, depth: int, width: int, num_tokens: int) -> list[list[int]]:
    """Prompts: all paths from the root to a leaf of a tree whose edges hold `num_tokens` tokens each, depth first."""
    if depth == 0:
        return [[]]
    paths = []
    for _ in range(width):
        edge = prompt_of(rng, num_tokens)
        paths += [edge + rest for rest in tree(rng, depth - 1, width, num_tokens)]
    return paths


def report_tree(cost: StepCost) -> None:
    """Prefixes that branch, in random order, and a pool that holds some paths; against the order of a tree walk."""
    rng = random.Random(5)
    print("\nAll 256 paths of a tree of prefixes (4 levels of 4 branches, 128 tokens each) at once, 4 tokens out")
    leaves = [path + prompt_of(rng, 16) for path in tree(rng, 4, 4, 128)]
    shuffled = leaves[:]
    rng.shuffle(shuffled)
    print(f"  the best of all orders finds {100 * best_hit_rate(leaves):.1f} %\n{HEADER}")
    for num_blocks in (512, 1024, 2048):
        for name, order, max_overtakes in (
            ("depth first", leaves, MAX_OVERTAKES),
            ("random", shuffled, MAX_OVERTAKES),
            ("random, in order", shuffled, 0),
        ):
            scheduler = make_scheduler(128, num_blocks=num_blocks)
            scheduler.prompts.order.max_overtakes = max_overtakes
            arrivals = [Arrival(0.0, prompt, 4) for prompt in order]
            print(row(f"{num_blocks} blocks, {name}", simulate(scheduler, arrivals, cost)))


def best_hit_rate(prompts: list[list[int]]) -> float:
    """If every distinct block is computed once, and of each prompt what follows its last full block."""
    distinct = {tuple(prompt[:end]) for prompt in prompts for end in range(BLOCK_SIZE, len(prompt), BLOCK_SIZE)}
    num_rest = sum((len(prompt) - 1) % BLOCK_SIZE + 1 for prompt in prompts)
    return 1 - (len(distinct) * BLOCK_SIZE + num_rest) / sum(map(len, prompts))


def report_fairness(cost: StepCost) -> None:
    """Requests with a long cached prefix, more than the machine can take, and a few that share nothing."""
    rng = random.Random(6)
    prefix = prompt_of(rng, 1024)
    hot = [Arrival(i / 30, prefix + prompt_of(rng, 32), 64, "hot") for i in range(900)]
    cold = [Arrival(5.0 * i, prompt_of(rng, 256), 64, "cold") for i in range(1, 6)]
    print("\n900 requests that share 1024 tokens, 30 a second, and 5 of 256 tokens that share nothing")
    print(f"  {'':<26}{'hot TTFT p50':>14}{'p99':>9}{'cold TTFT p50':>15}{'max':>9}{'tokens/s':>9}")
    for max_overtakes in (0, MAX_OVERTAKES, 10**6):
        scheduler = make_scheduler(128)
        scheduler.prompts.order.max_overtakes = max_overtakes
        figures = simulate(scheduler, [*hot, *cold], cost)
        hot_ttft, cold_ttft = figures.ttft["hot"], figures.ttft["cold"]
        times = (percentile(hot_ttft, 50), percentile(hot_ttft, 99))
        times += (percentile(cold_ttft, 50), percentile(cold_ttft, 100))
        cells = "".join(f"{milliseconds:{width}.1f}" for milliseconds, width in zip(times, (14, 9, 15, 9), strict=True))
        print(f"  {f'overtaken at most {max_overtakes}':<26}{cells}{figures.num_tokens / figures.seconds:9.1f}")


REPORTS = {
    "budget": report_budget,
    "twins": report_twins,
    "long": report_long,
    "mixed": report_mixed,
    "target": report_target,
    "capacity": report_capacity,
    "tree": report_tree,
    "fairness": report_fairness,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", metavar="REPORT", help=f"of {', '.join(REPORTS)} (default: all)")
    for cost_field in fields(StepCost):
        flag = "--" + cost_field.name.replace("_", "-")
        parser.add_argument(flag, type=float, default=cost_field.default, help="(default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.reports) - set(REPORTS):
        parser.error(f"no report {', '.join(sorted(unknown))}; there are {', '.join(REPORTS)}")
    cost = StepCost(**{cost_field.name: getattr(args, cost_field.name) for cost_field in fields(StepCost)})
    print(cost)
    for name in args.reports or REPORTS:
        REPORTS[name](cost)


if __name__ == "__main__":
    main()
