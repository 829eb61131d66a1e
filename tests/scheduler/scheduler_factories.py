"""Three-line cases: a scheduler, a request, a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from quire.config import SchedulerConfig
from quire.sampling_params import SamplingParams
from quire.scheduler.cached_prefix import CachedPrefix
from quire.scheduler.output import SampledTokens, ScheduledBatch, StepOutput
from quire.scheduler.prompts import Prompts
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence

EOS = 99
REQUEST_FIELDS = ("eos_token_ids", "priority", "cache_salt", "seed", "request_id")
_numbers = count()


class EagerPrompts(Prompts):
    """Admits whatever fits at this moment, so that a few tokens make a crowd."""

    def _has_room(self, sequence: Sequence, prefix: CachedPrefix, end: int) -> bool:
        blocks = self._scheduler.blocks
        return blocks.num_blocks_to_start(prefix, end) <= blocks.pool.num_free_blocks


class EagerScheduler(Scheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.prompts = EagerPrompts(self)


def make_scheduler(
    num_usable_blocks: int = 20, block_size: int = 4, scheduler_class: type[Scheduler] = Scheduler, **fields: Any
) -> Scheduler:
    return scheduler_class(SchedulerConfig(num_blocks=num_usable_blocks + 1, block_size=block_size, **fields))


def make_request(prompt: int | list[int], **fields: Any) -> Request:
    """`prompt`: token ids, or how many distinct ones. Fields go to Request or SamplingParams by name.

    Without `max_tokens` a request takes what the context and the pool have room for.
    """
    prompt_token_ids = list(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    own = {name: fields.pop(name) for name in REQUEST_FIELDS if name in fields}
    own = {"seed": 0, "eos_token_ids": (EOS,), "request_id": f"request-{next(_numbers)}"} | own
    return Request(prompt_token_ids=prompt_token_ids, params=SamplingParams(**{"max_tokens": None} | fields), **own)


def add(scheduler: Scheduler, prompt: int | list[int], **fields: Any) -> list[Sequence]:
    """Submit and return the choices."""
    request = make_request(prompt, **fields)
    scheduler.add(request)
    return list(scheduler.live[request.request_id])


def schedule(scheduler: Scheduler) -> ScheduledBatch:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_integrity()
    return batch


def finish_step(scheduler: Scheduler, batch: ScheduledBatch, token_id: int | None = 7) -> list[StepOutput]:
    outputs = list(scheduler.update(batch, SampledTokens([token_id] * len(batch.sampling))))
    scheduler.check_integrity()
    return outputs


def step(scheduler: Scheduler, token_id: int | None = 7) -> list[StepOutput]:
    """One whole step in which every row samples `token_id`."""
    return finish_step(scheduler, schedule(scheduler), token_id)


def run(scheduler: Scheduler, next_token: Callable[[Sequence], int] = lambda sequence: 7) -> list[StepOutput]:
    """Until nothing is left to do; all outputs."""
    outputs: list[StepOutput] = []
    while scheduler.has_work():
        batch = schedule(scheduler)
        tokens: list[int | None] = [next_token(batch.sequences[index]) for index in batch.sampling]
        outputs += scheduler.update(batch, SampledTokens(tokens))
        scheduler.check_integrity()
    return outputs
