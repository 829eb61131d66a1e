"""A step scheduled while one is in flight: who is in it, and what becomes of those who end, fail or give way."""

from __future__ import annotations

import pytest
from scheduler_factories import EOS, EagerScheduler, add, finish_step, make_scheduler, schedule

from quire.grammar import Grammar
from quire.scheduler.output import UNKNOWN_TOKEN, FinishReason


def test_a_decode_goes_on_with_an_unknown_token() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 3)
    first = schedule(scheduler)
    second = schedule(scheduler)
    assert (sequence.token_ids[-1], sequence.num_computed_tokens) == (UNKNOWN_TOKEN, 3)
    assert (second.sequences, second.num_decodes, second.sampling) == ([sequence], 1, [0])
    (output,) = finish_step(scheduler, first, 11)
    assert output.token_ids == [11]
    assert (sequence.token_ids[3:], sequence.num_computed_tokens) == ([11], 3)
    third = schedule(scheduler)
    finish_step(scheduler, second, 12)
    finish_step(scheduler, third, 13)
    assert sequence.token_ids[3:] == [11, 12, 13]


def test_an_end_is_noticed_one_step_late_and_its_row_is_passed_over() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 3)
    first, second = schedule(scheduler), schedule(scheduler)
    (output,) = finish_step(scheduler, first, EOS)
    assert output.finish_reason is FinishReason.STOP
    pool = scheduler.blocks.pool
    assert (pool.num_fenced_blocks, scheduler.stats().num_used_blocks) == (1, 1)
    assert finish_step(scheduler, second) == []
    assert pool.num_fenced_blocks == scheduler.stats().num_used_blocks == 0
    assert sequence.token_ids[3:] == [EOS]


def test_the_last_token_that_may_be_generated_is_not_computed() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, max_tokens=1)
    batch = schedule(scheduler)
    assert scheduler.schedule() is None
    (output,) = finish_step(scheduler, batch)
    assert output.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": Grammar("regex", "a*")},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"bad_word_token_ids": ((5,),)},
        {"num_speculative_tokens": 2},
        {"prompt_logprobs": 0},
        {"n": 2},
        {"use_beam_search": True, "best_of": 2, "n": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_who_needs_its_token_stays_and_the_others_go_on(fields: dict) -> None:
    scheduler = make_scheduler()
    (other,) = add(scheduler, 3)
    staying = add(scheduler, [5, 6, 7], **fields)[0]
    first = schedule(scheduler)
    assert set(first.sequences) == {other, staying}
    assert schedule(scheduler).sequences == [other]
    assert staying.token_ids == [5, 6, 7]


@pytest.mark.parametrize("fields", [{"min_tokens": 3}, {"logit_bias": {5: 1.0}}, {"logprobs": 2}, {"temperature": 0.0}])
def test_who_only_counts_its_tokens_goes_on(fields: dict) -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 3, **fields)
    schedule(scheduler)
    assert schedule(scheduler).sequences == [sequence]


def test_chunks_go_on_whatever_the_request_asks_for() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    (sequence,) = add(scheduler, 10, prompt_logprobs=1)
    first, second = schedule(scheduler), schedule(scheduler)
    assert (first.num_scheduled_tokens, second.num_scheduled_tokens, sequence.num_computed_tokens) == ([4], [4], 4)
    finish_step(scheduler, first)
    assert sequence.num_computed_tokens == 4
    finish_step(scheduler, second)
    assert sequence.num_computed_tokens == 8


def test_a_prefix_that_is_in_flight_is_waited_for() -> None:
    scheduler = make_scheduler()
    add(scheduler, 9)
    first = schedule(scheduler)
    (twin,) = add(scheduler, 9)
    second = schedule(scheduler)
    assert twin not in second.sequences
    finish_step(scheduler, first)
    assert twin in schedule(scheduler).sequences
    assert twin.num_cached_tokens == 8


def test_a_failed_sequence_is_computed_once_more_and_nobody_is_told() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 9)
    first, second = schedule(scheduler), schedule(scheduler)
    (output,) = finish_step(scheduler, first, None)
    assert output.finish_reason is FinishReason.ERROR
    assert finish_step(scheduler, second, 7) == []
    assert len(scheduler.blocks.prefix_cache) == 0
    assert sequence.token_ids == list(range(100, 109))


def test_an_abort_keeps_the_blocks_until_the_last_step_that_uses_them() -> None:
    scheduler = make_scheduler(num_usable_blocks=4)
    (sequence,) = add(scheduler, 7)
    first, second = schedule(scheduler), schedule(scheduler)
    scheduler.abort(sequence.request_id)
    pool = scheduler.blocks.pool
    assert (pool.num_free_blocks, pool.num_fenced_blocks) == (2, 2)
    assert finish_step(scheduler, first) == []
    assert (pool.num_free_blocks, pool.num_fenced_blocks) == (2, 2)
    assert finish_step(scheduler, second) == []
    assert (pool.num_free_blocks, pool.num_fenced_blocks) == (4, 0)


def test_a_fenced_block_is_found_again() -> None:
    scheduler = make_scheduler(num_usable_blocks=4)
    (sequence,) = add(scheduler, 9)
    finish_step(scheduler, schedule(scheduler))
    batch = schedule(scheduler)
    scheduler.abort(sequence.request_id)
    (twin,) = add(scheduler, 9)
    pool = scheduler.blocks.pool
    assert pool.num_fenced_blocks == 3
    assert twin in schedule(scheduler).sequences
    assert (twin.num_cached_tokens, pool.num_fenced_blocks) == (8, 1)
    finish_step(scheduler, batch)
    assert (pool.num_free_blocks, pool.num_fenced_blocks) == (1, 0)


def test_who_gives_way_in_flight_gives_its_blocks_when_the_step_has_retired() -> None:
    scheduler = make_scheduler(num_usable_blocks=4, scheduler_class=EagerScheduler)
    older, newer = add(scheduler, 8)[0], add(scheduler, [5] * 8)[0]
    first = schedule(scheduler)
    assert scheduler.schedule() is None
    assert newer.num_preemptions == 1
    assert newer.token_ids == [5] * 8
    assert scheduler.blocks.pool.num_fenced_blocks == 2
    finish_step(scheduler, first, 11)
    assert (older.token_ids[8:], newer.token_ids[8:]) == ([11], [])
    assert older in schedule(scheduler).sequences


def test_who_gives_way_after_its_step_was_handed_out_runs_again_when_that_has_retired() -> None:
    """As when a beam search grows: its row of the step in flight is not for the sequence that begins anew."""
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 6)
    first = schedule(scheduler)
    scheduler.preempt(sequence)
    assert scheduler.schedule() is None
    assert finish_step(scheduler, first, 11) == []
    assert schedule(scheduler).sequences == [sequence]
    assert (sequence.token_ids, sequence.num_computed_tokens) == (list(range(100, 106)), 0)
