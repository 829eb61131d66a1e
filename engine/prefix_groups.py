"""Which decodes of a step begin with the same blocks, and whether attending to those once is worth it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quire.engine import host_values
from quire.kernels.cascade_decode import PrefixGroups
from quire.models.config import ModelConfig

Int32Array = npt.NDArray[np.int32]

LAUNCH_BYTES = 256 * 2**20
"""A layer must save so much. A step with groups is in no captured graph, so its kernels are launched one by one: an
estimated 90 us a layer, in which an H100 reads this. In a graph two more kernels would take 5 us, or 16 MiB."""
MAX_GROUPS = 32
"""Those that save most: the memory budget has room for the pieces of so many."""
ROW_PIECES = 3
"""Pieces of a row and head that are written and read again: two of the prefix and the rest."""


@dataclass(frozen=True, slots=True)
class CascadeCosts:
    """In bytes that one layer's attention moves."""

    token_bytes: int
    """Keys and values of a token: what each row of a group but one saves for each token of the prefix."""
    row_bytes: int
    """Pieces of a row, written and read: what each row of a group costs."""
    launch_bytes: int = LAUNCH_BYTES

    @classmethod
    def of(cls, config: ModelConfig, kv_dtype: torch.dtype, device: torch.device) -> CascadeCosts | None:
        """None if no step should have groups: CPUs keep what rows share in their caches, windows slide past it."""
        if device.type == "cpu" or None not in config.layer_windows:
            return None
        return cls(
            token_bytes=2 * config.num_kv_heads * config.head_dim * kv_dtype.itemsize,
            row_bytes=2 * ROW_PIECES * config.num_heads * (config.head_dim + 1) * 4,
        )


@dataclass(frozen=True, slots=True)
class Group:
    rows: list[int]
    num_blocks: int


@dataclass(slots=True)
class _Found:
    """What was found, and what says that it still holds: each row has grown by a token, and begins as it did."""

    seq_lens: Int32Array  # [S] of the last step
    ids: Int32Array  # [S] what the search began with
    rows: npt.NDArray[np.intp]  # those in groups
    num_blocks: npt.NDArray[np.intp]  # of each of them: the blocks of its prefix
    last_ids: Int32Array  # and the last one
    groups: PrefixGroups | None

    def holds(self, seq_lens: Int32Array, ids: Int32Array, block_tables: Int32Array) -> bool:
        return (
            len(seq_lens) == len(self.seq_lens)
            and bool((seq_lens == self.seq_lens + 1).all())
            and bool((ids == self.ids).all())
            and bool((block_tables[self.rows, self.num_blocks - 1] == self.last_ids).all())
        )


