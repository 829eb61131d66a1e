"""The one place where the bounds of sampling parameters are checked."""

from __future__ import annotations

import math
from typing import Any

import pytest

from quire.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_BYTES,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_BEAM_WIDTH,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SPECULATIVE_TOKENS,
    MAX_STOP_STRING_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    InvalidParameterError,
    SamplingParams,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("n", MAX_N),
        ("max_tokens", None),
        ("max_tokens", 1),
        ("temperature", 0),
        ("temperature", 2.0),
        ("top_k", -1),
        ("top_p", 1.0),
        ("top_p", 1e-9),
        ("min_p", 1.0),
        ("seed", -(2**63)),
        ("seed", 2**64 - 1),
        ("stop", ("x" * MAX_STOP_STRING_BYTES,) * MAX_STOP_STRINGS),
        ("stop_token_ids", (0,) * MAX_STOP_TOKEN_IDS),
        ("best_of", MAX_N),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
        ("prompt_logprobs", MAX_LOGPROBS),
        ("repetition_penalty", 100.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES), -100.0)),
        ("allowed_token_ids", (0,) * MAX_ALLOWED_TOKEN_IDS),
        ("bad_words", ("x" * MAX_BAD_WORD_BYTES,) * MAX_BAD_WORDS),
        ("bad_word_token_ids", ((0,) * MAX_BAD_WORD_TOKENS,)),
        ("typical_p", 1e-9),
        ("num_speculative_tokens", MAX_SPECULATIVE_TOKENS),
    ],
)
def test_at_the_limit(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", MAX_N + 1),
        ("n", True),
        ("n", 1.0),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("stop", ("",)),
        ("stop", ("a",) * (MAX_STOP_STRINGS + 1)),
        ("stop", ("é" * MAX_STOP_STRING_BYTES,)),
        ("stop", ("\ud800",)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (0,) * (MAX_STOP_TOKEN_IDS + 1)),
        ("best_of", 0),
        ("best_of", MAX_N + 1),
        ("logprobs", -1),
        ("logprobs", MAX_LOGPROBS + 1),
        ("logprobs", True),
        ("prompt_logprobs", MAX_LOGPROBS + 1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 100.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 0.0)),
        ("logit_bias", {0: 100.1}),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"0": 0.0}),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (-1,)),
        ("allowed_token_ids", (0,) * (MAX_ALLOWED_TOKEN_IDS + 1)),
        ("bad_words", ("",)),
        ("bad_words", ("a",) * (MAX_BAD_WORDS + 1)),
        ("bad_words", ("x" * (MAX_BAD_WORD_BYTES + 1),)),
        ("typical_p", 0.0),
        ("length_penalty", 0.5),
        ("early_stopping", True),
        ("num_speculative_tokens", -1),
        ("num_speculative_tokens", MAX_SPECULATIVE_TOKENS + 1),
    ],
)
def test_past_the_limit_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field
    assert len(str(raised.value)) < 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", MAX_BEAM_WIDTH + 1),
        ("best_of", MAX_BEAM_WIDTH + 1),
        ("top_k", 5),
        ("top_p", 0.5),
        ("min_p", 0.1),
        ("typical_p", 0.5),
        ("length_penalty", 10.1),
        ("early_stopping", "always"),
        ("early_stopping", 1),
    ],
)
def test_past_the_limit_of_a_beam_search(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as raised:
        SamplingParams(use_beam_search=True, **{field: value})
    assert raised.value.param == field


def test_best_of_is_the_width_of_a_beam_search() -> None:
    params = SamplingParams(use_beam_search=True, n=2, best_of=MAX_BEAM_WIDTH, early_stopping="never")
    assert params.num_sequences == MAX_BEAM_WIDTH
    assert SamplingParams(n=3).num_sequences == 3
    with pytest.raises(InvalidParameterError, match="smaller than n"):
        SamplingParams(n=3, best_of=2)


def test_nothing_is_generated_only_to_score_a_prompt() -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=1).max_tokens == 0


def test_vocabulary() -> None:
    SamplingParams(stop_token_ids=(9,)).check_vocabulary(10)
    with pytest.raises(InvalidParameterError, match="0 to 9"):
        SamplingParams(stop_token_ids=(10,)).check_vocabulary(10)
    with pytest.raises(InvalidParameterError, match="logit_bias"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)
    with pytest.raises(InvalidParameterError, match="allowed_token_ids"):
        SamplingParams(allowed_token_ids=(1, 10)).check_vocabulary(10)
