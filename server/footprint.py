"""What a start took: seconds since the process began, and the memory that processes hold. None where /proc is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

_START_FIELD = 19
"""Of /proc/PID/stat, counted behind the name, which may hold anything: proc(5), starttime."""


def seconds_since_start() -> float | None:
    """Age of this process, interpreter and imports included; to a hundredth of a second."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def pss_bytes(pid: int) -> int | None:
    """Proportional set size: resident memory, each page divided by the number of processes that share it."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def describe_start(engine_pid: int) -> str | None:
    """How long it took from the start of this process until now, and what both processes hold at rest."""
    seconds, front, engine = seconds_since_start(), pss_bytes(os.getpid()), pss_bytes(engine_pid)
    if seconds is None or front is None or engine is None:
        return None
    mib = 2**20
    memory = f"{(front + engine) / mib:.0f} MiB (front {front / mib:.0f}, engine {engine / mib:.0f})"
    return f"Start: {seconds:.2f} s from process start to ready; memory at rest {memory}"
