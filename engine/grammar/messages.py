"""What crosses the socketpair between the front process and a child that checks grammars."""

from __future__ import annotations

import msgspec

from quire.grammar import Grammar


class Start(msgspec.Struct, tag=True, frozen=True):
    """First message to the child, which answers with a Verdict when its vocabulary is built."""

    directory: str
    vocab_size: int
    eos_token_ids: list[int]


class Check(msgspec.Struct, tag=True, frozen=True):
    grammar: Grammar


class Verdict(msgspec.Struct, frozen=True):
    code: str = ""
    """Empty: the grammar can be used."""
    message: str = ""


ToChild = Start | Check
