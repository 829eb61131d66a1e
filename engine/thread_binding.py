"""Which cores the threads of the engine and of the front process run on, where the engine has a thread for each core.

Every kernel ends when its last thread does, so whatever takes a core from one thread stops them all. Between two steps
a single thread works, the one that schedules: a front process that runs beside it costs nothing then, one that takes
its core costs that time twice. The system's scheduler knows neither and wakes the front process where the message came
from. So the threads keep to a core each, and the front process keeps off the first.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_OPENMP_PLACES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def physical_cores(cpus: Collection[int]) -> list[list[int]]:
    """The `cpus` by the core that they are hardware threads of, cores and CPUs in order."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        try:
            siblings = Path(_TOPOLOGY.format(cpu)).read_text().strip()
        except OSError:
            siblings = str(cpu)
        cores.setdefault(siblings, []).append(cpu)
    return list(cores.values())


def places(num_threads: int | None) -> list[list[int]]:
    """A core for each of the engine's threads; [] where the system should place them.

    That is so unless they are as many as the cores of this process, and two at least: with cores to spare nobody is in
    the way, and several engines would all choose the same ones. Whoever has given OpenMP places has chosen already.

    Args:
        num_threads: as configured; None: OpenMP's default, all cores, unless its environment says otherwise.
    """
    if not hasattr(os, "sched_getaffinity") or any(name in os.environ for name in _OPENMP_PLACES):
        return []
    if num_threads is None and "OMP_NUM_THREADS" in os.environ:
        return []
    cores = physical_cores(os.sched_getaffinity(0))
    return cores if len(cores) > 1 and num_threads in (None, len(cores)) else []


def import_torch(cores: list[list[int]]) -> list[list[int]]:
    """The first import of torch, so that its OpenMP runtime keeps the threads that it starts to `cores`.

    This thread, the runtime's first, stays free: what loads a model, and what is started for that, has all cores. It is
    for `keep_to` to bind it.

    Returns:
        The cores; [] if there are none, or torch has been imported before and its threads are where they are.
    """
    if not cores or "torch" in sys.modules:
        return []
    allowed = os.sched_getaffinity(0)
    os.environ["OMP_PROC_BIND"] = "true"
    os.environ["OMP_PLACES"] = ",".join("{" + ",".join(map(str, core)) + "}" for core in cores)
    try:
        import torch  # noqa: F401  the environment is read once
    finally:
        del os.environ["OMP_PROC_BIND"], os.environ["OMP_PLACES"]
        os.sched_setaffinity(0, allowed)
    return cores


def keep_to(cores: list[list[int]]) -> None:
    """Bind this thread to the first of `cores`, if any, and with it what it starts from now on."""
    if cores:
        os.sched_setaffinity(0, cores[0])


def keep_off_cores_of(pid: int) -> None:
    """Have this thread, and what it starts from now on, run beside the main thread of process `pid`, not in its place.

    Nothing happens if that may run anywhere, or nothing would be left, or the process is gone.
    """
    with contextlib.suppress(OSError, AttributeError):
        others = os.sched_getaffinity(0) - os.sched_getaffinity(pid)
        if others:
            os.sched_setaffinity(0, others)
