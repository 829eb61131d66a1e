"""A million steps of the simulator in two processes, and proof that they were worth something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

NUM_PROCESSES = 2
NUM_STEPS = 1_000_000
SIMULATOR = Path(__file__).with_name("simulator.py")
LEAST = {
    "abort of a follower between steps": 500,
    "abort of a follower in flight": 500,
    "abort of a leader between steps": 500,
    "abort of a leader in flight": 500,
    "abort of running between steps": 1000,
    "abort of running in flight": 1000,
    "abort of waiting between steps": 1000,
    "abort of waiting in flight": 1000,
    "all of several drafts accepted": 3000,
    "beam forks": 10000,
    "beam forks after a preemption": 300,
    "cache reset": 1000,
    "chunk": 10000,
    "copy of a partial block": 1000,
    "draft accepted": 10000,
    "draft after a preemption": 1000,
    "draft cut by a failure": 30,
    "draft cut by a stop": 300,
    "draft in a batch with a preemption": 500,
    "draft rejected": 10000,
    "eviction": 10000,
    "failure behind a wrong draft": 50,
    "fence lifted": 10000,
    "finish of a beam": 10000,
    "finish of a beam that never was": 1000,
    "finish: error": 1000,
    "finish: length": 10000,
    "finish: stop": 10000,
    "fork": 10000,
    "fork with a partial block": 1000,
    "hit": 10000,
    "hit after a preemption": 1000,
    "hit behind the window": 1000,
    "hit on another request's block": 10000,
    "key taken over by a deeper block": 5000,
    "look-ahead block": 10000,
    "no block left to fork into": 1000,
    "overtaking by a longer cached prefix": 10000,
    "overtaking for a good reason": 10000,
    "preemption": 10000,
    "preemption of a beam group": 150,
    "preemption of a leader with followers": 100,
    "preemption of a pinned sequence": 100,
    "preemption of shared blocks": 1000,
    "prompts limited beside decodes": 10000,
    "refused: context_length_exceeded": 100,
    "refused: kv_cache_exceeded": 100,
    "refused: n_too_large": 100,
    "scoring hit": 5000,
    "scoring hit after a preemption": 100,
    "scoring hit on a copied block": 5000,
    "scoring hit with a window": 1000,
    "sits out a step": 100,
    "step ahead": 100000,
    "step that does not fit": 5000,
    "step of one that has failed in flight": 500,
    "token that only the device knows": 100000,
    "waits for a fence": 5000,
    "wrong draft overwritten": 10000,
}


def test_a_million_steps() -> None:
    command = [sys.executable, str(SIMULATOR), "--seeds", "1000000", "--stride", str(NUM_PROCESSES)]
    command += ["--stop-after", str(NUM_STEPS // NUM_PROCESSES)]
    processes = [
        subprocess.Popen([*command, "--seed", str(seed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed in range(NUM_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES, "\n".join(outputs)
    results = [json.loads(output) for output in outputs]
    assert sum(result["steps"] for result in results) >= NUM_STEPS
    marks: Counter[str] = sum((Counter(result["marks"]) for result in results), Counter())
    assert {name: marks[name] for name, least in LEAST.items() if marks[name] < least} == {}
    assert max(result["max_preemptions"] for result in results) <= 16


def test_a_seed_is_a_repro() -> None:
    command = [sys.executable, str(SIMULATOR), "--seed", "7", "--steps", "50"]
    first, second = (json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(2))
    assert first["steps"] > 50
    assert (first["steps"], first["marks"]) == (second["steps"], second["marks"])
