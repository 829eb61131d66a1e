"""A fake engine client, and the real HTTP front around it on a loopback socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from quire.engine.best_of import engine_params
from quire.engine.delta_queue import Sink
from quire.engine.grammar.compiler import GrammarCompiler
from quire.engine.messages import EngineInfo
from quire.engine.output_processor import OutputProcessor
from quire.engine.text_delta import TextDelta
from quire.engine.tokenizer import with_bad_word_ids
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, SchedulerStats, StepOutput, TokenLogProbs
from quire.server.app import create_app
from quire.server.cli import _loop_factory
from quire.server.guard import Guard
from quire.server.http_server import HttpServer
from quire.server.protocol import ServerConfig
from quire.server.serve import bind
from quire.server.settings import Limits, ServerSettings
from quire.tales import MODEL_DIR

BOS = 256
INFO = EngineInfo(
    architecture="fake",
    vocab_size=512,
    max_model_len=256,
    eos_token_ids=[257],
    block_size=16,
    num_blocks=64,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    dtype="float32",
    device="cpu",
    enable_prefix_caching=True,
    max_logprobs=20,
    memory_budget=["weights 0 B"],
)


class FakeTokenizer:
    """A token is a byte; 256 begins a text. 300 reads as "a" too."""

    decoder = None
    special_ids = frozenset({BOS})
    bos_token, eos_token, pad_token = "<256>", "<257>", None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        token_ids = [97 if token_id == 300 else token_id for token_id in token_ids]
        return bytes(token_id for token_id in token_ids if token_id < BOS).decode(errors="replace")

    def id_to_piece(self, token_id: int) -> str | None:
        return f"<{token_id}>"


class FakeTokenizerPool:
    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.num_encoded = 0

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_encoded += 1
        return self.tokenizer.encode(text, add_special_tokens)

    async def with_bad_word_ids(self, params: SamplingParams) -> SamplingParams:
        return with_bad_word_ids(params, self.tokenizer)  # type: ignore[arg-type]

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens)


@dataclass
class FakeClient:
    """Answers each prompt with letters that depend on the prompt and the choice; how fast is up to the test."""

    info: EngineInfo = INFO
    tokenizer: FakeTokenizerPool = field(default_factory=FakeTokenizerPool)
    step_delay: float = 0.0
    hold: bool = False
    """No step happens while set."""
    alive: bool = True
    age: float = 0.0
    step_text: str = ""
    """What each step adds instead of one letter."""
    error: Exception | None = None
    """Raised before step `error_step`."""
    error_step: int = 0
    finish_with_error: bool = False
    num_cached_tokens: int = 0
    short_way: bool = True
    """Tokens that bring text alone are offered as such."""
    num_short: int = 0
    """Tokens that went the short way."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    num_open: int = 0
    num_steps: int = 0
    """Steps whose deltas were taken."""
    num_aborted: int = 0
    on_step: Callable[[int], None] = field(default=lambda num_tokens: None)
    pid: int = field(default_factory=os.getpid)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(num_running=self.num_open, num_free_blocks=48, num_used_blocks=15)

    def progress_age(self) -> float:
        return self.age

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        sink: Sink | None = None,
    ) -> AsyncGenerator[list[TextDelta], None]:
        self.calls.append(
            {"id": request_id, "ids": prompt_token_ids, "params": params, "priority": priority, "salt": cache_salt}
        )
        self.num_open += 1
        processor = OutputProcessor(self.tokenizer.tokenizer)  # type: ignore[arg-type]
        processor.add("r", prompt_token_ids, params)
        finished = False
        try:
            for step in range(max(1, params.max_tokens or 0)):
                await asyncio.sleep(self.step_delay)
                while self.hold:  # noqa: ASYNC110 - tests set it from another thread
                    await asyncio.sleep(0.005)
                if self.error is not None and step >= self.error_step:
                    raise self.error
                processed = processor.process(self._outputs(prompt_token_ids, engine_params(params), step))
                finished = bool(processed.finished)
                self.on_step(len(prompt_token_ids) if step == 0 else params.n)
                deltas = processed.deltas.get("r", [])
                for delta in deltas:
                    delta.text = self.step_text or delta.text
                    delta.started_at = time.monotonic()
                if sink is None or not (self._hand_on(sink, params, deltas) or sink.take(deltas)):
                    yield deltas
                self.num_steps += 1
                if finished:
                    return
        finally:
            self.num_open -= 1
            if not finished:
                self.num_aborted += 1

    def _hand_on(self, sink: Sink, params: SamplingParams, deltas: list[TextDelta]) -> bool:
        """As the processor of the real client does."""
        told = params.stop or params.logprobs is not None or params.prompt_logprobs is not None
        if not self.short_way or told or params.num_sequences > 1 or deltas[0].finish_reason is not None:
            return False
        (delta,) = deltas
        taken = sink.take_text(delta.text, delta.token_ids[0], delta.num_output_tokens, time.monotonic())
        self.num_short += taken
        return taken

    def _outputs(self, prompt: list[int], params: SamplingParams, step: int) -> list[StepOutput]:
        """Of a beam search only the first choice is known before the end."""
        max_tokens = params.max_tokens or 0
        last = step + 1 >= max_tokens
        outputs = []
        for choice in range(params.n if params.use_beam_search else params.num_sequences):
            begin, end = step, min(step + 1, max_tokens)
            if params.use_beam_search and choice:
                if not last:
                    continue
                begin = 0
            token_ids = [letter(prompt, choice, position) for position in range(begin, end)]
            output = StepOutput("r", choice, token_ids, num_cached_tokens=self.num_cached_tokens)
            if params.logprobs is not None:
                output.log_probs = [log_probs_of(token_id, params.logprobs) for token_id in token_ids]
            if params.prompt_logprobs is not None and step == choice == 0:
                output.prompt_log_probs = [log_probs_of(token_id, params.prompt_logprobs) for token_id in prompt[1:]]
            if last:
                output.finish_reason = FinishReason.ERROR if self.finish_with_error else FinishReason.LENGTH
                output.cumulative_log_prob = -1.5 - choice if params.use_beam_search else None
            outputs.append(output)
        return outputs


