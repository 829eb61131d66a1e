"""Command-line flags: the names that people know from `vllm serve`, their units, and what they turn into."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path
from typing import Final, NoReturn

from quire.config import ConfigError, EngineConfig, ExitCode, SpeculativeConfig
from quire.sampling_params import MAX_LOGPROBS
from quire.server.auth import key_digest, read_key_file
from quire.server.settings import GenerationDefaults, Limits, ServerSettings
from quire.server.speculative_flag import EXAMPLE, speculative_config

API_KEY_VARIABLE: Final = "QUIRE_API_KEY"

_DECIMAL: Final = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BYTE_UNITS: Final = {
    **{unit.upper() + "iB": factor for unit, factor in zip("kmgt", _BINARY.values(), strict=True)},
    **{unit.upper() + "B": factor for unit, factor in _DECIMAL.items()},
}
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


class FlagParser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with the code for bad arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.BAD_ARGUMENTS, f"{self.prog}: {message} (--help lists the flags)\n")


def scaled_integer(text: str) -> int:
    """Plain, or with k m g t (powers of 1000) or K M G T (powers of 1024); 32k is 32000, as in vLLM."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgtKMGT]?)", text.strip())
    if match is None or len(text) > 32:
        raise argparse.ArgumentTypeError("expected an integer such as 4096, 4K or 32k")
    return _scaled(match[1], {**_DECIMAL, **_BINARY, "": 1}[match[2]])


