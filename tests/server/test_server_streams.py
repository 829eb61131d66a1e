"""Streams: what ends them, who is told, and that nobody's departure leaves work behind."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from quire.engine.client import EngineDeadError, RequestRejected

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(65536):
            data += part
    return data


def open_stream(server: Any, **body: Any) -> Any:
    content = {"prompt": "hello", "max_tokens": 200, "stream": True, **body}
    return server.http.stream("POST", "/v1/completions", json=content)


def error_frame(text: str) -> dict[str, Any]:
    """The error that ends a stream: the last event before [DONE]."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    error: dict[str, Any] = json.loads(parts[-3].removeprefix("data: "))["error"]
    return error


def test_each_step_is_one_write(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(step_delay=0.02))
    with open_stream(server, n=4, max_tokens=5) as response:
        parts = [part for part in response.iter_raw() if part]
    assert len(parts) == 5
    assert all(part.count(b"data: {") == 4 for part in parts)
    assert parts[-1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("text", ["", "plain", 'quotes " and \\', "\n\t\x00\x1f", "Ö日本👨‍👩‍👧‍👦\u2028", "x" * 70_000])
@pytest.mark.parametrize("body", [{"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}, {}])
def test_short_way_of_a_token_tells_what_the_long_way_tells(
    serve: Any, fake_client: Any, text: str, body: dict[str, Any]
) -> None:
    """Byte for byte, and to the metrics too. All tokens but the first two and the last go the short way."""
    told, counted = [], []
    for short_way in (True, False):
        server = serve(fake_client(step_text=text, step_delay=0.005, short_way=short_way))
        answer = server.complete(max_tokens=8, request_id="same", **body)
        told.append(re.sub(rb'"created":\d+', b"", answer.content))
        samples = server.http.get("/metrics").text.splitlines()
        names = ("vllm:generation_tokens_total", "vllm:inter_token_latency_seconds_count")
        counted.append([sample for sample in samples if sample.startswith(names)])
        if not short_way:
            assert server.client.num_short == 0
        elif len(text) < 70_000:
            assert server.client.num_short == 5
    assert told[0] == told[1]
    assert counted[0] == counted[1]
    assert [sample.split()[-1] for sample in counted[0]] == ["7.0", "8.0"]


def test_comment_line_between_tokens_that_go_the_short_way(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(step_delay=0.01), sse_keep_alive_interval=0.2)
    text = ""
    with open_stream(server, max_tokens=40) as response:
        for part in response.iter_text():
            text += part
            silent = text.count(": ping\n\n") < 2 and text.count("data: {") >= 10 * (1 + text.count(": ping\n\n"))
            server.client.hold = silent
    events = [event for event in text.split("\n\n") if event.startswith("data: {")]
    shown = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)
    assert shown == server.complete(max_tokens=40).json()["choices"][0]["text"]
    assert text.count(": ping\n\n") == 2
    assert server.client.num_short >= 20
    assert text.endswith("data: [DONE]\n\n")


def test_first_token_is_sent_before_the_second_exists(serve: Any, fake_client: Any, eventually: Any) -> None:
    server = serve(fake_client(step_delay=0.1))
    with open_stream(server, max_tokens=3) as response:
        begin = time.monotonic()
        assert next(response.iter_raw()).startswith(b"data: {")
        assert time.monotonic() - begin < 0.08


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("body", [{}, {"n": 3}, {"prompt": ["a", "b", "c"]}])
@pytest.mark.parametrize("hold", [True, False])
def test_client_that_leaves_aborts_all_its_work(
    serve: Any, fake_client: Any, eventually: Any, stream: bool, body: dict[str, Any], hold: bool
) -> None:
    """In the queue (hold) and while tokens come."""
    server = serve(fake_client(step_delay=0.01, hold=hold))
    content = json.dumps({"prompt": "hello", "max_tokens": 200, "stream": stream, **body}).encode()
    num_jobs = len(body.get("prompt", [1]))
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        eventually(lambda: server.client.num_open == num_jobs)
        time.sleep(0.05)
    eventually(lambda: server.client.num_open == 0, 0.5)
    assert server.client.num_aborted == num_jobs
    eventually(lambda: server.context.lifecycle.num_open == 0)
    assert (server.context.admission.num_open, server.context.admission.num_queued_tokens) == (0, 0)


def test_client_that_reads_nothing_is_cut_off(serve: Any, fake_client: Any, eventually: Any) -> None:
    """And holds less than 1 MiB until then."""
    server = serve(fake_client(step_text="x" * 10_000, step_delay=0.0005), limits={"stall_timeout": 0.6})
    content = b'{"prompt": "hello", "max_tokens": 250, "stream": true}'
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        eventually(lambda: server.client.num_open == 1)
        eventually(lambda: server.client.num_open == 0)
        assert server.client.num_aborted == 1
        eventually(lambda: len(server._server.server_state.connections) == 0)
        connection.settimeout(2)
        assert len(read_all(connection)) < 2**20
    assert server.complete().status_code == 200


def test_silent_stream_gets_comment_lines(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(step_delay=0.5), sse_keep_alive_interval=0.1)
    with open_stream(server, max_tokens=2) as response:
        text = "".join(response.iter_text())
    assert text.startswith(": ping\n\n")
    assert text.count(": ping\n\n") >= 4
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_request_that_the_engine_refuses_is_a_plain_400(serve: Any, fake_client: Any, stream: bool) -> None:
    server = serve(fake_client(error=RequestRejected("It needs 9 blocks; there are 4.", "too_large", "prompt")))
    response = server.complete(stream=stream)
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "It needs 9 blocks; there are 4.",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "too_large",
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(EngineDeadError("gone"), 503, "engine_unavailable"), (RuntimeError("secret/path"), 500, "internal_error")],
)
def test_failure_before_the_first_token_is_a_plain_status(
    serve: Any, fake_client: Any, stream: bool, error: Exception, status: int, code: str
) -> None:
    server = serve(fake_client(error=error))
    response = server.complete(stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "secret" not in response.text
    assert server.context.admission.num_open == 0


@pytest.mark.parametrize("prompt", ["hello", ["hello", "world"]])
@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (EngineDeadError("gone"), "engine_unavailable", "overloaded_error"),
        (RuntimeError("secret/path"), "internal_error", "server_error"),
    ],
)
def test_failure_after_the_first_token_is_an_event_and_an_end(
    serve: Any, fake_client: Any, prompt: Any, error: Exception, code: str, kind: str
) -> None:
    server = serve(fake_client(error=error, error_step=2))
    response = server.complete(prompt=prompt, stream=True)
    assert response.status_code == 200
    frame = error_frame(response.text)
    assert (frame["code"], frame["type"]) == (code, kind)
    assert "secret" not in response.text


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_a_number_fails_its_request_alone(serve: Any, fake_client: Any, stream: bool) -> None:
    server = serve(fake_client(finish_with_error=True))
    response = server.complete(stream=stream, max_tokens=3)
    if stream:
        assert error_frame(response.text)["code"] == "numerical_error"
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (500, "numerical_error")


