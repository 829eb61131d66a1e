"""How kernels are launched on GPUs on which that was measured: small tables, one file for each target.

`benchmarks/gpu_tune.py` writes a table on the GPU that it is for. What no table holds is launched by the rules of the
kernel's own `parameters`, which are reasoned. Nothing is ever measured while a server starts: the same versions on the
same GPU always launch the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quire.kernels.targets import Target

FIELDS = {
    "paged_decode": ("block_n", "num_warps", "num_stages", "resident_programs"),
    "paged_prefill": ("block_m", "block_n", "num_warps", "num_stages"),
    "gluon_prefill": ("block_n", "num_slots"),
}
"""What a table says of each kernel. gluon_prefill is a second kernel for paged_prefill, launched only where a table has
it."""

_LARGEST = {"block_m": 256, "block_n": 256, "num_warps": 16, "num_stages": 8, "num_slots": 16, "resident_programs": 8}
_SMALLEST = {"num_slots": 2}  # with one, keys and values would wait for each other; 1 of everything else
_POWERS_OF_TWO = ("block_m", "block_n", "num_warps")


@dataclass(frozen=True, slots=True)
class Entry:
    """`launch` has the kernel's FIELDS; times are medians of one call, with it and by the kernel's own rules."""

    launch: Mapping[str, int]
    microseconds: float
    reasoned_microseconds: float


@dataclass(frozen=True, slots=True)
class Table:
    """`facts` are the machine, the versions and the command; `entries` by kernel and case."""

    facts: Mapping[str, str]
    entries: Mapping[str, Mapping[str, Entry]]


def case(dtype: torch.dtype, head_dim: int, pages: torch.dtype) -> str:
    """The name in a table of an attention kernel for queries of `dtype` and keys and values of `pages`."""
    names = (str(kind).removeprefix("torch.") for kind in (dtype, pages))
    return f"{next(names)}, head {head_dim}, pages {next(names)}"


def measured(kernel: str, case_name: str, target: Target) -> Mapping[str, int]:
    """What was measured to be best on `target`; nothing if nothing was."""
    entry = _table(target).entries.get(kernel, {}).get(case_name)
    return {} if entry is None else entry.launch


def path_of(target: Target) -> Path:
    """Where the table of a target is, if there is one."""
    return Path(__file__).parent / f"{target.vendor}_{target.arch}.json"


@cache
def _table(target: Target) -> Table:
    path = path_of(target)
    return read(path) if path.exists() else Table({}, {})


def read(path: Path) -> Table:
    """
    Raises:
        ValueError: the file is no table of launches that exist; it says what is wrong with it.
    """
    try:
        written = json.loads(path.read_text())
        entries = {
            kernel: {name: _entry(kernel, fields) for name, fields in cases.items()}
            for kernel, cases in written["entries"].items()
        }
        return Table({str(name): str(value) for name, value in written["facts"].items()}, entries)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of launches: {error}. benchmarks/gpu_tune.py writes one.") from error


def _entry(kernel: str, written: Mapping[str, Any]) -> Entry:
    launch = written["launch"]
    if set(launch) != set(FIELDS[kernel]):
        raise ValueError(f"{kernel} is launched with {', '.join(FIELDS[kernel])}, not {', '.join(launch)}")
    for name, value in launch.items():
        is_odd = name in _POWERS_OF_TWO and value & (value - 1)
        if type(value) is not int or not _SMALLEST.get(name, 1) <= value <= _LARGEST[name] or is_odd:
            raise ValueError(f"{name} of {kernel} cannot be {value!r}")
    return Entry(launch, float(written["microseconds"]), float(written["reasoned_microseconds"]))


def write(path: Path, table: Table) -> None:
    """Replaces the file at once: whoever reads it finds the old table or the new one."""
    entries = {
        kernel: {
            name: {
                "launch": dict(entry.launch),
                "microseconds": round(entry.microseconds, 2),
                "reasoned_microseconds": round(entry.reasoned_microseconds, 2),
            }
            for name, entry in sorted(cases.items())
        }
        for kernel, cases in sorted(table.entries.items())
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"facts": dict(table.facts), "entries": entries}, indent=1) + "\n")
    new.replace(path)
