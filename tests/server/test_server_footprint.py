"""The figures of the start against what the system says by other means."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quire.server.footprint import pss_bytes, seconds_since_start

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc of this kind")


def test_age_counts_from_the_start_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.5)\n"
        "from quire.server.footprint import seconds_since_start\n"
        "print(seconds_since_start())"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - begin + 0.02


def test_age_goes_on() -> None:
    first = seconds_since_start()
    time.sleep(0.1)
    second = seconds_since_start()
    assert first is not None
    assert second is not None
    assert second - first >= 0.09


def test_memory_that_is_written_is_counted() -> None:
    before = pss_bytes(os.getpid())
    held = bytearray(os.urandom(2**20) * 64)
    after = pss_bytes(os.getpid())
    assert before is not None
    assert after is not None
    assert abs(after - before - len(held)) < 8 * 2**20


def test_a_process_that_is_gone_has_no_figure() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert pss_bytes(process.pid) is None
