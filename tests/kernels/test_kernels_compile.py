"""Every Triton kernel compiles for GPUs that are not here: no spills, within shared memory, on the matrix units."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compile_kernels
import numpy as np
import paged_problems
import pytest
import torch
import triton.language as tl
import triton_interpreter
from compile_kernels import Resources
from triton.runtime.jit import JITFunction

from quire.kernels.paged_decode.parameters import RESIDENT_PROGRAMS
from quire.kernels.paged_prefill.parameters import GLUON_LAUNCH

NUM_PROCESSES = 2
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
FP8_MMA = {"sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": "MFMA"}
DECODE_MMA = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "MFMA"}
PREFILL_MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}


@dataclass(frozen=True)
class Report:
    rows: list[Resources]
    seconds: float

    def table(self) -> str:
        """Registers of each kernel by architecture."""
        cells: dict[tuple[str, str], dict[str, list[int]]] = {}
        for row in self.rows:
            cells.setdefault((row.kernel, row.case), {}).setdefault(row.arch, []).append(row.registers)
        lines = [f"{'kernel':16} {'case':30} " + " ".join(f"{arch:>8}" for arch in ARCHS)]
        for (kernel, case), by_arch in sorted(cells.items()):
            columns = (str(max(by_arch[arch])) if arch in by_arch else "" for arch in ARCHS)
            lines.append(f"{kernel:16} {case:30} " + " ".join(f"{column:>8}" for column in columns))
        return "\n".join([f"registers per thread, most of each case; {self.seconds:.0f} s", *lines])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """All cases, compiled by processes of their own: the others of this folder interpret."""
    script = compile_kernels.__file__
    no_c_compiler = str(tmp_path_factory.mktemp("empty"))
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PATH": no_c_compiler}
    environment.pop("TRITON_INTERPRET", None)
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(part), str(NUM_PROCESSES)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(NUM_PROCESSES)
    ]
    rows = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=900)
            assert process.returncode == 0, errors[-4000:]
            rows += [Resources(**json.loads(line)) for line in output.splitlines()]
    finally:
        for process in processes:
            process.kill()
    return Report(rows, time.monotonic() - started)


def test_all_kernels_are_compiled_for_all_targets(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + report.table())
    sources = sorted(Path(compile_kernels.__file__).parents[2].glob("kernels/*/triton.py"))
    assert len(sources) == 13
    of_logits = {name for op in ("argmax", "sample", "token_bitmask", "log_probs") for name in kernel_names(op)}
    of_fp8 = kernel_names("fp8_linear")
    of_layers = {name for path in sources for name in kernel_names(path.parent.name)} - of_logits - of_fp8
    for arch in ARCHS:
        for dtype, kernels in (("bf16", of_layers), ("fp16", of_layers), ("fp32", of_logits)):
            compiled = {row.kernel for row in report.rows if row.arch == arch and dtype in row.case}
            assert compiled == kernels
    for arch in ARCHS[1:]:
        assert {row.kernel for row in report.rows if row.arch == arch and row.case == "fp8"} == of_fp8


def kernel_names(op: str) -> set[str]:
    """Names of the jit functions of an operation that are launched, not called by others."""
    folder = Path(compile_kernels.__file__).parents[2] / "kernels" / op
    modules = [importlib.import_module(f"quire.kernels.{op}.{path.stem}") for path in folder.glob("triton*.py")]
    members = [member for module in modules for member in vars(module).items()]
    return {name for name, value in members if isinstance(value, JITFunction) and name.endswith("_kernel")}


def test_nothing_spills(report: Report) -> None:
    assert [row for row in report.rows if row.spills] == []


def test_shared_memory_fits(report: Report) -> None:
    assert [row for row in report.rows if row.shared_memory > row.shared_memory_limit] == []


@pytest.mark.parametrize(
    ("kernel", "expected", "arch"),
    [
        (kernel, expected, arch)
        for kernel, expected in (
            ("split_kernel", DECODE_MMA),
            ("prefill_kernel", PREFILL_MMA),
            ("pieces_kernel", PREFILL_MMA),
            ("scaled_product_kernel", FP8_MMA),
        )
        for arch in expected
    ],
)
def test_matrix_instructions(report: Report, kernel: str, expected: dict[str, str], arch: str) -> None:
    rows = [row for row in report.rows if row.kernel == kernel and row.arch == arch]
    assert rows
    assert [row for row in rows if not row.mma.get(expected[arch])] == []


def test_gluon_kernels_specialise_their_warps(report: Report) -> None:
    """Tiles come by the TMA, products go to wgmma, and registers move from the loading warps to the computing ones."""
    rows = [row for row in report.rows if row.kernel == "gluon_prefill_kernel"]
    assert {row.case for row in rows} == {"gluon-d64", "gluon-d128", "gluon-d256"}
    for row in rows:
        assert row.mma.keys() >= {"HGMMA", "UTMALDG", "USETMAXREG"}, row
        assert 3 * 128 * row.registers <= 65_536, row


def test_gluon_kernels_weigh_keys_while_values_are_multiplied(report: Report) -> None:
    """ptxas moves a wait for a product ahead of arithmetic that does not need it, if no branch is between them."""
    for row in (row for row in report.rows if row.kernel == "gluon_prefill_kernel"):
        head_dim = int(row.case.removeprefix("gluon-d"))
        num_weights = GLUON_LAUNCH[head_dim][0] // 2  # of a thread: 64 rows of a tile are shared by 128
        num_loops = 2 * 2  # of each group of warps the one with masks and the one without
        assert row.mma["EX2 beside HGMMA"] >= num_loops * num_weights, row


def test_sums_of_fp8_products_are_added_up_in_float32(report: Report) -> None:
    """Hopper's matrix units sum up to 128 of them with fewer bits: then comes an addition for each of a tile's sums."""
    rows = [row for row in report.rows if row.kernel == "scaled_product_kernel" and row.arch == "sm_90"]
    assert rows
    assert [row for row in rows if row.mma.get("FADD", 0) < 32] == []


def test_programs_of_decode_are_all_there_at_once(report: Report) -> None:
    """Equal shares end together only if no program waits for another to leave its multiprocessor."""
    for row in (row for row in report.rows if row.kernel == "split_kernel"):
        registers = row.registers * (1 if row.arch == "gfx942" else 32 * row.num_warps)
        assert RESIDENT_PROGRAMS * registers <= (512 if row.arch == "gfx942" else 65_536), row
        assert RESIDENT_PROGRAMS * row.shared_memory <= row.shared_memory_limit, row


def test_nvidia_loads_are_asynchronous(report: Report) -> None:
    """Keys and values are copied to shared memory while the tile before is computed."""
    for row in report.rows:
        pipelined = ("split_kernel", "prefill_kernel", "pieces_kernel", "scaled_product_kernel")
        if row.kernel in pipelined and row.arch.startswith("sm_"):
            assert row.mma.get("LDGSTS"), f"{row.case} on {row.arch} does not pipeline its loads"


def test_small_kernels_move_16_bytes_at_a_time(report: Report) -> None:
    """What is bound by memory: a thread's loads and stores are as wide as they get."""
    for row in report.rows:
        if row.kernel in ("rms_norm_kernel", "rope_kv_write_kernel", "gated_activation_kernel") and row.arch.startswith(
            "sm_"
        ):
            assert row.mma.get("LDG.E.128"), f"{row.case} on {row.arch} loads piece by piece"
            assert row.mma.get("STG.E.128"), f"{row.case} on {row.arch} stores piece by piece"


