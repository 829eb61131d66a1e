"""API keys: kept as SHA-256 digests, compared in constant time, never logged. Deny by default."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from quire.config import ConfigError
from quire.server.errors import ApiError

MAX_KEY_BYTES: Final = 512
_MAX_TRACKED_PEERS: Final = 4096

Headers = Sequence[tuple[bytes, bytes]]


def key_digest(key: str) -> bytes:
    """SHA-256 of a key. Raises ConfigError if it is empty, longer than 512 bytes or not visible ASCII."""
    if not key or len(key) > MAX_KEY_BYTES or not all("!" <= char <= "~" for char in key):
        raise ConfigError(f"An API key must be 1 to {MAX_KEY_BYTES} visible ASCII characters.")
    return hashlib.sha256(key.encode("ascii")).digest()


def read_key_file(path: Path) -> list[str]:
    """One key per line; empty lines and lines that begin with # are skipped."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError("--api-key-file cannot be read as ASCII text.") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError("--api-key-file holds no key.")
    return keys


class FailureThrottle:
    """A token bucket per peer address for failed attempts: `rate` a second, `rate` at once."""

    def __init__(self, rate: int) -> None:
        self._rate = float(rate)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def blocked(self, peer: str) -> bool:
        return self._level(peer) < 1.0

    def record(self, peer: str) -> None:
        self._buckets[peer] = (self._level(peer) - 1.0, time.monotonic())
        self._buckets.move_to_end(peer)
        if len(self._buckets) > _MAX_TRACKED_PEERS:
            self._buckets.popitem(last=False)

    def _level(self, peer: str) -> float:
        level, since = self._buckets.get(peer, (self._rate, 0.0))
        return min(self._rate, level + (time.monotonic() - since) * self._rate)


class Authenticator:
    """Checks the Authorization header of every request that is not for a public route."""

    def __init__(self, key_digests: Sequence[bytes], max_failures_per_second: int) -> None:
        self._digests = tuple(key_digests)
        self._throttle = FailureThrottle(max_failures_per_second)
        # Tenants share no prefix-cache blocks: whoever can time the cache could read another's prompt from it.
        self._salt_secret = secrets.token_bytes(32)

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def authenticate(self, headers: Headers, peer: str) -> bytes | None:
        """The digest of the caller's key, or None where no keys are set. Raises ApiError."""
        if not self._digests:
            return None
        digest = self._matching_digest([value for name, value in headers if name == b"authorization"])
        if digest is not None:
            return digest
        # Who has a key is served even if others behind the same address (a proxy) have used up its failures.
        if self._throttle.blocked(peer):
            raise ApiError("too_many_auth_failures")
        self._throttle.record(peer)
        raise ApiError("invalid_api_key")

    def _matching_digest(self, values: list[bytes]) -> bytes | None:
        if len(values) != 1:
            return None
        scheme, _, token = values[0].partition(b" ")
        token = token.strip(b" ")
        if scheme.lower() != b"bearer" or not 0 < len(token) <= MAX_KEY_BYTES:
            return None
        presented = hashlib.sha256(token).digest()
        found = None
        for digest in self._digests:
            # No early exit: the time taken says nothing about which key is close or valid.
            if hmac.compare_digest(presented, digest):
                found = digest
        return found

    def cache_salt(self, digest: bytes | None, client_salt: str) -> str:
        """The salt of the prefix cache for this caller: its own where there are keys, as sent where there are none."""
        if digest is None:
            return client_salt
        message = digest + client_salt.encode("utf-8", "surrogatepass")
        return hmac.new(self._salt_secret, message, hashlib.sha256).hexdigest()
