"""Time beam search against as many separate sampled requests, and against transformers' `generate(num_beams=...)`.

    python benchmarks/beams.py [--model DIR] [--json beams.json]

All three compute `width` sequences of 128 tokens after the same prompt, in float32, turn by turn in one process. The
milliseconds of a step are CPU time, which the neighbours on the machine hardly change: the median of a run's steps
without its prompt, and of the rounds. Pages are the most in use at the end of a step, without prefix caching: the
separate requests share none.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from quire.engine.llm import LLM
from quire.sampling_params import SamplingParams
from quire.tales import MODEL_DIR

NUM_OUTPUT_TOKENS = 128
MAX_MODEL_LEN = 512


@dataclass(frozen=True)
class Measured:
    """One run."""

    step_ms: float
    peak_pages: int
    token_ids: list[int]
    """Of the first choice."""


def median_ms(stamps: list[float]) -> float:
    """Between steps that are stamped at their ends; the first, which computes the prompt, only begins."""
    return 1e3 * statistics.median(after - before for before, after in pairwise(stamps))


def run_quire(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> Measured:
    engine = llm._engine
    stamps: list[float] = []
    pages: list[int] = []
    step = engine.step

    def stamped() -> Any:
        outputs = step()
        stamps.append(time.process_time())
        pages.append(engine.stats().num_used_blocks)
        return outputs

    engine.step = stamped  # type: ignore[method-assign]
    try:
        results = llm.generate(prompts, params)
    finally:
        engine.step = step  # type: ignore[method-assign]
    if any(len(result.outputs[0].token_ids) != NUM_OUTPUT_TOKENS for result in results):
        raise SystemExit("A sequence ended early.")
    return Measured(median_ms(stamps), max(pages), results[0].outputs[0].token_ids)


def run_beams(llm: LLM, prompt: list[int], width: int) -> Measured:
    params = SamplingParams(n=width, use_beam_search=True, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    return run_quire(llm, [prompt], [params])


def run_separate(llm: LLM, prompt: list[int], width: int) -> Measured:
    params = [SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, seed=seed) for seed in range(width)]
    return run_quire(llm, [prompt] * width, params)


class Stamps(transformers.StoppingCriteria):
    """Never stops; it is asked at the end of each step."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.stamps.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)  # type: ignore[return-value]


def run_peer(model: Any, prompt: list[int], width: int) -> Measured:
    """Its pages are not counted: it has none."""
    ids, stamps = torch.tensor([prompt]), Stamps()
    config = transformers.GenerationConfig(
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=NUM_OUTPUT_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.inference_mode():
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([stamps]),
        )
    token_ids = tokens[0, len(prompt) :].tolist()
    if len(token_ids) != NUM_OUTPUT_TOKENS:
        raise SystemExit("transformers ended early.")
    return Measured(median_ms(stamps.stamps), 0, token_ids)


def make_prompt(llm: LLM, num_tokens: int) -> list[int]:
    """What the model itself writes."""
    start = llm.tokenizer.encode("Once upon a time")
    (result,) = llm.generate([start], SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1))
    return (start + result.outputs[0].token_ids)[:num_tokens]


def measure(runs: dict[str, Callable[[], Measured]], rounds: int, advance: Callable[[], None]) -> dict[str, Any]:
    measured: dict[str, list[Measured]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            measured[name].append(run())
            advance()
    figures: dict[str, Any] = {
        f"{name}_ms": round(statistics.median(each.step_ms for each in several), 3)
        for name, several in measured.items()
    }
    for name in ("separate", "transformers"):
        ratios = [ours.step_ms / other.step_ms for ours, other in zip(measured["beams"], measured[name], strict=True)]
        figures[f"beams_to_{name}"] = round(statistics.median(ratios), 3)
    figures["beams_pages"] = measured["beams"][0].peak_pages
    figures["separate_pages"] = measured["separate"][0].peak_pages
    figures["same_tokens_as_transformers"] = measured["beams"][0].token_ids == measured["transformers"][0].token_ids
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a checkpoint (default: the bundled model)")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads of all three (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    llm = LLM(
        args.model,
        dtype="float32",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max(args.widths),
        num_blocks=2048,
        num_threads=args.num_threads,
        enable_prefix_caching=False,
    )
    directory = args.model or MODEL_DIR
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    peer.generation_config = transformers.GenerationConfig(pad_token_id=0)
    results: dict[str, Any] = {}
    cases = [(length, width) for length in args.prompt_lengths for width in args.widths]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("measuring", total=len(cases) * args.rounds * 3)
        for length, width in cases:
            prompt = make_prompt(llm, length)
            runs = {
                "beams": lambda prompt=prompt, width=width: run_beams(llm, prompt, width),
                "separate": lambda prompt=prompt, width=width: run_separate(llm, prompt, width),
                "transformers": lambda prompt=prompt, width=width: run_peer(peer, prompt, width),
            }
            figures = results[f"prompt {length}, width {width}"] = measure(
                runs, args.rounds, lambda: progress.advance(bar)
            )
            print(f"prompt {length}, width {width}: {figures}", flush=True)
    if args.json:
        about = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "num_threads": args.num_threads,
            "rounds": args.rounds,
        }
        args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
