"""Who of those that wait is admitted first."""

from __future__ import annotations

from scheduler_factories import add, finish_step, make_scheduler, run, schedule, step

from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence

HOT = list(range(100, 120))


def warm_scheduler(**fields: object) -> Scheduler:
    """One row; HOT is cached."""
    scheduler = make_scheduler(max_num_seqs=1, **fields)
    add(scheduler, [*HOT, 1], max_tokens=1)
    run(scheduler)
    return scheduler


def admitted(scheduler: Scheduler) -> list[Sequence]:
    """Run until all have ended; the order in which they began."""
    order: list[Sequence] = []
    while scheduler.has_work():
        batch = schedule(scheduler)
        order += [sequence for sequence in batch.sequences if sequence not in order]
        finish_step(scheduler, batch)
    return order


def test_the_longest_cached_prefix_goes_first() -> None:
    scheduler = warm_scheduler()
    cold, short = add(scheduler, [1] * 9, max_tokens=1)[0], add(scheduler, [*HOT[:8], 2], max_tokens=1)[0]
    long = add(scheduler, [*HOT[:16], 3], max_tokens=1)[0]
    assert admitted(scheduler) == [long, short, cold]


def test_equally_long_prefixes_go_in_order_of_arrival() -> None:
    scheduler = warm_scheduler()
    sequences = [add(scheduler, [*HOT, number], max_tokens=1)[0] for number in range(4)]
    assert admitted(scheduler) == sequences


def test_nobody_is_overtaken_more_often_than_may_be() -> None:
    scheduler = warm_scheduler()
    scheduler.prompts.order.max_overtakes = 2
    cold = add(scheduler, [1] * 9, max_tokens=1)[0]
    hot = [add(scheduler, [*HOT, number], max_tokens=1)[0] for number in range(4)]
    assert admitted(scheduler) == [*hot[:2], cold, *hot[2:]]


def test_the_bound_holds_within_one_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, [*HOT, 1], max_tokens=1)
    run(scheduler)
    scheduler.prompts.order.max_overtakes = 2
    cold = add(scheduler, [1] * 9, max_tokens=1)[0]
    hot = [add(scheduler, [*HOT, number, 5], max_tokens=1)[0] for number in range(4)]
    assert schedule(scheduler).sequences == [*hot[:2], cold, *hot[2:]]


def test_priorities_come_before_cached_prefixes() -> None:
    scheduler = warm_scheduler(policy="priority")
    hot, cold = add(scheduler, [*HOT, 2], max_tokens=1, priority=1)[0], add(scheduler, [1] * 9, max_tokens=1)[0]
    assert admitted(scheduler) == [cold, hot]


def test_who_was_preempted_is_not_overtaken() -> None:
    scheduler = make_scheduler()
    add(scheduler, [*HOT, 1], max_tokens=1)
    run(scheduler)
    first, second = add(scheduler, [1] * 4)[0], add(scheduler, [2] * 4)[0]
    step(scheduler)
    scheduler.preempt(second)
    scheduler.reset_prefix_cache()
    hot = add(scheduler, [*HOT, 2])[0]
    assert schedule(scheduler).sequences == [first, second, hot]


def test_a_head_that_does_not_fit_is_looked_up_again_only_if_the_cache_has_changed() -> None:
    scheduler = make_scheduler(6, max_model_len=24)
    (running,) = add(scheduler, 9)
    step(scheduler)
    (waiting,) = add(scheduler, [1] * 16)
    step(scheduler)
    found = waiting.found_prefix
    assert found is not None
    step(scheduler)
    assert waiting.found_prefix is found
    step(scheduler)  # fills the third block
    step(scheduler)
    assert waiting.found_prefix is not found
    assert running.num_computed_tokens == 13
