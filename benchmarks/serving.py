"""Measure Quire over HTTP with streaming, beside peers if there are any, and against the most this machine could do.

    python benchmarks/serving.py                                     the bundled model, all loads
    python benchmarks/serving.py path/to/model --loads W1,W2 --out benchmarks/results/serving
    python benchmarks/serving.py path/to/model --peer 'vllm=vllm serve {model} --port {port}' \\
        --in-process-peer 'other=python other.py {model} {workloads} {repeat} {out}'

Each server is started on a free port, timed from its process to its first streamed token, weighed at rest, and warmed
up. Then the loads run (greedy, end of sequence ignored, the same prompts for all), one engine after the other in every
round, so that all see the same noise; no two compute at once. A run during which other processes were at work is
repeated with new words. `saturation` doubles the rate of W4 until the output rate no longer rises.

A peer's command gets {port}, {model} and {threads} filled in, and must serve /v1/models and /v1/completions. An
in-process peer runs one load and writes JSON; it gets {workloads}, {repeat}, {rate}, {out}, {model} and {threads}.
measuring/engines.py says what it writes, measuring/floors.py how the floor is reckoned. --profile runs the loads once
more on a server whose front process has timers in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from measuring import engines, loads
from measuring.comparison import Comparison, Settings
from measuring.floors import ModelCost
from measuring.report import bars, write_json
from measuring.serving_tables import FrontProfile, front_table, loads_table, starts_table
from measuring.summary import medians

from quire.tales import MODEL_DIR

SATURATION = "saturation"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    described = "; ".join(f"{name}: {workload}" for name, workload in loads.WORKLOADS.items())
    add = parser.add_argument
    add("model", type=Path, nargs="?", default=MODEL_DIR, help="directory of a checkpoint (default: the bundled model)")
    add("--loads", default=",".join([*loads.WORKLOADS, SATURATION]), help=f"tokens; {described} (default: %(default)s)")
    add("--rounds", type=int, default=2, help="runs of each load (default: %(default)s)")
    add("--rate", type=float, default=1.5, help="arrivals per second of W4 (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of each engine (default: all cores, here %(default)s)")
    add("--serve-flags", default="", help="further flags of quire serve, as one word: --serve-flags='--block-size 32'")
    add("--peer", action="append", default=[], metavar="NAME=COMMAND", help="a server; may be given again")
    add("--in-process-peer", action="append", default=[], metavar="NAME=COMMAND", help="a command; may be given again")
    add("--starts", type=int, default=1, help="starts of each server that are timed (default: %(default)s)")
    add("--quiet", type=float, default=0.15, help="cores others may use before a run (default: %(default)s)")
    add("--quiet-wait", type=float, default=20.0, help="seconds to wait for that at most (default: %(default)s)")
    add(
        "--disturbed",
        type=float,
        default=0.3,
        help="a run is repeated if others used more cores (default: %(default)s)",
    )
    add("--retries", type=int, default=2, help="times that it is repeated (default: %(default)s)")
    add("--profile", action="store_true", help="also show where the front process's time goes, in runs of their own")
    add("--out", type=Path, metavar="STEM", help="write STEM.json, STEM.md and STEM.svg")
    add("--log-dir", type=Path, help="where the servers' output goes (default: a temporary folder, kept if one fails)")
    arguments = parser.parse_args()
    unknown = set(arguments.loads.split(",")) - {*loads.WORKLOADS, SATURATION}
    if unknown:
        parser.error(f"--loads: there is no {sorted(unknown)[0]!r}; known are {parser.get_default('loads')}")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} holds no config.json; give the directory of a checkpoint")
    if min(arguments.rounds, arguments.threads, arguments.starts) < 1 or arguments.rate <= 0:
        parser.error("--rounds, --threads and --starts must be at least 1, --rate above 0")
    return arguments


def make_engines(arguments: argparse.Namespace, log_dir: Path) -> list[engines.Measured]:
    common = (arguments.model.resolve(), arguments.threads, log_dir)
    made: list[engines.Measured] = [engines.quire(*common, arguments.serve_flags)]
    for kind, given in ((engines.Server, arguments.peer), (engines.InProcess, arguments.in_process_peer)):
        for text in given:
            name, separator, command = text.partition("=")
            if not (name and separator and command):
                raise SystemExit(f"A peer is given as NAME=COMMAND, not {text!r}.")
            made.append(kind(name, command, *common))
    if len({engine.name for engine in made}) < len(made):
        raise SystemExit("Two engines have the same name; 'quire' is our own.")
    return made


def profile_front(
    comparison: Comparison, names: list[str], arguments: argparse.Namespace, log_dir: Path
) -> FrontProfile:
    """What profiled_front.py wrote after one repeat of each load."""
    path = log_dir / "front.json"
    server = engines.quire(arguments.model.resolve(), arguments.threads, log_dir, arguments.serve_flags, path)
    try:
        comparison.run_once(server, names)
    finally:
        server.end()
    found: FrontProfile = json.loads(path.read_text())
    return found


def report(
    comparison: Comparison,
    saturation: dict[str, dict[str, float]],
    front: FrontProfile | None,
    arguments: argparse.Namespace,
) -> None:
    dtype = str(comparison.rates[0]["dtype"])
    cost = ModelCost.of(arguments.model, ITEM_BYTES[dtype], ITEM_BYTES[str(comparison.rates[0]["kv_cache_dtype"])])
    rates = comparison.best_rates()
    ideals = comparison.ideals(cost)
    by_load = comparison.by_load()
    runs = {load: {name: [m.run for m in each] for name, each in found.items()} for load, found in by_load.items()}
    decode = cost.step([(192, 1)], 1).seconds(rates) * 1e3
    prefill = cost.step([(0, 128)], 1).seconds(rates) * 1e3
    disturbed = comparison.rates_were_disturbed()
    text = (
        f"{arguments.model.name}, {dtype}, {arguments.threads} threads; floor at {rates.read_bytes_per_s / 1e9:.1f} "
        f"GB/s read and {rates.operations_per_s / 1e9:.0f} GFLOP/s, the best of this run: a decode step of one "
        f"sequence of 192 tokens {decode:.2f} ms, a prompt of 128 tokens {prefill:.2f} ms. "
        "Latencies are p50 / p99; ! marks a run that others disturbed.\n\n"
        + (
            "Others disturbed every measurement of these rates: shares of the floor are too high.\n\n"
            if disturbed
            else ""
        )
        + starts_table({engine.name: engine.starts for engine in comparison.engines})
        + "\n"
        + loads_table(runs, ideals, comparison.is_disturbed)
    )
    if saturation:
        lines = [
            f"{name} {best['output_tokens_per_s']:.0f} output tokens/s at {best['arrivals_per_s']:g} arrivals/s"
            for name, best in saturation.items()
        ]
        text += "\nSaturation of W4: " + "; ".join(lines) + ".\n"
    if front is not None:
        text += "\n" + front_table(front)
    print(text)
    if arguments.out is None:
        return
    body = {
        "model": arguments.model.name,
        "rates": comparison.rates,
        "cost": asdict(cost),
        "starts": {engine.name: [asdict(start) for start in engine.starts] for engine in comparison.engines},
        "runs": [
            {"engine": m.engine, "load": asdict(m.load), "figures": asdict(m.run.figures), "cpu": asdict(m.run.cpu)}
            for m in comparison.measurements
        ],
        "floors": {load: [asdict(each) for each in ideal] for load, ideal in ideals.items()},
        "saturation": saturation,
        "front": front,
    }
    write_json(arguments.out.with_suffix(".json"), body)
    arguments.out.with_suffix(".md").write_text(text)
    heights = {
        load: {
            name: medians([run.figures for run in each])["output_tokens_per_s"] or 0.0 for name, each in found.items()
        }
        for load, found in runs.items()
    }
    marks = {load: medians(ideal)["output_tokens_per_s"] or 0.0 for load, ideal in ideals.items()}
    title = f"output tokens per second, {arguments.model.name}, {arguments.threads} threads; dashed: floor"
    arguments.out.with_suffix(".svg").write_text(bars(title, heights, marks))


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the servers are stopped too
    names = arguments.loads.split(",")
    settings = Settings(
        model=arguments.model,
        num_threads=arguments.threads,
        rounds=arguments.rounds,
        retries=arguments.retries,
        rate=arguments.rate,
        starts=arguments.starts,
        quiet_cores=arguments.quiet,
        quiet_seconds=arguments.quiet_wait,
        disturbed_cores=arguments.disturbed,
    )
    log_dir = arguments.log_dir or Path(tempfile.mkdtemp(prefix="quire-serving-"))
    log_dir.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(make_engines(arguments, log_dir), settings)
    saturation: dict[str, dict[str, float]] = {}
    front: FrontProfile | None = None
    try:
        comparison.start()
        comparison.run_rounds([name for name in names if name != SATURATION])
        if SATURATION in names:
            saturation = comparison.saturate()
        if arguments.profile:
            comparison.end()
            front = profile_front(comparison, [name for name in names if name != SATURATION], arguments, log_dir)
    finally:
        comparison.end()
        if comparison.measurements:  # also when one of the engines failed later on
            report(comparison, saturation, front, arguments)
    if arguments.log_dir is None:
        shutil.rmtree(log_dir)


if __name__ == "__main__":
    main()
