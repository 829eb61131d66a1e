"""`quire generate`: one prompt in the terminal, streamed."""

from __future__ import annotations

import asyncio
import signal
from contextlib import aclosing
from pathlib import Path

from rich.console import Console

from quire.config import ConfigError, EngineConfig, ExitCode
from quire.engine.client import EngineClient, EngineDeadError, EngineStartError, RequestRejected
from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.server.loading import LoadingDisplay


async def generate(config: EngineConfig, prompt: str, params: SamplingParams, console: Console) -> ExitCode:
    """Stream one completion to stdout; Ctrl-C ends it.

    Raises:
        EngineStartError: the engine cannot start.
        ConfigError: the prompt cannot be run.
    """
    work = asyncio.ensure_future(_generate(config, prompt, params, console))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        print()
        return ExitCode.CLEAN
    except (RequestRejected, InvalidParameterError) as error:
        raise ConfigError(str(error)) from None
    except EngineDeadError:
        raise EngineStartError("The engine ended while it generated.", ExitCode.ENGINE_LOST) from None


async def _generate(config: EngineConfig, prompt: str, params: SamplingParams, console: Console) -> ExitCode:
    with LoadingDisplay(console) as display:
        client = await EngineClient.start(config, Path(config.model), display.update)
    try:
        token_ids = await client.tokenizer.encode(prompt)
        params = await client.tokenizer.with_bad_word_ids(params)
        print(prompt, end="", flush=True)
        async with aclosing(client.generate("generate", token_ids, params)) as steps:
            async for step in steps:
                print("".join(delta.text for delta in step), end="", flush=True)
        print()
        return ExitCode.CLEAN
    finally:
        await client.stop(1.0)
