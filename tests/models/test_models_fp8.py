"""Checkpoints whose weights are stored in fp8: read as other dtypes, and computed with as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from quire.config import ConfigError
from quire.models.config import ModelConfig
from quire.models.fp8_checkpoint import Fp8Checkpoint, read_fp8
from quire.models.json_fields import JsonFields

Checkpoint = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
PROMPT = list(range(3, 40))
FLOATS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": FLOATS | {"strategy": "channel"},
            "input_activations": FLOATS | {"strategy": "token", "dynamic": True},
        }
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "channel": COMPRESSED_TENSORS,
    "tensor": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "block": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 40]},
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def scales_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """As a checkpoint of this kind stores them, without fixing their dtype."""
    if kind == "channel":
        return weight.abs().amax(dim=1, keepdim=True) / 448
    if kind == "tensor":
        return weight.abs().max() / 448
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, (16, 40), strict=True))
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = weight[row * 16 : (row + 1) * 16, column * 40 : (column + 1) * 40]
            scales[row, column] = block.abs().max() / 448
    return scales


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale for each element."""
    if scales.dim() < 2 or scales.shape[1] == 1:
        return scales.expand(shape)
    return scales.repeat_interleave(16, 0).repeat_interleave(40, 1)[: shape[0], : shape[1]]


def rounded(directory: Path, kind: str) -> tuple[Tensors, Tensors]:
    """The checkpoint's tensors in fp8 of this kind, and what they stand for."""
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    meant = dict(stored)
    for name, weight in list(stored.items()):
        if not name.endswith("_proj.weight"):
            continue
        base = name.removesuffix("weight")
        scales = scales_of(weight, kind)
        if kind == "channel":
            scales = scales.bfloat16()  # llm-compressor stores the model's dtype
        codes = (weight / spread(scales.float(), weight.shape)).clamp(-448, 448).to(E4M3)
        meant[name] = codes.float() * spread(scales.float(), weight.shape)
        stored[name] = codes
        stored[base + ("weight_scale_inv" if kind == "block" else "weight_scale")] = scales
        if kind == "tensor":
            stored[base + "input_scale"] = torch.tensor(0.02)
    return stored, meant


@pytest.fixture
def write(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny Llama with the tensors and the quantization_config given."""

    def write(name: str, tensors: Tensors | None = None, quantization: dict[str, Any] | None = None) -> Path:
        directory = tmp_path / name
        shutil.copytree(tiny_checkpoint("llama"), directory, dirs_exist_ok=True)
        if tensors is not None:
            safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        if quantization is not None:
            path = directory / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
        return directory

    return write


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_read_as_what_it_stands_for(
    kind: str, dtype: torch.dtype, write: Callable[..., Path], paged_runner: Callable[..., Any]
) -> None:
    """Bit for bit the model whose checkpoint holds the products of codes and scales."""
    stored, meant = rounded(write("plain"), kind)
    found = paged_runner(write("fp8", stored, CONFIGS[kind]), dtype).step({"a": PROMPT}, every_token=True)["a"]
    expected = paged_runner(write("meant", meant), dtype).step({"a": PROMPT}, every_token=True)["a"]
    unrounded = paged_runner(write("plain"), dtype).step({"a": PROMPT}, every_token=True)["a"]
    assert torch.equal(found, expected)
    assert (found - unrounded).abs().max() > 1e-2  # else equality would say nothing


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_is_computed_with_as_it_is(kind: str, write: Callable[..., Path], paged_runner: Callable[..., Any]) -> None:
    """The inputs' rounding is all that sets it apart; the weights take one byte."""
    stored, meant = rounded(write("plain"), kind)
    kept = paged_runner(write("fp8", stored, CONFIGS[kind]), keeps_fp8=True)
    read = paged_runner(write("meant", meant))
    found, expected = (runner.step({"a": PROMPT}, every_token=True)["a"] for runner in (kept, read))
    assert 0.0 < (found - expected).norm() / expected.norm() < 0.15
    num_weights = sum(weight.numel() for name, weight in meant.items() if name.endswith("_proj.weight"))
    num_scales = sum(len(weight) for name, weight in meant.items() if name.endswith("_proj.weight"))
    assert read.model.weight_bytes - kept.model.weight_bytes == 3 * num_weights - 4 * num_scales


def test_rounding_at_load_is_what_the_checkpoint_of_the_same_rounding_gives(
    write: Callable[..., Path], paged_runner: Callable[..., Any]
) -> None:
    plain = write("plain")
    stored = safetensors.torch.load_file(plain / "model.safetensors")
    for name, weight in list(stored.items()):
        if name.endswith("_proj.weight"):
            scales = weight.abs().amax(dim=1, keepdim=True) / 448
            stored[name] = (weight / scales).to(E4M3)
            stored[name.replace("weight", "weight_scale")] = scales
    kept = paged_runner(write("fp8", stored, CONFIGS["channel"]), keeps_fp8=True)
    at_load = paged_runner(plain, quantization="fp8")
    found, expected = (runner.step({"a": PROMPT}, every_token=True)["a"] for runner in (at_load, kept))
    assert torch.equal(found, expected)
    assert at_load.model.weight_bytes == kept.model.weight_bytes


def test_layers_that_were_left_out_stay_as_they_are(
    write: Callable[..., Path], paged_runner: Callable[..., Any]
) -> None:
    """A fused layer of which a part is not in fp8 is read whole."""
    stored, meant = rounded(write("plain"), "channel")
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        stored[name] = meant[name]
        del stored[name.replace("weight", "weight_scale")]
    kept = paged_runner(write("fp8", stored, CONFIGS["channel"]), keeps_fp8=True)
    read = paged_runner(write("meant", meant))
    found, expected = (runner.step({"a": PROMPT}, every_token=True)["a"] for runner in (kept, read))
    assert 0.0 < (found - expected).norm() / expected.norm() < 0.15


WEIGHT = "model.layers.1.mlp.down_proj.weight"
SCALE = WEIGHT + "_scale"


def with_nan(tensors: Tensors) -> None:
    tensors[WEIGHT].view(torch.uint8)[3, 4] = 0xFF


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("channel", lambda t: t.pop(SCALE), "has no 'weight_scale'"),
        ("channel", lambda t: t.update({SCALE: t[SCALE][1:].clone()}), "does not fit"),
        ("block", lambda t: t.update({f"{SCALE}_inv": t[f"{SCALE}_inv"][:1].clone()}), "does not fit"),
        ("channel", with_nan, "not a number"),
        ("tensor", lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}), "of no use"),
    ],
)
@pytest.mark.parametrize("keeps_fp8", [False, True])
def test_damaged_checkpoints(
    kind: str,
    change: Callable[[Tensors], Any],
    message: str,
    keeps_fp8: bool,
    write: Callable[..., Path],
    paged_runner: Callable[..., Any],
) -> None:
    stored, _ = rounded(write("plain"), kind)
    change(stored)
    with pytest.raises(ConfigError, match=message):
        paged_runner(write("fp8", stored, CONFIGS[kind]), keeps_fp8=keeps_fp8 and kind != "block")


