"""Loading: every file a checkpoint may consist of, and every way in which it can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.config import ConfigError
from quire.models.config import ModelConfig
from quire.models.loading import load_model
from quire.models.safetensors_file import read_entries

CPU = torch.device("cpu")
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint that the test may damage."""

    def copy(family: str = "llama", **overrides: Any) -> Path:
        shutil.copytree(tiny_checkpoint(family, **overrides), tmp_path / "model", dirs_exist_ok=True)
        return tmp_path / "model"

    return copy


Checkpoint = Callable[..., Path]


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return load_model(directory, ModelConfig.from_hf(directory), dtype=dtype, device=CPU, **options)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = FILE) -> None:
    """Rewrite a file after `change` of its tensors."""
    tensors = safetensors.torch.load_file(directory / file)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / file)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], Any], file: str = FILE) -> None:
    raw = (directory / file).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def logits(directory: Path, paged_runner: Callable[..., Any]) -> torch.Tensor:
    return paged_runner(directory).step({"a": [5, 6, 7]})["a"]


def test_progress_and_weight_bytes(checkpoint: Checkpoint) -> None:
    directory = checkpoint(max_shard_size="40KB")
    steps: list[tuple[int, int]] = []
    model = load(directory, torch.bfloat16, max_model_len=10, progress=lambda *step: steps.append(step))
    stored = json.loads((directory / INDEX).read_text())["metadata"]["total_size"]
    assert steps[-1] == (stored, stored)
    assert steps == sorted(steps)
    assert model.weight_bytes == stored // 2 + 10 * 16 * 4


@pytest.mark.parametrize("max_model_len", [None, 512])
def test_positions(checkpoint: Checkpoint, max_model_len: int | None) -> None:
    load(checkpoint(), max_model_len=max_model_len)
    with pytest.raises(ConfigError, match=r"--max-model-len 513 is longer than the 512 positions .* at most 512"):
        load(checkpoint(), max_model_len=513)


def test_a_tensor_read_in_many_pieces(
    checkpoint: Checkpoint, paged_runner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(checkpoint(), paged_runner)
    monkeypatch.setattr("quire.models.weights.CHUNK_BYTES", 1000)
    assert torch.equal(logits(checkpoint(), paged_runner), expected)


def test_shards_linked_into_a_hub_cache(checkpoint: Checkpoint, paged_runner: Callable[..., Any]) -> None:
    directory = checkpoint(max_shard_size="40KB")
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for path in list(directory.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../blobs") / path.name)
    assert torch.isfinite(logits(directory, paged_runner)).all()


def test_gpt2_without_prefix_and_with_stored_masks(checkpoint: Checkpoint, paged_runner: Callable[..., Any]) -> None:
    directory = checkpoint("gpt2")
    expected = logits(directory, paged_runner)

    def as_published(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit(directory, as_published)
    assert torch.equal(logits(directory, paged_runner), expected)


def test_stored_rope_frequencies_are_ignored(checkpoint: Checkpoint) -> None:
    directory = checkpoint()
    edit(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(directory)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(checkpoint: Checkpoint) -> None:
    directory = checkpoint(tie_word_embeddings=True)
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(directory)
    edit(directory, lambda t: t["lm_head.weight"][-1, -1].add_(1))
    with pytest.raises(ConfigError, match="set 'tie_word_embeddings' to false"):
        load(directory)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_matrices_stored_in_16_bits_stay_so_beside_float32(checkpoint: Checkpoint, family: str, stored: str) -> None:
    directory = checkpoint(family, dtype=stored)
    narrow = load(directory).weight_bytes
    edit(directory, lambda t: t.update({name: tensor.float() for name, tensor in t.items()}))
    assert 0.5 * load(directory).weight_bytes <= narrow < 0.65 * load(directory).weight_bytes
    assert load(directory, getattr(torch, stored)).weight_bytes <= narrow


def test_a_tied_head_in_another_dtype_is_compared_in_float32(checkpoint: Checkpoint) -> None:
    directory = checkpoint(tie_word_embeddings=True, dtype="bfloat16")
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].float()}))
    load(directory)
    edit(directory, lambda t: t["lm_head.weight"][-1, -1].mul_(1.001))  # bfloat16 would not show it
    with pytest.raises(ConfigError, match="set 'tie_word_embeddings' to false"):
        load(directory)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_missing_tensor(checkpoint: Checkpoint, name: str) -> None:
    directory = checkpoint()
    edit(directory, lambda t: t.pop(name))
    with pytest.raises(ConfigError, match=f"Tensor '{name}' is missing"):
        load(directory)


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 321}, {"hidden_size": 128}, {"intermediate_size": 97}, {"num_key_value_heads": 4}, {"head_dim": 8}],
)
def test_config_of_another_shape(checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    directory = checkpoint()
    edit_config(directory, **changes)
    with pytest.raises(ConfigError, match=r"has shape \(.*\), config\.json asks for \("):
        load(directory)


def test_a_vocabulary_that_would_not_fit_in_memory_is_refused_before_it_is_allocated(checkpoint: Checkpoint) -> None:
    directory = checkpoint()
    edit_config(directory, vocab_size=2**31 - 1, intermediate_size=2**31 - 1)
    with pytest.raises(ConfigError, match="asks for"):
        load(directory)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "x"])
