"""Groups of decodes that begin with the same blocks: the ones that save most, found from tables alone, and cheaply."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from quire.engine.prefix_groups import MAX_GROUPS, CascadeCosts, Group, PrefixGroupFinder, to_device
from quire.kernels.cascade_decode import PrefixGroups
from quire.models.config import ModelConfig

BLOCK_SIZE = 16
FREE = CascadeCosts(token_bytes=1, row_bytes=0, launch_bytes=0)

Tree = tuple[int, list["Tree"]]
"""A stretch of so many blocks, and what follows on it; a row for each leaf."""


def tables_of(tree: list[Tree], own_blocks: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Block tables and lengths: rows share the stretches on the way to their leaves, and have blocks of their own."""
    rows: list[list[int]] = []
    next_id = iter(range(1, 10**6))

    def walk(branches: list[Tree], before: list[int]) -> None:
        for length, further in branches:
            blocks = before + [next(next_id) for _ in range(length)]
            if further:
                walk(further, blocks)
            else:
                rows.append(blocks + [next(next_id) for _ in range(own_blocks)])

    walk(tree, [])
    tables = np.zeros((len(rows), max(map(len, rows), default=0) + 1), np.int32)
    for table, blocks in zip(tables, rows, strict=True):
        table[: len(blocks)] = blocks
    return tables, np.array([len(blocks) * BLOCK_SIZE - 3 for blocks in rows], np.int32)


def leaves(count: int) -> list[Tree]:
    return [(0, [])] * count


def finder(costs: CascadeCosts = FREE) -> PrefixGroupFinder:
    return PrefixGroupFinder(BLOCK_SIZE, costs, torch.device("cpu"))


