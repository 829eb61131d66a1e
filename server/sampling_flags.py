"""Sampling on the command line."""

from __future__ import annotations

import argparse

from quire.config import ConfigError
from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.server.settings import GenerationDefaults


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    for flag, kind, text in (
        ("--temperature", float, "0: greedy; up to 2"),
        ("--top-k", int, "0: off"),
        ("--top-p", float, "in (0, 1]"),
        ("--min-p", float, "in [0, 1]"),
    ):
        sampling.add_argument(flag, type=kind, metavar="X", help=f"{text} (default: what the model recommends)")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end there; may be given again")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of text")


def sampling_params(flags: argparse.Namespace, defaults: GenerationDefaults) -> SamplingParams:
    """Raises ConfigError: a flag is out of its bounds."""

    def given(name: str) -> float:
        value: float | None = getattr(flags, name)
        return getattr(defaults, name) if value is None else value

    try:
        return SamplingParams(
            max_tokens=flags.max_tokens,
            temperature=given("temperature"),
            top_k=int(given("top_k")),
            top_p=given("top_p"),
            min_p=given("min_p"),
            stop=tuple(flags.stop),
            ignore_eos=flags.ignore_eos,
        )
    except InvalidParameterError as error:
        raise ConfigError(str(error)) from None
