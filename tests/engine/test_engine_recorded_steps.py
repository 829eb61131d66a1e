"""Steps that are replayed on a CPU give what the model itself gives, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.model_runner import ModelOutput, ModelRunner
from quire.models.forward_batch import ForwardBatch
from quire.sampling_params import SamplingParams
from quire.scheduler.request import Request

TinyCheckpoint = Callable[..., Path]


@pytest.mark.parametrize(
    ("family", "recorded"), [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True), ("gpt2", False)]
)
def test_which_families_are_replayed(family: str, recorded: bool, tiny_checkpoint: TinyCheckpoint) -> None:
    engine = Engine(EngineConfig(model=str(tiny_checkpoint(family)), num_blocks=40))
    assert engine._runner.record() is recorded


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"kv_cache_dtype": "int8"}, {"quantization": "int8"}], ids=str
)
def test_a_replay_is_the_step_itself(options: dict[str, str], tiny_checkpoint: TinyCheckpoint) -> None:
    """Mixed steps of prompts, chunks and decodes; each is computed twice, and writes the same keys and values twice."""
    directory = tiny_checkpoint("qwen3")
    engine = Engine(EngineConfig(model=str(directory), num_blocks=200, max_num_batched_tokens=23, **options))  # type: ignore[arg-type]
    runner: ModelRunner = engine._runner
    compute, num_mixed, num_decodes = runner.run, 0, 0

    def both(inputs: ForwardBatch, num_sampled: int) -> ModelOutput:
        nonlocal num_mixed, num_decodes
        num_decodes += inputs.logits_indices is None
        num_mixed += inputs.logits_indices is not None
        replayed = compute(inputs, num_sampled)
        kept = [part.clone() for part in (replayed.logits, replayed.scored)]
        assert replayed.best is not None
        hidden = engine._model.forward(inputs, engine._kv.layers)
        assert torch.equal(kept[0], engine._model.logits(hidden[:num_sampled]))
        assert torch.equal(kept[1], hidden[num_sampled:])
        return replayed

    runner.run = both  # type: ignore[method-assign]
    rng = random.Random(1)
    for index in range(12):
        prompt = [rng.randrange(3, 90) for _ in range(rng.randrange(1, 60))]
        scores = index % 4 == 0
        params = SamplingParams(max_tokens=rng.randrange(1, 20), temperature=0, prompt_logprobs=1 if scores else None)
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=0))
        with torch.inference_mode():
            engine.step()
    while engine.has_work():
        engine.step()
    assert num_mixed > 10
    assert num_decodes > 5
