"""Measure Quire on one NVIDIA GPU in under ten minutes: parity first, then kernels, then whole engines.

    python benchmarks/gpu.py --out benchmarks/results/h100            everything that is importable
    python benchmarks/gpu.py --peers gpu-peers --stages parity,kernels
    python benchmarks/gpu.py --rehearse                               no GPU: tiny problems, the CPU's kernels

Results are written after each stage (STEM.json, STEM.md, STEM.svg), so that a run that is cut off leaves what it has.
Kernels are timed as replays of a CUDA graph over rotated inputs with shuffled block tables, ours and the peers turn by
turn; figures are medians, and ratios (peer's time / ours) count most. A kernel that fails its parity check is an error,
and nothing of it is timed. `benchmarks/gpu_peers.sh` fetches the peers on a machine with a network.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import gpu_cascade, gpu_cases, gpu_engine, gpu_gluon, gpu_parity, gpu_peers
from measuring.gpu_cases import FULL, REHEARSAL, Case, Goal, Scale
from measuring.gpu_timing import Replay, medians
from measuring.random_model import write_model
from measuring.rates import copy_bandwidth
from measuring.report import bars, markdown_table, number, write_json

STAGES = ("parity", "kernels", "engine")


@dataclass
class Report:
    """All that was found; `save` may be called as often as there is something new."""

    stem: Path
    facts: dict[str, Any]
    parity: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def save(self) -> None:
        body = {key: getattr(self, key) for key in ("parity", "kernels", "engines", "skipped")}
        write_json(self.stem.with_suffix(".json"), {**body, "absent_peers": gpu_peers.absent}, **self.facts)
        self.stem.with_suffix(".md").write_text(self.text())
        groups = {row["name"]: row["us"] for row in self.kernels}
        floors = {row["name"]: row["floor_us"] for row in self.kernels if row["floor_us"]}
        self.stem.with_suffix(".svg").write_text(bars("microseconds (line: the floor)", groups, floors))

    def text(self) -> str:
        parts = [", ".join(f"{name} {value}" for name, value in self.facts.items()) + "\n"]
        if self.parity:
            failed = [row for row in self.parity if not row["passed"]]
            parts.append(f"Parity: {len(self.parity) - len(failed)} of {len(self.parity)} checks passed.\n")
            parts += [f"- {row['name']}: off by {row['error']}, allowed {row['tolerance']}\n" for row in failed]
        if self.kernels:
            header = ["kernel", "us", "of floor", "TB/s", "TFLOP/s", "peers: us (× ours)", "goals (first, best)"]
            parts.append(markdown_table(header, [_kernel_cells(row) for row in self.kernels]))
        if self.engines:
            header = ["engine", "workload", "figures", "goals (first, best)"]
            rows = [
                [row["engine"], row["workload"], _figures(row["figures"]), _goals(row["goals"])] for row in self.engines
            ]
            parts.append(markdown_table(header, rows))
        parts += [f"Peer that could not be had: {name} ({why})\n" for name, why in gpu_peers.absent.items()]
        parts += [f"Left out: {what}\n" for what in self.skipped]
        return "\n".join(parts)


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    ours = row["us"]["quire"]
    others = [f"{name} {number(us)} ({us / ours:.2f})" for name, us in row["us"].items() if name != "quire"]
    share = "–" if row["copy_share"] is None else f"{100 * row['copy_share']:.0f} %"
    figures = [number(ours), share, number(row["tb_per_s"]), number(row["tflops"])]
    return [row["name"], *figures, "; ".join(others), _goals(row["goals"])]


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in figures.items())


def _goals(goals: list[dict[str, Any]]) -> str:
    def judged(goal: dict[str, Any], which: str) -> str:
        return f"{number(goal[which])} {words[goal[which + '_met']]}"

    words = {True: "met", False: "missed", None: "not measured"}
    return "; ".join(f"{goal['of']} {judged(goal, 'first')}, {judged(goal, 'best')}" for goal in goals)


def _judged(goals: tuple[Goal, ...], figures: Mapping[str, float | None]) -> list[dict[str, Any]]:
    return [
        {
            "of": goal.name,
            "first": goal.first,
            "best": goal.best,
            "value": (value := figures.get(goal.name)),
            "first_met": goal.is_met(value, goal.first),
            "best_met": goal.is_met(value, goal.best),
        }
        for goal in goals
    ]


def measure(case: Case, device: torch.device, bandwidth: float, seconds: float) -> dict[str, Any]:
    """Ours and its peers; a peer that fails while it is captured or timed is left out."""
    replays = {"quire": Replay(case.calls, device)}
    for name, calls in case.peers.items():
        try:
            replays[name] = Replay(calls, device)
        except Exception as error:  # whatever a foreign library raises
            gpu_peers.absent[f"{name}, {case.name}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    times = medians(replays, seconds)
    ours, floor = times["quire"], case.num_bytes / bandwidth
    figures: dict[str, float | None] = {
        "us": 1e6 * ours,
        "tb_per_s": case.num_bytes / ours / 1e12 or None,
        "tflops": case.num_flops / ours / 1e12 or None,
        "copy_share": floor / ours or None,
    }
    ratios = {f"ratio to {name}": found / ours for name, found in times.items()}
    return {
        "name": case.name,
        "num_bytes": case.num_bytes,
        "num_flops": case.num_flops,
        "floor_us": 1e6 * floor,
        **figures,
        "us": {name: 1e6 * found for name, found in times.items()},
        "launched_not_captured": [name for name, replay in replays.items() if not replay.is_captured],
        # The goals are those of a GPU: a rehearsal says nothing of them.
        "goals": _judged(case.goals, figures | ratios) if device.type == "cuda" else [],
    }


def run_parity(report: Report, scale: Scale, device: torch.device) -> None:
    for check in gpu_parity.checks(scale, device, "triton" if device.type == "cuda" else "cpu"):
        report.parity.append({**asdict(check), "passed": check.passed})
        print(f"{'ok' if check.passed else 'WRONG':6} {check.name}: off by {check.error:.2g}", flush=True)


def try_gluon(report: Report, device: torch.device) -> bool:
    """Whether the kernel in Gluon may be measured. If not, the one in Triton is all there is: that is no error."""
    found, trouble = gpu_gluon.attempt(device)
    if trouble:
        report.skipped.append(f"prefill in Gluon: {trouble}")
        print(report.skipped[-1], flush=True)
        return False
    report.parity += [{**asdict(check), "passed": check.passed} for check in found]
    return True


def all_cases(scale: Scale, device: torch.device, *, has_gluon: bool) -> Iterator[Case]:
    """One after another, so that only one case's inputs exist at a time."""
    prefill = (gpu_cases.prefill_cases, *([gpu_gluon.cases] if has_gluon else []))
    attention = (gpu_cases.decode_cases, gpu_cascade.cascade_cases, *prefill)
    for make in (*attention, gpu_cases.codes_cases, gpu_cascade.short_chunk_cases, gpu_cases.small_cases):
        yield from make(scale, device)


