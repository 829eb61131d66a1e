"""More choices than are returned: best_of and beam search, and what reaches the engine of each new field."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from quire.server.settings import GenerationDefaults


def mean(log_probs: dict[str, Any]) -> float:
    values: list[float] = log_probs["token_logprobs"]
    return sum(values) / len(values)


def test_best_of_returns_the_best_first(serve: Any) -> None:
    server = serve()
    every = server.complete(n=6, logprobs=0).json()["choices"]
    ranked = sorted(every, key=lambda choice: -mean(choice["logprobs"]))
    assert ranked != every
    body = server.complete(n=2, best_of=6, logprobs=0).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["text"] for choice in body["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["logprobs"] for choice in body["choices"]] == [choice["logprobs"] for choice in ranked[:2]]
    assert body["usage"]["completion_tokens"] == 6 * 4, "all that was generated"
    metrics = server.http.get("/metrics").text
    assert f'vllm:generation_tokens_total{{engine="0",model_name="fake"}} {2 * 24}.0' in metrics


def test_ranking_shows_nothing_that_was_not_asked_for(serve: Any) -> None:
    server = serve()
    body = server.complete(best_of=3, return_effective_params=True).json()
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert choice["logprobs"] is None
    assert (body["effective_params"]["best_of"], body["effective_params"]["logprobs"]) == (3, None)
    assert server.complete(best_of=1, stream=True).status_code == 200
    both = server.complete(prompt=["a", "b"], best_of=3, n=2).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]


def test_best_of_counts_what_a_stop_string_leaves(serve: Any) -> None:
    """Choices are letters from different places of the alphabet, so the string cuts some of them."""
    server = serve()
    body = {"max_tokens": 6, "stop": ["r"], "logprobs": 0, "return_token_ids": True}
    every = server.complete(n=6, **body).json()["choices"]
    assert len({len(choice["token_ids"]) for choice in every}) > 1
    best = server.complete(best_of=6, **body).json()
    (choice,) = best["choices"]
    assert mean(choice["logprobs"]) == max(mean(each["logprobs"]) for each in every)
    assert best["usage"]["completion_tokens"] == sum(len(each["token_ids"]) for each in every)


def test_beams_say_their_log_probability(shared: Any) -> None:
    body = shared.complete(use_beam_search=True, n=2, best_of=4).json()
    assert [choice["cumulative_logprob"] for choice in body["choices"]] == [-1.5, -2.5]
    response = shared.complete(num_beams=4, n=2, stream=True)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["cumulative_logprob"] for choice in choices if choice["finish_reason"]] == [-1.5, -2.5]
    assert not any("cumulative_logprob" in choice for choice in choices if choice["finish_reason"] is None)
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in (0, 1)]
    assert texts == [choice["text"] for choice in body["choices"]]


def test_a_search_takes_no_recommendation_for_drawing(serve: Any) -> None:
    server = serve(
        generation_defaults=GenerationDefaults(top_k=20, top_p=0.9, min_p=0.1, typical_p=0.9, repetition_penalty=1.1)
    )
    server.complete(num_beams=3)
    server.complete(num_beams=1)
    search, draw = (call["params"] for call in server.client.calls)
    assert (search.use_beam_search, search.best_of, search.n, search.repetition_penalty) == (True, 3, 1, 1.1)
    assert (search.top_k, search.top_p, search.min_p, search.typical_p) == (0, 1.0, 0.0, 1.0)
    assert (draw.use_beam_search, draw.best_of, draw.top_k, draw.typical_p) == (False, None, 20, 0.9)


@pytest.mark.parametrize("body", [{"best_of": 2}, {"use_beam_search": True, "n": 2, "stream": True}])
def test_silence_of_a_working_engine_is_no_gap(serve: Any, fake_client: Any, body: dict[str, Any]) -> None:
    limits = {"queue_timeout": 0.3, "token_gap_timeout": 0.3}
    server = serve(fake_client(step_delay=0.1), limits=limits)
    begin = time.monotonic()
    assert "error" not in server.complete(max_tokens=10, **body).text
    assert time.monotonic() - begin > 0.9
    server.client.age = 1.0
    if "best_of" in body:
        assert server.complete(max_tokens=10, **body).json()["error"]["code"] == "generation_timeout"


def test_failed_choice_is_returned_only_if_there_is_no_other(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(finish_with_error=True))
    assert server.complete(best_of=3).json()["error"]["code"] == "numerical_error"


def test_every_new_field_reaches_the_engine_and_is_shown(serve: Any) -> None:
    server = serve()
    body: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": -100, "0": 2.5},
        "allowed_token_ids": [5, 6, 7],
        "bad_words": ["ab", " c"],
        "typical_p": 0.5,
        "logprobs": 3,
        "prompt_logprobs": 1,
        "num_speculative_tokens": 4,
        "best_of": 2,
        "echo": True,
    }
    shown = server.complete(**body, return_effective_params=True).json()["effective_params"]
    params = server.client.calls[0]["params"]
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (params.logit_bias, params.allowed_token_ids) == ({5: -100.0, 0: 2.5}, (5, 6, 7))
    assert params.bad_words == ("ab", " c")
    assert params.bad_word_token_ids == ((97, 98), (32, 97, 98), (99,), (32, 99))
    assert (params.typical_p, params.logprobs, params.prompt_logprobs) == (0.5, 3, 3)
    assert (params.num_speculative_tokens, params.best_of) == (4, 2)
    for name, value in body.items():
        if name not in ("echo", "prompt_logprobs"):
            assert shown[name] == value, name
    assert shown["prompt_logprobs"] == 3, "echo shows as many for the prompt"
    server.complete(num_beams=2, length_penalty=0.5, early_stopping="never", return_effective_params=True)
    params = server.client.calls[1]["params"]
    assert (params.best_of, params.length_penalty, params.early_stopping) == (2, 0.5, "never")


def test_effective_parameters_leave_out_only_what_is_derived() -> None:
    from dataclasses import fields

    from quire.sampling_params import SamplingParams
    from quire.server.responses import EffectiveParams

    names = {each.name for each in fields(SamplingParams)}
    assert names - set(EffectiveParams.__struct_fields__) == {"bad_word_token_ids"}
