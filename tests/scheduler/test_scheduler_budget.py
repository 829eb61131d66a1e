"""How decodes, prompts and long prompts share a step."""

from __future__ import annotations

from scheduler_factories import add, finish_step, make_scheduler, schedule, step

from quire.scheduler.budget import GROW_AFTER
from quire.scheduler.output import ScheduledBatch
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence


def prompt(number: int, num_tokens: int) -> list[int]:
    """Shares nothing with those of other numbers."""
    return [1000 * number + position for position in range(num_tokens)]


def computed(batch: ScheduledBatch) -> dict[Sequence, int]:
    return dict(zip(batch.sequences, batch.num_scheduled_tokens, strict=True))


def long_and_short(**fields: object) -> tuple[Scheduler, Sequence, Sequence]:
    scheduler = make_scheduler(100, max_num_batched_tokens=16, **fields)
    return scheduler, add(scheduler, prompt(1, 80))[0], add(scheduler, prompt(2, 6))[0]


def test_decodes_come_before_an_older_prompt() -> None:
    scheduler, long, short = long_and_short()
    step(scheduler)
    assert computed(schedule(scheduler)) == {short: 1, long: 15}


def test_a_long_prompt_gives_half_of_a_step_and_gets_back_what_is_not_used() -> None:
    scheduler, long, short = long_and_short()
    assert computed(schedule(scheduler)) == {long: 10, short: 6}
    assert long.block_table.capacity == 12


def test_a_long_prompt_alone_has_the_whole_step() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16)
    (long,) = add(scheduler, prompt(1, 80))
    assert computed(schedule(scheduler)) == {long: 16}


def test_a_long_prompt_that_runs_gives_way_to_those_that_wait() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16)
    (long,) = add(scheduler, prompt(1, 120))
    step(scheduler)
    (short,) = add(scheduler, prompt(2, 20))
    assert computed(schedule(scheduler)) == {long: 8, short: 8}


def test_what_is_given_back_takes_no_block_that_others_need() -> None:
    """The long one needs a third block for more than 8 tokens; two rows are in use and two blocks are left."""
    scheduler = make_scheduler(25, max_num_batched_tokens=16)
    long, short = add(scheduler, prompt(1, 80))[0], add(scheduler, prompt(2, 6))[0]
    scheduler.blocks.pool.allocate(25 - 6)
    scheduler.prompts._has_room = lambda *args: True
    assert computed(scheduler.schedule()) == {long: 8, short: 6}


def test_prompts_that_are_not_long_are_computed_one_after_another() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16)
    first, second = add(scheduler, prompt(1, 64))[0], add(scheduler, prompt(2, 64))[0]
    chunks = []
    for _ in range(5):
        chunks.append(computed(schedule(scheduler)))
        finish_step(scheduler, scheduler.steps.batches[0])
    assert chunks == [{first: 16}] * 4 + [{first: 1, second: 15}]


def test_equally_long_prompts_are_computed_one_after_another_and_others_overtake_the_next() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16)
    first, second = add(scheduler, prompt(1, 80))[0], add(scheduler, prompt(2, 80))[0]
    (short,) = add(scheduler, prompt(3, 6))
    assert computed(schedule(scheduler)) == {first: 10, short: 6}
    finish_step(scheduler, scheduler.steps.batches[0])
    while second not in scheduler.running:
        assert first.num_output_tokens == 0
        step(scheduler)


def test_a_long_prompt_gives_way_to_one_half_as_long() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16)
    first, half = add(scheduler, prompt(1, 160))[0], add(scheduler, prompt(2, 80))[0]
    (more,) = add(scheduler, prompt(3, 81))
    assert computed(schedule(scheduler)) == {first: 12, half: 4}  # which gives way too, to nobody
    assert list(scheduler.waiting) == [more]


def test_without_chunked_prefill_nobody_gives_way() -> None:
    scheduler = make_scheduler(100, enable_chunked_prefill=False, max_model_len=200, max_num_batched_tokens=200)
    scheduler.prompts.max_num_tokens = 16
    first, second = add(scheduler, prompt(1, 120))[0], add(scheduler, prompt(2, 70))[0]
    assert computed(schedule(scheduler)) == {first: 120, second: 70}


def test_prompts_beside_decodes_are_limited_and_others_are_not() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16)
    scheduler.prompts.max_num_tokens = 5
    (first,) = add(scheduler, prompt(1, 12))
    (second,) = add(scheduler, prompt(2, 17))
    assert computed(schedule(scheduler)) == {first: 12}
    finish_step(scheduler, scheduler.steps.batches[0])
    assert computed(schedule(scheduler)) == {first: 1, second: 5}


def test_a_prompt_that_ends_has_the_second_half_of_a_step_for_itself_where_tokens_cost_time() -> None:
    for cost_time, expected in ((True, {1: 5, 2: 3}), (False, {1: 5, 2: 3, 3: 8})):
        scheduler = make_scheduler(100, max_num_batched_tokens=16)
        scheduler.prompts.max_num_tokens = 16 if cost_time else None
        for number, num_tokens in ((1, 5), (2, 3), (3, 12)):
            add(scheduler, prompt(number, num_tokens))
        batch = computed(schedule(scheduler))
        assert {sequence.token_ids[0] // 1000: num_tokens for sequence, num_tokens in batch.items()} == expected


def test_a_prompt_that_goes_on_leaves_nothing_unused_where_tokens_cost_time() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16)
    scheduler.prompts.max_num_tokens = 8
    (first,), (second,) = add(scheduler, prompt(1, 19)), add(scheduler, prompt(2, 30))
    assert computed(schedule(scheduler)) == {first: 16}
    finish_step(scheduler, scheduler.steps.batches[0])
    assert computed(schedule(scheduler)) == {first: 3, second: 13}


def test_a_step_that_does_not_fit_is_computed_in_smaller_ones() -> None:
    scheduler, long, short = long_and_short()
    batch = schedule(scheduler)
    assert batch.num_tokens == 16
    assert scheduler.withdraw(batch)
    scheduler.check_integrity()
    assert (long.num_computed_tokens, short.num_computed_tokens) == (0, 0)
    sizes = []
    for _ in range(GROW_AFTER):
        batch = schedule(scheduler)
        sizes.append(batch.num_tokens)
        finish_step(scheduler, batch)
    assert max(sizes) == sizes[0] == 8
    (new,) = add(scheduler, prompt(3, 60))
    assert computed(schedule(scheduler))[new] > 8


def test_a_step_of_one_token_cannot_be_smaller() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=1)
    add(scheduler, 3)
    assert not scheduler.withdraw(schedule(scheduler))


def test_whole_prompts_cannot_be_smaller() -> None:
    scheduler = make_scheduler(100, max_num_batched_tokens=16, max_model_len=16, enable_chunked_prefill=False)
    add(scheduler, 12)
    assert not scheduler.withdraw(schedule(scheduler))
