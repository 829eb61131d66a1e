"""Who gives way when the pool is empty."""

from __future__ import annotations

from collections import Counter

from quire.scheduler.sequence import Sequence

MAX_PREEMPTIONS = 8


def choose_victims(
    running: list[Sequence], requester: Sequence, ref_counts: list[int], max_preemptions: int
) -> list[Sequence]:
    """Who is to be preempted so that `requester` gets a block; empty: nobody, it sits out this step.

    Args:
        running: in order, the oldest first; `requester` is one of them.
        ref_counts: of all blocks.
        max_preemptions: whoever was preempted so often is pinned: not chosen again while others can be.

    The newest goes first. Only `requester` itself and those after it may be chosen, never the oldest, and only if at
    least one block becomes free at once: usually one victim does, but when the newest share all their blocks it takes
    all the holders of one. A pinned requester is not its own victim: it keeps what it has and waits.
    """
    pinned = {sequence for sequence in running if sequence.num_preemptions >= max_preemptions}
    candidates = running[max(running.index(requester), 1) :]
    newest_first = [sequence for sequence in reversed(candidates) if sequence not in pinned]
    newest_first += [sequence for sequence in reversed(candidates) if sequence in pinned - {requester}]
    for sequence in newest_first:
        if any(ref_counts[block_id] == 1 for block_id in reversed(sequence.block_table.held_block_ids())):
            return [sequence]
    return _holders_of_one_block(newest_first, ref_counts)


def _holders_of_one_block(candidates: list[Sequence], ref_counts: list[int]) -> list[Sequence]:
    """The candidates that together hold every reference to some block; the earliest such block in their order."""
    num_held: Counter[int] = Counter()
    for num_seen, sequence in enumerate(candidates, 1):
        for block_id in sequence.block_table.held_block_ids():
            num_held[block_id] += 1
            if num_held[block_id] == ref_counts[block_id]:
                return [holder for holder in candidates[:num_seen] if block_id in holder.block_table.held_block_ids()]
    return []
