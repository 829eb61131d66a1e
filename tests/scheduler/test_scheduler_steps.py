"""What one step computes, what it tells, and when a sequence ends."""

from __future__ import annotations

import pytest
from scheduler_factories import EOS, add, finish_step, make_scheduler, run, schedule, step

from quire.scheduler.output import SampledTokens


def test_a_prompt_and_its_decodes() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 6, max_tokens=3)
    batch = schedule(scheduler)
    assert (batch.sequences, batch.num_scheduled_tokens, batch.num_decodes, batch.sampling) == ([sequence], [6], 0, [0])
    assert [(update.row, update.start, update.block_ids) for update in batch.block_table_updates] == [(0, 0, [1, 2])]
    (output,) = finish_step(scheduler, batch, 7)
    assert (output.token_ids, output.finish_reason) == ([7], None)
    batch = schedule(scheduler)
    assert (batch.num_scheduled_tokens, batch.num_decodes, batch.block_table_updates) == ([1], 1, [])
    finish_step(scheduler, batch, 8)
    (output,) = step(scheduler, 9)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([9], "length", None)
    assert sequence.token_ids[6:] == [7, 8, 9]
    assert scheduler.schedule() is None


def test_a_table_update_only_when_a_block_is_added() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, max_tokens=7)
    updates = []
    while scheduler.has_work():
        batch = schedule(scheduler)
        updates.append([(update.start, update.block_ids) for update in batch.block_table_updates])
        finish_step(scheduler, batch)
    assert updates == [[(0, [1])], [], [(1, [2])], [], [], [], [(2, [3])]]


def test_rows_with_one_token_come_first_and_running_before_waiting() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=9)
    first, second = add(scheduler, 4)[0], add(scheduler, 4)[0]
    step(scheduler)
    long, single = add(scheduler, list(range(20)))[0], add(scheduler, 1)[0]
    batch = schedule(scheduler)
    assert batch.sequences == [first, second, long]
    assert (batch.num_scheduled_tokens, batch.num_decodes, batch.sampling) == ([1, 1, 7], 2, [0, 1])
    finish_step(scheduler, batch)
    batch = schedule(scheduler)
    assert batch.sequences == [first, second, long]
    finish_step(scheduler, batch)
    batch = schedule(scheduler)
    assert batch.sequences == [first, second, single, long]
    assert (batch.num_scheduled_tokens, batch.sampling) == ([1, 1, 1, 6], [0, 1, 2, 3])


def test_a_chunk_cut_to_one_token_does_not_sample() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3)
    first, second = add(scheduler, 2)[0], add(scheduler, 6)[0]
    batch = schedule(scheduler)
    assert batch.sequences == [second, first]
    assert (batch.num_scheduled_tokens, batch.num_decodes, batch.sampling) == ([1, 2], 1, [1])


def test_without_chunked_prefill_a_prompt_is_scheduled_whole() -> None:
    scheduler = make_scheduler(enable_chunked_prefill=False, max_model_len=20, max_num_batched_tokens=20)
    add(scheduler, 12)
    add(scheduler, 12)
    assert schedule(scheduler).num_scheduled_tokens == [12]


def test_the_budget_is_never_exceeded_and_the_oldest_goes_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=2)
    sequences = [add(scheduler, 1, max_tokens=4)[0] for _ in range(3)]
    step(scheduler)
    step(scheduler)
    assert [sequence.num_output_tokens for sequence in sequences] == [2, 2, 0]


def test_priorities_order_waiting_and_running() -> None:
    scheduler = make_scheduler(policy="priority", max_num_seqs=1)
    low, high = add(scheduler, 3, priority=5)[0], add(scheduler, 3, priority=-1)[0]
    also_high = add(scheduler, 3, priority=-1)[0]
    assert list(scheduler.waiting) == [high, also_high, low]
    assert schedule(scheduler).sequences == [high]


def test_fcfs_ignores_priorities() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 3, priority=5)[0], add(scheduler, 3, priority=-1)[0]
    assert list(scheduler.waiting) == [first, second]


def test_two_steps_at_most_and_in_order() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3)
    first, second = schedule(scheduler), schedule(scheduler)
    with pytest.raises(RuntimeError):
        scheduler.schedule()
    with pytest.raises(RuntimeError):
        scheduler.update(second, SampledTokens([7]))
    finish_step(scheduler, first)
    with pytest.raises(RuntimeError):
        finish_step(scheduler, first)
    finish_step(scheduler, second)


def test_tokens_must_match_the_rows_that_sample() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3)
    with pytest.raises(ValueError, match="zip"):
        scheduler.update(schedule(scheduler), SampledTokens([]))


@pytest.mark.parametrize(
    ("fields", "token_id", "end"),
    [
        ({}, EOS, ("stop", None)),
        ({"ignore_eos": True}, EOS, (None, None)),
        ({"stop_token_ids": (5,)}, 5, ("stop", 5)),
        ({"stop_token_ids": (5,)}, 6, (None, None)),
        ({"stop_token_ids": (EOS,)}, EOS, ("stop", None)),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS, ("stop", EOS)),
        ({"max_tokens": 1}, 5, ("length", None)),
        ({"max_tokens": 1}, EOS, ("stop", None)),
        ({"min_tokens": 1}, EOS, (None, None)),
        ({"min_tokens": 1, "max_tokens": 1}, EOS, ("length", None)),
    ],
)
def test_what_ends_a_sequence(fields: dict[str, object], token_id: int, end: tuple[str | None, int | None]) -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, **fields)
    (output,) = step(scheduler, token_id)
    assert output.token_ids == [token_id]
    assert (output.finish_reason, output.stop_reason) == end
    assert scheduler.has_work() == (end[0] is None)


def test_min_tokens_counts_the_tokens_before_the_stop() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, min_tokens=2)
    assert [output.finish_reason for output in run(scheduler, lambda sequence: EOS)] == [None, None, "stop"]


def test_the_context_ends_a_sequence() -> None:
    scheduler = make_scheduler(max_model_len=8)
    (sequence,) = add(scheduler, 5, max_tokens=None)
    assert run(scheduler)[-1].finish_reason == "length"
    assert len(sequence.token_ids) == 8


def test_a_row_that_is_not_finite_ends_alone() -> None:
    scheduler = make_scheduler()
    add(scheduler, 8, request_id="bad")
    add(scheduler, [1, 2, 3], request_id="good")
    batch = schedule(scheduler)
    bad, good = sorted(scheduler.update(batch, SampledTokens([None, 7])), key=lambda output: output.request_id)
    assert (bad.request_id, bad.token_ids, bad.finish_reason) == ("bad", [], "error")
    assert (good.request_id, good.token_ids, good.finish_reason) == ("good", [7], None)
    scheduler.check_integrity()


def test_a_failed_request_leaves_nothing_in_the_cache() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, 14)
    step(scheduler)
    assert len(scheduler.blocks.prefix_cache) == 2
    step(scheduler, None)
    assert len(scheduler.blocks.prefix_cache) == 0
    (sequence,) = add(scheduler, 14, max_tokens=1)
    assert run(scheduler)[-1].finish_reason == "length"
    assert sequence.num_cached_tokens == 0


def test_stats_count_tokens_rows_and_blocks() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    add(scheduler, 9, n=2)
    add(scheduler, [1, 2], n=2)
    step(scheduler)
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 2)
    assert (stats.num_free_blocks, stats.num_used_blocks) == (20 - 4, 4)
    assert (stats.num_steps, stats.num_scheduled_tokens) == (1, 9)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits, stats.num_preemptions) == (9, 0, 0)
