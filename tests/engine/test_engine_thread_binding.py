"""Which cores threads keep to: the rule, and what the operating system says of a process that follows it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire.engine import thread_binding
from quire.engine.thread_binding import import_torch, keep_off_cores_of, physical_cores, places


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight hardware threads, n and n + 4 on one core; CPU 9 says nothing of its core."""
    monkeypatch.setattr(thread_binding, "_TOPOLOGY", str(tmp_path / "cpu{}"))
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("four_cores")
def test_hardware_threads_of_a_core_are_one_place() -> None:
    assert physical_cores(range(8)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert physical_cores([7, 2, 9, 3]) == [[2], [3, 7], [9]]


@pytest.mark.usefixtures("four_cores")
def test_only_threads_that_take_all_cores_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    all_cores = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert places(None) == places(4) == all_cores
    assert places(3) == places(5) == places(8) == places(1) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (places(None), places(4)) == ([], all_cores)
    monkeypatch.setenv("OMP_PLACES", "cores")
    assert places(4) == []


@pytest.mark.usefixtures("four_cores")
def test_a_single_core_is_nobodys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert places(1) == places(None) == places(2) == []


BIND = """
import json, os, threading
from quire.engine.thread_binding import import_torch, keep_to
cores = [[cpu] for cpu in sorted(os.sched_getaffinity(0))[:2]]
end = threading.Event()
import_torch(cores)
import torch
loader = threading.Thread(target=end.wait)
loader.start()
torch.set_num_threads(2)
tensor = torch.ones(1 << 20, dtype=torch.bfloat16)
tensor.add(1)
mine = sorted(os.sched_getaffinity(0))
keep_to(cores)
known = {os.getpid(), loader.native_id}
threads = {int(name) for name in os.listdir("/proc/self/task")}
print(json.dumps({
    "while loading": mine,
    "loader": sorted(os.sched_getaffinity(loader.native_id)),
    "main": sorted(os.sched_getaffinity(0)),
    "others": [sorted(os.sched_getaffinity(thread)) for thread in threads - known],
    "environment": [name for name in os.environ if name.startswith("OMP_P")],
}), flush=True)
end.set()
input()
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to choose from"
)
def test_threads_of_a_bound_process_have_a_core_each() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", BIND], stdin=pipe, stdout=pipe, env=environment, text=True) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["while loading"] == said["loader"] == cpus
        assert said["main"] == cpus[:1]
        assert cpus[1:2] in said["others"]
        assert said["environment"] == []
        try:
            keep_off_cores_of(process.pid)
            assert sorted(os.sched_getaffinity(0)) == cpus[1:]
            # Nothing is left of what it may use: it stays where it is.
            os.sched_setaffinity(0, cpus[:1])
            keep_off_cores_of(process.pid)
            assert sorted(os.sched_getaffinity(0)) == cpus[:1]
        finally:
            os.sched_setaffinity(0, cpus)
        process.communicate("\n")
    keep_off_cores_of(process.pid)
    assert sorted(os.sched_getaffinity(0)) == cpus


def test_torch_that_is_there_already_is_not_bound() -> None:
    before = os.sched_getaffinity(0)
    assert sys.modules["torch"] is torch
    assert import_torch([[cpu] for cpu in before]) == []
    assert os.sched_getaffinity(0) == before
    assert "OMP_PLACES" not in os.environ
