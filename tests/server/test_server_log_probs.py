"""Log-probabilities in answers: as OpenAI and vLLM write them, the same streamed or not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from quire.engine.detokenizer import DetokenizerFactory
from quire.engine.tokenizer import Tokenizer
from quire.scheduler.output import TokenLogProbs
from quire.server.log_probs import TokenStrings, echo_offsets, render, render_prompt
from quire.tales import MODEL_DIR

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def chosen(token_id: int) -> float:
    """What the fake engine says of a token."""
    return -0.25 if token_id % 2 == 0 else -5.0 - token_id / 64


def streamed(server: Any, **body: Any) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together; each chunk must hold the log-probabilities of its own tokens."""
    response = server.complete(stream=True, return_token_ids=True, **body)
    assert response.status_code == 200
    choices: dict[int, dict[str, Any]] = {}
    for line in response.text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            log_probs = choice["logprobs"]
            assert {len(log_probs[name]) for name in LISTS} == {len(choice["token_ids"])}
            whole = choices.setdefault(choice["index"], {"text": "", "logprobs": {name: [] for name in LISTS}})
            whole["text"] += choice["text"]
            for name in LISTS:
                whole["logprobs"][name] += log_probs[name]
    return choices


def test_four_lists_of_one_length(shared: Any) -> None:
    (choice,) = shared.complete(logprobs=2, return_token_ids=True).json()["choices"]
    log_probs = choice["logprobs"]
    assert list(log_probs) == list(LISTS)
    assert {len(log_probs[name]) for name in LISTS} == {4}
    assert "".join(log_probs["tokens"]) == choice["text"]
    assert log_probs["text_offset"] == [0, 1, 2, 3]
    assert log_probs["token_logprobs"] == [chosen(token_id) for token_id in choice["token_ids"]]
    for token_id, token, top in zip(choice["token_ids"], log_probs["tokens"], log_probs["top_logprobs"], strict=True):
        assert top[token] == chosen(token_id)
        assert len(top) == (2 if token_id % 2 == 0 else 3), "the chosen token comes on top if it is not among the best"
        assert next(iter(top.values())) == max(top.values()) == -0.25


def test_no_top_is_the_chosen_token_alone(shared: Any) -> None:
    log_probs = shared.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert log_probs["top_logprobs"] == [
        {token: log_prob} for token, log_prob in zip(log_probs["tokens"], log_probs["token_logprobs"], strict=True)
    ]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"prompt": ["one", "two"], "n": 2, "echo": True},
        {"prompt": [[104, 256, 105, 195, 169], [33]], "echo": True},
        {"echo": True, "max_tokens": 0, "n": 2},
        {"return_tokens_as_token_ids": True, "echo": True},
        {"stop": ["opq"], "max_tokens": 20},
        {"stop": ["op"], "max_tokens": 20, "include_stop_str_in_output": True},
        {"use_beam_search": True, "n": 2},
    ],
)
@pytest.mark.parametrize("num_top", [0, 3])
def test_stream_has_those_of_the_whole_answer(shared: Any, body: dict[str, Any], num_top: int) -> None:
    choices = shared.complete(logprobs=num_top, **body).json()["choices"]
    parts = streamed(shared, logprobs=num_top, **body)
    assert [parts[index]["text"] for index in range(len(choices))] == [choice["text"] for choice in choices]
    assert [parts[index]["logprobs"] for index in range(len(choices))] == [choice["logprobs"] for choice in choices]


def test_stop_string_takes_the_tokens_after_it(shared: Any) -> None:
    """The fake engine goes on with the alphabet."""
    free = shared.complete(max_tokens=20, logprobs=1).json()["choices"][0]
    stop = free["text"][5:8]
    (cut,) = shared.complete(max_tokens=20, logprobs=1, stop=stop).json()["choices"]
    assert cut["text"] == free["text"][:5]
    assert cut["logprobs"] == {name: values[:8] for name, values in free["logprobs"].items()}


@pytest.mark.parametrize("prompt", ["hello", [104, 101, 108, 108, 111]])
def test_echo_counts_from_the_beginning_of_the_prompt(shared: Any, prompt: Any) -> None:
    (choice,) = shared.complete(prompt=prompt, echo=True, logprobs=1, return_token_ids=True).json()["choices"]
    log_probs, text = choice["logprobs"], choice["text"]
    assert (log_probs["token_logprobs"][0], log_probs["top_logprobs"][0]) == (None, None)
    assert log_probs["token_logprobs"][1:] == [chosen(token_id) for token_id in choice["token_ids"][1:]]
    ends = [*log_probs["text_offset"][1:], len(text)]
    pieces = [text[start:end] for start, end in zip(log_probs["text_offset"], ends, strict=True)]
    assert pieces == log_probs["tokens"] == [""] * isinstance(prompt, str) + list(text)


