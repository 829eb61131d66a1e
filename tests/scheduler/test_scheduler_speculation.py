"""Drafts: what is looked up, how many, who gets some, and what becomes of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scheduler_factories import EOS, add, finish_step, make_request, make_scheduler, schedule

from quire import config, sampling_params
from quire.config import ConfigError, SpeculativeConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, SampledTokens, ScheduledBatch, StepOutput, TokenLogProbs
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.speculation import (
    GENERATION_TOKENS,
    MAX_INDEXED_TOKENS,
    MAX_PAUSE,
    DraftLength,
    NgramIndex,
    reached_tokens,
)

PERIOD = [10, 11, 12]


def speculating(num_speculative_tokens: int = 4, **fields: Any) -> Scheduler:
    return make_scheduler(
        speculative_config=SpeculativeConfig(num_speculative_tokens=num_speculative_tokens, min_ngram=1), **fields
    )


def decoding(scheduler: Scheduler, prompt: list[int], **fields: Any) -> Sequence:
    """A sequence that has sampled 10 after its prompt."""
    (sequence,) = add(scheduler, prompt, **fields)
    finish_step(scheduler, schedule(scheduler), 10)
    return sequence


def verify(scheduler: Scheduler, batch: ScheduledBatch, token_ids: list[int | None], **fields: Any) -> StepOutput:
    (output,) = scheduler.update(batch, SampledTokens(token_ids, **fields))
    scheduler.check_integrity()
    return output


def by_definition(token_ids: list[int], num_tokens: int, max_ngram: int, min_ngram: int) -> list[int]:
    """The continuation of the latest earlier occurrence of the longest suffix, which may overlap it."""
    for size in range(max_ngram, min_ngram - 1, -1):
        suffix = token_ids[len(token_ids) - size :]
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == suffix:
                text = list(token_ids)
                for position in range(end, end + num_tokens):
                    text.append(text[position])
                return text[len(token_ids) :]
    return []


@pytest.mark.parametrize("vocab_size", [1, 2, 4, 30])
def test_index_finds_what_the_definition_says(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    num_found = 0
    for _ in range(60):
        min_ngram = rng.randint(1, 3)
        max_ngram = min_ngram + rng.randint(0, 2)
        index, token_ids = NgramIndex(max_ngram, min_ngram), rng.choices(range(vocab_size), k=rng.randint(1, 40))
        for _ in range(15):
            while index.extend(token_ids, rng.randint(1, 50)):
                pass
            drafts = index.propose(token_ids, 5)
            assert drafts == by_definition(token_ids, 5, max_ngram, min_ngram)
            num_found += bool(drafts)
            token_ids += rng.choices(range(vocab_size), k=rng.randint(1, 4))
    assert num_found > 100


def test_index_is_bounded_and_knows_what_is_recent() -> None:
    index, token_ids = NgramIndex(2, 1), [1, 2, 3, *range(10, 10 + 5 * GENERATION_TOKENS)]
    assert index.extend(token_ids, len(token_ids)) == GENERATION_TOKENS
    for _ in range(4):
        token_ids += range(len(token_ids), len(token_ids) + GENERATION_TOKENS // 2 + 1)
        index.extend(token_ids, len(token_ids))
        assert len(index._recent) + len(index._older) <= 2 * 2 * GENERATION_TOKENS
    latest = token_ids[-GENERATION_TOKENS // 2 :][:4]
    assert index.propose([*token_ids, *latest[:2]], 2) == latest[2:]
    assert index.propose([*token_ids, 1, 2], 2) == []


def test_length_grows_by_one_halves_and_pauses_longer_and_longer() -> None:
    length = DraftLength(8)

    def after(num_accepted: int) -> int:
        length.learn(length._length, num_accepted)
        return length._length

    assert [after(8), after(0), after(3), after(3), after(0), after(1)] == [8, 4, 3, 4, 2, 1]
    assert after(1) == 2
    pauses = []
    for _ in range(8):
        num_waited = 0
        while (num_drafts := length.next()) == 0:
            num_waited += 1
        pauses.append(num_waited)
        length.learn(num_drafts, 0)
    assert pauses == [0, 0, 1, 2, 4, 8, 16, MAX_PAUSE]
    while not length.next():
        pass
    assert after(1) == 2
    length.learn(2, 0)
    length.learn(1, 0)
    assert [length.next(), length.next()] == [0, 1]


def test_reached_tokens_end_with_the_first_that_is_no_draft() -> None:
    assert reached_tokens([1, 2], [1, 2, 3]) == [1, 2, 3]
    assert reached_tokens([1, 2], [1, 5, 3]) == [1, 5]
    assert reached_tokens([1, 2], [5, 2, 3]) == [5]
    assert reached_tokens([1, 2], [1, None, 3]) == [1, None]
    assert reached_tokens([1, 2], [5, None, None]) == [5]


def test_one_step_brings_what_several_would_have_brought() -> None:
    scheduler = speculating()
    sequence = decoding(scheduler, PERIOD * 2)
    batch = schedule(scheduler)
    assert (batch.drafts, batch.num_scheduled_tokens, batch.num_decodes) == ({0: [11, 12, 10, 11]}, [5], 0)
    output = verify(scheduler, batch, [11, 12, 10, 99999, 5])
    assert (output.token_ids, output.finish_reason) == ([11, 12, 10, 99999], None)
    assert sequence.token_ids == PERIOD * 2 + [10, 11, 12, 10, 99999]
    assert sequence.num_computed_tokens == len(sequence.token_ids) - 1
    stats = scheduler.stats()
    assert (stats.num_draft_steps, stats.num_drafted_tokens, stats.num_accepted_tokens) == (1, 4, 3)


def test_blocks_are_cached_up_to_the_last_right_draft() -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2)
    verify(scheduler, schedule(scheduler), [11, 50, 0, 0, 0])
    assert len(scheduler.blocks.prefix_cache) == 2  # 8 of 9 tokens are computed; the drafts reach into block 3


def test_a_stop_token_among_right_drafts_ends_the_sequence_there() -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2, stop_token_ids=(12,))
    output = verify(scheduler, schedule(scheduler), [11, 12, 10, 11, 12])
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([11, 12], FinishReason.STOP, 12)
    assert not scheduler.has_work()


def test_min_tokens_holds_by_position() -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2, stop_token_ids=(12,), min_tokens=3)
    output = verify(scheduler, schedule(scheduler), [11, 12, 10, 11, 12])
    assert (output.token_ids, output.finish_reason) == ([11, 12, 10, 11, 12], FinishReason.STOP)


@pytest.mark.parametrize(("max_tokens", "num_drafts"), [(2, 0), (3, 1), (4, 2), (6, 4), (9, 4)])
def test_no_draft_past_the_last_token(max_tokens: int, num_drafts: int) -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2, max_tokens=max_tokens)
    batch = schedule(scheduler)
    assert batch.num_scheduled_tokens == [1 + num_drafts]
    output = verify(scheduler, batch, [11, 12, 10, 11, 12][: 1 + num_drafts])
    assert (output.finish_reason is FinishReason.LENGTH) == (max_tokens <= 6)


def test_a_failure_counts_only_where_it_is_reached() -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2)
    assert verify(scheduler, schedule(scheduler), [11, 50, None, None, None]).token_ids == [11, 50]
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2)
    output = verify(scheduler, schedule(scheduler), [11, 12, None, 11, 12])
    assert (output.token_ids, output.finish_reason) == ([11, 12], FinishReason.ERROR)
    assert len(scheduler.blocks.prefix_cache) == 0


def test_log_probs_are_those_of_the_tokens_told() -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2, logprobs=0)
    log_probs = {row: TokenLogProbs(row, -1.0, [], []) for row in range(5)}
    output = verify(scheduler, schedule(scheduler), [11, 50, 0, 0, 0], log_probs=log_probs)
    assert output.log_probs == [log_probs[0], log_probs[1]]


def test_drafts_get_what_is_left_of_the_budget() -> None:
    scheduler = speculating(max_num_batched_tokens=8)
    decoding(scheduler, PERIOD * 2)
    add(scheduler, list(range(100, 105)))
    batch = schedule(scheduler)
    assert (batch.num_scheduled_tokens, batch.sampling, batch.drafts) == ([5, 3], [0, 1], {1: [11, 12]})


def test_drafts_get_blocks_only_while_every_row_keeps_one() -> None:
    scheduler = speculating(num_usable_blocks=3)
    decoding(scheduler, PERIOD * 2 + [9], max_tokens=5)
    assert schedule(scheduler).drafts == {}  # 8 slots are taken: one block holds the token, one must stay free
    scheduler = speculating(num_usable_blocks=4)
    decoding(scheduler, PERIOD * 2, max_tokens=6)
    assert schedule(scheduler).drafts == {0: [11, 12, 10, 11]}


def test_rows_of_logits_are_bounded() -> None:
    scheduler = speculating(num_speculative_tokens=1, max_num_seqs=2)
    decoding(scheduler, PERIOD * 2, num_speculative_tokens=16)
    assert schedule(scheduler).drafts == {0: [11, 12, 10]}


def test_a_request_says_for_itself() -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2, num_speculative_tokens=0)
    assert schedule(scheduler).drafts == {}
    scheduler = speculating(num_speculative_tokens=0)
    decoding(scheduler, PERIOD * 2, num_speculative_tokens=2)
    assert schedule(scheduler).drafts == {0: [11, 12]}


def test_beams_have_no_drafts() -> None:
    scheduler = speculating()
    scheduler.add(make_request(PERIOD * 2, use_beam_search=True, n=2))
    assert not scheduler.speculator.active


def test_the_window_lets_go_of_blocks_however_far_ahead_others_are() -> None:
    scheduler = speculating(num_usable_blocks=40, sliding_window=8)
    sequence = decoding(scheduler, PERIOD * 2, max_tokens=100)
    while scheduler.has_work():
        batch = schedule(scheduler)
        rows = 1 + len(batch.drafts.get(0, ()))
        scheduler.update(batch, SampledTokens([PERIOD[(len(sequence.token_ids) + row) % 3] for row in range(rows)]))
        assert len(sequence.block_table.held_block_ids()) <= 2 + 1 + 2  # window, a partial one, blocks ahead
    assert scheduler.stats().num_accepted_tokens > 70


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    num_tokens = 2 * MAX_INDEXED_TOKENS - 6
    scheduler = speculating(
        num_usable_blocks=3000, max_num_batched_tokens=10000, max_model_len=10000, enable_prefix_caching=False
    )
    prompt = (PERIOD * num_tokens)[:num_tokens]
    decoding(scheduler, prompt, ignore_eos=True)
    batch = schedule(scheduler)
    assert batch.drafts == {}
    finish_step(scheduler, batch, EOS)
    assert schedule(scheduler).drafts == {}  # in the index now, where the last tokens are new
    assert scheduler.speculator._drafters[scheduler.running[0]].index.num_indexed == num_tokens + 1


def test_rows_must_add_up() -> None:
    scheduler = speculating()
    decoding(scheduler, PERIOD * 2)
    with pytest.raises(ValueError, match="4 tokens were sampled for 5 rows"):
        scheduler.update(schedule(scheduler), SampledTokens([11, 12, 10, 11]))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_speculative_tokens": 17},
        {"num_speculative_tokens": -1},
        {"min_ngram": 0},
        {"min_ngram": 5},
        {"max_ngram": 17},
    ],
    ids=str,
)
def test_configuration_is_bounded(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--speculative-config"):
        SpeculativeConfig(**fields)


def test_the_two_leaves_agree() -> None:
    assert config.MAX_SPECULATIVE_TOKENS == sampling_params.MAX_SPECULATIVE_TOKENS
    assert SamplingParams().num_speculative_tokens is None
