"""`--speculative-config`: the JSON object that people know from `vllm serve`, as far as it is about n-grams."""

from __future__ import annotations

import argparse
import json
from typing import Final

from quire.config import ConfigError, SpeculativeConfig

_MAX_LENGTH: Final = 1024
_KEYS: Final = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
EXAMPLE: Final = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'


def speculative_config(text: str) -> SpeculativeConfig:
    """Of `prompt_lookup_max` and `prompt_lookup_min` one alone stands for both."""
    try:
        fields = json.loads(text) if len(text) <= _MAX_LENGTH else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as {EXAMPLE}")
    for key, value in fields.items():
        if key not in _KEYS:
            raise argparse.ArgumentTypeError(f"unknown key {key[:40]!r}: known are {', '.join(_KEYS)}")
        if key != "method" and type(value) is not int:
            raise argparse.ArgumentTypeError(f"{key} must be an integer")
    if fields.get("method") != "ngram":
        raise argparse.ArgumentTypeError('method must be "ngram": there are no other drafts here')
    numbers: dict[str, int] = {key: value for key, value in fields.items() if key != "method"}
    if "num_speculative_tokens" not in numbers:
        raise argparse.ArgumentTypeError("num_speculative_tokens is missing")
    default = SpeculativeConfig()
    longest = numbers.get("prompt_lookup_max", numbers.get("prompt_lookup_min", default.max_ngram))
    shortest = numbers.get("prompt_lookup_min", numbers.get("prompt_lookup_max", default.min_ngram))
    try:
        return SpeculativeConfig(
            num_speculative_tokens=numbers["num_speculative_tokens"], max_ngram=longest, min_ngram=shortest
        )
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--speculative-config: ").rstrip(".")) from None