def byte_size(text: str) -> int:
    """Plain bytes, or with GiB (1024^3), GB (1000^3) and their like; a bare 512M is 512 MiB, as in vLLM."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B|B|[kmgtKMGT]?)", text.strip())
    if match is None or len(text) > 32:
        raise argparse.ArgumentTypeError("expected bytes such as 2GiB, 512M or 1073741824")
    return _scaled(match[1], {**_DECIMAL, **_BINARY, **_BYTE_UNITS, "B": 1, "": 1}[match[2]])


def model_length(text: str) -> int | None:
    """Tokens, or `auto`: what the model has."""
    return None if text in ("auto", "-1") else scaled_integer(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError("expected seconds from 0 to 86400")
    return value


def _scaled(number: str, factor: int) -> int:
    value = float(number) * factor if "." in number else int(number) * factor
    if value != int(value):
        raise argparse.ArgumentTypeError("expected a whole number")
    return int(value)


def _switch(group: argparse._ArgumentGroup, name: str, default: bool, text: str) -> None:
    group.add_argument(
        name, action=argparse.BooleanOptionalAction, default=default, help=f"{text} (default: {default})"
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    model.add_argument(
        "--quantization",
        choices=("int8", "int4", "fp8"),
        help="round weights at load: to int8 or int4, which makes a CPU decode faster, or to fp8 on a GPU that "
        "multiplies it (compute capability 8.9 or newer, AMD MI300) (default: weights as they are)",
    )
    model.add_argument(
        "--max-model-len",
        type=model_length,
        metavar="TOKENS",
        help="longest prompt and output together: 4096, 4K, 32k or auto (default: auto, what the model has)",
    )
    model.add_argument("--seed", type=int, default=0, help="seed of requests that bring none (default: %(default)s)")
    model.add_argument(
        "--max-logprobs",
        type=int,
        default=MAX_LOGPROBS,
        metavar="N",
        help="most log-probabilities at each position that a request may ask for, 0 to 20 (default: %(default)s)",
    )
    model.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of the engine (default: all cores)")
    model.add_argument(
        "--bind-threads",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU, where the engine has a thread for each core, keep each to a core of its own and the HTTP "
        "process off the core of the one that schedules (default: on; OMP_PLACES and the like come first)",
    )

    memory = parser.add_argument_group("KV-cache")
    memory.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "int8", "fp8"),
        default="auto",
        help="int8: a byte for each number and a scale for each token and head, about half the memory of bfloat16; "
        "fp8: as much, as e4m3, on GPUs that have it (default: %(default)s, the model's dtype; if --dtype auto "
        "computes in float32 for want of bfloat16, the checkpoint's)",
    )
    memory.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.92,
        metavar="SHARE",
        help="share of the GPU's memory to use, in (0, 1] (default: %(default)s)",
    )
    memory.add_argument(
        "--kv-cache-memory-bytes",
        type=byte_size,
        metavar="BYTES",
        help="size of the KV-cache: 2GiB, 512M or plain bytes (default: what the memory budget leaves)",
    )
    memory.add_argument(
        "--num-gpu-blocks-override", type=int, metavar="N", help="blocks of the KV-cache; overrides every budget"
    )
    memory.add_argument(
        "--block-size", type=int, default=16, metavar="TOKENS", help="tokens in a block (default: %(default)s)"
    )
    _switch(memory, "--enable-prefix-caching", True, "reuse blocks of equal prefixes")

    scheduler = parser.add_argument_group("scheduler")
    scheduler.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="sequences that run at once (default: 64 on CPU, 256 on GPU)"
    )
    scheduler.add_argument(
        "--max-num-batched-tokens",
        type=scaled_integer,
        metavar="TOKENS",
        help="token budget of one step (default: 2048 on GPU; on CPU 64 for each thread, "
        "from 128 to 2048, and half of that for prompts while others decode)",
    )
    scheduler.add_argument(
        "--target-itl-ms",
        type=float,
        metavar="MS",
        help="milliseconds between tokens that prompts beside may cause: sizes their chunks by how long steps take "
        "(default: no more than --max-num-batched-tokens)",
    )
    scheduler.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="schedule the next step while one runs; ends are noticed a step late (default: on a GPU)",
    )
    scheduler.add_argument("--enforce-eager", action="store_true", help="on a GPU do not replay decodes as CUDA graphs")
    _switch(scheduler, "--enable-chunked-prefill", True, "compute long prompts in chunks")
    scheduler.add_argument(
        "--scheduling-policy", choices=("fcfs", "priority"), default="fcfs", help="(default: %(default)s)"
    )
    scheduler.add_argument(
        "--speculative-config",
        type=speculative_config,
        default=SpeculativeConfig(),
        metavar="JSON",
        help=f"guess tokens from the text so far; the output is the same: {EXAMPLE} (default: only who asks for it)",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    limits, settings = Limits(), ServerSettings(served_model_names=("model",))
    server = parser.add_argument_group("server")
    server.add_argument("--host", default=settings.host, help="address to bind (default: %(default)s)")
    server.add_argument("--port", type=int, default=settings.port, help="0: any free one (default: %(default)s)")
    server.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names of the model; the first is shown in answers"
    )
    _switch(server, "--strict", False, "refuse unknown request fields instead of reporting them")
    _switch(server, "--enable-log-requests", False, "one line per request; never prompts or keys")
    server.add_argument(
        "--disable-log-requests", action="store_false", dest="enable_log_requests", help=argparse.SUPPRESS
    )
    server.add_argument(
        "--sse-keep-alive-interval",
        type=seconds,
        default=settings.sse_keep_alive_interval,
        metavar="SECONDS",
        help="comment line on silent streams; 0: never (default: %(default)g)",
    )

    access = parser.add_argument_group("access")
    access.add_argument("--api-key-file", type=Path, metavar="FILE", help="one key per line; best")
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"may be given again; visible to every user of this machine, unlike the variable {API_KEY_VARIABLE}",
    )
    access.add_argument(
        "--allow-no-auth", action="store_true", help="serve other machines without any key: anyone who can reach it"
    )
    access.add_argument(
        "--allowed-hosts",
        nargs="+",
        metavar="HOST",
        help="values of the Host header to answer, without port; * for any (default: the bound address and localhost)",
    )

    bounds = parser.add_argument_group("bounds")
    bounds.add_argument(
        "--max-num-queued-reqs",
        type=int,
        metavar="N",
        help="requests that may wait, others get 503 (default: 4 x --max-num-seqs)",
    )
    bounds.add_argument(
        "--max-num-queued-tokens",
        type=scaled_integer,
        metavar="TOKENS",
        help="prompt tokens that may wait (default: 16 x --max-num-batched-tokens, at least 32768)",
    )
    bounds.add_argument(
        "--max-body-bytes", type=byte_size, default=limits.max_body_bytes, metavar="BYTES", help="(default: 4MiB)"
    )
    bounds.add_argument(
        "--max-connections", type=int, default=limits.max_connections, metavar="N", help="(default: %(default)s)"
    )
    for flag, value, text in (
        ("--queue-timeout", limits.queue_timeout, "longest wait for the first token"),
        ("--token-gap-timeout", limits.token_gap_timeout, "longest wait for a further token"),
        ("--request-timeout", limits.request_timeout, "longest request"),
        ("--stall-timeout", limits.stall_timeout, "longest time that a client may read nothing"),
        ("--shutdown-timeout", settings.shutdown_timeout, "how long running requests may go on after SIGTERM"),
        ("--drain-grace", settings.drain_grace, "how long the port stays open after SIGTERM"),
    ):
        bounds.add_argument(flag, type=seconds, default=value, metavar="SECONDS", help=f"{text} (default: {value:g})")


def engine_config(flags: argparse.Namespace, model_dir: Path) -> EngineConfig:
    """Raises ConfigError."""
    return EngineConfig(
        model=str(model_dir),
        dtype=flags.dtype,
        device=flags.device,
        quantization=flags.quantization,
        kv_cache_dtype=flags.kv_cache_dtype,
        seed=flags.seed,
        max_model_len=flags.max_model_len,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        target_itl_ms=flags.target_itl_ms,
        block_size=flags.block_size,
        num_blocks=flags.num_gpu_blocks_override,
        kv_cache_memory_bytes=flags.kv_cache_memory_bytes,
        gpu_memory_utilization=flags.gpu_memory_utilization,
        enable_prefix_caching=flags.enable_prefix_caching,
        enable_chunked_prefill=flags.enable_chunked_prefill,
        scheduling_policy=flags.scheduling_policy,
        speculative_config=flags.speculative_config,
        num_threads=flags.num_threads,
        bind_threads=flags.bind_threads,
        async_scheduling=flags.async_scheduling,
        enforce_eager=flags.enforce_eager,
        max_logprobs=flags.max_logprobs,
    )


def server_settings(flags: argparse.Namespace, name: str, defaults: GenerationDefaults) -> ServerSettings:
    """Raises ConfigError."""
    digests = key_digests(flags)
    if flags.host not in _LOOPBACK and not digests and not flags.allow_no_auth:
        raise ConfigError(
            f"--host {flags.host} is open to other machines: set keys (--api-key-file) or say --allow-no-auth."
        )
    served = tuple(flags.served_model_name or [name])
    return ServerSettings(
        served_model_names=served,
        model_aliases=() if flags.served_model_name or not flags.model else (flags.model,),
        host=flags.host,
        port=flags.port,
        key_digests=digests,
        allowed_hosts=_allowed_hosts(flags, bool(digests)),
        strict=flags.strict,
        scheduling_policy=flags.scheduling_policy,
        sse_keep_alive_interval=flags.sse_keep_alive_interval,
        shutdown_timeout=flags.shutdown_timeout,
        drain_grace=flags.drain_grace,
        log_requests=flags.enable_log_requests,
        max_logprobs=flags.max_logprobs,
        limits=Limits(
            max_body_bytes=flags.max_body_bytes,
            max_connections=flags.max_connections,
            queue_timeout=flags.queue_timeout,
            token_gap_timeout=flags.token_gap_timeout,
            request_timeout=flags.request_timeout,
            stall_timeout=flags.stall_timeout,
            max_queued_requests=flags.max_num_queued_reqs,
            max_queued_tokens=flags.max_num_queued_tokens,
        ),
        generation_defaults=defaults,
    )


def key_digests(flags: argparse.Namespace) -> tuple[bytes, ...]:
    """Digests of the keys of all three sources."""
    keys = list(flags.api_key)
    if flags.api_key_file is not None:
        keys += read_key_file(flags.api_key_file)
    if variable := os.environ.get(API_KEY_VARIABLE):
        keys.append(variable)
    return tuple(dict.fromkeys(key_digest(key) for key in keys))


def _allowed_hosts(flags: argparse.Namespace, has_keys: bool) -> tuple[str, ...]:
    """A page in a browser can make its own name point here (DNS rebinding), so a server that asks for no key answers
    only to names that are known to be its own; an address literal cannot be rebound."""
    if flags.allowed_hosts:
        return tuple(host.lower() for host in flags.allowed_hosts)
    own = ("127.0.0.1", "localhost", "[::1]")
    if flags.host in _LOOPBACK:
        return own
    return ("*",) if has_keys else (*own, flags.host.lower(), "<ip>")
