"""Time what surrounds the model in one step: schedule, build inputs, update, and the message of it. No model runs.

    python benchmarks/step_overhead.py

All sequences decode, with contexts around 400 tokens. One in 16 fills a block in each step; with --in-phase all do so
in the same steps, which a median leaves out. "all" is schedule, inputs and update; "send" packs what they brought and
writes it to a socket; "receive", in the front process, reads it. Figures are medians in milliseconds a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import time
from pathlib import Path

import torch

from quire.config import SchedulerConfig
from quire.engine.inputs import InputBuilder
from quire.engine.messages import StepResult, ToFront
from quire.engine.wire import EngineChannel, FrameDecoder
from quire.sampling_params import SamplingParams
from quire.scheduler.output import SampledTokens
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

COLUMNS = ("schedule", "inputs", "update", "all", "send", "receive")
PROMPT_LEN = 256
MAX_MODEL_LEN = 1024


def measure(num_sequences: int, num_steps: int, *, in_phase: bool) -> dict[str, float]:
    config = SchedulerConfig(
        num_blocks=num_sequences * (MAX_MODEL_LEN // 16) + 1,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=num_sequences * PROMPT_LEN,
        max_model_len=MAX_MODEL_LEN,
    )
    scheduler = Scheduler(config)
    inputs = InputBuilder(num_sequences, num_sequences, MAX_MODEL_LEN, config.block_size, torch.device("cpu"))
    params = SamplingParams(temperature=0.0, max_tokens=MAX_MODEL_LEN - PROMPT_LEN, ignore_eos=True)
    for index in range(num_sequences):
        prompt_len = PROMPT_LEN - (0 if in_phase else index % config.block_size)
        prompt = [(index * 7919 + position) % 32000 for position in range(prompt_len)]
        scheduler.add(Request(request_id=f"cmpl-{index:032x}", prompt_token_ids=prompt, params=params, seed=index))
    times: dict[str, list[float]] = {name: [] for name in COLUMNS}
    front, engine = socket.socketpair()
    channel, decoder = EngineChannel(engine), FrameDecoder[ToFront](ToFront)
    for step in range(num_steps + 1):
        t0 = time.perf_counter()
        batch = scheduler.schedule()
        assert batch is not None
        t1 = time.perf_counter()
        inputs.build(batch)
        t2 = time.perf_counter()
        sampled = SampledTokens([(step * 31 + index) % 32000 for index in range(len(batch.sampling))])
        t3 = time.perf_counter()
        outputs = scheduler.update(batch, sampled)
        t4 = time.perf_counter()
        channel.send(StepResult(outputs=outputs, stats=scheduler.stats(), began=t0))
        t5 = time.perf_counter()
        (message,) = decoder.feed(front.recv(1 << 20))
        t6 = time.perf_counter()
        assert isinstance(message, StepResult)
        assert message.outputs == outputs
        if step:  # the first step computes the prompts
            assert batch.num_decodes == num_sequences
            seconds = (t1 - t0, t2 - t1, t4 - t3, t1 - t0 + t2 - t1 + t4 - t3, t5 - t4, t6 - t5)
            for name, value in zip(COLUMNS, seconds, strict=True):
                times[name].append(value)
    front.close()
    channel.close(0)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps measured at each size (default: 600)")
    parser.add_argument("--in-phase", action="store_true", help="all fill their blocks in the same steps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    results = {}
    print(f"{'sequences':>9}  " + "  ".join(f"{name:>8}" for name in COLUMNS) + "   ms a step, median")
    for num_sequences in (1, 16, 64, 256, 512):
        figures = results[num_sequences] = measure(num_sequences, args.steps, in_phase=args.in_phase)
        print(f"{num_sequences:9}  " + "  ".join(f"{figures[name]:8.3f}" for name in COLUMNS))
    if args.json:
        about = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"about": about, "ms_per_step": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
