"""The engine process: `python -m quire.engine.process --fd N`, where N is the inherited end of a socketpair."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from quire.config import ConfigError, EngineConfig, ExitCode
from quire.engine.messages import (
    Abort,
    Add,
    Configure,
    EngineInfo,
    LoadProgress,
    Ready,
    Rejected,
    ResetPrefixCache,
    Shutdown,
    StartFailed,
    StepResult,
    ToEngine,
)
from quire.engine.resident_memory import return_unused_memory
from quire.engine.thread_binding import import_torch, keep_to, places
from quire.engine.wire import MAX_FRAME_BYTES, ConnectionClosedError, EngineChannel, WireError
from quire.kernels.cpu_compiler import compiled_elsewhere
from quire.sampling_params import InvalidParameterError
from quire.scheduler.output import SchedulerStats, StepOutput, StepOutputs
from quire.scheduler.request import AdmissionError, Request

ORPHAN_GRACE_SECONDS = 1.0
"""How long a step may go on after the front process has died."""
PROGRESS_INTERVAL_SECONDS = 0.05
MAX_SCORES_BYTES = MAX_FRAME_BYTES // 4
"""Of prompts' log-probabilities in one frame, unless a single prompt has more."""
MAX_ENTRY_BYTES = 96
MAX_TOP_BYTES = 16
"""What a TokenLogProbs takes as msgpack: by itself, and for each of its best tokens."""

Progress = Callable[[str, int, int], None]
log = logging.getLogger(__name__)


class StepEngine(Protocol):
    """What the loop needs of an engine; `engine.engine.Engine` is the one that is served."""

    info: EngineInfo
    started: list[str]

    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str, choice_index: int | None = None) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> StepOutputs: ...
    def stats(self) -> SchedulerStats: ...
    def reset_prefix_cache(self) -> None: ...


MakeEngine = Callable[[EngineConfig, Progress], StepEngine]


def load_engine(config: EngineConfig, progress: Progress) -> StepEngine:
    """The real engine. Imported here so that a machine without a working torch still gets a StartFailed."""
    gc.disable()  # what is made now stays: to look for garbage in it takes a sixth of the start
    try:
        cores = import_torch(places(config.num_threads) if config.bind_threads else [])
        import torch

        from quire.engine.engine import Engine

        try:
            with compiled_elsewhere():
                engine = Engine(config, progress)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "The device's memory ran out during the start, beside what else uses it. Use --gpu-memory-utilization "
                f"{config.gpu_memory_utilization - 0.1:.2f}."
            ) from error
        if engine.info.device == "cpu":
            keep_to(cores)
        return engine
    finally:
        gc.freeze()  # and would make every full collection a pause of a tenth of a second
        gc.enable()
        return_unused_memory()


