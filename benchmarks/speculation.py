"""Time generation with and without drafts: 200 prompts on the bundled model, of which half repeat themselves.

    python benchmarks/speculation.py

Without and with drafts run in turns, in one process; the tokens must be the same. Figures are medians of the rounds, in
seconds of CPU time, which the neighbours on the machine hardly change.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quire.config import SpeculativeConfig
from quire.engine.llm import LLM
from quire.sampling_params import SamplingParams

NUM_PROMPTS = 200
NUM_OUTPUT_TOKENS = 128
PHRASES = (
    "Once upon a time there was a king who had a daughter.",
    "The fox said: I will not come with you.",
    "Then the wolf ran into the forest.",
    "She went home and told her mother all that had happened.",
    "Mirror, mirror on the wall, who is the fairest of us all?",
)
Answers = list[list[int]]


def prompts(repetitive: bool) -> list[str]:
    rng = random.Random(11)
    texts = []
    for _ in range(NUM_PROMPTS // 2):
        phrases = rng.choices(PHRASES, k=2)
        texts.append(" ".join(phrases * 3 if repetitive else phrases))
    return texts


def measure(llm: LLM, texts: list[str], params: SamplingParams) -> tuple[Answers, dict[str, float]]:
    before, started = llm.stats(), time.process_time()
    results = llm.generate(texts, params)
    seconds, after = time.process_time() - started, llm.stats()
    answers = [result.outputs[0].token_ids for result in results]
    num_steps = after.num_steps - before.num_steps
    num_drafts = after.num_draft_steps - before.num_draft_steps
    num_drafted = after.num_drafted_tokens - before.num_drafted_tokens
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    return answers, {
        "seconds": seconds,
        "steps": num_steps,
        "tokens": sum(map(len, answers)),
        "accepted_per_draft": num_accepted / max(1, num_drafts),
        "accepted_share": num_accepted / max(1, num_drafted),
        "drafted": num_drafted,
        "accepted": num_accepted,
    }


def compare(llm: LLM, texts: list[str], params: SamplingParams, num_drafts: int, rounds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(rounds):
        answers = {}
        for name, number in (("without", 0), ("with", num_drafts)):
            answers[name], figures = measure(llm, texts, replace(params, num_speculative_tokens=number))
            runs[name].append(figures)
        if answers["with"] != answers["without"]:
            raise SystemExit("The tokens differ.")
    medians = {
        name: {key: statistics.median(run[key] for run in figures) for key in figures[0]}
        for name, figures in runs.items()
    }
    return {**medians, "speedup": medians["without"]["seconds"] / medians["with"]["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-speculative-tokens", type=int, default=4, help="most drafts a step (default: 4)")
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    print(f"{'batch':>5} {'text':>11} {'sampling':>8} {'s without':>9} {'s with':>7} {'faster':>6} {'accepted':>8}")
    for max_num_seqs in (1, 16):
        speculation = SpeculativeConfig(num_speculative_tokens=args.num_speculative_tokens)
        llm = LLM(
            dtype="float32",
            device="cpu",
            max_num_seqs=max_num_seqs,
            num_threads=args.num_threads,
            speculative_config=speculation,
        )
        params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, seed=1)
        for text, texts in (("repetitive", prompts(True)), ("plain", prompts(False))):
            for sampling, temperature in (("greedy", 0.0), ("t = 0.8", 0.8)):
                texts = texts if max_num_seqs > 1 else texts[:20]
                figures = compare(
                    llm, texts, replace(params, temperature=temperature), args.num_speculative_tokens, args.rounds
                )
                results[f"{max_num_seqs}, {text}, {sampling}"] = figures
                print(
                    f"{max_num_seqs:5} {text:>11} {sampling:>8} {figures['without']['seconds']:9.2f} "
                    f"{figures['with']['seconds']:7.2f} {figures['speedup']:6.2f} "
                    f"{figures['with']['accepted']:.0f} of {figures['with']['drafted']:.0f} drafts, "
                    f"{figures['with']['accepted_per_draft']:.2f} a draft; steps {figures['without']['steps']:.0f} "
                    f"-> {figures['with']['steps']:.0f}",
                    flush=True,
                )
    if args.json:
        about = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
