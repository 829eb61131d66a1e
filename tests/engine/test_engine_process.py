"""The engine process, seen from its socket: its start, its loop, and every way in which it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.engine.messages import (
    Abort,
    Add,
    Configure,
    LoadProgress,
    Ready,
    Rejected,
    ResetPrefixCache,
    Shutdown,
    StartFailed,
    StepResult,
    ToFront,
)
from quire.engine.process import in_frames
from quire.engine.wire import MAX_FRAME_BYTES, FrameDecoder, pack
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, SchedulerStats, StepOutput, StepOutputs, TokenLogProbs


class Front:
    """A front process with no asyncio in it."""

    def __init__(self, command: list[str], model: str) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        with theirs:
            self.process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stderr=subprocess.PIPE,
                text=True,
            )
        self._decoder: FrameDecoder[ToFront] = FrameDecoder(ToFront)
        self._received: list[ToFront] = []
        self.send(Configure(EngineConfig(model=model)))

    def send(self, *messages: Any) -> None:
        self.socket.sendall(b"".join(pack(message) for message in messages))

    def receive(self) -> ToFront | None:
        """The next message; None at the end of the stream."""
        while not self._received:
            data = self.socket.recv(1 << 20)
            if not data:
                return None
            self._received = self._decoder.feed(data)
        return self._received.pop(0)

    def until_ready(self) -> Front:
        while not isinstance(message := self.receive(), Ready):
            assert isinstance(message, LoadProgress)
        return self

    def wait(self, seconds: float = 10.0) -> tuple[int, str]:
        """Exit code and standard error."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


@pytest.fixture
def start(fake_engine_command: list[str]) -> Iterator[Callable[[str], Front]]:
    fronts: list[Front] = []

    def start_one(model: str) -> Front:
        fronts.append(Front(fake_engine_command, model))
        return fronts[-1]

    yield start_one
    for front in fronts:
        front.socket.close()
        with contextlib.suppress(ProcessLookupError):
            front.process.kill()
        front.process.communicate()


Start = Callable[[str], Front]


def add(request_id: str, length: int = 3, **params: Any) -> Add:
    return Add(request_id, list(range(20, 20 + length)), SamplingParams(max_tokens=None, **params), seed=1)


def test_start_reports_progress_then_readiness(start: Start) -> None:
    front = start("echo")
    messages = []
    while not isinstance(message := front.receive(), Ready):
        messages.append(message)
    assert all(isinstance(m, LoadProgress) and m.total == 1000 for m in messages)
    assert messages[0] == LoadProgress("weights", 0, 1000)
    assert messages[-1] == LoadProgress("weights", 1000, 1000)
    assert len(messages) < 100, "a thousand reports within a moment are thinned out"
    assert message.info.architecture == "Fake"


def test_each_step_is_one_message(start: Start) -> None:
    front = start("echo").until_ready()
    front.send(add("r", n=2), Abort("r", 1), add("s"))
    steps = [front.receive() for _ in range(3)]
    assert all(isinstance(step, StepResult) for step in steps)
    outputs = [[(o.request_id, o.choice_index, o.token_ids) for o in step.outputs] for step in steps]  # type: ignore[union-attr]
    assert outputs == [[("r", 0, [20 + i]), ("s", 0, [20 + i])] for i in range(3)]
    last = steps[-1]
    assert isinstance(last, StepResult)
    assert [o.finish_reason for o in last.outputs] == [FinishReason.LENGTH] * 2
    assert (last.stats.num_steps, last.stats.num_running) == (3, 0)
    front.send(ResetPrefixCache())
    reset = front.receive()
    assert isinstance(reset, StepResult)
    assert (len(reset.outputs), reset.stats.num_steps) == (0, 0)
    front.send(Shutdown())
    assert front.receive() is None
    assert front.wait() == (0, "")


def test_refused_request_leaves_the_others_alone(start: Start) -> None:
    front = start("echo").until_ready()
    front.send(Add("no", [13], SamplingParams(), seed=1), add("yes", 1))
    assert front.receive() == Rejected("no", "It can never fit.", "context_length_exceeded", "prompt")
    step = front.receive()
    assert isinstance(step, StepResult)
    assert [o.request_id for o in step.outputs] == ["yes"]


def test_abort_storm(start: Start) -> None:
    """F10: 10,000 aborts, half of them unknown, each sent twice, while a stream runs."""
    front = start("slow:2").until_ready()
    front.send(add("kept", 300), *(add(str(i)) for i in range(2500)))
    ids = [str(i) for i in range(5000)]
    front.send(*(Abort(i) for i in ids), *(Abort(i) for i in reversed(ids)))
    tokens: list[int] = []
    while len(tokens) < 300:
        step = front.receive()
        assert isinstance(step, StepResult)
        tokens += [t for o in step.outputs if o.request_id == "kept" for t in o.token_ids]
    assert tokens == list(range(20, 320))
    assert (step.stats.num_preemptions, step.stats.num_running) == (10_000, 0)


