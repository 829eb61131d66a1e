"""What is refused, and with which code."""

from __future__ import annotations

import pytest
from scheduler_factories import add, make_request, make_scheduler, run

from quire.scheduler.request import AdmissionError


def refusal(prompt: int, num_usable_blocks: int = 20, **fields: object) -> AdmissionError:
    config = {name: fields.pop(name) for name in ("max_model_len", "max_num_seqs", "sliding_window") if name in fields}
    scheduler = make_scheduler(num_usable_blocks, **config)
    with pytest.raises(AdmissionError) as caught:
        scheduler.add(make_request(prompt, **fields))
    assert not scheduler.has_work()
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"), [(16, 1, "prompt"), (40, None, "prompt"), (10, 7, "max_tokens")]
)
def test_longer_than_the_context(prompt: int, max_tokens: int | None, param: str) -> None:
    error = refusal(prompt, max_model_len=16, max_tokens=max_tokens)
    total = prompt + (max_tokens or 1)
    assert f"This model's maximum context length is 16 tokens. However, you requested {total} tokens" in str(error)
    assert (error.code, error.param) == ("context_length_exceeded", param)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"), [(9, 1, "prompt"), (8, 2, "max_tokens"), (20, None, "prompt")]
)
def test_larger_than_the_pool(prompt: int, max_tokens: int | None, param: str) -> None:
    error = refusal(prompt, num_usable_blocks=2, max_tokens=max_tokens)
    assert (error.code, error.param) == ("kv_cache_exceeded", param)
    assert "room for 8 tokens" in str(error)


def test_more_choices_than_rows() -> None:
    error = refusal(3, max_num_seqs=4, n=5)
    assert (error.code, error.param) == ("n_too_large", "n")


def test_an_empty_prompt() -> None:
    assert refusal(0).code == "empty_prompt"


def test_an_id_in_use() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, request_id="same")
    with pytest.raises(AdmissionError) as caught:
        add(scheduler, 3, request_id="same")
    assert caught.value.code == "duplicate_request_id"
    run(scheduler)
    add(scheduler, 3, request_id="same")


@pytest.mark.parametrize(
    ("num_usable_blocks", "max_model_len", "num_tokens"),
    [
        (20, 16, 16),  # the context
        (3, 100, 13),  # the pool: the last token is not stored
    ],
)
def test_without_max_tokens_the_rest_is_used(num_usable_blocks: int, max_model_len: int, num_tokens: int) -> None:
    scheduler = make_scheduler(num_usable_blocks, max_model_len=max_model_len)
    (sequence,) = add(scheduler, 5, max_tokens=None)
    outputs = run(scheduler)
    assert len(sequence.token_ids) == num_tokens
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(("prompt", "max_tokens"), [(8, 1), (1, 8), (4, 5)])
def test_what_just_fits_into_the_pool_runs(prompt: int, max_tokens: int) -> None:
    scheduler = make_scheduler(2)
    add(scheduler, prompt, max_tokens=max_tokens)
    assert len(run(scheduler)) == max_tokens


def test_a_window_makes_room_for_what_is_longer_than_the_pool() -> None:
    scheduler = make_scheduler(3, sliding_window=6, max_model_len=100)
    add(scheduler, 50, max_tokens=None)
    assert len(run(scheduler)) == 50
    assert refusal(50, num_usable_blocks=2, sliding_window=6, max_model_len=100).code == "kv_cache_exceeded"
