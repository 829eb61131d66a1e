"""The script that measures launches runs without a GPU, and a launch that is wrong or fails is never chosen."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from measuring import gpu_tuning
from measuring.gpu_timing import Call
from measuring.gpu_tuning import Tuned, best_launch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_tune.py"
CPU = torch.device("cpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_a_rehearsal_writes_a_table(tmp_path: Path) -> None:
    found = run("--rehearse", "--seconds", "0", "--out", str(tmp_path / "table.json"))
    assert found.returncode == 0, found.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["facts"]["device"] == "a rehearsal"
    assert "pages int8" in found.stdout


def test_without_a_gpu_it_says_what_to_do() -> None:
    found = run()
    assert found.returncode == 1
    assert "--rehearse" in found.stderr
    assert "--rehearse needs --out" in run("--rehearse").stderr


@pytest.mark.parametrize(
    ("slow", "wrong", "failing", "chosen"),
    [
        ((), (), (), 1),
        ((1,), (), (), 2),
        ((), (1,), (), 2),
        ((), (), (1,), 2),
        ((1, 2), (), (), None),
        ((2,), (1,), (), None),
    ],
)
def test_the_fastest_that_is_right_is_chosen(
    slow: tuple[int, ...],
    wrong: tuple[int, ...],
    failing: tuple[int, ...],
    chosen: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the rules a call takes 4 ms; launch 1 takes 1 ms and launch 2 takes 2, if nothing is the matter with them."""

    def call(problem: object, out: torch.Tensor, launch: Mapping[str, int]) -> Call:
        which = launch.get("which", 0)
        if which in failing:
            raise RuntimeError("out of shared memory")

        def compute() -> None:
            time.sleep(0.004 if which in (0, *slow) else 0.001 * which)
            out.fill_(7.0 if which in wrong else 1.0)

        return compute

    monkeypatch.setattr(gpu_tuning, "candidates", lambda kernel, rehearse: [{"which": 1}, {"which": 2}])
    tuned = Tuned("paged_decode", "case", [SimpleNamespace()], [torch.empty(3)], call)
    launch, seconds, reasoned = best_launch(tuned, CPU, rehearse=True, seconds=0.0)
    assert launch == ({} if chosen is None else {"which": chosen})
    assert seconds <= reasoned
