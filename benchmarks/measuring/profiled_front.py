"""`quire` with timers around what its front process does for each step; run by serving.py --profile.

    python benchmarks/measuring/profiled_front.py FIGURES.json serve path/to/model --port 8000

Counted from the first event that is written, in CPU seconds of the event loop's thread, and written when the engine is
stopped. Timers are exclusive, and an awaited function is timed only while it runs. The rest is the loop itself:
uvicorn, h11, sockets, tasks, the requests' own coroutines.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from functools import wraps
from pathlib import Path
from typing import Any

import msgspec

from quire.engine.client import EngineClient
from quire.engine.output_processor import OutputProcessor
from quire.engine.wire import FrameDecoder
from quire.server.cli import main
from quire.server.completion_run import Run
from quire.server.protocol import PartWriter
from quire.server.sinks import EventSink
from quire.server.sse import EventStream

BOUNDARIES = (
    (FrameDecoder, "feed", "decode of messages"),
    (OutputProcessor, "process_step", "detokenize"),
    (EngineClient, "_handle", "hand out deltas"),
    (EventSink, "take_text", "events of plain tokens"),
    (Run, "_event", "other events"),
    (PartWriter, "flush", "send"),
)


class FrontTimers:
    """Exclusive CPU seconds and calls by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inner = [0.0]
        self._begin: float | None = None

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inner.append(0.0)
        begin = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.thread_time() - begin
            inner = self._inner.pop()
            self._inner[-1] += spent
            if self._begin is not None:
                self.seconds[name] += spent - inner
                self.calls[name] += 1

    def start(self) -> None:
        """Count from here on, unless that was said before."""
        if self._begin is None:
            self._begin = time.thread_time()

    def figures(self) -> dict[str, Any]:
        whole = time.thread_time() - self._begin if self._begin is not None else 0.0
        parts = {name: {"seconds": self.seconds[name], "calls": self.calls[name]} for name in self.seconds}
        rest = {"seconds": whole - sum(self.seconds.values()), "calls": 0}
        return {"seconds": whole, "parts": {**parts, "event loop and HTTP, rest": rest}}


class _TimedAwait:
    """Awaits a coroutine, timing it while it runs."""

    def __init__(self, timers: FrontTimers, name: str, coroutine: Any) -> None:
        self._timers, self._name, self._coroutine = timers, name, coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[..., Any] = self._coroutine.send
        value: Any = None
        while True:
            try:
                awaited = self._timers.call(self._name, step, value)
            except StopIteration as end:
                return end.value
            try:
                value, step = (yield awaited), self._coroutine.send
            except BaseException as error:
                value, step = error, self._coroutine.throw


def install(timers: FrontTimers) -> None:
    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return wraps(function)(lambda *args, **kwargs: timers.call(name, function, *args, **kwargs))

    for owner, attribute, name in BOUNDARIES:
        setattr(owner, attribute, timed(getattr(owner, attribute), name))
    msgspec.json.encode = timed(msgspec.json.encode, "JSON")
    write = EventStream.write

    @wraps(write)
    async def timed_write(stream: EventStream, data: bytes, *, end: bool = False) -> None:
        timers.start()
        await _TimedAwait(timers, "SSE write", write(stream, data, end=end))

    EventStream.write = timed_write  # type: ignore[assignment, method-assign]


def write_at_end(timers: FrontTimers, target: Path) -> None:
    """When the engine is stopped: the process may end without a further word."""
    stop = EngineClient.stop

    @wraps(stop)
    async def write_and_stop(client: EngineClient, *args: Any, **kwargs: Any) -> None:
        target.write_text(json.dumps(timers.figures()))  # noqa: ASYNC240 - nothing is served any more
        await stop(client, *args, **kwargs)

    EngineClient.stop = write_and_stop  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    front_timers = FrontTimers()
    install(front_timers)
    write_at_end(front_timers, Path(sys.argv.pop(1)))
    sys.exit(main())
