"""Fixed, seeded loads of requests: the same prompts and lengths for whoever is measured.

Prompts are random words of the checkpoint's own tokenizer whose text encodes back to the same ids. Every load and
repeat has a seed of its own, so that nothing but the shared prefix of W3 can hit a prefix cache, and that is new in
each repeat.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MIN_WORDS = 1000


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens; a pair means: drawn between the two for each request."""

    num_requests: int
    concurrency: int | None
    """Requests in flight; None: they arrive at random (Poisson), whether or not others have ended."""
    prompt_len: int | tuple[int, int]
    output_len: int | tuple[int, int]
    prefix_len: int = 0
    """Tokens that all prompts of a repeat begin with, before those of their own."""

    def __str__(self) -> str:
        arrivals = "Poisson arrivals" if self.concurrency is None else f"{self.concurrency} in flight"
        prompt, output = (
            "..".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in (self.prompt_len, self.output_len)
        )
        prefix = f"{self.prefix_len} shared + " if self.prefix_len else ""
        return f"{self.num_requests} requests, {arrivals}, {prefix}{prompt} in, {output} out"


WORKLOADS = {
    "W1": Workload(8, 1, 128, 128),
    "W2": Workload(64, 16, 128, 64),
    "W3": Workload(32, 8, 32, 32, prefix_len=512),
    "W4": Workload(48, None, (16, 512), (8, 128)),
}
WARM_UP = Workload(4, 2, 64, 16)
FIRST_TOKEN = Workload(1, 1, 4, 1)
_ALL = {**WORKLOADS, "WARM": WARM_UP, "FIRST": FIRST_TOKEN}


@dataclass(frozen=True, slots=True)
class LoadRequest:
    token_ids: list[int]
    num_output_tokens: int
    prefix_len: int = 0
    """How many of `token_ids` all requests of the load begin with."""
    arrival: float | None = None
    """Seconds after the begin of the load; None: as soon as fewer than `concurrency` are in flight."""


class Words:
    """Ids of whole lower-case words that survive decoding and encoding.

    Raises:
        SystemExit: the tokenizer has too few of them.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        words = [(token_id, " " + piece[1:]) for piece, token_id in by_id if re.fullmatch("\u0120[a-z]{2,}", piece)]
        self.ids = [
            token_id for token_id, text in words if tokenizer.encode(text, add_special_tokens=False).ids == [token_id]
        ]
        if len(self.ids) < MIN_WORDS:
            raise SystemExit(
                f"{tokenizer_dir}/tokenizer.json has {len(self.ids)} whole words; the loads need {MIN_WORDS}: "
                "choose a model with a byte-level BPE tokenizer."
            )


def make_requests(word_ids: Sequence[int], name: str, repeat: int, rate: float) -> list[LoadRequest]:
    """The requests of one repeat of a load, in the order in which they are sent.

    Repeats 0 and 1 have lengths and arrivals of their own; later even and odd ones take over theirs, with new words.

    Args:
        rate: mean arrivals per second, where the load has arrivals.
    """
    workload = _ALL[name]
    if repeat >= 2:
        generator = random.Random(f"{name}/{repeat}/again")
        prefix = _draw(generator, word_ids, workload.prefix_len)
        return [
            replace(
                request,
                token_ids=prefix + _draw(generator, word_ids, len(request.token_ids) - workload.prefix_len),
            )
            for request in make_requests(word_ids, name, repeat % 2, rate)
        ]
    return draw_requests(word_ids, workload, f"{name}/{repeat}/v1", rate)


def draw_requests(word_ids: Sequence[int], workload: Workload, seed: str, rate: float) -> list[LoadRequest]:
    """The requests of any workload; the same seed gives the same ones."""
    generator = random.Random(seed)
    prefix = _draw(generator, word_ids, workload.prefix_len)
    requests, arrival = [], 0.0  # in units of the mean gap
    for _ in range(workload.num_requests):
        prompt_len = _length(generator, workload.prompt_len)
        output_len = _length(generator, workload.output_len)
        at = None
        if workload.concurrency is None:
            at = arrival / rate
            arrival += generator.expovariate(1.0)
        own = _draw(generator, word_ids, prompt_len)
        requests.append(LoadRequest(prefix + own, output_len, workload.prefix_len, at))
    return requests


def concurrency(name: str) -> int | None:
    return _ALL[name].concurrency


def _length(generator: random.Random, length: int | tuple[int, int]) -> int:
    return length if isinstance(length, int) else generator.randint(*length)


def _draw(generator: random.Random, word_ids: Sequence[int], count: int) -> list[int]:
    return [generator.choice(word_ids) for _ in range(count)]
