"""Measure `LLM.generate` in this process: tokens per second and times of steps, against the most this machine could do.

    python benchmarks/offline.py                                    the bundled model, 8 prompts of 128 tokens, 64 out
    python benchmarks/offline.py path/to/model --loads W1,W2,W3
    python benchmarks/offline.py path/to/model --batch 16 --profile
    python benchmarks/offline.py path/to/model --batch 1 --quantization int4

The loads are those of serving.py: all requests are there at the beginning, those of W4 too, and as many run at once as
serving.py has in flight. The floor of each step is reckoned for the very batch that it computed, see
measuring/floors.py. --profile runs everything once more with timers around the parts of a step; its own cost shows in
the tokens per second that it prints beside those without it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import loads, rates
from measuring.floors import MachineRates, ModelCost, ideal_run
from measuring.loads import LoadRequest
from measuring.processes import CpuMeter
from measuring.report import markdown_table, number, write_json
from measuring.step_profile import StepProfile, replaced, torch_operations

from quire import LLM, SamplingParams
from quire.config import ConfigError
from quire.engine.device import DTYPES
from quire.engine.engine import Engine
from quire.scheduler.output import ScheduledBatch
from quire.scheduler.scheduler import Scheduler
from quire.tales import MODEL_DIR

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that are all there at the beginning, so many of them in flight."""

    name: str
    requests: list[LoadRequest]
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    sequences: list[tuple[int, int]]
    """(tokens computed before, tokens computed) of each."""
    num_rows: int
    is_decode: bool
    """Nothing but one token of each sequence."""


@dataclass(frozen=True, slots=True)
class Result:
    """`*_floor_share`: floor / measured, of all steps of a kind together; 1.0 is the floor. Medians in milliseconds."""

    name: str
    wall_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    floor_tokens_per_s: float
    """Output tokens of the ideal run."""
    decode_steps: int
    decode_ms: float | None
    decode_floor_share: float | None
    prompt_steps: int
    prompt_ms: float | None
    prompt_floor_share: float | None
    between_steps_share: float
    """Of the wall time: detokenizing, and the loop of LLM.generate."""
    others_cores: float
    """What other processes of the machine used meanwhile."""


@contextmanager
def watched_steps() -> Iterator[list[Step]]:
    """The steps of all engines; costs a few microseconds a step."""
    steps: list[Step] = []
    last: list[ScheduledBatch | None] = [None]

    def keep(schedule: Any) -> Any:
        def kept(scheduler: Scheduler) -> ScheduledBatch | None:
            last[0] = schedule(scheduler)
            return last[0]

        return kept

    def watch(step: Any) -> Any:
        def watched(engine: Engine) -> Any:
            begin = time.perf_counter()
            outputs = step(engine)
            seconds, batch = time.perf_counter() - begin, last[0]
            if batch is not None:
                counts = batch.num_scheduled_tokens
                # After the step, num_computed_tokens has moved on.
                sequences = [(s.num_computed_tokens - n, n) for s, n in zip(batch.sequences, counts, strict=True)]
                is_decode = batch.num_decodes == len(counts)
                steps.append(Step(seconds, sequences, batch.num_sampled_rows, is_decode))
            return outputs

        return watched

    with replaced(Scheduler, "schedule", keep), replaced(Engine, "step", watch):
        yield steps


def make_llm(arguments: argparse.Namespace, job: Job) -> LLM:
    try:
        return LLM(
            arguments.model,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            num_threads=arguments.threads,
            max_num_seqs=job.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
        )
    except ConfigError as error:
        raise SystemExit(str(error)) from error


def generate(llm: LLM, job: Job) -> float:
    """Seconds that the job took."""
    params = [SamplingParams(temperature=0.0, max_tokens=r.num_output_tokens, ignore_eos=True) for r in job.requests]
    begin = time.perf_counter()
    outputs = llm.generate([request.token_ids for request in job.requests], params)
    seconds = time.perf_counter() - begin
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    asked = sum(request.num_output_tokens for request in job.requests)
    if made != asked:
        raise SystemExit(f"{job.name}: {made} tokens were generated, {asked} were asked for.")
    return seconds


