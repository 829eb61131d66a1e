"""Who gives way when the pool is empty."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

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

    The newest goes first; the beams of one group go together. Only `requester` itself and those after it may be chosen,
    never the oldest, and only if at least one block becomes free at once: usually one victim does, but when the newest
    share all their blocks it takes all the holders of one. A pinned requester is not its own victim: it keeps what it
    has and waits.
    """
    units = [list(unit) for _, unit in groupby(running, key=_unit_of)]
    own = next(index for index, unit in enumerate(units) if requester in unit)
    newest_first = units[: max(own, 1) - 1 : -1]
    pinned = [unit for unit in newest_first if unit[0].num_preemptions >= max_preemptions]
    candidates = [unit for unit in newest_first if unit not in pinned]
    candidates += [unit for unit in pinned if requester not in unit]
    for unit in candidates:
        if _frees_a_block(unit, ref_counts):
            return unit
    return _holders_of_one_block(candidates, ref_counts)


def _unit_of(sequence: Sequence) -> object:
    """Beams of a group stand side by side in `running`."""
    return sequence if sequence.beam is None else sequence.beam.group


def _frees_a_block(unit: list[Sequence], ref_counts: list[int]) -> bool:
    if len(unit) == 1:
        return any(ref_counts[block_id] == 1 for block_id in reversed(unit[0].block_table.held_block_ids()))
    return bool(_holders_of_one_block([unit], ref_counts))


def _holders_of_one_block(units: list[list[Sequence]], ref_counts: list[int]) -> list[Sequence]:
    """All of the units that together hold every reference to some block; the earliest such block in their order."""
    num_held: Counter[int] = Counter()
    for num_seen, unit in enumerate(units, 1):
        for sequence in unit:
            for block_id in sequence.block_table.held_block_ids():
                num_held[block_id] += 1
                if num_held[block_id] == ref_counts[block_id]:
                    holders = [each for each in units[:num_seen] if _holds(each, block_id)]
                    return [sequence for each in holders for sequence in each]
    return []


def _holds(unit: list[Sequence], block_id: int) -> bool:
    return any(block_id in sequence.block_table.held_block_ids() for sequence in unit)
