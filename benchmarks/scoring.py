"""Multiple choice by log-likelihood: 200 made-up questions with 5 solved ones before each, cold and from the cache.

python benchmarks/scoring.py [--model DIR] [--dtype float32] [--items 200]

Prints the hit rate and the time of a run without prefix caching, a cold one and a warm one, and says whether the three
gave the same bits.
"""

from __future__ import annotations

import argparse
import json
import random
import time

from quire import LLM
from quire.engine.scoring import ContinuationScore

WHO = ("king", "queen", "miller", "tailor", "fox", "wolf", "giant", "fisherman", "princess", "shepherd")
WHERE = ("forest", "castle", "mill", "garden", "river", "mountain", "cellar", "village", "tower", "meadow")
WHAT = ("ring", "apple", "key", "sword", "feather", "lamp", "goose", "mirror", "cloak", "spindle")
NUM_SHOTS, NUM_CHOICES = 5, 4


def question(rng: random.Random) -> tuple[str, list[str], int]:
    """A question, its choices, and which of them is right."""
    who, other = rng.sample(WHO, 2)
    places, thing = rng.sample(WHERE, NUM_CHOICES), rng.choice(WHAT)
    text = (
        f"Once upon a time there was a {who} who had a golden {thing}. The {who} hid the {thing} in the {places[0]}, "
        f"and the {other}, who lived in the {places[1]}, did not know of it.\n"
        f"Question: Where was the {thing} of the {who}?\nAnswer: In the"
    )
    choices = rng.sample(places, NUM_CHOICES)
    return text, [f" {place}." for place in choices], choices.index(places[0])


def task(num_items: int) -> tuple[list[str], list[str], list[int]]:
    """Contexts and continuations, item by item, and the right choice of each item."""
    rng = random.Random(11)
    shots = ""
    for _ in range(NUM_SHOTS):
        text, choices, right = question(rng)
        shots += f"{text}{choices[right]}\n\n"
    contexts, continuations, answers = [], [], []
    for _ in range(num_items):
        text, choices, right = question(rng)
        contexts += [shots + text] * NUM_CHOICES
        continuations += choices
        answers.append(right)
    return contexts, continuations, answers


def run(llm: LLM, contexts: list[str], continuations: list[str]) -> tuple[list[ContinuationScore], dict[str, float]]:
    before, started = llm.stats(), time.perf_counter()
    scores = llm.score(contexts, continuations)
    seconds, after = time.perf_counter() - started, llm.stats()
    queries = after.prefix_cache_queries - before.prefix_cache_queries
    hits = after.prefix_cache_hits - before.prefix_cache_hits
    computed = after.num_scheduled_tokens - before.num_scheduled_tokens
    figures = {"seconds": round(seconds, 2), "computed_tokens": computed, "steps": after.num_steps - before.num_steps}
    if queries:
        figures["hit_rate"] = round(hits / queries, 4)
    return scores, figures


def accuracy(scores: list[ContinuationScore], answers: list[int]) -> float:
    log_probs = [score.log_prob for score in scores]
    items = [log_probs[start : start + NUM_CHOICES] for start in range(0, len(log_probs), NUM_CHOICES)]
    return sum(item.index(max(item)) == right for item, right in zip(items, answers, strict=True)) / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a checkpoint (default: the bundled model)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--items", type=int, default=200)
    arguments = parser.parse_args()
    contexts, continuations, answers = task(arguments.items)
    options = {"dtype": arguments.dtype, "max_num_seqs": 64}
    uncached = LLM(arguments.model, enable_prefix_caching=False, **options)
    llm = LLM(arguments.model, **options)
    results = {
        "no cache": run(uncached, contexts, continuations),
        "cold": run(llm, contexts, continuations),
        "warm": run(llm, contexts, continuations),
    }
    expected = results["no cache"][0]
    report = {
        "dtype": llm.info.dtype,
        "items": arguments.items,
        "requests": len(contexts),
        "prompt_tokens_each": len(llm.tokenizer.encode(contexts[0] + continuations[0])),
        "accuracy": accuracy(expected, answers),
        "runs": {name: figures for name, (_, figures) in results.items()},
        "bit_identical": all(scores == expected for scores, _ in results.values()),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
