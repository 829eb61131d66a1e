"""What is learned from the time of steps, and what follows for the size of chunks."""

from __future__ import annotations

import random

import pytest

from quire.engine.step_time import MIN_PROMPT_TOKENS, StepPacer, StepTimeModel

BASE, DECODE, PROMPT = 4e-3, 3e-4, 3.5e-4


def seconds(num_decodes: int, num_prompt_tokens: int) -> float:
    return BASE + DECODE * num_decodes + PROMPT * num_prompt_tokens


def learned(noise: float = 0.0, num_steps: int = 200) -> StepTimeModel:
    rng, model = random.Random(0), StepTimeModel()
    for _ in range(num_steps):
        num_decodes, num_prompt_tokens = rng.randint(1, 32), rng.choice((0, 0, 64, 128))
        factor = 1 + noise * rng.uniform(-1, 1)
        model.observe(num_decodes, num_prompt_tokens, factor * seconds(num_decodes, num_prompt_tokens))
    return model


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.01), (0.2, 0.1)])
def test_a_linear_machine_is_learned(noise: float, tolerance: float) -> None:
    model = learned(noise)
    for num_decodes, num_prompt_tokens in ((1, 0), (32, 0), (16, 100)):
        expected = seconds(num_decodes, num_prompt_tokens)
        assert model.seconds(num_decodes, num_prompt_tokens) == pytest.approx(expected, rel=tolerance)


def test_nothing_is_expected_before_anything_ran() -> None:
    assert StepTimeModel().seconds(4, 100) == 0


def test_one_slow_step_changes_little() -> None:
    model = learned()
    before = model.seconds(16, 100)
    model.observe(16, 100, 10.0)
    model.observe(16, 0, 10.0)
    assert before <= model.seconds(16, 100) < 1.3 * before


def test_a_machine_that_slows_down_is_followed() -> None:
    model = learned()
    for _ in range(150):
        model.observe(8, 0, 5 * seconds(8, 0))
        model.observe(8, 64, 5 * seconds(8, 64))
    assert model.seconds(8, 64) == pytest.approx(5 * seconds(8, 64), rel=0.1)


def test_more_work_never_takes_less_time() -> None:
    """Even if steps with more decodes happened to be faster."""
    model = StepTimeModel()
    for num_decodes in range(1, 30):
        model.observe(num_decodes, 0, 1.0 / num_decodes)
        model.observe(num_decodes, 50, 0.5 / num_decodes)
    times = [model.seconds(num_decodes, 0) for num_decodes in range(64)]
    assert times == sorted(times)
    assert model.seconds(5, 100) >= model.seconds(5, 10) >= model.seconds(5, 0) >= 0


def pacer_of(model: StepTimeModel, target: float) -> StepPacer:
    pacer = StepPacer(target, 2048)
    pacer._model = model
    return pacer


def test_a_chunk_fills_the_target_with_headroom() -> None:
    num_tokens = pacer_of(learned(), 0.05).max_prompt_tokens(16)
    assert 0.8 * 0.05 < seconds(16, num_tokens) <= 0.05


def test_a_looser_target_and_fewer_decodes_leave_more() -> None:
    model = learned()
    by_target = [pacer_of(model, target).max_prompt_tokens(16) for target in (0.01, 0.02, 0.05, 0.2, 5.0)]
    by_decodes = [pacer_of(model, 0.05).max_prompt_tokens(num_decodes) for num_decodes in (0, 8, 64, 500)]
    assert by_target == sorted(by_target)
    assert by_decodes == sorted(by_decodes, reverse=True)
    assert (by_target[0], by_target[-1], by_decodes[-1]) == (MIN_PROMPT_TOKENS, 2048, MIN_PROMPT_TOKENS)


def test_before_anything_is_known_a_step_is_not_limited() -> None:
    assert StepPacer(0.05, 2048).max_prompt_tokens(4) == 2048


def test_without_steps_that_only_decode_chunks_still_find_their_size() -> None:
    model = StepTimeModel()
    pacer = pacer_of(model, 0.05)
    num_tokens = 512
    for _ in range(100):
        model.observe(8, num_tokens, seconds(8, num_tokens))
        num_tokens = pacer.max_prompt_tokens(8)
    assert 0.8 * 0.05 < seconds(8, num_tokens) <= 0.05
