"""The engine process's way from a grammar to a matcher: compiled once, kept within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from quire.config import ConfigError
from quire.engine.grammar.compiled import CompiledGrammar
from quire.engine.grammar.matcher import GrammarMatcher
from quire.engine.grammar.vocabulary import GrammarVocabulary
from quire.grammar import Grammar, GrammarError

CACHE_BYTES = 64 * 1024 * 1024


class GrammarFactory:
    """Makes matchers. The vocabulary is built at the first use, or by `warm_up`.

    Args:
        directory, vocab_size, eos_token_ids: as for `GrammarVocabulary`.
        cache_bytes: for compiled grammars that no sequence uses; the newest is always kept.
    """

    def __init__(
        self,
        directory: Path | str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._cache_bytes = cache_bytes
        self._vocabulary: GrammarVocabulary | None = None
        self._compiled: OrderedDict[bytes, CompiledGrammar] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Of the compiled grammars that are kept, estimated from above."""
        return sum(compiled.num_bytes for compiled in self._compiled.values())

    def warm_up(self) -> None:
        """Build the vocabulary now, so that no request waits for it.

        Raises:
            GrammarError: `structured_output_unavailable`: this model's tokenizer cannot be used.
        """
        if self._vocabulary is None:
            try:
                self._vocabulary = GrammarVocabulary(self._directory, self._vocab_size, self._eos_token_ids)
            except ConfigError as error:
                raise GrammarError("structured_output_unavailable", str(error)) from error

    def create(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning of its output.

        Raises:
            GrammarError: as `warm_up`; or `invalid_grammar`, `grammar_too_complex`, which `GrammarCompiler.check` finds
                before.
        """
        self.warm_up()
        assert self._vocabulary is not None
        digest = grammar.digest
        compiled = self._compiled.pop(digest, None)
        if compiled is None:
            compiled = CompiledGrammar(self._vocabulary, grammar)
        elif compiled.failed:
            compiled = compiled.successor
        self._compiled[digest] = compiled
        while self.num_bytes > self._cache_bytes and len(self._compiled) > 1:
            self._compiled.popitem(last=False)
        return GrammarMatcher(compiled)
