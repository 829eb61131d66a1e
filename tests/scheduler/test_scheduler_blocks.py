"""Pool, prefix cache and block table, each for itself."""

from __future__ import annotations

import struct
from hashlib import sha256

import pytest

from quire.scheduler.block_pool import BlockPool
from quire.scheduler.block_table import BlockTable
from quire.scheduler.invariants import InvariantError
from quire.scheduler.prefix_cache import BLOCK_DOMAIN, PrefixCache
from quire.scheduler.window import first_block_in_window


def make_cache(block_size: int = 4, namespace: str = "", window: int | None = None) -> PrefixCache:
    return PrefixCache(20, block_size, namespace=namespace, window=window)


def make_pool(num_usable_blocks: int = 6) -> BlockPool:
    return BlockPool(num_usable_blocks + 1, PrefixCache(num_usable_blocks + 1, 4, namespace="", window=None))


def make_table(pool: BlockPool, num_tokens: int) -> BlockTable:
    table = BlockTable(pool, 4)
    table.grow(table.num_missing_blocks(num_tokens))
    return table


def test_blocks_are_handed_out_in_lru_order_and_never_the_null_block() -> None:
    pool = make_pool(4)
    assert pool.allocate(4) == [1, 2, 3, 4]
    pool.release([3, 1])
    pool.release([4])
    assert pool.free_block_ids() == [3, 1, 4]
    assert pool.allocate(1) == [3]


def test_a_revived_block_leaves_the_middle_of_the_free_list() -> None:
    pool = make_pool(5)
    pool.share(3)
    assert pool.free_block_ids() == [1, 2, 4, 5]
    assert pool.ref_counts[3] == 1
    pool.share(3)
    pool.release([3])
    assert pool.free_block_ids() == [1, 2, 4, 5]
    pool.release([3])
    assert pool.free_block_ids() == [1, 2, 4, 5, 3]
    pool.check_count()


def test_the_ends_of_the_free_list_can_be_revived() -> None:
    pool = make_pool(3)
    for block_id in (1, 3, 2):
        pool.share(block_id)
    assert pool.free_block_ids() == []
    pool.release([2, 1, 3])
    assert pool.free_block_ids() == [2, 1, 3]


def test_releasing_too_often_is_noticed_at_once() -> None:
    pool = make_pool()
    block_ids = pool.allocate(1)
    pool.release(block_ids)
    with pytest.raises(InvariantError, match=r"^I2: "):
        pool.release(block_ids)


def test_an_empty_pool_hands_out_nothing() -> None:
    with pytest.raises(InvariantError, match=r"^I21: "):
        make_pool(2).allocate(3)


def test_allocation_forgets_what_was_cached() -> None:
    cache = make_cache()
    pool = BlockPool(3, cache)
    cache.insert(b"key", pool.allocate(1)[0])
    pool.release([1])
    assert pool.allocate(1) == [2]
    assert cache.key_of(1) == b"key"
    assert pool.allocate(1) == [1]
    assert cache.items() == []
    assert cache.key_of(1) is None


def test_tables_are_freed_tail_first() -> None:
    pool = make_pool(6)
    first, second = make_table(pool, 12), make_table(pool, 8)
    first.release()
    assert pool.free_block_ids() == [6, 3, 2, 1]
    second.release()
    assert pool.free_block_ids() == [6, 3, 2, 1, 5, 4]


def test_a_table_grows_by_what_is_missing() -> None:
    table = make_table(make_pool(), 5)
    assert table.block_ids == [1, 2]
    assert [table.num_missing_blocks(num_tokens) for num_tokens in (0, 8, 9, 12, 13)] == [0, 0, 1, 1, 2]
    assert table.grow(1) == [3]
    assert table.capacity == 12


def test_a_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    pool = make_pool()
    table = make_table(pool, 11)
    fork = table.fork(10)
    assert fork.block_ids == [1, 2, 4]
    assert pool.ref_counts[1:5] == [2, 2, 2, 1]
    assert fork.take_copy(0) == (3, 4)
    assert fork.take_copy(0) is None
    assert pool.ref_counts[1:5] == [2, 2, 1, 1]


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    pool = make_pool()
    fork = make_table(pool, 8).fork(8)
    assert fork.block_ids == [1, 2, 3]
    assert fork.take_copy(0) is None


def test_a_fork_of_nothing_shares_nothing() -> None:
    pool = make_pool()
    fork = make_table(pool, 1).fork(0)
    assert fork.block_ids == [2]
    assert fork.copy_source is None


