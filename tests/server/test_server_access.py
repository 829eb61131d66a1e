"""Authentication: denied by default, on every route there is and on those there are not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from quire.config import ConfigError
from quire.server.app import ROUTERS
from quire.server.auth import Authenticator, FailureThrottle, key_digest, read_key_file
from quire.server.errors import ApiError

KEYS = ("correct-horse", "battery-staple")
PUBLIC = {"/health", "/health/live", "/health/ready"}


@pytest.fixture
def locked(serve: Any) -> Any:
    return serve(key_digests=tuple(map(key_digest, KEYS)), limits={"max_auth_failures_per_second": 100_000})


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes(server: Any) -> list[tuple[str, str]]:
    registered = [route for router in ROUTERS for route in router.routes]
    assert len(server.app.app.routes) in (len(registered), len(ROUTERS))
    assert all(isinstance(route, APIRoute) for route in registered)
    return [
        (method, route.path.replace("{name:path}", "fake"))
        for route in registered
        if isinstance(route, APIRoute)
        for method in sorted(route.methods)
    ]


def test_every_route_is_closed_without_a_key(locked: Any) -> None:
    found = routes(locked)
    assert ("POST", "/v1/completions") in found
    tried = [*found, ("GET", "/v1/nothing"), ("POST", "/"), ("OPTIONS", "/v1/completions"), ("GET", "/docs")]
    tried += [("GET", "/openapi.json"), ("GET", "/health/../metrics"), ("GET", "/HEALTH")]
    for method, path in tried:
        response = locked.http.request(method, path)
        if path in PUBLIC:
            assert response.status_code == 200, path
            continue
        assert response.status_code == 401, (method, path)
        assert response.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("key", KEYS)
def test_every_route_is_open_with_a_key(locked: Any, key: str) -> None:
    for method, path in routes(locked):
        assert locked.http.request(method, path, headers=bearer(key)).status_code not in (401, 403), path
    assert locked.http.get("/v1/nothing", headers=bearer(key)).status_code == 404


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "correct-horse",
        "Bearer wrong",
        "Bearer correct-hors",
        "Bearer correct-horse2",
        "Bearer correct-horse battery-staple",
        "Basic correct-horse",
        "Bearer " + "x" * 600,
        "Bearer\tcorrect-horse",
        "Bearer " + key_digest(KEYS[0]).hex(),
    ],
)
def test_wrong_credentials(locked: Any, value: str) -> None:
    assert locked.http.get("/v1/models", headers={"authorization": value}).status_code == 401


def test_scheme_is_case_insensitive_and_two_headers_are_none(locked: Any) -> None:
    assert locked.http.get("/v1/models", headers={"authorization": "bEaReR correct-horse"}).status_code == 200
    twice = [("authorization", "Bearer correct-horse")] * 2
    assert locked.http.get("/v1/models", headers=twice).status_code == 401


def test_key_is_checked_before_the_body_is_read(locked: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with locked.connect() as connection:
        connection.settimeout(1)
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_failed_attempts_are_throttled(serve: Any) -> None:
    server = serve(key_digests=(key_digest("k"),), limits={"max_auth_failures_per_second": 5})
    answers = [server.http.get("/v1/models", headers=bearer("x")) for _ in range(30)]
    assert [answer.status_code for answer in answers[:5]] == [401] * 5
    assert server.http.get("/v1/models", headers=bearer("k")).status_code == 200
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "1"


def test_throttle_forgets_peers_and_recovers() -> None:
    throttle = FailureThrottle(2)
    for index in range(10_000):
        throttle.record(f"peer{index}")
    assert len(throttle._buckets) <= 4096
    throttle.record("a")
    throttle.record("a")
    assert throttle.blocked("a")
    assert not throttle.blocked("b")


def test_tenants_share_no_prefix_cache(locked: Any) -> None:
    salts = []
    for key, body in ((KEYS[0], {}), (KEYS[0], {}), (KEYS[1], {}), (KEYS[0], {"cache_salt": "s"})):
        locked.http.post("/v1/completions", json={"prompt": "x", **body}, headers=bearer(key))
        salts.append(locked.client.calls[-1]["salt"])
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3
    assert not any(key in salt for key in KEYS for salt in salts)


def test_keys_and_prompts_are_not_logged(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(key_digests=(key_digest("sesame"),), log_requests=True)
    server.http.post("/v1/completions", json={"prompt": "jabberwock"}, headers=bearer("sesame"))
    server.http.post("/v1/completions", json={"prompt": ["jabberwock", 1]}, headers=bearer("sesame"))
    server.http.get("/v1/%0A%1Bjabber", headers=bearer("sesame2"))
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("quire", "uvicorn")))
    assert "POST /v1/completions -> 200" in logged
    for secret in ("sesame", "jabberwock", "\x1b", key_digest("sesame").hex()):
        assert secret not in logged


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 513, "a\n"])
def test_unusable_keys_are_refused_at_start(key: str) -> None:
    with pytest.raises(ConfigError):
        key_digest(key)


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\none\n two \n")
    assert read_key_file(path) == ["one", "two"]
    path.write_text("# none\n")
    with pytest.raises(ConfigError):
        read_key_file(path)
    with pytest.raises(ConfigError):
        read_key_file(tmp_path / "missing")


def test_no_keys_means_no_check() -> None:
    authenticator = Authenticator((), 1)
    assert authenticator.authenticate([], "peer") is None
    assert authenticator.cache_salt(None, "s") == "s"


def test_all_digests_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return real(a, b)

    monkeypatch.setattr("quire.server.auth.hmac.compare_digest", spy)
    digests = tuple(map(key_digest, KEYS))
    authenticator = Authenticator(digests, 10)
    authenticator.authenticate([(b"authorization", b"Bearer correct-horse")], "")
    assert compared == list(digests)
    with pytest.raises(ApiError):
        authenticator.authenticate([(b"authorization", b"Bearer x")], "")


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (("127.0.0.1", "localhost", "[::1]"), "localhost:8000", 200),
        (("127.0.0.1", "localhost", "[::1]"), "LOCALHOST", 200),
        (("127.0.0.1", "localhost", "[::1]"), "[::1]:80", 200),
        (("127.0.0.1", "localhost", "[::1]"), "localhost.evil.example", 400),
        (("127.0.0.1", "localhost", "[::1]"), "10.0.0.1", 400),
        (("localhost", "<ip>"), "10.0.0.1:80", 200),
        (("localhost", "<ip>"), "[fe80::1]", 200),
        (("localhost", "<ip>"), "rebound.example", 400),
        (("*",), "anything.example", 200),
    ],
)
def test_hosts(serve: Any, allowed: tuple[str, ...], host: str, status: int) -> None:
    server = serve(allowed_hosts=allowed)
    assert server.http.get("/health", headers={"host": host}).status_code == status
