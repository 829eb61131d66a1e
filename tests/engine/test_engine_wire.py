"""Frames: whole messages out of any cutting of the stream, and a WireError, nothing else, out of anything else."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config import EngineConfig
from quire.engine import wire
from quire.engine.messages import (
    Abort,
    Add,
    Configure,
    LoadProgress,
    Rejected,
    ResetPrefixCache,
    Shutdown,
    StartFailed,
    StepResult,
    ToEngine,
    ToFront,
)
from quire.engine.wire import ConnectionClosedError, EngineChannel, FrameDecoder, WireError, pack
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, SchedulerStats, StepOutput, StepOutputs

TO_ENGINE: list[Any] = [
    Configure(EngineConfig(model="m", max_model_len=9)),
    Add("r", [1, 2, 70000], SamplingParams(stop=("日本", "\U0001f44d"), seed=-5, stop_token_ids=(7,)), seed=2**64 - 1),
    Abort("r"),
    Abort("r", 3),
    ResetPrefixCache(),
    Shutdown(),
]
TO_FRONT: list[Any] = [
    LoadProgress("weights", 3, 10),
    StartFailed("no", 4),
    Rejected("r", "too long", "context_length_exceeded", "prompt"),
    StepResult(
        StepOutputs([("t", 0, 9, 2)], [StepOutput("r", 0, [5, 6], FinishReason.STOP, 6, 3), StepOutput("s", 1, [])]),
        SchedulerStats(1, 2),
    ),
]


@given(st.lists(st.sampled_from(TO_ENGINE), max_size=8), st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_messages_survive_any_cutting(messages: list[Any], cuts: list[int]) -> None:
    stream = b"".join(pack(message) for message in messages)
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    received: list[ToEngine] = []
    while stream:
        for cut in cuts:
            received += decoder.feed(stream[:cut])
            stream = stream[cut:]
    decoder.end()
    assert received == messages


def test_what_the_engine_says_comes_back_equal() -> None:
    decoder: FrameDecoder[ToFront] = FrameDecoder(ToFront)
    received = decoder.feed(b"".join(pack(message) for message in TO_FRONT))
    assert received == TO_FRONT
    assert isinstance(received[3], StepResult)
    assert received[3].outputs.others[0].finish_reason is FinishReason.STOP


def test_oversized_frame_is_refused_by_its_length_alone() -> None:
    with pytest.raises(WireError, match="announces"):
        FrameDecoder(ToEngine).feed(struct.pack(">I", wire.MAX_FRAME_BYTES + 1))
    assert FrameDecoder(ToEngine).feed(struct.pack(">I", wire.MAX_FRAME_BYTES)) == []


def test_oversized_or_unencodable_message_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WireError, match="cannot be encoded"):
        pack(Abort("\ud800"))
    with pytest.raises(WireError, match="cannot be encoded"):
        pack(Abort("r", 2**64))
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(WireError, match="at most 100"):
        pack(Abort("r" * 200))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 20])
def test_truncated_stream_is_an_error(length: int) -> None:
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    decoder.feed(bytes(pack(TO_ENGINE[1])[:length]))
    with pytest.raises(WireError, match="inside a frame"):
        decoder.end()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\x81\xa4type\xa5Abort",
        b"\x82\xa4type\xa5Abort\xaarequest_id\x05",
        b"\x82\xa4type\xa5Abort\xaarequest_id\xa1\xff",
        b"\x81\xa4type\xa5Xyzzy",
        bytes(pack(TO_FRONT[0])[4:]),
        bytes(pack(TO_ENGINE[2])[4:]) + b"\xc0",
        bytes(pack(TO_ENGINE[1])[4:]).replace(b"\xa1n\x01", b"\xa1n\x00"),
    ],
    ids=["empty", "reserved", "nested", "no id", "wrong type", "no utf-8", "no tag", "other way", "tail", "n=0"],
)
def test_frame_without_a_declared_message_is_an_error(payload: bytes) -> None:
    with pytest.raises(WireError, match="declared messages"):
        FrameDecoder(ToEngine).feed(struct.pack(">I", len(payload)) + payload)


@settings(max_examples=300)
@given(st.data())
def test_fuzzed_frames_are_messages_or_wire_errors(data: st.DataObject) -> None:
    frame = pack(data.draw(st.sampled_from(TO_ENGINE)))
    for _ in range(data.draw(st.integers(1, 6))):
        index = data.draw(st.integers(0, len(frame) - 1))
        frame[index] = data.draw(st.integers(0, 255))
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    with contextlib.suppress(WireError):
        decoder.feed(bytes(frame))
        decoder.end()


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_noise_is_a_wire_error_or_nothing(noise: bytes) -> None:
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    with contextlib.suppress(WireError):
        assert decoder.feed(noise) == []


@pytest.fixture
def ends() -> Iterator[tuple[EngineChannel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = EngineChannel(theirs)
    with ours:
        yield channel, ours
    channel.close(0)


def test_engine_drains_all_that_is_pending(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, front = ends
    assert channel.receive(wait=False) == []
    front.sendall(b"".join(pack(message) for message in TO_ENGINE) + pack(Abort("half"))[:6])
    assert channel.receive(wait=False) == TO_ENGINE
    front.sendall(pack(Abort("half"))[6:])
    assert channel.receive(wait=True) == [Abort("half")]


def test_idle_engine_sleeps_until_a_message_comes(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, front = ends
    timer = threading.Timer(0.2, front.sendall, [pack(Shutdown())])
    timer.start()
    cpu = time.thread_time()
    assert channel.receive(wait=True) == [Shutdown()]
    assert time.thread_time() - cpu < 0.05
    timer.join()


def test_end_of_stream_comes_after_the_last_message(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, front = ends
    front.sendall(pack(Abort("last")))
    front.close()
    assert channel.receive(wait=True) == [Abort("last")]
    with pytest.raises(ConnectionClosedError):
        channel.receive(wait=False)


def test_end_of_stream_inside_a_frame_is_no_clean_end(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, front = ends
    front.sendall(pack(Abort("last"))[:-1])
    front.close()
    with pytest.raises(WireError) as caught:
        channel.receive(wait=True)
    assert not isinstance(caught.value, ConnectionClosedError)


def test_flood_does_not_keep_the_engine_from_stepping(
    ends: tuple[EngineChannel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_DRAIN_BYTES", 1)
    channel, front = ends
    monkeypatch.setattr(wire, "_READ_BYTES", len(pack(Abort("a"))))
    front.sendall(pack(Abort("a")) + pack(Abort("b")))
    assert channel.receive(wait=False) == [Abort("a")]
    assert channel.receive(wait=False) == [Abort("b")]


def test_engine_waits_for_a_slow_front_only_past_the_bound(
    ends: tuple[EngineChannel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 2_000_000)
    channel, front = ends
    message = StartFailed("x" * 100_000, 1)
    for _ in range(15):
        channel.send(message)
    received: list[Any] = []
    sender = threading.Thread(target=lambda: [channel.send(message) for _ in range(45)])
    sender.start()
    sender.join(0.2)
    assert sender.is_alive(), "60 messages of 100 kB fit neither the bound nor the socket's buffer"
    decoder: FrameDecoder[ToFront] = FrameDecoder(ToFront)
    while len(received) < 41:  # the others fit the bound
        received += decoder.feed(front.recv(50_000))
    sender.join(10)
    assert not sender.is_alive()
    flusher = threading.Thread(target=channel.close, args=(5.0,))
    flusher.start()
    while len(received) < 60:
        received += decoder.feed(front.recv(1 << 20))
    assert received == [message] * 60
    flusher.join()


def test_engine_that_waits_for_a_slow_front_learns_of_its_death(
    ends: tuple[EngineChannel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 1000)
    channel, front = ends
    timer = threading.Timer(0.2, front.close)
    timer.start()
    with pytest.raises(ConnectionClosedError):
        channel.send(StartFailed("x" * 5_000_000, 1))
    timer.join()