def test_the_source_of_a_copy_outlives_its_table() -> None:
    pool = make_pool()
    table = make_table(pool, 6)
    fork = table.fork(5)
    table.release()
    assert 2 not in pool.free_block_ids()
    fork.release()
    assert sorted(pool.free_block_ids()) == [1, 2, 3, 4, 5, 6]


def test_released_leading_entries_are_zero_and_free() -> None:
    pool = make_pool()
    table = make_table(pool, 16)
    table.release_before(2)
    table.release_before(2)
    assert table.block_ids == [0, 0, 3, 4]
    assert pool.free_block_ids() == [5, 6, 2, 1]
    assert table.held_block_ids() == [3, 4]
    table.release()
    assert pool.free_block_ids() == [5, 6, 2, 1, 4, 3]


def test_keys_are_chained_sha256_over_domain_parent_and_tokens() -> None:
    cache = make_cache(block_size=2)
    keys = [cache.root_key("salt")]
    cache.extend_keys(keys, [7, 8, 9, 10, 11], 1)
    cache.extend_keys(keys, [7, 8, 9, 10, 11], 2)
    first = sha256(BLOCK_DOMAIN + keys[0] + struct.pack("<II", 7, 8)).digest()
    assert keys[1:] == [first, sha256(BLOCK_DOMAIN + first + struct.pack("<II", 9, 10)).digest()]


def test_fields_of_the_root_cannot_run_into_each_other() -> None:
    roots = {
        make_cache(namespace=namespace, block_size=block_size).root_key(salt)
        for namespace, salt, block_size in [
            ("", "", 4),
            ("a", "", 4),
            ("", "a", 4),
            ("a", "b", 4),
            ("ab", "", 4),
            ("", "ab", 4),
            ("salt", "", 4),
            ("", "\ud800", 4),
            ("", "", 8),
        ]
    }
    assert len(roots) == 9


def test_the_first_block_of_a_prefix_stays() -> None:
    cache = make_cache()
    cache.insert(b"key", 3)
    cache.insert(b"key", 4)
    assert cache.items() == [(b"key", 3)]
    assert cache.key_of(4) is None


def test_a_lookup_ends_at_the_first_missing_block() -> None:
    cache = make_cache()
    for key, block_id in ((b"0", 5), (b"1", 6), (b"3", 7)):
        cache.insert(key, block_id)
    keys = [b"root", b"0", b"1", b"2", b"3"]
    assert cache.find(keys, 4) == [5, 6]
    assert cache.find(keys, 1) == [5]


@pytest.mark.parametrize(
    ("cached", "found"),
    [
        ({1: 5, 2: 6}, [0, 5, 6]),  # block 0 is out of the window of 6 tokens before token 12
        ({0: 4, 1: 5}, [4, 5]),
        ({0: 4, 2: 6}, [4]),
        ({2: 6}, []),
        ({3: 7, 2: 6, 0: 4}, [0, 0, 6, 7]),
        ({}, []),
    ],
)
def test_with_a_window_only_what_can_be_seen_must_be_cached(cached: dict[int, int], found: list[int]) -> None:
    cache = make_cache(block_size=4, window=6)
    keys = [b"root", *(bytes([index]) for index in range(4))]
    for index, block_id in cached.items():
        cache.insert(keys[index + 1], block_id)
    assert cache.find(keys, 4) == found


def test_window_arithmetic_matches_its_definition() -> None:
    for block_size in (1, 2, 3, 16):
        for window in (1, 2, 5, 16, 17):
            for position in range(60):
                seen = [p for p in range(position + 1) if position - p < window]
                assert first_block_in_window(position, window, block_size) == seen[0] // block_size
                assert first_block_in_window(position, None, block_size) == 0


def test_a_fenced_block_is_free_when_the_newest_step_that_uses_it_has_retired() -> None:
    pool = make_pool()
    block_ids = pool.allocate(2)
    pool.fence(block_ids, 2)
    pool.fence(block_ids[:1], 1)
    pool.release(block_ids)
    assert (pool.num_used_blocks, pool.num_fenced_blocks) == (0, 2)
    pool.retire(1)
    assert pool.num_fenced_blocks == 2
    pool.retire(2)
    assert pool.num_fenced_blocks == 0
    assert sorted(pool.free_block_ids()[-2:]) == block_ids
    pool.check_count()
