"""Who gives way when the pool is empty, and how they come back."""

from __future__ import annotations

from scheduler_factories import EagerScheduler, add, finish_step, make_scheduler, run, schedule, step

from quire.scheduler.preemption import choose_victims
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence


def crowded(num_usable_blocks: int, prompts: list[list[int]]) -> tuple[Scheduler, list[Sequence]]:
    """All prompts are computed and the pool is full."""
    scheduler = make_scheduler(num_usable_blocks, scheduler_class=EagerScheduler)
    sequences = [add(scheduler, prompt)[0] for prompt in prompts]
    step(scheduler)
    assert scheduler.blocks.pool.num_free_blocks == 0
    return scheduler, sequences


def victims(scheduler: Scheduler, requester: Sequence, max_preemptions: int = 8) -> list[Sequence]:
    return choose_victims(scheduler.running, requester, scheduler.blocks.pool.ref_counts, max_preemptions)


def test_the_newest_gives_way_and_goes_to_the_head_of_the_queue() -> None:
    scheduler, (first, second, third) = crowded(5, [[1] * 8, [2] * 7, [3] * 3])
    (fourth,) = add(scheduler, 3)
    batch = schedule(scheduler)
    assert batch.sequences == [first, second]
    assert list(scheduler.waiting) == [third, fourth]
    assert (third.num_preemptions, third.num_computed_tokens, third.block_table.block_ids) == (1, 0, [])
    assert scheduler.stats().num_preemptions == 1


def test_a_victim_comes_back_with_its_tokens_and_hits() -> None:
    """Preempted while it shares blocks with the oldest; what it comes back to is shared again."""
    shared = [5] * 8
    scheduler = make_scheduler(6)
    (first,) = add(scheduler, shared, max_tokens=9)
    step(scheduler)
    (second,) = add(scheduler, [*shared, 6, 6, 6], max_tokens=9)
    assert schedule(scheduler).num_scheduled_tokens == [1, 3]
    assert second.block_table.block_ids[:2] == first.block_table.block_ids[:2]
    finish_step(scheduler, scheduler.steps.batches[0])
    outputs = run(scheduler)
    assert second.num_preemptions == 1
    assert second.num_cached_tokens == 8
    assert [len([o for o in outputs if o.request_id == s.request_id]) for s in (first, second)] == [7, 8]
    assert first.num_preemptions == 0


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scheduler, (_, _, third) = crowded(5, [[1] * 8, [2] * 7, [3] * 3])
    (small,) = add(scheduler, [4])
    schedule(scheduler)
    assert {third, small} == set(scheduler.waiting)


def test_nobody_is_admitted_unless_all_others_keep_a_block_to_grow_into() -> None:
    scheduler = make_scheduler(5)
    first, second, third = (add(scheduler, [index] * (8 if index == 0 else 4))[0] for index in range(3))
    assert schedule(scheduler).sequences == [first, second]
    assert scheduler.blocks.pool.num_free_blocks == 2
    finish_step(scheduler, scheduler.steps.batches[0])
    scheduler.abort(second.request_id)
    assert schedule(scheduler).sequences == [first, third]


def test_the_lowest_priority_gives_way() -> None:
    scheduler = make_scheduler(4, policy="priority")
    (low,) = add(scheduler, [1] * 7, priority=2)
    step(scheduler)
    (high,) = add(scheduler, [2] * 3, priority=1)
    while low.num_preemptions == 0:
        step(scheduler)
    assert scheduler.running == [high]
    assert list(scheduler.waiting) == [low]


def test_the_oldest_is_never_a_victim() -> None:
    scheduler, (first, second) = crowded(4, [[1] * 8, [2] * 8])
    assert victims(scheduler, first) == [second]
    assert victims(scheduler, second) == [second]
    assert first not in victims(scheduler, first, max_preemptions=0)


def test_a_pinned_sequence_is_spared_while_others_can_be_chosen() -> None:
    scheduler, (first, second, third) = crowded(4, [[1] * 4, [2] * 4, [3] * 8])
    third.num_preemptions = 8
    assert victims(scheduler, first) == [second]
    assert victims(scheduler, second) == [second]
    assert victims(scheduler, third) == []
    second.num_preemptions = 8
    assert victims(scheduler, first) == [third]
    assert victims(scheduler, second) == [third]


def test_a_pinned_sequence_keeps_what_it_has_and_sits_out() -> None:
    scheduler, (first, second) = crowded(4, [[1] * 6, [2] * 8])
    second.num_preemptions = 8
    batch = schedule(scheduler)
    assert batch.sequences == [first]
    assert second.status.name == "RUNNING"
    assert len(second.block_table.block_ids) == 2


def share_all_blocks(scheduler: Scheduler, source: Sequence, target: Sequence) -> None:
    target.block_table.release()
    target.block_table.adopt(source.block_table.block_ids)


def test_a_sequence_that_would_free_nothing_is_passed_over() -> None:
    scheduler, (first, second, third) = crowded(4, [[1] * 8, [2] * 4, [3] * 4])
    share_all_blocks(scheduler, first, third)
    assert victims(scheduler, first) == [second]


def test_sequences_that_only_together_free_a_block_go_together() -> None:
    scheduler, (first, second, third, fourth) = crowded(5, [[1] * 8, [2] * 4, [3] * 4, [4] * 4])
    share_all_blocks(scheduler, first, third)
    share_all_blocks(scheduler, second, fourth)
    assert victims(scheduler, first) == [fourth, second]
    share_all_blocks(scheduler, first, second)
    share_all_blocks(scheduler, first, fourth)
    assert victims(scheduler, first) == []


def test_a_lone_sequence_always_gets_to_its_end() -> None:
    scheduler = make_scheduler(3)
    sequences = [add(scheduler, [index] * 3, max_tokens=10)[0] for index in range(4)]
    outputs = run(scheduler)
    assert len(outputs) == 40
    assert all(sequence.num_preemptions <= 8 for sequence in sequences)


def test_the_preempted_keep_arrival_order() -> None:
    scheduler, (first, second, third) = crowded(6, [[index] * 8 for index in range(3)])
    (late,) = add(scheduler, 3)
    step(scheduler)
    assert list(scheduler.waiting) == [third, late]
    for _ in range(4):
        step(scheduler)
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [second, third, late]
