"""From a checkpoint's directory to a model that can run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from quire.config import ConfigError, Quantization
from quire.models.config import ModelConfig
from quire.models.model import Model
from quire.models.registry import MODELS
from quire.models.weights import Weights, find_entries

IGNORED_TENSORS = re.compile(r"(\.rotary_emb\.inv_freq|\bh\.\d+\.attn\.(bias|masked_bias))$")
"""Constants that older versions of transformers stored: RoPE frequencies, causal masks of GPT-2."""


def _no_progress(done: int, total: int) -> None:
    return


def load_model(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None = None,
    quantization: Quantization | None = None,
    keeps_fp8: bool = False,
    progress: Callable[[int, int], None] = _no_progress,
) -> Model:
    """Load the safetensors of a checkpoint; nothing else in the directory is read or run.

    Args:
        directory: holds model.safetensors, or its shards with model.safetensors.index.json.
        config: read from the same directory.
        dtype: to which all weights are cast, and in which the model computes.
        max_model_len: longest sequence that will be run, in tokens; None: all that the model can.
        quantization: to what the weights of linear layers are rounded, on a CPU those of embedding and head too.
        keeps_fp8: layers whose weights are stored in fp8 compute with them; otherwise these are read as `dtype`.
        progress: called with (bytes read, bytes in all).

    Raises:
        ConfigError: files are missing or damaged, tensors are missing, left over or of another shape than `config`
            says, or the weights do not fit on the device.
    """
    num_positions = config.max_position_embeddings if max_model_len is None else max_model_len
    if num_positions > config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {num_positions} is longer than the {config.max_position_embeddings} positions of this "
            f"model; use at most {config.max_position_embeddings}."
        )
    entries = find_entries(Path(directory))
    weights = Weights(entries, dtype, device, progress, quantization, config.fp8, keeps_fp8=keeps_fp8)
    try:
        with torch.no_grad():
            model = MODELS[config.architecture](config, weights, num_positions)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"The weights do not fit on {device}; use a smaller model or --device cpu.") from error
    unknown = sorted(name for name in weights.remaining() if not IGNORED_TENSORS.search(name))
    if unknown:
        raise ConfigError(
            f"{directory}: {len(unknown)} tensors are of no use to {config.architecture}, {unknown[0][:80]!r} first; "
            "config.json describes another model."
        )
    return model