def warm_up(llm: LLM, job: Job) -> None:
    """As many sequences at once as the job will have, of other words: every recording of that size is made."""
    short = [replace(r, token_ids=r.token_ids[::-1][:64], num_output_tokens=WARM_UP_TOKENS) for r in job.requests]
    generate(llm, replace(job, requests=short[: 2 * job.max_num_seqs]))


def measure(arguments: argparse.Namespace, job: Job, cost: ModelCost, best: MachineRates) -> Result:
    """The fastest of the rounds; each on a new engine, so that no prefix is cached."""
    fastest: tuple[float, list[Step], float] | None = None
    for _ in range(arguments.rounds):
        llm = make_llm(arguments, job)
        warm_up(llm, job)
        with watched_steps() as steps:
            meter = CpuMeter()
            seconds = generate(llm, job)
            others = meter.stop().others
        if fastest is None or seconds < fastest[0]:
            fastest = (seconds, steps, others)
        del llm
        gc.collect()
    assert fastest is not None
    return summary(job, *fastest, cost, best)


def summary(job: Job, wall: float, steps: Sequence[Step], others: float, cost: ModelCost, best: MachineRates) -> Result:
    num_output = sum(request.num_output_tokens for request in job.requests)
    num_prompt = sum(len(request.token_ids) for request in job.requests)
    _, ideal_wall = ideal_run([replace(r, arrival=None) for r in job.requests], job.max_num_seqs, cost, best)
    figures: dict[str, Any] = {}
    for kind, is_decode in (("decode", True), ("prompt", False)):
        chosen = [step for step in steps if step.is_decode == is_decode]
        spent = sum(step.seconds for step in chosen)
        floor = sum(cost.step(step.sequences, step.num_rows).seconds(best) for step in chosen)
        figures[f"{kind}_steps"] = len(chosen)
        figures[f"{kind}_ms"] = 1e3 * statistics.median(step.seconds for step in chosen) if chosen else None
        figures[f"{kind}_floor_share"] = floor / spent if chosen else None
    return Result(
        job.name,
        wall,
        num_output / wall,
        (num_output + num_prompt) / wall,
        num_output / ideal_wall,
        between_steps_share=1 - sum(step.seconds for step in steps) / wall,
        others_cores=others,
        **figures,
    )


