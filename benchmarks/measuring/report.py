"""What a benchmark leaves behind: facts of the machine, JSON, tables in markdown, bars in SVG."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS_OF_INTEREST = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
PACKAGES = ("torch", "numba", "numpy", "triton", "uvloop")


def machine_facts() -> dict[str, object]:
    """Processor, versions, command, revision and time: what a figure means nothing without."""
    model, flags = _processor()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS_OF_INTEREST if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
        "revision": _revision(),
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features", "")
    return fields.get("model name", platform.machine()), set(flags.split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Short commit of this checkout, with + if files differ from it; None without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def write_json(path: Path, body: Mapping[str, object], **further_facts: object) -> None:
    """The facts of the machine under "machine", then the body."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": {**machine_facts(), **further_facts}, **body}, indent=1) + "\n")


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if abs(value) >= 10 ** (digits - 1) else text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


_COLOURS = ("#1f5fa8", "#d9822b", "#4f9d4f", "#a14d8f", "#8c8c8c", "#b8a12b")


def bars(title: str, groups: Mapping[str, Mapping[str, float]], marks: Mapping[str, float]) -> str:
    """An SVG of horizontal bars: one group for each load, one bar for each name in it, scaled within the group.

    Args:
        groups: by load, then by name.
        marks: by load, a value that is drawn as a line across its bars: the floor.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    bar, left, width = 16, 150, 460
    parts, y = [f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>'], 36
    for load, group in groups.items():
        scale = width / max([*group.values(), marks.get(load, 0.0), 1e-9])
        parts.append(f'<text x="8" y="{y + 12}" font-weight="bold">{escape(load)}</text>')
        top = y
        for name, value in group.items():
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            parts.append(f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="{bar - 3}" fill="{colour}"/>')
            parts.append(f'<text x="{left + value * scale + 4:.1f}" y="{y + 11}">{number(value)}</text>')
            y += bar
        if load in marks:
            x = left + marks[load] * scale
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3}" y2="{y}" stroke="#c00" stroke-dasharray="3 2"/>'
            )
            parts.append(f'<text x="{x + 4:.1f}" y="{y + 9}" fill="#c00">{number(marks[load])}</text>')
        y += 18
    size = f'width="{left + width + 90}" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect {size} fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
