"""Log-probabilities of prompt tokens: those of transformers, and the same bits however the work is cut into steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.log_prob_pages import LogProbEntries, LogProbPages
from quire.engine.model_runner import ModelOutput
from quire.engine.prompt_log_probs import MAX_LOGITS_BYTES, log_prob_entries, rows_at_once
from quire.models.forward_batch import ForwardBatch
from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.scheduler.output import MIN_LOG_PROB, FinishReason, StepOutput, TokenLogProbs
from quire.scheduler.request import Request
from quire.tales import MODEL_DIR

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "tales"]
MAX_MODEL_LEN = 128
SHARED, LENGTHS = 48, (1, 2, 17, 31, 48, 49, 64, 97)
TOLERANCE = 1e-4
DEPTH = 3
ENGINE_SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": MAX_MODEL_LEN,
    "num_blocks": 128,
    "max_num_seqs": 8,
}

TinyCheckpoint = Callable[..., Path]
Scored = list[TokenLogProbs]


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> Path:
    family = request.param
    overrides = {"sliding_window": 11} if family == "mistral" else {}
    return MODEL_DIR if family == "tales" else tiny_checkpoint(family, **overrides)


each_family = pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
some_families = pytest.mark.parametrize("checkpoint", ["mistral", "gpt2", "tales"], indirect=True)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_engine(directory: Path, dtype: str = "float32", **options: Any) -> Engine:
    return Engine(EngineConfig(model=str(directory), dtype=dtype, **(ENGINE_SETTINGS | options)))


def prompts(vocab_size: int) -> list[list[int]]:
    """The longer ones share their first SHARED tokens, pairwise at least."""
    rng = random.Random(5)
    shared = [rng.randrange(3, vocab_size) for _ in range(SHARED)]
    return [(shared + [rng.randrange(3, vocab_size) for _ in range(length)])[:length] for length in LENGTHS]


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[StepOutput]]:
    """All outputs of each request."""
    outputs: dict[str, list[StepOutput]] = {str(index): [] for index in range(len(requests))}
    for index, (prompt, params) in enumerate(requests):
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=index))
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return list(outputs.values())


def score(engine: Engine, token_lists: list[list[int]], depth: int = DEPTH) -> list[Scored]:
    params = SamplingParams(max_tokens=0, prompt_logprobs=depth)
    results = []
    for (output,) in run(engine, [(token_ids, params) for token_ids in token_lists]):
        assert (output.token_ids, output.finish_reason) == ([], FinishReason.LENGTH)
        assert output.prompt_log_probs is not None
        results.append(output.prompt_log_probs)
    return results


@lru_cache(maxsize=1)
def reference(directory: Path) -> list[torch.Tensor]:
    """Log-softmax of transformers' logits, [P, V], of each prompt by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [
            model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
            for token_ids in prompts(model.config.vocab_size)
        ]


@each_family
@pytest.mark.parametrize("budget", [7, 512])
def test_what_transformers_says(checkpoint: Path, budget: int) -> None:
    engine = make_engine(checkpoint, max_num_batched_tokens=budget)
    token_lists = prompts(engine.info.vocab_size)
    for token_ids, scored, expected in zip(token_lists, score(engine, token_lists), reference(checkpoint), strict=True):
        assert [entry.token_id for entry in scored] == token_ids[1:]
        for position, entry in enumerate(scored):
            row = expected[position]
            assert entry.log_prob == pytest.approx(row[entry.token_id].item(), abs=TOLERANCE)
            best = row.topk(DEPTH).values.tolist()
            assert entry.top_log_probs == pytest.approx(best, abs=TOLERANCE)
            assert row[entry.top_token_ids].tolist() == pytest.approx(best, abs=TOLERANCE)


@each_dtype
@pytest.mark.usefixtures("two_threads")
def test_the_same_bits_with_two_threads(dtype: str) -> None:
    whole, cut = make_engine(MODEL_DIR, dtype), make_engine(MODEL_DIR, dtype, max_num_batched_tokens=5)
    token_lists = prompts(whole.info.vocab_size)[:5]
    expected = score(whole, token_lists)
    assert score(cut, token_lists) == expected
    assert score(cut, token_lists) == expected


@some_families
@each_dtype
def test_the_same_bits_for_any_chunks_cold_and_warm(checkpoint: Path, dtype: str) -> None:
    expected: list[Scored] = []
    for budget in (512, 1, 2, 3, 5, 7, 16):
        engine = make_engine(checkpoint, dtype, max_num_batched_tokens=budget)
        token_lists = prompts(engine.info.vocab_size)
        cold = score(engine, token_lists)
        expected = expected or cold
        assert cold == expected
        num_hits = engine.stats().prefix_cache_hits
        assert score(engine, token_lists) == expected
        assert engine.stats().prefix_cache_hits - num_hits > 150
        engine.reset_prefix_cache()
        assert score(engine, token_lists) == expected


