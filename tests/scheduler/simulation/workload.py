"""What one seed draws: a configuration, a subset of features, and requests that share prefixes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from quire.config import SchedulerConfig, SpeculativeConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.request import Request
from simulation.beam_oracle import PairStops

EOS = 0


@dataclass(frozen=True, slots=True)
class Swarm:
    """Features are drawn per seed, so that rare ones meet each other undisturbed in some runs."""

    config: SchedulerConfig
    vocab_size: int
    speculation: bool
    salts: tuple[str, ...]
    max_preemptions: int
    max_prompt_tokens: int | None
    """Most tokens of prompts beside decodes."""
    max_overtakes: int
    max_choices: int
    max_output: int
    prompts: tuple[tuple[int, ...], ...]
    """What prompts begin with, by chance."""
    max_live: int
    submit: float
    abort: float
    reset: float
    beams: float
    """Share of the requests that are beam searches."""
    poison: float
    """Probabilities a step."""
    score: float
    """Probability that a request asks for the log-probabilities of its prompt."""
    ahead: float
    """Probability that a step is scheduled while one is in flight."""


def draw_swarm(rng: random.Random) -> Swarm:
    block_size = rng.choice((1, 2, 2, 3, 4, 4, 8, 16))
    num_usable = rng.choice((4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12, 16, 63))
    pool_tokens = num_usable * block_size
    max_model_len = max(6, min(48, pool_tokens + rng.choice((-4, 0, 2, 30))))
    chunked = rng.random() < 0.75
    budget = rng.choice((1, 2, 4, 8, 16, 16, 32)) if chunked else max_model_len + rng.choice((0, 3, 16))
    max_num_seqs = rng.choice((1, 2, 3, 4, 4, 6, 8))
    config = SchedulerConfig(
        num_blocks=1 + num_usable,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        enable_prefix_caching=rng.random() < 0.85,
        enable_chunked_prefill=chunked,
        policy=rng.choice(("fcfs", "fcfs", "priority")),
        sliding_window=rng.choice((None, None, None, 2, 3, 5, 8, 16)),
        speculative_config=draw_speculation(rng),
    )
    vocab_size = rng.choice((3, 6, 20))
    most_choices = rng.choice((1, 1, 2, 4))
    return Swarm(
        config=config,
        max_preemptions=rng.choice((1, 2, 8)),
        max_prompt_tokens=rng.choice((None, None, 1, 2, 5)) if chunked else None,
        max_overtakes=rng.choice((0, 1, 2, 64)),
        vocab_size=vocab_size,
        speculation=config.speculative_config.num_speculative_tokens > 0,
        salts=rng.choice((("",), ("",), ("", "a"), ("a", "b"))),
        max_choices=most_choices if rng.random() < 0.05 else min(most_choices, max_num_seqs),
        prompts=tuple(
            tuple(rng.randrange(vocab_size) for _ in range(max_model_len)) for _ in range(rng.choice((1, 2, 3)))
        ),
        max_live=max_num_seqs + rng.choice((1, 3, 6)),
        max_output=rng.choice((4, 12, 24, 24)),
        submit=rng.choice((0.3, 0.6, 0.9)),
        abort=rng.choice((0.0, 0.02, 0.1)),
        reset=rng.choice((0.0, 0.0, 0.02)),
        beams=rng.choice((0.0, 0.0, 0.2, 0.6)),
        poison=rng.choice((0.0, 0.0, 0.03)),
        score=rng.choice((0.0, 0.0, 0.2, 0.6)),
        ahead=rng.choice((0.0, 0.0, 0.5, 1.0, 1.0)),
    )


def draw_speculation(rng: random.Random) -> SpeculativeConfig:
    """Off in a third of the swarms. Short n-grams, so that there are guesses even among 20 tokens."""
    min_ngram = rng.choice((1, 1, 2))
    return SpeculativeConfig(
        num_speculative_tokens=rng.choice((0, 1, 2, 4, 4, 8)) if rng.random() < 0.8 else 0,
        min_ngram=min_ngram,
        max_ngram=min_ngram + rng.choice((0, 2)),
    )


def draw_request(rng: random.Random, swarm: Swarm, request_id: str) -> Request:
    """Half of the prompts, and all that are scored, are prefixes of what others begin with, half of these with a tail
    of their own."""
    random_number = rng.random
    limit = min(swarm.config.max_model_len, swarm.config.max_pool_tokens)
    scored = random_number() < swarm.score
    exponent = 0.6 if scored else 1.5
    num_shared = int(limit * random_number() ** exponent) if scored or random_number() < 0.6 else 0
    num_own = 0 if num_shared and random_number() < 0.5 else 1 + int((limit - num_shared) * random_number() ** 2)
    prompt = list(rng.choice(swarm.prompts)[:num_shared])
    prompt += rng.choices(range(swarm.vocab_size), k=num_own)
    room = limit - len(prompt) if random_number() < 0.95 else limit
    max_tokens = 1 + int(min(swarm.max_output, max(room, 1)) * random_number())
    if scored and random_number() < 0.3:
        max_tokens = 0
    params = SamplingParams(
        prompt_logprobs=rng.choice((0, 1, 1, 3)) if scored else None,
        n=1 + int(swarm.max_choices * random_number()),
        max_tokens=None if random_number() < 0.1 and max_tokens else max_tokens,
        min_tokens=min(max_tokens, rng.choice((0, 0, 0, 1, 3))),
        stop_token_ids=rng.choice(((), (), (), (1,), (EOS,))),
        ignore_eos=random_number() < 0.7,
        num_speculative_tokens=rng.choice((None, None, None, 0, 3)) if swarm.speculation else 0,
    )
    stop_texts = None
    if max_tokens and random_number() < swarm.beams:
        params = draw_beam_search(rng, swarm, params)
        stop_texts = rng.choice((None, None, PairStops((0, 1)), PairStops((2, 2))))
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        seed=rng.getrandbits(2),
        eos_token_ids=(EOS,),
        priority=rng.getrandbits(2),
        cache_salt=rng.choice(swarm.salts),
        stop_texts=stop_texts,
    )


def draw_beam_search(rng: random.Random, swarm: Swarm, params: SamplingParams) -> SamplingParams:
    width = rng.randint(1, min(5, swarm.config.max_num_seqs))
    return replace(
        params,
        use_beam_search=True,
        n=rng.randint(1, width),
        best_of=width,
        length_penalty=rng.choice((0.0, 0.5, 1.0, 1.0, 2.0, -1.0)),
        early_stopping=rng.choice((False, True, "never")),
    )
