"""From what happened to each request to the figures of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise


@dataclass(slots=True)
class Record:
    """One request of a run. Times in seconds on one clock."""

    num_prompt_tokens: int
    num_expected_tokens: int
    sent: float = 0.0
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    """When each streamed piece of text came. A server that holds back half characters sends fewer than tokens."""
    num_output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one run; failed requests count in `failed` only.

    TTFT: sent to first piece. ITL: gap between two pieces. TPOT: (last - first piece) / (tokens - 1) of a request.
    E2E: sent to the end. A latency is None if no request has it.
    """

    requests: int
    failed: int
    short: int
    """Requests that ended with another number of tokens than asked for."""
    wall_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt and output."""
    requests_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    e2e_p50_ms: float | None
    e2e_p99_ms: float | None
    pieces_per_token: float
    errors: list[str]


RATES = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s")
"""Figures of which more is better; of the latencies less is."""
LATENCIES = tuple(f"{name}_p{q}_ms" for name in ("ttft", "itl", "tpot", "e2e") for q in (50, 99))


def percentile(values: Iterable[float], share: float) -> float | None:
    """With linear interpolation between neighbours, as numpy's default; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * share
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(records: Sequence[Record], wall: float) -> Summary:
    """Figures of a run that took `wall` seconds."""
    good = [record for record in records if record.error is None]
    latencies = {
        "ttft": [record.pieces[0] - record.sent for record in good if record.pieces],
        "itl": [after - before for record in good for before, after in pairwise(record.pieces)],
        "tpot": [
            (record.pieces[-1] - record.pieces[0]) / (record.num_output_tokens - 1)
            for record in good
            if record.num_output_tokens > 1 and len(record.pieces) > 1
        ],
        "e2e": [record.ended - record.sent for record in good],
    }
    num_prompt = sum(record.num_prompt_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    return Summary(
        requests=len(records),
        failed=len(records) - len(good),
        short=sum(record.num_output_tokens != record.num_expected_tokens for record in good),
        wall_s=wall,
        prompt_tokens=num_prompt,
        output_tokens=num_output,
        output_tokens_per_s=num_output / wall,
        total_tokens_per_s=(num_prompt + num_output) / wall,
        requests_per_s=len(good) / wall,
        pieces_per_token=sum(len(record.pieces) for record in good) / max(num_output, 1),
        errors=sorted({record.error for record in records if record.error is not None})[:3],
        **{
            f"{name}_p{q}_ms": None if (value := percentile(values, q / 100)) is None else value * 1e3
            for name, values in latencies.items()
            for q in (50, 99)
        },
    )


def from_json(figures: dict[str, object]) -> Summary:
    """Figures that another program measured; those that it leaves out are 0 or None.

    Raises:
        SystemExit: a figure that everything else is compared by is missing.
    """
    missing = {"output_tokens_per_s", "wall_s"} - figures.keys()
    if missing:
        raise SystemExit(
            f"An in-process peer wrote no {', '.join(sorted(missing))}; see --help for the JSON it writes."
        )
    defaults: dict[str, object] = {
        each.name: None if each.name in LATENCIES else [] if each.name == "errors" else 0 for each in fields(Summary)
    }
    return Summary(**{name: figures.get(name, default) for name, default in defaults.items()})  # type: ignore[arg-type]


def medians(runs: Sequence[Summary]) -> dict[str, float | None]:
    """The median of each rate and latency over the runs that have it."""
    result: dict[str, float | None] = {}
    for name in (*RATES, *LATENCIES):
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        result[name] = statistics.median(values) if values else None
    return result


def speedup(name: str, ours: float | None, other: float | None) -> float | None:
    """How many times better `ours` is than `other`: 2.0 is twice the rate, or half of the time."""
    if not ours or not other:
        return None
    return ours / other if name in RATES else other / ours