def test_left_over_tensor(checkpoint: Checkpoint, name: str) -> None:
    directory = checkpoint()
    edit(directory, lambda t: t.update({name: torch.zeros(64)}))
    with pytest.raises(ConfigError, match=f"1 tensors are of no use to LlamaForCausalLM, '{name}' first"):
        load(directory)


def test_quantized_tensor(checkpoint: Checkpoint) -> None:
    directory = checkpoint()
    name = "model.layers.0.mlp.up_proj.weight"
    edit(directory, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(ConfigError, match="is I8, which is not supported; use a checkpoint in fp8"):
        load(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_read(checkpoint: Checkpoint, file: str) -> None:
    directory = checkpoint()
    (directory / FILE).rename(directory / file)
    with pytest.raises(ConfigError, match=rf"holds {file}: a pickle can run code, so only safetensors are read"):
        load(directory)


def test_no_weights_at_all(checkpoint: Checkpoint) -> None:
    directory = checkpoint()
    (directory / FILE).unlink()
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json"):
        load(directory)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", 7])
def test_an_index_that_leaves_the_directory(checkpoint: Checkpoint, shard: Any) -> None:
    directory = checkpoint()
    shutil.copy(directory / FILE, directory.parent / "other.safetensors")
    (directory / FILE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ConfigError, match=r"a shard is a \.safetensors file beside it"):
        load(directory)


def test_index_and_shards_that_do_not_agree(checkpoint: Checkpoint) -> None:
    directory = checkpoint(max_shard_size="40KB")
    index = json.loads((directory / INDEX).read_text())
    weight_map = index["weight_map"]
    first = weight_map["lm_head.weight"]

    def check(changed: dict[str, Any], message: str) -> None:
        (directory / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ConfigError, match=message):
            load(directory)

    check(weight_map | {"new.weight": first}, f"{first} lacks 'new.weight', which")
    check({k: v for k, v in weight_map.items() if k != "lm_head.weight"}, "'lm_head.weight'.*missing|does not list")
    check({}, "is missing")
    (directory / first).unlink()
    check(weight_map, f"{first} cannot be read: No such file")


def entry(header: dict[str, Any], **changes: Any) -> None:
    """Change the first tensor of a header, which lies at the start of the data."""
    next(fields for fields in header.values() if fields.get("data_offsets", [1])[0] == 0).update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: entry(h, shape=[2**62, 2**62]), "is not as long as its shape and dtype say"),
        (lambda h: entry(h, shape=[-1, -64]), "are no sizes"),
        (lambda h: entry(h, shape=[1.0]), "are no sizes"),
        (lambda h: entry(h, shape=None), "lacks dtype, shape or offsets"),
        (lambda h: entry(h, dtype="F16"), "is not as long"),
        (lambda h: entry(h, dtype="COMPLEX"), "dtype 'COMPLEX'"),
        (lambda h: entry(h, dtype=None), "lacks dtype, shape or offsets"),
        (lambda h: entry(h, data_offsets=[0]), "lacks dtype, shape or offsets"),
        (lambda h: entry(h, data_offsets=[-8, 0], shape=[2]), "are no sizes"),
        (lambda h: entry(h, data_offsets=[4, 0], shape=[1]), "is not as long"),
        (lambda h: entry(h, data_offsets=[0, 4], shape=[1]), "leave a gap or overlap"),
        (lambda h: h.update(new={"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}), "leave a gap or overlap"),
        (lambda h: h.update(new={"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}), "gap or overlap"),
        (lambda h: h.update(new=3), "lacks dtype, shape or offsets"),
    ],
)
def test_damaged_header(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    directory = checkpoint()
    rewrite_header(directory, change)
    with pytest.raises(ConfigError, match=message) as raised:
        load(directory)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "its header claims 0 of the file's 0 bytes"),
        (lambda raw: raw[:5], "is damaged"),
        (lambda raw: raw[:100], "its header claims"),
        (lambda raw: raw[:-1], "its tensors end at byte"),
        (lambda raw: raw + b"\0", "its tensors end at byte"),
        (lambda raw: (2**63).to_bytes(8, "little") + raw[8:], "its header claims"),
        (lambda raw: (200).to_bytes(8, "little") + raw[8:], "not a JSON object"),
        (lambda raw: (100_000).to_bytes(8, "little") + b"[" * 100_000, "not a JSON object"),
    ],
)
def test_damaged_file(checkpoint: Checkpoint, damage: Callable[[bytes], bytes], message: str) -> None:
    directory = checkpoint()
    (directory / FILE).write_bytes(damage((directory / FILE).read_bytes()))
    with pytest.raises(ConfigError, match=message):
        load(directory)


def test_a_header_over_100_mb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with path.open("wb") as file:  # sparse
        file.write((100 * 10**6 + 1).to_bytes(8, "little"))
        file.truncate(300 * 10**6)
    with pytest.raises(ConfigError, match="its header claims 100000001 of the file's 300000000 bytes"):
        read_entries(path)


def test_a_file_cut_after_its_header_was_read(checkpoint: Checkpoint) -> None:
    directory = checkpoint()

    def cut(done: int, total: int) -> None:
        with (directory / FILE).open("r+b") as file:
            file.truncate(2000)

    with pytest.raises(ConfigError, match="became shorter while it was read"):
        load(directory, progress=cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_to_a_header_is_refused_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}
    raw = bytearray(safetensors.torch.save(tensors))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path / FILE
    path.write_bytes(raw)
    try:
        entries = read_entries(path)
    except ConfigError:
        return
    assert sum(entry.num_bytes for entry in entries.values()) <= len(raw)
    assert all(8 <= entry.start <= entry.start + entry.num_bytes <= len(raw) for entry in entries.values())


PEAK = """
import resource, sys, torch
from pathlib import Path
from quire.models.config import ModelConfig
from quire.models.loading import load_model
directory = Path(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_model(directory, ModelConfig.from_hf(directory), dtype=torch.bfloat16, device=torch.device("cpu"))
print((peak() - before) / model.weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_loading_takes_one_copy_of_the_weights(tmp_path: Path) -> None:
    """float32 on disk, bfloat16 in memory: 128 MiB of weights, where a second copy would show."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 2**16,
        "hidden_size": 512,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {f"self_attn.{part}_proj": (8, 512) for part in "qkv"} | {"self_attn.o_proj": (512, 8)}
    shapes |= {"mlp.gate_proj": (8, 512), "mlp.up_proj": (8, 512), "mlp.down_proj": (512, 8)}
    shapes |= {"input_layernorm": (512,), "post_attention_layernorm": (512,)}
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {"model.norm.weight": torch.zeros(512), "model.embed_tokens.weight": torch.zeros(2**16, 512)}
    tensors["lm_head.weight"] = torch.zeros(2**16, 512)
    safetensors.torch.save_file(tensors, tmp_path / FILE)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.25
