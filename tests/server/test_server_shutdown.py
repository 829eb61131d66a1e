"""From the first signal to the exit code."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.config import ConfigError, ExitCode
from quire.engine.grammar.compiler import GrammarCompiler
from quire.server.serve import Signals, _serve_until_drained, bind
from quire.server.settings import Limits, ServerSettings
from quire.tales import MODEL_DIR


class Served:
    """What `quire serve` does after the engine is loaded, in a thread, with signals by hand."""

    def __init__(self, client: Any, **settings: Any) -> None:
        self.client = client
        self.settings = ServerSettings(served_model_names=("fake",), port=0, **settings)
        self._listener = bind("127.0.0.1", 0, Limits())
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.exit_code: ExitCode | None = None
        self.seconds = 0.0
        self._signals: Signals
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=20)
        deadline = time.monotonic() + 5
        while True:
            try:
                assert self.http.get("/health").status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._signals = Signals(asyncio.Event(), asyncio.Event())
        compiler = GrammarCompiler(MODEL_DIR, 4096, [0], command=("false",))  # nobody here sends a grammar
        try:
            self.exit_code = await _serve_until_drained(
                self.client, compiler, self.settings, self._listener, self._signals
            )
        finally:
            await compiler.close()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._loop.call_soon_threadsafe(self._signals.receive, number)
        time.sleep(0.05)

    def wait(self, seconds: float = 10.0) -> ExitCode | None:
        begin = time.monotonic()
        self._thread.join(seconds)
        self.seconds = time.monotonic() - begin
        assert not self._thread.is_alive()
        return self.exit_code

    def start(self, **body: Any) -> Pending:
        return Pending(self, {"prompt": "hello", "max_tokens": 10, **body})


class Pending:
    """A request under way in a thread of its own."""

    def __init__(self, served: Served, body: dict[str, Any]) -> None:
        self.response: httpx.Response | None = None
        self._thread = threading.Thread(target=lambda: self._run(served.url, body))
        self._thread.start()

    def _run(self, url: str, body: dict[str, Any]) -> None:
        self.response = httpx.post(f"{url}/v1/completions", json=body, timeout=20)

    def wait(self) -> httpx.Response:
        self._thread.join(20)
        assert self.response is not None
        return self.response


@pytest.fixture
def served(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    made: list[Served] = []

    def start(client: Any = None, **settings: Any) -> Served:
        made.append(Served(client or fake_client(), **settings))
        return made[-1]

    yield start
    for each in made:
        each.http.close()
        each.client.hold = False
        if each._thread.is_alive():
            each.signal()
            each.signal()
            each.wait()


def last_error(response: httpx.Response) -> str:
    assert response.text.endswith("data: [DONE]\n\n")
    code: str = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"]
    return code


def test_idle_server_leaves_after_the_grace(served: Any) -> None:
    server = served(drain_grace=1.0)
    server.signal()
    assert server.http.get("/health/ready").json()["reason"] == "draining"
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/health/live").status_code == 200
    refused = server.http.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["connection"] == "close"
    assert refused.headers["retry-after"] == "5"
    assert server.wait() is ExitCode.CLEAN
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_interrupt_from_the_keyboard_needs_no_grace(served: Any) -> None:
    server = served(drain_grace=30.0)
    server.signal(signal.SIGINT)
    assert server.wait() is ExitCode.CLEAN
    assert server.seconds < 2


@pytest.mark.parametrize("stream", [True, False])
def test_running_requests_finish(served: Any, fake_client: Any, eventually: Any, stream: bool) -> None:
    server = served(fake_client(step_delay=0.08), drain_grace=0.1)
    pending = server.start(stream=stream)
    eventually(lambda: server.client.num_steps >= 1)
    server.signal()
    response = pending.wait()
    assert response.status_code == 200
    assert "error" not in response.text
    assert server.wait() is ExitCode.CLEAN


def test_port_closes_after_the_grace_while_requests_run(served: Any, fake_client: Any, eventually: Any) -> None:
    server = served(fake_client(step_delay=0.15), drain_grace=0.5)
    pending = server.start()
    eventually(lambda: server.client.num_steps >= 1)
    server.signal()
    assert httpx.get(f"{server.url}/health/ready").status_code == 503
    time.sleep(0.7)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health/ready")
    assert pending.wait().status_code == 200
    assert server.wait() is ExitCode.CLEAN


@pytest.mark.parametrize("stream", [True, False])
def test_queued_requests_are_sent_elsewhere_at_once(
    served: Any, fake_client: Any, eventually: Any, stream: bool
) -> None:
    server = served(fake_client(hold=True), drain_grace=0.2)
    pending = server.start(stream=stream)
    eventually(lambda: server.client.num_open == 1)
    server.signal()
    response = pending.wait()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert server.client.num_aborted == 1
    assert server.wait() is ExitCode.CLEAN


def test_requests_past_the_deadline_are_cut_and_told(served: Any, fake_client: Any, eventually: Any) -> None:
    server = served(fake_client(step_delay=0.05), drain_grace=0.1, shutdown_timeout=0.5)
    stream, whole = server.start(stream=True, max_tokens=200), server.start(max_tokens=200)
    eventually(lambda: server.client.num_open == 2 and server.client.num_steps >= 8)
    server.signal()
    assert last_error(stream.wait()) == "server_shutdown"
    answer = whole.wait()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_shutdown")
    assert server.wait() is ExitCode.DRAIN_DEADLINE
    assert server.client.num_open == 0


def test_second_signal_cuts_at_once(served: Any, fake_client: Any, eventually: Any) -> None:
    server = served(fake_client(step_delay=0.05), drain_grace=30.0)
    pending = server.start(stream=True, max_tokens=200)
    eventually(lambda: server.client.num_steps >= 1)
    server.signal()
    server.signal()
    assert server.wait() is ExitCode.DRAIN_DEADLINE
    assert server.seconds < 2
    assert last_error(pending.wait()) == "server_shutdown"


def test_lost_engine_is_shown_and_ends_the_server(served: Any, fake_client: Any, eventually: Any) -> None:
    from quire.engine.client import EngineDeadError

    server = served(fake_client(step_delay=0.05), drain_grace=1.5)
    pending = server.start(stream=True, max_tokens=200)
    eventually(lambda: server.client.num_steps >= 1)
    server.client.error = EngineDeadError("gone")
    server.client.alive = False
    assert last_error(pending.wait()) == "engine_unavailable"
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/health/ready").json()["reason"] == "engine_unavailable"
    assert server.wait() is ExitCode.ENGINE_LOST


def test_port_that_is_taken_is_one_line() -> None:
    listener = bind("127.0.0.1", 0, Limits())
    listener.listen()
    try:
        with pytest.raises(ConfigError, match=r"^Cannot bind 127\.0\.0\.1:\d+: .*\. Choose another"):
            bind("127.0.0.1", listener.getsockname()[1], Limits())
    finally:
        listener.close()
    with pytest.raises(ConfigError, match="is not an address"):
        bind("no.such.host.invalid", 8000, Limits())


def test_ready_line_can_be_pasted(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = served()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights 0 B"
    assert lines[1] == f"Ready: fake at {server.url}"
    assert lines[2].startswith(f"Try:   curl {server.url}/v1/completions -H 'Content-Type: application/json' -d '{{")
    assert re.fullmatch(
        r"Start: \d+\.\d\d s from process start to ready; memory at rest \d+ MiB \(front \d+, engine \d+\)", lines[3]
    )
