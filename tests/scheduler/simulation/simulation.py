"""One seed: draw a swarm and drive the world through it."""

from __future__ import annotations

import random

from quire.scheduler.output import ScheduledBatch
from simulation.ghost import Poison
from simulation.workload import draw_request, draw_swarm
from simulation.world import World

FIRST_WITHOUT_MEMORY = 1000
"""First seed whose steps may not fit into the device's memory."""


class Simulation:
    """Deterministic in (seed, number of steps)."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.swarm = draw_swarm(self.rng)
        self.world = World(self.swarm.config, self.swarm.vocab_size, self.swarm.max_preemptions)
        self.world.scheduler.prompts.max_num_tokens = self.swarm.max_prompt_tokens
        self.world.scheduler.prompts.order.max_overtakes = self.swarm.max_overtakes
        self.num_requests = 0
        self.memory = random.Random(seed)
        self.too_large = 0.15 if seed >= FIRST_WITHOUT_MEMORY and seed % 5 == 4 else 0.0
        """Probability that the device has no memory for a step."""

    def run(self, num_steps: int) -> None:
        """`num_steps` steps with all events, then only steps until everything has ended."""
        for _ in range(num_steps):
            self.disturb("between steps")
            self.world.step(
                self.poison,
                self.disturb_in_flight,
                ahead=self.rng.random() < self.swarm.ahead,
                fits=self.memory.random() >= self.too_large,
            )
        self.world.drain(ahead=self.swarm.ahead == 1.0)

    def disturb(self, moment: str) -> None:
        """Submissions, aborts and cache resets: the same at every moment."""
        rng, swarm, world = self.rng, self.swarm, self.world
        while len(world.open) < swarm.max_live and rng.random() < swarm.submit:
            world.submit(draw_request(rng, swarm, str(self.num_requests)))
            self.num_requests += 1
        if world.open and rng.random() < swarm.abort:
            request_id, choice_index = rng.choice(list(world.open))
            world.abort(request_id, choice_index if rng.random() < 0.5 else None, moment)
        if rng.random() < swarm.reset:
            world.reset_prefix_cache()

    def disturb_in_flight(self) -> None:
        self.disturb("in flight")

    def poison(self, batch: ScheduledBatch) -> Poison | None:
        if batch.sampling and self.rng.random() < self.swarm.poison:
            index = self.rng.choice(batch.sampling)
            return Poison(batch.sequences[index], self.rng.randint(0, len(batch.drafts.get(index, ()))))
        return None
