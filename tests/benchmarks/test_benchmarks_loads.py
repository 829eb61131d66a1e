"""Loads: the same requests for whoever is measured."""

from __future__ import annotations

import pytest
from measuring.loads import WORKLOADS, make_requests

WORD_IDS = range(100, 3000)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_repeat_of_a_load_is_always_the_same_and_no_other_shares_its_words(name: str) -> None:
    first, second = (make_requests(WORD_IDS, name, repeat, 1.5) for repeat in (0, 1))
    assert first == make_requests(WORD_IDS, name, 0, 1.5)
    assert len(first) == WORKLOADS[name].num_requests
    assert first[0].token_ids[:8] != second[0].token_ids[:8]


@pytest.mark.parametrize("name", WORKLOADS)
def test_further_repeats_keep_lengths_and_arrivals_but_not_the_words(name: str) -> None:
    first, again = (make_requests(WORD_IDS, name, repeat, 1.5) for repeat in (1, 5))
    for before, after in zip(first, again, strict=True):
        assert len(before.token_ids) == len(after.token_ids)
        assert before.num_output_tokens == after.num_output_tokens
        assert before.arrival == after.arrival
        assert before.token_ids != after.token_ids


def test_only_the_prefix_is_shared() -> None:
    requests = make_requests(WORD_IDS, "W3", 2, 1.5)
    assert len({tuple(request.token_ids[:512]) for request in requests}) == 1
    assert len({tuple(request.token_ids[512:]) for request in requests}) == len(requests)
    assert {len(request.token_ids) for request in requests} == {544}


def test_arrivals_scale_with_the_rate() -> None:
    slow, fast = ([request.arrival for request in make_requests(WORD_IDS, "W4", 0, rate)] for rate in (1.0, 4.0))
    assert slow[0] == fast[0] == 0.0
    assert fast == pytest.approx([arrival / 4 for arrival in slow if arrival is not None])
    assert slow == sorted(slow, key=lambda arrival: arrival or 0.0)
