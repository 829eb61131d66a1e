"""One repeat of one load on Quire's engine in this process: no HTTP, no client. For `serving.py --in-process-peer`.

    python benchmarks/serving.py MODEL --loads W2,W3 --in-process-peer \\
        'quire in process=python benchmarks/in_process.py {model} {workloads} {repeat} {rate} {out} --threads {threads}'

Peers that have no server are measured like this: whoever may send a request next does so between two steps, so that it
is in the very next one, and nobody but the engine computes. Beside them Quire is to be measured alike.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

_STARTED = time.perf_counter()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("load", help="W1, W2, W3 or W4: see serving.py --help")
    parser.add_argument("repeat", type=int, help="number of the repeat: prompts of their own")
    parser.add_argument("rate", type=float, help="arrivals per second of W4")
    parser.add_argument("out", type=Path, help="JSON to write, as measuring/engines.py says")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from measuring import loads
    from measuring.processes import pss_mib
    from measuring.summary import Record, summarize

    from quire import SamplingParams
    from quire.config import EngineConfig
    from quire.engine.engine import Engine
    from quire.scheduler.request import Request

    words = loads.Words(arguments.model)
    engine = Engine(EngineConfig(model=str(arguments.model), num_threads=arguments.threads))

    def step(records: dict[str, Record]) -> int:
        """Note the tokens of one step; how many requests have ended."""
        outputs, num_ended = engine.step(), 0
        now = time.perf_counter()
        for request_id, _, _, _ in outputs.tokens:
            records[request_id].pieces.append(now)
            records[request_id].num_output_tokens += 1
        for output in outputs.others:
            record = records[output.request_id]
            if output.token_ids:
                record.pieces.append(now)
                record.num_output_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                record.ended = now
                num_ended += 1
        return num_ended

    def run(name: str, repeat: int) -> tuple[list[Record], float]:
        requests = loads.make_requests(words.ids, name, repeat, arguments.rate)
        at_once = loads.concurrency(name)
        records = {
            str(index): Record(len(each.token_ids), each.num_output_tokens) for index, each in enumerate(requests)
        }
        begin, num_open, todo = time.perf_counter(), 0, list(enumerate(requests))[::-1]
        while todo or num_open:
            now = time.perf_counter()
            while todo and (num_open < at_once if at_once else now - begin >= (todo[-1][1].arrival or 0.0)):
                index, request = todo.pop()
                records[str(index)].sent = now if at_once else begin + (request.arrival or 0.0)
                params = SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0, ignore_eos=True)
                engine.add(
                    Request(request_id=str(index), prompt_token_ids=request.token_ids, params=params, seed=index)
                )
                num_open += 1
            if num_open:
                num_open -= step(records)
            else:
                time.sleep(max(0.0, begin + (todo[-1][1].arrival or 0.0) - now))
        return list(records.values()), time.perf_counter() - begin

    run("FIRST", 0)
    first_token_s = time.perf_counter() - _STARTED
    memory = pss_mib(os.getpid())
    run("WARM", 0)
    figures = asdict(summarize(*run(arguments.load, arguments.repeat)))
    body = {arguments.load: figures, "first_token_s": first_token_s, "memory_mib": memory}
    arguments.out.write_text(json.dumps(body))


if __name__ == "__main__":
    main()
