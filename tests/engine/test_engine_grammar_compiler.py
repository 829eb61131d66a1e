"""The front process's compiler: catastrophes end at the deadline, children are replaced, callers may leave."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from quire.engine.grammar import compiler as compiler_module
from quire.engine.grammar.compiler import CHILD_COMMAND, DEADLINE_SECONDS, GrammarCompiler, GrammarRefused
from quire.grammar import Grammar, GrammarError, GrammarKind
from quire.tales import MODEL_DIR
from tests.engine.grammar_catastrophes import CATASTROPHES

GOOD = Grammar("regex", "[a-z]+")
HANG = Grammar("regex", "hang")
TWO_KINDS: tuple[GrammarKind, ...] = ("regex", "grammar")
SLACK_SECONDS = 2.0
"""For the machine; the deadline itself is the compiler's."""

FAKE_CHILD = """
import os, socket, struct, sys, time
import msgspec

sock = socket.socket(fileno=int(sys.argv[-1]))
behaviour = sys.argv[1]
if behaviour == "silent":
    time.sleep(60)
if behaviour == "dead":
    sys.exit(1)
while header := sock.recv(4, socket.MSG_WAITALL):
    message = msgspec.msgpack.decode(sock.recv(struct.unpack(">I", header)[0], socket.MSG_WAITALL))
    text = message["grammar"]["text"] if message["type"] == "Check" else ""
    if text == "hang":
        time.sleep(60)
    if text == "crash":
        os.abort()
    if text == "garbage":
        sock.sendall(b"\\xff" * 64)
        continue
    if text == "slow":
        time.sleep(0.3)
    code = "structured_output_unavailable" if behaviour == "unusable" else ""
    answer = msgspec.msgpack.encode({"code": code, "message": "no"})
    sock.sendall(struct.pack(">I", len(answer)) + answer)
"""


def fake(behaviour: str = "honest") -> tuple[str, ...]:
    return (sys.executable, "-c", FAKE_CHILD, behaviour)


def run(
    scenario: Callable[[GrammarCompiler], Awaitable[None]],
    command: Sequence[str] = CHILD_COMMAND,
    deadline: float = DEADLINE_SECONDS,
    directory: Path = MODEL_DIR,
    **options: float,
) -> None:
    async def main() -> None:
        compiler = GrammarCompiler(directory, 4096, [0], command=command, deadline=deadline, **options)
        try:
            await scenario(compiler)
        finally:
            await compiler.close()
        assert not compiler._idle
        assert not compiler._jobs

    asyncio.run(main())
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def code_of(compiler: GrammarCompiler, grammar: Grammar) -> str:
    try:
        await compiler.check(grammar)
    except GrammarRefused as error:
        return error.code if str(error) else "no message"
    return ""


@pytest.mark.parametrize("kind", ["regex", "grammar", "json_schema", "choice"])
def test_catastrophes_end_in_time_and_the_next_works(kind: GrammarKind) -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        for name, text in CATASTROPHES[kind].items():
            assert await code_of(compiler, Grammar("choice", f'["before {name}"]')) == ""
            began = time.monotonic()
            try:
                code = await code_of(compiler, Grammar(kind, text))
            except GrammarError as error:
                code = error.code
            assert time.monotonic() - began < DEADLINE_SECONDS + SLACK_SECONDS, name
            assert code in {"", "invalid_grammar", "grammar_too_complex", "grammar_too_large", "grammar_timeout"}, name
            assert await code_of(compiler, Grammar("choice", f'["after {name}"]')) == ""

    run(scenario)


def test_thirty_thousand_parentheses_do_not_reach_a_compiler() -> None:
    with pytest.raises(GrammarError, match="bytes"):
        Grammar("regex", "(" * 30_000)
    with pytest.raises(GrammarError, match="bytes"):
        Grammar("grammar", "(" * 30_000)


def test_what_is_refused_says_why_and_is_remembered() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        for _ in range(2):
            assert await code_of(compiler, Grammar("regex", "a(")) == "invalid_grammar"
            assert await code_of(compiler, Grammar("json_schema", '{"$ref": "#"}')) == "invalid_grammar"
            assert await code_of(compiler, Grammar("grammar", 'start: "a" start')) == "grammar_too_complex"
        assert len(compiler._verdicts) == 3

    run(scenario)


def test_a_child_that_hangs_is_killed_at_the_deadline_and_the_next_works() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        for _ in range(2):
            began = time.monotonic()
            assert await code_of(compiler, HANG) == "grammar_timeout"
            assert 1.0 <= time.monotonic() - began < 1.0 + SLACK_SECONDS
            compiler._verdicts.clear()
            assert await code_of(compiler, GOOD) == ""

    run(scenario, fake(), deadline=1.0)


