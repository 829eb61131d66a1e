"""Measure how fast this machine reads memory and multiplies matrices, as one JSON object.

    python benchmarks/measuring/rates.py --threads 2 --model path/to/model

In a process of its own, so that what measures the servers holds no torch. Each figure is the best of several calls, and
of several methods: reading is hardest to do at full speed. `read_bytes_per_s` is over memory that no cache holds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numba
import torch
import torch.nn.functional as F

from quire.kernels.linear import linear, pack

READ_BYTES = 5 * 2**28
SHAPES = ((512, 1024, 4096), (2048, 2048, 2048), (1024, 4096, 4096), (4096, 4096, 4096))
"""Rows, inner size and columns of the matrix products."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The fastest call, of all that fit into `seconds` and at least three."""
    call()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds: the median of nine."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(9):
        synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * source.numel() / statistics.median(times)


def readers(device: torch.device, num_threads: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to read READ_BYTES once; on a CPU they lie on huge pages, as far as the system has any."""
    if device.type == "cpu":
        mapped = mmap.mmap(-1, READ_BYTES)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        integers = torch.frombuffer(mapped, dtype=torch.int64).fill_(1)
    else:
        integers = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
    memory, matrix = integers.view(torch.float32), integers.view(torch.bfloat16).view(-1, 4096)
    vector = torch.ones(4096, dtype=torch.bfloat16, device=device)
    yield "sum float32", memory.sum
    yield "max float32", memory.max
    yield "sum int64", integers.sum
    yield "matrix times vector, bfloat16", lambda: matrix @ vector
    if device.type == "cpu":
        parts = [part.numpy() for part in integers.chunk(num_threads)]
        with ThreadPoolExecutor(num_threads) as pool:
            yield "sum int64, compiled", lambda: list(pool.map(_sum, parts))


@numba.njit(nogil=True)
def _sum(values):  # type: ignore[no-untyped-def]
    total = 0
    for index in range(len(values)):
        total += values[index]
    return total


def measure(num_threads: int, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, object]:
    """All methods, and the best of each kind under the names of `floors.MachineRates`."""
    torch.set_num_threads(num_threads)
    read = {name: READ_BYTES / best_seconds(call, device, seconds) for name, call in readers(device, num_threads)}
    multiply = {}
    for rows, inner, columns in SHAPES:
        left = torch.randn((rows, inner), device=device).to(dtype)
        right = torch.randn((columns, inner), device=device).to(dtype)
        spent = best_seconds(lambda left=left, right=right: F.linear(left, right), device, seconds)  # type: ignore[misc]
        multiply[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / spent
        if device.type == "cpu":
            packed = pack(right)
            spent = best_seconds(lambda left=left, packed=packed: linear(left, packed), device, seconds)  # type: ignore[misc]
            multiply[f"{rows} x {inner} x {columns}, packed"] = 2 * rows * inner * columns / spent
    return {
        "read_bytes_per_s": max(read.values()),
        "operations_per_s": max(multiply.values()),
        "num_threads": num_threads,
        "dtype": str(dtype).removeprefix("torch."),
        "read_methods": read,
        "multiply_methods": multiply,
    }


def main() -> None:
    from quire.config import EngineConfig
    from quire.engine.device import choose_device, choose_dtype, choose_kv_cache_dtype, dtype_name
    from quire.models.config import ModelConfig

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all cores)")
    parser.add_argument(
        "--model", required=True, help="directory of a checkpoint: its dtype is the one that is multiplied"
    )
    parser.add_argument("--dtype", default="auto", help="as of quire serve (default: auto)")
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time of each method (default: 0.3)")
    arguments = parser.parse_args()
    config = EngineConfig(model=arguments.model, dtype=arguments.dtype)
    device = choose_device(config)
    stored = ModelConfig.from_hf(arguments.model).checkpoint_dtype
    dtype = choose_dtype(config, stored, device)
    kv_cache_dtype = dtype_name(choose_kv_cache_dtype(config, stored, dtype, device))
    with torch.inference_mode():
        measured = measure(arguments.threads, dtype, device, arguments.seconds)
    print(json.dumps({**measured, "kv_cache_dtype": kv_cache_dtype}))


if __name__ == "__main__":
    main()
