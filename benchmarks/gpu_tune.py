"""Measure how the attention kernels are best launched on this GPU, and write the table that they read.

    python benchmarks/gpu_tune.py                     writes kernels/launch_tables/<target>.json of this checkout
    python benchmarks/gpu_tune.py --out table.json --minutes 5
    python benchmarks/gpu_tune.py --rehearse          no GPU: tiny problems in Triton's interpreter; times mean nothing

Each candidate is launched in turn with what the kernel's own rules choose, on rotated inputs with shuffled block
tables, as replays of a CUDA graph. It is kept if its result is right and it takes at most 97 % of the time. What needs
more registers or shared memory than there are is passed over. The prefill kernel in Gluon is tried in a process of its
own first; only if the table has an entry for it, it is used. The table is written after each case. Commit it with the
figures of `benchmarks/gpu.py` from before and after; the test of all compilations takes it in.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="the table to write (default: that of this GPU, in this checkout)")
    add("--minutes", type=float, default=10.0, help="begin no new case after so many (default: %(default)s)")
    add("--seconds", type=float, default=0.1, help="of measuring, for each candidate (default: %(default)s)")
    add("--rehearse", action="store_true", help="tiny problems in Triton's interpreter; needs --out")
    arguments = parser.parse_args()
    if arguments.rehearse and arguments.out is None:
        parser.error("--rehearse needs --out: its figures are of no GPU")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is decorated: before any is imported
    import torch
    import triton
    from measuring import gpu_gluon, gpu_tuning
    from measuring.gpu_cases import FULL, REHEARSAL
    from rich.console import Console

    from quire.kernels import launch_tables
    from quire.kernels.launch_tables import Entry, Table
    from quire.kernels.targets import current_target

    console = Console()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here; --rehearse --out FILE runs the script on tiny problems without one.")
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    target = current_target(device)
    name = "a rehearsal" if arguments.rehearse else torch.cuda.get_device_name()
    facts = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "command": " ".join(sys.argv)}
    out, entries = arguments.out or launch_tables.path_of(target), dict[str, dict[str, Entry]]()
    deadline = time.monotonic() + 60 * arguments.minutes
    _, trouble = gpu_gluon.attempt(device)
    if trouble:
        console.print(f"left out: prefill in Gluon, as {trouble}")
    with torch.inference_mode():
        for tuned in gpu_tuning.cases(
            REHEARSAL if arguments.rehearse else FULL, device, entries, has_gluon=not trouble
        ):
            if time.monotonic() > deadline:
                console.print(f"left out, as the time was up: {tuned.kernel}, {tuned.case}")
                continue
            with console.status(f"{tuned.kernel}, {tuned.case}"):
                launch, seconds, reasoned = gpu_tuning.best_launch(tuned, device, arguments.rehearse, arguments.seconds)
            if launch:
                entry = Entry(launch, 1e6 * seconds, 1e6 * reasoned)
                entries.setdefault(tuned.kernel, {})[tuned.case] = entry
            chosen = ", ".join(f"{field} {value}" for field, value in launch.items()) or "the kernel's own rules"
            console.print(f"{tuned.kernel}, {tuned.case}: {chosen}; {1e6 * seconds:.1f} us ({1e6 * reasoned:.1f})")
            launch_tables.write(out, Table(facts, entries))
    console.print(f"written: {out}")


if __name__ == "__main__":
    main()
