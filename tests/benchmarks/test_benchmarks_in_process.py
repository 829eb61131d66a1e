"""A load on the engine in this process: the figures that serving.py reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from measuring.summary import from_json

from quire.tales import MODEL_DIR

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "in_process.py"


def test_a_load_gives_the_figures_that_are_read(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), str(MODEL_DIR), "W1", "0", "1.5", str(out), "--threads", "1"]
    subprocess.run(command, check=True, timeout=120)
    found = json.loads(out.read_text())
    figures = from_json(found["W1"])
    assert (figures.requests, figures.failed, figures.short) == (8, 0, 0)
    assert figures.output_tokens == 8 * 128
    assert figures.pieces_per_token == 1
    assert 0 < found["first_token_s"] < 120
    assert found["memory_mib"] > 0