def test_offsets_are_64_bit(report: Report) -> None:
    assert [row for row in report.rows if not row.int64_offsets] == []


def test_a_spill_is_noticed() -> None:
    """The detector itself: a tile too large for its warps must be reported as spilling."""
    launch = compile_kernels.prefill(torch.bfloat16, 128, 2, 1024, None, compile_kernels.H100)[0]
    launch.args.update(BLOCK_M=128, BLOCK_N=128, num_warps=4)
    assert compile_kernels.resources("too large", launch, compile_kernels.H100).spills > 0


def test_interpreting_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process: interpret kernels, then compile others as if nothing had been interpreted."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = paged_problems.Shape(query_lens=(1,), seq_lens=(20,), head_dim=16)
    environment = dict(os.environ)
    with triton_interpreter.interpreted_kernels(), triton_interpreter.bfloat16_arithmetic():
        assert not isinstance(tl.sum, JITFunction)
        with np.errstate(all="ignore"):
            problem = paged_problems.make_problem(shape, torch.bfloat16, torch.device("cpu"))
            paged_problems.run_decode(problem, backend="triton")
    assert dict(os.environ) == environment
    assert isinstance(tl.sum, JITFunction)
    launches: list[Any] = compile_kernels.decode(torch.bfloat16, 64, 8, None, compile_kernels.H100)
    assert compile_kernels.resources("after", launches[0], compile_kernels.H100).mma["HMMA"] > 0
