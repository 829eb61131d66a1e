"""The thin HTTP front around OpenVINO's engine, with an engine of our own in its place: what comes is what it said."""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openvino_server
import pytest
from measuring.http_client import Target, model_name, run_load
from measuring.loads import LoadRequest
from measuring.stub_modules import add_module

from quire.tales import MODEL_DIR


class Handle:
    def __init__(self, num_left: int) -> None:
        self.num_left = num_left
        self.unread: list[int] = []

    def can_read(self) -> bool:
        return bool(self.unread)

    def read(self) -> dict[int, Any]:
        return {0: SimpleNamespace(generated_ids=[self.unread.pop(0)])}


class Pipeline:
    """Brings one token to each request a step, and two to every third."""

    def __init__(self, *arguments: Any) -> None:
        self.handles: list[Handle] = []

    def add_request(self, key: int, token_ids: Any, config: Any) -> Handle:
        assert config.ignore_eos
        assert not config.do_sample
        self.handles.append(Handle(config.max_new_tokens))
        return self.handles[-1]

    def step(self) -> None:
        for place, handle in enumerate(self.handles):
            num_tokens = min(handle.num_left, 2 if place % 3 == 0 else 1)
            handle.unread += range(100, 100 + num_tokens)
            handle.num_left -= num_tokens


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server that runs: front and engine are threads here."""
    for name in ("openvino", "openvino_genai"):
        monkeypatch.setitem(sys.modules, name, None)
    add_module(MODEL_DIR, "openvino", Tensor=lambda array: array)
    add_module(
        MODEL_DIR,
        "openvino_genai",
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        ContinuousBatchingPipeline=Pipeline,
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    arguments = argparse.Namespace(
        converted="", model=MODEL_DIR, port=number, threads=1, cache_gib=1, max_batched_tokens=64, precision="bf16"
    )
    front_side, engine_side = socket.socketpair()
    engine = threading.Thread(target=openvino_server.run_engine, args=(arguments, engine_side))
    engine.start()
    loop = asyncio.new_event_loop()
    serving = loop.create_task(openvino_server.run_front(arguments, front_side))

    def run_loop() -> None:
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(serving)

    front = threading.Thread(target=run_loop)
    front.start()
    while model_name(number) is None:
        assert front.is_alive()
    yield number
    loop.call_soon_threadsafe(serving.cancel)
    front.join(20.0)
    front_side.close()
    engine.join(20.0)
    engine_side.close()
    assert not front.is_alive()
    assert not engine.is_alive()
    loop.close()


def test_every_token_arrives_once_and_with_its_request(port: int) -> None:
    assert model_name(port) == MODEL_DIR.name
    requests = [LoadRequest([5, 6, 7], num_tokens) for num_tokens in (1, 2, 7, 30, 3)]
    records, _ = run_load(Target(port, MODEL_DIR.name, timeout=20.0), requests, 3)
    for record, request in zip(records, requests, strict=True):
        assert record.error is None
        assert record.num_output_tokens == request.num_output_tokens
        assert request.num_output_tokens / 2 <= len(record.pieces) <= request.num_output_tokens