@some_families
@each_dtype
def test_the_same_bits_alone_and_among_neighbours(checkpoint: Path, dtype: str) -> None:
    engine = make_engine(checkpoint, dtype)
    token_lists = prompts(engine.info.vocab_size)
    together = score(engine, token_lists)
    alone = make_engine(checkpoint, dtype, max_num_seqs=1, enable_prefix_caching=False)
    assert score(alone, token_lists) == together
    scoring, chatting = SamplingParams(max_tokens=3, prompt_logprobs=DEPTH), SamplingParams(max_tokens=20)
    mixed = make_engine(checkpoint, dtype, max_num_batched_tokens=13)
    requests = [(token_ids, params) for token_ids in token_lists for params in (chatting, scoring)]
    outputs = run(mixed, requests)[1::2]
    assert [answers[0].prompt_log_probs for answers in outputs] == together
    assert all(output.prompt_log_probs is None for answers in outputs for output in answers[1:])


@pytest.mark.parametrize("checkpoint", ["llama", "gpt2", "tales"], indirect=True)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_same_bits_after_preemption(checkpoint: Path, prefix_caching: bool) -> None:
    engine = make_engine(checkpoint)
    token_lists = prompts(engine.info.vocab_size)
    expected = score(engine, token_lists)
    crowded = make_engine(
        checkpoint, num_blocks=9, enable_prefix_caching=prefix_caching, max_num_batched_tokens=24, max_num_seqs=4
    )
    old = SamplingParams(max_tokens=70, ignore_eos=True)
    requests = [(token_lists[0], old), (token_lists[2], old)]
    requests += [(token_ids, SamplingParams(max_tokens=0, prompt_logprobs=DEPTH)) for token_ids in token_lists]
    outputs = run(crowded, requests)[2:]
    assert crowded.stats().num_preemptions > 0
    assert [output.prompt_log_probs for (output,) in outputs] == expected


