"""The command line. Every failure is one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quire import __version__
from quire.config import ConfigError, ExitCode
from quire.server.flags import FlagParser, add_engine_flags, add_server_flags, engine_config, server_settings
from quire.server.sampling_flags import add_sampling_flags, sampling_params
from quire.server.settings import GenerationDefaults

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("quire.server")

_THREAD_END_SECONDS: Final = 0.5
_MODEL_HELP: Final = "directory of a Hugging Face checkpoint, or a hub name (default: the bundled model)"


def make_parser() -> argparse.ArgumentParser:
    root = FlagParser(prog="quire", description="Serves language models from a paged KV-cache.", allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"quire {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="{serve,generate}")

    serve = commands.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    serve.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    add_server_flags(serve)
    add_engine_flags(serve)
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="complete one prompt in the terminal", allow_abbrev=False)
    generate.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    generate.add_argument("prompt", metavar="PROMPT", help="the text to go on from")
    add_sampling_flags(generate)
    add_engine_flags(generate)
    generate.set_defaults(run=_generate)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    flags = make_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if flags.command == "serve" else logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    # The guard logs every failure of a request itself, without what clients can write into a log.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    run: Callable[[argparse.Namespace], int] = flags.run
    # Until the event loop has its own handlers: what is stopped while it starts is stopped cleanly.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = run(flags)
    except ConfigError as error:
        code = _fail(error, ExitCode.BAD_ARGUMENTS)
    except KeyboardInterrupt:
        code = ExitCode.CLEAN
    finally:
        signal.signal(signal.SIGTERM, before)
    return _leave(code)


def _serve(flags: argparse.Namespace) -> int:
    # Flags first: a wrong one should not wait for a model.
    engine_config(flags, Path())
    server_settings(flags, "model", GenerationDefaults())
    if flags.api_key:
        logger.warning("--api-key is visible to every user of this machine; --api-key-file is not.")

    def work(directory: Path, defaults: GenerationDefaults, console: Console) -> Coroutine[Any, Any, ExitCode]:
        from quire.server.checkpoint import model_name
        from quire.server.serve import serve

        settings = server_settings(flags, model_name(flags.model), defaults)
        return serve(engine_config(flags, directory), settings, console)

    return _run(flags, work)


def _generate(flags: argparse.Namespace) -> int:
    engine_config(flags, Path())
    sampling_params(flags, GenerationDefaults())

    def work(directory: Path, defaults: GenerationDefaults, console: Console) -> Coroutine[Any, Any, ExitCode]:
        from quire.server.generate import generate

        return generate(engine_config(flags, directory), flags.prompt, sampling_params(flags, defaults), console)

    return _run(flags, work)


Work = Callable[[Path, GenerationDefaults, "Console"], Coroutine[Any, Any, ExitCode]]


def _run(flags: argparse.Namespace, work: Work) -> int:
    """Find the model, then run `work` in an event loop; what fails from here on is a failed start."""
    from rich.console import Console

    from quire.engine.client import EngineStartError
    from quire.server.checkpoint import find_model, read_generation_defaults

    try:
        directory = find_model(flags.model)
        defaults, warnings = read_generation_defaults(directory)
        for warning in warnings:
            logger.warning("%s", warning)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(work(directory, defaults, Console(stderr=True)))
    except ConfigError as error:
        return _fail(error, ExitCode.START_FAILED)
    except EngineStartError as error:
        return _fail(error, error.exit_code)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None


def _fail(error: Exception, code: int) -> int:
    print("quire: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _leave(code: int) -> int:
    """Hand back the exit code, unless a worker thread is still busy: the interpreter would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    deadline = time.monotonic() + _THREAD_END_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                os._exit(code)
    return code
