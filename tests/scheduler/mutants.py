"""Faults to plant in the scheduler, each with the invariant that must notice it.

A mutant is an edit of the source text of one function, so it cannot outlive the line it breaks: if the text is gone,
its test fails and it has to be written anew.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

from quire.scheduler import admission, scheduler, speculation
from quire.scheduler.batch_builder import BatchBuilder
from quire.scheduler.beam import BeamGroup
from quire.scheduler.beam_search import BeamSearch
from quire.scheduler.block_manager import BlockManager
from quire.scheduler.block_pool import BlockPool
from quire.scheduler.block_table import BlockTable
from quire.scheduler.budget import PromptBudget
from quire.scheduler.choices import Choices
from quire.scheduler.prefix_cache import PrefixCache
from quire.scheduler.prompts import Prompts
from quire.scheduler.request_queue import RequestQueue
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.speculation import Speculator
from quire.scheduler.waiting_order import WaitingOrder


@dataclass(frozen=True)
class Mutant:
    invariant: str
    fault: str
    owner: object
    """The class or module that holds the function."""
    function: str
    replacements: tuple[tuple[str, str], ...]
    first_seed: int = 0
    """Of the simulations to be run: of a rare event, one that is known to meet it."""
    num_steps: int = 100

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        function = getattr(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in self.replacements:
            if source.count(old) != 1:
                raise LookupError(f"{self.function} has the text {old!r} {source.count(old)} times")
            source = source.replace(old, new)
        module_code = compile(source, f"<mutant: {self.fault}>", "exec")
        original = function.__code__
        function.__code__ = next(part for part in module_code.co_consts if isinstance(part, CodeType))
        try:
            yield
        finally:
            function.__code__ = original


def mutant(
    invariant: str, fault: str, owner: object, function: str, *replacements: tuple[str, str], **fields: int
) -> Mutant:
    return Mutant(invariant, fault, owner, function, replacements, **fields)


MUTANTS = [
    mutant(
        "I1",
        "entries outside the window are references",
        BlockTable,
        "adopt",
        ("self.num_released += 1", "self.num_released += 1; self._pool.ref_counts[0] += 1"),
    ),
    mutant(
        "I2",
        "entries outside the window are released again",
        BlockTable,
        "release",
        ("self.block_ids[self.num_released :]", "self.block_ids"),
    ),
    mutant(
        "I3",
        "an ended sequence keeps its blocks",
        Scheduler,
        "end_running",
        ("self.blocks.release(sequence)", "pass"),
    ),
    mutant("I3", "a released table is not emptied", BlockTable, "release", ("self.block_ids.clear()", "pass")),
    mutant(
        "I3",
        "the source of a copy stays held",
        BlockTable,
        "take_copy",
        ("self._pool.release((self.copy_source,))", "pass"),
    ),
    mutant(
        "I3",
        "a shared block is not counted",
        BlockPool,
        "share",
        ("self.ref_counts[block_id] += 1", "self.ref_counts[block_id] = 1"),
    ),
    mutant("I4", "a revived block still counts as free", BlockPool, "share", ("self.num_free_blocks -= 1", "pass")),
    mutant(
        "I5",
        "a block is free while one holder is left",
        BlockPool,
        "release",
        ("if ref_count == 0:", "if ref_count <= 1:"),
    ),
    mutant(
        "I5",
        "a revived block stays in the free list",
        BlockPool,
        "share",
        ("self._next[previous_free] = next_free", "pass"),
        ("self._previous[next_free] = previous_free", "pass"),
    ),
    mutant(
        "I6",
        "eviction removes one side of the bijection",
        PrefixCache,
        "forget",
        ("self._keys[block_id] = None", "pass"),
    ),
    mutant(
        "I6",
        "a block that is replaced keeps its key",
        PrefixCache,
        "insert",
        ("self.forget(holder)", "pass"),
    ),
    mutant(
        "I6",
        "a reset forgets only how to find blocks",
        PrefixCache,
        "clear",
        ("self._keys = [None] * len(self._keys)", "pass"),
    ),
    mutant(
        "I7",
        "one new block is entered for all",
        BlockTable,
        "grow",
        (
            "    self._extend(block_ids)",
            "    self._pool.release(block_ids[1:])\n    block_ids = block_ids[:1] * num_blocks\n"
            "    [self._pool.share(block_id) for block_id in block_ids[1:]]\n    self._extend(block_ids)",
        ),
    ),
    mutant(
        "I8",
        "one block too few is allocated",
        BlockTable,
        "num_missing_blocks",
        ("(self.capacity - num_tokens)", "(self.capacity - num_tokens + 1)"),
    ),
    mutant(
        "I8",
        "the window lets go one token early",
        BlockManager,
        "release_out_of_window",
        ("sequence.num_computed_tokens", "sequence.num_computed_tokens + 1"),
    ),
    mutant(
        "I8",
        "released entries keep their block ids",
        BlockTable,
        "release_before",
        ("= [0] * len(released)", "= released"),
    ),
    mutant(
        "I8",
        "a hit ignores a hole in the window",
        PrefixCache,
        "_find_in_window",
        ("if first_of_run <= first:", "if True:"),
    ),
    mutant(
        "I9", "a chunk is computed and not counted", Scheduler, "_advance_chunks", ("= start + num_tokens", "= start")
    ),
    mutant(
        "I10",
        "a partial block is shared, not copied",
        BlockTable,
        "fork",
        ("table.adopt_and_copy_last(", "table.adopt("),
    ),
    mutant(
        "I10",
        "blocks are cached before they are computed",
        BlockManager,
        "start",
        (
            "sequence.num_computed_tokens =",
            "self.cache_full_blocks(sequence, 0, num_tokens); sequence.num_computed_tokens =",
        ),
    ),
    mutant(
        "I11",
        "copies are not handed out",
        BlockManager,
        "take_changes",
        ("return copies, updates", "return [], updates"),
    ),
    mutant(
        "I11", "the engine is not told of a fork's table", BlockManager, "fork", ("self._log_table(follower)", "pass")
    ),
    mutant("I11", "the salt is missing from the key", PrefixCache, "root_key", ('("salt", salt)', '("salt", "")')),
    mutant(
        "I24",
        "the block before is missing from the key",
        PrefixCache,
        "extend_keys",
        ("BLOCK_DOMAIN + key", "BLOCK_DOMAIN + block_keys[0]"),
    ),
    mutant(
        "I12",
        "a preempted sequence counts as computed",
        Scheduler,
        "preempt",
        ("sequence.num_computed_tokens = 0", "pass"),
    ),
    mutant(
        "I11",
        "the copy that a hit goes on in is not handed out",
        BlockManager,
        "start",
        ("self._copying.append(table)", "pass"),
    ),
    mutant(
        "I11",
        "a copy goes into the last block of a table that has grown",
        BlockTable,
        "take_copy",
        ("self.copy_target)", "self.block_ids[-1])"),
    ),
    mutant(
        "I13", "the rows of followers are lost", Choices, "orphan_followers", ("self._scheduler.free_rows += ", "_ = ")
    ),
    mutant(
        "I13",
        "a row is given back twice",
        Scheduler,
        "end_running",
        ("self.free_rows.append(sequence.row)", "self.free_rows += [sequence.row] * 2"),
    ),
    mutant(
        "I14",
        "admission does not use up the budget",
        PromptBudget,
        "spend",
        ("self.num_tokens -= num_tokens", "pass"),
    ),
    mutant(
        "I14",
        "a prompt that is scored goes with the decodes",
        BatchBuilder,
        "add",
        ("num_tokens > 1 or sequence.scoring_depth is not None", "num_tokens > 1"),
    ),
    mutant(
        "I15", "a preempted sequence stays in running", Scheduler, "preempt", ("self.running.remove(sequence)", "pass")
    ),
    mutant(
        "I15",
        "followers are forgotten with their leader",
        Choices,
        "orphan_followers",
        ("self.enqueue(followers)", "pass"),
    ),
    mutant(
        "I16",
        "an aborted sequence still has output",
        Scheduler,
        "update",
        ("if sequence.status is not RUNNING:", "if False:"),
    ),
    mutant(
        "I17",
        "nobody is ever preempted",
        scheduler,
        "choose_victims",
        ("return unit", "return []"),
        ("return _holders_of_one_block(candidates, ref_counts)", "return []"),
    ),
    mutant(
        "I17",
        "what can never fit is admitted",
        admission,
        "_pool_limit",
        ("config.max_pool_tokens + 1", "config.max_pool_tokens + 99"),
    ),
    mutant(
        "I17",
        "the whole prompt is taken from the cache",
        BlockManager,
        "_find_prefix",
        ("sequence.num_hittable_tokens", "len(sequence.token_ids)"),
    ),
    mutant(
        "I17",
        "a group waits for more rows than there are",
        Prompts,
        "schedule_waiting",
        ("1 + len(sequence.followers)", "2 + len(sequence.followers)"),
    ),
    mutant(
        "I17",
        "a hit takes a block more than the pool has",
        BlockManager,
        "_find_scored_prefix",
        ("> self._num_usable_blocks", "> self._num_usable_blocks + 1"),
    ),
    mutant(
        "I18",
        "the preempted go to the end of the queue",
        RequestQueue,
        "push",
        ("insort(self._sequences, sequence, key=BY_ORDER)", "self._sequences.append(sequence)"),
    ),
    mutant(
        "I18",
        "the newest overtakes the head of the queue",
        Prompts,
        "schedule_waiting",
        ("self.order.candidates()", "list(self.order.candidates())[::-1]"),
    ),
    mutant(
        "I18",
        "nobody counts how often one is overtaken",
        WaitingOrder,
        "admit",
        ("overtaken.num_overtakes += 1", "pass"),
    ),
    mutant(
        "I18",
        "one overtaking too many",
        WaitingOrder,
        "_rank",
        (">= self.max_overtakes", "> self.max_overtakes"),
    ),
    mutant(
        "I18",
        "a long cached prefix goes before a higher priority",
        WaitingOrder,
        "_rank",
        (
            "return sequence.order[0], -self._blocks.find",
            "return 0, -self._blocks.find",
        ),
        ("return sequence.order[0], OVERDUE", "return 0, OVERDUE"),
    ),
    mutant(
        "I18",
        "who was preempted is overtaken",
        WaitingOrder,
        "_rank",
        (" or sequence.num_preemptions", ""),
    ),
    mutant(
        "I11",
        "what was found holds although a block is no longer cached",
        PrefixCache,
        "forget",
        ("self.version += 1", "pass"),
    ),
    mutant(
        "I11",
        "what was found holds as long as nothing follows it",
        BlockManager,
        "_is_still_missing",
        ("not prefix.block_ids and ", ""),
    ),
    mutant(
        "I18",
        "who fits overtakes who does not",
        Prompts,
        "schedule_waiting",
        (
            "if num_tokens == 0 or not self._has_room(sequence, prefix, start + num_tokens):\n            break",
            "if num_tokens == 0 or not self._has_room(sequence, prefix, start + num_tokens):\n            continue",
        ),
    ),
    mutant(
        "I18",
        "a sequence waits for another text",
        BlockManager,
        "is_computing",
        ("writer.block_keys[index + 1 : index + 2] == [prefix.next_key]", "len(writer.block_keys) > index + 1"),
    ),
    mutant(
        "I31",
        "nobody waits for what is being computed",
        Prompts,
        "_should_wait",
        ("writers + in_flight", "in_flight"),
    ),
    mutant(
        "I32",
        "prompts come before decodes",
        Scheduler,
        "schedule",
        ("others = self._schedule_decodes(candidates, builder)\n", "others = candidates[:]\n"),
        (
            "self.prompts.schedule_running(others, builder, budget)\n",
            "self.prompts.schedule_running(others, builder, budget)\n    self._schedule_decodes(candidates, builder)\n",
        ),
    ),
    mutant(
        "I32",
        "prompts beside decodes take more than they may",
        Prompts,
        "budget",
        ("min(builder.budget, most) if", "builder.budget if"),
    ),
    mutant(
        "I19",
        "the oldest can be a victim",
        scheduler,
        "choose_victims",
        ("units[: max(own, 1) - 1 : -1]", "units[:1]"),
    ),
    mutant(
        "I20",
        "the last row is not given back",
        Scheduler,
        "end_running",
        ("self.free_rows.append(sequence.row)", "self.free_rows += [sequence.row] if len(self.live) > 1 else []"),
    ),
    mutant(
        "I21",
        "the most recently freed block is evicted",
        BlockPool,
        "allocate",
        ("block_id = next_free[NULL_BLOCK]", "block_id = self._previous[NULL_BLOCK]"),
    ),
    mutant(
        "I23",
        "a fork takes over the whole prompt",
        Choices,
        "fork_followers",
        ("leader.num_prompt_tokens - 1", "leader.num_prompt_tokens"),
    ),
    mutant(
        "I24",
        "a block is cached under its parent's key",
        BlockManager,
        "cache_full_blocks",
        ("insert(block_keys[index + 1]", "insert(block_keys[index]"),
    ),
    mutant(
        "I25",
        "min_tokens is not heeded",
        Sequence,
        "end_at",
        ("num_tokens - self.num_prompt_tokens > self.request.params.min_tokens", "True"),
    ),
    mutant(
        "I25",
        "the last token is cut off",
        Sequence,
        "end_at",
        (">= self.max_num_tokens", ">= self.max_num_tokens - 1"),
    ),
    mutant(
        "I25",
        "a resumed sequence has lost a token",
        Scheduler,
        "preempt",
        (
            "sequence.num_computed_tokens = 0",
            "sequence.num_computed_tokens = 0; sequence.num_output_tokens > 1 and sequence.token_ids.pop()",
        ),
    ),
    mutant(
        "I25",
        "a token is told of a request that asks for none",
        Scheduler,
        "_take_tokens",
        ("if end < sequence.max_num_tokens:", "if True:"),
    ),
    mutant(
        "I26",
        "a failed step's blocks are cached",
        Scheduler,
        "_fail",
        (
            "self.blocks.distrust(sequence)",
            "self.blocks.cache_full_blocks(sequence, sequence.num_computed_tokens, len(sequence.token_ids))",
        ),
    ),
    mutant(
        "I28",
        "a fork shares blocks in another order",
        BlockTable,
        "fork",
        ("table.adopt(self.block_ids[:num_shared])", "table.adopt(self.block_ids[:num_shared][::-1])"),
    ),
    mutant(
        "I29",
        "a hit ignores how deep is stored",
        PrefixCache,
        "find_scored",
        ("not _reaches(self._depths[block_id], depth)", "self._depths[block_id] is None"),
    ),
    mutant(
        "I29",
        "a hit ignores whether anything is stored",
        PrefixCache,
        "find_scored",
        ("or not _reaches(self._depths[block_id], depth)", ""),
    ),
    mutant(
        "I29",
        "the token before the boundary is not computed again",
        BlockManager,
        "_find_scored_prefix",
        ("num_blocks = num_tokens //", "num_blocks = (num_tokens - 1) //"),
        ("* self.block_size - 1, copies_last=True, ", "* self.block_size, "),
    ),
    mutant(
        "I29",
        "every choice tells the prompt",
        Scheduler,
        "end_scoring",
        ("self.live.get(sequence.request_id, ())", "[sequence]"),
    ),
    mutant(
        "I30",
        "a deeper block does not take over",
        PrefixCache,
        "insert",
        ("depth is None or _reaches(self._depths[holder], depth)", "True"),
    ),
    mutant(
        "I30",
        "a block beyond the prompt counts as scored",
        BlockManager,
        "cache_full_blocks",
        ("sequence.num_prompt_tokens // self.block_size", "last"),
        ("0 if sequence.scoring_depth is None else ", ""),
        ("sequence.scoring_depth if index", "sequence.request.params.prompt_logprobs if index"),
    ),
    mutant(
        "I30",
        "a block that is handed out anew keeps its depth",
        PrefixCache,
        "forget",
        ("self._depths[block_id] = None", "pass"),
    ),
    mutant(
        "I3",
        "beams that die keep their blocks",
        BeamSearch,
        "_reseat",
        ("self._scheduler.blocks.release(seat)", "pass"),
    ),
    mutant(
        "I11",
        "further children of a beam share its last block's content from too early",
        BeamSearch,
        "_bear",
        (
            "self._scheduler.blocks.fork(parent, seat, parent.num_computed_tokens)",
            "self._scheduler.blocks.fork(parent, seat, parent.num_computed_tokens - 1); "
            "seat.num_computed_tokens = parent.num_computed_tokens",
        ),
    ),
    mutant(
        "I11",
        "a group that came back forks behind what its beams have in common",
        BeamSearch,
        "preempt",
        ("common_length(group.live)", "len(group.live[0].token_ids) - 1"),
    ),
    mutant(
        "I13",
        "idle seats lose their rows",
        BeamSearch,
        "end",
        ("for seat in group.seats]", "for seat in group.live]"),
    ),
    mutant(
        "I8",
        "a beam that was preempted with its group is computed all the same",
        BatchBuilder,
        "drop_preempted",
        ("self.decodes = [sequence for sequence in self.decodes if sequence.status is RUNNING]", "pass"),
    ),
    mutant(
        "I12",
        "beams of one group are taken for victims of each other",
        scheduler,
        "choose_victims",
        ("groupby(running, key=_unit_of)", "groupby(running, key=id)"),
    ),
    mutant(
        "I25",
        "hypotheses from outside the best are kept",
        BeamGroup,
        "advance",
        ("if rank < self.width:", "if True:"),
    ),
    mutant(
        "I25",
        "length is not penalised",
        BeamGroup,
        "_normalised",
        ("log_prob / math.pow(length, self._length_penalty)", "log_prob"),
    ),
    mutant(
        "I25",
        "the first choice is told what another beam may still change",
        BeamGroup,
        "certain_output",
        ("for seat in self.live)", "for seat in self.live[:1])"),
    ),
    mutant(
        "I8",
        "look-ahead takes a block more than it needs",
        BlockManager,
        "look_ahead",
        ("self.grow(sequence, num_missing)", "self.grow(sequence, num_missing + 1)"),
    ),
    mutant(
        "I9",
        "wrong drafts stay computed",
        Speculator,
        "verify",
        ("yield output", "sequence.num_computed_tokens += 1 + len(drafts) - len(output.token_ids); yield output"),
    ),
    mutant(
        "I11",
        "a fork's copy goes to a block that was taken for drafts",
        BlockTable,
        "take_copy",
        ("self.copy_target", "self.block_ids[-1]"),
    ),
    mutant("I14", "drafts do not use up the budget", Speculator, "add_drafts", ("builder.budget -= ", "_ = ")),
    mutant(
        "I14",
        "drafts go past the last token that may be generated",
        Speculator,
        "_draft",
        ("sequence.max_num_tokens - 1", "sequence.max_num_tokens"),
    ),
    mutant(
        "I16",
        "drafts of an aborted sequence are verified",
        Speculator,
        "verify",
        ("if sequence.status is RUNNING:", "if True:"),
    ),
    mutant(
        "I21",
        "drafts get blocks that are not free",
        BlockManager,
        "look_ahead",
        ("if num_missing + num_reserved <= self.pool.num_free_blocks:", "if True:"),
    ),
    mutant(
        "I24",
        "a block that ends with a wrong draft is cached",
        Scheduler,
        "_take_tokens",
        ("self._review(sequence, end)", "self._review(sequence, end + 1)"),
    ),
    mutant(
        "I25",
        "one token too many is accepted",
        speculation,
        "reached_tokens",
        ("sampled[:num_reached]", "sampled[: num_reached + 1]"),
    ),
    mutant(
        "I25",
        "tokens behind a stop are told",
        Scheduler,
        "_take_tokens",
        ("taken.append(token_id)", "taken[:] = token_ids"),
    ),
    mutant(
        "I25",
        "a failure behind a wrong draft counts",
        Speculator,
        "verify",
        ("reached_tokens(", "[None] if None in sampled.token_ids[rows] else reached_tokens("),
    ),
]
