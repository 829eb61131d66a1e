"""An engine process without a model: each choice says its prompt again, token by token, or misbehaves as it is told.

The configuration's `model` is "name" or "name:number":

    echo:N          N tokens a step for each choice (default 1)
    slow:MS         echo with so many milliseconds a step
    bad-model       a ConfigError at start
    broken          any other exception at start
    vanishing       the process exits while it starts
    loading         a start that takes 60 s
    hanging:N       step N takes 60 s
    failing:N       step N raises
    garbage:N       step N writes bytes that are no frame

Steps are counted from the newest request on, so that a burst of requests is in before the fault.

Log-probabilities are invented from token and choice; a beam search ends as any other request does.

A prompt of one token 13 is refused as the scheduler would refuse it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time

from quire.config import ConfigError, EngineConfig
from quire.engine.messages import EngineInfo
from quire.engine.process import Progress, serve
from quire.scheduler.output import FinishReason, SchedulerStats, StepOutput, StepOutputs, TokenLogProbs
from quire.scheduler.request import AdmissionError, Request

REFUSED = [13]


class FakeEngine:
    def __init__(self, config: EngineConfig, progress: Progress, fd: int) -> None:
        self._name, _, number = config.model.partition(":")
        self._number = int(number or "1")
        self._fd = fd
        for done in range(1001):
            progress("weights", done, 1000)
        if self._name == "bad-model":
            raise ConfigError("config.json is missing. Give a checkpoint directory.")
        if self._name == "broken":
            raise RuntimeError("first line\nsecond line")
        if self._name == "vanishing":
            os._exit(9)
        if self._name == "loading":
            time.sleep(60)
        self._requests: dict[str, tuple[Request, dict[int, int]]] = {}
        self._num_steps = 0
        self.started: list[str] = []
        self._num_steps_since_add = 0
        self._num_aborts = 0
        self.info = EngineInfo(
            architecture="Fake",
            vocab_size=1000,
            max_model_len=config.max_model_len or 100_000,
            eos_token_ids=[2],
            block_size=config.block_size,
            num_blocks=100,
            max_num_seqs=4,
            max_num_batched_tokens=config.max_num_batched_tokens or 2048,
            dtype="float32",
            device="cpu",
            enable_prefix_caching=True,
            max_logprobs=20,
            memory_budget=["pages  1 KiB"],
        )

    def add(self, request: Request) -> None:
        if request.prompt_token_ids == REFUSED:
            raise AdmissionError("It can never fit.", code="context_length_exceeded", param="prompt")
        if request.eos_token_ids != (2,) or not 0 <= request.seed < 2**64:
            raise AdmissionError("The request was not filled in.", code="test", param="seed")
        self._num_steps_since_add = 0
        params = request.params
        num_choices = params.n if params.use_beam_search else params.num_sequences
        self._requests[request.request_id] = (request, dict.fromkeys(range(num_choices), 0))

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        self._num_aborts += 1
        if choice_index is None:
            self._requests.pop(request_id, None)
        elif entry := self._requests.get(request_id):
            entry[1].pop(choice_index, None)
            if not entry[1]:
                del self._requests[request_id]

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> StepOutputs:
        self._num_steps += 1
        self.started = list(self._requests)
        self._num_steps_since_add += 1
        if self._num_steps_since_add == self._number:
            self._misbehave()
        if self._name == "slow":
            time.sleep(self._number / 1000)
        outputs = StepOutputs()
        for request_id, (request, choices) in list(self._requests.items()):
            for index in list(choices):
                output = self._advance(request, choices, index)
                if output == StepOutput(request_id, index, output.token_ids[:1]) and output.token_ids:
                    outputs.tokens.append((request_id, index, output.token_ids[0], 0))
                else:
                    outputs.others.append(output)
            if not choices:
                del self._requests[request_id]
        return outputs

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._requests), num_steps=self._num_steps, num_preemptions=self._num_aborts
        )

    def reset_prefix_cache(self) -> None:
        self._num_steps = 0

    def _misbehave(self) -> None:
        if self._name == "hanging":
            time.sleep(60)
        if self._name == "failing":
            raise RuntimeError("the step failed")
        if self._name == "garbage":
            socket.socket(fileno=os.dup(self._fd)).send(b"\xff" * 64)
            time.sleep(60)

    def _advance(self, request: Request, choices: dict[int, int], index: int) -> StepOutput:
        prompt, params = request.prompt_token_ids, request.params
        limit = len(prompt) if params.max_tokens is None else params.max_tokens
        start = choices[index]
        end = min(start + (self._number if self._name == "echo" else 1), limit)
        output = StepOutput(request.request_id, index, [prompt[i % len(prompt)] for i in range(start, end)])
        if params.logprobs is not None:
            output.log_probs = [log_probs_of(token_id, index, params.logprobs) for token_id in output.token_ids]
        if params.prompt_logprobs is not None and start == index == 0:
            output.prompt_log_probs = [log_probs_of(token_id, 0, params.prompt_logprobs) for token_id in prompt[1:]]
        choices[index] = end
        if end == limit:
            output.finish_reason = FinishReason.LENGTH
            output.cumulative_log_prob = -1.0 - index if params.use_beam_search else None
            del choices[index]
        return output


def log_probs_of(token_id: int, index: int, num_top: int) -> TokenLogProbs:
    """Odd choices are more probable than even ones."""
    top = [*range(num_top)]
    return TokenLogProbs(token_id, -1.0 / (1 + index % 2) - token_id / 1024, top, [-0.5 - rank for rank in top])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    fd = parser.parse_args().fd
    return serve(fd, make_engine=lambda config, progress: FakeEngine(config, progress, fd))


if __name__ == "__main__":
    sys.exit(main())
