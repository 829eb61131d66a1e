"""Prefix caching as requests see it."""

from __future__ import annotations

import pytest
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


def test_a_prefix_that_many_ask_for_at_once_is_computed_once() -> None:
    scheduler = make_scheduler(100)
    prefix = list(range(200, 240))
    sequences = [add(scheduler, [*prefix, index, 1, 2])[0] for index in range(8)]
    assert schedule(scheduler).num_scheduled_tokens == [43]
    finish_step(scheduler, scheduler.steps.batches[0])
    assert schedule(scheduler).num_scheduled_tokens == [1] + [3] * 7
    assert [sequence.num_cached_tokens for sequence in sequences] == [0] + [40] * 7


def test_who_shares_nothing_overtakes_those_that_wait_for_a_prefix() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=30)
    first, second, third = add(scheduler, 10)[0], add(scheduler, 10)[0], add(scheduler, [1, 2, 3])[0]
    assert schedule(scheduler).sequences == [first, third]
    finish_step(scheduler, scheduler.steps.batches[0])
    assert schedule(scheduler).sequences == [first, third, second]


def test_a_prefix_is_waited_for_chunk_by_chunk() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    first, second = add(scheduler, 18)[0], add(scheduler, 18)[0]
    computed = []
    while not second.num_cached_tokens:
        batch = schedule(scheduler)
        computed.append(dict(zip(batch.sequences, batch.num_scheduled_tokens, strict=True)))
        finish_step(scheduler, batch)
    assert computed == [{first: 8}, {first: 8}, {first: 2, second: 2}]


@pytest.mark.parametrize("end", ["abort", "failure", "abort in flight"])
def test_when_the_writer_of_a_prefix_is_gone_the_next_computes_it(end: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=40)
    writer, second, third = (add(scheduler, 10, max_tokens=1)[0] for _ in range(3))
    batch = schedule(scheduler)
    if end == "abort in flight":
        scheduler.abort(writer.request_id)
    finish_step(scheduler, batch, None if end == "failure" else 7)
    if end == "abort":
        scheduler.abort(writer.request_id)
        scheduler.reset_prefix_cache()
    batch = schedule(scheduler)
    assert (batch.sequences, batch.num_scheduled_tokens) == ([second], [10])
    finish_step(scheduler, batch)
    assert third.num_cached_tokens == 0
    step(scheduler)
    assert third.num_cached_tokens == 8


def test_nobody_waits_for_what_was_computed_and_is_not_cached_any_more() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    (first,) = add(scheduler, 10)
    step(scheduler)
    scheduler.reset_prefix_cache()
    (second,) = add(scheduler, 10)
    assert schedule(scheduler).sequences == [first, second]


def test_a_scored_prompt_waits_only_for_one_scored_as_deep() -> None:
    scheduler = make_scheduler()
    first = add(scheduler, 10, prompt_logprobs=1)[0]
    deeper = add(scheduler, 10, prompt_logprobs=2)[0]
    add(scheduler, 10, prompt_logprobs=2)
    add(scheduler, 10)
    assert schedule(scheduler).sequences == [first, deeper]


def test_without_caching_nobody_waits_for_a_prefix() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    add(scheduler, 10)
    add(scheduler, 10)
    assert schedule(scheduler).num_scheduled_tokens == [10, 10]


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
