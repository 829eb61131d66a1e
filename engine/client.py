"""The front process's side of the engine: starts its process, submits requests, hands out their text."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.config import ConfigError, EngineConfig, ExitCode
from quire.engine.best_of import comes_late, engine_params
from quire.engine.delta_queue import DeltaQueue, ReaderTooSlowError, Sink
from quire.engine.messages import (
    Abort,
    Add,
    Configure,
    EngineInfo,
    Rejected,
    ResetPrefixCache,
    Shutdown,
    StepResult,
    ToFront,
)
from quire.engine.output_processor import OutputProcessor
from quire.engine.process_handle import ENGINE_COMMAND, EngineProcess, EngineStartError, OnProgress
from quire.engine.text_delta import TextDelta
from quire.engine.tokenizer import TokenizerPool
from quire.engine.wire import WireError
from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.scheduler.output import SchedulerStats

__all__ = ["EngineClient", "EngineDeadError", "EngineStartError", "ReaderTooSlowError", "RequestRejected"]

log = logging.getLogger(__name__)


class EngineDeadError(Exception):
    """The engine process is gone; nothing more will come for this request."""


class RequestRejected(Exception):
    """The request can never run here. `code` is the error code of the HTTP answer, `param` the field at fault."""

    def __init__(self, message: str, code: str, param: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(slots=True)
class _OpenRequest:
    label: str
    queue: DeltaQueue
    comes_late: bool
    """Most of it comes at its end, so its reader is told when the engine begins."""
    started_at: float | None = None


class EngineClient:
    """One engine process and the requests that are open in it. Belongs to one event loop; made by `start`."""

    def __init__(self, process: EngineProcess, info: EngineInfo, tokenizer: TokenizerPool, seed: int) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.on_step: Callable[[int], None] = lambda num_tokens: None
        """Told after each step how many tokens it computed; for metrics, and not to raise."""
        self._process = process
        self._connection = process.connection
        self._processor = OutputProcessor(tokenizer.tokenizer)
        self._seeds = random.Random(seed)
        self._open: dict[str, _OpenRequest] = {}
        self._stats = SchedulerStats()
        self._last_progress = time.monotonic()
        self._alive = True
        self._stopping = False
        self._reader = asyncio.create_task(self._read(), name="quire-engine-reader")

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        tokenizer_dir: Path | str,
        on_progress: OnProgress | None = None,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> EngineClient:
        """Start an engine process and wait until it is ready; the tokenizer loads meanwhile.

        Args:
            config: for the engine; also the seed from which requests without one are given theirs.
            tokenizer_dir: holds tokenizer.json.
            on_progress: called as the weights load.
            command: program and arguments of the engine process.

        Raises:
            EngineStartError: the engine or the tokenizer cannot be used as configured. No process is left behind.
        """
        process = await EngineProcess.spawn(command)
        try:
            process.connection.send(Configure(config=config))
            tokenizer = await asyncio.to_thread(TokenizerPool, tokenizer_dir)
            info = await process.wait_until_ready(on_progress)
        except BaseException as error:
            await process.end(grace=0)
            if isinstance(error, ConfigError):
                raise EngineStartError(str(error), ExitCode.START_FAILED) from error
            raise
        return cls(process, info, tokenizer, config.seed)

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stats(self) -> SchedulerStats:
        """As of the last step."""
        return self._stats

    def progress_age(self) -> float:
        """Seconds since the engine last finished a step while there is work; 0.0 when there is none."""
        return time.monotonic() - self._last_progress if self._open else 0.0

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
        """Submit a request; one list of deltas for each step that brought it something. A beam search, and choices that
        are ranked, begin with an empty list when the engine begins with them.

        The request ends when each of its choices has had a delta with a finish reason. Closing the generator, or
        cancelling the task that waits for it, aborts the request in the engine at once; callers that may leave early
        use `contextlib.aclosing`. Steps that pass while the caller does not take its deltas are merged into one list.

        Args:
            request_id: the caller's name for it, for logs only: it need not be unique.
            sink: is offered what a step brings while the caller waits for the next list; what it takes is not yielded.
                It is not to wait, nor to close the generator.

        Raises:
            RequestRejected: before the first list: it can never run here.
            ReaderTooSlowError: more than delta_queue.MAX_PENDING_BYTES were not taken; the request was aborted.
            EngineDeadError: the engine process is gone or was stopped.
        """
        self._check(prompt_token_ids, params)
        if not self._alive:
            raise EngineDeadError("The engine process is not running.")
        internal_id = secrets.token_hex(16)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64
        add = Add(
            request_id=internal_id,
            prompt_token_ids=prompt_token_ids,
            params=engine_params(params),
            seed=seed,
            priority=priority,
            cache_salt=cache_salt,
        )
        if not self._open:
            self._last_progress = time.monotonic()
        queue = DeltaQueue(sink)
        self._open[internal_id] = _OpenRequest(request_id, queue, comes_late(params))
        self._processor.add(internal_id, prompt_token_ids, params, queue)
        sent = False
        try:
            self._send_add(add)
            sent = True
            await self._connection.drain()
            while (deltas := await queue.get()) is not None:
                yield deltas
        finally:
            if self._forget(internal_id) and sent:
                self._connection.send(Abort(request_id=internal_id))

    async def reset_prefix_cache(self) -> None:
        """Forget all prefix-cache keys; holds for every request submitted afterwards."""
        if not self._alive:
            raise EngineDeadError("The engine process is not running.")
        self._connection.send(ResetPrefixCache())
        await self._connection.drain()

    async def stop(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - how long the engine has before it is killed
        """End the engine process; open requests get EngineDeadError. May be called twice."""
        self._stopping = True
        self._fail_all("The engine was stopped.")
        self._connection.send(Shutdown())
        await self._process.wait(timeout)
        await self._process.end(grace=0)
        await self._reader
        self.tokenizer.close()

    def _check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Bounds that do not depend on the pool, checked before anything is encoded or sent."""
        if not prompt_token_ids:
            raise RequestRejected("The prompt must have at least one token.", "empty_prompt", "prompt")
        limit, length = self.info.max_model_len, len(prompt_token_ids)
        least = 0 if params.max_tokens == 0 else 1
        if length + least > limit:
            raise RequestRejected(
                f"This model's maximum context length is {limit} tokens. However, you requested at least "
                f"{length + least} tokens ({length} in the prompt, {least} in the completion). Please reduce the "
                "length of the prompt.",
                "context_length_exceeded",
                "prompt",
            )
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= self.info.vocab_size:
            raise RequestRejected(
                f"Token ids must be from 0 to {self.info.vocab_size - 1}.", "invalid_token_id", "prompt"
            )
        try:
            params.check_vocabulary(self.info.vocab_size)
        except InvalidParameterError as error:
            raise RequestRejected(str(error), "invalid_value", error.param) from error

    def _send_add(self, add: Add) -> None:
        try:
            self._connection.send(add)
        except WireError as error:
            raise RequestRejected(str(error), "invalid_value", "prompt") from error

    def _forget(self, internal_id: str) -> _OpenRequest | None:
        self._processor.remove(internal_id)
        return self._open.pop(internal_id, None)

    def _fail_all(self, reason: str) -> None:
        self._alive = False
        for internal_id in list(self._open):
            if request := self._forget(internal_id):
                request.queue.fail(EngineDeadError(reason))

    async def _read(self) -> None:
        """Take what the engine sends until it is gone; then every open request learns of it before anything else."""
        try:
            await self._connection.hand_over(self._handle)
        except WireError as error:
            log.error("The engine process is dropped: %s", error)
        except Exception:
            log.exception("A message of the engine process could not be handled; the process is dropped.")
        level = logging.INFO if self._stopping else logging.ERROR
        self._fail_all("The engine process is gone.")
        await self._process.end()
        log.log(level, "The engine process has ended (%s).", self._process.how_it_ended)

    def _handle(self, message: ToFront) -> None:
        match message:
            case StepResult(outputs, stats, started, began):
                self.on_step(stats.num_scheduled_tokens - self._stats.num_scheduled_tokens)
                self._stats = stats
                self._last_progress = time.monotonic()
                for internal_id in started:
                    if (request := self._open.get(internal_id)) and request.started_at is None:
                        request.started_at = began
                        if request.comes_late:
                            request.queue.put([])
                step = self._processor.process_step(outputs)
                for internal_id, choice_index in step.aborts:
                    self._connection.send(Abort(request_id=internal_id, choice_index=choice_index))
                for internal_id, deltas in step.deltas.items():
                    self._deliver(internal_id, deltas)
                for internal_id in step.finished:
                    if request := self._forget(internal_id):
                        request.queue.close()
            case Rejected(internal_id, text, code, param):
                if request := self._forget(internal_id):
                    request.queue.fail(RequestRejected(text, code, param))
            case _:
                raise WireError(f"The engine process sent {type(message).__name__} after its start.")

    def _deliver(self, internal_id: str, deltas: list[TextDelta]) -> None:
        request = self._open.get(internal_id)
        if request is None:
            return
        for delta in deltas:
            delta.started_at = request.started_at
        if request.queue.put(deltas):
            return
        log.warning("Request %r is aborted: its reader takes no text.", request.label)
        self._forget(internal_id)
        self._connection.send(Abort(request_id=internal_id))
        request.queue.fail(ReaderTooSlowError("The text was not taken fast enough."))
