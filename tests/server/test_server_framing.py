"""Raw bytes on a socket: what is not HTTP/1.1 within its bounds is refused, in JSON, at once."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import pytest

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "hello", "max_tokens": 2}'
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def with_length(body: bytes, length: int | None = None) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


CASES = {
    "nothing but noise": (b"\x00\x01\x02\x03\r\n\r\n", 400, "bad_request"),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 100, 400, "bad_request"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request"),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400, "bad_request"),
    "HTTP/9.9": (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", 400, "bad_request"),
    "bare line feeds in a name": (b"GET /health HTTP/1.1\r\nHo\nst: localhost\r\n\r\n", 400, "bad_request"),
    "space before the colon": (b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", 400, "bad_request"),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400, "bad_request"),
    "two Hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400, "bad_request"),
    "foreign Host": (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400, "invalid_host"),
    "Host with a user": (b"GET /health HTTP/1.1\r\nHost: localhost@evil.example\r\n\r\n", 400, "invalid_host"),
    "Host with a path": (b"GET /health HTTP/1.1\r\nHost: localhost/health\r\n\r\n", 400, "invalid_host"),
    "empty Host": (b"GET /health HTTP/1.1\r\nHost:\r\n\r\n", 400, "invalid_host"),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + BODY, 400, "bad_request"),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n" + BODY, 400, "bad_request"),
    "length with a sign": (POST + b"Content-Length: +5\r\n\r\n" + BODY, 400, "bad_request"),
    "length in hex": (POST + b"Content-Length: 0x10\r\n\r\n" + BODY, 400, "bad_request"),
    "length of 30 digits": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400, "bad_request"),
    "length of 10**15": (POST + b"Content-Length: 1000000000000000\r\n\r\n", 413, "body_too_large"),
    "length and chunks": (
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "bad_request",
    ),
    "unknown transfer coding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, "bad_request"),
    "chunk size not hex": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "bad_request"),
    "chunk without its end": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n", 400, "bad_request"),
    "chunk size of 30 digits": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n", 400, "bad_request"),
    "65 headers": (GET + b"".join(b"X-%d: 1\r\n" % index for index in range(64)) + b"\r\n", 431, "headers_too_large"),
    "header of 17 KiB": (GET + b"X: " + b"x" * 17_000 + b"\r\n\r\n", 431, "headers_too_large"),
    "header of 1 MiB": (GET + b"X: " + b"x" * 2**20 + b"\r\n\r\n", 431, "headers_too_large"),
    "target of 17 KiB": (b"GET /" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, "headers_too_large"),
    "query of 17 KiB": (b"GET /?" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, "headers_too_large"),
    "absolute target": (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "not_found"),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "not_found"),
    "dots": (b"GET /health/../metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "not_found"),
    "double slash": (b"GET //health HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "not_found"),
    "websocket": (
        GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
        200,
        "",
    ),
}


def answer_to(server: Any, data: bytes) -> tuple[int, dict[bytes, bytes], bytes, float]:
    """Status, headers, body, and the seconds until the whole answer was here."""
    begin = time.monotonic()
    with server.connect() as connection:
        connection.settimeout(3)
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        received = b""
        while b"\r\n\r\n" not in received:
            part = connection.recv(65536)
            assert part, "the connection was closed without an answer"
            received += part
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines[1:])
        length = int(headers.get(b"content-length", b"0"))
        while len(body) < length:
            body += connection.recv(65536)
        return int(lines[0].split()[1]), headers, body, time.monotonic() - begin


@pytest.mark.parametrize("case", CASES)
def test_broken_framing(shared: Any, case: str) -> None:
    data, status, code = CASES[case]
    got, headers, body, seconds = answer_to(shared, data)
    assert (got, seconds < 1.0, len(body) <= 4096) == (status, True, True)
    assert headers[b"x-request-id"]
    if code:
        assert headers[b"content-type"] == b"application/json"
        assert json.loads(body)["error"]["code"] == code
    assert shared.http.get("/health").status_code == 200


def test_http_1_0_without_host_is_served(shared: Any) -> None:
    assert answer_to(shared, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200


def test_chunked_body_is_served(shared: Any) -> None:
    chunks = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in BODY) + b"0\r\n\r\n"
    assert answer_to(shared, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)[0] == 200


def test_chunked_body_over_the_limit(serve: Any) -> None:
    server = serve(limits={"max_body_bytes": 1000})
    chunk = b"100\r\n" + b"x" * 256 + b"\r\n"
    status, headers, body, _ = answer_to(server, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 50)
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    assert headers[b"connection"] == b"close"


def test_expect_continue_is_refused_before_the_body(shared: Any) -> None:
    head = POST + b"Expect: 100-continue\r\nContent-Length: 5000000\r\n\r\n"
    assert answer_to(shared, head)[0] == 413


def test_expect_continue_is_granted(shared: Any) -> None:
    with shared.connect() as connection:
        connection.settimeout(3)
        connection.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n" or True
        connection.sendall(BODY)
        assert b" 200 " in connection.recv(65536).split(b"\r\n")[0]


def test_pipelined_requests_are_answered_in_order(shared: Any) -> None:
    data = GET + b"X-Request-Id: one\r\n\r\n" + GET + b"X-Request-Id: two\r\nConnection: close\r\n\r\n"
    answers = shared.exchange(data)
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.index(b"x-request-id: one") < answers.index(b"x-request-id: two")


def test_slow_header_is_cut_off_and_others_do_not_notice(serve: Any) -> None:
    server = serve(limits={"head_timeout": 0.4})
    idle = [server.connect() for _ in range(50)]
    slow = server.connect()
    slow.settimeout(3)
    slow.sendall(b"GET /health HTTP/1.1\r\nHos")
    begin = time.monotonic()
    assert server.complete().status_code == 200
    assert b"408 Request Timeout" in slow.recv(65536)
    for connection in idle:
        connection.settimeout(3)
        assert connection.recv(1) == b""
        connection.close()
    assert time.monotonic() - begin < 2
    slow.close()


def test_trickled_header_is_cut_off_too(serve: Any) -> None:
    server = serve(limits={"head_timeout": 0.4})
    with server.connect() as connection:
        connection.settimeout(3)
        begin = time.monotonic()
        received = b""
        connection.setblocking(False)
        while time.monotonic() - begin < 2 and b"408" not in received:
            try:
                connection.send(b"G" if time.monotonic() - begin < 0.01 else b"x")
                received += connection.recv(65536)
            except BlockingIOError:
                pass
            except ConnectionError:
                break
            time.sleep(0.02)
        assert b"408" in received
        assert time.monotonic() - begin < 1


def test_second_header_on_a_kept_connection_is_timed_too(serve: Any) -> None:
    server = serve(limits={"head_timeout": 0.4})
    with server.connect() as connection:
        connection.settimeout(3)
        connection.sendall(GET + b"\r\n")
        assert b" 200 " in connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert b"408 Request Timeout" in connection.recv(65536)


def test_idle_kept_connection_is_closed(serve: Any) -> None:
    server = serve(limits={"keep_alive_timeout": 1.0})
    with server.connect() as connection:
        connection.settimeout(5)
        connection.sendall(GET + b"\r\n")
        assert b" 200 " in connection.recv(65536)
        assert connection.recv(65536) == b""


def test_slow_body_is_cut_off_and_holds_no_place(serve: Any) -> None:
    server = serve(limits={"body_timeout": 0.4, "max_queued_requests": 1})
    slow = [server.connect() for _ in range(20)]
    for connection in slow:
        connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
    assert server.complete().status_code == 200
    for connection in slow:
        connection.settimeout(3)
        assert b"408 Request Timeout" in connection.recv(65536)
        connection.close()


def test_large_refused_body_still_gets_its_answer(shared: Any) -> None:
    """A client that sends first and reads then must not meet a reset."""
    with shared.connect() as connection:
        connection.settimeout(3)
        connection.sendall(with_length(b"x" * (8 * 2**20)))
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer


def test_connections_are_bounded(serve: Any) -> None:
    server = serve(limits={"max_connections": 5})
    held = [server.connect() for _ in range(5)]
    time.sleep(0.1)
    status, headers, body, _ = answer_to(server, GET + b"\r\n")
    assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
    assert int(headers[b"retry-after"]) >= 1
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 3
    while answer_to(server, GET + b"\r\n")[0] != 200:
        assert time.monotonic() < deadline


def test_reader_of_nothing_does_not_hold_an_answer_for_ever(serve: Any, fake_client: Any, eventually: Any) -> None:
    server = serve(fake_client(step_text="x" * 100_000), limits={"stall_timeout": 0.5})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "hello", "max_tokens": 200}'
        connection.sendall(with_length(body))
        eventually(lambda: server.client.calls and server.client.num_open == 0)
        eventually(lambda: len(server._server.server_state.connections) == 0)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1.2:3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False), ("a,b", False)],
)
def test_request_id_is_bounded(shared: Any, sent: str, kept: bool) -> None:
    headers = shared.http.get("/health", headers={"x-request-id": sent}).headers
    assert (headers["x-request-id"] == sent) is kept
    assert ("x-quire-ignored" in headers) is not kept