def run_kernels(report: Report, scale: Scale, device: torch.device, deadline: float) -> None:
    bandwidth = copy_bandwidth(device)
    report.facts["copy_tb_per_s"] = round(bandwidth / 1e12, 3)
    cases = all_cases(scale, device, has_gluon=try_gluon(report, device))
    while True:
        if time.monotonic() > deadline:
            report.skipped.append("kernels that follow: the time was up")
            return
        case = next(cases, None)
        if case is None:
            return
        row = measure(case, device, bandwidth, 1.0 if device.type == "cuda" else 0.05)
        report.kernels.append(row)
        print(" | ".join(_kernel_cells(row)), flush=True)
        del case
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class EngineRun:
    engine: str
    model: str
    workload: str
    run: Callable[[Path], dict[str, float]]
    goals: tuple[Goal, ...] = ()


def engine_runs(rehearse: bool) -> Iterator[EngineRun]:
    if rehearse:
        work = gpu_engine.many(4, 8, 24, 512)
        yield EngineRun("quire", "tiny", "4 requests of 8 to 24", lambda m: gpu_engine.run_quire(m, work, 1))
        yield EngineRun("quire", "tiny", "HTTP, 4 x 16/4", lambda m: gpu_engine.run_http(m, 4, 16, 4, 50.0))
        return
    work = gpu_engine.many(256, 100, 1024, 151_936)
    name = "256 requests, 100 to 1,024 tokens in and out"
    busy = Goal("gpu_busy_share", 0.97, 0.995)
    goals: tuple[Goal, ...] = (Goal("output_tokens_per_s", 14_000, 20_000), Goal("ms_per_step_alone", 1.3, 0.8), busy)
    yield EngineRun("quire", "qwen3-0.6b", name, lambda m: gpu_engine.run_quire(m, work, 3), goals)
    goals = (Goal("requests_per_s", 95, 150), Goal("ttft_p50_ms", 38.9, 25), Goal("tpot_p50_ms", 2.0, 1.0))
    http = "HTTP, 500 x 512/128, all at once; latencies at 16/s"
    yield EngineRun("quire", "qwen3-0.6b", http, lambda m: gpu_engine.run_http(m, 500, 512, 128, 16.0), goals)
    if importlib.util.find_spec("nanovllm"):
        yield EngineRun("nano-vllm", "qwen3-0.6b", name, lambda m: gpu_engine.run_nano_vllm(m, work))
    yield EngineRun("transformers", "qwen3-0.6b", name, lambda m: gpu_engine.run_transformers(m, work))
    goals = (Goal("output_tokens_per_s", 6_400, 7_900), Goal("ms_per_step_alone", 6.0, 5.5), busy)
    yield EngineRun("quire", "qwen3-8b", name, lambda m: gpu_engine.run_quire(m, work, 1), goals)


