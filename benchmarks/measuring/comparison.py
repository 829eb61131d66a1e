"""Engines that run the same loads in turn, and what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from measuring import loads, processes
from measuring.engines import Load, Measured, Run, log
from measuring.floors import MachineRates, ModelCost, ideal_run
from measuring.serving_tables import shown_run, shown_start
from measuring.summary import Summary, summarize

RISE = 1.05
"""A higher rate of arrivals must bring so many times the output rate, or the search for saturation ends."""
SATURATION_REPEAT = 1000
"""Of its first load: far from the repeats of the rounds, so that no prefix cache holds the prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    model: Path
    num_threads: int
    rounds: int
    retries: int
    """Further tries of a run that was disturbed."""
    rate: float
    starts: int
    quiet_cores: float
    """What others may use before a run begins, in cores."""
    quiet_seconds: float
    """Longest wait for that."""
    disturbed_cores: float
    """A run during which others used more is repeated."""


@dataclass(frozen=True, slots=True)
class Measurement:
    engine: str
    load: Load
    run: Run


class Comparison:
    """Runs one engine at a time; the others are idle or stopped."""

    def __init__(self, engines: list[Measured], settings: Settings) -> None:
        self.engines = engines
        self.measurements: list[Measurement] = []
        """One for each round, load and engine: of the tries the one that was disturbed least."""
        self.rates: list[dict[str, object]] = []
        """What rates.py wrote, and the cores that others used meanwhile."""
        self._settings = settings
        self._word_ids = loads.Words(settings.model).ids

    def load_key(self, load: Load) -> str:
        return load.name if load.rate == self._settings.rate else f"{load.name} at {load.rate:g}/s"

    def by_load(self) -> dict[str, dict[str, list[Measurement]]]:
        """Measurements by load, then by engine."""
        result: dict[str, dict[str, list[Measurement]]] = {}
        for each in self.measurements:
            result.setdefault(self.load_key(each.load), {}).setdefault(each.engine, []).append(each)
        return result

    def start(self) -> None:
        for engine in self.engines:
            for _ in range(self._settings.starts):
                engine.end()
                self._wait_until_quiet()
                engine.begin(self._word_ids)
                if engine.starts:
                    log(f"{engine.name}: {shown_start(engine.starts[-1])}")
            engine.rest()

    def end(self) -> None:
        for engine in self.engines:
            engine.end()

    def run_rounds(self, names: list[str]) -> None:
        # Repeats of one parity have the same lengths and arrivals: a further try must keep it, and have new words.
        stride = self._settings.rounds + self._settings.rounds % 2
        self._measure_rates()
        for number in range(self._settings.rounds):
            for name in names:
                for engine in self.engines if number % 2 == 0 else self.engines[::-1]:
                    self._measure(engine, Load(name, number, self._settings.rate), stride)
            self._measure_rates()

    def saturate(self) -> dict[str, dict[str, float]]:
        """Double the rate of W4 until each engine's output rate no longer rises; its best one, by engine."""
        load = Load("W4", SATURATION_REPEAT, self._settings.rate)
        rising = list(self.engines)
        best: dict[str, dict[str, float]] = {}
        while rising:
            load = Load(load.name, load.repeat + 2, load.rate * 2)
            for engine in tuple(rising):
                rate = self._measure(engine, load, SATURATION_REPEAT).figures.output_tokens_per_s
                before = best.get(engine.name, {}).get("output_tokens_per_s", 0.0)
                if rate > before:
                    best[engine.name] = {"output_tokens_per_s": rate, "arrivals_per_s": load.rate}
                if rate < RISE * before:
                    rising.remove(engine)
        return best

    def is_disturbed(self, run: Run) -> bool:
        return run.cpu.others > self._settings.disturbed_cores

    def rates_were_disturbed(self) -> bool:
        """Whether the floor was never measured alone: then the real one is higher."""
        return all(float(str(each["others_cores"])) > self._settings.disturbed_cores for each in self.rates)

    def best_rates(self) -> MachineRates:
        """Of all rounds: a floor must not be above what was reached."""
        read, multiply = (
            max(float(str(each[name])) for each in self.rates) for name in ("read_bytes_per_s", "operations_per_s")
        )
        return MachineRates(read, multiply)

    def ideals(self, cost: ModelCost) -> dict[str, list[Summary]]:
        """What the best rates would bring, by load: one for each round."""
        result: dict[str, list[Summary]] = {}
        rates = self.best_rates()
        for key, by_engine in self.by_load().items():
            for load in (each.load for each in next(iter(by_engine.values()))):
                requests = loads.make_requests(self._word_ids, load.name, load.repeat, load.rate)
                ideal = ideal_run(requests, loads.concurrency(load.name), cost, rates)
                result.setdefault(key, []).append(summarize(*ideal))
        return result

    def run_once(self, engine: Measured, names: list[str]) -> None:
        """Load it without keeping the figures."""
        for name in names:
            self._wait_until_quiet()
            run = engine.run(Load(name, 0, self._settings.rate), self._word_ids)
            log(f"{engine.name} {name}/0: {shown_run(run)}")

    def _wait_until_quiet(self) -> None:
        processes.wait_until_quiet(self._settings.quiet_cores, self._settings.quiet_seconds)

    def _measure(self, engine: Measured, load: Load, stride: int) -> Run:
        tries: list[tuple[Load, Run]] = []
        for attempt in range(1 + self._settings.retries):
            self._wait_until_quiet()
            tried = Load(load.name, load.repeat + attempt * stride, load.rate)
            tries.append((tried, engine.run(tried, self._word_ids)))
            log(f"{engine.name} {self.load_key(load)}/{tried.repeat}: {shown_run(tries[-1][1])}")
            if not self.is_disturbed(tries[-1][1]):
                break
        engine.rest()
        quietest, run = min(tries, key=lambda each: each[1].cpu.others)
        self.measurements.append(Measurement(engine.name, quietest, run))
        return run

    def _measure_rates(self) -> None:
        """Before the first round and after each; again, as long as others disturb it."""
        settings = self._settings
        script = str(Path(__file__).with_name("rates.py"))
        command = [sys.executable, script, "--threads", str(settings.num_threads), "--model", str(settings.model)]
        for _ in range(1 + settings.retries):
            self._wait_until_quiet()
            before, meter = processes.ended_children_seconds(), processes.CpuMeter()
            now = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            now["others_cores"] = meter.stop(processes.ended_children_seconds() - before).others
            self.rates.append(now)
            log(
                f"{settings.num_threads} threads read {now['read_bytes_per_s'] / 1e9:.1f} GB/s and multiply "
                f"{now['operations_per_s'] / 1e9:.0f} GFLOP/s ({now['dtype']}); others {now['others_cores']:.2f} cores"
            )
            if now["others_cores"] <= settings.disturbed_cores:
                return
