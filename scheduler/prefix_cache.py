"""Which block holds which prefix: a bijection between keys and block ids.

The key of a block is a SHA-256 over the key of the block before it and the token ids it holds; the chain starts from a
root that covers everything else the KV-cache depends on. So equal keys mean equal prefixes, of one namespace and salt.
"""

from __future__ import annotations

import struct
from array import array
from hashlib import sha256

from quire.scheduler.window import first_block_in_window

ROOT_DOMAIN = b"quire prefix-cache root v1"
BLOCK_DOMAIN = b"block v1"


class PrefixCache:
    """Knows blocks by their content. Owns no references: a block it knows may be in use, or free and evictable.

    A block may also have the log-probabilities of its tokens stored, to a depth: so many of the best tokens at each
    position. They depend on nothing but the block's own prefix, so they are found by the same key.

    A sequence's `block_keys` is [root, key of block 0, key of block 1, ...]: the caller keeps the list, so that every
    block is hashed once.
    """

    __slots__ = ("_block_ids", "_depths", "_keys", "_namespace", "block_size", "version", "window")

    def __init__(self, num_blocks: int, block_size: int, *, namespace: str, window: int | None) -> None:
        self.block_size = block_size
        self.window = window
        self._namespace = namespace
        self._block_ids: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * num_blocks
        self._depths: list[int | None] = [None] * num_blocks
        self.version = 0
        """Changes with every block that becomes findable, or is no longer."""

    def __len__(self) -> int:
        return len(self._block_ids)

    def __contains__(self, key: object) -> bool:
        return key in self._block_ids

    def root_key(self, salt: str) -> bytes:
        """Key of the empty prefix: all that the KV-cache depends on but the tokens."""
        fields = (("namespace", self._namespace), ("salt", salt), ("block_size", str(self.block_size)))
        digest = sha256(ROOT_DOMAIN)
        for tag, value in fields:
            for text in (tag, value):
                encoded = text.encode("utf-8", "surrogatepass")
                digest.update(struct.pack("<Q", len(encoded)))
                digest.update(encoded)
        return digest.digest()

    def extend_keys(self, block_keys: list[bytes], token_ids: list[int], num_blocks: int) -> None:
        """Bring `block_keys` to cover the first `num_blocks` full blocks of `token_ids`."""
        num_known, block_size = len(block_keys) - 1, self.block_size
        if num_known >= num_blocks:
            return
        packed = array("I", token_ids[num_known * block_size : num_blocks * block_size])
        data, num_bytes, key = packed.tobytes(), packed.itemsize * block_size, block_keys[-1]
        for start in range(0, len(data), num_bytes):
            key = sha256(BLOCK_DOMAIN + key + data[start : start + num_bytes]).digest()
            block_keys.append(key)

    def find(self, block_keys: list[bytes], num_blocks: int) -> list[int]:
        """Block ids of the longest cached prefix of at most `num_blocks` blocks.

        With a sliding window only the blocks that later tokens can see need to be cached; entries before them are 0.
        """
        if self.window is not None:
            return self._find_in_window(block_keys, num_blocks, self.window)
        found: list[int] = []
        for key in block_keys[1 : num_blocks + 1]:
            block_id = self._block_ids.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def find_scored(self, block_keys: list[bytes], num_blocks: int, depth: int) -> list[int]:
        """As `find`, of blocks with log-probabilities stored to at least `depth`; complete even with a window."""
        found: list[int] = []
        for key in block_keys[1 : num_blocks + 1]:
            block_id = self._block_ids.get(key)
            if block_id is None or not _reaches(self._depths[block_id], depth):
                break
            found.append(block_id)
        return found

    def _find_in_window(self, block_keys: list[bytes], num_blocks: int, window: int) -> list[int]:
        found = [self._block_ids.get(key, 0) for key in block_keys[1 : num_blocks + 1]]
        best = first_of_best = first_of_run = 0
        for index, block_id in enumerate(found):
            if not block_id:
                first_of_run = index + 1
                continue
            first = first_block_in_window((index + 1) * self.block_size, window, self.block_size)
            if first_of_run <= first:
                best, first_of_best = index + 1, first
        return [0] * first_of_best + found[first_of_best:best]

    def insert(self, key: bytes, block_id: int, depth: int | None = None) -> None:
        """Make a full, computed block findable. If another block already holds the same prefix, that one stays.

        It is only replaced by a block with log-probabilities stored to a greater `depth`.
        """
        holder = self._block_ids.get(key)
        if holder is not None:
            if depth is None or _reaches(self._depths[holder], depth):
                return
            self.forget(holder)
        self.version += 1
        self._block_ids[key] = block_id
        self._keys[block_id] = key
        self._depths[block_id] = depth

    def forget(self, block_id: int) -> None:
        """Drop a block's key, because its content is about to change or is not to be trusted."""
        key = self._keys[block_id]
        if key is not None:
            self.version += 1
            self._keys[block_id] = None
            self._depths[block_id] = None
            del self._block_ids[key]

    def forget_keys(self, block_keys: list[bytes]) -> None:
        """Drop whichever blocks hold these prefixes."""
        for key in block_keys:
            block_id = self._block_ids.get(key)
            if block_id is not None:
                self.forget(block_id)

    def clear(self) -> None:
        self.version += 1
        self._block_ids.clear()
        self._keys = [None] * len(self._keys)
        self._depths = [None] * len(self._depths)

    def key_of(self, block_id: int) -> bytes | None:
        return self._keys[block_id]

    def depth_of(self, block_id: int) -> int | None:
        """Entries at each position of the block's stored log-probabilities; None: none are stored."""
        return self._depths[block_id]

    def num_keyed_blocks(self) -> int:
        return len(self._keys) - self._keys.count(None)

    def items(self) -> list[tuple[bytes, int]]:
        return list(self._block_ids.items())


def _reaches(stored: int | None, depth: int) -> bool:
    return stored is not None and stored >= depth
