"""Those that are measured: servers, Quire's among them, and commands that run a load in their own process."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from measuring import loads, processes
from measuring.http_client import Target, model_name, run_load
from measuring.loads import LoadRequest
from measuring.processes import CpuMeter, CpuUse
from measuring.summary import Record, Summary, from_json, summarize

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600.0
REST_SECONDS = 4.0
"""Between the first token and the weighing: what a server starts behind its first request is there then."""
IDLE_CORES = 0.03
"""A server that uses more at rest is stopped while others are measured."""
STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Run:
    figures: Summary
    cpu: CpuUse
    records: list[Record] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Start:
    first_token_s: float
    """From the start of the process to the first streamed piece of a request for one token."""
    memory_mib: dict[str, float]
    """Proportional set size at rest, by process."""
    idle_cores: float


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    repeat: int
    rate: float
    """Mean arrivals per second, where the load has arrivals."""


class Measured(Protocol):
    name: str
    starts: list[Start]

    def begin(self, word_ids: list[int]) -> None: ...
    def run(self, load: Load, word_ids: list[int]) -> Run: ...
    def rest(self) -> None: ...
    def end(self) -> None: ...


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def filled(command: str, **values: object) -> list[str]:
    """The words of a command, with {names} filled in.

    Raises:
        SystemExit: it names what there is not.
    """
    try:
        return [word.format(**values) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise SystemExit(f"The command {command!r} cannot be filled in ({error}); known are {known}.") from None


class Server:
    """A server with /v1/completions and /v1/models; kept between runs if it is idle then, else started anew.

    Args:
        command: with {port}, {model} and {threads}.
        log_dir: where its output goes.
    """

    def __init__(self, name: str, command: str, model: Path, num_threads: int, log_dir: Path) -> None:
        self.name = name
        self.starts: list[Start] = []
        self._command, self._model, self._num_threads = command, model, num_threads
        self._log = log_dir / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._target = Target(0, "")

    def begin(self, word_ids: list[int]) -> None:
        """Start it, time its first token, weigh it, warm it up."""
        port = processes.free_port()
        command = filled(self._command, port=port, model=self._model, threads=self._num_threads)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        began = time.perf_counter()
        with self._log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            except OSError as error:
                raise SystemExit(f"{self.name}: {command[0]} cannot be started: {error.strerror}.") from None
        while (name := model_name(port)) is None:
            self._still_starting(began)
        self._target = Target(port, name)
        first = loads.make_requests(word_ids, "FIRST", 0, 1.0)
        while (record := run_load(self._target, first, 1)[0][0]).error not in (None, "empty answer"):
            if (record.error or "").startswith("HTTP 4"):
                raise SystemExit(f"{self.name} refuses the first request: {record.error}")
            self._still_starting(began)
        first_token = record.pieces[0] if record.pieces else record.ended
        time.sleep(REST_SECONDS)
        meter = CpuMeter(self._process.pid)
        time.sleep(1.0)
        idle = sum(meter.stop().server.values())
        self.starts.append(Start(first_token - began, processes.memory_mib(self._process.pid), idle))
        self._warm_up(word_ids)

    def _warm_up(self, word_ids: list[int]) -> None:
        records, _ = run_load(self._target, loads.make_requests(word_ids, "WARM", 0, 1.0), loads.WARM_UP.concurrency)
        if errors := {record.error for record in records if record.error is not None}:
            raise SystemExit(f"{self.name} failed to warm up: {sorted(errors)[0]}")

    def _still_starting(self, began: float) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise SystemExit(f"{self.name} ended with {self._process.returncode}; its output is in {self._log}.")
        if time.perf_counter() - began > START_SECONDS:
            raise SystemExit(f"{self.name} did not answer in {START_SECONDS:g} s; its output is in {self._log}.")
        time.sleep(0.01)

    def run(self, load: Load, word_ids: list[int]) -> Run:
        if self._process is None:
            self.begin(word_ids)
        requests = loads.make_requests(word_ids, load.name, load.repeat, load.rate)
        return self.send(requests, loads.concurrency(load.name))

    def send(self, requests: list[LoadRequest], concurrency: int | None) -> Run:
        """Any requests, to the server that has begun; see `run_load`."""
        assert self._process is not None
        meter = CpuMeter(self._process.pid)
        records, wall = run_load(self._target, requests, concurrency)
        return Run(summarize(records, wall), meter.stop(), records)

    def rest(self) -> None:
        """Leave the machine to the others."""
        if self.starts and self.starts[-1].idle_cores > IDLE_CORES:
            self.end()

    def end(self) -> None:
        if self._process is None:
            return
        family = processes.descendants(self._process.pid)
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


class InProcess:
    """A command that runs one repeat of one load and writes its figures as JSON; without HTTP, which favours it.

    Args:
        command: with {workloads} (a name), {repeat}, {rate}, {out}, {model} and {threads}. It writes to {out}, by name
            of the load, an object with fields of `summary.Summary`, and may write `first_token_s` and `memory_mib`
            beside them.
    """

    def __init__(self, name: str, command: str, model: Path, num_threads: int, log_dir: Path) -> None:
        self.name = name
        self.starts: list[Start] = []
        self._command, self._model, self._num_threads = command, model, num_threads
        self._log = log_dir / f"{name}.log"

    def begin(self, word_ids: list[int]) -> None:
        return

    def run(self, load: Load, word_ids: list[int]) -> Run:
        with tempfile.TemporaryDirectory() as folder, self._log.open("ab") as output:
            out = Path(folder) / "figures.json"
            command = filled(
                self._command,
                workloads=load.name,
                repeat=load.repeat,
                rate=load.rate,
                out=out,
                model=self._model,
                threads=self._num_threads,
            )
            before, meter = processes.ended_children_seconds(), CpuMeter()
            ended = subprocess.run(command, stdout=output, stderr=output, check=False)
            cpu = meter.stop(processes.ended_children_seconds() - before)
            if ended.returncode != 0 or not out.exists():
                raise SystemExit(f"{self.name} ended with {ended.returncode}; its output is in {self._log}.")
            written = json.loads(out.read_text())
        if "first_token_s" in written:
            self.starts.append(Start(written["first_token_s"], {"process": written.get("memory_mib", 0.0)}, 0.0))
        return Run(from_json(written[load.name]), cpu)

    def rest(self) -> None:
        return

    def end(self) -> None:
        return


def quire(model: Path, num_threads: int, log_dir: Path, flags: str, profile: Path | None = None) -> Server:
    """Quire's server, from this checkout; with `profile` the front process writes there where its time goes."""
    script = str(Path(__file__).with_name("profiled_front.py"))
    program = ["-m", "quire"] if profile is None else [script, str(profile)]
    places = ["{model}", "--port", "{port}", "--num-threads", "{threads}"]
    command = shlex.join([sys.executable, *program, "serve", *places])
    return Server("quire" if profile is None else "quire, profiled", f"{command} {flags}", model, num_threads, log_dir)
