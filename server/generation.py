"""What the engine says about the jobs of one request, as one stream of batches; leaving it aborts them all."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from quire.engine.client import EngineDeadError, RequestRejected
from quire.engine.delta_queue import ReaderTooSlowError, Sink
from quire.server.errors import ApiError, RejectedByEngine
from quire.server.prompts import PromptJob

if TYPE_CHECKING:
    from quire.engine.client import EngineClient
    from quire.engine.text_delta import TextDelta


class ClientTooSlowError(Exception):
    """The client leaves so much unread that its request was given up."""


DeltaBatch = list[tuple[PromptJob, "TextDelta"]]


async def generate(
    client: EngineClient,
    jobs: list[PromptJob],
    *,
    priority: int,
    cache_salt: str,
    sink: Sink | None = None,
) -> AsyncGenerator[DeltaBatch, None]:
    """Yield what each engine step brought; an empty batch says that the engine has begun.

    Closing or cancelling it aborts every job in the engine. A `sink` is offered what a step brings while the reader
    waits for it; not those of a request with several jobs, whose steps are gathered first. It is to leave the end of a
    choice to the reader.

    Raises:
        ApiError: the engine refuses a job, is not running, or computed what is not a number.
    """
    batches = (
        _one(client, jobs[0], priority, cache_salt, sink)
        if len(jobs) == 1
        else _many(client, jobs, priority, cache_salt)
    )
    try:
        async with aclosing(batches):
            async for batch in batches:
                for _, delta in batch:
                    if delta.finish_reason == "error":
                        raise ApiError(delta.error or "numerical_error")
                yield batch
    except RequestRejected as error:
        raise RejectedByEngine(str(error), error.code, error.param) from None
    except EngineDeadError:
        raise ApiError("engine_unavailable") from None
    except ReaderTooSlowError:
        raise ClientTooSlowError from None


async def _one(
    client: EngineClient, job: PromptJob, priority: int, cache_salt: str, sink: Sink | None = None
) -> AsyncGenerator[DeltaBatch, None]:
    # Ids that clients choose may repeat; the engine's own never do.
    request_id = secrets.token_hex(16)
    deltas = client.generate(request_id, job.token_ids, job.params, priority=priority, cache_salt=cache_salt, sink=sink)
    async with aclosing(deltas):
        async for step in deltas:
            yield [(job, delta) for delta in step]


async def _many(
    client: EngineClient, jobs: list[PromptJob], priority: int, cache_salt: str
) -> AsyncGenerator[DeltaBatch, None]:
    """All jobs at once; what is there at the same time comes in one batch."""
    # Bounded: what a slow client does not take waits in the engine client, which merges it and knows a limit.
    queue: asyncio.Queue[DeltaBatch | Exception | None] = asyncio.Queue(maxsize=len(jobs))

    async def pump(job: PromptJob) -> None:
        try:
            async with aclosing(_one(client, job, priority, cache_salt)) as batches:
                async for batch in batches:
                    await queue.put(batch)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(job)) for job in jobs]
    try:
        num_live = len(pumps)
        while num_live:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            begun, merged = False, []
            for item in items:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_live -= 1
                else:
                    begun = True
                    merged += item
            if begun:
                yield merged
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
