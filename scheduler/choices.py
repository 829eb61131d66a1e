"""The choices of a request with n > 1: admitted together, computed once, then each on its own."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from quire.scheduler.request_queue import BY_ORDER
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import RUNNING, WAITING

if TYPE_CHECKING:
    from quire.scheduler.scheduler import Scheduler


class Choices:
    """The scheduler's collaborator for leaders and followers.

    The first choice leads; the others hold a row and no blocks until the prompt is computed, and fork there. Whoever
    finds no block to fork into, or has lost its leader, waits again, behind a leader of its own.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def enqueue(self, sequences: list[Sequence]) -> None:
        """Wait together, led by the first."""
        leader, *followers = sequences
        leader.leader = None
        leader.followers = followers
        for follower in followers:
            follower.leader = leader
        self._scheduler.waiting.push(leader)

    def fork_followers(self, leader: Sequence) -> None:
        """The leader has computed the prompt: the others go on from there, as long as there are blocks for them."""
        scheduler = self._scheduler
        while leader.followers and scheduler.blocks.pool.num_free_blocks > 0:
            follower = leader.followers.pop(0)
            follower.leader = None
            follower.num_cached_tokens = leader.num_cached_tokens
            follower.run()
            scheduler.blocks.fork(leader, follower, leader.num_prompt_tokens - 1)
            insort(scheduler.running, follower, key=BY_ORDER)
        self.orphan_followers(leader)

    def orphan_followers(self, leader: Sequence) -> None:
        """Nothing is left to fork from: the followers wait as a group of their own."""
        followers, leader.followers = leader.followers, []
        if leader.status is RUNNING:
            self._scheduler.free_rows += [follower.row for follower in followers]
        if followers:
            self.enqueue(followers)

    def abort(self, sequence: Sequence) -> None:
        """End one choice, wherever it is."""
        scheduler, leader = self._scheduler, sequence.leader
        if leader is not None:
            leader.followers.remove(sequence)
            if leader.status is RUNNING:
                scheduler.free_rows.append(sequence.row)
            scheduler.forget(sequence)
        elif sequence.status is WAITING:
            scheduler.waiting.remove(sequence)
            self.orphan_followers(sequence)
            scheduler.forget(sequence)
        else:
            scheduler.running.remove(sequence)
            scheduler.end_running(sequence)
