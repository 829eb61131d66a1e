"""Recordings of CPU kernels: the same results as one by one, memory of their own, and nothing left out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch

from quire.kernels.cpu_elements import int64_pointer, take
from quire.kernels.cpu_recording import Arena, NotRecordableError, record
from quire.kernels.cpu_replay import range_ahead
from quire.kernels.cpu_sized_recording import Sizes, Step, record_for_sizes
from quire.kernels.cpu_workers import ALONE, Worker
from quire.kernels.linear import PackedWeight, linear, pack
from quire.kernels.paged_decode import paged_decode
from quire.kernels.rms_norm import rms_norm
from quire.kernels.take_rows import take_rows


def chain(x: torch.Tensor, weights: list[PackedWeight], norm: torch.Tensor) -> torch.Tensor:
    residual = x
    for weight in weights:
        x = linear(rms_norm(x, norm, 1e-6), weight, activation="silu")
    return rms_norm(x, norm, 1e-6, residual)


@pytest.fixture(autouse=True)
def five_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_replay_does_what_its_kernels_do(num_threads: int) -> None:
    torch.manual_seed(1)
    weights, norm = [pack(torch.randn(96, 96) / 8) for _ in range(20)], torch.rand(96)
    x = torch.randn(7, 96)
    with record(Arena()) as recording:
        result = chain(x, weights, norm)
    for seed in range(20):
        torch.manual_seed(seed)
        inputs = torch.randn(7, 96)
        x.copy_(inputs)
        recording.replay(num_threads)
        assert torch.equal(result, chain(inputs.clone(), weights, norm))


def test_memory_is_used_again_only_when_nobody_refers_to_it() -> None:
    arena = Arena()
    with record(arena) as recording:
        first = recording.new_tensor((100,), torch.float32)
        view = first.view(10, 10)[2:, 3]
        address = first.data_ptr()
        del first
        second = recording.new_tensor((100,), torch.float32)
        assert second.data_ptr() != address
        del view
        third = recording.new_tensor((100,), torch.float32)
        assert third.data_ptr() == address
        big = recording.new_tensor((3_000_000,), torch.float32)
    with record(arena) as other:
        again = other.new_tensor((3_000_000,), torch.float32)
    assert big.data_ptr() % 64 == 0
    assert again.numel() == big.numel()


def test_decode_attention_follows_the_lengths_that_it_finds() -> None:
    """A recording is made once for a number of sequences; how the work is divided changes with their lengths."""
    torch.manual_seed(2)
    num_seqs, num_blocks, block_size, dim = 3, 64, 16, 32
    caches = torch.randn(2, num_blocks, 2, block_size, dim)
    tables = torch.randperm(num_blocks)[: num_seqs * 20].view(num_seqs, 20).int()
    query, seq_lens = torch.randn(num_seqs, 4, dim), torch.ones(num_seqs, dtype=torch.int32)
    with record(Arena()) as recording:
        out = paged_decode(query, caches[0], caches[1], tables, seq_lens, 0.2)
    for lengths in ((1, 1, 1), (320, 5, 17), (2, 300, 299), (16, 128, 129)):
        seq_lens.copy_(torch.tensor(lengths))
        recording.replay(2)
        assert torch.equal(out, paged_decode(query, caches[0], caches[1], tables, seq_lens, 0.2))


def test_what_torch_computes_itself_is_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(NotRecordableError, match=r"aten\.add"), record(Arena()):
        x + 1
    with pytest.raises(NotRecordableError, match="empty"), record(Arena()):
        torch.empty(3)
    linear(x, pack(torch.ones(4, 4)))  # nothing is left of the recording


def test_profile_names_every_kernel() -> None:
    x, weight, norm = torch.ones(2, 64), pack(torch.ones(64, 64)), torch.ones(64)
    with record(Arena()) as recording:
        chain(x, [weight], norm)
    assert [name for name, _ in recording.profile(1)] == [
        "rms_norm.normalise",
        "linear.multiply",
        "rms_norm.normalise",
    ]


def _prepare_counting(shared: Any) -> None:
    parameters = int64_pointer(shared)
    if parameters[1] == 0:
        parameters[0] = 1


def _count(shared: Any) -> None:
    """How many threads enter is counted, and what one of them does once."""
    parameters = int64_pointer(shared)
    counts = int64_pointer(parameters[2])
    take(counts)
    if take(parameters) == 0:
        counts[1] = 2 * counts[1] + 1


def test_kernels_without_work_are_passed_over() -> None:
    """Wherever they stand, and however many threads replay; the others run once, in their order."""
    worker, counts = Worker(_count, _prepare_counting), torch.zeros(2, dtype=torch.int64)
    for works in ([0], [0, 0, 1], [1, 0, 0], [1, 0, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [1, 1, 1]):
        with record(Arena()) as recording:
            for work in works:
                worker.run(torch.float32, np.array([0, work, counts.data_ptr()], np.int64), 5)
        for num_threads in (1, 5, 2, 1, 3):
            counts.zero_()
            recording.replay(num_threads)
            assert sum(works) <= counts[0] <= num_threads * sum(works)
            assert counts[1] == 2 ** sum(works) - 1
        counts.zero_()
        assert len(recording.profile(2)) == len(works)
        assert sum(works) <= counts[0] <= 2 * sum(works)
        assert counts[1] == 2 ** sum(works) - 1
    counts.zero_()
    for work in (1, 0, 1):
        worker.run(torch.float32, np.array([0, work, counts.data_ptr()], np.int64), 2)
    assert counts[1] == 3


def test_fewer_threads_than_asked_for_still_finish() -> None:
    """A replay knows those that came, whatever the runtime granted."""
    code = (
        "import torch\n"
        "from quire.kernels.cpu_recording import Arena, record\n"
        "from quire.kernels.linear import linear, pack\n"
        "torch.set_num_threads(4)\n"
        "x, weight = torch.ones(2, 64), pack(torch.ones(64, 64))\n"
        "with record(Arena()) as recording:\n"
        "    y = linear(linear(x, weight), weight)\n"
        "recording.replay(4)\n"
        "assert (y == 4096).all()\n"
    )
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def sized(x: torch.Tensor, indices: torch.Tensor, weight: PackedWeight, norm: torch.Tensor) -> Step:
    def step(sizes: Sizes) -> tuple[torch.Tensor, ...]:
        num_rows, num_wanted = sizes
        hidden = rms_norm(linear(x[:num_rows], weight, activation="silu"), norm, 1e-6)
        return hidden, take_rows(hidden[1:], indices[:num_wanted])

    return step


def test_one_recording_serves_every_size() -> None:
    torch.manual_seed(3)
    x, indices = torch.randn(50, 32), torch.zeros(50, dtype=torch.int64)
    weight, norm = pack(torch.randn(32, 32)), torch.rand(32)
    step = sized(x, indices, weight, norm)
    recording = record_for_sizes(Arena(), step, (2, 1), (50, 50), 50)
    for num_rows, num_wanted in ((2, 1), (50, 50), (17, 3), (3, 9), (49, 0)):
        x.normal_()
        indices.random_(0, num_rows - 1)
        recording.replay((num_rows, num_wanted), 2)
        for found, expected in zip(recording.outputs, step((num_rows, num_wanted)), strict=True):
            assert torch.equal(found[: len(expected)], expected)


def test_what_does_not_follow_from_the_sizes_is_refused() -> None:
    x, weight = torch.ones(50, 32), pack(torch.ones(32, 32))

    def bent(sizes: Sizes) -> tuple[torch.Tensor, ...]:
        return (linear(x[: min(sizes[0], 40)], weight),)

    def branching(sizes: Sizes) -> tuple[torch.Tensor, ...]:
        y = linear(x[: sizes[0]], weight)
        return (linear(y, weight) if sizes[0] > 20 else y,)

    with pytest.raises(NotRecordableError, match="not affine"):
        record_for_sizes(Arena(), bent, (2,), (50,), 50)
    with pytest.raises(NotRecordableError, match="which kernels run"):
        record_for_sizes(Arena(), branching, (2,), (50,), 50)


def test_recording_does_not_import_the_compiler_of_torch() -> None:
    """The first step that was recorded took most of a second for it, and the process 80 MB more from then on."""
    code = (
        "import sys, torch\n"
        "from quire.kernels.cpu_recording import Arena, record\n"
        "x = torch.zeros(4)\n"
        "with record(Arena()):\n"
        "    x.view(2, 2)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _prepare_alone(shared: Any) -> None:
    int64_pointer(shared)[0] = ALONE


@pytest.mark.parametrize("places", [[0], [0, 3], [1, 2], [3], [0, 1, 2, 3]])
def test_kernels_for_one_thread_run_once_and_in_their_order(places: list[int]) -> None:
    """With every number of threads; the others run on those that come, and none before or after its turn."""
    alone, shared, counts = Worker(_count, _prepare_alone), Worker(_count), torch.zeros(2, dtype=torch.int64)
    with record(Arena()) as recording:
        for place in range(4):
            worker = alone if place in places else shared
            worker.run(torch.float32, np.array([0, 0, counts.data_ptr()], np.int64), 5)
    for num_threads in (1, 5, 2):
        counts.zero_()
        recording.replay(num_threads)
        assert 4 <= counts[0] <= num_threads * (4 - len(places)) + len(places)
        assert counts[1] == 15
    counts.zero_()
    alone.run(torch.float32, np.array([0, 0, counts.data_ptr()], np.int64), 5)
    assert counts.tolist() == [1, 1]


@numba.njit
def _range_ahead(parameters: int, index: int, thread: int) -> tuple[int, int]:
    return range_ahead(int64_pointer(parameters), index, thread)  # type: ignore[no-any-return]


def test_what_is_asked_for_ahead_is_what_the_thread_reads_next() -> None:
    """Of the next product, each thread its own range; nothing behind the last one, and never beyond the weight."""
    weights = [pack(torch.ones(num_features, 64)) for num_features in (64, 640)]
    x, norm = torch.ones(2, 64), torch.ones(64)
    with record(Arena()) as recording:
        for weight in weights:
            linear(rms_norm(x, norm, 1e-6), weight)
    for index, weight in enumerate([weights[0].data, weights[1].data, weights[1].data]):
        begin, num_panels, panel_bytes = weight.data_ptr(), weight.shape[0], weight[0].nbytes
        for thread in range(5):
            panels = range(num_panels)[thread * num_panels // 5 : (thread + 1) * num_panels // 5]
            expected = begin + panels.start * panel_bytes, begin + panels.stop * panel_bytes
            assert _range_ahead(recording._replay.ctypes.data, index, thread) == expected
    assert _range_ahead(recording._replay.ctypes.data, 3, 0) == (0, 0)
