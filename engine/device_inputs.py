"""A step's inputs on their way to a GPU: packed into one buffer, sent with one copy that nobody waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quire.models.forward_batch import ForwardBatch

NUM_BUFFERS = 2
"""A step packs its inputs when the one before the last has retired: its copy is done."""
ALIGNMENT = 16


class HostBuffers:
    """Memory that the device can copy from, pinned if it is a GPU's; two of it in turn, which grow as needed."""

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._buffers = [self._allocate(0) for _ in range(NUM_BUFFERS)]
        self._next = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, to be used until it is taken again."""
        index = self._next
        self._next = (index + 1) % NUM_BUFFERS
        if len(self._buffers[index]) < num_bytes:
            self._buffers[index] = self._allocate(2 * num_bytes)
        return self._buffers[index][:num_bytes]

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)


def packed_size(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def pack(tensors: list[torch.Tensor], buffer: torch.Tensor) -> None:
    """One after the other, each at a multiple of ALIGNMENT."""
    for tensor, place in zip(tensors, views(tensors, buffer), strict=True):
        place.copy_(tensor)


def views(tensors: list[torch.Tensor], buffer: torch.Tensor) -> list[torch.Tensor]:
    """Where `pack` puts tensors of these shapes and dtypes."""
    found, start = [], 0
    for tensor in tensors:
        found.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += packed_size(tensor)
    return found


def send(inputs: ForwardBatch, buffers: HostBuffers, device: torch.device) -> ForwardBatch:
    """The same on the device, in memory of its own."""
    fields: dict[str, Any] = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    buffer = buffers.take(sum(map(packed_size, tensors.values())))
    pack(list(tensors.values()), buffer)
    sent = views(list(tensors.values()), buffer.to(device, non_blocking=True, copy=True))
    return ForwardBatch(**(fields | dict(zip(tensors, sent, strict=True))))


class StaticInputs:
    """Inputs of steps that only decode, always at the same place on the device, so that what runs on them can be
    captured.

    A step of n sequences is padded to a size: the further rows have no tokens in the cache, so they attend to nothing,
    and write to the null block. What is on the device may be overwritten while a step before is in flight: copies are
    in order with the kernels that read it.
    """

    def __init__(self, max_num_seqs: int, max_num_blocks: int, buffers: HostBuffers, device: torch.device) -> None:
        self._buffers = buffers
        integers = torch.zeros(3, max_num_seqs, dtype=torch.int64)
        self._shapes = [*integers, torch.zeros(max_num_seqs, dtype=torch.int32)]
        self._head_bytes = sum(map(packed_size, self._shapes))
        table = torch.zeros(max_num_seqs, max_num_blocks, dtype=torch.int32)
        self._staged = torch.zeros(self._head_bytes + table.nbytes, dtype=torch.uint8, device=device)
        self._token_ids, self._positions, self._slot_mapping, self._seq_lens = views(self._shapes, self._staged)
        self._block_tables = table.to(device)
        self._prefill_start = torch.zeros(1, dtype=torch.int32, device=device)

    def holds(self, inputs: ForwardBatch) -> bool:
        return inputs.token_ids.data_ptr() == self._token_ids.data_ptr()

    def batch(self, size: int) -> ForwardBatch:
        """What is at the place, as a step of `size` sequences whose logits are all wanted."""
        return ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slot_mapping=self._slot_mapping[:size],
            block_tables=self._block_tables[:size],
            seq_lens=self._seq_lens[:size],
            prefill_start=self._prefill_start,
            logits_indices=None,
            num_decodes=size,
            max_query_len=0,
            max_seq_len=0,
        )

    def fill(self, inputs: ForwardBatch, size: int) -> ForwardBatch:
        """Put a step's inputs there, with one copy from the host."""
        num_seqs, num_columns = inputs.block_tables.shape
        table = torch.zeros(size, num_columns, dtype=torch.int32)
        buffer = self._buffers.take(self._head_bytes + table.nbytes)
        buffer.zero_()
        heads = views(self._shapes, buffer)
        for place, values in zip(
            heads, (inputs.token_ids, inputs.positions, inputs.slot_mapping, inputs.seq_lens), strict=True
        ):
            place[:num_seqs] = values
        host_table = buffer[self._head_bytes :].view(torch.int32).view(table.shape)
        host_table[:num_seqs] = inputs.block_tables
        staged = self._staged[: len(buffer)]
        staged.copy_(buffer, non_blocking=True)
        self._block_tables[:size, :num_columns] = staged[self._head_bytes :].view(torch.int32).view(table.shape)
        return self.batch(size)
