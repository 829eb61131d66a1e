"""Headers of safetensors files, checked against the file before anything is allocated. No torch.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.config import ConfigError
from quire.models.json_fields import is_integer, parse_json_object

MAX_HEADER_BYTES = 100 * 10**6
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` bytes of `path` from `start` on, row-major, little-endian."""

    path: Path
    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name.

    Raises:
        ConfigError: the file cannot be read; its header is over 100 MB, over the file's size or not as the format says;
            the tensors do not fill the rest of the file one after another; a size is not that of shape and dtype.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _damaged(path, f"its header claims {header_bytes} of the file's {file_bytes} bytes")
            header = parse_json_object(file.read(header_bytes))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise _damaged(path, "its header is not a JSON object") from error
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    entries = {name: _entry(path, name, fields, data_start) for name, fields in header.items()}
    end = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != end:
            raise _damaged(path, f"its tensors leave a gap or overlap at byte {end}")
        end += entry.num_bytes
    if end != file_bytes:
        raise _damaged(path, f"its tensors end at byte {end}, the file at {file_bytes}")
    return entries


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
            pass
        case _:
            raise _damaged(path, f"tensor {name[:80]!r} lacks dtype, shape or offsets")
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"{path}: dtype {dtype[:20]!r} of tensor {name[:80]!r} is not supported.")
    if len(shape) > 8 or not all(is_integer(number) and number >= 0 for number in (*shape, start, end)):
        raise _damaged(path, f"shape or offsets of tensor {name[:80]!r} are no sizes")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(path, f"tensor {name[:80]!r} is not as long as its shape and dtype say")
    return TensorEntry(path, dtype, tuple(shape), data_start + start, end - start)


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is damaged: {why}; download it again.")
