"""The GPU benchmark runs from end to end without a GPU, and its judgements are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from measuring.gpu_cases import Goal, zipf_lengths
from measuring.gpu_timing import Replay, medians

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
