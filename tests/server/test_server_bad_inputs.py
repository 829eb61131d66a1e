"""Whatever a client sends has a documented status and code, at once and in few bytes; health does not notice."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

POSTS = ["/v1/completions", "/tokenize", "/detokenize"]
REQUIRED = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 2},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1]},
}
MEGABYTE = 2**20
DIGITS = b"9" * 5000

JSON_CASES = {
    "empty": (b"", 400, "invalid_json"),
    "space": (b" ", 400, "invalid_json"),
    "array": (b"[]", 400, "invalid_body"),
    "string": (b'"x"', 400, "invalid_body"),
    "null": (b"null", 400, "invalid_body"),
    "number": (b"1", 400, "invalid_body"),
    "cut off": (b'{"prompt": "x"', 400, "invalid_json"),
    "cut off in a string": (b'{"prompt": "x', 400, "invalid_json"),
    "cut off in an escape": (b'{"prompt": "\\', 400, "invalid_json"),
    "single quotes": (b"{'prompt': 'x'}", 400, "invalid_json"),
    "trailing bytes": (b'{"prompt": "x"} {}', 400, "invalid_json"),
    "trailing comma": (b'{"prompt": "x",}', 400, "invalid_json"),
    "comment": (b'{"prompt": "x" /* */}', 400, "invalid_json"),
    "byte order mark": (b'\xef\xbb\xbf{"prompt": "x"}', 400, "invalid_json"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), 400, "invalid_json"),
    "invalid UTF-8": (b'{"prompt": "\xff"}', 400, "invalid_json"),
    "overlong UTF-8": (b'{"prompt": "\xc0\xaf"}', 400, "invalid_json"),
    "invalid UTF-8 in an unknown field": (b'{"prompt": "x", "y": "\xff"}', 400, "invalid_json"),
    "control character": (b'{"prompt": "a\x00b"}', 400, "invalid_json"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
    "lone surrogate in an unknown field": (b'{"prompt": "x", "y": "\\udc00"}', 400, "invalid_json"),
    "lone surrogate in a key": (b'{"prompt": "x", "\\ud800": 1}', 400, "invalid_json"),
    "duplicate key": (b'{"prompt": "x", "prompt": "y"}', 400, "duplicate_key"),
    "duplicate key by escape": (b'{"prompt": "x", "\\u0070rompt": "y"}', 400, "duplicate_key"),
    "duplicate key below": (b'{"prompt": "x", "y": {"a": 1, "a": 2}}', 400, "duplicate_key"),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', 400, "non_finite_number"),
    "Infinity": (b'{"prompt": "x", "temperature": Infinity}', 400, "non_finite_number"),
    "-Infinity": (b'{"prompt": "x", "temperature": -Infinity}', 400, "non_finite_number"),
    "NaN in an unknown field": (b'{"prompt": "x", "y": NaN}', 400, "non_finite_number"),
    "nan": (b'{"prompt": "x", "temperature": nan}', 400, "invalid_json"),
    "integer of 5000 digits": (b'{"prompt": "x", "y": ' + DIGITS + b"}", 400, "invalid_json"),
    "64 levels": (b'{"x": ' + b"[" * 64 + b"]" * 64 + b"}", 400, "json_too_complex"),
    "100000 levels": (b"[" * 100_000, 400, "json_too_complex"),
    "100000 levels of objects": (b'{"a":' * 100_000, 400, "json_too_complex"),
    "4097 keys": (b"{" + b",".join(b'"%d":1' % key for key in range(4097)) + b"}", 400, "json_too_complex"),
    "4097 arrays": (b"[" + b"[]," * 4097 + b"1]", 400, "json_too_complex"),
    "many strings": (b"[" + b'"a",' * 20_000 + b"1]", 400, "json_too_complex"),
    "many items": (b"[" + b"1," * (MEGABYTE + 1) + b"1]", 400, "json_too_complex"),
    "unterminated string of quotes": (b'"' + b'\\"' * (2 * MEGABYTE - 8), 400, "invalid_json"),
    "4 MiB of quotes": (b'"' * (4 * MEGABYTE), 400, "json_too_complex"),
    "4 MiB of spaces": (b" " * (4 * MEGABYTE), 400, "invalid_json"),
    "one byte over 4 MiB": (b" " * (4 * MEGABYTE + 1), 413, "body_too_large"),
    "20 MiB": (b" " * (20 * MEGABYTE), 413, "body_too_large"),
}

COMPLETION_CASES: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "no prompt": ({"prompt": ...}, 400, "missing_required_parameter", "prompt"),
    "prompt null": ({"prompt": None}, 400, "invalid_type", "prompt"),
    "prompt number": ({"prompt": 1}, 400, "invalid_type", "prompt"),
    "prompt object": ({"prompt": {}}, 400, "invalid_type", "prompt"),
    "prompt empty": ({"prompt": ""}, 400, "empty_prompt", "prompt"),
    "prompt empty list": ({"prompt": []}, 400, "empty_prompt", "prompt"),
    "prompt list of empty": ({"prompt": ["x", ""]}, 400, "empty_prompt", "prompt"),
    "prompt list of empty ids": ({"prompt": [[1], []]}, 400, "empty_prompt", "prompt"),
    "prompt mixed": ({"prompt": ["x", 1]}, 400, "invalid_type", "prompt"),
    "prompt mixed ids": ({"prompt": [1, "x"]}, 400, "invalid_type", "prompt"),
    "prompt mixed lists": ({"prompt": [[1], "x"]}, 400, "invalid_type", "prompt"),
    "prompt nested": ({"prompt": [[[1]]]}, 400, "invalid_type", "prompt"),
    "prompt booleans": ({"prompt": [True]}, 400, "invalid_type", "prompt"),
    "prompt floats": ({"prompt": [1.0]}, 400, "invalid_type", "prompt"),
    "129 prompts": ({"prompt": ["x"] * 129}, 400, "invalid_value", "prompt"),
    "id -1": ({"prompt": [-1]}, 400, "token_id_out_of_range", "prompt"),
    "id 512": ({"prompt": [512]}, 400, "token_id_out_of_range", "prompt"),
    "id 2**70": ({"prompt": [2**70]}, 400, "token_id_out_of_range", "prompt"),
    "prompt of the whole context": ({"prompt": [1] * 256}, 400, "context_length_exceeded", "prompt"),
    "prompt of 10000 ids": ({"prompt": [1] * 10_000}, 400, "context_length_exceeded", "prompt"),
    "prompt of too many characters": ({"prompt": "x" * 4097}, 400, "context_length_exceeded", "prompt"),
    "prompt of 3 million characters": ({"prompt": "x" * 3_000_000}, 400, "context_length_exceeded", "prompt"),
    "model": ({"model": "other"}, 404, "model_not_found", "model"),
    "model number": ({"model": 1}, 400, "invalid_type", "model"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    "max_tokens -1": ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    "max_tokens over": ({"max_tokens": 251}, 400, "context_length_exceeded", "max_tokens"),
    "max_tokens 2**31": ({"max_tokens": 2**31}, 400, "invalid_value", "max_tokens"),
    "max_tokens 10**100": ({"max_tokens": 10**100}, 400, "invalid_value", "max_tokens"),
    "max_tokens float": ({"max_tokens": 2.0}, 400, "invalid_type", "max_tokens"),
    "max_tokens text": ({"max_tokens": "2"}, 400, "invalid_type", "max_tokens"),
    "max_tokens boolean": ({"max_tokens": True}, 400, "invalid_type", "max_tokens"),
    "min_tokens over": ({"min_tokens": 3}, 400, "invalid_value", "min_tokens"),
    "min_tokens -1": ({"min_tokens": -1}, 400, "invalid_value", "min_tokens"),
    "n 0": ({"n": 0}, 400, "invalid_value", "n"),
    "n over the sequences": ({"n": 9}, 400, "invalid_value", "n"),
    "n 129": ({"n": 129}, 400, "invalid_value", "n"),
    "n 10**18": ({"n": 10**18}, 400, "invalid_value", "n"),
    "temperature -0.1": ({"temperature": -0.1}, 400, "invalid_value", "temperature"),
    "temperature 2.1": ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
    "temperature 1e308": ({"temperature": 1e308}, 400, "invalid_value", "temperature"),
    "temperature 10**400": ({"temperature": 10**400}, 400, "non_finite_number", "temperature"),
    "temperature text": ({"temperature": "nan"}, 400, "invalid_type", "temperature"),
    "top_p 0": ({"top_p": 0}, 400, "invalid_value", "top_p"),
    "top_p 1.1": ({"top_p": 1.1}, 400, "invalid_value", "top_p"),
    "top_k -2": ({"top_k": -2}, 400, "invalid_value", "top_k"),
    "top_k 2**31": ({"top_k": 2**31}, 400, "invalid_value", "top_k"),
    "min_p -1": ({"min_p": -1}, 400, "invalid_value", "min_p"),
    "min_p 1.1": ({"min_p": 1.1}, 400, "invalid_value", "min_p"),
    "seed 2**64": ({"seed": 2**64}, 400, "invalid_value", "seed"),
    "seed -2**63-1": ({"seed": -(2**63) - 1}, 400, "invalid_value", "seed"),
    "seed float": ({"seed": 1.5}, 400, "invalid_type", "seed"),
    "5 stops": ({"stop": ["a"] * 5}, 400, "invalid_value", "stop"),
    "10000 stops": ({"stop": ["a"] * 10_000}, 400, "invalid_value", "stop"),
    "stop empty": ({"stop": ""}, 400, "invalid_value", "stop"),
    "stop of 257 bytes": ({"stop": "a" * 257}, 400, "invalid_value", "stop"),
    "stop number": ({"stop": 1}, 400, "invalid_type", "stop"),
    "stop mixed": ({"stop": ["a", 1]}, 400, "invalid_type", "stop"),
    "129 stop ids": ({"stop_token_ids": [1] * 129}, 400, "invalid_value", "stop_token_ids"),
    "100000 stop ids": ({"stop_token_ids": [1] * 100_000}, 400, "invalid_value", "stop_token_ids"),
    "stop id 512": ({"stop_token_ids": [512]}, 400, "invalid_value", "stop_token_ids"),
    "stop id -1": ({"stop_token_ids": [-1]}, 400, "invalid_value", "stop_token_ids"),
    "stream text": ({"stream": "yes"}, 400, "invalid_type", "stream"),
    "stream number": ({"stream": 1}, 400, "invalid_type", "stream"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    "stream_options list": ({"stream": True, "stream_options": []}, 400, "invalid_type", "stream_options"),
    "include_usage": (
        {"stream": True, "stream_options": {"include_usage": 1}},
        400,
        "invalid_type",
        "stream_options.include_usage",
    ),
    "best_of below n": ({"n": 2, "best_of": 1}, 400, "invalid_value", "best_of"),
    "best_of 0": ({"best_of": 0}, 400, "invalid_value", "best_of"),
    "best_of 129": ({"best_of": 129}, 400, "invalid_value", "best_of"),
    "best_of over the sequences": ({"best_of": 9, "use_beam_search": True}, 400, "invalid_value", "best_of"),
    "best_of float": ({"best_of": 2.0}, 400, "invalid_type", "best_of"),
    "best_of with stream": ({"best_of": 2, "stream": True}, 400, "invalid_value", "best_of"),
    "use_beam_search number": ({"use_beam_search": 1}, 400, "invalid_type", "use_beam_search"),
    "17 beams": ({"n": 17, "use_beam_search": True}, 400, "invalid_value", "n"),
    "num_beams 0": ({"num_beams": 0}, 400, "invalid_value", "num_beams"),
    "num_beams 17": ({"num_beams": 17}, 400, "invalid_value", "num_beams"),
    "num_beams over the sequences": ({"num_beams": 9}, 400, "invalid_value", "num_beams"),
    "num_beams and another best_of": ({"num_beams": 3, "best_of": 4}, 400, "invalid_value", "num_beams"),
    "num_beams without a search": ({"num_beams": 3, "use_beam_search": False}, 400, "invalid_value", "num_beams"),
    "num_beams below n": ({"num_beams": 2, "n": 3}, 400, "invalid_value", "num_beams"),
    "num_beams text": ({"num_beams": "2"}, 400, "invalid_type", "num_beams"),
    "length_penalty alone": ({"length_penalty": 2}, 400, "invalid_value", "length_penalty"),
    "length_penalty 10.1": ({"num_beams": 2, "length_penalty": 10.1}, 400, "invalid_value", "length_penalty"),
    "length_penalty -10.1": ({"num_beams": 2, "length_penalty": -10.1}, 400, "invalid_value", "length_penalty"),
    "length_penalty boolean": ({"length_penalty": True}, 400, "invalid_type", "length_penalty"),
    "early_stopping alone": ({"early_stopping": True}, 400, "invalid_value", "early_stopping"),
    "early_stopping word": ({"num_beams": 2, "early_stopping": "always"}, 400, "invalid_type", "early_stopping"),
    "early_stopping number": ({"num_beams": 2, "early_stopping": 1}, 400, "invalid_type", "early_stopping"),
    "beams and top_k": ({"num_beams": 2, "top_k": 1}, 400, "invalid_value", "top_k"),
    "beams and top_p": ({"num_beams": 2, "top_p": 0.5}, 400, "invalid_value", "top_p"),
    "beams and min_p": ({"num_beams": 2, "min_p": 0.5}, 400, "invalid_value", "min_p"),
    "beams and typical_p": ({"num_beams": 2, "typical_p": 0.5}, 400, "invalid_value", "typical_p"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
    "repetition_penalty 100.1": ({"repetition_penalty": 100.1}, 400, "invalid_value", "repetition_penalty"),
    "repetition_penalty text": ({"repetition_penalty": "1"}, 400, "invalid_type", "repetition_penalty"),
    "presence_penalty 2.1": ({"presence_penalty": 2.1}, 400, "invalid_value", "presence_penalty"),
    "presence_penalty -2.1": ({"presence_penalty": -2.1}, 400, "invalid_value", "presence_penalty"),
    "presence_penalty boolean": ({"presence_penalty": False}, 400, "invalid_type", "presence_penalty"),
    "frequency_penalty 2.1": ({"frequency_penalty": 2.1}, 400, "invalid_value", "frequency_penalty"),
    "frequency_penalty -2.1": ({"frequency_penalty": -2.1}, 400, "invalid_value", "frequency_penalty"),
    "frequency_penalty list": ({"frequency_penalty": [1]}, 400, "invalid_type", "frequency_penalty"),
    "typical_p 0": ({"typical_p": 0}, 400, "invalid_value", "typical_p"),
    "typical_p 1.1": ({"typical_p": 1.1}, 400, "invalid_value", "typical_p"),
    "logit_bias list": ({"logit_bias": [1]}, 400, "invalid_type", "logit_bias"),
    "logit_bias word": ({"logit_bias": {"king": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias empty key": ({"logit_bias": {"": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias id -1": ({"logit_bias": {"-1": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias id 01": ({"logit_bias": {"01": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias id 1.0": ({"logit_bias": {"1.0": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias id with a line break": ({"logit_bias": {"1\n": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias id in other digits": ({"logit_bias": {"\u0661": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias id 512": ({"logit_bias": {"512": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias id 10**9": ({"logit_bias": {"9999999999": 1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias 100.1": ({"logit_bias": {"1": 100.1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias -100.1": ({"logit_bias": {"1": -100.1}}, 400, "invalid_value", "logit_bias"),
    "logit_bias text": ({"logit_bias": {"1": "1"}}, 400, "invalid_type", "logit_bias"),
    "logit_bias null": ({"logit_bias": {"1": None}}, 400, "invalid_type", "logit_bias"),
    "logit_bias boolean": ({"logit_bias": {"1": True}}, 400, "invalid_type", "logit_bias"),
    "logit_bias 10**400": ({"logit_bias": {"1": 10**400}}, 400, "non_finite_number", "logit_bias"),
    "1025 logit biases": ({"logit_bias": {str(index): 1 for index in range(1025)}}, 400, "invalid_value", "logit_bias"),
    "no allowed id": ({"allowed_token_ids": []}, 400, "invalid_value", "allowed_token_ids"),
    "32769 allowed ids": ({"allowed_token_ids": [1] * 32769}, 400, "invalid_value", "allowed_token_ids"),
    "allowed id 512": ({"allowed_token_ids": [1, 512]}, 400, "invalid_value", "allowed_token_ids"),
    "allowed id -1": ({"allowed_token_ids": [-1]}, 400, "invalid_value", "allowed_token_ids"),
    "allowed ids mixed": ({"allowed_token_ids": [1, "2"]}, 400, "invalid_type", "allowed_token_ids"),
    "bad_words text": ({"bad_words": "x"}, 400, "invalid_type", "bad_words"),
    "bad_words mixed": ({"bad_words": ["x", 1]}, 400, "invalid_type", "bad_words"),
    "bad word empty": ({"bad_words": [""]}, 400, "invalid_value", "bad_words"),
    "129 bad words": ({"bad_words": ["x"] * 129}, 400, "invalid_value", "bad_words"),
    "10000 bad words": ({"bad_words": ["x"] * 10_000}, 400, "invalid_value", "bad_words"),
    "bad word of 257 bytes": ({"bad_words": ["x" * 257]}, 400, "invalid_value", "bad_words"),
    "bad word of 65 tokens with its space": ({"bad_words": ["x" * 64]}, 400, "invalid_value", "bad_words"),
    "logprobs boolean": ({"logprobs": True}, 400, "invalid_type", "logprobs"),
    "logprobs float": ({"logprobs": 1.0}, 400, "invalid_type", "logprobs"),
    "logprobs -1": ({"logprobs": -1}, 400, "invalid_value", "logprobs"),
    "logprobs 21": ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
    "logprobs 10**18": ({"logprobs": 10**18}, 400, "invalid_value", "logprobs"),
    "prompt_logprobs boolean": ({"prompt_logprobs": False}, 400, "invalid_type", "prompt_logprobs"),
    "prompt_logprobs -1": ({"prompt_logprobs": -1}, 400, "invalid_value", "prompt_logprobs"),
    "prompt_logprobs 21": ({"prompt_logprobs": 21}, 400, "invalid_value", "prompt_logprobs"),
    "prompt_logprobs with stream": ({"prompt_logprobs": 0, "stream": True}, 400, "invalid_value", "prompt_logprobs"),
    "log-probabilities of too many prompts": (
        {"prompt": [[1] * 254] * 128, "echo": True, "logprobs": 20, "n": 2},
        400,
        "invalid_value",
        "logprobs",
    ),
    "max_tokens 0 with logprobs": ({"max_tokens": 0, "logprobs": 1}, 400, "invalid_value", "max_tokens"),
    "max_tokens 0 over": (
        {"prompt": [1] * 257, "max_tokens": 0, "logprobs": 1, "echo": True},
        400,
        "context_length_exceeded",
        "prompt",
    ),
    "return_tokens_as_token_ids number": (
        {"return_tokens_as_token_ids": 1},
        400,
        "invalid_type",
        "return_tokens_as_token_ids",
    ),
    "num_speculative_tokens -1": ({"num_speculative_tokens": -1}, 400, "invalid_value", "num_speculative_tokens"),
    "num_speculative_tokens 17": ({"num_speculative_tokens": 17}, 400, "invalid_value", "num_speculative_tokens"),
    "num_speculative_tokens text": ({"num_speculative_tokens": "1"}, 400, "invalid_type", "num_speculative_tokens"),
    "cache_salt empty": ({"cache_salt": ""}, 400, "invalid_value", "cache_salt"),
    "cache_salt of 257 bytes": ({"cache_salt": "x" * 257}, 400, "invalid_value", "cache_salt"),
    "cache_salt of 258 bytes in 129 letters": ({"cache_salt": "é" * 129}, 400, "invalid_value", "cache_salt"),
    "user of 257 bytes": ({"user": "x" * 257}, 400, "invalid_value", "user"),
    "request_id of 129 characters": ({"request_id": "x" * 129}, 400, "invalid_value", "request_id"),
    "request_id with a line break": ({"request_id": "x\n"}, 400, "invalid_value", "request_id"),
    "priority 2**31": ({"priority": 2**31}, 400, "invalid_value", "priority"),
    "truncate 0": ({"truncate_prompt_tokens": 0}, 400, "invalid_value", "truncate_prompt_tokens"),
    "truncate 257": ({"truncate_prompt_tokens": 257}, 400, "invalid_value", "truncate_prompt_tokens"),
    "truncate -2": ({"truncate_prompt_tokens": -2}, 400, "invalid_value", "truncate_prompt_tokens"),
}

AT_THE_LIMIT: dict[str, dict[str, Any]] = {
    "128 prompts": {"prompt": ["x"] * 128},
    "id 0 and 511": {"prompt": [0, 511]},
    "prompt of all but one": {"prompt": [1] * 255, "max_tokens": 1},
    "max_tokens": {"max_tokens": 250},
    "n": {"n": 8},
    "temperature": {"temperature": 2},
    "top_p": {"top_p": 1e-9},
    "top_k": {"top_k": 2**31 - 1},
    "seed": {"seed": 2**64 - 1},
    "negative seed": {"seed": -(2**63)},
    "stop": {"stop": ["a" * 256] * 4},
    "stop ids": {"stop_token_ids": [511] * 128},
    "best_of": {"best_of": 8, "n": 1},
    "beams": {"n": 8, "use_beam_search": True},
    "num_beams": {"num_beams": 8, "n": 2, "length_penalty": 10, "early_stopping": "never"},
    "num_beams as best_of": {"num_beams": 2, "best_of": 2, "use_beam_search": True, "length_penalty": -10.0},
    "num_beams 1": {"num_beams": 1, "n": 2, "use_beam_search": False},
    "num_beams 1 with a search": {"num_beams": 1, "use_beam_search": True, "early_stopping": True},
    "repetition_penalty": {"repetition_penalty": 100},
    "presence_penalty": {"presence_penalty": -2},
    "frequency_penalty": {"frequency_penalty": 2},
    "typical_p": {"typical_p": 1e-9},
    "logit_bias": {"logit_bias": {str(index): -100 + index % 2 * 200 for index in range(512)}},
    "allowed ids": {"allowed_token_ids": [0, 511] * 16384},
    "bad words": {"bad_words": ["x" * 63] * 128},
    "logprobs": {"logprobs": 20},
    "logprobs 0": {"logprobs": 0},
    "prompt_logprobs": {"prompt_logprobs": 20},
    "log-probabilities of many prompts": {"prompt": [[1] * 254] * 128, "echo": True, "logprobs": 20, "max_tokens": 1},
    "max_tokens 0 and the whole context": {"prompt": [1] * 256, "max_tokens": 0, "logprobs": 1, "echo": True},
    "max_tokens 0 and prompt_logprobs": {"prompt": [1] * 256, "max_tokens": 0, "prompt_logprobs": 1},
    "num_speculative_tokens": {"num_speculative_tokens": 16},
    "cache_salt": {"cache_salt": "x" * 256},
    "user": {"user": "x" * 256},
    "request_id": {"request_id": "x" * 128},
    "min_tokens": {"min_tokens": 2},
    "truncate": {"truncate_prompt_tokens": 250},
    "63 levels": {"unknown": json.loads("[" * 63 + "]" * 63)},
    "4000 keys": {f"k{key}": 1 for key in range(4000)},
    "unicode": {"prompt": "\U0001f600\x00\u2028"},
}

OTHER_CASES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "tokenize nothing": ("/tokenize", {}, 400, "missing_required_parameter"),
    "tokenize null": ("/tokenize", {"prompt": None}, 400, "missing_required_parameter"),
    "tokenize list": ("/tokenize", {"prompt": ["x"]}, 400, "invalid_type"),
    "tokenize messages": ("/tokenize", {"messages": []}, 400, "unsupported_parameter"),
    "tokenize too much": ("/tokenize", {"prompt": "x" * 5000}, 400, "context_length_exceeded"),
    "tokenize other model": ("/tokenize", {"prompt": "x", "model": "y"}, 404, "model_not_found"),
    "detokenize nothing": ("/detokenize", {}, 400, "missing_required_parameter"),
    "detokenize text": ("/detokenize", {"tokens": "x"}, 400, "invalid_type"),
    "detokenize -1": ("/detokenize", {"tokens": [-1]}, 400, "token_id_out_of_range"),
    "detokenize 512": ("/detokenize", {"tokens": [512]}, 400, "token_id_out_of_range"),
    "detokenize too many": ("/detokenize", {"tokens": [1] * 257}, 400, "context_length_exceeded"),
    "unknown route": ("/v1/nothing", {}, 404, "not_found"),
    "trailing slash": ("/v1/completions/", {"prompt": "x"}, 404, "not_found"),
    "method": ("/v1/models", {}, 405, "method_not_allowed"),
}


def check(response: Any, status: int, code: str, seconds: float) -> dict[str, Any]:
    assert seconds < 1.0
    assert response.status_code == status
    assert len(response.content) <= 4096
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert len(error["message"].encode()) <= 512
    assert error["type"] == ("invalid_request_error" if status < 500 else "overloaded_error")
    return error


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("case", JSON_CASES)
def test_json_itself(shared: Any, path: str, case: str) -> None:
    body, status, code = JSON_CASES[case]
    begin = time.monotonic()
    response = shared.http.post(path, content=body, headers={"content-type": "application/json"})
    check(response, status, code, time.monotonic() - begin)


@pytest.mark.parametrize(
    ("case", "stream"),
    [(case, stream) for case in COMPLETION_CASES for stream in (False, True) if not (stream and "stream" in case)],
)
def test_completion_fields(shared: Any, case: str, stream: bool) -> None:
    fields, status, code, param = COMPLETION_CASES[case]
    body = {"prompt": "hello", "max_tokens": 2, **({"stream": True} if stream else {}), **fields}
    content = json.dumps({name: value for name, value in body.items() if value is not ...}).encode()
    begin = time.monotonic()
    response = shared.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error = check(response, status, code, time.monotonic() - begin)
    assert error["param"] == param


@pytest.mark.parametrize("number", [b"1e400", b"-1e999", b"1" + b"0" * 400])
def test_numbers_too_large_for_a_float(shared: Any, number: bytes) -> None:
    content = b'{"prompt": "x", "temperature": ' + number + b"}"
    response = shared.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    check(response, 400, "non_finite_number", 0)


def test_what_is_refused_anyway_is_not_tokenized(serve: Any) -> None:
    server = serve()
    for body in ({"prompt": "x" * 4097}, {"n": 129}, {"stop": ["x"] * 5}, {"logprobs": 21}, {"model": "y"}):
        assert server.complete(**body).status_code in (400, 404)
    assert server.client.tokenizer.num_encoded == 0


def test_messages_are_bounded() -> None:
    from quire.server.errors import ApiError, RejectedByEngine

    for error in (ApiError("invalid_value", reason="\u00e9" * 1000), RejectedByEngine("x" * 1000, "code", "prompt")):
        assert len(error.message.encode()) <= 512
        assert json.loads(error.body())["error"]["message"] == error.message


@pytest.mark.parametrize("case", AT_THE_LIMIT)
def test_the_limit_itself_is_served(shared: Any, case: str) -> None:
    body = {"prompt": "hello", "max_tokens": 2, **AT_THE_LIMIT[case]}
    assert shared.http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("case", OTHER_CASES)
def test_other_routes(shared: Any, case: str) -> None:
    path, body, status, code = OTHER_CASES[case]
    begin = time.monotonic()
    check(shared.http.post(path, json=body), status, code, time.monotonic() - begin)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ({"content-type": ""}, 415, "unsupported_media_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"content-type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
        ({"content-type": "application/json; charset=latin-1"}, 415, "unsupported_media_type"),
        ({"content-type": "application/jsonx"}, 415, "unsupported_media_type"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415, "unsupported_content_encoding"),
        ({"content-type": "Application/JSON; charset=UTF-8"}, 200, ""),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200, ""),
    ],
)
def test_content_types(shared: Any, path: str, headers: dict[str, str], status: int, code: str) -> None:
    content = json.dumps(REQUIRED[path]).encode()
    begin = time.monotonic()
    response = shared.http.post(path, content=content, headers=headers)
    if status == 200:
        assert response.status_code == 200
    else:
        check(response, status, code, time.monotonic() - begin)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/health", "/metrics"])
def test_wrong_methods(shared: Any, method: str, path: str) -> None:
    response = shared.http.request(method, path)
    check(response, 405, "method_not_allowed", 0)
    assert response.headers["allow"]


def test_message_of_an_unknown_model_is_sanitized(shared: Any) -> None:
    error = shared.complete(model="\x1b[31m<script>" + "x" * 10_000).json()["error"]
    assert error["message"] == "The model `??31m?script?" + "x" * 51 + "...` does not exist."


SECRET = "jabberwock"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [SECRET, 1]},
        {"prompt": "x", "temperature": SECRET},
        {"prompt": "x", "stop": [SECRET] * 5},
        {"prompt": "x", "seed": [SECRET]},
        {"prompt": "x", "logit_bias": {SECRET: 1}},
        {"prompt": SECRET * 1000},
        {"prompt": {SECRET: SECRET}},
    ],
)
def test_errors_never_echo_the_input(shared: Any, body: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    response = shared.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert SECRET not in response.text
    assert SECRET not in str(response.headers)
    assert SECRET not in caplog.text


def slowest_health(server: Any, work: Callable[[], None]) -> float:
    """The longest that /health took while `work` was done."""
    slowest = 0.0
    done = threading.Event()

    def probe() -> None:
        nonlocal slowest
        while not done.is_set():
            begin = time.monotonic()
            assert server.http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - begin)
            time.sleep(0.001)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        work()
    finally:
        done.set()
        prober.join()
    return slowest


def test_health_stays_quick_under_the_costliest_bodies(shared: Any) -> None:
    """Every pause of the event loop is a pause of /health and of every stream."""
    ids = b"[" + b"12345678901234," * 262_000 + b"1]"
    bodies = [
        b'{"prompt": ' + ids + b"}",
        b'{"prompt": "x", "unknown": ' + ids + b"}",
        b'{"prompt": "' + b"\\n" * 2_000_000 + b'"}',
        b'{"prompt": "' + b"\\u00e9" * 690_000 + b'"}',
        b'{"prompt": [' + b"1," * 262_000 + b'"x"]}',
        b"[" + b"1.234567890e3," * 262_000 + b"1]",
        b" " * (4 * MEGABYTE),
    ]

    def send() -> None:
        for body in bodies:
            content_type = {"content-type": "application/json"}
            response = shared.http.post("/v1/completions", content=body, headers=content_type)
            assert response.status_code in (200, 400)

    # What the machine does to an idle server is not ours.
    hiccup = slowest_health(shared, lambda: time.sleep(0.5))
    assert slowest_health(shared, send) < 0.25 + 2 * hiccup


def test_no_bytes_make_the_scan_slow() -> None:
    """A pattern that starts over at every byte of 1 MiB would take minutes."""
    from quire.server.errors import ApiError
    from quire.server.json_scan import scan_json
    from quire.server.settings import Limits

    def cost(make: Callable[[int], bytes], size: int) -> float:
        body = make(size)
        best = 1.0
        for _ in range(3):
            begin = time.perf_counter()
            with contextlib.suppress(ApiError):
                scan_json(body, Limits())
            best = min(best, time.perf_counter() - begin)
        return best

    for unit in (b'"', b'\\"', b"\\", b'"\\', b"[", b"{", b'{"a":', b"1,", b" ", b'"a" ', b'"a",', b"N", b"\n"):
        for prefix in (b"", b'"', b'"\\', b"["):
            large = cost(lambda size, unit=unit, prefix=prefix: prefix + unit * (size // len(unit)), 2**20)
            assert large < 0.25, (prefix, unit)
