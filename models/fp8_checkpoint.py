"""What config.json says of weights that are stored in fp8. No torch.

Two kinds of checkpoints are read: `quant_method: fp8` (transformers' and others', a scale for each tensor or for each
block of a weight) and `quant_method: compressed-tensors` with `format: float-quantized` (llm-compressor's).
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.config import ConfigError
from quire.models.json_fields import JsonFields, is_integer

_OFF: tuple[object, ...] = (None, False, {}, [])


@dataclass(frozen=True, slots=True)
class Fp8Checkpoint:
    """Some weights are float8_e4m3fn, times scales that are stored beside them.

    block: (output features, input features) that share a scale; None: each tensor or output feature has its own.
    """

    block: tuple[int, int] | None


def read_fp8(fields: JsonFields) -> Fp8Checkpoint | None:
    """None if the weights are not quantized.

    Scales that are stored for inputs are not used: inputs are rounded with scales of their own (or not at all).

    Raises:
        ConfigError: they are, in another way than named above.
    """
    if fields.raw("quantization_config") in _OFF:
        return None
    quantization = fields.optional_object("quantization_config") or JsonFields("", {})
    method = quantization.raw("quant_method")
    if quantization.raw("kv_cache_scheme") not in _OFF:
        raise quantization.error("kv_cache_scheme", "must be null: scales of the KV-cache are not read")
    if method == "fp8":
        _require(quantization, "fmt", (None, "e4m3"))
        _require(quantization, "activation_scheme", (None, "dynamic", "static"))
        return Fp8Checkpoint(_block(quantization, "weight_block_size"))
    if method == "compressed-tensors" and quantization.raw("format") == "float-quantized":
        return _read_compressed_tensors(quantization)
    kind = f"{method} {quantization.raw('format') or ''}".strip()
    raise ConfigError(
        f"{fields.source}: weights in {kind[:80]!r} are not supported; use a checkpoint in fp8 (quant_method fp8, or "
        "compressed-tensors float-quantized), float16 or bfloat16."
    )


def _read_compressed_tensors(quantization: JsonFields) -> Fp8Checkpoint:
    sparsity = quantization.optional_object("sparsity_config")
    if sparsity is not None and sparsity.raw("format") not in (None, "dense"):
        raise sparsity.error("format", "must be dense")
    groups = quantization.optional_object("config_groups") or JsonFields("", {})
    if not groups.names():
        raise quantization.missing("config_groups")
    blocks = {_block_of_group(groups.optional_object(name) or JsonFields("", {})) for name in groups.names()}
    if len(blocks) > 1:
        raise quantization.error("config_groups", "must have the same blocks in all groups")
    return Fp8Checkpoint(blocks.pop())


def _block_of_group(group: JsonFields) -> tuple[int, int] | None:
    _require(group, "output_activations", (None,))
    for name in ("weights", "input_activations"):
        numbers = group.optional_object(name)
        if numbers is None and name == "weights":
            raise group.missing(name)
        if numbers is not None:
            _require(numbers, "type", ("float",))
            _require(numbers, "num_bits", (8,))
            _require(numbers, "symmetric", (True,))
    weights = group.optional_object("weights") or JsonFields("", {})
    _require(weights, "dynamic", (None, False))
    _require(weights, "strategy", ("tensor", "channel", "block"))
    return _block(weights, "block_structure") if weights.raw("strategy") == "block" else None


def _block(fields: JsonFields, name: str) -> tuple[int, int] | None:
    value = fields.raw(name)
    match value:
        case None:
            return None
        case [rows, columns] if all(is_integer(size) and 0 < size <= 2**20 for size in value):
            return rows, columns
        case _:
            raise fields.error(name, "must be two sizes")


def _require(fields: JsonFields, name: str, allowed: tuple[object, ...]) -> None:
    if fields.raw(name) not in allowed:
        raise fields.error(name, f"must be {' or '.join(str(value) for value in allowed)}")