def test_prompt_alone_is_scored_by_the_engine(serve: Any) -> None:
    server = serve()
    body = server.complete(prompt=[1] * 250 + [104, 105, 106, 107, 108, 109], echo=True, max_tokens=0, logprobs=1)
    (choice,) = body.json()["choices"]
    assert len(choice["logprobs"]["tokens"]) == 256
    assert choice["finish_reason"] == "length"
    assert body.json()["usage"]["completion_tokens"] == 0
    params = server.client.calls[0]["params"]
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (0, 1, 1)
    assert "vllm:prompt_tokens_total" in server.http.get("/metrics").text
    assert 'model_name="fake"} 256.0' in server.http.get("/metrics").text


def test_log_probabilities_of_the_prompt_as_vllm_has_them(shared: Any) -> None:
    body = shared.complete(prompt=[104, 101, 102], prompt_logprobs=2, n=2, return_token_ids=True).json()
    first, second = body["choices"]
    assert first["logprobs"] is None
    assert first["prompt_logprobs"] == second["prompt_logprobs"]
    assert first["prompt_logprobs"] == [
        None,
        {
            "101": {"logprob": chosen(101), "rank": None, "decoded_token": "e"},
            "102": {"logprob": -0.25, "rank": 1, "decoded_token": "f"},
            "103": {"logprob": -0.375, "rank": 2, "decoded_token": "g"},
        },
        {
            "102": {"logprob": -0.25, "rank": 1, "decoded_token": "f"},
            "103": {"logprob": -0.375, "rank": 2, "decoded_token": "g"},
        },
    ]
    both = shared.complete(prompt=[104, 101], prompt_logprobs=3, echo=True, logprobs=1).json()["choices"][0]
    assert len(both["prompt_logprobs"][1]) == 4
    assert len(both["logprobs"]["top_logprobs"][1]) == 2
    alone = shared.complete(prompt=[104], prompt_logprobs=1, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    assert alone["prompt_logprobs"] == [None]
    assert alone["logprobs"]["token_logprobs"][0] is None


def test_tokens_as_ids(shared: Any) -> None:
    body = {"return_tokens_as_token_ids": True, "return_token_ids": True, "logprobs": 1}
    (choice,) = shared.complete(**body).json()["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)


def test_equal_strings_do_not_become_one() -> None:
    names = {1: "a", 2: "a", 3: "b", 4: "a"}
    position = TokenLogProbs(2, -2.0, [1, 3, 4], [-0.5, -1.0, -1.5])
    assert render([position], 3, [0], names.__getitem__).top_logprobs == [
        {"token_id:1": -0.5, "b": -1.0, "token_id:4": -1.5, "a": -2.0}
    ]
    position = TokenLogProbs(3, -1.0, [1, 3, 4], [-0.5, -1.0, -1.5])
    assert render([position], 3, [0], names.__getitem__).top_logprobs == [{"a": -0.5, "b": -1.0, "token_id:4": -1.5}]
    assert render([position], 1, [0], names.__getitem__).top_logprobs == [{"a": -0.5, "b": -1.0}]


def test_bytes_that_are_no_text_are_escaped() -> None:
    tokenizer = Tokenizer(MODEL_DIR)
    strings = TokenStrings(DetokenizerFactory(tokenizer))
    token_ids = tokenizer.encode("king 🙃", add_special_tokens=False)
    assert strings[token_ids[0]] == "king"
    written = b""
    for token_id in token_ids:
        kind, _, text = strings[token_id].partition("bytes:")
        written += kind.encode() if not text else bytes.fromhex(text.replace("\\x", ""))
    assert written.decode() == "king 🙃"
    rendered = asyncio.run(render_prompt([TokenLogProbs(token_ids[-1], -1.0, [], [])], 0, strings))
    assert rendered[1] is not None
    assert rendered[1][token_ids[-1]].decoded_token.startswith("bytes:\\x")


@pytest.mark.parametrize("text", ["Once upon a time", "🙃🙂 日本", " s", "s", "<|endoftext|>"])
def test_offsets_of_an_echo(text: str) -> None:
    tokenizer = Tokenizer(MODEL_DIR)
    detokenizers = DetokenizerFactory(tokenizer)
    around = tokenizer.eos_token_id
    assert around is not None
    token_ids = [around, *tokenizer.encode(text, add_special_tokens=False)]
    offsets = asyncio.run(echo_offsets(token_ids, text, detokenizers, hides_special=False))
    assert offsets[:2] == [0, 0]
    assert offsets == sorted(offsets)
    for token_id, start, end in zip(token_ids[1:], offsets[1:], [*offsets[2:], len(text)], strict=True):
        piece = detokenizers.token_text(token_id)
        if isinstance(piece, str) and piece.isascii():
            assert text[start:end] == piece


def test_memory_of_an_answer_is_bounded(serve: Any) -> None:
    server = serve(limits={"max_prompt_log_probs": 60, "max_answer_log_probs": 120})
    ids = [5] * 20
    assert server.complete(prompt=ids, prompt_logprobs=2).status_code == 200
    error = server.complete(prompt=[*ids, 5], prompt_logprobs=2).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "prompt")
    assert "20 tokens" in error["message"]
    assert server.complete(prompt=ids, prompt_logprobs=2, n=2).status_code == 200
    error = server.complete(prompt=ids, prompt_logprobs=2, n=3).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "prompt_logprobs")
    assert server.complete(logprobs=2, max_tokens=40).status_code == 200
    error = server.complete(logprobs=2, max_tokens=41).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "logprobs")
    assert server.complete(logprobs=2, max_tokens=41, stream=True).status_code == 200


