"""Drive the scheduler through seeds. A failing seed is a one-line repro:

python tests/scheduler/simulator.py --seed 1234
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

from simulation.simulation import Simulation

from quire.scheduler.invariants import InvariantError

STEPS_PER_SEED = 300


def run_seeds(seeds: range, num_steps: int, stop_after: int | None) -> dict[str, object]:
    """Run seeds until they or the steps are used up; the first failure ends the process."""
    marks: Counter[str] = Counter()
    steps = done = max_preemptions = 0
    started = time.process_time()
    for seed in seeds:
        simulation = Simulation(seed)
        try:
            simulation.run(num_steps)
        except Exception as error:
            error.add_note(f"seed {seed}, step {simulation.world.num_steps}, {simulation.swarm}")
            error.add_note(f"again: python tests/scheduler/simulator.py --seed {seed} --steps {num_steps}")
            raise
        marks += simulation.world.marks
        steps += simulation.world.num_steps
        max_preemptions = max(max_preemptions, simulation.world.max_preemptions_seen)
        done += 1
        if stop_after is not None and steps >= stop_after:
            break
    seconds = time.process_time() - started
    return {
        "seeds": done,
        "steps": steps,
        "cpu_seconds": round(seconds, 1),
        "steps_per_cpu_second": round(steps / seconds),
        "max_preemptions": max_preemptions,
        "marks": dict(sorted(marks.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--stride", type=int, default=1, help="distance between seeds, to share them among processes")
    parser.add_argument("--steps", type=int, default=STEPS_PER_SEED, help="steps with events for each seed")
    parser.add_argument("--stop-after", type=int, help="end after the seed in which so many steps are reached")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds * arguments.stride, arguments.stride)
    try:
        result = run_seeds(seeds, arguments.steps, arguments.stop_after)
    except InvariantError as error:
        print(error, *error.__notes__, sep="\n")
        return 1
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
