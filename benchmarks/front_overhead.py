"""Time what a token costs the front process: from the engine's message to the client's socket. No model runs.

    python benchmarks/front_overhead.py
    python benchmarks/front_overhead.py --against ../other-checkout --rounds 5

An engine process without a model sends one token a step to every stream, at a fixed rate; real HTTP clients in a
process of their own read the streams. Figures are the front process's own CPU time, all of its threads, divided by
tokens: medians over rounds. With --against the two checkouts take turns, so both see the same machine. The parts come
from a further round whose functions are wrapped in timers; they are exclusive of each other, and a timer costs a
little itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
OLDEST = "server/http_server.py"
"""What a checkout must have to be measured."""
WARM_UP_STEPS = 20
VOCAB_SIZE = 1024
PARTS = (
    ("decode the message", "quire.engine.wire", "FrameDecoder", "feed"),
    ("tokens to text, hand out", "quire.engine.client", "EngineClient", "_handle"),
    ("account, event, framing", "quire.server.sinks", "EventSink", "take_text"),
    ("send", "quire.server.protocol", "PartWriter", "flush"),
)
"""(name, module, class, method): what a timed round takes apart, as far as the checkout has it; the rest is tasks and
the event loop."""


class PacedEngine:
    """Stands in for engine.engine.Engine: waits until every stream is there, then one token each, a step a period."""

    def __init__(self, num_streams: int, period: float, max_model_len: int) -> None:
        from quire.engine.messages import EngineInfo

        self._num_streams = num_streams
        self._period = period
        self._next_step = 0.0
        self._num_left: dict[str, int] = {}
        self._began = False
        self._num_steps = 0
        self.started: list[str] = []
        self.info = EngineInfo(
            architecture="Paced",
            vocab_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            eos_token_ids=[0],
            block_size=16,
            num_blocks=1024,
            max_num_seqs=num_streams,
            max_num_batched_tokens=2048,
            dtype="float32",
            device="cpu",
            enable_prefix_caching=True,
            max_logprobs=20,
            memory_budget=[],
        )

    def add(self, request: Any) -> None:
        self._num_left[request.request_id] = request.params.max_tokens
        self.started.append(request.request_id)
        self._began = self._began or len(self._num_left) == self._num_streams

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        self._num_left.pop(request_id, None)

    def has_work(self) -> bool:
        return self._began and bool(self._num_left)

    def step(self) -> Any:
        from quire.scheduler.output import FinishReason, StepOutput

        now = time.monotonic()
        self._next_step = max(self._next_step + self._period, now)
        time.sleep(self._next_step - now)
        if self._num_steps:
            self.started = []
        self._num_steps += 1
        rows, others = [], []
        for place, (request_id, num_left) in enumerate(list(self._num_left.items())):
            last = num_left == 1
            token_id = 100 + (self._num_steps * 7 + place * 13) % (VOCAB_SIZE - 200)
            if last:
                others.append(StepOutput(request_id, 0, [token_id], FinishReason.LENGTH))
            else:
                rows.append((request_id, 0, token_id, 0))
            self._num_left[request_id] = num_left - 1
            if last:
                del self._num_left[request_id]
        return as_outputs(rows, others)

    def stats(self) -> Any:
        from quire.scheduler.output import SchedulerStats

        num_tokens = self._num_steps * self._num_streams
        return SchedulerStats(
            num_running=len(self._num_left), num_steps=self._num_steps, num_scheduled_tokens=num_tokens
        )

    def reset_prefix_cache(self) -> None:
        return


def as_outputs(rows: list[tuple[str, int, int, int]], others: list[Any]) -> Any:
    """As the engine of this checkout returns them: before there were rows, an object each."""
    from quire.scheduler import output

    if hasattr(output, "StepOutputs"):
        return output.StepOutputs(rows, others)
    return [*(output.StepOutput(request_id, index, [token_id]) for request_id, index, token_id, _ in rows), *others]


def run_engine(args: argparse.Namespace) -> None:
    from quire.engine.process import serve

    serve(args.fd, lambda config, progress: PacedEngine(args.streams, 1 / args.rate, args.steps + 64))


def run_clients(args: argparse.Namespace) -> None:
    """Open the streams and read them to their ends; fails if any of them lacks its end."""
    body = json.dumps({"prompt": [65, 66], "max_tokens": args.steps, "stream": True, "temperature": 0}).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    selector = selectors.DefaultSelector()
    for _ in range(args.streams):
        connection = socket.create_connection(("127.0.0.1", args.port))
        connection.sendall(head.encode() + body)
        selector.register(connection, selectors.EVENT_READ, bytearray())
    num_events = 0
    while selector.get_map():
        for key, _ in selector.select():
            connection, tail = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            data = connection.recv(65536)
            num_events += data.count(b"data: {")
            tail[:] = (tail + data)[-32:]
            if not data or tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                if not data:
                    sys.exit("a stream broke off")
                selector.unregister(connection)
                connection.close()
    if num_events != args.streams * args.steps:
        sys.exit(f"{num_events} events came instead of {args.streams * args.steps}")


class Timers:
    """CPU seconds spent in wrapped functions, each without those that it calls."""

    def __init__(self) -> None:
        self.seconds = {name: 0.0 for name, *_ in PARTS}
        self._inner: list[float] = []

    def wrap(self, name: str, owner: type | None, method: str) -> None:
        function: Callable[..., Any] | None = getattr(owner, method, None)
        if function is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.thread_time() - begin
                self.seconds[name] += seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds

        setattr(owner, method, timed)


@dataclass(slots=True)
class Meter:
    """Reads the CPU clock when a step arrives."""

    first: float = 0.0
    last: float = 0.0
    num_steps: int = 0

    def tick(self, timers: Timers | None) -> None:
        self.num_steps += 1
        self.last = time.process_time()
        if self.num_steps == WARM_UP_STEPS:
            self.first = self.last
            if timers is not None:
                timers.seconds = dict.fromkeys(timers.seconds, 0.0)


async def measure(args: argparse.Namespace, timers: Timers | None) -> dict[str, float]:
    from quire.config import EngineConfig
    from quire.engine.client import EngineClient
    from quire.engine.grammar.compiler import GrammarCompiler
    from quire.server.app import create_app
    from quire.server.http_server import HttpServer
    from quire.server.protocol import ServerConfig
    from quire.server.serve import bind
    from quire.server.settings import ServerSettings
    from quire.tales import MODEL_DIR

    options = ["--streams", str(args.streams), "--steps", str(args.steps), "--rate", str(args.rate)]
    command = (sys.executable, str(HERE), "--role", "engine", *options)
    client = await EngineClient.start(EngineConfig(model=str(MODEL_DIR)), MODEL_DIR, command=command)
    settings = ServerSettings(served_model_names=("paced",))
    compiler = GrammarCompiler(MODEL_DIR, VOCAB_SIZE, [0])
    listener = bind("127.0.0.1", 0, settings.limits)
    server = HttpServer(ServerConfig(create_app(client, settings, compiler), settings.limits))
    observe, meter = client.on_step, Meter()
    gc.freeze()  # as the server does

    def on_step(num_tokens: int) -> None:
        if num_tokens:  # none: what the engine says of itself while the streams come in
            meter.tick(timers)
        observe(num_tokens)

    client.on_step = on_step
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await server.listening.wait()
    readers = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE), "--role", "clients", *options, "--port", str(listener.getsockname()[1]))
    )
    if await readers.wait():
        sys.exit("the clients failed")
    server.should_exit = True
    await serving
    await compiler.close()
    await client.stop()
    if meter.num_steps != args.steps:
        sys.exit(f"{meter.num_steps} steps came instead of {args.steps}")
    num_tokens = (meter.num_steps - WARM_UP_STEPS) * args.streams
    figures = {"all": (meter.last - meter.first) / num_tokens * 1e6}
    if timers is not None:
        parts = {name: seconds / num_tokens * 1e6 for name, seconds in timers.seconds.items()}
        figures |= parts | {"tasks, event loop": figures["all"] - sum(parts.values())}
    return figures


def run_front(args: argparse.Namespace) -> None:
    import importlib.util

    from quire.server.cli import _loop_factory

    timers = None
    if args.timed:
        timers = Timers()
        for name, module, owner, method in PARTS:
            if importlib.util.find_spec(module):
                timers.wrap(name, getattr(importlib.import_module(module), owner, None), method)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        print(json.dumps(runner.run(measure(args, timers))))


def front_figures(args: argparse.Namespace, root: Path, *, timed: bool = False) -> dict[str, float]:
    options = ["--streams", str(args.streams), "--steps", str(args.steps), "--rate", str(args.rate)]
    command = [sys.executable, str(HERE), "--role", "front", *options, *(["--timed"] if timed else [])]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(args: argparse.Namespace) -> None:
    roots = [HERE.parent.parent, *([args.against.resolve()] if args.against else [])]
    if old := [str(root) for root in roots if not (root / OLDEST).exists()]:
        sys.exit(f"{', '.join(old)}: too old to be measured, or no checkout; there is no {OLDEST}")
    totals: dict[Path, list[float]] = {root: [] for root in roots}
    for _ in range(args.rounds):
        for root in roots:
            totals[root].append(front_figures(args, root)["all"])
    results = {}
    print(f"{args.streams} streams, {args.rate:g} steps a second, {args.steps} steps; microseconds of CPU a token")
    for root, values in totals.items():
        parts = front_figures(args, root, timed=True)
        print(f"{root}\n  {statistics.median(values):6.2f}  median of {[round(value, 2) for value in sorted(values)]}")
        for name, value in parts.items():
            print(f"  {value:6.2f}  {'all, with timers' if name == 'all' else name}")
        results[root.name] = {"all": values, "timed": parts}
    if args.json:
        args.json.write_text(
            json.dumps({"streams": args.streams, "rate": args.rate, "fronts": results}, indent=1) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="streams that are open at once (default: 64)")
    parser.add_argument("--steps", type=int, default=300, help="tokens of each stream (default: 300)")
    parser.add_argument("--rate", type=float, default=50.0, help="steps a second (default: 50)")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each checkout (default: 3)")
    parser.add_argument("--against", type=Path, help="another checkout to take turns with")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--role", choices=("engine", "clients", "front"), help=argparse.SUPPRESS)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"engine": run_engine, "clients": run_clients, "front": run_front, None: compare}[args.role](args)


if __name__ == "__main__":
    main()
