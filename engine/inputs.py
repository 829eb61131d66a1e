"""From a scheduled batch to the tensors of one forward pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.prefix_groups import CascadeCosts, PrefixGroupFinder
from quire.engine.prompt_log_probs import scored_chunks
from quire.engine.sample_rows import sample_indices
from quire.models.forward_batch import ForwardBatch
from quire.scheduler.output import ScheduledBatch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class StepMemory:
    """The host's memory of a step's inputs: the same for every step, so that what runs on them can be recorded.

    Args:
        max_num_tokens: of a step.
        max_num_seqs: of a step; decodes and others are counted apart, so that each may be so many.
        max_num_blocks: of a sequence.
    """

    def __init__(self, max_num_tokens: int, max_num_seqs: int, max_num_blocks: int) -> None:
        self.max_num_seqs = max_num_seqs = max(2, max_num_seqs)  # recordings try out two
        self.max_num_tokens = max_num_tokens + 2 * max_num_seqs
        integers = np.zeros((4, self.max_num_tokens), np.int64)
        self.token_ids, self.positions, self.slot_mapping, self.logits_indices = integers
        self.block_tables: Int32Array = np.zeros((2 * max_num_seqs, max_num_blocks), np.int32)
        self.seq_lens: Int32Array = np.zeros(2 * max_num_seqs, np.int32)
        self.prefill_start: Int32Array = np.zeros(max_num_seqs + 1, np.int32)

    def fits(self, num_decodes: int, num_prefills: int, num_tokens: int) -> bool:
        return max(num_decodes, num_prefills) <= self.max_num_seqs and num_tokens <= self.max_num_tokens

    def batch(self, num_decodes: int, num_prefills: int, num_tokens: int, num_logits: int | None) -> ForwardBatch:
        """What is in the memory, as a step of so many sequences, tokens and wanted logits (None: of all tokens)."""
        num_seqs = num_decodes + num_prefills
        return ForwardBatch(
            token_ids=torch.from_numpy(self.token_ids[:num_tokens]),
            positions=torch.from_numpy(self.positions[:num_tokens]),
            slot_mapping=torch.from_numpy(self.slot_mapping[:num_tokens]),
            block_tables=torch.from_numpy(self.block_tables[:num_seqs]),
            seq_lens=torch.from_numpy(self.seq_lens[:num_seqs]),
            prefill_start=torch.from_numpy(self.prefill_start[: num_prefills + 1]),
            logits_indices=None if num_logits is None else torch.from_numpy(self.logits_indices[:num_logits]),
            num_decodes=num_decodes,
            max_query_len=0,
            max_seq_len=0,
        )


class InputBuilder:
    """On the host. Keeps all rows' block tables, [max_num_seqs, max_num_blocks] int32, and changes what a step did.

    Hidden states are wanted of the tokens that sample, in their order, and then of those whose logits score a prompt:
    `prompt_log_probs.scored_chunks` has theirs.

    Args:
        costs: by which decodes are grouped that begin with the same blocks; None groups none, as on a CPU, whose
            recordings have no such steps.

    Attributes:
        memory: where the inputs of a CPU's steps lie, unless a step does not fit; None on other devices.
    """

    def __init__(
        self,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        costs: CascadeCosts | None = None,
    ) -> None:
        self._block_size = block_size
        self._block_tables: Int32Array = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        max_num_blocks = self._block_tables.shape[1]
        self.memory = StepMemory(max_num_tokens, max_num_seqs, max_num_blocks) if device.type == "cpu" else None
        self._prefix_groups = None if costs is None else PrefixGroupFinder(block_size, costs, device)
        self._decodes: dict[int, ForwardBatch] = {}

    def build(self, batch: ScheduledBatch) -> ForwardBatch:
        for update in batch.block_table_updates:
            self._block_tables[update.row, update.start : update.start + len(update.block_ids)] = update.block_ids
        if self.memory is not None and batch.num_decodes == len(batch.sequences) == len(batch.sampling):
            return self._build_decodes(batch, self.memory)
        sequences, num_decodes = batch.sequences, batch.num_decodes
        rows = np.array([sequence.row for sequence in sequences], np.int64)
        starts = np.array([sequence.num_computed_tokens for sequence in sequences], np.int64)
        counts = np.array(batch.num_scheduled_tokens, np.int64)
        query_start = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
        token_rows = np.repeat(rows, counts)
        columns = positions // self._block_size
        slot_mapping = self._block_tables[token_rows, columns].astype(np.int64) * self._block_size
        slot_mapping += positions - columns * self._block_size
        logits_indices = sample_indices(batch, query_start)
        chunks = scored_chunks(batch)
        if chunks:
            parts = [np.arange(chunk.num_rows) + query_start[chunk.index] for chunk in chunks]
            logits_indices = np.concatenate((logits_indices, *parts))
        max_seq_len = int((starts + counts).max())
        num_columns = -(-max_seq_len // self._block_size)
        memory, num_prefills, num_tokens = self.memory, len(sequences) - num_decodes, len(positions)
        if memory is None or not memory.fits(num_decodes, num_prefills, max(num_tokens, len(logits_indices))):
            memory = StepMemory(max(num_tokens, len(logits_indices)), len(sequences), num_columns)
        memory.token_ids[:num_tokens] = _token_ids(batch)
        memory.positions[:num_tokens] = positions
        memory.slot_mapping[:num_tokens] = slot_mapping
        memory.logits_indices[: len(logits_indices)] = logits_indices
        memory.block_tables[: len(rows), :num_columns] = self._block_tables[rows, :num_columns]
        memory.seq_lens[: len(rows)] = starts + counts
        memory.prefill_start[: num_prefills + 1] = query_start[num_decodes:] - num_decodes
        inputs = memory.batch(num_decodes, num_prefills, num_tokens, len(logits_indices))
        inputs.max_query_len = int(counts[num_decodes:].max(initial=0))
        inputs.max_seq_len = max_seq_len
        if self.memory is None and self._prefix_groups is not None:
            tables, lens = memory.block_tables[:num_decodes], memory.seq_lens[:num_decodes]
            inputs.prefix_groups = self._prefix_groups.find(tables, lens)
        return inputs

    def _build_decodes(self, batch: ScheduledBatch, memory: StepMemory) -> ForwardBatch:
        """Each sequence computes its last token and samples the next one."""
        sequences = batch.sequences
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
        inputs = self._decodes.get(num_seqs)
        if inputs is None:
            inputs = self._decodes[num_seqs] = memory.batch(num_seqs, 0, num_seqs, None)
        inputs.max_seq_len = max_position + 1
        return inputs


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