def letter(prompt: list[int], choice: int, position: int) -> int:
    return 97 + (sum(prompt) + 7 * choice + position) % 26


def log_probs_of(token_id: int, num_top: int) -> TokenLogProbs:
    """The best are the token itself, if it is even, and those that follow it."""
    top = [(token_id + token_id % 2 + rank) % 512 for rank in range(num_top)]
    log_prob = -0.25 if token_id % 2 == 0 else -5.0 - token_id / 64
    return TokenLogProbs(token_id, log_prob, top, [-0.25 - rank / 8 for rank in range(num_top)])


class RunningServer:
    """The front on a port of its own, in a thread of its own."""

    def __init__(self, client: FakeClient, settings: ServerSettings, **grammar: Any) -> None:
        self.client = client
        self._grammar_options = grammar
        self.settings = settings
        self._listener = bind("127.0.0.1", 0, settings.limits)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app: Guard
        self.loop: asyncio.AbstractEventLoop
        self._server: HttpServer
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        # No child is started before the first grammar; it need not know the tokens of the fake.
        self.compiler = GrammarCompiler(MODEL_DIR, 4096, [0], **self._grammar_options)
        self.app = create_app(self.client, self.settings, self.compiler)  # type: ignore[arg-type]
        self._server = HttpServer(ServerConfig(self.app, self.settings.limits))
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        await self._server.listening.wait()
        self._ready.set()
        try:
            await serving
        finally:
            await self.compiler.close()

    @property
    def context(self) -> Any:
        return self.app.app.state.context

    def call(self, function: Callable[[], Any]) -> None:
        """Run something on the server's event loop."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(5)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def exchange(self, data: bytes, timeout: float = 5.0) -> bytes:
        """Send raw bytes; all that comes back until the server closes or is silent for so long."""
        with self.connect() as connection:
            connection.settimeout(timeout)
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            return read_all(connection)

    def complete(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4, **body})

    def begin_close(self) -> None:
        self.client.hold = False
        self.http.close()
        self._server.should_exit = True

    def close(self) -> None:
        self.begin_close()
        self._thread.join(3)
        self._server.force_exit = True
        self._thread.join(3)
        assert not self._thread.is_alive()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


Serve = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def ending() -> Iterator[list[RunningServer]]:
    """Servers that were told to end: no test waits for the last moments of its own."""
    servers: list[RunningServer] = []
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def serve(ending: list[RunningServer]) -> Iterator[Serve]:
    """Start servers: `serve(client, limits={...}, grammar={...}, **settings)`; `grammar` is for GrammarCompiler."""
    running: list[RunningServer] = []

    def start(
        client: FakeClient | None = None,
        limits: dict[str, Any] | None = None,
        grammar: dict[str, Any] | None = None,
        **settings: Any,
    ) -> RunningServer:
        given = {"served_model_names": ("fake",), "drain_grace": 0.0, **settings}
        all_settings = ServerSettings(**given, limits=replace(Limits(), **(limits or {})))
        server = RunningServer(client or FakeClient(), all_settings, **(grammar or {}))
        running.append(server)
        return server

    yield start
    for server in running:
        server.begin_close()
        ending.append(server)


@pytest.fixture(scope="session")
def shared() -> Iterator[RunningServer]:
    """One server with default settings for tests that change nothing of it."""
    server = RunningServer(FakeClient(), ServerSettings(served_model_names=("fake",), model_aliases=("./fake",)))
    yield server
    server.close()


@pytest.fixture(scope="session")
def fake_client() -> type[FakeClient]:
    return FakeClient


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """`eventually(condition, seconds)`: wait for it."""
    return wait_until
