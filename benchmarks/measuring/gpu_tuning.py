"""Which launches of a kernel are worth trying on a GPU, and which of them is the fastest that is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from measuring import gpu_gluon
from measuring.gpu_cases import Scale, paged_problems, with_codes
from measuring.gpu_peers import Paged
from measuring.gpu_timing import Call, Replay, medians
from quire.kernels import launch_tables
from quire.kernels.launch_tables import Entry
from quire.kernels.paged_decode import parameters as decode
from quire.kernels.paged_decode import triton as triton_decode
from quire.kernels.paged_prefill import parameters as prefill
from quire.kernels.paged_prefill import triton as triton_prefill
from quire.kernels.targets import current_target

Launch = Mapping[str, int]

WORTH = 0.97
"""A launch is kept if it takes at most this share of the time that the kernel's own rules take."""
TOLERANCE = 0.02
"""Of a result, against that of the kernel's own rules: sums in another order, rounded to bfloat16."""

CANDIDATES = {
    "paged_decode": {
        "block_n": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "resident_programs": (1, 2, 3),
    },
    "paged_prefill": {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "gluon_prefill": {"block_n": (64, 128), "num_slots": (4, 5, 6, 8, 10)},
}
REHEARSED = {
    "paged_decode": {"block_n": (16, 32), "num_warps": (4,), "num_stages": (2,), "resident_programs": (1,)},
    "paged_prefill": {"block_m": (16,), "block_n": (16, 32), "num_warps": (4,), "num_stages": (2,)},
}


@dataclass(frozen=True)
class Tuned:
    """One kernel and case of a table; `call` launches it on a problem, or by its own rules if nothing is chosen."""

    kernel: str
    case: str
    problems: list[Paged]
    outputs: list[torch.Tensor]
    call: Callable[[Paged, torch.Tensor, Launch], Call]

    def calls(self, launch: Launch) -> list[Call]:
        return [self.call(p, out, launch) for p, out in zip(self.problems, self.outputs, strict=True)]


def candidates(kernel: str, rehearse: bool) -> list[Launch]:
    options = (REHEARSED if rehearse else CANDIDATES)[kernel]
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _call_decode(p: Paged, out: torch.Tensor, launch: Launch) -> Call:
    _, num_heads, head_dim = p.query.shape
    num_seqs, max_seq_len = len(p.host_seq_lens), p.block_tables.shape[1] * p.k_cache.shape[2]
    sizes = (head_dim, num_heads, p.k_cache.shape[1], num_seqs, max_seq_len)
    chosen = decode.plan(p.query.dtype, *sizes, None, current_target(p.query.device), launch)
    return lambda: triton_decode.launch(
        *(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, p.scale, None, out),
        *(p.k_scales, p.v_scales, chosen),
    )


def _call_prefill(p: Paged, out: torch.Tensor, launch: Launch) -> Call:
    group_size, sizes = p.query.shape[1] // p.k_cache.shape[1], (p.query_len, current_target(p.query.device))
    reasoned = prefill.prefill_parameters(p.query.dtype, p.query.shape[2], group_size, *sizes, p.k_cache.dtype)
    chosen, starts = replace(reasoned, **launch), p.query_start
    return lambda: triton_prefill.launch(
        *(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, starts, p.scale, None, out),
        *(p.k_scales, p.v_scales, chosen),
    )


def _call_gluon(p: Paged, out: torch.Tensor, launch: Launch, other: Launch) -> Call:
    """The kernel in Gluon; without `launch` the one in Triton, as `other` says."""
    return gpu_gluon.gluon_call(p, **launch, out=out) if launch else _call_prefill(p, out, other)


def cases(
    scale: Scale, device: torch.device, found: Mapping[str, Mapping[str, Entry]], *, has_gluon: bool
) -> Iterator[Tuned]:
    """Decodes of 64 sequences of 4096 tokens and prompts of 4096, by head and by kind of page.

    `found` is asked for what was measured before: the kernel in Gluon is to be faster than the other at its best.
    """
    target = current_target(device)
    kinds = (None, torch.int8, *([] if target.fp8 is None else [target.fp8]))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter is wrong in bfloat16
    long = scale.length(4096)
    for kernel, query_len, batch, call in (
        ("paged_decode", 1, scale.batch(64), _call_decode),
        ("paged_prefill", long, scale.batch(4), _call_prefill),
    ):
        for head_dim in (64, 128) if scale.divisor == 1 else (scale.head_dim,):
            sized = replace(scale, head_dim=head_dim)
            for pages in kinds:
                problems = paged_problems(sized, query_len, [long] * batch, 16, device, dtype)
                if pages is not None:
                    problems = [with_codes(p, pages) for p in problems]
                outputs = [torch.empty_like(p.query) for p in problems]
                name = launch_tables.case(dtype, head_dim, problems[0].k_cache.dtype)
                yield Tuned(kernel, name, problems, outputs, call)
                if has_gluon and kernel == "paged_prefill" and pages is None:
                    entry = found.get(kernel, {}).get(name)
                    other = {} if entry is None else entry.launch
                    yield Tuned("gluon_prefill", name, problems, outputs, partial(_call_gluon, other=other))


def best_launch(tuned: Tuned, device: torch.device, rehearse: bool, seconds: float) -> tuple[Launch, float, float]:
    """The fastest launch that gives the right result, or nothing, and the seconds of both."""
    reasoned = Replay(tuned.calls({}), device)
    expected = [out.clone() for out in tuned.outputs]
    reasoned_seconds = medians({"reasoned": reasoned}, seconds)["reasoned"]
    best: tuple[Launch, float, float] = ({}, reasoned_seconds, reasoned_seconds)
    for launch in candidates(tuned.kernel, rehearse):
        for out in tuned.outputs:
            out.fill_(float("nan"))
        try:
            replay = Replay(tuned.calls(launch), device)
        except Exception:  # it does not fit: shared memory, registers, or the compiler gives up
            continue
        if not all(_is_close(out, right) for out, right in zip(tuned.outputs, expected, strict=True)):
            continue
        times = medians({"reasoned": reasoned, "candidate": replay}, seconds)
        if times["candidate"] <= WORTH * times["reasoned"] and times["candidate"] < best[1]:
            best = launch, times["candidate"], times["reasoned"]
    return best


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found.float() - expected.float()).abs() <= TOLERANCE * (1 + expected.float().abs())).all())
