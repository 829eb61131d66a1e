"""An engine whose decodes attend to shared prefixes once gives the same tokens as one that does not know of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.inputs import InputBuilder
from quire.engine.model_runner import ModelRunner
from quire.engine.prefix_groups import CascadeCosts
from quire.kernels.cascade_decode import PrefixGroups, cascade_decode
from quire.models.layers import attention
from quire.sampling_params import SamplingParams
from quire.scheduler.request import Request

TinyCheckpoint = Callable[..., Path]
BLOCK_SIZE = 8


def requests() -> list[Request]:
    """Three system prompts, and what each is asked; some have several choices, which share their own prompts too."""
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 90) for _ in range(length)] for length in (40, 75, 9)]
    found = []
    for index in range(14):
        prompt = prompts[index % 3] + [rng.randrange(3, 90) for _ in range(rng.randrange(1, 30))]
        params = SamplingParams(max_tokens=rng.randrange(5, 30), temperature=0 if index % 2 else 1, n=1 + index % 2)
        found.append(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=index))
    return found


def tokens_of(engine: Engine) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    waiting = requests()
    while waiting or engine.has_work():
        for request in waiting[:2]:  # they come while others decode
            engine.add(request)
        del waiting[:2]
        for output in engine.step():
            found.setdefault((output.request_id, output.choice_index), []).extend(output.token_ids)
    return found


def make_engine(model: Path, costs: CascadeCosts | None, **options: Any) -> Engine:
    """One that computes each step as a GPU's does: nothing is recorded, and decodes may be grouped."""
    config = EngineConfig(model=str(model), num_blocks=300, block_size=BLOCK_SIZE, max_num_seqs=16, **options)
    engine = Engine(config)
    inputs = InputBuilder(64, 16, 512, BLOCK_SIZE, torch.device("cpu"), costs)
    inputs.memory = None
    engine._executor._inputs = inputs
    engine._executor._runner = ModelRunner(engine._model, engine._kv.layers, None)
    return engine


@pytest.mark.parametrize(
    ("family", "overrides", "options"),
    [
        ("llama", {}, {}),
        ("qwen3", {}, {"kv_cache_dtype": "int8"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, {}),
    ],
    ids=str,
)
def test_tokens_are_the_same(
    family: str,
    overrides: dict[str, Any],
    options: dict[str, Any],
    tiny_checkpoint: TinyCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With layers of a sliding window too, which see for themselves."""
    model = tiny_checkpoint(family, **overrides)
    expected = tokens_of(make_engine(model, None, **options))
    groups_seen: list[int] = []

    def cascade(*arguments: Any) -> torch.Tensor:
        groups: PrefixGroups = arguments[5]
        groups_seen.append(int((groups.prefix_lens > 0).sum()))
        return cascade_decode(*arguments, backend="reference")

    monkeypatch.setattr(attention, "cascade_decode", cascade)
    free = CascadeCosts(token_bytes=1, row_bytes=0, launch_bytes=0)
    assert tokens_of(make_engine(model, free, **options)) == expected
    assert len(groups_seen) > 20
    assert max(groups_seen) > 2
    monkeypatch.setattr(attention, "cascade_decode", with_wrong_prefixes)
    assert tokens_of(make_engine(model, free, **options)) != expected


def with_wrong_prefixes(*arguments: Any) -> torch.Tensor:
    """Some rows see the first block of others."""
    groups: PrefixGroups = arguments[5]
    wrong = replace(groups, rows=groups.rows.flip(0), prefix_lens=groups.prefix_lens.clamp(max=BLOCK_SIZE))
    return cascade_decode(*arguments[:5], wrong, *arguments[6:], backend="reference")
