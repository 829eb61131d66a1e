"""What processes of this machine use, read from /proc: CPU time, memory, and who else is at work."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PARENT, _USER, _SYSTEM = 1, 11, 12
"""Fields of /proc/PID/stat, counted behind the name, which may hold anything: proc(5)."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """The process itself and whatever it started that still lives."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children[int(fields[_PARENT])].append(int(entry))
    found = [pid]
    for each in found:
        found += children[each]
    return found


def labels(pid: int) -> dict[int, str]:
    """A server's processes by what they are: the first is the front; of the others, their command line says."""
    names = {}
    for each in descendants(pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            kind = "engine" if "quire.engine.process" in command else "children"
            names[each] = "front" if each == pid else kind
    return names


def cpu_seconds(pid: int) -> float:
    """User and system time of a process; 0 if there is none."""
    fields = _stat(pid)
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS if fields else 0.0


def ended_children_seconds() -> float:
    """User and system time of this process's children that have ended and were waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def pss_mib(pid: int) -> float:
    """Proportional set size: each page divided by the number of processes that share it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def memory_mib(pid: int) -> dict[str, float]:
    """Proportional set size of a server's processes, by what they are."""
    memory: dict[str, float] = defaultdict(float)
    for each, label in labels(pid).items():
        memory[label] += pss_mib(each)
    return dict(memory)


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Cores in use, on average over a stretch of time; 1.0 is one core all the time."""

    server: dict[str, float]
    client: float
    others: float
    """Every other process of the machine, and what other machines on the same hardware took: the noise of the run."""
    stolen: float
    """The part of `others` that the hypervisor took."""


class CpuMeter:
    """CPU time from its making to `stop`."""

    def __init__(self, server_pid: int | None = None) -> None:
        self._labels = {} if server_pid is None else labels(server_pid)
        self._begin = self._read()

    def stop(self, ended_children_seconds: float = 0.0) -> CpuUse:
        """Args:
        ended_children_seconds: CPU time of processes of the server that were waited for and are gone.
        """
        wall, busy, stolen, client, *each = (
            after - before for before, after in zip(self._begin, self._read(), strict=True)
        )
        server: dict[str, float] = defaultdict(float)
        for label, seconds in zip(self._labels.values(), each, strict=True):
            server[label] += seconds / wall
        if ended_children_seconds:
            server["front"] += ended_children_seconds / wall
        others = max(0.0, busy / wall - client / wall - sum(server.values()))
        return CpuUse(dict(server), client / wall, others, stolen / wall)

    def _read(self) -> Sequence[float]:
        user, nice, system, _, _, irq, softirq, stolen = (
            int(value) / _TICKS for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = user + nice + system + irq + softirq + stolen
        own = time.process_time()
        return (time.perf_counter(), busy, stolen, own, *map(cpu_seconds, self._labels))


def wait_until_quiet(limit: float, seconds: float) -> None:
    """Return once other processes used less than `limit` cores for a second, or after `seconds`."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        meter = CpuMeter()
        time.sleep(1.0)
        if meter.stop().others < limit:
            return


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
