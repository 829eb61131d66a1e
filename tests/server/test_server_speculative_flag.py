from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from quire.config import SpeculativeConfig
from quire.server.cli import make_parser
from quire.server.flags import engine_config
from quire.server.speculative_flag import EXAMPLE, speculative_config


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (4, 4, 2)),
        ({"prompt_lookup_max": 3, "prompt_lookup_min": 1}, (4, 3, 1)),
        ({"prompt_lookup_max": 3}, (4, 3, 3)),
        ({"prompt_lookup_min": 5}, (4, 5, 5)),
        ({"num_speculative_tokens": 0}, (0, 4, 2)),
    ],
)
def test_the_names_of_vllm(fields: dict[str, int], expected: tuple[int, int, int]) -> None:
    config = speculative_config(json.dumps({"method": "ngram", "num_speculative_tokens": 4} | fields))
    assert (config.num_speculative_tokens, config.max_ngram, config.min_ngram) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngram", "expected a JSON object"),
        ("[" * 2000, "expected a JSON object"),
        ("[" * 1000, "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"num_speculative_tokens": 4}', "method must be"),
        ('{"method": "eagle", "num_speculative_tokens": 4}', "method must be"),
        ('{"method": "ngram"}', "num_speculative_tokens is missing"),
        ('{"method": "ngram", "num_speculative_tokens": 4, "model": "x"}', "unknown key 'model'"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "must be an integer"),
        ('{"method": "ngram", "num_speculative_tokens": 4.0}', "must be an integer"),
        ('{"method": "ngram", "num_speculative_tokens": 99}', "must be from 0 to 16, not 99"),
        ('{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 0}', "prompt_lookup_min"),
        ('{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": null}', "must be an integer"),
    ],
)
def test_what_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message) as caught:
        speculative_config(text)
    assert "\n" not in str(caught.value)


def test_it_reaches_the_configuration(tmp_path: Path) -> None:
    config = engine_config(make_parser().parse_args(["serve", "--speculative-config", EXAMPLE]), tmp_path)
    assert config.speculative_config == SpeculativeConfig(num_speculative_tokens=4, max_ngram=4, min_ngram=2)
    assert engine_config(make_parser().parse_args(["serve"]), tmp_path).speculative_config == SpeculativeConfig()
