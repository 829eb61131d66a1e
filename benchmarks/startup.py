"""Time a server's start, from its process to the first token, and weigh what it then holds at rest.

    python benchmarks/startup.py                                  the bundled model
    python benchmarks/startup.py path/to/model --starts 9 --json startup.json
    python benchmarks/startup.py --cold                           also once with nothing compiled before

Seconds are counted from just before the process is started: `port` until a TCP connection is taken, `ready` until
/health answers 200, `token` until the first streamed event with text of a request sent then, `whole` until its last.
Figures are medians of the starts, with the fastest in brackets. Memory is proportional set size (a page that two
processes share counts half for each) after the server has answered and rested. Linux only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import quire

PATIENCE_SECONDS = 180.0
REST_SECONDS = 4.0
"""Long enough for the child that judges grammars, which starts two seconds after the server is ready."""
STAGES = ("port", "ready", "token", "whole")


@dataclass(frozen=True, slots=True)
class Start:
    seconds: dict[str, float]
    """By stage."""
    mib: dict[str, dict[str, float]]
    """By process: `pss` in all, and how much of it is `private` memory rather than mapped files."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def one_start(model: list[str], flags: list[str], environment: dict[str, str], log: Path) -> Start:
    """Start, ask, rest, weigh, stop. Figures in seconds and MiB."""
    port = free_port()
    command = [sys.executable, "-m", "quire", "serve", *model, "--port", str(port), *flags]
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            seconds = {"port": wait_for(process, lambda: answers(port, None)) - begin}
            seconds["ready"] = wait_for(process, lambda: answers(port, "/health")) - begin
            events = stream(port)
            seconds["token"] = next(events) - begin
            for last in events:
                seconds["whole"] = last - begin
            time.sleep(REST_SECONDS)
            return Start(seconds, {name: memory_mib(pid) for name, pid in family(process.pid).items()})
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> float:
    """The time at which `condition()` first held; it is tried every 2 ms."""
    end = time.perf_counter() + PATIENCE_SECONDS
    while time.perf_counter() < end:
        if condition():
            return time.perf_counter()
        if process.poll() is not None:
            raise SystemExit(f"The server ended while it started, with exit code {process.returncode}.")
        time.sleep(0.002)
    raise SystemExit(f"The server was not there after {PATIENCE_SECONDS:g} s.")


def answers(port: int, path: str | None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.connect()
        if path is None:
            return True
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def stream(port: int) -> Iterator[float]:
    """The times at which the events of one short request came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"The server answered {answer.status}: {answer.read(500)!r}")
    while line := answer.readline():
        if line.startswith(b"data: {"):
            yield time.perf_counter()
    connection.close()


def family(front: int) -> dict[str, int]:
    """The processes of a server by name: front, engine, and the child that judges grammars."""
    found = {"front": front}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if entry.name.isdigit() else 0
            if parent == front:
                command = (entry / "cmdline").read_bytes()
                found["grammar" if b"grammar.child" in command else "engine"] = int(entry.name)
        except OSError:  # it ended meanwhile
            continue
    return found


def memory_mib(pid: int) -> dict[str, float]:
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        fields[name.rstrip(":")] = int(value) / 1024
    return {"pss": fields["Pss"], "private": fields["Pss_Anon"]}


def report(starts: list[Start]) -> dict[str, object]:
    """Print medians; and hand them back."""
    seconds = {stage: [start.seconds[stage] for start in starts] for stage in STAGES}
    print(
        "  ".join(f"{stage} {statistics.median(values):.2f} s ({min(values):.2f})" for stage, values in seconds.items())
    )
    memory = {
        name: {
            kind: statistics.median(start.mib[name][kind] for start in starts if name in start.mib)
            for kind in ("pss", "private")
        }
        for name in starts[0].mib
    }
    for name, values in memory.items():
        print(f"{name:8} {values['pss']:7.1f} MiB, of it {values['private']:7.1f} in private memory")
    total = {kind: sum(values[kind] for values in memory.values()) for kind in ("pss", "private")}
    megabytes = total["pss"] * 2**20 / 1e6
    print(f"{'all':8} {total['pss']:7.1f} MiB, of it {total['private']:7.1f} in private memory ({megabytes:.0f} MB)")
    return {
        "seconds": {stage: statistics.median(values) for stage, values in seconds.items()},
        "mib": memory,
        "starts": [asdict(start) for start in starts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory of a checkpoint (default: the bundled model)")
    parser.add_argument("--starts", type=int, default=5, help="starts that are measured (default: 5)")
    parser.add_argument("--cold", action="store_true", help="one start more, before, with an empty kernel cache")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args, flags = parser.parse_known_args()
    model = [args.model] if args.model else []
    environment = {**os.environ, "PYTHONPATH": str(Path(quire.__file__).parent.parent)}
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        try:
            if args.cold:
                print("cold: nothing is compiled yet")
                results["cold"] = report([one_start(model, flags, {**environment, "XDG_CACHE_HOME": directory}, log)])
            one_start(model, flags, environment, log)  # compiles what is not, and reads the files once
            print(f"warm: median of {args.starts} starts, and the fastest")
            results["warm"] = report([one_start(model, flags, environment, log) for _ in range(args.starts)])
        except BaseException:
            print(log.read_text(errors="replace"), file=sys.stderr)
            raise
    if args.json:
        about = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "model": Path(args.model).resolve().name if args.model else "tales",
            "flags": flags,
        }
        args.json.write_text(json.dumps({"about": about, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
