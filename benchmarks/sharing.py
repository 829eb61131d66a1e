"""Measure the blocks that choices of one request, and beams of one search, save by sharing them.

    python benchmarks/sharing.py [--json sharing.json]

Saved is 1 - (blocks in use) / (blocks if each sequence had all of its own), over all steps: the definition of the
PagedAttention paper (arXiv 2309.06180, section 6.3, figure 15), with its two pairs of mean lengths, block size 16, and
outputs that all run to their length. Prefix caching is off: only what is forked is shared.

Of sampled choices only the lengths matter, so a free model stands in. Which beams live on depends on the model. Two are
measured: real searches of the bundled model from prompts that it sampled itself, and a stochastic one in which each
beam draws at each step the exponent of a Zipf distribution over 32,000 tokens, evenly from 1 to 3, independent of all
others: its best token has a probability of 0.09 to 0.83.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from quire.config import SchedulerConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.output import Candidates, SampledTokens, ScheduledBatch
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from quire.engine.llm import LLM

BLOCK_SIZE = 16
WIDTHS = (2, 4, 6)
MEANS = {"Alpaca-like": (19, 58), "ShareGPT-like": (161, 338)}
"""Tokens in and out."""
SIGMA = 0.8
"""Shape of the lognormal lengths, as in benchmarks/paging.py."""
PAPER = {
    "Alpaca-like": {"sampling": (0.061, 0.098), "beams": (0.376, 0.552)},
    "ShareGPT-like": {"sampling": (0.162, 0.305), "beams": (0.443, 0.663)},
}
"""What the paper found for 2 and for 6."""
VOCAB_SIZE = 32_000
EXPONENTS = [1 + step / 32 for step in range(65)]
GROUPS_AT_ONCE = 16
SAMPLED_FOR_EACH_SEARCH = 20
"""Simulated searches take longer, and need fewer."""
TOKEN_ID = 7

Lengths = tuple[int, int]
STDERR = Console(stderr=True)


class Census:
    """Blocks of all steps together."""

    def __init__(self) -> None:
        self.num_used = self.num_unshared = 0

    def count(self, scheduler: Scheduler) -> None:
        """Between schedule() and update(), when all blocks of the step are taken."""
        self.num_used += scheduler.blocks.pool.num_used_blocks
        self.num_unshared += sum(len(sequence.block_table.block_ids) for sequence in scheduler.running)

    @property
    def saved(self) -> float:
        return round(1 - self.num_used / self.num_unshared, 4)


def draw_lengths(means: Lengths, number: int, max_model_len: int) -> list[Lengths]:
    """Pairs that do not fit into the context are drawn again."""
    rng = random.Random(0)
    pairs: list[Lengths] = []
    while len(pairs) < number:
        num_in, num_out = (max(1, round(rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA))) for mean in means)
        if num_in + num_out <= max_model_len:
            pairs.append((num_in, num_out))
    return pairs


def make_params(width: int, num_output_tokens: int, beams: bool) -> SamplingParams:
    return SamplingParams(n=width, max_tokens=num_output_tokens, ignore_eos=True, use_beam_search=beams)


class ZipfModel:
    """Log-probabilities of the best tokens, of a beam that has a distribution of its own at each step."""

    def __init__(self, exponents: Sequence[float]) -> None:
        self._rng = random.Random(1)
        self._log_probs = []
        for exponent in exponents:
            norm = math.log(math.fsum(rank**-exponent for rank in range(1, VOCAB_SIZE + 1)))
            self._log_probs.append([-exponent * math.log(rank) - norm for rank in range(1, 2 * max(WIDTHS) + 1)])

    def sample(self, batch: ScheduledBatch, width: int) -> SampledTokens:
        sampled = SampledTokens([TOKEN_ID] * len(batch.sampling))
        token_ids = list(range(2 * width))
        for row in range(len(batch.sampling)):
            sampled.candidates[row] = Candidates(token_ids, self._rng.choice(self._log_probs)[: 2 * width])
        return sampled


def simulate(pairs: list[Lengths], width: int, model: ZipfModel | None) -> float:
    """Beams of `model`, or without one sampled choices."""
    census = Census()
    for start in range(0, len(pairs), GROUPS_AT_ONCE):
        group = pairs[start : start + GROUPS_AT_ONCE]
        longest = max(num_in + num_out for num_in, num_out in group)
        scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=1 + len(group) * width * (2 + longest // BLOCK_SIZE),
                block_size=BLOCK_SIZE,
                max_num_seqs=len(group) * width,
                max_num_batched_tokens=sum(num_in for num_in, _ in group) + len(group) * width,
                max_model_len=longest,
                enable_prefix_caching=False,
            )
        )
        for index, (num_in, num_out) in enumerate(group):
            params = make_params(width, num_out, model is not None)
            scheduler.add(Request(request_id=str(index), prompt_token_ids=[TOKEN_ID] * num_in, params=params, seed=0))
        while (batch := scheduler.schedule()) is not None:
            census.count(scheduler)
            sampled = SampledTokens([TOKEN_ID] * len(batch.sampling)) if model is None else model.sample(batch, width)
            scheduler.update(batch, sampled)
    return census.saved


def search(llm: LLM, prompts: list[list[int]], pairs: list[Lengths], width: int) -> float:
    """Beams of a real model."""
    scheduler = llm._engine._scheduler
    census, update = Census(), scheduler.update

    def counted(batch: ScheduledBatch, sampled: SampledTokens) -> Any:
        census.count(scheduler)
        return update(batch, sampled)

    scheduler.update = counted  # type: ignore[method-assign]
    llm.generate(prompts, [make_params(width, num_out, True) for _, num_out in pairs])
    scheduler.update = update  # type: ignore[method-assign]
    return census.saved


def load(model: str | None, num_requests: int) -> LLM:
    """With room for the widest searches, so that none is preempted. Simulations do without it, and without torch."""
    from quire.engine.llm import LLM

    num_seqs = num_requests * max(WIDTHS)
    num_tokens = num_requests * 2 * sum(MEANS["ShareGPT-like"]) * max(WIDTHS)
    return LLM(
        model,
        dtype="float32",
        device="cpu",
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        num_blocks=num_seqs + num_tokens // BLOCK_SIZE,
        enable_prefix_caching=False,
    )


def measure_real(llm: LLM, means: Lengths, num_requests: int) -> dict[str, Any]:
    pairs = draw_lengths(means, num_requests, llm.info.max_model_len)
    start = llm.tokenizer.encode("Once upon a time")
    params = [SamplingParams(max_tokens=num_in, ignore_eos=True, seed=index) for index, (num_in, _) in enumerate(pairs)]
    sampled = llm.generate([start] * len(pairs), params)
    prompts = [
        (start + result.outputs[0].token_ids)[:num_in] for result, (num_in, _) in zip(sampled, pairs, strict=True)
    ]
    num_preemptions = llm.stats().num_preemptions
    saved = {
        str(width): search(llm, prompts, pairs, width)
        for width in track(WIDTHS, "searching", console=STDERR, transient=True)
    }
    if llm.stats().num_preemptions != num_preemptions:
        raise SystemExit("Searches were preempted: make the KV-cache larger.")
    return {"requests": len(pairs), "mean_lengths": mean_lengths(pairs), "saved": saved}


def mean_lengths(pairs: list[Lengths]) -> list[float]:
    return [round(sum(each) / len(pairs), 1) for each in zip(*pairs, strict=True)]


def measure_simulated(means: Lengths, num_requests: int) -> dict[str, Any]:
    """Sampled choices, and beams of the stochastic model; also with one exponent for all, flat and peaked."""
    pairs = draw_lengths(means, num_requests, 16_384)
    num_searches = -(-num_requests // SAMPLED_FOR_EACH_SEARCH)
    models = {
        "sampling": None,
        "beams": ZipfModel(EXPONENTS),
        "beams, all exponents 1": ZipfModel([1.0]),
        "beams, all exponents 3": ZipfModel([3.0]),
    }
    cases = [(name, width) for name in models for width in WIDTHS]
    result: dict[str, Any] = {
        "requests": len(pairs),
        "mean_lengths": mean_lengths(pairs),
        "searches": num_searches,
        "mean_lengths_of_searches": mean_lengths(pairs[:num_searches]),
    }
    for name, width in track(cases, "simulating", console=STDERR, transient=True):
        result.setdefault(name, {})[str(width)] = simulate(
            pairs if models[name] is None else pairs[:num_searches], width, models[name]
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a checkpoint for the real searches (default: the bundled model)")
    parser.add_argument(
        "--requests",
        type=int,
        default=2000,
        help="simulated for each pair of lengths (default: 2000); beams are a twentieth of them",
    )
    parser.add_argument("--searches", type=int, default=32, help="real ones for each pair of lengths (default: 32)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    llm = load(args.model, args.searches)
    results: dict[str, Any] = {}
    for trace, means in MEANS.items():
        simulated = measure_simulated(means, args.requests)
        real = measure_real(llm, means, args.searches)
        results[trace] = {"paper": PAPER[trace], "simulated": simulated, "real": real}
        print(f"{trace}, mean lengths simulated {simulated['mean_lengths']}, real {real['mean_lengths']}")
        rows = {name: saved for name, saved in simulated.items() if isinstance(saved, dict)}
        for name, saved in (rows | {"beams, bundled model": real["saved"]}).items():
            low, high = PAPER[trace][name.split(",")[0]]
            figures = "  ".join(f"{width}: {saved[str(width)]:6.1%}" for width in WIDTHS)
            print(f"  {name:24} {figures}   (paper: {low:.1%} to {high:.1%})", flush=True)
    if args.json:
        about = {"python": platform.python_version(), "machine": platform.machine()}
        args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
