"""The command line: flags people know, one line for every mistake, and a light front process."""

from __future__ import annotations

import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from quire.config import ConfigError, ExitCode
from quire.grammar import Grammar
from quire.sampling_params import SamplingParams
from quire.server.checkpoint import model_name, read_generation_defaults
from quire.server.cli import main, make_parser
from quire.server.flags import engine_config, key_digests, server_settings
from quire.server.sampling_flags import sampling_params
from quire.server.settings import GenerationDefaults, Limits, ServerSettings


def parse(*arguments: str) -> Namespace:
    return make_parser().parse_args(["serve", *arguments])


def quire(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), ("1m", 10**6), ("auto", None), ("-1", None)],
)
def test_model_lengths(text: str, value: int | None) -> None:
    assert parse(f"--max-model-len={text}").max_model_len == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1073741824", 2**30),
        ("2GiB", 2**31),
        ("2 GiB", 2**31),
        ("2GB", 2 * 10**9),
        ("512M", 512 * 2**20),
        ("512m", 512 * 10**6),
        ("0.5G", 2**29),
        ("64B", 64),
    ],
)
def test_byte_sizes(text: str, value: int) -> None:
    assert parse("--kv-cache-memory-bytes", text).kv_cache_memory_bytes == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-flag"],
        ["--max-model-len", "many"],
        ["--max-model-len", "1.0001k"],
        ["--kv-cache-memory-bytes", "2 GiBB"],
        ["--port", "99999"],
        ["--port", "x"],
        ["--block-size", "17"],
        ["--dtype", "int3"],
        ["--gpu-memory-utilization", "1.5"],
        ["--max-num-seqs", "0"],
        ["--target-itl-ms", "0"],
        ["--target-itl-ms", "fast"],
        ["--target-itl-ms", "50", "--no-enable-chunked-prefill"],
        ["--queue-timeout", "0"],
        ["--shutdown-timeout", "nan"],
        ["--host", "0.0.0.0"],
        ["--api-key", "two words"],
        ["--api-key-file", "/nonexistent"],
        ["--max-num-queued-reqs", "0"],
        ["--max-logprobs", "21"],
        ["--max-logprobs", "-1"],
        ["a", "b", "c"],
    ],
)
def test_bad_flags_are_one_line_and_exit_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    try:
        code: Any = main(["serve", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == ExitCode.BAD_ARGUMENTS
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("quire")
    assert output.err.count("\n") == 1


def test_no_command_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == ExitCode.BAD_ARGUMENTS
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_model_is_one_line_and_exit_4() -> None:
    done = quire("serve", "./no/such/model", "--port", "0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitCode.START_FAILED, "", 1), done.stderr
    assert "Traceback" not in done.stderr


def test_taken_port_is_one_line_and_exit_4_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = quire("serve", "--port", str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitCode.START_FAILED, "", 1), done.stderr
    assert done.stderr.startswith("quire: Cannot bind 127.0.0.1:")


def test_help_has_units_and_defaults() -> None:
    done = quire("serve", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for part in ("--max-model-len TOKENS", "2GiB, 512M", "(default: 8000)", "(default: 127.0.0.1)", "(default: 0.92)"):
        assert part in text
    for flag in (
        *("--host", "--port", "--dtype", "--device", "--served-model-name", "--max-num-seqs", "--block-size"),
        *("--max-num-batched-tokens", "--num-gpu-blocks-override", "--no-enable-prefix-caching", "--api-key"),
        *("--no-enable-chunked-prefill", "--scheduling-policy", "--api-key-file", "--allow-no-auth", "--seed"),
        *("--allowed-hosts", "--num-threads", "--shutdown-timeout", "--drain-grace", "--max-num-queued-reqs"),
        *("--strict", "--sse-keep-alive-interval", "--no-enable-log-requests", "--max-logprobs"),
        "--target-itl-ms MS",
    ):
        assert flag in text, flag


@pytest.mark.parametrize(
    "module",
    ["quire.server.cli", "quire.server.app", "quire.server.serve", "quire.server.generate", "quire.server.checkpoint"],
)
def test_front_process_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*({{'torch', 'triton', 'numba', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_slow_imports_wait_until_the_engine_process_has_begun() -> None:
    slow = {"fastapi", "huggingface_hub", "prometheus_client", "pydantic", "starlette", "uvicorn"}
    modules = "quire.server.cli, quire.server.checkpoint, quire.server.serve"
    code = f"import sys, {modules}; print(*({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_flags_reach_the_configuration(tmp_path: Path) -> None:
    flags = parse(
        *("--max-model-len", "2k", "--max-num-seqs", "4", "--num-gpu-blocks-override", "99", "--seed", "7"),
        *("--no-enable-prefix-caching", "--no-enable-chunked-prefill", "--scheduling-policy", "priority"),
        *("--dtype", "float32", "--device", "cpu", "--block-size", "32", "--num-threads", "1"),
    )
    config = engine_config(flags, tmp_path)
    assert config.target_itl_ms is None
    assert engine_config(parse("--target-itl-ms", "12.5"), tmp_path).target_itl_ms == 12.5
    assert (config.async_scheduling, config.enforce_eager) == (None, False)
    assert engine_config(parse("--async-scheduling", "--enforce-eager"), tmp_path).async_scheduling is True
    assert engine_config(parse("--no-async-scheduling", "--enforce-eager"), tmp_path).async_scheduling is False
    assert engine_config(parse("--enforce-eager"), tmp_path).enforce_eager is True
    assert (config.model, config.max_model_len, config.max_num_seqs, config.num_blocks) == (str(tmp_path), 2000, 4, 99)
    assert (config.enable_prefix_caching, config.enable_chunked_prefill) == (False, False)
    assert (config.scheduling_policy, config.dtype, config.device) == ("priority", "float32", "cpu")
    assert (config.block_size, config.num_threads, config.seed) == (32, 1, 7)
    flags = parse(
        "m", "--served-model-name", "a", "b", "--strict", "--max-num-queued-reqs", "3", "--max-body-bytes", "1M"
    )
    settings = server_settings(flags, "m", GenerationDefaults(top_k=5))
    assert (settings.served_model_names, settings.strict) == (("a", "b"), True)
    assert (settings.limits.max_queued_requests, settings.limits.max_body_bytes) == (3, 2**20)
    assert settings.generation_defaults.top_k == 5
    assert not settings.serves("m")


def test_defaults_of_the_flags_are_those_of_the_settings() -> None:
    assert server_settings(parse(), "m", GenerationDefaults()) == ServerSettings(served_model_names=("m",))


def test_old_name_of_a_flag() -> None:
    assert not parse("--disable-log-requests").enable_log_requests
    assert parse("--enable-log-requests").enable_log_requests
    assert not parse().enable_log_requests


def test_open_bind_needs_a_key_or_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    defaults = GenerationDefaults()
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.org", ""):
        with pytest.raises(ConfigError, match="open to other machines"):
            server_settings(parse("--host", host), "m", defaults)
    assert server_settings(parse("--host", "0.0.0.0", "--allow-no-auth"), "m", defaults).allowed_hosts[-1] == "<ip>"
    path = tmp_path / "keys"
    path.write_text("k\n")
    assert server_settings(parse("--host", "0.0.0.0", "--api-key-file", str(path)), "m", defaults).allowed_hosts == (
        "*",
    )
    monkeypatch.setenv("QUIRE_API_KEY", "k")
    assert len(key_digests(parse("--api-key", "k", "--api-key", "l", "--api-key-file", str(path)))) == 2
    given = server_settings(parse("--host", "0.0.0.0", "--allowed-hosts", "A.example"), "m", defaults)
    assert given.allowed_hosts == ("a.example",)


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert model_name(None) == "tales"
    assert model_name(str(tmp_path / "llama")) == "llama"
    assert model_name("org/name") == "org/name"


def test_generation_config_gives_defaults_and_says_what_is_not_honoured(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == (GenerationDefaults(), [])
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "num_beams": 4}')
    defaults, warnings = read_generation_defaults(tmp_path)
    assert defaults == GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05)
    assert len(warnings) == 1
    assert "num_beams=4" in warnings[0]
    for content in (
        "[]",
        "{",
        '{"temperature": "hot"}',
        '{"top_p": 7}',
        '{"top_k": NaN}',
        "[" * 100_000,
        '{"repetition_penalty": 0}',
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read_generation_defaults(tmp_path)


def test_sampling_flags() -> None:
    flags = make_parser().parse_args(
        ["generate", "Once", "--max-tokens", "5", "--top-p", "0.5", "--stop", "a", "--stop", "b"]
    )
    assert (flags.model, flags.prompt) == (None, "Once")
    params = sampling_params(flags, GenerationDefaults(temperature=0.6))
    assert (params.max_tokens, params.temperature, params.top_p, params.stop) == (5, 0.6, 0.5, ("a", "b"))
    flags = make_parser().parse_args(["generate", "model", "Once", "--temperature", "3"])
    assert (flags.model, flags.prompt) == ("model", "Once")
    with pytest.raises(ConfigError):
        sampling_params(flags, GenerationDefaults())


def test_flags_of_structured_output(tmp_path: Path) -> None:
    def grammar(*arguments: str) -> Grammar | None:
        flags = make_parser().parse_args(["generate", "Once", *arguments])
        return sampling_params(flags, GenerationDefaults()).grammar

    file = tmp_path / "schema.json"
    file.write_text('{"type": "integer"}')
    assert grammar() is None
    assert grammar("--regex", "[a-z]+") == Grammar("regex", "[a-z]+")
    assert grammar("--json-schema", ' {"type": "null"}') == Grammar("json_schema", ' {"type": "null"}')
    assert grammar("--json-schema", str(file)) == Grammar("json_schema", '{"type": "integer"}')
    for wrong in (("--json-schema", "{"), ("--json-schema", "/nowhere"), ("--regex", "x" * 1025)):
        with pytest.raises(ConfigError):
            grammar(*wrong)
    with pytest.raises(SystemExit):
        grammar("--regex", "a", "--json-schema", "{}")


def test_limits_are_positive() -> None:
    with pytest.raises(ConfigError):
        Limits(stall_timeout=0)
    with pytest.raises(ConfigError):
        Limits(max_body_bytes=-1)


def test_flags_of_penalties_and_beams() -> None:
    def params(*arguments: str) -> SamplingParams:
        flags = make_parser().parse_args(["generate", "Once", *arguments])
        return sampling_params(flags, GenerationDefaults(top_k=20, top_p=0.9, repetition_penalty=1.1))

    plain = params("--presence-penalty", "0.5", "--frequency-penalty", "-1", "--bad-word", "a", "--bad-word", "b c")
    assert (plain.presence_penalty, plain.frequency_penalty, plain.bad_words) == (0.5, -1.0, ("a", "b c"))
    assert (plain.repetition_penalty, plain.top_k, plain.use_beam_search, plain.best_of) == (1.1, 20, False, None)
    beams = params("--num-beams", "4", "--length-penalty", "2", "--early-stopping", "never")
    assert (beams.best_of, beams.n, beams.use_beam_search, beams.length_penalty) == (4, 1, True, 2.0)
    assert (beams.early_stopping, beams.top_k, beams.top_p, beams.repetition_penalty) == ("never", 0, 1.0, 1.1)
    for arguments in (("--num-beams", "0"), ("--num-beams", "17"), ("--length-penalty", "2"), ("--typical-p", "0")):
        with pytest.raises(ConfigError):
            params(*arguments)


def test_most_log_probabilities_is_one_flag_for_both_sides(tmp_path: Path) -> None:
    flags = parse("--max-logprobs", "5")
    assert engine_config(flags, tmp_path).max_logprobs == 5
    assert server_settings(flags, "m", GenerationDefaults()).max_logprobs == 5
    with pytest.raises(ConfigError, match="--max-logprobs must be from 0 to 20"):
        ServerSettings(served_model_names=("m",), max_logprobs=21)
