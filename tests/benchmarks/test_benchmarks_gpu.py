"""The GPU benchmark runs from end to end without a GPU, and its judgements are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import gpu_cascade, gpu_gluon, gpu_parity
from measuring.gpu_cases import REHEARSAL, Goal, zipf_lengths
from measuring.gpu_timing import Replay, medians

from quire.kernels.cascade_decode import cascade_decode

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_a_rehearsal_goes_through_all_stages(tmp_path: Path) -> None:
    found = run("--rehearse", "--out", str(tmp_path / "gpu"))
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["passed"] for row in report["parity"])
    assert len(report["parity"]) > 10
    assert len(report["kernels"]) > 10
    assert {row["engine"] for row in report["engines"]} == {"quire"}
    assert "FlashInfer" in report["absent_peers"], "absence is told"
    assert "11 sampling" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.svg").read_text().startswith("<svg")


def test_without_a_gpu_it_says_what_to_do() -> None:
    found = run()
    assert found.returncode == 2
    assert "--rehearse" in found.stderr
    found = run("--rehearse", "--stages", "parity,typo")
    assert "no such stage: typo" in found.stderr


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal("us", 18, 11), 17.0, (True, False)),
        (Goal("tb_per_s", 2.4, 2.75), 2.8, (True, True)),
        (Goal("ratio", 1.3, 1.3, "peer"), None, (None, None)),
    ],
)
def test_goals(goal: Goal, value: float | None, met: tuple[bool | None, bool | None]) -> None:
    assert (goal.is_met(value, goal.first), goal.is_met(value, goal.best)) == met


def test_skewed_lengths_have_the_mean() -> None:
    lengths = zipf_lengths(64, 4096)
    assert abs(sum(lengths) / 64 - 4096) < 64
    assert lengths[0] > 10 * lengths[-1]


def test_turns_are_taken() -> None:
    import torch

    order: list[str] = []
    replays = {name: Replay([lambda name=name: order.append(name)], torch.device("cpu")) for name in "ab"}
    order.clear()
    assert set(medians(replays, 0.0)) == {"a", "b"}
    assert order == ["a", "b"] * 4


def test_a_wrong_cascade_is_noticed_in_a_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the kernel is the reference there: it is compared with a decode that knows of no groups."""

    def passed() -> list[bool]:
        found = gpu_parity.checks(REHEARSAL, torch.device("cpu"), "cpu")
        return [check.passed for check in found if check.name.startswith("cascade")]

    def without_last_token(*arguments: Any, backend: str) -> torch.Tensor:
        query, k_cache, v_cache, block_tables, seq_lens, *rest = arguments
        return cascade_decode(query, k_cache, v_cache, block_tables, seq_lens - 1, *rest, backend=backend)

    assert passed() == [True, True]
    monkeypatch.setattr(gpu_cascade, "cascade_decode", without_last_token)
    assert passed() == [False, False]


CHECK = '{"name": "a", "error": %s, "tolerance": 0.01}'


@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        (f"print('{CHECK % 0.001}')", ""),
        (f"print('{CHECK % 0.1}')", "it is wrong: a"),
        (f"print('{CHECK % 'Infinity'}')", "it is wrong: a"),
        (f"print('{CHECK % 0.001}'); raise RuntimeError('an illegal address')", "it failed: RuntimeError: an illegal"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it failed: exit code -11"),
        ("import time; time.sleep(60)", "it did not end within 2 s"),
        ("", "nothing was checked"),
    ],
)
def test_a_kernel_that_is_wrong_or_never_ends_is_left_out(script: str, trouble: str) -> None:
    _, found = gpu_gluon.attempt_in_process(2.0, (sys.executable, "-S", "-c", script))
    assert found.startswith(trouble)
    assert bool(found) == bool(trouble)
