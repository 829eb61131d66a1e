"""Faults to plant in what holds while steps are in flight."""

from __future__ import annotations

from mutants import mutant
from simulation.simulation import FIRST_WITHOUT_MEMORY

from quire.scheduler import steps_in_flight
from quire.scheduler.beam_search import BeamSearch
from quire.scheduler.block_manager import BlockManager
from quire.scheduler.block_pool import BlockPool
from quire.scheduler.block_table import BlockTable
from quire.scheduler.budget import StepBudget
from quire.scheduler.prompts import Prompts
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.steps_in_flight import StepsInFlight

MUTANTS_IN_FLIGHT = [
    mutant(
        "I33",
        "nothing that is released is fenced",
        BlockManager,
        "release",
        ("if self._steps.batches:", "if False:"),
    ),
    mutant(
        "I33",
        "what leaves the window is free at once",
        BlockManager,
        "release_out_of_window",
        ("if self._steps.batches:", "if False:"),
    ),
    mutant(
        "I33",
        "what several hold is not fenced for the first who gives it up",
        BlockManager,
        "_fence",
        ("fence(block_ids, ", "fence([each for each in block_ids if self.pool.ref_counts[each] == 1], "),
    ),
    mutant(
        "I33",
        "a preempted sequence's blocks are free at once",
        Scheduler,
        "preempt",
        ("self.blocks.release(sequence)", "sequence.block_table.release()"),
    ),
    mutant(
        "I33",
        "a group that is preempted gives its blocks up at once",
        BeamSearch,
        "preempt",
        ("scheduler.blocks.release(seat)", "seat.block_table.release()"),
    ),
    mutant(
        "I33",
        "a group that ends gives its blocks up at once",
        BeamSearch,
        "end",
        ("scheduler.blocks.release(seat)", "seat.block_table.release()"),
    ),
    mutant(
        "I33",
        "a fence is lifted one step early",
        BlockPool,
        "retire",
        ("last_use <= step_id", "last_use <= step_id + 1"),
    ),
    mutant("I33", "a fence is never lifted", BlockPool, "retire", ("last_use <= step_id", "False")),
    mutant(
        "I33",
        "the oldest step in flight counts as the last",
        StepsInFlight,
        "last_step_of",
        ("reversed(self.batches)", "self.batches"),
    ),
    mutant(
        "I33",
        "what a copy reads is free at once",
        BlockTable,
        "take_copy",
        ("self._pool.fence(copy, step_id)", "pass"),
    ),
    mutant(
        "I33",
        "a copy counts for the step before",
        BlockTable,
        "take_copy",
        ("fence(copy, step_id)", "fence(copy, step_id - 1)"),
    ),
    mutant(
        "I4",
        "a fenced block that is found still counts as fenced",
        BlockPool,
        "share",
        ("self.num_fenced_blocks -= 1", "pass"),
    ),
    mutant(
        "I34",
        "a preempted sequence keeps a token that nobody knows",
        Scheduler,
        "preempt",
        ("sequence.drop_unknown_token()", "pass"),
    ),
    mutant(
        "I34",
        "a token that has become known stands behind the unknown one",
        StepsInFlight,
        "move_back",
        ("sequence.drop_unknown_token()", "pass"),
    ),
    mutant(
        "I9",
        "who was moved ahead is not moved back",
        StepsInFlight,
        "move_back",
        ("sequence.num_computed_tokens -= num_tokens", "pass"),
    ),
    mutant(
        "I14",
        "who may get drafts goes on",
        steps_in_flight,
        "can_go_on",
        ("sequence.max_num_drafts or ", ""),
    ),
    mutant(
        "I8",
        "who is followed goes on, and out of the window goes what followers need",
        steps_in_flight,
        "can_go_on",
        ("sequence.followers or ", ""),
        first_seed=287,
    ),
    mutant(
        "I25",
        "beams go on",
        steps_in_flight,
        "can_go_on",
        ("sequence.beam is not None or ", ""),
    ),
    mutant(
        "I1",
        "what has left the window before it was known is cached",
        BlockManager,
        "cache_full_blocks",
        ("if table.num_released > first:", "if False:"),
    ),
    mutant(
        "I31",
        "nobody waits for what the step in flight computes",
        Prompts,
        "_should_wait",
        ("writers + in_flight", "writers"),
    ),
    mutant(
        "I19",
        "a group does not wait for blocks that are fenced",
        BeamSearch,
        "_waits_for_blocks",
        ("if not self._scheduler.steps.batches:", "if True:"),
        first_seed=402,
        num_steps=300,
    ),
    mutant(
        "I33",
        "a step that does not fit stays a reason for fences",
        Scheduler,
        "withdraw",
        ("self.blocks.pool.retire(batch.step_id)", "pass"),
        first_seed=FIRST_WITHOUT_MEMORY,
    ),
    mutant(
        "I14",
        "after a step that does not fit the next one is as large",
        Scheduler,
        "schedule",
        ("BatchBuilder(self.step_budget.num_tokens)", "BatchBuilder(self.config.max_num_batched_tokens)"),
        first_seed=FIRST_WITHOUT_MEMORY,
    ),
    mutant(
        "I14",
        "a step that does not fit makes the next one no smaller",
        StepBudget,
        "shrink",
        ("max(num_tokens // 2, self._least)", "self.num_tokens"),
        first_seed=FIRST_WITHOUT_MEMORY,
    ),
]
