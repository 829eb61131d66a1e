"""What the front process is told: frozen, validated once. Every limit of the HTTP side has its name here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from quire.config import ConfigError, SchedulingPolicy
from quire.sampling_params import MAX_LOGPROBS


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of what one client may send and hold. Seconds and bytes."""

    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 16 * 2**10
    """Request line and header fields together."""
    max_headers: int = 64
    max_json_depth: int = 64
    max_json_keys: int = 4096
    max_json_containers: int = 4096
    max_json_strings: int = 16384
    max_json_items: int = 2**18
    """Commas outside strings: bounds the interpreter time that one body can take from the event loop."""
    off_loop_bytes: int = 64 * 2**10
    """Bodies above this are scanned and parsed on a worker thread."""
    max_buffered_bytes: int = 128 * 2**20
    """Bodies being read, of all connections together."""
    max_connections: int = 2048
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    keep_alive_timeout: float = 5.0
    linger_timeout: float = 2.0
    """How long an unwanted body is read and dropped after its refusal, so that the client sees the answer."""
    stall_timeout: float = 30.0
    """A client that reads nothing for so long is cut off."""
    send_buffer_bytes: int = 256 * 2**10
    """Kernel send buffer asked for per connection (Linux doubles it); with the 64 KiB that the server itself holds
    it bounds what one slow reader can leave unsent to less than 1 MiB."""
    queue_timeout: float = 60.0
    """Longest wait for the first token."""
    token_gap_timeout: float = 60.0
    request_timeout: float = 600.0
    max_queued_requests: int | None = None
    """`None`: 4 x max_num_seqs."""
    max_queued_tokens: int | None = None
    """Prompt tokens of requests that have no token yet; `None`: 16 x max_num_batched_tokens, at least 32,768."""
    max_prompt_log_probs: int = 2**16
    """Log-probabilities of one prompt, those of each position's best tokens included."""
    max_answer_log_probs: int = 2**20
    """What an answer holds at once: those of all prompts, and without `stream` those of all output tokens."""
    max_auth_failures_per_second: int = 20
    """Per peer address."""
    ready_progress_age: float = 5.0
    """/health/ready answers 503 if the engine has work and finished no step for so long."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name.replace('_', ' ')} must be greater than 0, not {value}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request gets that leaves a field out: from the model's generation_config.json, else neutral."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    served_model_names: tuple[str, ...]
    """The first is the model's id in every answer; requests may use any."""
    model_aliases: tuple[str, ...] = ()
    """Further names that requests may use and no answer shows (the path as typed)."""
    host: str = "127.0.0.1"
    port: int = 8000
    key_digests: tuple[bytes, ...] = ()
    """SHA-256 of each API key; empty: no authentication."""
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    """Host header values without port; "*": any; "<ip>": any IP address literal."""
    strict: bool = False
    """Unknown fields are a 400 instead of a report."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    sse_keep_alive_interval: float = 15.0
    """Seconds between comment lines on a silent stream."""
    shutdown_timeout: float = 30.0
    """How long running requests may go on after SIGTERM."""
    drain_grace: float = 5.0
    """How long the port stays open after SIGTERM, so that a load balancer can look away."""
    log_requests: bool = False
    max_logprobs: int = MAX_LOGPROBS
    """Most `logprobs` and `prompt_logprobs` that a request may ask for."""
    limits: Limits = field(default_factory=Limits)
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("--served-model-name needs at least one name.")
        if not 0 <= self.max_logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"--max-logprobs must be from 0 to {MAX_LOGPROBS}, not {self.max_logprobs}.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, not {self.port}.")
        for flag, value in (
            ("--sse-keep-alive-interval", self.sse_keep_alive_interval),
            ("--shutdown-timeout", self.shutdown_timeout),
            ("--drain-grace", self.drain_grace),
        ):
            if not (math.isfinite(value) and 0 <= value <= 3600):
                raise ConfigError(f"{flag} must be from 0 to 3600 seconds, not {value:g}.")

    @property
    def model_name(self) -> str:
        return self.served_model_names[0]

    def serves(self, name: str) -> bool:
        return name in self.served_model_names or name in self.model_aliases
