"""Measure a step's sampling on the device at hand against a chain of torch operations that sorts.

    python benchmarks/sampling.py [--batch 1 16 64] [--output sampling.json]

Both get the same logits, are timed turn by turn in the same run, and only after they chose the same tokens. `peaked`
logits fall with the logarithm of the rank, as a language model's do; `flat` ones are normal with a deviation of 2, so
that half of the vocabulary shares the mass. `floor` is the time to read the logits once at the speed of a copy that is
measured first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measuring.rates import copy_bandwidth, synchronize
from measuring.report import write_json

from quire.kernels.log_probs import log_probs
from quire.kernels.sample import sample
from quire.kernels.token_bitmask import apply_token_bitmask

MIN_CACHE_BYTES = 2**26
"""Calls rotate over copies of the logits of this size together, so that they are not read from the cache."""

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Options:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


CASES = {
    "greedy": Options(temperature=0.0),
    "temperature": Options(temperature=0.8),
    "top_k 50": Options(top_k=50),
    "top_p 0.9": Options(top_p=0.9),
    "min_p 0.05": Options(min_p=0.05),
    "all": Options(0.8, 50, 0.9, 0.05),
}


@dataclass(frozen=True)
class Row:
    """Medians in microseconds a step."""

    name: str
    logits: str
    batch: int
    ours_us: float
    peer_us: float
    ratio: float  # peer / ours
    floor_us: float
    floor_share: float  # floor / ours


def timed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def make_logits(kind: str, batch: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    if kind == "flat":
        return torch.randn((batch, vocab_size), device=device) * 2
    rank = torch.rand((batch, vocab_size), device=device).argsort(dim=-1) + 1.0
    return 20.0 - 1.5 * rank.log() + 0.5 * torch.randn((batch, vocab_size), device=device)


def torch_chain(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """What a filter needs is skipped where it is off, as by an engine that looks at the options on the host."""
    if options.temperature == 0.0:
        return logits.max(dim=-1).indices
    logits = logits / temperature[:, None]
    if options.top_k > 0:
        kth = logits.topk(options.top_k, dim=-1).values.gather(1, (top_k - 1)[:, None])
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if options.top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True).values
        mass = ordered.double().softmax(dim=-1).cumsum(dim=-1)
        last = (mass < top_p.double()[:, None]).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        logits = logits.masked_fill(logits < ordered.gather(1, last), -torch.inf)
    if options.min_p > 0.0:
        threshold = logits.max(dim=-1, keepdim=True).values + min_p.log()[:, None]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def sampling_pair(options: Options, batch: int, device: torch.device) -> tuple[Call, Call]:
    def filled(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    uniform = torch.rand(batch, dtype=torch.float64, device=device)
    arguments = (
        filled(options.temperature),
        filled(options.top_k, torch.int64),
        filled(options.top_p),
        filled(options.min_p),
        uniform,
    )
    return lambda logits: sample(logits, *arguments), lambda logits: torch_chain(logits, *arguments, options)


def log_probs_pair(batch: int, vocab_size: int, device: torch.device) -> tuple[Call, Call]:
    token_ids = torch.randint(vocab_size, (batch,), device=device)

    def peer(logits: torch.Tensor) -> torch.Tensor:
        normalised = logits.log_softmax(dim=-1)
        normalised.gather(1, token_ids[:, None])
        return normalised.topk(20, dim=-1).indices

    return lambda logits: log_probs(logits, token_ids, 20)[1], peer


def bitmask_pair(batch: int, vocab_size: int, device: torch.device) -> tuple[Call, Call]:
    """Nine tenths of the words forbid all of their tokens, as a grammar does."""
    words = torch.randint(-(2**31), 2**31, (batch, -(-vocab_size // 32)), dtype=torch.int32, device=device)
    words[torch.rand(words.shape, device=device) < 0.9] = 0
    rows = torch.arange(batch, device=device)
    shifts = torch.arange(32, dtype=torch.int32, device=device)

    def ours(logits: torch.Tensor) -> torch.Tensor:
        apply_token_bitmask(logits, words, rows)
        return logits

    def peer(logits: torch.Tensor) -> torch.Tensor:
        forbidden = ((words[:, :, None] >> shifts) & 1 == 0).flatten(1)[:, :vocab_size]
        return logits.masked_fill_(forbidden, -torch.inf)

    return ours, peer


def measure(calls: tuple[Call, Call], copies: list[torch.Tensor], device: torch.device, seconds: float) -> list[float]:
    """Medians in seconds of both, turn by turn for about `seconds`, after checking that they agree."""
    results = [call(copies[0].clone()) for call in calls]
    if not torch.equal(*results):
        raise SystemExit("ours and the peer chose different tokens")
    times: list[list[float]] = [[], []]
    deadline = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < deadline or turn < 3:
        for call, measured in zip(calls, times, strict=True):
            number = max(1, min(20, int(0.005 / measured[-1]))) if measured else 1
            chosen = [copies[(turn + i) % len(copies)] for i in range(number)]
            elapsed = timed(lambda call=call, chosen=chosen: [call(logits) for logits in chosen], device)  # type: ignore[misc]
            measured.append(elapsed / number)
        turn += 1
    return [statistics.median(measured) for measured in times]


def cases(batch: int, vocab_size: int, device: torch.device) -> Iterator[tuple[str, str, tuple[Call, Call]]]:
    for kind in ("peaked", "flat"):
        for name, options in CASES.items():
            yield name, kind, sampling_pair(options, batch, device)
    yield "log_probs 20", "peaked", log_probs_pair(batch, vocab_size, device)
    yield "bitmask", "peaked", bitmask_pair(batch, vocab_size, device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="threads of both on a CPU (default: as many as torch takes)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of each case (default 1)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON to this file")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if arguments.device == "cuda" or (arguments.device == "auto" and has_gpu) else "cpu")
    torch.manual_seed(0)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    bandwidth = copy_bandwidth(device)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "vocab_size": arguments.vocab_size,
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    columns = f"{'ours us':>10} {'peer us':>11} {'ratio':>7} {'floor us':>9} {'of floor':>8}"
    print(f"{'case':14} {'logits':7} {'batch':>5} {columns}")
    rows = []
    with torch.inference_mode():
        for batch in arguments.batch:
            num_bytes = batch * arguments.vocab_size * 4
            num_copies = max(1, -(-MIN_CACHE_BYTES // num_bytes))
            for name, kind, calls in cases(batch, arguments.vocab_size, device):
                copies = [make_logits(kind, batch, arguments.vocab_size, device) for _ in range(num_copies)]
                ours, peer = measure(calls, copies, device, arguments.seconds)
                floor = num_bytes / bandwidth
                row = Row(name, kind, batch, ours * 1e6, peer * 1e6, peer / ours, floor * 1e6, floor / ours)
                rows.append(row)
                print(
                    f"{name:14} {kind:7} {batch:5} {row.ours_us:10.1f} {row.peer_us:11.1f} {row.ratio:7.1f}"
                    f" {row.floor_us:9.1f} {row.floor_share:8.0%}",
                    flush=True,
                )
    if arguments.output is not None:
        write_json(arguments.output, {"rows": [asdict(row) for row in rows]}, **facts)


if __name__ == "__main__":
    main()
