"""A small paged harness: one model, pages full of NaN, and sequences whose blocks lie in no order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.models.config import ModelConfig
from quire.models.forward_batch import ForwardBatch
from quire.models.kv_cache import KVCache
from quire.models.loading import load_model

BLOCK_SIZE = 8
NUM_BLOCKS = 128


class PagedRunner:
    """Runs steps of many sequences; every slot that was not written is NaN."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """options: of `load_model`."""
        self.config = ModelConfig.from_hf(directory)
        self.model = load_model(directory, self.config, dtype=dtype, device=torch.device("cpu"), **options)
        shape = (NUM_BLOCKS, self.config.num_kv_heads, BLOCK_SIZE, self.config.head_dim)
        self.caches = [
            KVCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
            for _ in range(self.config.num_layers)
        ]
        self.free = random.Random(3).sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, work: dict[str, list[int]], every_token: bool = False) -> dict[str, torch.Tensor]:
        """Compute new tokens of some sequences; logits of the last of each, or [tokens, vocab_size] of all.

        As in the engine, sequences with one token come first.
        """
        work = dict(sorted(work.items(), key=lambda item: len(item[1]) > 1))
        counts = [len(tokens) for tokens in work.values()]
        num_decodes = counts.count(1)
        positions, slots = [], []
        for name, tokens in work.items():
            start = self.lengths.get(name, 0)
            table = self.tables.setdefault(name, [])
            self.lengths[name] = start + len(tokens)
            while len(table) * BLOCK_SIZE < self.lengths[name]:
                table.append(self.free.pop())
            for position in range(start, self.lengths[name]):
                positions.append(position)
                slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        tables = torch.zeros(len(work), max(len(self.tables[name]) for name in work), dtype=torch.int32)
        for row, name in zip(tables, work, strict=True):
            row[: len(self.tables[name])] = torch.tensor(self.tables[name])
        query_start = torch.tensor([0, *counts]).cumsum(0)
        batch = ForwardBatch(
            token_ids=torch.tensor([token for tokens in work.values() for token in tokens]),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=tables,
            seq_lens=torch.tensor([self.lengths[name] for name in work], dtype=torch.int32),
            prefill_start=(query_start[num_decodes:] - num_decodes).to(torch.int32),
            logits_indices=torch.arange(len(positions)) if every_token else query_start[1:] - 1,
            num_decodes=num_decodes,
            max_query_len=max(counts[num_decodes:], default=0),
            max_seq_len=max(self.lengths[name] for name in work),
        )
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(batch, self.caches))
        assert logits.dtype == torch.float32
        sizes = counts if every_token else [1] * len(work)
        parts = dict(zip(work, logits.split(sizes), strict=True))
        return parts if every_token else {name: part[0] for name, part in parts.items()}


@pytest.fixture(scope="session")
def paged_runner() -> Callable[..., PagedRunner]:
    return PagedRunner
