"""The one place where the bounds of sampling parameters are checked."""

from __future__ import annotations

import math
from typing import Any

import pytest

from quire.sampling_params import (
    MAX_N,
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
    ],
)
def test_past_the_limit_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field
    assert len(str(raised.value)) < 100


def test_vocabulary() -> None:
    SamplingParams(stop_token_ids=(9,)).check_vocabulary(10)
    with pytest.raises(InvalidParameterError, match="0 to 9"):
        SamplingParams(stop_token_ids=(10,)).check_vocabulary(10)