def test_wait_for_the_first_token_is_bounded(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(hold=True), limits={"queue_timeout": 0.2})
    for stream in (True, False):
        response = server.complete(stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1000
    assert server.client.num_open == 0


def test_gaps_and_whole_requests_are_bounded(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(step_delay=0.5), limits={"token_gap_timeout": 0.2})
    assert error_frame(server.complete(stream=True).text)["code"] == "generation_timeout"
    server = serve(fake_client(step_delay=0.02), limits={"request_timeout": 0.3, "stall_timeout": 0.4})
    assert error_frame(server.complete(stream=True, max_tokens=200).text)["code"] == "generation_timeout"
    assert server.complete(max_tokens=200).json()["error"]["code"] == "generation_timeout"


def test_full_queue_sheds_at_once_and_recovers(serve: Any, fake_client: Any, eventually: Any) -> None:
    server = serve(fake_client(hold=True), limits={"max_queued_requests": 2})
    capacity = server.client.info.max_num_seqs + 2
    answers: list[httpx.Response] = []
    clients = [threading.Thread(target=lambda: answers.append(server.complete())) for _ in range(capacity)]
    for each in clients:
        each.start()
    eventually(lambda: server.context.admission.num_open == capacity)
    begin = time.monotonic()
    response = server.complete()
    assert time.monotonic() - begin < 0.1
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
    assert response.json()["error"]["type"] == "overloaded_error"
    assert response.headers["retry-after"] == "1"
    with server.connect() as connection:
        # Before the body is here.
        connection.settimeout(1)
        connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/health/ready").json()["reason"] == "queue_full"
    server.client.hold = False
    for each in clients:
        each.join()
    assert [answer.status_code for answer in answers] == [200] * capacity
    assert server.complete().status_code == 200
    assert server.http.get("/health/ready").status_code == 200
    assert 'reason="queue_full"} 2.0' in server.http.get("/metrics").text


def test_queued_prompt_tokens_are_bounded_but_a_lone_request_never(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(hold=True), limits={"max_queued_tokens": 100})
    waiting = threading.Thread(target=lambda: server.complete(prompt=[1] * 200))
    waiting.start()
    while server.context.admission.num_queued_tokens < 200:
        time.sleep(0.005)
    assert server.complete(prompt=[1] * 10).status_code == 503
    server.client.hold = False
    waiting.join()
    assert server.complete(prompt=[1] * 10).status_code == 200
    assert server.context.admission.num_queued_tokens == 0


def test_body_is_forgotten_once_it_is_parsed(serve: Any, fake_client: Any, eventually: Any) -> None:
    server = serve(fake_client(hold=True))
    waiting = threading.Thread(target=lambda: server.complete(unknown="x" * 100_000))
    waiting.start()
    eventually(lambda: server.client.num_open == 1)
    assert server.app._buffered.num_bytes == 0
    server.client.hold = False
    waiting.join()


def test_bodies_of_all_connections_together_are_bounded(serve: Any) -> None:
    server = serve(limits={"max_buffered_bytes": 200_000})
    with server.connect() as slow:
        slow.sendall(HEAD + b"Content-Length: 190000\r\n\r\n" + b" " * 180_000)
        time.sleep(0.1)
        response = server.complete(unknown="x" * 100_000)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
    time.sleep(0.1)
    assert server.complete(unknown="x" * 100_000).status_code == 200


def test_prompts_of_one_request_count_each(serve: Any, fake_client: Any, eventually: Any) -> None:
    server = serve(fake_client(hold=True), limits={"max_queued_requests": 2})
    waiting = threading.Thread(target=lambda: server.complete(prompt=["x"] * 50))
    waiting.start()
    eventually(lambda: server.client.num_open == 50)
    assert server.complete().status_code == 503
    server.client.hold = False
    waiting.join()
    assert server.complete(prompt=["x"] * 50).status_code == 200


def test_openai_sdk(shared: Any) -> None:
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        whole = client.completions.create(model="fake", prompt="hello", max_tokens=5, n=2, temperature=0)
        assert [len(choice.text) for choice in whole.choices] == [5, 5]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 10
        parts = ["", ""]
        usages = []
        for chunk in client.completions.create(
            model="fake",
            prompt="hello",
            max_tokens=5,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "top_k": 3},
        ):
            usages.append(chunk.usage)
            for choice in chunk.choices:
                parts[choice.index] += choice.text
        assert parts == [choice.text for choice in whole.choices]
        assert [usage is None for usage in usages] == [True] * 10 + [False]
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="hello")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as too_long:
            client.completions.create(model="fake", prompt="hello", max_tokens=10_000)
        assert "maximum context length" in str(too_long.value)
        with pytest.raises(openai.BadRequestError) as unsupported:
            client.completions.create(model="fake", prompt="hello", suffix="x")
        assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "suffix")


def test_openai_sdk_sees_an_error_within_a_stream(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(error=EngineDeadError("gone"), error_step=1))
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="fake", prompt="hello", stream=True)
        with pytest.raises(openai.APIError, match="engine is not running"):
            for _ in stream:
                pass


def test_openai_sdk_retries_what_is_worth_it(serve: Any, fake_client: Any) -> None:
    server = serve(fake_client(hold=True), limits={"queue_timeout": 0.2})
    threading.Timer(0.5, lambda: setattr(server.client, "hold", False)).start()
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=2) as client:
        assert client.completions.create(model="fake", prompt="hello").choices[0].text
