"""One memory budget at start, line by line; when it does not fit, the flag and the value that would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from quire.config import ConfigError, EngineConfig, Quantization
from quire.engine.cuda_runner import GRAPH_BYTES, graph_sizes
from quire.engine.device import choose_kv_cache_dtype, dtype_name
from quire.engine.kv_storage import bytes_per_block
from quire.engine.log_prob_pages import log_prob_bytes_per_block
from quire.engine.prefix_groups import MAX_GROUPS
from quire.engine.prompt_log_probs import MAX_LOGITS_BYTES
from quire.kernels.targets import current_target
from quire.models.config import ModelConfig

CPU_SHARE_OF_FREE_MEMORY = 0.5
"""Of the memory that is free once the weights are loaded, so much goes to pages at most on a CPU."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    num_blocks: int
    max_model_len: int
    lines: list[str]


def plan_memory(
    config: EngineConfig,
    model_config: ModelConfig,
    *,
    weight_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None,
    max_num_seqs: int,
    step_budget: int,
) -> MemoryBudget:
    """Decide how many blocks the pool gets. Call it when the weights are on the device.

    Raises:
        ConfigError: the pool would be empty, or too small for the `max_model_len` that was asked for.
    """
    log_prob_bytes = log_prob_bytes_per_block(config.block_size, min(config.max_logprobs, model_config.vocab_size))
    kv_dtype = choose_kv_cache_dtype(config, model_config.checkpoint_dtype, dtype, device)
    kv_bytes = bytes_per_block(model_config, config.block_size, kv_dtype)
    block_bytes = kv_bytes + (log_prob_bytes if device.type == "cpu" else 0)  # they are on the host
    wanted_len = config.max_model_len or model_config.max_position_embeddings
    activations = activation_bytes(config, model_config, dtype, max_num_seqs, step_budget)
    graphs = 0 if device.type == "cpu" or config.enforce_eager else graph_bytes(model_config, dtype, max_num_seqs)
    pieces = attention_pieces_bytes(model_config, dtype, kv_dtype, device, max_num_seqs, wanted_len)
    free = free_memory_bytes(device, config.gpu_memory_utilization) - activations - graphs - pieces
    num_blocks = _number_of_blocks(config, block_bytes, free, max_num_seqs, wanted_len)
    pool_tokens = (num_blocks - 1) * config.block_size
    if pool_tokens < config.block_size and config.kv_cache_memory_bytes is not None:
        raise ConfigError(
            f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes} holds no block; use at least {2 * block_bytes}."
        )
    if pool_tokens < config.block_size:
        raise ConfigError(
            f"No room for a KV-cache: {_mib(max(free, 0))} are free, one block takes {_mib(block_bytes)}. "
            f"Free memory, use a smaller model, or lower --max-num-batched-tokens ({step_budget})."
        )
    if config.max_model_len is not None and config.max_model_len > pool_tokens:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} does not fit: the KV-cache holds {pool_tokens} tokens. Use "
            f"--max-model-len {pool_tokens} or --kv-cache-memory-bytes "
            f"{(-(-config.max_model_len // config.block_size) + 1) * block_bytes}."
        )
    max_model_len = min(wanted_len, pool_tokens)
    lines = [
        f"weights      {_mib(weight_bytes):>12}  {_weight_kind(quantization, dtype)} on {device.type}",
        f"activations  {_mib(activations):>12}  {step_budget} tokens a step, {max_num_seqs} requests",
        *([f"graphs       {_mib(graphs):>12}  of decodes, as they come; --enforce-eager: none"] if graphs else []),
        *([f"attention    {_mib(pieces):>12}  results in pieces, until they are merged"] if pieces else []),
        f"KV-cache     {_mib(num_blocks * kv_bytes):>12}  {num_blocks - 1} blocks of {config.block_size} = "
        f"{pool_tokens} tokens, {dtype_name(kv_dtype)}",
        f"log-probs    {_mib(num_blocks * log_prob_bytes):>12}  of scored prompts, at most; host memory",
        f"context      {max_model_len:>12}  tokens a sequence at most",
    ]
    return MemoryBudget(num_blocks, max_model_len, lines)


def _weight_kind(quantization: Quantization | None, dtype: torch.dtype) -> str:
    name = dtype_name(dtype)
    match quantization:
        case None:
            return name
        case "int8":
            return f"int8, computing in {name},"
        case "int4":
            return f"int4 (embedding and head int8), computing in {name},"
        case "fp8":
            return f"fp8 (embedding and head {name})"


def _number_of_blocks(
    config: EngineConfig, block_bytes: int, free_bytes: int, max_num_seqs: int, max_model_len: int
) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_memory_bytes is not None:
        if config.kv_cache_memory_bytes > free_bytes:
            raise ConfigError(
                f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes} does not fit; "
                f"{max(free_bytes, 0)} bytes are free beside weights and activations."
            )
        return config.kv_cache_memory_bytes // block_bytes
    enough_for_all = max_num_seqs * -(-max_model_len // config.block_size) + 1
    return min(free_bytes // block_bytes, enough_for_all)


def activation_bytes(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, max_num_seqs: int, step_budget: int
) -> int:
    """Upper estimate of what a step holds beside weights and pages: a layer's inputs and outputs, and the logits, of
    rows that sample and of prompts that are scored.
    """
    logits = 4 * 4 * config.speculative_config.num_logits_rows(max_num_seqs) * model_config.vocab_size
    scored = 2 * min(MAX_LOGITS_BYTES, 4 * step_budget * model_config.vocab_size)
    return step_budget * layer_bytes_per_token(model_config, dtype) + logits + scored


def layer_bytes_per_token(model_config: ModelConfig, dtype: torch.dtype) -> int:
    heads = (model_config.num_heads + 2 * model_config.num_kv_heads) * model_config.head_dim
    per_token = 4 * model_config.hidden_size + 2 * heads + 3 * model_config.intermediate_size
    return per_token * dtype.itemsize


def graph_bytes(model_config: ModelConfig, dtype: torch.dtype, max_num_seqs: int) -> int:
    """Upper estimate of what the graphs of all batch sizes hold: each itself and the hidden states that it leaves, all
    together what one of them computes in."""
    sizes = graph_sizes(max_num_seqs)
    outputs = sum(sizes) * model_config.hidden_size * dtype.itemsize
    return len(sizes) * GRAPH_BYTES + outputs + sizes[-1] * layer_bytes_per_token(model_config, dtype)


def attention_pieces_bytes(
    model_config: ModelConfig,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    max_num_seqs: int,
    max_model_len: int,
) -> int:
    """What a layer's attention holds on a GPU until the pieces of its results are merged, at most: decodes and what
    they share, and a prefill in pieces. On a CPU that is little, and part of the activations."""
    if device.type == "cpu":
        return 0
    # Triton is not imported for a CPU.
    from quire.kernels.cascade_decode.parameters import pieces_bytes_at_most

    heads = (dtype, model_config.head_dim, model_config.num_heads, model_config.num_kv_heads)
    sizes = (max_num_seqs, MAX_GROUPS + 1, max_model_len)
    return pieces_bytes_at_most(*heads, *sizes, current_target(device), kv_dtype)


def free_memory_bytes(device: torch.device, utilization: float) -> int:
    """What pages and activations may take now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - utilization) * total)
    return int(_available_host_bytes() * CPU_SHARE_OF_FREE_MEMORY)


def _available_host_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _cgroup_free_bytes())
    except OSError:
        pass
    return 4 * 2**30


def _cgroup_free_bytes() -> int:
    """What a container's memory limit leaves; without a limit, very much."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
