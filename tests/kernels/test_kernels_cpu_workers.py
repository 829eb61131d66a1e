"""How the CPU kernels read elements, share work among threads and keep compiled code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba import types

from quire.kernels import cpu_elements, cpu_workers
from quire.kernels.cpu_elements import emitted, float32_pointer, int64_pointer, move, pointer_to, read, take, write
from quire.kernels.cpu_workers import Worker

HALVES = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)  # every bit pattern of 16 bits


@emitted(lambda bits: types.float32)
def widen_half(builder: Any, kinds: Any, bits: Any) -> Any:
    short = builder.trunc(bits, cpu_elements._I16)
    return cpu_elements.widen_half_bits(builder, short)


@emitted(lambda value: types.int64)
def narrow_half(builder: Any, kinds: Any, value: Any) -> Any:
    return builder.zext(cpu_elements.narrow_half_bits(builder, value), cpu_elements.I64)


def _widen(shared: Any) -> None:
    """parameters: the number of elements, where they are, where to put them as float32."""
    parameters = int64_pointer(shared)
    source, target = pointer_to(parameters[1], shared), float32_pointer(parameters[2])
    for i in range(parameters[0]):
        target[i] = read(source, i)


def _narrow(shared: Any) -> None:
    parameters = int64_pointer(shared)
    source, target = float32_pointer(parameters[1]), pointer_to(parameters[2], shared)
    for i in range(parameters[0]):
        write(target, i, source[i])


def _count(shared: Any) -> None:
    """parameters: a ticket, the number of tickets, where to count each; a ticket takes a while."""
    parameters = int64_pointer(shared)
    counts = int64_pointer(parameters[2])
    ticket = take(parameters)
    while ticket < parameters[1]:
        for _ in range(1000):
            take(move(counts, ticket))
        ticket = take(parameters)


def convert(body: Callable[[Any], None], dtype: torch.dtype, source: torch.Tensor, target: torch.Tensor) -> None:
    parameters = np.array([source.numel(), source.data_ptr(), target.data_ptr()])
    Worker(body).run(dtype, parameters, 1)


def floats_between(dtype: torch.dtype) -> torch.Tensor:
    """Every number of `dtype`, those halfway between neighbours, and their float32 neighbours."""
    exact = HALVES.view(dtype).float()
    exact = exact[exact.isfinite()].sort().values.double()
    halfway = ((exact[1:] + exact[:-1]) / 2).float()
    past = torch.tensor([65519.0, 65520.0, 65521.0, 70000.0, 1e6, 3.4e38, float("inf")])
    values = torch.cat([exact.float(), halfway, past, -past, torch.tensor([0.0, -0.0, float("nan")])])
    infinity = torch.tensor(float("inf"))
    return torch.cat([values, torch.nextafter(values, infinity), torch.nextafter(values, -infinity)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reads_every_element(dtype: torch.dtype) -> None:
    result = torch.empty(HALVES.shape)
    convert(_widen, dtype, HALVES, result)
    assert torch.equal(
        result.view(torch.int32)[~result.isnan()], HALVES.view(dtype).float().view(torch.int32)[~result.isnan()]
    )
    assert torch.equal(result.isnan(), HALVES.view(dtype).isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_as_torch_does(dtype: torch.dtype) -> None:
    values = floats_between(dtype)
    result = torch.empty(values.shape, dtype=dtype)
    convert(_narrow, dtype, values, result)
    expected = values.to(dtype)
    known = ~values.isnan()
    assert torch.equal(result.view(torch.int16)[known], expected.view(torch.int16)[known])
    assert result[~known].isnan().all()


def test_float16_without_the_instructions() -> None:
    """As older x86 machines have it: LLVM would call a function there that the process does not have."""

    @numba.njit
    def widen_all(bits: Any, result: Any) -> None:
        for i in range(bits.size):
            result[i] = widen_half(bits[i])

    @numba.njit
    def narrow_all(values: Any, result: Any) -> None:
        for i in range(values.size):
            result[i] = narrow_half(values[i])

    wide = torch.empty(HALVES.shape)
    widen_all(HALVES.numpy(), wide.numpy())
    expected = HALVES.view(torch.float16).float()
    assert torch.equal(wide.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(wide.isnan(), expected.isnan())
    values = floats_between(torch.float16)
    bits = torch.empty(values.shape, dtype=torch.int64)
    narrow_all(values.numpy(), bits.numpy())
    result, known = bits.to(torch.int16).view(torch.float16), ~values.isnan()
    assert torch.equal(result.view(torch.int16)[known], values.half().view(torch.int16)[known])
    assert result[~known].isnan().all()


def test_every_ticket_is_taken_once() -> None:
    worker = Worker(_count)
    for num_threads in (1, 2, 7):
        counts = torch.zeros(100, dtype=torch.int64)
        worker.run(torch.float32, np.array([0, 100, counts.data_ptr()]), num_threads)
        assert counts.tolist() == [1000] * 100


def test_compiled_code_is_found_again() -> None:
    def hits(dtype: torch.dtype) -> int:
        _, body = Worker(_count).compile(dtype)
        return int(body.cache_hits)

    assert hits(torch.float16) + hits(torch.float16) >= 1
    assert hits(torch.float32) == 1


def test_a_full_disk_only_costs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_callback = numba.cfunc

    def disk_full(signature: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise OSError(28, "No space left on device")
        return compile_callback(signature, **options)

    monkeypatch.setattr(numba, "cfunc", disk_full)
    counts = torch.zeros(3, dtype=torch.int64)
    Worker(_count).run(torch.float32, np.array([0, 3, counts.data_ptr()]), 1)
    assert counts.tolist() == [1000] * 3


def test_only_what_had_to_be_compiled_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Worker(_count).compile(torch.float32)
    caplog.clear()
    caplog.set_level("INFO")
    Worker(_count).compile(torch.float32)
    assert not caplog.messages
    monkeypatch.setattr(cpu_workers, "_writable_cache_directory", lambda: "")
    Worker(_count).compile(torch.float32)
    (message,) = caplog.messages
    assert re.fullmatch(r"Compiled \S*test_kernels_cpu_workers for float32 in \d+\.\d s\.", message)


RUN_ALONE = """
import sys
import torch
from quire.kernels import cpu_workers
from quire.kernels.rope.cpu import rope

