"""Prefix caching as requests see it."""

from __future__ import annotations

from scheduler_factories import add, finish_step, make_scheduler, run, schedule, step


def test_a_full_prompt_hit_leaves_a_token_to_compute() -> None:
    scheduler = make_scheduler()
    add(scheduler, 8, max_tokens=1)
    run(scheduler)
    (sequence,) = add(scheduler, 8, max_tokens=1)
    batch = schedule(scheduler)
    assert batch.num_scheduled_tokens == [4]
    (output,) = finish_step(scheduler, batch)
    assert sequence.num_cached_tokens == output.num_cached_tokens == 4


def test_a_hit_shares_the_blocks_of_a_running_sequence() -> None:
    scheduler = make_scheduler()
    (first,) = add(scheduler, 10)
    step(scheduler)
    (second,) = add(scheduler, 10)
    batch = schedule(scheduler)
    assert second.block_table.block_ids[:2] == first.block_table.block_ids[:2]
    assert batch.num_scheduled_tokens == [1, 2]
    assert scheduler.blocks.pool.ref_counts[1:5] == [2, 2, 1, 1]


def test_who_needs_what_is_being_computed_waits_for_it() -> None:
    """Three requests with one prompt arrive at once: it is computed once. Who has another prompt overtakes them."""
    scheduler = make_scheduler(max_num_batched_tokens=24)
    add(scheduler, 10)
    twins = [add(scheduler, 10)[0] for _ in range(2)]
    (other,) = add(scheduler, prompt=[99] * 6)
    batch = schedule(scheduler)
    assert batch.num_scheduled_tokens == [10, 6]
    assert batch.sequences[1] is other
    finish_step(scheduler, batch)
    assert sorted(schedule(scheduler).num_scheduled_tokens) == [1, 1, 2, 2]
    assert [twin.num_cached_tokens for twin in twins] == [8, 8]


def test_whoever_waited_computes_it_when_the_other_is_gone() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    (first,) = add(scheduler, 10)
    (second,) = add(scheduler, 10)
    step(scheduler)
    scheduler.abort(first.request_id)
    batch = schedule(scheduler)
    assert batch.sequences == [second]
    assert second.num_cached_tokens == 4


def test_output_tokens_are_cached_too() -> None:
    scheduler = make_scheduler()
    (first,) = add(scheduler, 6, max_tokens=7)
    run(scheduler)
    (second,) = add(scheduler, [*first.token_ids, 1, 2, 3])
    step(scheduler)
    assert len(first.token_ids) == 13
    assert second.num_cached_tokens == 12


def test_another_salt_shares_nothing() -> None:
    scheduler = make_scheduler()
    add(scheduler, 9, cache_salt="a", max_tokens=1)
    run(scheduler)
    others = [add(scheduler, 9, cache_salt=salt)[0] for salt in ("", "b", "a")]
    step(scheduler)
    assert [sequence.num_cached_tokens for sequence in others] == [0, 0, 8]


def test_without_caching_nothing_is_found_or_hashed() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    add(scheduler, 9, max_tokens=1)
    run(scheduler)
    (sequence,) = add(scheduler, 9)
    step(scheduler)
    assert sequence.num_cached_tokens == 0
    assert len(sequence.block_keys) == 1
    assert scheduler.stats().prefix_cache_queries == 0


def test_after_a_reset_nothing_is_found() -> None:
    scheduler = make_scheduler()
    (running,) = add(scheduler, 9)
    step(scheduler)
    scheduler.reset_prefix_cache()
    (sequence,) = add(scheduler, 9, max_tokens=1)
    step(scheduler)
    assert sequence.num_cached_tokens == 0
    assert running.num_computed_tokens == 10


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    scheduler = make_scheduler(4)
    add(scheduler, 13, max_tokens=1)
    run(scheduler)
    assert scheduler.blocks.pool.free_block_ids() == [4, 3, 2, 1]
    add(scheduler, [1] * 5, max_tokens=1)
    run(scheduler)
    (sequence,) = add(scheduler, 13, max_tokens=1)
    run(scheduler)
    assert sequence.num_cached_tokens == 8


def test_a_hit_refreshes_the_order_of_eviction() -> None:
    scheduler = make_scheduler(6)
    add(scheduler, 5, max_tokens=1)
    run(scheduler)
    add(scheduler, [1] * 5, max_tokens=1)
    run(scheduler)
    assert scheduler.blocks.pool.free_block_ids() == [5, 6, 2, 1, 4, 3]
    add(scheduler, 5, max_tokens=1)
    run(scheduler)
    assert scheduler.blocks.pool.free_block_ids() == [6, 2, 4, 3, 5, 1]


def test_cached_blocks_do_not_count_as_room_twice() -> None:
    """Two free blocks, one of them cached: a prompt that hits it and needs two more does not fit."""
    scheduler = make_scheduler(4)
    add(scheduler, 5, max_tokens=1)
    run(scheduler)
    (running,) = add(scheduler, [1] * 8)
    step(scheduler)
    (waiting,) = add(scheduler, 12, max_tokens=1)
    assert schedule(scheduler).sequences == [running]
    assert waiting in scheduler.waiting