def test_most_is_what_the_server_says(serve: Any) -> None:
    server = serve(max_logprobs=2)
    assert server.complete(logprobs=2, prompt_logprobs=2).status_code == 200
    for name in ("logprobs", "prompt_logprobs"):
        error = server.complete(**{name: 3}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", name)
        assert error["message"] == f"{name} must be from 0 to 2 here."


def test_what_lm_evaluation_harness_asks_and_reads(shared: Any) -> None:
    """lm-eval 0.4.13, models/openai_completions.py: _create_payload and parse_logprobs."""
    prompts, context_lengths = [[104, 102, 98, 100], [104, 101, 108]], [2, 1]
    response = shared.http.post(
        "/v1/completions",
        json={
            "model": "fake",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    )
    assert "x-quire-ignored" not in response.headers
    results = []
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    for choice, length in zip(choices, context_lengths, strict=True):
        tokens = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        results.append((sum(tokens), all(t == max(top.values()) for t, top in zip(tokens, tops, strict=True))))
    assert results == [(chosen(98) + chosen(100), True), (chosen(101) + chosen(108), False)]
    info = shared.http.get("/tokenizer_info").json()
    assert info == {"bos_token": "<256>", "eos_token": "<257>", "pad_token": None, "chat_template": None}


def test_openai_sdk(shared: Any) -> None:
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(model="fake", prompt="hello", max_tokens=3, logprobs=2, echo=True)
        log_probs = whole.choices[0].logprobs
        assert log_probs is not None
        assert log_probs.tokens is not None
        assert "".join(log_probs.tokens) == whole.choices[0].text
        assert log_probs.text_offset == [0, 0, 1, 2, 3, 4, 5, 6, 7]
        tokens: list[str] = []
        for chunk in client.completions.create(model="fake", prompt="hello", max_tokens=3, logprobs=2, stream=True):
            assert chunk.choices[0].logprobs is not None
            tokens += chunk.choices[0].logprobs.tokens or []
        assert tokens == log_probs.tokens[-3:]
        with pytest.raises(openai.BadRequestError) as too_many:
            client.completions.create(model="fake", prompt="hello", logprobs=21)
        assert (too_many.value.code, too_many.value.param) == ("invalid_value", "logprobs")


def test_tokens_without_text_by_themselves_are_not_lost(tiny_checkpoint: Any) -> None:
    directory: Path = tiny_checkpoint("llama")
    tokenizer = Tokenizer(directory)
    strings = TokenStrings(DetokenizerFactory(tokenizer))
    written = [strings[token_id] for token_id in range(tokenizer.vocab_size)]
    assert len(set(written)) > tokenizer.vocab_size * 0.99
    assert strings[10**6] == ""
