"""Configuration: frozen, validated once, passed down in parts. A leaf: standard library only."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal, get_args

from quire.sampling_params import MAX_LOGPROBS, MAX_SPECULATIVE_TOKENS

KVCacheDType = Literal["auto", "int8", "fp8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["int8", "int4", "fp8"]
SchedulingPolicy = Literal["fcfs", "priority"]
MAX_NGRAM = 16
MAX_TARGET_ITL_MS = 60_000


class ConfigError(ValueError):
    """A flag or model directory cannot be used as given. The message is one line that says what to do."""


class ExitCode(enum.IntEnum):
    """How the processes of Quire end (docs/architecture.md, "Exit codes")."""

    CLEAN = 0
    INTERNAL_ERROR = 1
    BAD_ARGUMENTS = 2
    ENGINE_LOST = 3
    START_FAILED = 4
    DRAIN_DEADLINE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Drafts looked up in a sequence's own text: what followed the last tokens where they occurred before."""

    num_speculative_tokens: int = 0
    """Most tokens guessed in a step for a request that does not say; 0: none."""
    max_ngram: int = 4
    """Most last tokens that are looked up together; the longest that occurred before decide."""
    min_ngram: int = 2
    """Fewest."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"--speculative-config: num_speculative_tokens must be from 0 to {MAX_SPECULATIVE_TOKENS}, "
                f"not {self.num_speculative_tokens}."
            )
        if not 1 <= self.min_ngram <= self.max_ngram <= MAX_NGRAM:
            raise ConfigError(
                f"--speculative-config: 1 <= prompt_lookup_min <= prompt_lookup_max <= {MAX_NGRAM} must hold, "
                f"not {self.min_ngram} and {self.max_ngram}."
            )

    def num_logits_rows(self, max_num_seqs: int) -> int:
        """Most rows of logits in a step: the memory budget has room for so many."""
        return max_num_seqs * (1 + self.num_speculative_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that one engine process is told. `None` means: derived from the model and the machine at start."""

    model: str
    """Directory of a Hugging Face checkpoint, or a hub name (resolved before the engine starts)."""
    dtype: DType = "auto"
    device: Device = "auto"
    kv_cache_dtype: KVCacheDType = "auto"
    """Of the KV-cache's pages: int8 or fp8 with a scale for each token and head. `auto` is the model's dtype; where a
    CPU without bfloat16 has chosen float32 to compute in (`dtype` is `auto` too), it is the checkpoint's."""
    quantization: Quantization | None = None
    """To what weights are rounded at load: on a CPU int8 or int4, embedding and head always to int8; on a GPU fp8,
    without embedding and head."""
    seed: int = 0
    """Seed from which requests without a seed are given theirs."""
    max_model_len: int | None = None
    """Longest sequence, prompt and output together, in tokens."""
    max_num_seqs: int | None = None
    """Sequences that run at once: 64 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step: 2048 on a GPU, on a CPU 64 for each thread (at least 128, at most 2048)."""
    target_itl_ms: float | None = None
    """Milliseconds between the tokens of a request that prompts computed beside it may cause; None: as many as the
    token budget takes."""
    block_size: int = 16
    """Tokens in one block of the KV-cache; a power of two."""
    num_blocks: int | None = None
    """Blocks of the KV-cache, the null block included; overrides the memory budget."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of KV-cache; without it the memory budget decides."""
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    speculative_config: SpeculativeConfig = SpeculativeConfig()
    max_logprobs: int = MAX_LOGPROBS
    """Most entries of `logprobs` and `prompt_logprobs`; the KV-cache keeps so many for each prompt token it scores."""
    num_threads: int | None = None
    """CPU threads of the engine process."""
    bind_threads: bool = True
    """Where they are as many as the cores, keep each to a core of its own."""
    enforce_eager: bool = False
    """On a GPU launch every kernel of a step by itself, instead of replaying decodes as graphs."""
    async_scheduling: bool | None = None
    """Schedule the next step while one runs; None: on a GPU, not on a CPU, which both would have to share."""

    def __post_init__(self) -> None:
        require_power_of_two("--block-size", self.block_size, 8, 256)
        for flag, value, low in (
            ("--max-model-len", self.max_model_len, 1),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, 1),
            ("--num-gpu-blocks-override", self.num_blocks, 2),
            ("--kv-cache-memory-bytes", self.kv_cache_memory_bytes, 1),
            ("--num-threads", self.num_threads, 1),
        ):
            if value is not None and value < low:
                raise ConfigError(f"{flag} must be at least {low}, not {value}.")
        if self.target_itl_ms is not None:
            if not 0 < self.target_itl_ms <= MAX_TARGET_ITL_MS:
                raise ConfigError(
                    f"--target-itl-ms must be above 0 and at most {MAX_TARGET_ITL_MS}, not {self.target_itl_ms}."
                )
            if not self.enable_chunked_prefill:
                raise ConfigError("--target-itl-ms sizes chunks of prompts: leave out --no-enable-chunked-prefill.")
        if self.kv_cache_dtype not in get_args(KVCacheDType):
            raise ConfigError(f"--kv-cache-dtype must be auto, int8 or fp8, not {self.kv_cache_dtype!r}.")
        if self.quantization not in (None, *get_args(Quantization)):
            raise ConfigError(
                f"--quantization must be {' or '.join(get_args(Quantization))}, not {self.quantization!r}."
            )
        if not 0 <= self.max_logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"--max-logprobs must be from 0 to {MAX_LOGPROBS}, not {self.max_logprobs}.")
        if not (math.isfinite(self.gpu_memory_utilization) and 0 < self.gpu_memory_utilization <= 1):
            raise ConfigError(f"--gpu-memory-utilization must be in (0, 1], not {self.gpu_memory_utilization}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler needs to know: plain integers, no model, no device."""

    num_blocks: int
    """Blocks in the pool, the null block 0 included."""
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: SchedulingPolicy = "fcfs"
    sliding_window: int | None = None
    """Set only if every layer of the model has this window: then blocks that fell out of it are freed."""
    cache_namespace: str = ""
    """Identity of what computes the KV-cache (model, dtype); part of every prefix-cache key."""
    speculative_config: SpeculativeConfig = SpeculativeConfig()

    def __post_init__(self) -> None:
        if self.num_blocks < 2:
            raise ConfigError(f"The KV-cache has room for {self.num_blocks - 1} blocks; it needs at least one.")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"Without chunked prefill --max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-model-len ({self.max_model_len})."
            )

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def max_pool_tokens(self) -> int:
        """Tokens that fit into the whole pool."""
        return self.num_usable_blocks * self.block_size


def require_power_of_two(flag: str, value: int, low: int, high: int) -> None:
    if not (low <= value <= high and value & (value - 1) == 0):
        raise ConfigError(f"{flag} must be a power of two from {low} to {high}, not {value}.")
