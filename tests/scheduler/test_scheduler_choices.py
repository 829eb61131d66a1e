"""n > 1: a leader computes the prompt, the others fork."""

from __future__ import annotations

import pytest
from scheduler_factories import EOS, EagerScheduler, add, finish_step, make_scheduler, run, schedule, step


def test_the_others_fork_when_the_leader_has_computed_the_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    leader, second, third = add(scheduler, 10, n=3)
    assert schedule(scheduler).sequences == [leader]
    assert scheduler.stats().num_running == 3
    finish_step(scheduler, scheduler.steps.batches[0])
    outputs = step(scheduler)
    assert [output.choice_index for output in outputs] == [0]
    batch = schedule(scheduler)
    assert batch.sequences == [leader, second, third]
    assert batch.num_scheduled_tokens == [1, 1, 1]
    assert [sequence.num_computed_tokens for sequence in batch.sequences] == [10, 9, 9]
    assert [sequence.block_table.block_ids for sequence in batch.sequences] == [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    assert batch.block_copies == [(3, 4), (3, 5)]
    assert scheduler.blocks.pool.ref_counts[1:6] == [3, 3, 1, 1, 1]
    assert [output.choice_index for output in finish_step(scheduler, batch)] == [0, 1, 2]
    assert schedule(scheduler).block_copies == []


def test_a_fork_at_a_block_border_needs_no_copy() -> None:
    scheduler = make_scheduler()
    add(scheduler, 9, n=2)
    step(scheduler)
    batch = schedule(scheduler)
    assert batch.block_copies == []
    assert [sequence.block_table.block_ids for sequence in batch.sequences] == [[1, 2, 3], [1, 2, 4]]


def test_a_fork_of_a_one_token_prompt_shares_nothing() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, n=2)
    step(scheduler)
    batch = schedule(scheduler)
    assert batch.block_copies == []
    assert [sequence.block_table.block_ids for sequence in batch.sequences] == [[1], [2]]


def test_a_full_last_block_is_copied_although_it_is_cached() -> None:
    scheduler = make_scheduler()
    _, second = add(scheduler, 8, n=2, max_tokens=1)
    step(scheduler)
    batch = schedule(scheduler)
    assert batch.sequences == [second]
    assert batch.block_copies == [(2, 3)]
    assert scheduler.blocks.prefix_cache.key_of(2) is not None


def test_a_leader_that_ends_with_its_first_token_leaves_the_prompt_to_the_others() -> None:
    scheduler = make_scheduler()
    add(scheduler, 6, n=3, max_tokens=1)
    assert [output.choice_index for output in step(scheduler)] == [0]
    batch = schedule(scheduler)
    assert batch.num_scheduled_tokens == [1, 1]
    assert batch.block_copies == [(2, 3), (2, 4)]
    assert len(finish_step(scheduler, batch)) == 2
    assert not scheduler.has_work()


def test_two_forks_that_end_in_the_same_step_free_a_shared_block_once() -> None:
    scheduler = make_scheduler()
    add(scheduler, 9, n=3)
    step(scheduler)
    step(scheduler)
    assert scheduler.blocks.pool.ref_counts[1] == 3
    step(scheduler, EOS)
    assert not scheduler.has_work()
    free = scheduler.blocks.pool.free_block_ids()
    assert sorted(free) == list(range(1, 21))
    assert free[-5:] == [3, 4, 5, 2, 1]


def test_all_choices_are_admitted_together() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    single = add(scheduler, 3)[0]
    leader, second, third = add(scheduler, 4, n=3)
    late = add(scheduler, 3)[0]
    assert schedule(scheduler).sequences == [single]
    assert list(scheduler.waiting) == [leader, late]
    finish_step(scheduler, scheduler.steps.batches[0], EOS)
    assert schedule(scheduler).sequences == [leader]
    finish_step(scheduler, scheduler.steps.batches[0])
    assert schedule(scheduler).sequences == [leader, second, third]


def test_cached_tokens_are_those_of_the_leader() -> None:
    scheduler = make_scheduler()
    add(scheduler, 9, max_tokens=1)
    run(scheduler)
    choices = add(scheduler, 9, n=2, max_tokens=1)
    outputs = run(scheduler)
    assert [output.num_cached_tokens for output in outputs] == [8, 8]
    assert [sequence.num_cached_tokens for sequence in choices] == [8, 8]


def test_without_a_free_block_the_others_wait_as_a_group() -> None:
    scheduler = make_scheduler(3, max_num_seqs=3)
    leader, second, third = add(scheduler, 9, n=3, max_tokens=2)
    step(scheduler)
    assert scheduler.running == [leader]
    assert list(scheduler.waiting) == [second]
    assert second.followers == [third]
    assert scheduler.stats().num_running == 1
    assert len(run(scheduler)) == 5


def test_as_many_fork_as_there_are_blocks() -> None:
    scheduler = make_scheduler(4)
    leader, second, third = add(scheduler, 9, n=3, max_tokens=2)
    step(scheduler)
    assert scheduler.running == [leader, second]
    assert list(scheduler.waiting) == [third]
    assert len(run(scheduler)) == 5


def test_a_preempted_leader_takes_its_followers_along() -> None:
    scheduler = make_scheduler(6, scheduler_class=EagerScheduler, max_num_batched_tokens=4, max_num_seqs=3)
    first = add(scheduler, [1] * 4)[0]
    step(scheduler)
    leader, second = add(scheduler, [2] * 16, n=2, max_tokens=2)
    for _ in range(5):
        step(scheduler)
    assert list(scheduler.waiting) == [leader]
    assert leader.followers == [second]
    assert (leader.num_preemptions, second.num_preemptions) == (1, 0)
    assert scheduler.stats().num_running == 1
    scheduler.abort(first.request_id)
    assert len(run(scheduler)) == 4


def test_a_preempted_fork_recomputes_on_its_own() -> None:
    scheduler = make_scheduler(4)
    leader, second = add(scheduler, 7, n=2, max_tokens=6)
    outputs = run(scheduler)
    assert (leader.num_preemptions, second.num_preemptions) == (0, 1)
    assert [output.choice_index for output in outputs].count(1) == 6


@pytest.mark.parametrize("token_id", [7, None])
def test_a_leader_that_fails_has_nothing_to_fork_from(token_id: int | None) -> None:
    scheduler = make_scheduler()
    _, second, third = add(scheduler, 6, n=3, max_tokens=1)
    step(scheduler, token_id)
    if token_id is None:
        assert list(scheduler.waiting) == [second]
        assert second.followers == [third]
    else:
        assert list(scheduler.waiting) == []
    assert [output.finish_reason for output in run(scheduler)] == ["length", "length"]


def test_aborting_one_choice_changes_only_its_own_references() -> None:
    scheduler = make_scheduler()
    _, second, _ = add(scheduler, 10, n=3)
    step(scheduler)
    step(scheduler)
    before = list(scheduler.blocks.pool.ref_counts)
    own = second.block_table.block_ids
    expected = [count - (block_id in own) for block_id, count in enumerate(before)]
    scheduler.abort(second.request_id, 1)
    assert scheduler.blocks.pool.ref_counts == expected
    scheduler.check_integrity()
