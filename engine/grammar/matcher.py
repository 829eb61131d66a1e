"""One sequence's place in its grammar: which tokens may come next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from quire.engine.grammar.compiled import CompiledGrammar, is_lexer_failure, is_too_complex
from quire.engine.grammar.vocabulary import Bitmask
from quire.grammar import GrammarError


class GrammarMatcher:
    """A pure function of the grammar and the output token ids so far; used by one thread.

    End-of-sequence ids, all of the model's, are allowed exactly where the grammar accepts, and nothing but they may
    follow one. A matcher that fails is dead until `rollback` or `rebuild`: see `failure`.
    """

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._compiled = compiled
        self._matcher = compiled.copy()
        self._token_ids: list[int] = []
        self._num_eos = 0
        self._shares_lexer = True
        self._failure: GrammarError | None = None

    @property
    def token_ids(self) -> list[int]:
        """What was accepted, ends of sequence last."""
        return list(self._token_ids)

    @property
    def failure(self) -> GrammarError | None:
        """Why the sequence cannot go on: `grammar_too_complex`, or `invalid_grammar` where no token is allowed."""
        return self._failure

    @property
    def is_dead(self) -> bool:
        """Known after `fill_bitmask` or `accept`; only this sequence must end."""
        return self._failure is not None

    @property
    def is_accepting(self) -> bool:
        """The output may end here."""
        return self._failure is None and (self._num_eos > 0 or bool(self._matcher.is_accepting()))

    @property
    def is_stopped(self) -> bool:
        """The output is complete: nothing but an end of sequence is allowed. Never true of a dead matcher."""
        return self._failure is None and (self._num_eos > 0 or bool(self._matcher.is_stopped()))

    def fill_bitmask(self, bitmask_row: Bitmask) -> None:
        """Set the bits of the ids that may come next, clear all others; a dead matcher allows none.

        Where the grammar forces text, only its usual tokenization is allowed.

        Args:
            bitmask_row: int32 [ceil(vocab_size / 32)], written whole.
        """
        vocabulary = self._compiled.vocabulary
        if bitmask_row.shape != (vocabulary.num_words,) or bitmask_row.dtype != np.int32:
            raise ValueError(f"bitmask_row must be int32 [{vocabulary.num_words}].")
        if self._failure is not None:
            bitmask_row[:] = 0
            return
        if self._num_eos:
            bitmask_row[:] = vocabulary.eos
            return
        mask = self._compute_mask()
        if mask is None and self._recover():
            mask = self._compute_mask()
        if mask is None:
            self._fail()
            bitmask_row[:] = 0
            return
        np.bitwise_and(mask[: vocabulary.num_words], vocabulary.known, out=bitmask_row)
        if self._matcher.is_accepting():
            bitmask_row |= vocabulary.eos
        else:
            bitmask_row &= ~vocabulary.eos
            if not bitmask_row.any():
                self._fail()

    def accept(self, token_id: int) -> bool:
        """Take one token; False, and nothing has changed, if the grammar does not allow it or the matcher is dead.

        Any tokenization of an allowed text is taken, also one that `fill_bitmask` leaves out.
        """
        if self._failure is not None:
            return False
        if token_id in self._compiled.vocabulary.eos_token_ids:
            if not self.is_accepting:
                return False
            self._num_eos += 1
        elif self._num_eos or not self._compiled.vocabulary.is_known(token_id):
            return False
        else:
            taken = self._matcher.try_consume_tokens([token_id]) == 1
            if self._matcher.is_error():
                taken = self._recover() and self._matcher.try_consume_tokens([token_id]) == 1
                if self._matcher.is_error():
                    self._fail()
                    return False
            if not taken:
                return False
        self._token_ids.append(token_id)
        return True

    def try_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of these `accept` would take, one after another. The state stays as it is."""
        if self._failure is not None:
            return 0
        num_before = len(self._token_ids)
        for token_id in token_ids:
            if not self.accept(token_id):
                break
        num_accepted = len(self._token_ids) - num_before
        self.rollback(num_accepted)
        return num_accepted

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens.

        Raises:
            ValueError: so many were not accepted.
        """
        if not 0 <= num_tokens <= len(self._token_ids):
            raise ValueError(f"rollback of {num_tokens} tokens of {len(self._token_ids)}")
        num_eos = min(num_tokens, self._num_eos)
        kept = self._token_ids[: len(self._token_ids) - num_tokens]
        if self._failure is not None:
            self.rebuild(kept)
            return
        self._num_eos -= num_eos
        self._token_ids = kept
        # What remains is llguidance's; it never saw an end of sequence.
        if num_tokens > num_eos and not self._matcher.rollback(num_tokens - num_eos):
            self.rebuild(kept)

    def fork(self) -> GrammarMatcher:
        """A matcher in the same state that goes its own way."""
        other = GrammarMatcher(self._compiled)
        other._matcher = self._matcher.deep_copy()
        other._token_ids = list(self._token_ids)
        other._num_eos = self._num_eos
        other._shares_lexer = self._shares_lexer
        other._failure = self._failure
        return other

    def rebuild(self, token_ids: Iterable[int]) -> bool:
        """Begin again with these output tokens; False, and the matcher is dead, if the grammar does not allow them."""
        if self._compiled.failed:
            self._compiled = self._compiled.successor
        self._matcher = self._compiled.copy()
        self._token_ids, self._num_eos, self._failure = [], 0, None
        for token_id in token_ids:
            if not self.accept(token_id):
                self._failure = self._failure or GrammarError("invalid_grammar", "The output left the grammar.")
                return False
        return True

    def _compute_mask(self) -> Bitmask | None:
        """llguidance's mask; None on an error."""
        mask = np.empty(self._compiled.vocabulary.num_backend_words, np.int32)
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._compiled.charge(time.thread_time() - began)
        return None if self._matcher.is_error() else mask

    def _recover(self) -> bool:
        """Leave a lexer that failed; True if the state stands again.

        Whoever meets the failure first may have caused it and goes on alone; for the others it was not their own.
        """
        if not self._shares_lexer or not is_lexer_failure(self._matcher.get_error()):
            return False
        failed = self._compiled
        if failed.failed:
            self._compiled = failed.successor
        else:
            failed.failed = True
            self._compiled = CompiledGrammar(failed.vocabulary, failed.grammar)
            self._shares_lexer = False
        self._matcher = self._compiled.copy()
        text_ids = self._token_ids[: len(self._token_ids) - self._num_eos]
        return bool(self._matcher.consume_tokens(text_ids))

    def _fail(self) -> None:
        error = self._matcher.get_error()
        self._compiled.failed |= is_lexer_failure(error)
        if is_lexer_failure(error) or is_too_complex(error):
            self._failure = GrammarError("grammar_too_complex", "The grammar has become too complex at this point.")
        else:
            self._failure = GrammarError("invalid_grammar", "The grammar allows no token at this point.")