@some_families
def test_a_block_is_found_only_if_it_is_stored_deep_enough(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    (token_ids,) = prompts(engine.info.vocab_size)[-1:]
    hits = []
    for depth in (None, 1, 1, 4, 2, 4, None):
        before = engine.stats().prefix_cache_hits
        if depth is None:
            run(engine, [(token_ids, SamplingParams(max_tokens=1))])
        else:
            (scored,) = score(engine, [token_ids], depth)
            assert [len(entry.top_token_ids) for entry in scored] == [depth] * len(scored)
            assert scored == score(make_engine(checkpoint), [token_ids], depth)[0]
        hits.append(engine.stats().prefix_cache_hits - before)
    assert hits == [0, 0, 95, 0, 95, 95, 96]


@some_families
def test_all_choices_are_told_once(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, max_num_batched_tokens=11)
    token_lists = prompts(engine.info.vocab_size)
    expected = score(make_engine(checkpoint), token_lists)
    for max_tokens in (0, 5):
        params = SamplingParams(n=3, max_tokens=max_tokens, prompt_logprobs=DEPTH)
        for outputs, scored in zip(run(engine, [(ids, params) for ids in token_lists]), expected, strict=True):
            assert sum(len(output.token_ids) for output in outputs) == 3 * max_tokens
            assert [output.prompt_log_probs for output in outputs if output.prompt_log_probs is not None] == [scored]


def test_beams_are_told_once(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = make_engine(tiny_checkpoint("llama"), max_num_batched_tokens=11)
    token_lists = prompts(320)
    params = SamplingParams(n=2, best_of=3, use_beam_search=True, max_tokens=4, prompt_logprobs=DEPTH)
    expected = score(make_engine(tiny_checkpoint("llama")), token_lists)
    for _ in range(2):
        for outputs, scored in zip(run(engine, [(ids, params) for ids in token_lists]), expected, strict=True):
            assert [output.prompt_log_probs for output in outputs if output.prompt_log_probs is not None] == [scored]
            assert outputs[0].prompt_log_probs == scored
    assert engine.stats().prefix_cache_hits > 150


def test_a_prompt_may_fill_the_whole_context(tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint("llama")
    token_ids = [3 + index % 300 for index in range(MAX_MODEL_LEN)]
    (exact,) = score(make_engine(directory, num_blocks=1 + MAX_MODEL_LEN // 16), [token_ids])
    assert score(make_engine(directory), [token_ids]) == [exact]
    assert len(exact) == MAX_MODEL_LEN - 1


def test_more_than_the_engine_gives_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = make_engine(tiny_checkpoint("llama"), max_logprobs=2)
    assert engine.info.max_logprobs == 2
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(InvalidParameterError, match=f"{name} is at most 2 here"):
            engine.add(Request(request_id="0", prompt_token_ids=[5, 6], params=SamplingParams(**{name: 3}), seed=0))
    assert [len(entry.top_token_ids) for entry in score(engine, [[5, 6, 7]], 2)[0]] == [2, 2]
    assert [entry.top_token_ids for entry in score(engine, [[5, 6, 7]], 0)[0]] == [[], []]


def test_a_prompt_with_logits_that_are_not_finite_fails_and_is_not_found(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = make_engine(tiny_checkpoint("llama"), max_num_batched_tokens=16)
    token_ids = prompts(320)[-1]
    expected = score(engine, [token_ids])
    engine.reset_prefix_cache()
    compute, num_steps = engine._runner.run, 0

    def broken(inputs: ForwardBatch, num_sampled: int) -> ModelOutput:
        nonlocal num_steps
        num_steps += 1
        output = compute(inputs, num_sampled)
        return ModelOutput(output.logits, output.best, output.scored * torch.nan) if num_steps == 2 else output

    engine._runner.run = broken  # type: ignore[method-assign]
    ((output,),) = run(engine, [(token_ids, SamplingParams(max_tokens=0, prompt_logprobs=DEPTH))])
    assert (output.finish_reason, output.prompt_log_probs) == (FinishReason.ERROR, None)
    assert score(engine, [token_ids]) == expected
    assert engine.stats().prefix_cache_hits == 0


def test_the_warm_test_sees_entries_that_are_not_copied(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_checkpoint("llama"))
    token_lists = prompts(320)
    expected = score(engine, token_lists)
    monkeypatch.setattr(LogProbPages, "copy_blocks", lambda self, copies: None)
    assert score(engine, token_lists) != expected


def entries_of(*args: Any) -> tuple[LogProbEntries, torch.Tensor]:
    log_prob, top_ids, top_log_probs, finite = log_prob_entries(*args)
    return LogProbEntries(log_prob.numpy(), top_ids.int().numpy(), top_log_probs.numpy()), finite


def test_pages_are_copied_and_read_across_blocks() -> None:
    pages, rng = LogProbPages(6, 8, 4), torch.Generator().manual_seed(1)
    entries, _ = entries_of(torch.randn(20, 30, generator=rng), torch.arange(20), 3, 30, lambda hidden: hidden)
    pages.write([5, 2, 3], 3, 23, entries)
    pages.copy_blocks([(2, 4), (5, 1)])
    found = pages.read([1, 4, 3], 4, 23, 2)
    assert found.log_prob.tolist() == entries.log_prob[1:].tolist()
    assert found.top_token_ids.tolist() == entries.top_token_ids[1:, :2].tolist()
    assert found.top_log_probs.tolist() == entries.top_log_probs[1:, :2].tolist()


def test_ties_go_to_the_lower_id() -> None:
    values = torch.tensor([2.0, -torch.inf, -1.5, 0.0, -0.0, 2.0, -7.0])
    logits = values[torch.randint(0, 7, (40, 100), generator=torch.Generator().manual_seed(2))]
    for depth in (0, 1, 7, 20, 64):
        expected = [sorted(range(100), key=lambda i: (-row[i], i))[:depth] for row in logits.tolist()]
        entries, _ = entries_of(logits, torch.zeros(40, dtype=torch.int64), depth, 100, lambda hidden: hidden)
        assert entries.top_token_ids.tolist() == expected


def test_logits_are_bounded_and_log_probs_can_be_written_as_json() -> None:
    vocab_size, sizes = 50000, []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        rows = torch.full((len(hidden), vocab_size), -torch.inf)
        rows[:, 7] = hidden[:, 0]
        return rows

    num_rows = rows_at_once(vocab_size) + 3
    hidden = torch.zeros(num_rows, 1)
    hidden[-1] = torch.nan
    entries, finite = entries_of(hidden, torch.tensor([7, 8] * 171)[:num_rows], 2, vocab_size, logits)
    assert max(sizes) * vocab_size * 4 <= MAX_LOGITS_BYTES
    assert entries.log_prob[:2].tolist() == [0.0, MIN_LOG_PROB]
    assert entries.top_token_ids[0].tolist() == [7, 0]
    assert entries.top_log_probs[0].tolist() == [0.0, MIN_LOG_PROB]
    assert finite.tolist() == [True] * (num_rows - 1) + [False]