def test_fp8_that_config_json_does_not_name(write: Callable[..., Path], paged_runner: Callable[..., Any]) -> None:
    stored, _ = rounded(write("plain"), "channel")
    with pytest.raises(ConfigError, match=r"of which config\.json says nothing"):
        paged_runner(write("fp8", stored))


@KINDS
def test_what_config_json_says(kind: str, write: Callable[..., Path]) -> None:
    expected = Fp8Checkpoint((16, 40) if kind == "block" else None)
    assert ModelConfig.from_hf(write("fp8", None, CONFIGS[kind])).fp8 == expected
    assert ModelConfig.from_hf(write("plain")).fp8 is None


def group(**changes: Any) -> dict[str, Any]:
    fields = COMPRESSED_TENSORS["config_groups"]["group_0"] | changes  # type: ignore[index]
    return COMPRESSED_TENSORS | {"config_groups": {"group_0": fields}}


def test_blocks_of_compressed_tensors() -> None:
    blocks = group(weights=FLOATS | {"strategy": "block", "block_structure": [128, 128]})
    assert read_fp8(JsonFields("config.json", {"quantization_config": blocks})) == Fp8Checkpoint((128, 128))
    assert read_fp8(JsonFields("config.json", {"quantization_config": {}})) is None


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "weights in 'awq' are not supported; use a checkpoint in fp8"),
        ({}, None),
        ("fp8", "must be an object"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'fmt' must be None or e4m3"),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "'activation_scheme' must be"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "'weight_block_size' must be two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "'weight_block_size' must be two sizes"),
        (COMPRESSED_TENSORS | {"format": "int-quantized"}, "'compressed-tensors int-quantized' are not supported"),
        (COMPRESSED_TENSORS | {"kv_cache_scheme": FLOATS}, "'kv_cache_scheme' must be null"),
        (COMPRESSED_TENSORS | {"config_groups": {}}, "has no 'config_groups'"),
        (COMPRESSED_TENSORS | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'format' must be dense"),
        (group(weights=FLOATS | {"strategy": "group"}), "'strategy' must be tensor or channel or block"),
        (group(weights=FLOATS | {"strategy": "channel", "num_bits": 4}), "'num_bits' must be 8"),
        (group(weights=FLOATS | {"strategy": "channel", "type": "int"}), "'type' must be float"),
        (group(weights=None), "has no 'weights'"),
        (group(output_activations=FLOATS), "'output_activations' must be None"),
    ],
    ids=str,
)
def test_what_is_refused(quantization: Any, message: str | None) -> None:
    fields = JsonFields("config.json", {"quantization_config": quantization})
    if message is None:
        assert read_fp8(fields) is None
        return
    with pytest.raises(ConfigError, match=message):
        read_fp8(fields)
