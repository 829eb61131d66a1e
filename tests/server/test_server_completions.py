"""POST /v1/completions: what goes in, what comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest


def events(text: str) -> list[Any]:
    assert text.endswith("data: [DONE]\n\n")
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def stream(server: Any, **body: Any) -> list[Any]:
    response = server.complete(stream=True, **body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response.text)


def test_answer_has_the_shape_of_openai_and_vllm(shared: Any) -> None:
    response = shared.complete()
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert set(body) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert body["id"] == "cmpl-" + response.headers["x-request-id"]
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert (choice["finish_reason"], len(choice["text"])) == ("length", 4)
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_stream_says_what_the_whole_answer_says(shared: Any) -> None:
    body = {"prompt": ["one", "two"], "n": 3, "max_tokens": 5}
    whole = {choice["index"]: choice["text"] for choice in shared.complete(**body).json()["choices"]}
    parts = dict.fromkeys(range(6), "")
    finished = []
    for chunk in stream(shared, **body):
        assert chunk["object"] == "text_completion"
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            assert choice["index"] not in finished
            parts[choice["index"]] += choice["text"]
            if choice["finish_reason"] is not None:
                finished.append(choice["index"])
    assert parts == whole
    assert sorted(finished) == list(range(6))


def test_index_of_a_choice_counts_prompts_and_choices(shared: Any) -> None:
    alone = [shared.complete(prompt=prompt, n=2).json()["choices"] for prompt in ("x", "yy")]
    together = shared.complete(prompt=["x", "yy"], n=2).json()["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2, 3]
    assert [choice["text"] for choice in together] == [choice["text"] for each in alone for choice in each]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[256, 97, 98]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_four_kinds_of_prompts(serve: Any, prompt: Any, ids: list[list[int]]) -> None:
    server = serve()
    assert server.complete(prompt=prompt).status_code == 200
    assert sorted(call["ids"] for call in server.client.calls) == ids
    usage = server.complete(prompt=prompt, n=3).json()["usage"]
    assert usage["prompt_tokens"] == sum(map(len, ids))
    assert usage["completion_tokens"] == 3 * 4 * len(ids)


def test_null_means_the_default_everywhere(serve: Any) -> None:
    server = serve()
    from quire.server.schemas import CompletionRequest

    nulls = dict.fromkeys(set(CompletionRequest.model_fields) - {"prompt"})
    response = server.complete(**nulls)
    assert response.status_code == 200
    assert "x-quire-ignored" not in response.headers
    params = server.client.calls[0]["params"]
    assert (params.max_tokens, params.n, params.temperature, params.top_p, params.top_k) == (16, 1, 1.0, 1.0, 0)


def test_fields_left_out_take_the_models_defaults(serve: Any) -> None:
    from quire.server.settings import GenerationDefaults

    server = serve(generation_defaults=GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20))
    server.complete()
    server.complete(temperature=0, top_p=1.0, top_k=-1)
    first, second = (call["params"] for call in server.client.calls)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.9, 20)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 1.0, -1)


def test_default_max_tokens_shrinks_to_the_context_and_an_explicit_one_does_not(serve: Any) -> None:
    server = serve()
    prompt = [1] * 250
    assert server.http.post("/v1/completions", json={"prompt": prompt}).status_code == 200
    assert server.client.calls[0]["params"].max_tokens == 6
    error = server.complete(prompt=prompt, max_tokens=7).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(
        "This model's maximum context length is 256 tokens. However, you requested 257 tokens"
    )


def test_usage_chunk_comes_last_and_only_if_asked_for(shared: Any) -> None:
    chunks = stream(shared, n=2, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


def test_continuous_usage_counts_the_choice(shared: Any) -> None:
    chunks = stream(shared, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


def test_cached_tokens_are_those_of_each_prompt_once(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(num_cached_tokens=3))
    usage = server.complete(prompt=["aaaa", "bbbb"], n=4).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}


@pytest.mark.parametrize("prompt", ["hello", [104, 101, 108, 108, 111], ["hello", "hello"]])
def test_echo_puts_the_prompt_before_the_text(shared: Any, prompt: Any) -> None:
    plain = shared.complete(prompt=prompt, n=2).json()["choices"]
    echoed = shared.complete(prompt=prompt, n=2, echo=True).json()["choices"]
    assert [choice["text"] for choice in echoed] == ["hello" + choice["text"] for choice in plain]
    parts = dict.fromkeys(range(len(echoed)), "")
    for chunk in stream(shared, prompt=prompt, n=2, echo=True):
        for choice in chunk["choices"]:
            parts[choice["index"]] += choice["text"]
    assert list(parts.values()) == [choice["text"] for choice in echoed]


def test_echo_of_the_prompt_alone_asks_the_engine_for_nothing(serve: Any) -> None:
    server = serve()
    body = server.complete(echo=True, max_tokens=0).json()
    assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [("hello", "length")]
    assert body["usage"]["completion_tokens"] == 0
    chunks = stream(server, echo=True, max_tokens=0, stream_options={"include_usage": True})
    assert [choice["text"] for chunk in chunks for choice in chunk["choices"]] == ["hello"]
    assert server.client.calls == []
    assert server.complete(max_tokens=0).status_code == 400


def test_token_ids_are_returned_when_asked_for(shared: Any) -> None:
    (choice,) = shared.complete(prompt=[5, 6], return_token_ids=True).json()["choices"]
    assert choice["prompt_token_ids"] == [5, 6]
    assert len(choice["token_ids"]) == 4
    chunks = stream(shared, prompt=[5, 6], return_token_ids=True)
    assert [chunk["choices"][0]["prompt_token_ids"] for chunk in chunks] == [[5, 6], None, None, None]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == choice["token_ids"]


def test_sampling_parameters_reach_the_engine(serve: Any) -> None:
    server = serve(scheduling_policy="priority")
    server.complete(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        seed=-5,
        stop="x",
        stop_token_ids=[3],
        min_tokens=2,
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        add_special_tokens=False,
        cache_salt="mine",
        priority=-3,
    )
    (call,) = server.client.calls
    params = call["params"]
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (0.5, 7, 0.25, 0.125, -5)
    assert (params.stop, params.stop_token_ids, params.min_tokens, params.ignore_eos) == (("x",), (3,), 2, True)
    assert (params.include_stop_str_in_output, params.skip_special_tokens) == (True, False)
    assert (call["ids"], call["salt"], call["priority"]) == (list(b"hello"), "mine", -3)


def test_effective_parameters_show_what_was_used(serve: Any) -> None:
    from quire.server.settings import GenerationDefaults

    server = serve(generation_defaults=GenerationDefaults(temperature=0.6))
    shown = server.complete(return_effective_params=True, stop=["a", "b"]).json()["effective_params"]
    assert (shown["temperature"], shown["max_tokens"], shown["stop"]) == (0.6, 4, ["a", "b"])
    assert shown["seed"] == server.client.calls[0]["params"].seed is not None
    chunks = stream(server, return_effective_params=True)
    assert ["effective_params" in chunk for chunk in chunks] == [True, False, False, False]


@pytest.mark.parametrize(("keep", "kept"), [(2, [3, 4]), (9, [1, 2, 3, 4]), (-1, [1, 2, 3, 4])])
def test_truncation_keeps_the_end_of_the_prompt(serve: Any, keep: int, kept: list[int]) -> None:
    server = serve()
    assert server.complete(prompt=[1, 2, 3, 4], truncate_prompt_tokens=keep).status_code == 200
    assert server.client.calls[0]["ids"] == kept


def test_truncation_to_what_fits(serve: Any) -> None:
    server = serve()
    assert server.complete(prompt=[1] * 300, truncate_prompt_tokens=-1).status_code == 200
    assert len(server.client.calls[0]["ids"]) == 252


def test_unknown_fields_are_reported_and_refused_when_strict(serve: Any) -> None:
    lenient, strict = serve(), serve(strict=True)
    body = {"frobnicate": 1, "na\nme\u00e9": [1.5], "stream_options": {"shiny": True}, "stream": True}
    response = lenient.complete(**body)
    assert response.status_code == 200
    assert response.headers["x-quire-ignored"] == "frobnicate,na?me?,stream_options.shiny"
    whole = lenient.complete(frobnicate=1)
    assert whole.json()["warnings"] == ["The field 'frobnicate' was ignored."]
    error = strict.complete(frobnicate=1).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_parameter", "frobnicate")
    assert strict.complete().status_code == 200


def test_report_of_unknown_fields_is_bounded(shared: Any) -> None:
    response = shared.complete(**{f"{index:03}" + "x" * 300: 1 for index in range(400)})
    assert response.status_code == 200
    assert len(response.headers["x-quire-ignored"]) < 4096
    assert len(response.json()["warnings"]) == 33


def test_priority_without_the_policy_is_reported(shared: Any) -> None:
    assert shared.complete(priority=1).headers["x-quire-ignored"] == "priority"
    assert "x-quire-ignored" not in shared.complete(priority=0).headers


NEUTRAL_VALUES = {
    "kv_transfer_params": {},
    "lora_path": "",
    "response_format": {"type": "text"},
    "spaces_between_special_tokens": True,
    "suffix": "",
    "vllm_xargs": {},
}
REFUSED_VALUES = {
    "guided_whitespace_pattern": "",
    "kv_transfer_params": {"a": 1},
    "lora_path": "a",
    "prompt_embeds": "aa",
    "spaces_between_special_tokens": False,
    "structural_tag": "{}",
    "suffix": "x",
    "vllm_xargs": {"a": 1},
}


def test_neutral_values_of_unsupported_fields_are_accepted(shared: Any) -> None:
    response = shared.complete(**NEUTRAL_VALUES)
    assert response.status_code == 200
    assert "x-quire-ignored" not in response.headers


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_other_values_of_unsupported_fields_are_refused_by_name(shared: Any, name: str) -> None:
    response = shared.complete(**{name: REFUSED_VALUES[name]})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
    assert name in error["message"]


def test_every_known_field_is_honoured_or_has_its_neutral_values() -> None:
    from quire.server.parameters import NEUTRAL
    from quire.server.schemas import CompletionRequest

    untyped = {name for name, each in CompletionRequest.model_fields.items() if "Any" in str(each.annotation)}
    assert untyped == set(NEUTRAL)
    assert set(REFUSED_VALUES) == set(NEUTRAL)


def test_aliases_and_request_ids(shared: Any) -> None:
    assert shared.complete(model="./fake").status_code == 200
    response = shared.http.post(
        "/v1/completions", json={"prompt": "a", "request_id": "mine"}, headers={"x-request-id": "theirs"}
    )
    assert response.json()["id"] == "cmpl-mine"
    assert response.headers["x-request-id"] == "theirs"


def test_tokenize_and_detokenize(shared: Any) -> None:
    body = shared.http.post("/tokenize", json={"prompt": "hé"}).json()
    assert body == {"count": 4, "max_model_len": 256, "tokens": [256, 104, 195, 169], "token_strs": None}
    body = shared.http.post(
        "/tokenize", json={"prompt": "ab", "add_special_tokens": False, "return_token_strs": True, "odd": 1}
    ).json()
    assert (body["tokens"], body["token_strs"]) == ([97, 98], ["<97>", "<98>"])
    assert body["warnings"] == ["The field 'odd' was ignored."]
    assert shared.http.post("/detokenize", json={"tokens": [256, 104, 195, 169]}).json() == {"prompt": "hé"}
    assert shared.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_models_are_listed(shared: Any) -> None:
    body = shared.http.get("/v1/models").json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["root"], card["parent"]) == ("fake", "model", "fake", None)
    assert card["max_model_len"] == 256
    assert shared.http.get("/v1/models/fake").json() == card
    assert shared.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
