"""One throw-away step at start, so that no request waits for kernels to be compiled or for tables to be built."""

from __future__ import annotations

import torch

from quire.engine.kv_storage import KVStorage
from quire.kernels.argmax import argmax
from quire.kernels.cpu_recording import Arena, record
from quire.kernels.log_probs import log_probs
from quire.kernels.sample import sample
from quire.kernels.token_bitmask import apply_token_bitmask
from quire.models.forward_batch import ForwardBatch
from quire.models.model import Model

NUM_PREFILL_TOKENS = 3


def warm_up(model: Model, kv: KVStorage, device: torch.device) -> None:
    """Run one decode and one short prompt through the model; they write to the null block alone."""
    num_tokens = 1 + NUM_PREFILL_TOKENS

    def integers(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    hidden = model.forward(
        ForwardBatch(
            token_ids=integers([0] * num_tokens, torch.int64),
            positions=integers([0, *range(NUM_PREFILL_TOKENS)], torch.int64),
            slot_mapping=integers([0, *range(NUM_PREFILL_TOKENS)], torch.int64),
            block_tables=torch.zeros((2, 1), dtype=torch.int32, device=device),
            seq_lens=integers([1, NUM_PREFILL_TOKENS], torch.int32),
            prefill_start=integers([0, NUM_PREFILL_TOKENS], torch.int32),
            logits_indices=integers([0, num_tokens - 1], torch.int64),
            num_decodes=1,
            max_query_len=NUM_PREFILL_TOKENS,
            max_seq_len=NUM_PREFILL_TOKENS,
        ),
        kv.layers,
    )
    warm_up_sampling(model.logits(hidden))


@torch.inference_mode()
def load_cpu_kernels() -> None:
    """Import the compiler of the CPU kernels and load those that depend on no model: work for another thread, while
    this one reads weights. On a row so short that no second thread is asked for.
    """
    logits = torch.zeros(1, 64)
    warm_up_sampling(logits)
    with record(Arena()) as recording:
        argmax(logits)
    recording.replay(num_threads=1)


def warm_up_sampling(logits: torch.Tensor) -> None:
    """Every kernel that the sampler may call, on two rows of logits."""
    ones = torch.ones(len(logits), dtype=torch.float32, device=logits.device)
    top_k = torch.full((len(logits),), 2, device=logits.device)
    sample(logits, ones, top_k, ones * 0.5, ones * 0.1, ones.double() * 0.5)
    log_probs(logits, top_k - 2, 1)
    num_words = -(-logits.shape[-1] // 32)
    bitmask = torch.full((1, num_words), -1, dtype=torch.int32, device=logits.device)
    apply_token_bitmask(logits, bitmask, top_k[:1] - 2)
