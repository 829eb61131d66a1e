"""What crosses the socketpair between front process and engine process: declared structs in msgpack, no pickle."""

from __future__ import annotations

import msgspec

from quire.config import EngineConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.output import SchedulerStats, StepOutputs


class Configure(msgspec.Struct, tag=True, frozen=True):
    """First message to the engine process; it answers with LoadProgress messages, then Ready or StartFailed."""

    config: EngineConfig


class Add(msgspec.Struct, tag=True, frozen=True):
    """Submit a request. All bounds but those of the pool were checked by the front; the seed is set."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    cache_salt: str = ""


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End a request, or one choice of it. An unknown id is a no-op. No StepOutput follows for what was aborted."""

    request_id: str
    choice_index: int | None = None


class ResetPrefixCache(msgspec.Struct, tag=True, frozen=True):
    """Forget all prefix-cache keys; live sequences keep their blocks."""


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Leave the loop now and exit 0."""


class LoadProgress(msgspec.Struct, tag=True, frozen=True):
    stage: str
    done: int
    total: int
    """Bytes for the stage "weights"; steps otherwise."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What the front needs to know of a started engine."""

    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    device: str
    enable_prefix_caching: bool
    max_logprobs: int
    """Most entries of a request's `logprobs` and `prompt_logprobs`."""
    memory_budget: list[str]
    """The start-up memory budget, line by line, as printed."""
    kv_cache_dtype: str = ""
    """Of the pages of the KV-cache."""
    quantization: str | None = None
    """To what the weights were rounded."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """`message` is one line that says what to do; `exit_code` is quire.config.ExitCode."""

    message: str
    exit_code: int


class Rejected(msgspec.Struct, tag=True, frozen=True):
    """The scheduler refused a request (it can never fit)."""

    request_id: str
    message: str
    code: str
    param: str


class StepResult(msgspec.Struct, tag=True, frozen=True):
    """All that one step brought: one message a step.

    One without outputs follows messages that leave nothing to step (the last abort), so that the gauges are right.
    """

    outputs: StepOutputs
    stats: SchedulerStats
    started: list[str] = []
    """Ids of requests that this step scheduled for the first time."""
    began: float = 0.0
    """When the step began, in seconds of time.monotonic(), which both processes share."""


ToEngine = Configure | Add | Abort | ResetPrefixCache | Shutdown
ToFront = LoadProgress | Ready | StartFailed | Rejected | StepResult