def test_bad_model_ends_with_its_message_and_code_4(start: Start) -> None:
    front = start("bad-model")
    while isinstance(message := front.receive(), LoadProgress):
        pass
    assert message == StartFailed("config.json is missing. Give a checkpoint directory.", 4)
    assert front.receive() is None
    assert front.wait() == (4, "")


def test_broken_start_ends_with_one_line_and_a_traceback(start: Start) -> None:
    front = start("broken")
    while isinstance(message := front.receive(), LoadProgress):
        pass
    assert message == StartFailed("The engine could not be built: RuntimeError: first line", 1)
    code, errors = front.wait()
    assert code == 1
    assert "Traceback" in errors
    assert "second line" in errors


def test_failing_step_ends_the_process_with_a_traceback(start: Start) -> None:
    front = start("failing:2").until_ready()
    front.send(add("r"))
    assert isinstance(front.receive(), StepResult)
    assert front.receive() is None
    code, errors = front.wait()
    assert code == 1
    assert "the step failed" in errors


@pytest.mark.parametrize("frame", [b"\xff\xff\xff\xff", b"\0\0\0\x01\xc1", bytes(pack(Shutdown()))[:-1]])
def test_bad_frame_ends_the_process(start: Start, frame: bytes) -> None:
    front = start("echo").until_ready()
    front.socket.sendall(frame)
    front.socket.shutdown(socket.SHUT_WR)
    code, errors = front.wait(5)
    assert code == 1
    assert "WireError" in errors


def test_configuration_comes_first_and_once(start: Start) -> None:
    front = start("echo").until_ready()
    front.send(Configure(EngineConfig(model="echo")))
    code, errors = front.wait()
    assert code == 1
    assert "Configure came twice" in errors


@pytest.mark.parametrize("model", ["echo", "hanging", "loading"])
def test_no_orphan_when_the_front_dies(start: Start, model: str) -> None:
    """F22: idle, in the middle of a step, and while the weights load."""
    front = start(model)
    if model != "loading":
        front.until_ready()
    if model == "hanging":
        front.send(add("r"))
    time.sleep(0.3)
    assert front.process.poll() is None
    begin = time.monotonic()
    front.socket.close()
    assert front.wait(2.0)[0] == 0
    assert time.monotonic() - begin < 2.0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc whether the process sleeps")
def test_idle_process_sleeps(start: Start) -> None:
    front = start("echo").until_ready()
    front.send(add("r", 1))
    assert isinstance(front.receive(), StepResult)
    stat = Path(f"/proc/{front.process.pid}/stat")
    states = []
    for _ in range(30):
        time.sleep(0.02)
        states.append(stat.read_text().rpartition(")")[2].split()[0])
    assert states.count("S") > 20, f"a loop that spins is running or runnable: {states}"


def test_signals(start: Start) -> None:
    front = start("echo").until_ready()
    front.process.send_signal(signal.SIGINT)
    front.send(add("r", 1))
    assert isinstance(front.receive(), StepResult)
    front.process.send_signal(signal.SIGTERM)
    assert front.wait()[0] == -signal.SIGTERM


def test_module_is_a_program() -> None:
    command = [sys.executable, "-m", "quire.engine.process"]
    assert subprocess.run([*command, "--help"], capture_output=True, check=False).returncode == 0
    for arguments, reason in (
        ([], "--fd"),
        (["--fd", "99"], "not an open socket"),
        (["--fd", "1"], "not an open socket"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert reason in done.stderr


@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_scored_prompts_that_end_together_are_cut_into_frames(num_top: int) -> None:
    entry = TokenLogProbs(2**31 - 1, -1234.5678, [2**31 - 1] * num_top, [-1234.5678] * num_top)
    scored = [StepOutput(str(index), 0, [], prompt_log_probs=[entry] * (2**16 // (1 + num_top))) for index in range(40)]
    tokens = [(str(index), 1, 8, 0) for index in range(100)]
    plain = [StepOutput(str(index), 0, [7]) for index in range(100)]
    outputs = StepOutputs(tokens, plain + scored + plain)
    parts = list(in_frames(outputs))
    assert [output for part in parts for output in part] == list(outputs)
    assert len(parts) > 1
    for part in parts:
        assert len(pack(StepResult(outputs=part, stats=SchedulerStats()))) < MAX_FRAME_BYTES // 3
    assert list(in_frames(StepOutputs(tokens, plain))) == [StepOutputs(tokens, plain)]
    assert list(in_frames(StepOutputs())) == [StepOutputs()]