torch.set_num_threads(2)
if sys.argv[1] == "without OpenMP":
    cpu_workers._fork_join = lambda: 0
query = torch.randn(600, 4, 64)
first, second = query.clone(), query.clone()
table = torch.cat((torch.full((1, 32), 0.6), torch.full((1, 32), 0.8)), dim=1)
rope(first, second, torch.zeros(600, dtype=torch.int64), table)
expected = torch.cat((query[..., :32] * 0.6 - query[..., 32:] * 0.8, query[..., 32:] * 0.6 + query[..., :32] * 0.8), -1)
assert torch.allclose(first, expected) and torch.equal(first, second)
if sys.platform == "linux" and sys.argv[1] != "without OpenMP":
    loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line}
    assert len(loaded) == 1, f"more than one OpenMP runtime: {loaded}"
print(cpu_workers._writable_cache_directory() or "no cache")
"""


def run_alone(situation: str, cache_home: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", RUN_ALONE, situation]
    environment = {"XDG_CACHE_HOME": str(cache_home), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_threads_are_the_only_ones(tmp_path: Path) -> None:
    """One OpenMP runtime in the process; compiled code is kept where the user's caches are."""
    directory = Path(run_alone("on torch's threads", tmp_path))
    assert directory.is_relative_to(tmp_path)
    assert list(directory.rglob("*.nbc"))


def test_without_openmp_and_without_a_place_for_compiled_code(tmp_path: Path) -> None:
    """The worst machine: numba's own threads, and a cache directory that cannot be made."""
    not_a_directory = tmp_path / "file"
    not_a_directory.touch()
    assert run_alone("without OpenMP", not_a_directory) == "no cache"


def test_the_cache_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba would not see a change in a file that a kernel's file imports."""
    before = cpu_workers._writable_cache_directory()
    read_bytes = Path.read_bytes
    changed = "cpu_lanes.py"
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b" " * (path.name == changed))
    after = cpu_workers._writable_cache_directory.__wrapped__()
    assert Path(before).parent == Path(after).parent
    assert before != after
    Path(after).rmdir()