def test_hanging_children_do_not_switch_structured_output_off() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        hanging = [Grammar("grammar", "hang"), HANG, Grammar("json_schema", '{"const": 1}')]
        codes = await asyncio.gather(*(code_of(compiler, grammar) for grammar in [*hanging, GOOD]))
        assert codes == ["grammar_timeout", "grammar_timeout", "", ""]

    run(scenario, fake(), deadline=1.0)


def test_a_timeout_is_remembered_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "TIMEOUT_KEPT_SECONDS", 0.2)

    async def scenario(compiler: GrammarCompiler) -> None:
        assert await code_of(compiler, HANG) == "grammar_timeout"
        began = time.monotonic()
        assert await code_of(compiler, HANG) == "grammar_timeout"
        assert time.monotonic() - began < 0.5
        await asyncio.sleep(0.25)
        assert compiler._known(HANG.digest) is None

    run(scenario, fake(), deadline=1.0)


@pytest.mark.parametrize("text", ["crash", "garbage"])
def test_a_child_that_is_lost_is_replaced(text: str) -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        assert await code_of(compiler, Grammar("regex", text)) == "grammar_too_complex"
        assert await code_of(compiler, GOOD) == ""

    run(scenario, fake())


def test_a_child_that_died_while_idle_is_replaced() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        await compiler.warm_up()
        (child,) = compiler._idle
        os.kill(child._process.pid, 9)
        await child._process.wait()
        assert await code_of(compiler, GOOD) == ""

    run(scenario, fake())


def test_callers_that_leave_harm_nobody() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        await compiler.warm_up()
        for text in ("slow", "hang"):
            leaver = asyncio.create_task(compiler.check(Grammar("regex", text)))
            stayer = asyncio.create_task(code_of(compiler, Grammar("regex", text)))
            await asyncio.sleep(0.1)
            leaver.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaver
            assert await code_of(compiler, GOOD) == ""
            assert await stayer == ("" if text == "slow" else "grammar_timeout")
        assert not compiler._jobs
        assert compiler._slots._value == compiler_module.NUM_CHILDREN

    run(scenario, fake(), deadline=1.0)


def test_the_same_grammar_is_checked_once() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        await compiler.warm_up()
        began = time.monotonic()
        await asyncio.gather(*(compiler.check(Grammar("regex", "slow")) for _ in range(20)))
        assert time.monotonic() - began < 2.0
        assert len(compiler._idle) == 1

    run(scenario, fake())


def test_too_many_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_JOBS", 3)

    async def scenario(compiler: GrammarCompiler) -> None:
        grammars = [Grammar("regex", text) for text in ("hang", "slow", "a", "b")]
        codes = await asyncio.gather(*(code_of(compiler, grammar) for grammar in grammars))
        assert codes == ["grammar_timeout", "", "", "structured_output_unavailable"]
        assert await code_of(compiler, grammars[3]) == ""

    run(scenario, fake(), deadline=1.0)


def test_the_queue_has_a_deadline_of_its_own() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        hanging = [asyncio.create_task(code_of(compiler, Grammar(kind, "hang"))) for kind in TWO_KINDS]
        await asyncio.sleep(0)
        assert await code_of(compiler, GOOD) == "structured_output_unavailable"
        assert [await each for each in hanging] == ["grammar_timeout", "grammar_timeout"]
        assert await code_of(compiler, GOOD) == ""

    run(scenario, fake(), deadline=1.0, queue_deadline=0.2)


@pytest.mark.parametrize("behaviour", ["silent", "dead", "unusable"])
def test_a_child_that_does_not_start(behaviour: str) -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        for _ in range(2):
            assert await code_of(compiler, GOOD) == "structured_output_unavailable"

    run(scenario, fake(behaviour), start_deadline=0.5)


def test_a_command_that_does_not_exist() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        assert await code_of(compiler, GOOD) == "structured_output_unavailable"

    run(scenario, ("/nonexistent/python",))


def test_a_tokenizer_that_cannot_be_used(word_piece_dir: Path) -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        with pytest.raises(GrammarRefused, match="tokenizer"):
            await compiler.check(GOOD)
        assert compiler._unusable is not None

    run(scenario, directory=word_piece_dir)


def test_closing_refuses_who_waits() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        waiting = [asyncio.create_task(code_of(compiler, Grammar(kind, "hang"))) for kind in TWO_KINDS]
        await asyncio.sleep(0.3)
        await compiler.close()
        assert [await each for each in waiting] == ["structured_output_unavailable"] * 2
        assert await code_of(compiler, GOOD) == "structured_output_unavailable"

    run(scenario, fake(), deadline=30.0)


def test_a_child_ends_with_its_parent() -> None:
    async def scenario(compiler: GrammarCompiler) -> None:
        await compiler.check(GOOD)
        (child,) = compiler._idle
        child._writer.transport.abort()
        async with asyncio.timeout(5.0):
            assert await child._process.wait() == 0

    run(scenario)
