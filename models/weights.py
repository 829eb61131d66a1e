"""The tensors of a checkpoint, taken by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from quire.config import ConfigError, Quantization
from quire.models.fp8_checkpoint import Fp8Checkpoint
from quire.models.json_fields import JsonFields
from quire.models.safetensors_file import TensorEntry, read_entries

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SCALE_NAMES = ("weight_scale", "weight_scale_inv")  # both are multiplied with
CHUNK_BYTES = 8 * 2**20

_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class Weights:
    """Tensors by name, in one dtype and on one device; each is taken once.

    A tensor is read straight into the memory it will stay in, or through a buffer of CHUNK_BYTES where dtype or device
    are others, so loading takes one copy of the weights and little more. Files are read and never mapped: a mapped file
    that is overwritten later would change the model in silence, and one that is cut short would kill the process.

    Args:
        progress: called with (bytes of the files read so far, bytes in all).
        quantization: to what layers round the weights that they take.
        fp8: how weights that are stored in fp8 are scaled.
        keeps_fp8: layers compute with weights that are stored in fp8 as they are; otherwise these become `dtype`.
    """

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
        quantization: Quantization | None = None,
        fp8: Fp8Checkpoint | None = None,
        *,
        keeps_fp8: bool = False,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.quantization = quantization
        self.num_bytes = 0
        """Bytes of all tensors handed out, or of what they were rounded to."""
        self._fp8 = fp8
        self._keeps_fp8 = keeps_fp8
        self._entries = dict(entries)
        self._progress = progress
        self._total = sum(entry.num_bytes for entry in entries.values())
        self._done = 0

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def remaining(self) -> set[str]:
        """Names of the tensors that were not taken."""
        return set(self._entries)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Take a tensor; raise ConfigError if there is none of this name and shape."""
        return self.stacked({name: shape[0]}, *shape[1:])

    def stacked(self, rows: Mapping[str, int], *trailing: int) -> torch.Tensor:
        """Take tensors [rows[name], *trailing], one below the other in one tensor [sum of rows, *trailing]."""
        return self._stacked(rows, trailing, self.dtype)

    def matrix(self, rows: Mapping[str, int], columns: int) -> torch.Tensor:
        """As `stacked`, for a layer that multiplies `dtype` with narrower weights: in the dtype that they are stored in
        where that is one of 16 bits, all are float32 otherwise and the device is a CPU. Not a bit is lost, and a small
        step reads half as much."""
        stored = {entry.dtype for name in rows if (entry := self._entries.get(name)) is not None}
        is_narrow = len(stored) == 1 and stored <= {"BF16", "F16"}
        if self.device.type != "cpu" or self.dtype != torch.float32 or not is_narrow:
            return self.stacked(rows, columns)
        return self._stacked(rows, (columns,), _TORCH_DTYPES[stored.pop()])

    def _stacked(self, rows: Mapping[str, int], trailing: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        entries = {name: self._take(name, (num_rows, *trailing)) for name, num_rows in rows.items()}
        out = torch.empty((sum(rows.values()), *trailing), dtype=dtype, device=self.device)
        for (name, entry), part in zip(entries.items(), out.split(list(rows.values())), strict=True):
            if entry.dtype == "F8_E4M3":
                self._dequantize(name, entry, part)
            else:
                self._read(entry, part)
        self.num_bytes += out.nbytes
        return out

    def stacked_fp8(self, rows: Mapping[str, int], columns: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take weights [rows[name], columns] as they are stored in fp8, one below the other.

        Returns:
            codes [sum of rows, columns] float8_e4m3fn and scales [sum of rows] float32; None, and nothing is taken, if
            one is stored otherwise, or fp8 is not to be kept.
        """
        stored = [self._entries.get(name) for name in rows]
        if not self._keeps_fp8 or not all(entry is not None and entry.dtype == "F8_E4M3" for entry in stored):
            return None
        codes = torch.empty((sum(rows.values()), columns), dtype=torch.float8_e4m3fn, device=self.device)
        scales = torch.empty(len(codes), dtype=torch.float32, device=self.device)
        sizes = list(rows.values())
        for name, part, scale in zip(rows, codes.split(sizes), scales.split(sizes), strict=True):
            entry = self._take(name, tuple(part.shape))
            self._read_codes(entry, part)
            scale.copy_(self._scales(name, entry)[:, 0])
        self.num_bytes += codes.nbytes + scales.nbytes
        return codes, scales

    def transposed(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Take a matrix that is stored as [columns, rows], as a contiguous [rows, columns]."""
        stored = self.matrix({name: columns}, rows)
        return stored.t().contiguous()

    def replaced(self, tensor: torch.Tensor, num_bytes: int) -> None:
        """A layer keeps `num_bytes` instead of a tensor that it took."""
        self.num_bytes += num_bytes - tensor.nbytes

    def skip_copy(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor that only repeats `tensor`, if it is there at all; raise ConfigError if it differs."""
        if name not in self._entries:
            return
        entry = self._take(name, tuple(tensor.shape))
        if entry.dtype == "F8_E4M3":
            raise ConfigError(f"{entry.path}: {name!r} is in fp8; set 'tie_word_embeddings' to false in config.json.")
        flat = tensor.view(-1)
        for start, values in self._chunks(entry):
            if not torch.equal(values.to(self.dtype), flat[start : start + len(values)].cpu().to(self.dtype)):
                raise ConfigError(
                    f"{entry.path}: {name!r} is not the tensor it is tied to; "
                    "set 'tie_word_embeddings' to false in config.json."
                )

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self._entries.pop(name, None)
        if entry is None:
            raise ConfigError(
                f"Tensor {name!r} is missing; the checkpoint is incomplete or config.json describes another model."
            )
        if entry.shape != shape:
            raise ConfigError(f"{entry.path}: tensor {name!r} has shape {entry.shape}, config.json asks for {shape}.")
        if entry.dtype not in _TORCH_DTYPES:
            raise ConfigError(
                f"{entry.path}: tensor {name!r} is {entry.dtype}, which is not supported; use a checkpoint in fp8, "
                "float16 or bfloat16."
            )
        return entry

    def _dequantize(self, name: str, entry: TensorEntry, out: torch.Tensor) -> None:
        """Fill `out` with a weight that is stored in fp8, rounded to out's dtype."""
        codes = torch.empty(entry.shape, dtype=torch.float8_e4m3fn, device=self.device)
        self._read_codes(entry, codes)
        scales = self._scales(name, entry)
        block = self._fp8.block if self._fp8 is not None else None
        rows_per_part = 1024 if block is None else block[0]
        for start in range(0, len(codes), rows_per_part):
            rows = slice(start, start + rows_per_part)
            if block is None:
                scale = scales[rows]
            else:
                scale = scales[start // block[0]].repeat_interleave(block[1])[: codes.shape[1]]
            out[rows] = (codes[rows].float() * scale).to(out.dtype)

    def _read_codes(self, entry: TensorEntry, out: torch.Tensor) -> None:
        self._read(entry, out)
        if bool(((out.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise ConfigError(f"{entry.path} holds weights that are not a number; use another checkpoint.")

    def _scales(self, name: str, entry: TensorEntry) -> torch.Tensor:
        """Take the scales of a weight [N, K]: [N, 1] float32 or, of blocks, [blocks of N, blocks of K]."""
        if self._fp8 is None or len(entry.shape) != 2:
            raise ConfigError(
                f"{entry.path}: {name!r} is in fp8, of which config.json says nothing; download the checkpoint again."
            )
        base = name.removesuffix("weight")
        self._entries.pop(f"{base}input_scale", None)  # inputs are rounded by token, or not at all
        scale_name = next((base + kind for kind in _SCALE_NAMES if base + kind in self._entries), None)
        if scale_name is None:
            raise ConfigError(
                f"{entry.path}: {name!r} is in fp8 and has no 'weight_scale'; the checkpoint is incomplete."
            )
        num_rows, block = entry.shape[0], self._fp8.block
        if block is None:
            shapes = [(num_rows, 1), (num_rows,), (1,), (), (1, 1)]
        else:
            shapes = [tuple(-(-size // part) for size, part in zip(entry.shape, block, strict=True))]
        shape = self._entries[scale_name].shape
        if shape not in shapes:
            raise ConfigError(
                f"{entry.path}: {scale_name!r} has shape {shape}, which does not fit {name!r} of {entry.shape} and "
                "config.json's 'quantization_config'."
            )
        scales = torch.empty(shape, dtype=torch.float32, device=self.device)
        self._read(self._take(scale_name, shape), scales)
        return scales if block is not None else scales.reshape(-1, 1).expand(num_rows, 1)

    def _read(self, entry: TensorEntry, out: torch.Tensor) -> None:
        """Fill `out`, contiguous and of as many elements as the entry."""
        flat = out.view(-1)
        in_place = out.dtype == _TORCH_DTYPES[entry.dtype] and out.device.type == "cpu"
        for start, values in self._chunks(entry, flat if in_place else None):
            if not in_place:
                flat[start : start + len(values)].copy_(values)

    def _chunks(self, entry: TensorEntry, target: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the first, elements as stored) piece by piece; a piece is part of the flat `target`, or without one
        valid until the next is asked for.
        """
        dtype = _TORCH_DTYPES[entry.dtype]
        num_elements = math.prod(entry.shape)
        step = max(1, min(num_elements, CHUNK_BYTES // dtype.itemsize))
        buffer = torch.empty(step, dtype=dtype) if target is None else target
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                for start in range(0, num_elements, step):
                    begin = 0 if target is None else start
                    values = buffer[begin : begin + min(step, num_elements - start)]
                    _fill(values.view(torch.uint8).numpy().data, file.readinto, entry.path)
                    yield start, values
                    self._done += values.nbytes
                    self._progress(self._done, self._total)
        except OSError as error:
            raise ConfigError(f"{entry.path} cannot be read: {error.strerror}.") from error


def _fill(target: memoryview, readinto: Callable[[memoryview], int | None], path: Path) -> None:
    while target:
        count = readinto(target)
        if not count:
            raise ConfigError(f"{path} became shorter while it was read; download it again.")
        target = target[count:]


def find_entries(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of the checkpoint: of model.safetensors, or of the shards that model.safetensors.index.json names.

    Files may be symbolic links, as in the hub's cache; names in the index that would leave the directory are refused.

    Raises:
        ConfigError: there is neither file, or one is damaged, or index and shards do not agree.
    """
    if (directory / SINGLE_FILE).is_file():
        return read_entries(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).is_file():
        raise _no_weights(directory)
    index = JsonFields.read(directory / INDEX_FILE).optional_object("weight_map") or JsonFields("", {})
    shards = {name: _shard_name(directory, index.raw(name)) for name in index.names()}
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(shards.values())):
        for name, entry in read_entries(directory / shard).items():
            if shards.get(name) != shard:
                raise ConfigError(f"{directory / shard} holds {name[:80]!r}, which {INDEX_FILE} does not list there.")
            entries[name] = entry
    absent = sorted(shards.keys() - entries.keys())
    if absent:
        raise ConfigError(f"{directory / shards[absent[0]]} lacks {absent[0][:80]!r}, which {INDEX_FILE} lists there.")
    return entries


def _no_weights(directory: Path) -> ConfigError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        return ConfigError(
            f"{directory} holds {pickles[0]}: a pickle can run code, so only safetensors are read; convert it with "
            "transformers' save_pretrained where you trust it."
        )
    return ConfigError(f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}; download or convert the weights.")


def _shard_name(directory: Path, value: object) -> str:
    if not isinstance(value, str) or not _SHARD.fullmatch(value):
        raise ConfigError(
            f"{directory / INDEX_FILE} names {str(value)[:80]!r}; a shard is a .safetensors file beside it."
        )
    return value