def serve(fd: int, make_engine: MakeEngine = load_engine) -> ExitCode:
    """Run one engine until it is told to stop, its front process is gone, or it fails.

    The main function of a process: it takes over SIGINT (ignored: the front process decides, and a Ctrl-C reaches both)
    and leaves SIGTERM as it is. When the front process dies the whole process ends within ORPHAN_GRACE_SECONDS, even
    in the middle of a step or of loading weights.

    Args:
        fd: the inherited end of the socketpair.
        make_engine: builds the engine from its configuration.

    Returns:
        The exit code of the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    sock = socket.socket(fileno=fd)
    threading.Thread(target=_exit_with_front, args=(sock,), name="quire-front-watch", daemon=True).start()
    channel = EngineChannel(sock)
    try:
        engine = _start(channel, make_engine)
        return engine if isinstance(engine, ExitCode) else _loop(channel, engine)
    except ConnectionClosedError:
        return ExitCode.CLEAN
    except WireError:
        log.exception("The front process sent what cannot be read; the engine process ends.")
        return ExitCode.INTERNAL_ERROR
    except Exception:
        log.exception("The engine failed; its process ends.")
        return ExitCode.INTERNAL_ERROR
    finally:
        channel.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quire.engine.process", description="Run by the front process, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="inherited file descriptor of a connected stream socket")
    fd = parser.parse_args(arguments).fd
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        parser.error(f"file descriptor {fd} is not an open socket")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    return serve(fd)


def _start(channel: EngineChannel, make_engine: MakeEngine) -> StepEngine | ExitCode:
    """The engine, or the exit code of a start that failed and was reported."""
    configure, *rest = channel.receive(wait=True)
    if not isinstance(configure, Configure) or rest:
        raise WireError("The first message must be Configure, and nothing may follow before Ready.")
    try:
        engine = make_engine(configure.config, _throttled_progress(channel))
    except ConfigError as error:
        channel.send(StartFailed(message=str(error), exit_code=ExitCode.START_FAILED))
        return ExitCode.START_FAILED
    except ConnectionClosedError:
        raise
    except Exception as error:
        log.exception("The engine could not be built.")
        reason = (str(error).splitlines() or [""])[0]
        message = f"The engine could not be built: {type(error).__name__}: {reason}"
        channel.send(StartFailed(message=message, exit_code=ExitCode.INTERNAL_ERROR))
        return ExitCode.INTERNAL_ERROR
    channel.send(Ready(info=engine.info))
    return engine


def _loop(channel: EngineChannel, engine: StepEngine) -> ExitCode:
    while True:
        messages = channel.receive(wait=not engine.has_work())
        if not _apply(channel, engine, messages):
            return ExitCode.CLEAN
        if engine.has_work():
            began = time.monotonic()
            outputs = engine.step()
            for part in in_frames(outputs):
                channel.send(StepResult(outputs=part, stats=engine.stats(), started=engine.started, began=began))
        elif messages:
            # Nothing to step for, but aborts and resets changed the gauges that the front process shows.
            channel.send(StepResult(outputs=StepOutputs(), stats=engine.stats()))


def in_frames(outputs: StepOutputs) -> Iterator[StepOutputs]:
    """Cut one step's outputs so that none is too large for a frame: many scored prompts may end in the same step.

    What one prompt takes is bounded when it is admitted, by far less than a frame.
    """
    part: list[StepOutput] = []
    tokens, num_bytes = outputs.tokens, 0
    for output in outputs.others:
        if output.prompt_log_probs:
            num_top = len(output.prompt_log_probs[0].top_token_ids)
            num_bytes += len(output.prompt_log_probs) * (MAX_ENTRY_BYTES + num_top * MAX_TOP_BYTES)
            if num_bytes > MAX_SCORES_BYTES and part:
                yield StepOutputs(tokens, part)
                tokens, part, num_bytes = [], [], 0
        part.append(output)
    yield StepOutputs(tokens, part)


def _apply(channel: EngineChannel, engine: StepEngine, messages: Iterable[ToEngine]) -> bool:
    """Do what the front process asks; False: it asks to leave."""
    for message in messages:
        match message:
            case Add():
                _add(channel, engine, message)
            case Abort(request_id, choice_index):
                engine.abort(request_id, choice_index)
            case ResetPrefixCache():
                engine.reset_prefix_cache()
            case Shutdown():
                return False
            case Configure():
                raise WireError("Configure came twice.")
    return True


def _add(channel: EngineChannel, engine: StepEngine, message: Add) -> None:
    request = Request(
        request_id=message.request_id,
        prompt_token_ids=message.prompt_token_ids,
        params=message.params,
        seed=message.seed,
        eos_token_ids=tuple(engine.info.eos_token_ids),
        priority=message.priority,
        cache_salt=message.cache_salt,
    )
    try:
        engine.add(request)
    except AdmissionError as error:
        reason, code, param = str(error), error.code, error.param
    except InvalidParameterError as error:
        reason, code, param = str(error), "invalid_value", error.param
    else:
        return
    channel.send(Rejected(request_id=message.request_id, message=reason, code=code, param=param))


def _throttled_progress(channel: EngineChannel) -> Progress:
    """Sends the first and the last message of each stage, and of the others a few each second."""
    last_stage, last_time = "", 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        now = time.monotonic()
        if stage != last_stage or done >= total or now - last_time >= PROGRESS_INTERVAL_SECONDS:
            last_stage, last_time = stage, now
            channel.send(LoadProgress(stage=stage, done=done, total=total))

    return progress


def _exit_with_front(sock: socket.socket) -> None:
    """End the process once the peer of `sock` is gone; the loop has a moment to end it in an orderly way before.

    A thread, because a step or the loading of weights may take longer than an orphan should live.
    """
    poll = select.poll()
    poll.register(sock, getattr(select, "POLLRDHUP", 0) | select.POLLHUP)
    poll.poll()
    time.sleep(ORPHAN_GRACE_SECONDS)
    sys.stderr.flush()
    os._exit(ExitCode.CLEAN)


if __name__ == "__main__":
    sys.exit(main())
