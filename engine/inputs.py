"""From a scheduled batch to the tensors of one forward pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.prompt_log_probs import scored_chunks
from quire.engine.sample_rows import sample_indices
from quire.models.forward_batch import ForwardBatch
from quire.scheduler.output import ScheduledBatch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class InputBuilder:
    """Keeps all rows' block tables, [max_num_seqs, max_num_blocks] int32, and changes only what a step changed.

    The inputs of steps that only decode lie in the same memory each time, so that what runs on them can be recorded.

    Hidden states are wanted of the tokens that sample, in their order, and then of those whose logits score a prompt:
    `prompt_log_probs.scored_chunks` has theirs.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._block_tables: Int32Array = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._decodes = _DecodeMemory(max_num_seqs, self._block_tables.shape[1])

    def build(self, batch: ScheduledBatch) -> ForwardBatch:
        for update in batch.block_table_updates:
            self._block_tables[update.row, update.start : update.start + len(update.block_ids)] = update.block_ids
        only_decodes = batch.num_decodes == len(batch.sequences) == len(batch.sampling)
        if only_decodes and self._device.type == "cpu":
            return self._build_decodes(batch)
        sequences = batch.sequences
        rows = np.array([sequence.row for sequence in sequences], np.int64)
        starts = np.array([sequence.num_computed_tokens for sequence in sequences], np.int64)
        counts = np.array(batch.num_scheduled_tokens, np.int64)
        seq_lens = starts + counts
        query_start = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
        token_rows = np.repeat(rows, counts)
        slot_mapping = (
            self._block_tables[token_rows, positions // self._block_size].astype(np.int64) * self._block_size
            + positions % self._block_size
        )
        max_seq_len = int(seq_lens.max())
        used_columns = -(-max_seq_len // self._block_size)
        logits_indices = sample_indices(batch, query_start)
        chunks = scored_chunks(batch)
        if chunks:
            parts = [np.arange(chunk.num_rows) + query_start[chunk.index] for chunk in chunks]
            logits_indices = np.concatenate((logits_indices, *parts))
        return ForwardBatch(
            token_ids=self._to_device(_token_ids(batch)),
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slot_mapping),
            block_tables=self._to_device(self._block_tables[rows, :used_columns]),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            query_start=self._to_device(query_start.astype(np.int32)),
            logits_indices=self._to_device(logits_indices),
            num_decodes=batch.num_decodes,
            max_query_len=int(counts[batch.num_decodes :].max(initial=0)),
            max_seq_len=max_seq_len,
        )

    def _build_decodes(self, batch: ScheduledBatch) -> ForwardBatch:
        """Each sequence computes its last token and samples the next one."""
        memory, sequences = self._decodes, batch.sequences
        num_seqs = len(sequences)
        rows = np.array([sequence.row for sequence in sequences])
        positions = memory.positions[:num_seqs]
        positions[:] = [sequence.num_computed_tokens for sequence in sequences]
        memory.token_ids[:num_seqs] = [sequence.token_ids[-1] for sequence in sequences]
        np.add(positions, 1, out=memory.seq_lens[:num_seqs], casting="unsafe")
        columns = positions // self._block_size
        slots = memory.slot_mapping[:num_seqs]
        np.multiply(self._block_tables[rows, columns], self._block_size, out=slots)
        slots += positions - columns * self._block_size
        max_position = int(positions.max())
        num_columns = max_position // self._block_size + 1
        memory.block_tables[:num_seqs, :num_columns] = self._block_tables[rows, :num_columns]
        inputs = memory.batch(num_seqs)
        inputs.max_seq_len = max_position + 1
        return inputs

    def _to_device(self, array: Int32Array | Int64Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


class _DecodeMemory:
    """The inputs of up to `max_num_seqs` decodes on the host: one memory, and one ForwardBatch for each number."""

    def __init__(self, max_num_seqs: int, max_num_blocks: int) -> None:
        self.token_ids, self.positions, self.slot_mapping = np.zeros((3, max_num_seqs), np.int64)
        self.block_tables: Int32Array = np.zeros((max_num_seqs, max_num_blocks), np.int32)
        self.seq_lens: Int32Array = np.zeros(max_num_seqs, np.int32)
        self._query_start = torch.arange(max_num_seqs + 1, dtype=torch.int32)
        self._batches: dict[int, ForwardBatch] = {}

    def batch(self, num_seqs: int) -> ForwardBatch:
        if num_seqs not in self._batches:
            self._batches[num_seqs] = ForwardBatch(
                token_ids=torch.from_numpy(self.token_ids[:num_seqs]),
                positions=torch.from_numpy(self.positions[:num_seqs]),
                slot_mapping=torch.from_numpy(self.slot_mapping[:num_seqs]),
                block_tables=torch.from_numpy(self.block_tables[:num_seqs]),
                seq_lens=torch.from_numpy(self.seq_lens[:num_seqs]),
                query_start=self._query_start[: num_seqs + 1],
                logits_indices=None,
                num_decodes=num_seqs,
                max_query_len=0,
                max_seq_len=0,
            )
        return self._batches[num_seqs]


def _token_ids(batch: ScheduledBatch) -> Int64Array:
    """The tokens to compute, [T] int64: decodes first, then the slices of the others, with drafts behind them."""
    decodes = batch.sequences[: batch.num_decodes]
    token_ids = [sequence.token_ids[sequence.num_computed_tokens] for sequence in decodes]
    for index in range(batch.num_decodes, len(batch.sequences)):
        sequence = batch.sequences[index]
        start = sequence.num_computed_tokens
        token_ids += sequence.token_ids[start : start + batch.num_scheduled_tokens[index]]
        token_ids += batch.drafts.get(index, ())
    return np.array(token_ids, np.int64)
