"""The prefill kernel in Gluon on the GPU at hand: whether it runs and is right there, and how fast it is.

It was written without a GPU. What can go wrong with barriers is that a kernel never ends, and a wrong address ends a
process, so it is tried in a process of its own, which may be killed:

    python -m measuring.gpu_gluon        prints a line of JSON for each check
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from measuring import gpu_cascade, gpu_cases, gpu_peers
from measuring.gpu_cases import FULL, Case, Goal, Scale
from measuring.gpu_parity import Check, checked
from measuring.gpu_peers import Paged
from measuring.gpu_timing import Call
from quire.kernels.backend import Backend
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.paged_prefill.parameters import GLUON_LAUNCH, fits_gluon, gluon_parameters, prefill_parameters
from quire.kernels.paged_prefill.triton import launch
from quire.kernels.targets import current_target

BENCHMARKS = Path(__file__).resolve().parents[1]
CHECKS = (sys.executable, "-m", "measuring.gpu_gluon")


def attempt(device: torch.device, seconds: float = 120.0, command: Sequence[str] = CHECKS) -> tuple[list[Check], str]:
    """The checks that were made, and in one line why the kernel is not to be used; nothing if it is."""
    if device.type != "cuda" or current_target(device).arch != 90:
        return [], "it is for Hopper only"
    return attempt_in_process(seconds, command)


def attempt_in_process(seconds: float, command: Sequence[str]) -> tuple[list[Check], str]:
    try:
        found = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [], f"it did not end within {seconds:.0f} s"
    checks = [Check(**json.loads(line)) for line in found.stdout.splitlines() if line.startswith("{")]
    wrong = [check.name for check in checks if not check.passed]
    if found.returncode != 0:
        why = found.stderr.strip().splitlines()[-1:] or [f"exit code {found.returncode}"]
        return checks, f"it failed: {why[0]}"
    return checks, f"it is wrong: {', '.join(wrong)}" if wrong else "" if checks else "nothing was checked"


def checks(device: torch.device) -> Iterator[Check]:
    """Against the reference: all sizes of heads, pages smaller and larger than a tile, lengths at and off borders."""
    for head_dim, (block_n, num_slots) in GLUON_LAUNCH.items():
        scale = replace(FULL, head_dim=head_dim, num_heads=8, num_kv_heads=2)
        for block_size in (16, 64, 256):
            for query_len, lens in ((48, (48, 300, 1024)), (257, (257, 3000))):
                (p, *_) = gpu_cases.paged_problems(scale, query_len, lens, block_size, device)
                gluon = partial(gluon_call, p, block_n, num_slots)
                name = f"prefill in Gluon, head {head_dim}, page {block_size}, {query_len} new of {max(lens)}"
                yield checked(name, partial(_prefill, p, gluon), 1e-2, "triton")


def _prefill(p: Paged, gluon: Callable[[torch.Tensor], Call], backend: Backend) -> torch.Tensor:
    """By the kernel in Gluon, or by the reference."""
    if backend == "reference":
        tables = p.block_tables, p.seq_lens, p.query_start
        return paged_prefill(p.query, p.k_cache, p.v_cache, *tables, p.scale, p.query_len, backend="reference")
    found = torch.full_like(p.query, float("nan"))
    gluon(found)()
    return found


def gluon_call(p: Paged, block_n: int, num_slots: int, out: torch.Tensor | None = None) -> Call:
    """Whether or not a launch table has it."""
    out, target = torch.empty_like(p.query) if out is None else out, current_target(p.query.device)
    group_size = p.query.shape[1] // p.k_cache.shape[1]
    reasoned = prefill_parameters(p.query.dtype, p.query.shape[2], group_size, p.query_len, target)
    if not fits_gluon(reasoned, p.query, p.k_cache, p.query_len, None, target):
        raise ValueError("the kernel in Gluon does not compute this")
    parameters, starts = gluon_parameters(reasoned, block_n, num_slots), p.query_start
    return lambda: launch(
        *(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, starts, p.scale, None, out, None, None),
        parameters,
    )


def cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Beside the kernel in Triton, on the pages that most peers want and on ours."""
    query_len, lens = scale.length(8192), [scale.length(8192)] * scale.batch(4)
    sizes = scale, query_len, lens
    for block_size in (64, 16):
        problems = gpu_cases.paged_problems(scale, query_len, lens, block_size, device)
        calls = [gluon_call(problem, *GLUON_LAUNCH[scale.head_dim]) for problem in problems]
        peers = {"ours in Triton": [gpu_cascade.in_whole_tiles(problem) for problem in problems]}
        peers |= gpu_peers.attention(problems)
        goals = (Goal("tflops", 430, 620), Goal("ratio", 0.65, 0.93, "FlashAttention-3"))
        name = f"5 prefill in Gluon, 4 x 8192, page {block_size}"
        yield Case(name, calls, peers, gpu_cases.attention_bytes(*sizes), gpu_cases.attention_flops(*sizes), goals)


if __name__ == "__main__":
    with torch.inference_mode():
        for check in checks(torch.device("cuda")):
            print(json.dumps(asdict(check)), flush=True)
