"""Which device and dtype a model runs in; decided once at start, said in one line when it is not what was asked."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from quire.config import ConfigError, EngineConfig, Quantization
from quire.kernels.cpu_tiles import has_tiles
from quire.kernels.fp8_linear import code_dtype
from quire.kernels.quantized_linear import is_fast_here
from quire.kernels.targets import current_target
from quire.models.config import ModelConfig
from quire.models.fp8_checkpoint import Fp8Checkpoint

log = logging.getLogger(__name__)

MAX_STEP_BUDGET = 2048
CPU_TOKENS_PER_THREAD = 64
CPU_TOKENS_PER_THREAD_IN_TILES = 128
MAX_GPU_HEAD_DIM = 256
"""Larger heads need more shared memory than there is."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu or install torch with CUDA.")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    major, minor = torch.cuda.get_device_capability()
    if major < 8 and torch.version.hip is None:
        raise ConfigError(
            f"This GPU has compute capability {major}.{minor}; the kernels need 8.0 or newer. Use --device cpu."
        )
    return torch.device("cuda", torch.cuda.current_device())


def require_kernels(model_config: ModelConfig, device: torch.device) -> None:
    """Raises ConfigError where no kernel for GPUs computes a model's attention; those for CPUs take any heads."""
    if device.type != "cpu" and model_config.head_dim > MAX_GPU_HEAD_DIM:
        raise ConfigError(
            f"The heads of this model have {model_config.head_dim} dimensions; the kernels for GPUs take up to "
            f"{MAX_GPU_HEAD_DIM}. Use --device cpu."
        )


def choose_dtype(config: EngineConfig, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: the checkpoint's dtype; on a CPU float32, unless the checkpoint and the processor both have bfloat16.

    Says in one line when this processor is not made for what was asked for.
    """
    if config.dtype != "auto":
        is_native = config.dtype == "float32" or (config.dtype == "bfloat16" and cpu_has_bfloat16())
        if device.type == "cpu" and not is_native:
            log.warning(
                "--dtype %s: this processor does not multiply it; --dtype float32 is faster, more exact, and keeps "
                "weights as they are stored.",
                config.dtype,
            )
        return DTYPES[config.dtype]
    if device.type == "cpu" and not (checkpoint_dtype == "bfloat16" and cpu_has_bfloat16()):
        return torch.float32
    return DTYPES.get(checkpoint_dtype, torch.float32)


def choose_quantization(config: EngineConfig, device: torch.device) -> Quantization | None:
    """As it was asked for; says in one line when this processor is not made for it."""
    if config.quantization is None:
        return None
    if config.quantization == "fp8":
        require_fp8_products(device)
        return config.quantization
    if device.type != "cpu":
        raise ConfigError(
            f"--quantization {config.quantization} is for CPUs; on a GPU leave it out, or add --device cpu."
        )
    if not is_fast_here():
        log.warning(
            "--quantization %s: this processor has no instruction for products of bytes (AVX-VNNI): a few streams "
            "are faster with the flag, many without it.",
            config.quantization,
        )
    return config.quantization


def require_fp8_products(device: torch.device) -> None:
    if device.type == "cpu":
        raise ConfigError("--quantization fp8 is for GPUs; on a CPU use --quantization int8.")
    if code_dtype(device) is None:
        raise ConfigError(
            "--quantization fp8: this GPU has no products of fp8, which NVIDIA's have from compute capability 8.9 on "
            "(L4, H100) and AMD's from MI300 on; leave it out."
        )


def keeps_fp8_weights(
    config: EngineConfig, checkpoint: Fp8Checkpoint | None, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether weights that are stored in fp8 are computed with as they are; says in one line why not."""
    if checkpoint is None:
        return False
    if device.type == "cpu" or code_dtype(device) is None:
        why = f"this {'CPU' if device.type == 'cpu' else 'GPU'} has no products of fp8"
    elif checkpoint.block is not None:
        why = "their scales are of blocks" + ("" if config.quantization else "; --quantization fp8 rounds them again")
    else:
        return True
    log.warning("the weights are stored in fp8 and are read as %s: %s.", dtype_name(dtype), why)
    return False


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; without it bfloat16 is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def choose_kv_cache_dtype(
    config: EngineConfig, checkpoint_dtype: str, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """`auto`: the model's dtype; where float32 is but what this processor computes in, the checkpoint's 16 bits."""
    if config.kv_cache_dtype == "auto":
        is_stand_in = device.type == "cpu" and config.dtype == "auto" and dtype == torch.float32
        return DTYPES.get(checkpoint_dtype, dtype) if is_stand_in else dtype
    if config.kv_cache_dtype == "int8":
        return torch.int8
    fp8 = None if device.type == "cpu" else current_target(device).fp8
    if fp8 is None:
        raise ConfigError(
            "--kv-cache-dtype fp8 needs an NVIDIA GPU of compute capability 8.9 or newer, or AMD's gfx942; "
            "use --kv-cache-dtype int8 here, it takes as much memory."
        )
    return fp8


def tokens_per_thread(dtype: torch.dtype, quantization: Quantization | None) -> int:
    """Tokens of a step for each thread of a CPU.

    Its matrix products are as fast as they get with some 64 rows a thread, and bound by arithmetic from there on: more
    tokens in a step only have every prompt wait for the others, and all decodes for the step. In tile registers
    arithmetic is so fast that 64 rows still wait for the weights.
    """
    in_tiles = dtype == torch.bfloat16 and quantization is None and has_tiles()
    return CPU_TOKENS_PER_THREAD_IN_TILES if in_tiles else CPU_TOKENS_PER_THREAD


def choose_step_budget(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None,
    max_num_seqs: int,
) -> int:
    """Tokens of one step, unless the configuration says."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    if device.type != "cpu" or not config.enable_chunked_prefill:
        return MAX_STEP_BUDGET
    num_tokens = tokens_per_thread(dtype, quantization) * torch.get_num_threads()
    return min(max(num_tokens, 128, 2 * max_num_seqs), MAX_STEP_BUDGET)


def choose_prompt_budget(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, quantization: Quantization | None
) -> int | None:
    """Tokens of prompts in a step that decodes too; None: what its budget leaves.

    On a CPU half of a step: products lose nothing by it (`kernels/linear` reads weights ahead), and both the decodes
    and the prompts that come next wait half as long.
    """
    if device.type != "cpu" or config.max_num_batched_tokens is not None:
        return None
    return tokens_per_thread(dtype, quantization) // 2 * torch.get_num_threads()


def schedules_ahead(config: EngineConfig, device: torch.device) -> bool:
    """Whether the next step is scheduled while one runs: on a GPU, which would be idle meanwhile, unless the
    configuration says."""
    return device.type != "cpu" if config.async_scheduling is None else config.async_scheduling


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
