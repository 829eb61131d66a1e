"""Sampling on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from quire.config import ConfigError
from quire.grammar import MAX_SCHEMA_BYTES, Grammar, GrammarError
from quire.sampling_params import EarlyStopping, InvalidParameterError, SamplingParams
from quire.server.settings import GenerationDefaults


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    for flag, kind, text in (
        ("--temperature", float, "0: greedy; up to 2"),
        ("--top-k", int, "0: off"),
        ("--top-p", float, "in (0, 1]"),
        ("--min-p", float, "in [0, 1]"),
        ("--typical-p", float, "in (0, 1]"),
        ("--repetition-penalty", float, "in (0, 100]; 1: off"),
    ):
        sampling.add_argument(flag, type=kind, metavar="X", help=f"{text} (default: what the model recommends)")
    for flag, text in (
        ("--presence-penalty", "for tokens that occurred, -2 to 2"),
        ("--frequency-penalty", "for each time that a token occurred, -2 to 2"),
    ):
        sampling.add_argument(flag, type=float, default=0.0, metavar="X", help=f"{text} (default: %(default)g)")
    sampling.add_argument(
        "--bad-word", action="append", default=[], metavar="TEXT", help="never write this; may be given again"
    )
    sampling.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="tokens guessed and verified in one step, 0 to 16; the text is the same (default: what the engine has)",
    )
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end there; may be given again")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of text")

    structure = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    structure.add_argument(
        "--json-schema", metavar="SCHEMA", help="write JSON that fits this schema, or that in a file"
    )
    structure.add_argument("--regex", metavar="REGEX", help="write what this matches as a whole")

    beams = parser.add_argument_group("beam search")
    beams.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="beams, 1 to 16; 1: no search (default: %(default)s)"
    )
    beams.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="scores are divided by length ** X, -10 to 10 (default: %(default)g)",
    )
    beams.add_argument(
        "--early-stopping",
        choices=("false", "true", "never"),
        default="false",
        help="true: end once N hypotheses are finished; never: once none can become better (default: %(default)s)",
    )


def sampling_params(flags: argparse.Namespace, defaults: GenerationDefaults) -> SamplingParams:
    """Raises ConfigError: a flag is out of its bounds."""

    searches = flags.num_beams != 1
    if searches:
        # What the model recommends for drawing is no obstacle to a search that draws nothing.
        defaults = GenerationDefaults(repetition_penalty=defaults.repetition_penalty)
    early_stopping: dict[str, EarlyStopping] = {"false": False, "true": True, "never": "never"}

    def given(name: str) -> float:
        value: float | None = getattr(flags, name)
        return getattr(defaults, name) if value is None else value

    try:
        return SamplingParams(
            best_of=flags.num_beams if searches else None,
            use_beam_search=searches,
            length_penalty=flags.length_penalty,
            early_stopping=early_stopping[flags.early_stopping],
            max_tokens=flags.max_tokens,
            grammar=_grammar(flags),
            temperature=given("temperature"),
            top_k=int(given("top_k")),
            top_p=given("top_p"),
            min_p=given("min_p"),
            typical_p=given("typical_p"),
            repetition_penalty=given("repetition_penalty"),
            presence_penalty=flags.presence_penalty,
            frequency_penalty=flags.frequency_penalty,
            bad_words=tuple(flags.bad_word),
            num_speculative_tokens=flags.num_speculative_tokens,
            stop=tuple(flags.stop),
            ignore_eos=flags.ignore_eos,
        )
    except InvalidParameterError as error:
        raise ConfigError(str(error)) from None


def _grammar(flags: argparse.Namespace) -> Grammar | None:
    """Raises ConfigError: it is out of its bounds, or its file cannot be read."""
    try:
        if flags.regex is not None:
            return Grammar("regex", flags.regex)
        return None if flags.json_schema is None else Grammar("json_schema", _schema_text(flags.json_schema))
    except GrammarError as error:
        raise ConfigError(str(error)) from None


def _schema_text(argument: str) -> str:
    if argument.lstrip().startswith("{"):
        return argument
    try:
        with Path(argument).open(encoding="utf-8") as file:
            return file.read(MAX_SCHEMA_BYTES + 1)
    except (OSError, ValueError):
        raise ConfigError("--json-schema is neither a JSON object nor a file that can be read.") from None
