"""Linear layers and whole models on weights of 8 and 4 bits, beside the packed bfloat16 ones.

    python benchmarks/quantization.py [--threads 1] [--json FILE]
    python benchmarks/quantization.py --model DIR [--text FILE] [--threads 1] [--json FILE]

Without a model: microseconds a call of a layer, in turn, over copies that no cache holds. With one: tokens a second of
a single greedy stream, in turn, and with a text its perplexity. Medians; `best` is the fastest round, which counts on a
machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quire import LLM, SamplingParams
from quire.kernels.cpu_recording import Arena, Recording, record
from quire.kernels.linear import linear, pack
from quire.kernels.quantized_linear import quantize, quantized_linear

IN_FEATURES, OUT_FEATURES = 1024, 4096
NUM_COPIES = 24  # 200 MB of bfloat16, 53 MB of 4 bits
NUM_TOKENS = 48


def recorded(call: Callable[[int], torch.Tensor]) -> Recording:
    call(0)
    with record(Arena()) as recording:
        for copy in range(NUM_COPIES):
            call(copy)
    return recording


def measured_layers(num_threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    weights = [torch.randn(OUT_FEATURES, IN_FEATURES).bfloat16() for _ in range(NUM_COPIES)]
    packed = [pack(weight) for weight in weights]
    rounded = {f"int{bits}": [quantize(weight, bits) for weight in weights] for bits in (8, 4)}
    num_bytes = {"bfloat16": packed[0].data.nbytes} | {name: copies[0].num_bytes for name, copies in rounded.items()}
    results = []
    for num_rows in (1, 4, 16, 64, 256):
        x = torch.randn(num_rows, IN_FEATURES).bfloat16()
        recordings = {"bfloat16": recorded(lambda copy, x=x: linear(x, packed[copy]))}
        for name, copies in rounded.items():
            recordings[name] = recorded(lambda copy, x=x, copies=copies: quantized_linear(x, copies[copy]))
        times: dict[str, list[float]] = {name: [] for name in recordings}
        for _ in range(rounds if num_rows < 64 else max(3, rounds // 4)):
            for name, recording in recordings.items():
                started = time.perf_counter()
                recording.replay(num_threads)
                times[name].append((time.perf_counter() - started) / NUM_COPIES)
        for name, seconds in times.items():
            median, best = statistics.median(seconds), min(seconds)
            ratio, best_ratio = statistics.median(times["bfloat16"]) / median, min(times["bfloat16"]) / best
            print(
                f"{num_rows:4} rows {name:9} {median * 1e6:8.0f} us  best {best * 1e6:8.0f} us  "
                f"{num_bytes[name] / best / 1e9:5.1f} GB/s  x {ratio:.2f}, best {best_ratio:.2f}",
                flush=True,
            )
            results.append({"rows": num_rows, "weights": name, "median_us": median * 1e6, "best_us": best * 1e6})
    return results


def measured_models(model: Path, text: str | None, num_threads: int, rounds: int) -> list[dict[str, Any]]:
    options = {"num_threads": num_threads, "max_num_seqs": 4, "device": "cpu", "dtype": "bfloat16"}
    llms = {name: LLM(model, quantization=name, **options) for name in (None, "int8", "int4")}
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    rates: dict[str | None, list[float]] = {name: [] for name in llms}
    for index in range(rounds):
        for name, llm in llms.items():
            started = time.perf_counter()
            llm.generate([[5, 6, 7 + index]], params)
            rates[name].append(NUM_TOKENS / (time.perf_counter() - started))
    results = []
    for name, llm in llms.items():
        perplexity = None if text is None else llm.perplexity(text).perplexity
        median, best = statistics.median(rates[name]), max(rates[name])
        print(f"{name or 'bfloat16':9} {median:7.1f} tokens/s  best {best:7.1f}  perplexity {perplexity}")
        print(f"          {llm.info.memory_budget[0]}")
        results.append({"weights": name, "tokens_per_s": median, "best_tokens_per_s": best, "perplexity": perplexity})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="directory of a checkpoint (default: layers alone)")
    parser.add_argument("--text", type=Path, help="file whose first 50,000 characters are scored")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="of each, in turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.model is None:
        results = measured_layers(arguments.threads, arguments.rounds)
    else:
        text = None if arguments.text is None else arguments.text.read_text()[:50_000]
        results = measured_models(arguments.model, text, arguments.threads, arguments.rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
