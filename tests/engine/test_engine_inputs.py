from __future__ import annotations

import random

import torch

from quire.config import SchedulerConfig
from quire.engine.inputs import InputBuilder
from quire.models.forward_batch import ForwardBatch
from quire.sampling_params import SamplingParams
from quire.scheduler.output import SampledTokens, ScheduledBatch
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

BLOCK_SIZE = 8
MAX_MODEL_LEN = 96


def expected_inputs(batch: ScheduledBatch) -> dict[str, list[int]]:
    """What the batch means, token by token, read from the sequences themselves."""
    expected: dict[str, list[int]] = {"token_ids": [], "positions": [], "slots": [], "seq_lens": [], "query_start": [0]}
    for sequence, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
        for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + count):
            expected["token_ids"].append(sequence.token_ids[position])
            expected["positions"].append(position)
            block_id = sequence.block_table.block_ids[position // BLOCK_SIZE]
            expected["slots"].append(block_id * BLOCK_SIZE + position % BLOCK_SIZE)
        expected["seq_lens"].append(sequence.num_computed_tokens + count)
        expected["query_start"].append(expected["query_start"][-1] + count)
    return expected


def check(batch: ScheduledBatch, inputs: ForwardBatch) -> None:
    expected = expected_inputs(batch)
    assert inputs.token_ids.tolist() == expected["token_ids"]
    assert inputs.positions.tolist() == expected["positions"]
    assert inputs.slot_mapping.tolist() == expected["slots"]
    assert inputs.seq_lens.tolist() == expected["seq_lens"]
    starts = [start - batch.num_decodes for start in expected["query_start"][batch.num_decodes :]]
    assert inputs.prefill_start.tolist() == starts
    wanted = list(range(len(inputs.token_ids))) if inputs.logits_indices is None else inputs.logits_indices.tolist()
    assert wanted == [expected["query_start"][index + 1] - 1 for index in batch.sampling]
    assert inputs.max_seq_len == max(expected["seq_lens"])
    for row, sequence in enumerate(batch.sequences):
        used = -(-expected["seq_lens"][row] // BLOCK_SIZE)
        assert inputs.block_tables[row, :used].tolist() == sequence.block_table.block_ids[:used]
    assert inputs.block_tables.dtype == inputs.seq_lens.dtype == inputs.prefill_start.dtype == torch.int32
    assert inputs.token_ids.dtype == inputs.positions.dtype == inputs.slot_mapping.dtype == torch.int64


def test_inputs_are_what_the_batches_mean_through_hits_forks_chunks_and_preemption() -> None:
    rng = random.Random(4)
    config = SchedulerConfig(
        num_blocks=24,
        block_size=BLOCK_SIZE,
        max_num_seqs=6,
        max_num_batched_tokens=13,
        max_model_len=MAX_MODEL_LEN,
    )
    scheduler = Scheduler(config)
    builder = InputBuilder(13, config.max_num_seqs, MAX_MODEL_LEN, BLOCK_SIZE, torch.device("cpu"))
    shared = [rng.randrange(100) for _ in range(40)]
    for index in range(30):
        prompt = shared[: rng.randrange(1, 40)] + [rng.randrange(100) for _ in range(rng.randrange(1, 10))]
        params = SamplingParams(n=rng.choice((1, 1, 3)), max_tokens=rng.randrange(1, 40))
        scheduler.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=0))
    num_copies = num_mixed = 0
    started: list[str] = []
    while (batch := scheduler.schedule()) is not None:
        check(batch, builder.build(batch))
        num_copies += len(batch.block_copies)
        started += batch.started
        num_mixed += 0 < batch.num_decodes < len(batch.sequences)
        scheduler.update(batch, SampledTokens([rng.randrange(100) for _ in batch.sampling]))
    stats = scheduler.stats()
    assert sorted(started, key=int) == [str(index) for index in range(30)]
    assert num_copies > 0
    assert num_mixed > 0
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
