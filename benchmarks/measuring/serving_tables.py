"""How the figures of servers are shown: one line while they are measured, tables at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from measuring.engines import Run, Start
from measuring.report import markdown_table, number
from measuring.summary import Summary, medians, speedup


class FrontPart(TypedDict):
    seconds: float
    calls: int


class FrontProfile(TypedDict):
    """What profiled_front.py writes: CPU seconds of the front process's event loop."""

    seconds: float
    parts: dict[str, FrontPart]


def shown_start(start: Start) -> str:
    parts = ", ".join(f"{name} {mib:.0f}" for name, mib in start.memory_mib.items())
    total = sum(start.memory_mib.values())
    return f"first token {start.first_token_s:.2f} s after its start; at rest {total:.0f} MiB ({parts})"


def shown_run(run: Run) -> str:
    figures = run.figures
    trouble = f" FAILED {figures.failed} ({'; '.join(figures.errors)})" if figures.failed else ""
    trouble += f" SHORT {figures.short}" if figures.short else ""
    return (
        f"{figures.output_tokens_per_s:.1f} output tokens/s, TTFT {_pair(figures, 'ttft')}, "
        f"ITL {_pair(figures, 'itl')}, TPOT {_pair(figures, 'tpot')} ms (p50/p99); cores: {_cores(run)}{trouble}"
    )


def _pair(figures: Summary, name: str) -> str:
    return "/".join(number(getattr(figures, f"{name}_p{q}_ms")) for q in (50, 99))


def _cores(run: Run) -> str:
    server = ", ".join(f"{name} {cores:.2f}" for name, cores in run.cpu.server.items())
    return f"{server}, client {run.cpu.client:.2f}, others {run.cpu.others:.2f}"


def starts_table(starts: Mapping[str, Sequence[Start]]) -> str:
    rows = []
    for name, each in starts.items():
        if not each:
            continue
        seconds = sorted(start.first_token_s for start in each)
        memory = each[-1].memory_mib
        parts = ", ".join(f"{part} {mib:.0f}" for part, mib in memory.items())
        shown = f"{statistics.median(seconds):.2f} ({', '.join(f'{s:.2f}' for s in seconds)})"
        rows.append([name, shown, f"{sum(memory.values()):.0f} ({parts})", f"{each[-1].idle_cores:.2f}"])
    header = ["engine", "process start to first token, s: median (all)", "memory at rest, MiB (PSS)", "cores at rest"]
    return markdown_table(header, rows)


def loads_table(
    runs: Mapping[str, Mapping[str, Sequence[Run]]],
    ideals: Mapping[str, Sequence[Summary]],
    is_disturbed: Callable[[Run], bool],
) -> str:
    """One row for each load and engine: medians of its runs.

    `of floor`: measured output rate / that of the ideal run. `quire ×`: how many times better Quire's median is than
    this engine's, of the output rate, TTFT and TPOT. A run marked ! was disturbed, however often it was repeated.
    """
    rows = []
    for load, by_engine in runs.items():
        ideal = medians(ideals[load])
        ours = medians([run.figures for run in by_engine["quire"]]) if "quire" in by_engine else {}
        for name, each in by_engine.items():
            figures = medians([run.figures for run in each])
            all_rates = ", ".join(number(run.figures.output_tokens_per_s) + "!" * is_disturbed(run) for run in each)
            rate, floor = figures["output_tokens_per_s"], ideal["output_tokens_per_s"]
            ratios = [
                number(speedup(key, ours.get(key), figures[key]))
                for key in ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
            ]
            rows.append(
                [
                    load,
                    name,
                    f"{number(rate)} ({all_rates})",
                    f"{100 * rate / floor:.0f} %" if rate and floor else "–",
                    "–" if name == "quire" else " / ".join(ratios),
                    number(figures["total_tokens_per_s"]),
                    number(figures["requests_per_s"]),
                    *(_latencies(figures, key) for key in ("ttft", "itl", "tpot", "e2e")),
                    f"{sum(run.figures.failed for run in each)} / {sum(run.figures.short for run in each)}",
                    _median_cores(each),
                ]
            )
        latencies = [_latencies(ideal, key) for key in ("ttft", "itl", "tpot", "e2e")]
        total, requests = number(ideal["total_tokens_per_s"]), number(ideal["requests_per_s"])
        rows.append(
            [load, "*floor*", number(ideal["output_tokens_per_s"]), "", "", total, requests, *latencies, "", ""]
        )
    header = ["load", "engine", "output tokens/s: median (all)", "of floor", "quire ×: rate / TTFT / TPOT"]
    header += ["total tokens/s", "requests/s", "TTFT ms", "ITL ms", "TPOT ms", "E2E ms", "failed / short"]
    return markdown_table([*header, "cores: server + client + others"], rows)


def _latencies(figures: Mapping[str, float | None], name: str) -> str:
    return " / ".join(number(figures[f"{name}_p{q}_ms"]) for q in (50, 99))


def _median_cores(runs: Sequence[Run]) -> str:
    labels = list(dict.fromkeys(label for run in runs for label in run.cpu.server))
    server = [f"{label} {statistics.median(run.cpu.server.get(label, 0.0) for run in runs):.2f}" for label in labels]
    client = statistics.median(run.cpu.client for run in runs)
    return f"{', '.join(server)} + {client:.2f} + {statistics.median(run.cpu.others for run in runs):.2f}"


def front_table(profile: FrontProfile) -> str:
    """CPU time of the front process by part, and for each event that it wrote."""
    parts = sorted(profile["parts"].items(), key=lambda part: -part[1]["seconds"])
    num_events = max(1, profile["parts"]["SSE write"]["calls"])
    rows = [
        [
            name,
            str(part["calls"] or "–"),
            f"{1e6 * part['seconds'] / num_events:.1f}",
            f"{100 * part['seconds'] / profile['seconds']:.0f} %",
        ]
        for name, part in parts
    ]
    text = f"Front process: {profile['seconds']:.2f} s of CPU time for {num_events} writes.\n\n"
    return text + markdown_table(["part", "calls", "µs a write", "share"], rows)