class PrefixGroupFinder:
    """Finds the groups that save most, and answers with the same tensors until rows come or go.

    A block that two tables have at the same place is either a hit of the prefix cache, whose key covers all tokens up
    to its end, or was shared when a table was forked. So everything before it is the same for both, or computed from
    the same tokens, and the last block that rows share says what they share: no table is read from end to end.
    """

    def __init__(self, block_size: int, costs: CascadeCosts, device: torch.device) -> None:
        self._block_size = block_size
        self._costs = costs
        self._device = device
        self._last: _Found | None = None

    def find(self, block_tables: Int32Array, seq_lens: Int32Array) -> PrefixGroups | None:
        """Groups of the rows of `block_tables` [S, M]; None if that saves nothing.

        `seq_lens` [S] counts the newest token, which is in no prefix: its block is still written to.
        """
        column = self._first_column(len(seq_lens))
        if column >= block_tables.shape[1]:
            return None
        # Whatever pays, some rows share this block or a later one; most batches share none, and are done here.
        ids = np.where(seq_lens > (column + 1) * self._block_size, block_tables[:, column], 0)
        ordered = np.sort(ids)
        if not ((ordered[1:] == ordered[:-1]) & (ordered[1:] > 0)).any():
            return None
        if self._last is not None and self._last.holds(seq_lens, ids, block_tables):
            self._last.seq_lens = seq_lens.copy()
        else:
            groups = self.best_groups(block_tables, (seq_lens - 1) // self._block_size)
            rows = np.array([row for group in groups for row in group.rows], np.intp)
            num_blocks = np.array([group.num_blocks for group in groups for _ in group.rows], np.intp)
            found = to_device(groups, len(ids), self._block_size, self._device) if groups else None
            last_ids = block_tables[rows, num_blocks - 1]
            self._last = _Found(seq_lens.copy(), ids, rows, num_blocks, last_ids, found)
        return self._last.groups

    def best_groups(self, block_tables: Int32Array, limits: Int32Array) -> list[Group]:
        """Disjoint groups of rows; none if they save less than they cost. `limits` [S]: blocks that may be shared."""
        _, groups = self._best(block_tables, limits, np.arange(len(limits)), 0)
        groups = sorted(groups, key=self._value_of)[-MAX_GROUPS:]
        return groups if sum(map(self._value_of, groups)) > self._costs.launch_bytes else []

    def _first_column(self, num_rows: int) -> int:
        """The least block that a prefix must reach to pay, even if all rows had it."""
        if num_rows < 2:
            return 2**31
        costs = self._costs
        num_tokens = (costs.launch_bytes + num_rows * costs.row_bytes) // ((num_rows - 1) * costs.token_bytes)
        return max(0, -(-num_tokens // self._block_size) - 1)

    def _value(self, num_rows: int, num_blocks: int) -> int:
        num_saved = (num_rows - 1) * num_blocks * self._block_size
        return num_saved * self._costs.token_bytes - num_rows * self._costs.row_bytes

    def _value_of(self, group: Group) -> int:
        return self._value(len(group.rows), group.num_blocks)

    def _best(
        self, tables: Int32Array, limits: Int32Array, rows: npt.NDArray[np.intp], shared: int
    ) -> tuple[int, list[Group]]:
        """Bytes saved, and groups of `rows`, which share `shared` blocks at least: all as one, or as what they split
        into, whose groups share more."""
        num_blocks = self._num_shared(tables, limits, rows, shared)
        children: dict[int, list[int]] = {}
        going_on = rows[limits[rows] > num_blocks]
        for row, block_id in zip(going_on.tolist(), tables[going_on, num_blocks].tolist(), strict=True):
            children.setdefault(block_id, []).append(row)
        saved, groups = 0, list[Group]()
        for block_id, members in children.items():
            if len(members) > 1 and block_id > 0:
                child_saved, child_groups = self._best(tables, limits, np.array(members), num_blocks + 1)
                saved, groups = saved + child_saved, groups + child_groups
        grouped = {row for group in groups for row in group.rows}
        rest = [row for row in rows.tolist() if row not in grouped]
        if grouped and (rest_saved := self._value(len(rest), num_blocks)) > 0:
            saved, groups = saved + rest_saved, [*groups, Group(rest, num_blocks)]
        as_one = self._value(len(rows), num_blocks)
        return (as_one, [Group(rows.tolist(), num_blocks)]) if as_one > saved else (saved, groups)

    def _num_shared(self, tables: Int32Array, limits: Int32Array, rows: npt.NDArray[np.intp], shared: int) -> int:
        """How many blocks all `rows` begin with, `shared` at least: by bisection."""
        low, high = shared, int(limits[rows].min())
        while low < high:
            middle = (low + high) // 2
            ids = tables[rows, middle]
            if ids[0] > 0 and (ids == ids[0]).all():
                low = middle + 1
            else:
                high = middle
        return low


def to_device(groups: list[Group], num_rows: int, block_size: int, device: torch.device) -> PrefixGroups:
    """The groups, and all other rows as a group that shares nothing, in one copy; nothing waits for it."""
    row_prefix_lens = np.zeros(num_rows, np.int32)
    rows, starts, lens = list[int](), [0], list[int]()
    for group in groups:
        rows += group.rows
        starts.append(len(rows))
        lens.append(group.num_blocks * block_size)
        row_prefix_lens[group.rows] = lens[-1]
    rows += np.flatnonzero(row_prefix_lens == 0).tolist()
    numbers = np.array([*rows, *starts, num_rows, *lens, 0], np.int32)
    packed = host_values.to_device(np.concatenate((numbers, row_prefix_lens)), device)
    return PrefixGroups(*packed.split((num_rows, len(starts) + 1, len(lens) + 1, num_rows)))