def profile(arguments: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Mean milliseconds a step of each part, the tokens per second that were left, and torch's own operations."""
    step_profile = StepProfile()
    with step_profile.open():
        llm = make_llm(arguments, job)
        warm_up(llm, job)
        step_profile.restart()
        seconds = generate(llm, job)
        parts = step_profile.finish()
    short = replace(job, requests=job.requests[: job.max_num_seqs])
    llm = make_llm(arguments, job)
    operations = torch_operations(lambda: warm_up(llm, short))
    rate = sum(request.num_output_tokens for request in job.requests) / seconds
    return {"output_tokens_per_s": rate, "ms_per_step": parts, "torch_ms": dict(operations)}


def profile_tables(job: Job, found: dict[str, Any], unprofiled: float) -> str:
    rate = found["output_tokens_per_s"]
    text = f"{job.name}: {number(rate)} output tokens/s while profiled, {number(unprofiled)} without.\n"
    for kind, parts in found["ms_per_step"].items():
        count = int(parts["steps"])
        named = {name: ms for name, ms in parts.items() if name != "steps"}
        whole = sum(named.values())
        if count:
            rows = [[name, f"{ms:.4f}", f"{100 * ms / whole:.1f} %"] for name, ms in named.items()]
            text += f"\n{count} {kind} steps, {whole:.3f} ms each:\n\n"
            text += markdown_table(["part", "ms a step (mean)", "share"], rows)
    listed = ", ".join(f"{name} {ms:.1f}" for name, ms in found["torch_ms"].items())
    return text + f"\nOperations of torch itself in a short run, ms: {listed}\n"


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    word_ids = loads.Words(arguments.model).ids
    if not arguments.loads:
        own = loads.Workload(arguments.batch, arguments.batch, arguments.prompt_len, arguments.output_len)
        return [Job(f"batch {arguments.batch}", loads.draw_requests(word_ids, own, "offline", 1.0), arguments.batch)]
    jobs = []
    for name in arguments.loads.split(","):
        requests = [replace(r, arrival=None) for r in loads.make_requests(word_ids, name, 0, 1.0)]
        jobs.append(Job(name, requests, loads.concurrency(name) or len(requests)))
    return jobs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    described = "; ".join(f"{name}: {workload}" for name, workload in loads.WORKLOADS.items())
    add = parser.add_argument
    add("model", type=Path, nargs="?", default=MODEL_DIR, help="directory of a checkpoint (default: the bundled model)")
    add("--loads", default="", help=f"tokens; {described} (default: one batch, as the next three say)")
    add("--batch", type=int, default=8, help="prompts, all at once (default: %(default)s)")
    add("--prompt-len", type=int, default=128, help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=64, help="tokens (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(default: all cores, here %(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="(default: auto, as the checkpoint)")
    add("--quantization", choices=["int8", "int4"], help="of the weights (default: as they are)")
    add("--max-num-batched-tokens", type=int, default=2048, help="token budget of a step (default: %(default)s)")
    add("--rounds", type=int, default=3, help="runs of each load; the fastest counts (default: %(default)s)")
    add("--profile", action="store_true", help="also show where the time of a step goes")
    add("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    if unknown := set(filter(None, arguments.loads.split(","))) - loads.WORKLOADS.keys():
        parser.error(f"--loads: there is no {sorted(unknown)[0]!r}; known are {', '.join(loads.WORKLOADS)}")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} holds no config.json; give the directory of a checkpoint")
    if min(arguments.batch, arguments.prompt_len, arguments.output_len, arguments.threads, arguments.rounds) < 1:
        parser.error("--batch, --prompt-len, --output-len, --threads and --rounds must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    jobs = make_jobs(arguments)
    info = make_llm(arguments, jobs[0]).info
    dtype = DTYPES[info.dtype]
    measured = rates.measure(arguments.threads, dtype, torch.device(info.device), seconds=0.3)
    best = MachineRates(float(str(measured["read_bytes_per_s"])), float(str(measured["operations_per_s"])))
    kv_item_bytes = DTYPES[info.kv_cache_dtype].itemsize
    cost = ModelCost.of(arguments.model, dtype.itemsize, kv_item_bytes, arguments.quantization)
    text = (
        f"{arguments.model.name}, {arguments.quantization or info.dtype}, {arguments.threads} threads; floor at "
        f"{best.read_bytes_per_s / 1e9:.1f} GB/s read and {best.operations_per_s / 1e9:.0f} GFLOP/s.\n\n"
    )
    results = [measure(arguments, job, cost, best) for job in jobs]
    text += results_table(results)
    profiles = {}
    if arguments.profile:
        for job, result in zip(jobs, results, strict=True):
            profiles[job.name] = profile(arguments, job)
            text += "\n" + profile_tables(job, profiles[job.name], result.output_tokens_per_s)
    print(text)
    if arguments.out is not None:
        body = {
            "model": arguments.model.name,
            "quantization": arguments.quantization,
            "rates": measured,
            "cost": asdict(cost),
            "profiles": profiles,
        }
        write_json(arguments.out.with_suffix(".json"), {**body, "results": [asdict(result) for result in results]})
        arguments.out.with_suffix(".md").write_text(text)


def results_table(results: Sequence[Result]) -> str:
    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.0f} %"

    rows = [
        [
            result.name,
            f"{number(result.output_tokens_per_s)} ({percent(result.output_tokens_per_s / result.floor_tokens_per_s)})",
            number(result.total_tokens_per_s),
            f"{result.decode_steps} × {number(result.decode_ms)} ms ({percent(result.decode_floor_share)})",
            f"{result.prompt_steps} × {number(result.prompt_ms)} ms ({percent(result.prompt_floor_share)})",
            percent(result.between_steps_share),
            f"{result.others_cores:.2f}",
        ]
        for result in results
    ]
    header = ["load", "output tokens/s (of floor)", "total tokens/s", "decode steps (of floor)"]
    return markdown_table([*header, "steps with prompts (of floor)", "time between steps", "cores of others"], rows)


if __name__ == "__main__":
    main()
