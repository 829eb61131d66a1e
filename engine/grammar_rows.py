"""The grammars of running sequences: where each of them is in its own, and which tokens may come next."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from quire.engine.grammar.factory import GrammarFactory
from quire.engine.grammar.matcher import GrammarMatcher
from quire.engine.host_values import to_device
from quire.engine.sampling_options import SampleRow
from quire.kernels.token_bitmask import apply_token_bitmask
from quire.scheduler.output import ErrorCode
from quire.scheduler.sequence import Sequence


@dataclass(slots=True)
class GrammarStep:
    """What grammars say of one step's rows, by index of the logits row."""

    complete: set[int] = field(default_factory=set)
    """Nothing but an end of sequence is left."""
    failures: dict[int, ErrorCode] = field(default_factory=dict)
    """The grammar allows no token, or has become too complex to tell."""


@dataclass(slots=True)
class _Place:
    """Where one sequence is: `matcher` has taken the output tokens of `history`, which may only grow."""

    sequence: Sequence
    history: list[int]
    matcher: GrammarMatcher
    num_taken: int = 0


class GrammarRows:
    """Matchers by the rows of their sequences. A matcher's state is a function of the output alone, so that a beam that
    goes on from another's tokens, or a sequence that came back, only needs to be read again."""

    def __init__(self, max_num_seqs: int, factory: GrammarFactory) -> None:
        self._factory = factory
        self._places: list[_Place | None] = [None] * max_num_seqs

    def mask(self, logits: torch.Tensor, rows: list[SampleRow]) -> GrammarStep:
        """Minus infinity where a row's grammar allows no token, in place on [R, V] float32."""
        step = GrammarStep()
        rows = [row for row in rows if row.params.grammar is not None]
        if not rows:
            return step
        bitmask = np.empty((len(rows), -(-logits.shape[-1] // 32)), np.int32)
        for place, row in enumerate(rows):
            self._fill(bitmask[place], row, step)
        indices = np.array([row.index for row in rows], np.int64)
        apply_token_bitmask(logits, to_device(bitmask, logits.device), to_device(indices, logits.device))
        return step

    def _fill(self, bitmask_row: np.ndarray[tuple[int], np.dtype[np.int32]], row: SampleRow, step: GrammarStep) -> None:
        matcher = self._matcher_of(row.sequence)
        num_drafts = sum(1 for token_id in row.drafts if matcher.accept(token_id))
        if num_drafts < len(row.drafts):  # a draft that the grammar forbids is not sampled: nothing reaches this row
            bitmask_row[:] = -1
        else:
            matcher.fill_bitmask(bitmask_row)
            if matcher.failure is not None:
                too_complex = matcher.failure.code == "grammar_too_complex"
                step.failures[row.index] = "grammar_too_complex" if too_complex else "no_token_allowed"
            if matcher.is_stopped:
                step.complete.add(row.index)
        matcher.rollback(num_drafts)

    def _matcher_of(self, sequence: Sequence) -> GrammarMatcher:
        place, history = self._places[sequence.row], sequence.token_ids
        if place is None or place.sequence is not sequence:
            grammar = sequence.request.params.grammar
            if grammar is None:
                raise RuntimeError(f"has no grammar: {sequence}")
            place = self._places[sequence.row] = _Place(sequence, history, self._factory.create(grammar))
        output = history[sequence.num_prompt_tokens :]
        if place.history is not history:
            place.history, place.num_taken = history, len(output)
            place.matcher.rebuild(output)
        for token_id in output[place.num_taken :]:
            place.matcher.accept(token_id)
        place.num_taken = len(output)
        return place.matcher
