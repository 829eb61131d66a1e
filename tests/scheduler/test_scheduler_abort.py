"""Abort: at every phase, any number of times, without output, and everything comes back."""

from __future__ import annotations

import pytest
from scheduler_factories import EOS, add, finish_step, make_scheduler, run, schedule, step

from quire.scheduler.output import SampledTokens


def assert_idle(scheduler) -> None:
    scheduler.check_integrity()
    assert not scheduler.has_work()
    assert scheduler.schedule() is None
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)


def test_unknown_ids_are_ignored() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 3)
    scheduler.abort("nobody")
    scheduler.abort(sequence.request_id, 5)
    assert scheduler.has_work()
    for _ in range(2):
        scheduler.abort(sequence.request_id)
    assert_idle(scheduler)


@pytest.mark.parametrize("n", [1, 3])
def test_abort_while_it_waits(n: int) -> None:
    scheduler = make_scheduler()
    (sequence, *_) = add(scheduler, 3, n=n)
    scheduler.abort(sequence.request_id)
    assert_idle(scheduler)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_abort_in_flight(num_steps: int, n: int) -> None:
    """First chunk, last chunk, first decode (and the fork's copies), later."""
    scheduler = make_scheduler(max_num_batched_tokens=8)
    (sequence, *_) = add(scheduler, 11, n=n)
    for _ in range(num_steps):
        step(scheduler)
    batch = schedule(scheduler)
    scheduler.abort(sequence.request_id)
    assert finish_step(scheduler, batch) == []
    assert_idle(scheduler)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_abort_between_steps(num_steps: int, n: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    (sequence, *_) = add(scheduler, 11, n=n)
    for _ in range(num_steps):
        step(scheduler)
    scheduler.abort(sequence.request_id)
    assert_idle(scheduler)


def test_abort_after_a_preemption() -> None:
    scheduler = make_scheduler(4)
    first, second = add(scheduler, [1] * 8)[0], add(scheduler, [2] * 8)[0]
    step(scheduler)
    step(scheduler)
    assert list(scheduler.waiting) == [second]
    scheduler.abort(second.request_id)
    scheduler.check_integrity()
    scheduler.abort(first.request_id)
    assert_idle(scheduler)


def test_abort_after_the_end_is_ignored() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, 3)
    step(scheduler, EOS)
    scheduler.abort(sequence.request_id)
    assert_idle(scheduler)


def test_a_new_request_may_take_the_id_while_the_old_one_is_in_flight() -> None:
    scheduler = make_scheduler()
    (old,) = add(scheduler, 3, request_id="id")
    batch = schedule(scheduler)
    scheduler.abort("id")
    (new,) = add(scheduler, 5, request_id="id")
    assert finish_step(scheduler, batch) == []
    (output,) = step(scheduler)
    assert output.request_id == "id"
    assert new.num_output_tokens == 1
    assert old.num_output_tokens == 0


def test_others_in_the_batch_go_on() -> None:
    scheduler = make_scheduler()
    first, second, third = (add(scheduler, [index] * 3)[0] for index in range(3))
    batch = schedule(scheduler)
    scheduler.abort(second.request_id)
    outputs = scheduler.update(batch, SampledTokens([11, 12, 13]))
    told = [(output.request_id, output.token_ids) for output in outputs]
    assert told == [(first.request_id, [11]), (third.request_id, [13])]
    scheduler.check_integrity()


@pytest.mark.parametrize("choice_index", [0, 1, 2])
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_abort_of_one_choice(num_steps: int, in_flight: bool, choice_index: int) -> None:
    """A leader's place is taken by its first follower; a follower just goes."""
    scheduler = make_scheduler(max_num_batched_tokens=8, max_num_seqs=3)
    (sequence, *_) = add(scheduler, 11, n=3, max_tokens=3)
    outputs = []
    for _ in range(num_steps):
        outputs += step(scheduler)
    batch = schedule(scheduler) if in_flight else None
    scheduler.abort(sequence.request_id, choice_index)
    scheduler.check_integrity()
    after = finish_step(scheduler, batch) if batch else []
    after += run(scheduler)
    assert choice_index not in {output.choice_index for output in after}
    ends = [output.choice_index for output in outputs + after if output.finish_reason]
    assert sorted(ends) == [index for index in range(3) if index != choice_index]
    assert_idle(scheduler)
