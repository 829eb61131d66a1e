"""The wall around the routes: what every request must pass before any route, parser or model sees it.

An ASGI wrapper outside routing. Its decisions rest on the raw scope (method, path, headers), so no route can be
forgotten: authentication is denied by default, and each bound on bytes holds on every path, known or not.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import time
from functools import partial
from typing import Final

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from quire.server.admission import Admission
from quire.server.auth import Authenticator
from quire.server.body import Body, BufferedBytes, Headers, OffLoop
from quire.server.errors import ApiError, printable_name
from quire.server.json_scan import scan_json
from quire.server.lifecycle import ClientLeftError, Lifecycle, Phase
from quire.server.settings import ServerSettings

logger = logging.getLogger("quire.server")

PUBLIC_PATHS: Final = frozenset({"/health", "/health/live", "/health/ready"})
"""All that is served without a key."""
OPEN_WHILE_DRAINING: Final = PUBLIC_PATHS | {"/metrics", "/ping"}

MAX_REQUEST_ID_CHARS: Final = 128
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:@+=/-]{1,%d}" % MAX_REQUEST_ID_CHARS)
_JSON_MEDIA_TYPE: Final = re.compile(
    rb'application/json[ \t]*(;[ \t]*charset[ \t]*=[ \t]*"?utf-?8"?[ \t]*)?;?', re.IGNORECASE
)


class Reply:
    """The send side of one request: adds what every answer carries and knows whether it has begun."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._headers: Headers = [(b"x-request-id", request_id)]
        self.status = 0
        self.close = False
        """Tell the client that the connection ends with this answer."""

    def add_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *self._headers]
            if self.close:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def error(self, error: ApiError, *, more: bool = False) -> None:
        body = error.body()
        headers = [*error.headers(), (b"content-length", b"%d" % len(body))]
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": more})


class Guard:
    def __init__(
        self,
        app: FastAPI,
        *,
        settings: ServerSettings,
        authenticator: Authenticator,
        admission: Admission,
        lifecycle: Lifecycle,
        off_loop: OffLoop,
    ) -> None:
        self.app = app
        self._settings = settings
        self._limits = settings.limits
        self._authenticator = authenticator
        self._admission = admission
        self._lifecycle = lifecycle
        self._off_loop = off_loop
        self._buffered = BufferedBytes(settings.limits.max_buffered_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._handle_http(scope, receive, send)

    async def _handle_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.monotonic()
        headers: Headers = list(scope["headers"])
        request_id, refused = _request_id(headers)
        reply = Reply(send, request_id)
        if refused:
            reply.add_header(b"x-quire-ignored", b"x-request-id")
        scope.setdefault("state", {})["request_id"] = request_id.decode("ascii")
        body: Body | None = None
        try:
            self._check_headers(scope, headers)
            body = Body(receive, headers, self._limits, self._buffered)
            scope["state"]["body"] = body
            self._check_access(scope, headers)
            await self._serve(scope, headers, body, reply)
        except ApiError as error:
            await self._refuse(error, body, reply)
        except ClientLeftError:
            pass
        except Exception:
            logger.exception("request %s failed", request_id.decode("ascii"))
            if not reply.status:
                await self._refuse(ApiError("internal_error"), body, reply)
        finally:
            if body is not None:
                body.release()
        if self._settings.log_requests:
            logger.info(
                "%s %s %s -> %d in %.0f ms",
                request_id.decode("ascii"),
                scope["method"],
                printable_name(scope["path"]),
                reply.status,
                (time.monotonic() - begin) * 1000,
            )

    def _check_headers(self, scope: Scope, headers: Headers) -> None:
        limits = self._limits
        num_bytes = len(scope["method"]) + len(scope.get("raw_path") or b"") + len(scope["query_string"]) + 14
        num_bytes += sum(len(name) + len(value) + 4 for name, value in headers)
        if num_bytes > limits.max_header_bytes or len(headers) > limits.max_headers:
            raise ApiError("headers_too_large", max_bytes=limits.max_header_bytes, max_headers=limits.max_headers)
        if scope["http_version"] not in ("1.0", "1.1"):
            raise ApiError("bad_request", reason="its version is unknown")
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            raise ApiError("bad_request", reason="it needs exactly one Host header")
        if hosts and not _host_allowed(hosts[0], self._settings.allowed_hosts):
            raise ApiError("invalid_host")

    def _check_access(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if path not in PUBLIC_PATHS:
            peer = scope["client"][0] if scope.get("client") else ""
            scope["state"]["key_digest"] = self._authenticator.authenticate(headers, peer)
        if self._lifecycle.phase is not Phase.READY and path not in OPEN_WHILE_DRAINING:
            raise ApiError("draining")

    async def _serve(self, scope: Scope, headers: Headers, body: Body, reply: Reply) -> None:
        counted = scope["method"] == "POST" and scope["path"] not in OPEN_WHILE_DRAINING
        if counted:
            self._admission.check()
        if not body.complete:
            _check_content(headers)
            await body.read()
        if body.data:
            await self._off_loop(partial(scan_json, body.data, self._limits), len(body.data))
        if not counted:
            await self.app(scope, body, reply)
            return
        # Counted after the body is here, so that slow senders hold no place in the queue, and before it is parsed.
        with self._admission.enter() as ticket:
            scope["state"]["ticket"] = ticket
            await self.app(scope, body, reply)

    async def _refuse(self, error: ApiError, body: Body | None, reply: Reply) -> None:
        if reply.status:
            logger.error("an error after the answer began: %s", error.code)
            return
        unread = body is None or not body.complete
        reply.close = reply.close or unread or error.status in (408, 431) or error.code == "draining"
        if body is None or body.complete or error.status == 408 or body.awaits_continue:
            await reply.error(error)
            return
        # The answer first; then the rest of the body is read and dropped for a moment. Closing a socket with unread
        # bytes resets it, and the client would lose the answer.
        await reply.error(error, more=True)
        await body.drop_rest()
        await reply({"type": "http.response.body", "body": b"", "more_body": False})


def _request_id(headers: Headers) -> tuple[bytes, bool]:
    """The client's X-Request-Id, or a random one; and whether one was sent and not taken."""
    sent = [value for name, value in headers if name == b"x-request-id"]
    if len(sent) == 1 and _REQUEST_ID.fullmatch(sent[0]):
        return sent[0], False
    return secrets.token_hex(16).encode("ascii"), bool(sent)


def _check_content(headers: Headers) -> None:
    types = [value for name, value in headers if name == b"content-type"]
    if len(types) != 1 or not _JSON_MEDIA_TYPE.fullmatch(types[0].strip()):
        raise ApiError("unsupported_media_type")
    if any(name == b"content-encoding" and value.strip().lower() != b"identity" for name, value in headers):
        raise ApiError("unsupported_content_encoding")


def _host_allowed(value: bytes, allowed: tuple[str, ...]) -> bool:
    if "*" in allowed:
        return True
    try:
        text = value.decode("ascii").lower()
    except UnicodeDecodeError:
        return False
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", text)
    if match is None:
        return False
    host = match[1]
    if host in allowed:
        return True
    return "<ip>" in allowed and _is_ip_address(host.strip("[]"))


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
