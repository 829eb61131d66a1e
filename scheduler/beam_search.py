"""Carries out beam searches: blocks are forked and freed, seats change hands, whole groups give way and come back."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from quire.scheduler.beam import BeamGroup, Survivor, common_length
from quire.scheduler.output import Candidates, ErrorCode, StepOutput, TokenLogProbs
from quire.scheduler.request_queue import BY_ORDER
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import RUNNING, WAITING

if TYPE_CHECKING:
    from quire.scheduler.scheduler import Scheduler


class BeamSearch:
    """The scheduler's collaborator for all requests with `use_beam_search`.

    A beam is a sequence like any other while it computes. Having its candidates, it has nothing left to compute and
    waits until all beams of its group have theirs, in whichever steps that was. Then the group advances at once:
    beams without a child let go of their blocks, the first child of each other beam stays in its parent's seat, the
    further ones fork its block table into a free seat.

    A group is preempted whole. It comes back as one leader that computes what all its beams begin with; the others
    follow it, fork there, and compute their own rest.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._touched: dict[BeamGroup, None] = {}

    def take(self, sequence: Sequence, candidates: Candidates | None, failure: ErrorCode | None) -> None:
        """A beam's last token is computed. Without candidates it has no way on; without a reason for that, its logits
        were not finite, and the search has failed."""
        if sequence.beam is None:
            raise RuntimeError(f"not a beam: {sequence}")
        group = sequence.beam.group
        end = len(sequence.token_ids)
        if candidates is None and failure is not None:
            group.failure = failure
            candidates = Candidates([], [])
        if candidates is None:
            group.failed = True
        else:
            self._scheduler.blocks.cache_full_blocks(sequence, sequence.num_computed_tokens, end)
            sequence.beam.candidates = candidates
        sequence.num_computed_tokens = end
        self._touched[group] = None

    def prompt_output(self, sequence: Sequence, prompt_log_probs: list[TokenLogProbs] | None) -> StepOutput:
        """What the first beam's prompt is worth is told at once, to the first choice that is still wanted."""
        params, unwanted = sequence.request.params, sequence.beam.group.unwanted if sequence.beam else set()
        choice_index = min(set(range(params.n)) - unwanted)
        output = StepOutput(sequence.request_id, choice_index, [], num_cached_tokens=sequence.num_cached_tokens)
        output.prompt_log_probs = self._scheduler.end_scoring(sequence, prompt_log_probs)
        return output

    def take_chunk(self, group: BeamGroup) -> None:
        """A beam has computed some of its tokens; others may wait to fork from them."""
        self._touched[group] = None

    def advance(self) -> list[StepOutput]:
        """After a step's rows were taken: fork, free and end."""
        outputs: list[StepOutput] = []
        touched, self._touched = self._touched, {}
        for group in [group for group in touched if group.failed]:
            for seat in group.live:
                self._scheduler.blocks.distrust(seat)
            outputs += self._end(group)
        for group in [group for group in touched if not group.failed]:
            if self._waits_for_blocks(group):
                self._touched[group] = None
                continue
            self._fork_resting(group)
            if group.ready:
                outputs += self._advance(group)
        return outputs

    def _waits_for_blocks(self, group: BeamGroup) -> bool:
        """Whether a step in flight keeps the blocks that a group needs to fork: it goes on when that has retired."""
        if not self._scheduler.steps.batches:
            return False
        num_blocks = len(self._resting(group))
        if group.ready:  # a beam that dies leaves a block: only what the group grows by comes from elsewhere
            num_blocks = len(group.seats) - len(group.live)
        return not self._make_room(group, num_blocks) and self._scheduler.blocks.pool.num_fenced_blocks > 0

    def preempt(self, group: BeamGroup) -> None:
        """Back to the queue with all its beams, to be computed again from what they have in common."""
        scheduler = self._scheduler
        self._touched.pop(group, None)
        for seat in group.live:
            scheduler.blocks.release(seat)
            seat.num_computed_tokens = 0
            seat.num_preemptions += 1
            seat.status = WAITING
            if seat.beam is not None:
                seat.beam.candidates = None
        scheduler.free_rows += [seat.row for seat in group.seats]
        group.fork_length = common_length(group.live) if len(group.live) > 1 else 0
        self._seat(group)
        scheduler.waiting.push(_leader(group))

    def end(self, group: BeamGroup) -> None:
        """Take a group out wherever it is: all that it holds goes back."""
        scheduler = self._scheduler
        self._touched.pop(group, None)
        leader = _leader(group)
        if leader.status is RUNNING:
            scheduler.free_rows += [seat.row for seat in group.seats]
        else:
            scheduler.waiting.remove(leader)
        for seat in group.seats:
            scheduler.blocks.release(seat)
            seat.leader, seat.followers = None, []
            scheduler.forget(seat)
        scheduler.running = [sequence for sequence in scheduler.running if sequence.status is RUNNING]

    def num_blocks_to_fork(self, leader: Sequence) -> int:
        """Blocks that the beams which follow a waiting leader will need of their own, once it has come so far."""
        if leader.beam is None:
            return 0
        group, block_size = leader.beam.group, self._scheduler.config.block_size
        own = -(-len(leader.token_ids) // block_size) - group.fork_length // block_size
        return (len(group.live) - 1) * own

    def _advance(self, group: BeamGroup) -> list[StepOutput]:
        survivors = group.advance()
        if not survivors:
            return self._end(group)
        self._reseat(group, survivors)
        output = group.certain_output(group.seats[0].num_cached_tokens)
        return [] if output is None else [output]

    def _end(self, group: BeamGroup) -> list[StepOutput]:
        outputs = group.final_outputs(group.seats[0].num_cached_tokens)
        self.end(group)
        return outputs

    def _reseat(self, group: BeamGroup, survivors: list[Survivor]) -> None:
        """Give each survivor a seat and, if there are blocks enough, a table of its own; else the group is preempted.

        A beam's last block is its own, so each beam that dies leaves a block for one that is born: only a group that
        grows needs blocks from elsewhere.
        """
        parents = {id(survivor.parent) for survivor in survivors}
        dying = [seat for seat in group.live if id(seat) not in parents]
        for seat in dying:
            self._scheduler.blocks.release(seat)
            seat.num_computed_tokens = 0
            seat.status = WAITING
        idle = [seat for seat in group.seats if seat not in group.live]
        free_seats = dying + idle
        num_born = len(survivors) - len(parents)
        has_room = self._make_room(group, num_born)
        taken: set[int] = set()
        heirs: list[tuple[Sequence, Survivor]] = []
        live: list[Sequence] = []
        for survivor in survivors:
            parent = survivor.parent
            if id(parent) in taken:
                seat = free_seats.pop(0)
                self._bear(seat, survivor, fork=has_room)
            else:
                taken.add(id(parent))
                seat = parent
                heirs.append((parent, survivor))
            live.append(seat)
        for parent, survivor in heirs:  # last, since the others begin with what their parent was
            parent.token_ids.append(survivor.token_id)
            _inherit(parent, survivor)
        group.live = live
        self._seat(group)
        if not has_room:
            self._scheduler.preempt(_leader(group))

    def _bear(self, seat: Sequence, survivor: Survivor, *, fork: bool) -> None:
        parent = survivor.parent
        seat.status = RUNNING
        seat.leader = None
        seat.token_ids = [*parent.token_ids, survivor.token_id]
        seat.num_cached_tokens = parent.num_cached_tokens
        seat.num_preemptions = parent.num_preemptions
        if fork:
            self._scheduler.blocks.fork(parent, seat, parent.num_computed_tokens)
        _inherit(seat, survivor)

    def _seat(self, group: BeamGroup) -> None:
        """Running beams stand in `running` in their order; all other seats follow the first live one."""
        scheduler = self._scheduler
        members = set(group.seats)
        scheduler.running = [sequence for sequence in scheduler.running if sequence not in members]
        leader = _leader(group)
        for seat in group.seats:
            seat.leader, seat.followers = None, []
            if seat.status is RUNNING:
                insort(scheduler.running, seat, key=BY_ORDER)
        leader.followers = [seat for seat in group.seats if seat is not leader and seat.status is WAITING]
        for follower in leader.followers:
            follower.leader = leader

    def _resting(self, group: BeamGroup) -> list[Sequence]:
        """Beams of a group that came back and whose leader has computed what they have in common."""
        leader = _leader(group)
        if leader.status is not RUNNING or leader.num_computed_tokens < group.fork_length:
            return []
        return [seat for seat in group.live if seat.status is WAITING]

    def _fork_resting(self, group: BeamGroup) -> None:
        """They go on from what their leader has computed."""
        leader, resting = _leader(group), self._resting(group)
        if not resting:
            return
        if not self._make_room(group, len(resting)):
            self._scheduler.preempt(leader)
            return
        for seat in resting:
            self._scheduler.blocks.fork(leader, seat, group.fork_length)
            seat.status = RUNNING
        self._seat(group)

    def _make_room(self, group: BeamGroup, num_blocks: int) -> bool:
        """Free so many blocks at the cost of newer sequences; False: nobody is left to give way, or what they gave
        is fenced."""
        scheduler, pool = self._scheduler, self._scheduler.blocks.pool
        while pool.num_free_blocks < num_blocks:
            if pool.num_free_blocks + pool.num_fenced_blocks >= num_blocks:
                return False
            victims = scheduler.choose_victims(_leader(group))
            if not victims or any(victim.beam is not None and victim.beam.group is group for victim in victims):
                return False
            for victim in victims:
                scheduler.preempt(victim)
        return True


def _leader(group: BeamGroup) -> Sequence:
    """The first live beam that runs, or in a group that waits the first live one: in the order of its seats."""
    return min(group.live, key=lambda seat: (seat.status is not RUNNING, seat.order))


def _inherit(seat: Sequence, survivor: Survivor) -> None:
    if seat.beam is not None:
        seat.beam.score = survivor.score
        seat.beam.log_probs = survivor.log_probs
        seat.beam.candidates = None
