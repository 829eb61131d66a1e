"""Hypothesis drives the same world as the simulator and shrinks what it finds."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulation.ghost import Poison
from simulation.workload import EOS
from simulation.world import World

from quire.config import SchedulerConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.output import ScheduledBatch
from quire.scheduler.request import Request

VOCAB_SIZE = 3


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_usable_blocks=st.integers(4, 10),
        block_size=st.sampled_from([1, 2, 3, 4]),
        budget=st.integers(1, 20),
        max_num_seqs=st.integers(1, 4),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        window=st.sampled_from([None, None, 2, 4, 7]),
        max_preemptions=st.sampled_from([1, 8]),
    )
    def start(
        self, num_usable_blocks, block_size, budget, max_num_seqs, caching, policy, window, max_preemptions
    ) -> None:
        config = SchedulerConfig(
            num_blocks=1 + num_usable_blocks,
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            max_model_len=min(24, num_usable_blocks * block_size + 2),
            enable_prefix_caching=caching,
            policy=policy,
            sliding_window=window,
        )
        self.world = World(config, VOCAB_SIZE, max_preemptions)
        self.num_requests = 0

    @rule(
        shared=st.integers(0, 12),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4),
        n=st.integers(1, 3),
        max_tokens=st.one_of(st.none(), st.integers(0, 6)),
        depth=st.sampled_from([None, None, 0, 2]),
        stop=st.sampled_from([(), (1,)]),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "salt"]),
        seed=st.integers(0, 2),
        num_drafts=st.sampled_from([0, 1, 3]),
    )
    def submit(self, shared, own, n, max_tokens, depth, stop, priority, salt, seed, num_drafts) -> None:
        if max_tokens == 0 and depth is None:
            depth = 1
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            prompt_logprobs=depth,
            stop_token_ids=stop,
            num_speculative_tokens=num_drafts,
        )
        self.world.submit(
            Request(
                request_id=str(self.num_requests),
                prompt_token_ids=[2] * shared + own,
                params=params,
                seed=seed,
                eos_token_ids=(EOS,),
                priority=priority,
                cache_salt=salt,
            )
        )
        self.num_requests += 1

    @rule(poison=st.sampled_from([False, False, False, True]))
    def step(self, poison: bool) -> None:
        self.world.step(self._last_row if poison else self._no_row)

    @rule(times=st.integers(2, 5))
    def several_steps(self, times: int) -> None:
        for _ in range(times):
            self.world.step()

    @precondition(lambda self: self.world.open)
    @rule(which=st.integers(0, 100), whole=st.booleans())
    def abort(self, which: int, whole: bool) -> None:
        self._abort(which, whole, "between steps")

    @precondition(lambda self: self.world.open)
    @rule(which=st.integers(0, 100), whole=st.booleans())
    def abort_in_flight(self, which: int, whole: bool) -> None:
        self.world.step(in_flight=lambda: self._abort(which, whole, "in flight"))

    @rule()
    def reset_prefix_cache(self) -> None:
        self.world.reset_prefix_cache()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()

    def _abort(self, which: int, whole: bool, moment: str) -> None:
        choices = list(self.world.open)
        request_id, choice_index = choices[which % len(choices)]
        self.world.abort(request_id, None if whole else choice_index, moment)

    @staticmethod
    def _no_row(batch: ScheduledBatch) -> None:
        return None

    @staticmethod
    def _last_row(batch: ScheduledBatch) -> Poison | None:
        if not batch.sampling:
            return None
        index = batch.sampling[-1]
        return Poison(batch.sequences[index], len(batch.drafts.get(index, ())))


SchedulerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSchedulerMachine = SchedulerMachine.TestCase
