"""The child process that checks grammars: `python -m quire.engine.grammar.child --fd N`.

It may be killed at any time, and a grammar may take it down. It bounds its own memory, stack and processor time, so
that it harms nobody even when no one is left to kill it.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import socket
import sys
import time
from typing import Final

import numpy as np

from quire.config import ConfigError
from quire.engine.grammar.compiled import CompiledGrammar
from quire.engine.grammar.matcher import GrammarMatcher
from quire.engine.grammar.messages import Check, Start, ToChild, Verdict
from quire.engine.grammar.vocabulary import GrammarVocabulary, token_ids
from quire.engine.resident_memory import return_unused_memory
from quire.engine.wire import FrameDecoder, pack
from quire.grammar import GrammarError

MEMORY_BYTES: Final = 4 * 1024**3
STACK_BYTES: Final = 4 * 1024**2
"""Half of what the engine process usually has: what overflows a stack does it here."""
_CPU_SECONDS: Final = 10
"""For one grammar. The parent kills much earlier, if it lives."""
_START_CPU_SECONDS: Final = 60
MAX_COMPILE_CPU_SECONDS: Final = 0.25
"""The engine compiles again, between two steps, and everyone waits for it."""
_NUM_WALKS: Final = 4
_WALK_STEPS: Final = 16
_NUM_FIRST_IDS: Final = 64
_READ_BYTES: Final = 64 * 1024


def serve(sock: socket.socket) -> None:
    """Answer until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    decoder: FrameDecoder[ToChild] = FrameDecoder(ToChild)
    vocabulary: GrammarVocabulary | None = None
    while data := sock.recv(_READ_BYTES):
        for message in decoder.feed(data):
            _allow_cpu_seconds(_START_CPU_SECONDS if isinstance(message, Start) else _CPU_SECONDS)
            if isinstance(message, Start):
                try:
                    vocabulary = GrammarVocabulary(message.directory, message.vocab_size, message.eos_token_ids)
                    return_unused_memory()
                    verdict = Verdict()
                except ConfigError as error:
                    verdict = Verdict("structured_output_unavailable", str(error))
            else:
                verdict = _check(vocabulary, message)
            sock.sendall(pack(verdict))


def main() -> int:
    parser = argparse.ArgumentParser(prog="quire.engine.grammar.child", description="Run by the front process.")
    parser.add_argument("--fd", type=int, required=True)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    serve(socket.socket(fileno=parser.parse_args().fd))
    return 0


def _check(vocabulary: GrammarVocabulary | None, message: Check) -> Verdict:
    if vocabulary is None:
        return Verdict("structured_output_unavailable", "Structured output is not available.")
    try:
        began = time.process_time()
        compiled = CompiledGrammar(vocabulary, message.grammar)
        if time.process_time() - began > MAX_COMPILE_CPU_SECONDS:
            return Verdict("grammar_too_complex", "The grammar is too complex.")
        _walk(compiled)
    except GrammarError as error:
        return Verdict(error.code, str(error))
    return Verdict()


def _walk(compiled: CompiledGrammar) -> None:
    """Follow the grammar a little way, since lexers and parsers are built as they are used.

    Every other walk keeps to the first ids, which in most vocabularies are single characters: they reach the structure
    that long texts hide.

    Raises:
        GrammarError: nothing is allowed at the beginning, or the grammar becomes too complex.
    """
    bitmask = np.empty(compiled.vocabulary.num_words, np.int32)
    for seed in range(_NUM_WALKS):
        matcher = GrammarMatcher(compiled)
        choose = random.Random(seed)
        for step in range(_WALK_STEPS):
            matcher.fill_bitmask(bitmask)
            failure = matcher.failure
            if failure is not None and (step == 0 or failure.code == "grammar_too_complex"):
                raise failure
            ids = token_ids(bitmask & ~compiled.vocabulary.eos)
            if not len(ids):
                break
            matcher.accept(int(choose.choice(ids[:_NUM_FIRST_IDS] if seed % 2 else ids)))


def _allow_cpu_seconds(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