def run_engines(report: Report, rehearse: bool, folder: Path, deadline: float) -> None:
    for item in engine_runs(rehearse):
        if time.monotonic() > deadline:
            report.skipped.append(f"{item.engine}, {item.model}: the time was up")
            continue
        model = write_model(item.model, folder)
        try:
            figures = item.run(model)
        except Exception as error:
            if item.engine == "quire":
                raise
            gpu_peers.absent[item.engine] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        goals = _judged(item.goals, figures)
        row = {"engine": item.engine, "workload": f"{item.model}, {item.workload}", "figures": figures, "goals": goals}
        report.engines.append(row)
        report.save()
        print(f"{item.engine}, {row['workload']}: {_figures(figures)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="STEM", help="files to write (default: gpu)")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, by commas (default: %(default)s)")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what gpu_peers.sh fetched")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where random models are kept (default: not)")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after so many (default: 9)")
    parser.add_argument("--rehearse", action="store_true", help="tiny problems on the CPU; its figures mean nothing")
    arguments = parser.parse_args()
    unknown = set(arguments.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU here; --rehearse runs the script on tiny problems without one")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    scale, stages = REHEARSAL if arguments.rehearse else FULL, arguments.stages.split(",")
    gpu_peers.use_folder(arguments.peers)
    facts: dict[str, Any] = {"device": "cpu, a rehearsal" if arguments.rehearse else torch.cuda.get_device_name()}
    report = Report(arguments.out, facts)
    with torch.inference_mode():
        if "parity" in stages:
            run_parity(report, scale, device)
            report.save()
            if not all(row["passed"] for row in report.parity):
                raise SystemExit("A kernel is wrong: nothing is timed.")
        if "kernels" in stages:
            # A part of the time is kept for the engines.
            run_kernels(report, scale, device, deadline - (240 if "engine" in stages and not arguments.rehearse else 0))
            report.save()
    if "engine" in stages:
        with tempfile.TemporaryDirectory() as scratch:
            run_engines(report, arguments.rehearse, arguments.models or Path(scratch), deadline)
    report.save()
    print(report.text())


if __name__ == "__main__":
    main()
