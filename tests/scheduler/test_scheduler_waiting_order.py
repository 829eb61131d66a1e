"""Who of those that wait is admitted first."""

from __future__ import annotations

import pytest
from scheduler_factories import add, finish_step, make_scheduler, run, schedule, step

from quire.scheduler.cached_prefix import CachedPrefix
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


def looks(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[Sequence]:
    """Whose prefix is looked for in the cache, from now on."""
    looked_for: list[Sequence] = []
    find = scheduler.blocks._find_prefix

    def recorded(sequence: Sequence) -> CachedPrefix:
        looked_for.append(sequence)
        return find(sequence)

    monkeypatch.setattr(scheduler.blocks, "_find_prefix", recorded)
    return looked_for


def test_a_head_that_does_not_fit_is_looked_up_once_while_its_first_block_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler(6, max_model_len=24)
    (running,) = add(scheduler, 9)
    step(scheduler)
    looked_for = looks(scheduler, monkeypatch)
    (waiting,) = add(scheduler, [1] * 16)
    version = scheduler.blocks.prefix_cache.version
    for _ in range(5):
        step(scheduler)
    assert looked_for == [waiting]
    assert scheduler.blocks.prefix_cache.version > version
    assert running.num_computed_tokens == 14


def test_who_waits_finds_what_has_been_cached_since(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(7, max_model_len=24, max_num_batched_tokens=4)
    (running,) = add(scheduler, 16)
    step(scheduler)
    step(scheduler)
    looked_for = looks(scheduler, monkeypatch)
    (waiting,) = add(scheduler, [*range(100, 116), 1])
    for num_blocks in (2, 3):
        assert scheduler.blocks.find_cached_prefix(waiting).block_ids == running.block_table.block_ids[:num_blocks]
        assert scheduler.blocks.find_cached_prefix(waiting).num_tokens == num_blocks * 4
        step(scheduler)
    assert looked_for == [waiting] * 2


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_who_found_nothing_finds_what_has_been_cached_since(sliding_window: int | None) -> None:
    """With a window, the prefix may be found of which the first block is no longer there."""
    scheduler = make_scheduler(sliding_window=sliding_window)
    cache = scheduler.blocks.prefix_cache
    (waiting,) = add(scheduler, HOT)
    assert scheduler.blocks.find_cached_prefix(waiting).num_tokens == 0
    num_blocks = (len(HOT) - 1) // 4
    first = 0 if sliding_window is None else 1
    cache.extend_keys(waiting.block_keys, HOT, num_blocks)
    for index in range(first, num_blocks):
        cache.insert(waiting.block_keys[index + 1], index + 1)
    prefix = scheduler.blocks.find_cached_prefix(waiting)
    assert prefix.num_tokens == num_blocks * 4
    assert all(prefix.block_ids[-1:])
