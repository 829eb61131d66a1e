"""Sliding window: blocks that fell out of it are freed, and never come back as a false prefix."""

from __future__ import annotations

import pytest
from scheduler_factories import add, finish_step, make_scheduler, run, schedule, step


def test_leading_blocks_are_freed_while_decoding() -> None:
    scheduler = make_scheduler(sliding_window=6, max_model_len=100)
    (sequence,) = add(scheduler, 4, max_tokens=40)
    most = 0
    while scheduler.has_work():
        batch = schedule(scheduler)
        most = max(most, scheduler.stats().num_used_blocks)
        first_seen = max(0, sequence.num_computed_tokens - 5)
        assert all(sequence.block_table.block_ids[first_seen // 4 :])
        finish_step(scheduler, batch)
    assert most == 3


def test_the_engine_is_told_which_entries_are_gone() -> None:
    scheduler = make_scheduler(sliding_window=5)
    add(scheduler, 12)
    step(scheduler)
    updates = schedule(scheduler).block_table_updates
    assert [(update.row, update.start, update.block_ids) for update in updates] == [(0, 0, [0, 0]), (0, 3, [4])]


def test_a_prompt_longer_than_the_pool_is_computed_in_chunks() -> None:
    scheduler = make_scheduler(4, sliding_window=6, max_model_len=200)
    add(scheduler, 101, max_tokens=1)
    counts = []
    while scheduler.has_work():
        batch = schedule(scheduler)
        counts += batch.num_scheduled_tokens
        finish_step(scheduler, batch)
    assert sum(counts) == 101
    assert max(counts) == 16


def test_blocks_out_of_the_window_are_found_while_they_last() -> None:
    scheduler = make_scheduler(20, sliding_window=5)
    add(scheduler, 17, max_tokens=1)
    run(scheduler)
    (sequence,) = add(scheduler, 17, max_tokens=1)
    step(scheduler)
    assert sequence.num_cached_tokens == 16


def test_a_hit_holds_only_what_the_window_sees() -> None:
    scheduler = make_scheduler(sliding_window=5)
    add(scheduler, 17, max_tokens=1)
    run(scheduler)
    (sequence,) = add(scheduler, 17)
    schedule(scheduler)
    assert sequence.block_table.block_ids[:3] == [0, 0, 0]
    assert sequence.num_computed_tokens == 16
    assert scheduler.stats().num_used_blocks == 2


def test_a_fork_of_a_windowed_sequence_shares_what_is_left() -> None:
    scheduler = make_scheduler(sliding_window=5, max_num_batched_tokens=8)
    leader, second = add(scheduler, 15, n=2)
    step(scheduler)
    step(scheduler)
    batch = schedule(scheduler)
    assert batch.sequences == [leader, second]
    assert [sequence.block_table.block_ids for sequence in batch.sequences] == [[0, 2, 3, 4], [0, 2, 3, 5]]
    assert batch.block_copies == [(4, 5)]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_any_window_runs_in_the_least_pool_that_holds_it(window: int, block_size: int) -> None:
    least = -(-(window - 1) // block_size) + 1
    scheduler = make_scheduler(least, block_size, sliding_window=window, max_model_len=60)
    for index in range(3):
        add(scheduler, [index] * 30, max_tokens=20)
    assert len(run(scheduler)) == 60
