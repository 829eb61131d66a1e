"""Sliding-window arithmetic: which blocks of a sequence can still be seen."""

from __future__ import annotations


def first_block_in_window(position: int, window: int | None, block_size: int) -> int:
    """Index of the first block that the token at `position`, or any later one, attends to.

    A token sees itself and the window - 1 positions before it.
    """
    if window is None or position < window:
        return 0
    return (position - window + 1) // block_size
