"""The front process's side: streams, aborts, slow readers, and clean errors whatever happens to the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from quire.config import EngineConfig
from quire.engine import delta_queue
from quire.engine.client import EngineClient, EngineDeadError, EngineStartError, ReaderTooSlowError, RequestRejected
from quire.engine.delta_queue import DeltaQueue
from quire.engine.messages import Abort, LoadProgress
from quire.engine.process_handle import ENGINE_COMMAND
from quire.engine.text_delta import TextDelta, merge
from quire.sampling_params import SamplingParams
from quire.scheduler.output import TokenLogProbs

PARTS = ["the ", "Ö", "日本", "👨‍👩‍👧‍👦", "👍🏽", "e\u0301", "\n", "𝔘", "한", "\u200d", "נ", "\ufe0f", "Ā"]

Check = Callable[[EngineClient], Awaitable[None]]


class Harness:
    def __init__(self, command: list[str], directory: Path) -> None:
        self.command = command
        self.directory = directory

    async def start(self, model: str, **options: Any) -> EngineClient:
        return await EngineClient.start(EngineConfig(model=model, **options), self.directory, command=self.command)

    def run(self, check: Check, model: str = "echo", **options: Any) -> None:
        """Start a client, let `check` use it, stop it; everything within 30 s."""

        async def main() -> None:
            async with asyncio.timeout(30):
                client = await self.start(model, **options)
                try:
                    await check(client)
                finally:
                    await client.stop(2.0)
                assert client.num_open == 0
                assert not is_running(client.pid)

        asyncio.run(main())


@pytest.fixture
def harness(fake_engine_command: list[str], byte_level_dir: Path) -> Harness:
    return Harness(fake_engine_command, byte_level_dir)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def collect(client: EngineClient, prompt: list[int], params: SamplingParams) -> list[TextDelta]:
    return [delta async for deltas in client.generate("r", prompt, params) for delta in deltas]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    for _ in range(int(seconds * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


def test_two_hundred_unicode_streams_at_once(harness: Harness) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices(PARTS, k=rng.randrange(1, 30))) for _ in range(200)]

    async def check(client: EngineClient) -> None:
        async def one(text: str) -> None:
            ids = await client.tokenizer.encode(text, add_special_tokens=False)
            deltas = await collect(client, ids, SamplingParams(max_tokens=None))
            assert "".join(delta.text for delta in deltas) == text == await client.tokenizer.decode(ids)
            assert [token_id for delta in deltas for token_id in delta.token_ids] == ids
            assert deltas[-1].num_output_tokens == len(ids)
            assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]

        await asyncio.gather(*(one(text) for text in texts))

    harness.run(check)


def test_stop_string_aborts_its_choice_in_the_engine(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        ids = await client.tokenizer.encode("one two END", add_special_tokens=False)
        deltas = await collect(client, ids, SamplingParams(n=2, max_tokens=50_000, stop=("END",)))
        for index in (0, 1):
            assert "".join(delta.text for delta in deltas if delta.choice_index == index) == "one two "
        assert [delta.stop_reason for delta in deltas if delta.finish_reason] == ["END", "END"]
        await until(lambda: client.stats().num_running == 0)
        assert client.stats().num_preemptions == 2, "one abort for each choice"

    harness.run(check)


@pytest.mark.parametrize("how", ["close", "cancel", "break"])
def test_leaving_early_aborts_in_the_engine(harness: Harness, how: str) -> None:
    async def leave(client: EngineClient) -> None:
        stream = client.generate("r", [50, 51], SamplingParams(n=4, max_tokens=50_000))
        async with contextlib.aclosing(stream):
            async for _ in stream:
                if how != "cancel":
                    break
        if how == "close":
            await stream.aclose()

    async def check(client: EngineClient) -> None:
        task = asyncio.create_task(leave(client))
        await until(lambda: client.stats().num_running == 1 or task.done())
        task.cancel() if how == "cancel" else await task
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert client.num_open == 0
        await until(lambda: client.stats().num_running == 0 and client.stats().num_preemptions == 1)

    harness.run(check, "slow:5")


def test_storm_of_requests_that_leave_at_once(harness: Harness) -> None:
    async def one(client: EngineClient, delay: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await collect(client, [50, 51, 52], SamplingParams(max_tokens=50_000))

    async def check(client: EngineClient) -> None:
        rng = random.Random(0)
        await asyncio.gather(*(one(client, rng.choice([0, 0.001, 0.2])) for _ in range(1000)))
        assert client.num_open == 0
        await until(lambda: client.stats().num_running == 0)
        assert client.alive
        assert len(await collect(client, [50], SamplingParams(max_tokens=2))) >= 1

    harness.run(check)


def test_unknown_and_duplicate_aborts_are_no_ops(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        for _ in range(10_000):
            client._connection.send(Abort("no such request"))
        assert len(await collect(client, [50], SamplingParams(max_tokens=2))) >= 1

    harness.run(check)


@pytest.mark.parametrize(("model", "kill"), [("slow:5", True), ("failing:500", False), ("garbage:500", False)])
def test_every_stream_learns_of_the_engines_death(
    harness: Harness, model: str, kill: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """F1, F4, F21: kill -9, an exception in a step, bytes that are no frame."""

    async def check(client: EngineClient) -> None:
        tasks = [
            asyncio.create_task(collect(client, [50, 51], SamplingParams(n=1 + i % 3, max_tokens=50_000)))
            for i in range(20)
        ]
        # An engine that fails by itself may have died before anybody looked at it.
        await until(lambda: client.stats().num_running == 20 or not client.alive)
        if kill:
            os.kill(client.pid, signal.SIGKILL)
        begin = time.monotonic()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert time.monotonic() - begin < 2.0
        assert not client.alive
        assert client.num_open == 0
        assert client.progress_age() == 0.0
        with pytest.raises(EngineDeadError):
            await collect(client, [50], SamplingParams())
        with pytest.raises(EngineDeadError):
            await client.reset_prefix_cache()
        await until(lambda: not is_running(client.pid))

    with caplog.at_level(logging.ERROR):
        harness.run(check, model)
    assert "The engine process has ended" in caplog.text


@pytest.mark.parametrize(
    ("model", "message", "exit_code"),
    [
        ("bad-model", "config.json is missing", 4),
        ("broken", "RuntimeError: first line", 1),
        ("vanishing", "exit code 9", 1),
    ],
)
def test_failed_start_is_one_error(harness: Harness, model: str, message: str, exit_code: int) -> None:
    with pytest.raises(EngineStartError, match=message) as caught:
        asyncio.run(harness.start(model))
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)


def test_start_without_tokenizer_or_program_leaves_nothing_behind(harness: Harness, tmp_path: Path) -> None:
    harness.directory = tmp_path
    with pytest.raises(EngineStartError, match=r"no tokenizer\.json") as caught:
        asyncio.run(harness.start("loading"))
    assert caught.value.exit_code == 4
    harness.command = [str(tmp_path / "no-such-program")]
    with pytest.raises(EngineStartError, match="cannot be started"):
        asyncio.run(harness.start("echo"))


def test_start_reports_progress_and_can_be_cancelled(harness: Harness) -> None:
    seen: list[LoadProgress] = []

    async def main() -> None:
        config = EngineConfig(model="loading")
        task = asyncio.create_task(EngineClient.start(config, harness.directory, seen.append, command=harness.command))
        await until(lambda: any(progress.done == 1000 for progress in seen))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen[0] == LoadProgress("weights", 0, 1000)


def test_what_can_never_run_is_refused_before_the_first_delta(harness: Harness) -> None:
    async def refused(client: EngineClient, prompt: list[int], params: SamplingParams) -> tuple[str, str]:
        with pytest.raises(RequestRejected) as caught:
            await collect(client, prompt, params)
        assert "\n" not in str(caught.value)
        return caught.value.code, caught.value.param

    async def check(client: EngineClient) -> None:
        params = SamplingParams()
        assert await refused(client, [13], params) == ("context_length_exceeded", "prompt")
        assert await refused(client, [5] * 64, params) == ("context_length_exceeded", "prompt")
        assert await refused(client, [], params) == ("empty_prompt", "prompt")
        assert await refused(client, [5, 1000], params) == ("invalid_token_id", "prompt")
        assert await refused(client, [-1], params) == ("invalid_token_id", "prompt")
        bad_stop = SamplingParams(stop_token_ids=(1000,))
        assert await refused(client, [5], bad_stop) == ("invalid_value", "stop_token_ids")
        assert client.num_open == 0
        assert len(await collect(client, [5] * 63, SamplingParams(max_tokens=2))) >= 1

    harness.run(check, max_model_len=64)


def test_slow_reader_gets_merged_deltas(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        prompt = await client.tokenizer.encode("日本語 and more " * 40, add_special_tokens=False)
        stream = client.generate("slow", prompt, SamplingParams(n=2, max_tokens=None))
        first = await anext(stream)
        await until(lambda: client.stats().num_running == 0)
        rest = [deltas async for deltas in stream]
        assert len(rest) == 1
        assert [delta.choice_index for delta in rest[0]] == [0, 1]
        for index in (0, 1):
            deltas = [delta for delta in [*first, *rest[0]] if delta.choice_index == index]
            assert "".join(delta.text for delta in deltas) == "日本語 and more " * 40
            assert [token_id for delta in deltas for token_id in delta.token_ids] == prompt
            assert (deltas[-1].finish_reason, deltas[-1].num_output_tokens) == ("length", len(prompt))

    harness.run(check)


def test_reader_that_takes_nothing_is_aborted(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_queue, "MAX_PENDING_BYTES", 100_000)

    async def check(client: EngineClient) -> None:
        stream = client.generate("stuck", [50, 51], SamplingParams(max_tokens=90_000))
        await anext(stream)
        others = await asyncio.gather(*(collect(client, [60, 61], SamplingParams(max_tokens=3000)) for _ in range(2)))
        assert [sum(len(delta.token_ids) for delta in deltas) for deltas in others] == [3000, 3000]
        await until(lambda: client.num_open == 0 and client.stats().num_running == 0)
        with pytest.raises(ReaderTooSlowError):
            await anext(stream)

    harness.run(check, "echo:10")


def test_queue_is_bounded_whatever_comes() -> None:
    queue = DeltaQueue()
    num_puts = 0
    while queue.put([TextDelta(i, "é" * 10, [1]) for i in range(3)]):
        num_puts += 1
        assert len(queue._pending) < 2 * delta_queue._MERGE_LENGTH
    assert num_puts == delta_queue.MAX_PENDING_BYTES // (3 * 28)
    deltas = [
        TextDelta(0, "a", [1]),
        TextDelta(1, "x", [7], "stop", "s", 3, 1),
        TextDelta(0, "b", [2], None, None, 3, 2),
    ]
    assert merge(deltas) == [TextDelta(0, "ab", [1, 2], None, None, 3, 2), deltas[1]]
    assert deltas[0] == TextDelta(0, "a", [1])


def test_merged_deltas_keep_their_log_probabilities() -> None:
    one, two = TokenLogProbs(1, -1.0, [], []), TokenLogProbs(2, -2.0, [5], [-0.5])
    parts = [
        TextDelta(0, "a", [1], log_probs=[one], text_offsets=[0], prompt_log_probs=[two]),
        TextDelta(0, "", [], log_probs=[], text_offsets=[]),
        TextDelta(0, "b", [2], "length", log_probs=[two], text_offsets=[1], cumulative_log_prob=-3.0),
    ]
    (whole,) = merge(parts)
    assert whole == TextDelta(
        *(0, "ab", [1, 2], "length"),
        log_probs=[one, two],
        text_offsets=[0, 1],
        prompt_log_probs=[two],
        cumulative_log_prob=-3.0,
    )
    assert merge([TextDelta(0, "a", [1]), TextDelta(0, "b", [2])])[0].log_probs is None


def test_one_step_may_bring_much_to_a_reader_that_keeps_up() -> None:
    async def main() -> None:
        queue = DeltaQueue()
        much = TextDelta(0, "x" * (2 * delta_queue.MAX_PENDING_BYTES), [1], log_probs=[], text_offsets=[])
        position = TokenLogProbs(1, -1.0, [1] * 20, [-1.0] * 20)
        assert queue.put([]), "it has begun"
        assert await queue.get() == []
        for _ in range(2):
            assert queue.put([much])
            assert await queue.get() == [much]
        many = TextDelta(0, "", [1] * 2000, log_probs=[position] * 2000, text_offsets=[0] * 2000)
        assert queue.put([many])
        assert not queue.put([TextDelta(0, "y", [1])]), "log-probabilities count"

    asyncio.run(main())


def test_choices_are_ranked_and_prompts_are_scored_across_the_socketpair(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        ids = await client.tokenizer.encode("one two", add_special_tokens=False)
        steps = [step async for step in client.generate("r", ids, SamplingParams(n=2, best_of=4, max_tokens=3))]
        # The empty step that tells of the beginning joins the next one if nobody took it in time.
        (best,) = (step for step in steps if step)
        assert len(steps) <= 2
        assert [(delta.choice_index, delta.log_probs, delta.num_discarded_tokens) for delta in best] == [
            (0, None, 6),
            (1, None, 0),
        ]
        assert best[0].cumulative_log_prob == sum(-0.5 - token_id / 1024 for token_id in ids[:3])
        assert best[0].started_at is not None
        params = SamplingParams(max_tokens=0, prompt_logprobs=2)
        (scored,) = await collect(client, [5] * 64, params)
        assert (scored.finish_reason, scored.token_ids, len(scored.prompt_log_probs or [])) == ("length", [], 63)
        with pytest.raises(RequestRejected, match="at least 65 tokens"):
            await collect(client, [5] * 65, params)
        beams = await collect(client, ids, SamplingParams(n=2, use_beam_search=True, max_tokens=2, logprobs=1))
        assert [d.cumulative_log_prob for d in beams if d.finish_reason] == [-1.0, -2.0]
        assert all(len(delta.log_probs or []) == len(delta.token_ids) for delta in beams)

    harness.run(check, max_model_len=64)


def test_stop_string_in_every_beam_ends_the_search(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        ids = await client.tokenizer.encode("one two END", add_special_tokens=False)
        params = SamplingParams(n=2, use_beam_search=True, max_tokens=50_000, stop=("END",))
        deltas = await collect(client, ids, params)
        assert [delta.stop_reason for delta in deltas if delta.finish_reason] == ["END", "END"]
        await until(lambda: client.stats().num_running == 0)
        assert client.stats().num_preemptions == 1, "one abort for the whole search"

    harness.run(check)


def test_stop_ends_open_streams_and_may_be_repeated(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        task = asyncio.create_task(collect(client, [50], SamplingParams(max_tokens=50_000)))
        await until(lambda: client.stats().num_running == 1)
        await asyncio.gather(client.stop(2.0), client.stop(2.0))
        with pytest.raises(EngineDeadError, match="stopped"):
            await task
        assert client._process.how_it_ended == "exit code 0"

    harness.run(check, "slow:1")


def test_engine_that_does_not_leave_is_killed_and_its_age_shows(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        assert client.progress_age() == 0.0
        task = asyncio.create_task(collect(client, [50], SamplingParams()))
        await until(lambda: client.progress_age() > 0.3)
        assert client.alive
        begin = time.monotonic()
        await client.stop(0.3)
        assert time.monotonic() - begin < 1.5
        assert client._process.how_it_ended == "signal SIGKILL"
        with pytest.raises(EngineDeadError):
            await task

    harness.run(check, "hanging")


def test_seeds_are_given_and_caller_ids_may_collide(harness: Harness) -> None:
    async def check(client: EngineClient) -> None:
        params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=3, seed=-1), SamplingParams(seed=2**64 - 1)]
        results = await asyncio.gather(*(collect(client, [50, 51, 52], p) for p in params))
        assert [sum(len(delta.token_ids) for delta in deltas) for deltas in results] == [3, 3, 16]
        await client.reset_prefix_cache()
        await until(lambda: client.stats().num_steps == 0)

    harness.run(check)


def test_runs_on_uvloop(harness: Harness) -> None:
    async def main() -> None:
        client = await harness.start("slow:5")
        tasks = [asyncio.create_task(collect(client, [50], SamplingParams(max_tokens=n))) for n in (3, 50_000)]
        assert sum(len(delta.token_ids) for delta in await tasks[0]) == 3
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await tasks[1]
        await client.stop(1.0)

    uvloop.run(main())


def test_engine_command_ignores_the_working_directory(tmp_path: Path) -> None:
    for name in ("argparse", "msgspec", "quire", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)")
    command = [*ENGINE_COMMAND, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--fd" in done.stdout


def test_no_orphan_when_the_front_process_is_killed(harness: Harness) -> None:
    """F22, with the real client in a process of its own."""
    code = (
        "import asyncio, sys\n"
        "from quire.config import EngineConfig\n"
        "from quire.engine.client import EngineClient\n"
        "async def main():\n"
        "    client = await EngineClient.start(EngineConfig(model='echo'), sys.argv[1], command=sys.argv[2:])\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    front = subprocess.Popen(
        [sys.executable, "-c", code, str(harness.directory), *harness.command], stdout=subprocess.PIPE, text=True
    )
    with front:
        assert front.stdout is not None
        assert is_running(int(front.stdout.readline()))
        front.kill()
        begin = time.monotonic()
        assert front.stdout.read() == "", "the pipe ends once both processes, which share it, have ended"
        assert time.monotonic() - begin < 2.0


class RecordingSink:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.willing = True
        self.reader_waits = True

    def take(self, deltas: list[TextDelta]) -> bool:
        if self.willing:
            self.texts += [delta.text for delta in deltas]
        return self.willing

    def take_text(self, text: str, token_id: int, num_output_tokens: int, now: float) -> bool:
        raise AssertionError("queues take deltas")


class BrokenSink(RecordingSink):
    def take(self, deltas: list[TextDelta]) -> bool:
        raise RuntimeError("broken")


def test_sink_takes_steps_only_while_the_reader_waits_with_nothing_left() -> None:
    async def check() -> None:
        sink = RecordingSink()
        queue = DeltaQueue(sink)
        assert not sink.reader_waits
        queue.put([TextDelta(0, "a", [1])])  # nobody waits yet
        assert sink.texts == []
        assert await queue.get() == [TextDelta(0, "a", [1])]
        assert not sink.reader_waits
        reader = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        assert sink.reader_waits
        queue.put([TextDelta(0, "b", [2])])
        assert sink.texts == ["b"]
        sink.willing = False
        queue.put([TextDelta(0, "c", [3])])
        sink.willing = True
        assert not sink.reader_waits, "what came now would overtake what the reader has not taken yet"
        queue.put([TextDelta(0, "d", [4])])
        assert sink.texts == ["b"]
        assert await reader == [TextDelta(0, "cd", [3, 4])]

    asyncio.run(check())


@pytest.mark.parametrize("end", [DeltaQueue.close, lambda queue: queue.fail(RuntimeError("over"))])
def test_nothing_is_offered_to_the_sink_behind_the_end(end: Any) -> None:
    async def check() -> None:
        sink = RecordingSink()
        queue = DeltaQueue(sink)
        reader = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        assert sink.reader_waits
        end(queue)
        assert not sink.reader_waits
        await asyncio.gather(reader, return_exceptions=True)

    asyncio.run(check())


def test_sink_is_not_told_of_a_reader_that_left() -> None:
    async def check() -> None:
        sink = RecordingSink()
        reader = asyncio.create_task(DeltaQueue(sink).get())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert not sink.reader_waits

    asyncio.run(check())


def test_reader_gets_what_a_sink_raises() -> None:
    async def check() -> None:
        queue = DeltaQueue(BrokenSink())
        reader = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        assert queue.put([TextDelta(0, "a", [1])])
        with pytest.raises(RuntimeError, match="broken"):
            await reader

    asyncio.run(check())