def as_list(groups: PrefixGroups | None) -> list[Group]:
    """Those that share something."""
    if groups is None:
        return []
    starts, rows = groups.group_start.tolist(), groups.rows.tolist()
    lens = groups.prefix_lens.tolist()
    found = [
        Group(rows[starts[group] : starts[group + 1]], length // BLOCK_SIZE)
        for group, length in enumerate(lens)
        if length > 0
    ]
    return sorted(found, key=lambda group: group.rows)


def find(tree: list[Tree], costs: CascadeCosts = FREE) -> list[tuple[list[int], int]]:
    groups = as_list(finder(costs).find(*tables_of(tree)))
    return sorted((sorted(group.rows), group.num_blocks) for group in groups)


def test_who_shares_is_grouped() -> None:
    assert find([(3, leaves(3)), (5, leaves(1)), (7, leaves(2)), (1, leaves(1))]) == [([0, 1, 2], 3), ([4, 5], 7)]
    assert find([(4, leaves(6))]) == [([0, 1, 2, 3, 4, 5], 4)]
    assert find([(4, leaves(1))] * 5) == []
    assert find([(4, leaves(1))]) == []
    assert find([]) == []


def test_a_prefix_of_all_is_given_up_for_longer_ones_of_some_if_that_saves_more() -> None:
    all_share = 10
    assert find([(all_share, [(100, leaves(3)), (100, leaves(4))])]) == [([0, 1, 2], 110), ([3, 4, 5, 6], 110)]
    assert find([(all_share, [(1, leaves(3)), (1, leaves(4))])]) == [([0, 1, 2, 3, 4, 5, 6], 10)]
    # Rows on no longer branch stay with each other.
    assert find([(all_share, [(100, leaves(2)), *leaves(3)])]) == [([0, 1], 110), ([2, 3, 4], 10)]


def test_what_costs_more_than_it_saves_is_not_done() -> None:
    saved = 3 * 8 * BLOCK_SIZE * 100  # by four rows that share eight blocks
    for costs, pays in (
        (CascadeCosts(100, 0, saved - 1), True),
        (CascadeCosts(100, 0, saved), False),
        (CascadeCosts(100, saved // 4 - 1, 0), True),
        (CascadeCosts(100, saved // 4, 0), False),
    ):
        assert bool(find([(8, leaves(4)), *[(3, leaves(1))] * 20], costs)) == pays


def test_of_very_many_groups_those_that_save_most_are_taken() -> None:
    found = find([(length, leaves(2)) for length in range(1, 60)])
    assert sorted(num_blocks for _, num_blocks in found) == list(range(60 - MAX_GROUPS, 60))


def test_the_newest_block_is_in_no_prefix() -> None:
    """Not even when tables agree on it, as after a fork that has not been copied yet."""
    tables = np.array([[1, 2, 3], [1, 2, 3]], np.int32)
    found = finder()
    for seq_len, num_blocks in ((33, 2), (34, 2), (48, 2), (32, 1), (17, 1)):
        assert as_list(found.find(tables, np.array([seq_len, 48], np.int32))) == [Group([0, 1], num_blocks)]
    assert found.find(tables, np.array([16, 48], np.int32)) is None


def test_blocks_that_a_window_left_behind_are_no_prefix() -> None:
    tables = np.array([[0, 0, 3, 4], [0, 0, 5, 6]], np.int32)
    assert finder().find(tables, np.array([60, 60], np.int32)) is None


def bytes_saved(groups: list[Group], costs: CascadeCosts) -> int:
    return sum(
        (len(group.rows) - 1) * group.num_blocks * BLOCK_SIZE * costs.token_bytes - len(group.rows) * costs.row_bytes
        for group in groups
    )


@pytest.mark.parametrize("seed", range(30))
def test_groups_of_random_trees(seed: int) -> None:
    """They are disjoint, share what they say, and no row would better be left out."""
    rng = random.Random(seed)

    def grow(depth: int) -> list[Tree]:
        return [
            (rng.choice([0, 1, 3, 20]), grow(depth - 1) if depth and rng.random() < 0.7 else leaves(rng.randint(1, 4)))
            for _ in range(rng.randint(1, 4))
        ]

    tables, lens = tables_of(grow(2))
    order = np.array(rng.sample(range(len(lens)), len(lens)))
    tables, lens = tables[order], lens[order]
    costs = CascadeCosts(token_bytes=10, row_bytes=rng.choice([0, 300, 2000]), launch_bytes=0)
    groups = as_list(finder(costs).find(tables, lens))
    rows = [row for group in groups for row in group.rows]
    assert len(rows) == len(set(rows))
    for group in groups:
        prefix = tables[group.rows, : group.num_blocks]
        assert (prefix == prefix[0]).all()
        assert (prefix > 0).all()
        assert (lens[group.rows] > group.num_blocks * BLOCK_SIZE).all()
    for _ in range(50):
        if not groups:
            break
        changed = [Group(list(group.rows), group.num_blocks) for group in groups]
        rng.choice(changed).rows.pop()
        assert bytes_saved([group for group in changed if group.rows], costs) <= bytes_saved(groups, costs)


def test_the_same_tensors_serve_until_rows_change() -> None:
    tables, lens = tables_of([(3, leaves(3)), (5, leaves(2))], own_blocks=9)
    lens -= 5 * BLOCK_SIZE
    found = finder()
    first = found.find(tables, lens)
    for _ in range(3 * BLOCK_SIZE):  # decodes grow, and get blocks of their own
        lens += 1
        assert found.find(tables, lens) is first
    replaced = lens + 1
    replaced[4] = 4 * BLOCK_SIZE + 1  # by a sequence that is shorter, though it begins alike
    assert as_list(found.find(tables, replaced)) == [Group([0, 1, 2], 3), Group([3, 4], 4)]
    tables[[1, 4]] = tables[[4, 1]]
    assert as_list(found.find(tables, lens)) == [Group([0, 2, 4], 3), Group([1, 3], 5)]
    assert as_list(found.find(tables[:4], lens[:4] + 1)) == [Group([0, 2], 3), Group([1, 3], 5)]
    assert as_list(found.find(tables, lens)) == [Group([0, 2, 4], 3), Group([1, 3], 5)]
    tables[0, 2] = 999  # begins alike but goes on otherwise
    assert as_list(found.find(tables, lens + 1)) == [Group([0, 2, 4], 2), Group([1, 3], 5)]


def test_on_the_device_every_row_is_in_a_group() -> None:
    groups = to_device([Group([4, 1], 3), Group([0], 1)], 6, BLOCK_SIZE, torch.device("cpu"))
    assert groups.rows.tolist() == [4, 1, 0, 2, 3, 5]
    assert groups.group_start.tolist() == [0, 2, 3, 6]
    assert groups.prefix_lens.tolist() == [48, 16, 0]
    assert groups.row_prefix_lens.tolist() == [16, 48, 0, 0, 48, 0]
    assert groups.rows.dtype == groups.row_prefix_lens.dtype == torch.int32


def test_cpus_and_windows_have_no_groups(tiny_checkpoint) -> None:  # type: ignore[no-untyped-def]
    plain = ModelConfig.from_hf(tiny_checkpoint("llama"))
    sliding = ModelConfig.from_hf(tiny_checkpoint("mistral", sliding_window=20))
    gpu = torch.device("cuda")
    assert CascadeCosts.of(plain, torch.bfloat16, torch.device("cpu")) is None
    assert CascadeCosts.of(sliding, torch.bfloat16, gpu) is None
    costs = CascadeCosts.of(plain, torch.int8, gpu)
    assert costs is not None
    assert costs.token_bytes == 2 * plain.num_kv_heads * plain.head_dim
