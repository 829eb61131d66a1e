"""Frames on the socketpair: four bytes of big-endian length, then one msgpack message of `engine.messages`.

A frame that is truncated, too large or not a declared message raises `WireError`, and the side that met it closes:
after a bad frame the stream has no known boundaries, so there is nothing to resume from.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from typing import Any, Generic, TypeVar

import msgspec

from quire.engine.messages import ToEngine

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Six million prompt tokens; a larger message is a bug or an attack."""
MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""What the engine keeps for a front process that does not read; beyond it the engine waits instead of computing."""
MAX_DRAIN_BYTES = 4 * 1024 * 1024
"""What one `receive` takes at most, so that a flood of messages cannot keep the engine from stepping."""

_LENGTH = struct.Struct(">I")
_READ_BYTES = 256 * 1024
_ENCODER = msgspec.msgpack.Encoder()

T = TypeVar("T")


class WireError(Exception):
    """The other side sent something that is no frame, or a message does not fit into one."""


class ConnectionClosedError(WireError):
    """The other side is gone. Nothing was cut off: its last frame had arrived whole."""


def pack(message: msgspec.Struct) -> bytearray:
    """One frame.

    Raises:
        WireError: the message is larger than MAX_FRAME_BYTES or holds what msgpack cannot carry (a lone surrogate, an
            integer of more than 64 bits). Nothing was sent then, and the stream stays usable.
    """
    frame = bytearray(_LENGTH.size)
    try:
        _ENCODER.encode_into(message, frame, _LENGTH.size)
    except (UnicodeEncodeError, OverflowError) as error:
        raise WireError("The message holds a value that cannot be encoded.") from error
    size = len(frame) - _LENGTH.size
    if size > MAX_FRAME_BYTES:
        raise WireError(f"The message has {size} bytes; a frame takes at most {MAX_FRAME_BYTES}.")
    _LENGTH.pack_into(frame, 0, size)
    return frame


class FrameDecoder(Generic[T]):
    """Cuts a byte stream, fed in pieces of any size, into messages of one declared type."""

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The messages that `data` completes.

        Raises:
            WireError: a frame is too large or holds no such message. The decoder is unusable afterwards.
        """
        self._buffer += data
        messages: list[T] = []
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(view, start)
                if size > MAX_FRAME_BYTES:
                    raise WireError(f"A frame announces {size} bytes; at most {MAX_FRAME_BYTES} are accepted.")
                end = start + _LENGTH.size + size
                if len(view) < end:
                    break
                messages.append(self._decode(view[start + _LENGTH.size : end]))
                start = end
        del self._buffer[:start]
        return messages

    def end(self) -> None:
        """Tell the decoder that the stream has ended.

        Raises:
            WireError: it ended inside a frame.
        """
        if self._buffer:
            raise WireError(f"The connection ended inside a frame, {len(self._buffer)} bytes after its beginning.")

    def _decode(self, payload: memoryview) -> T:
        with payload:
            try:
                return self._decoder.decode(payload)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise WireError("A frame does not hold one of the declared messages.") from error


class EngineChannel:
    """The engine's end of the socketpair: synchronous, used by the one thread that steps.

    Args:
        sock: a connected stream socket; owned by the channel from here on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
        self._unsent = bytearray()
        self._ended = False

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """All messages that have arrived, in order; with `wait` sleep until there is one.

        Raises:
            ConnectionClosedError: the front process is gone and all it sent has been handed out.
            WireError: it sent a bad frame.
        """
        while True:
            messages = self._drain()
            self._flush()
            if messages or not wait:
                return messages
            self._poll(select.POLLIN | (select.POLLOUT if self._unsent else 0))

    def send(self, message: msgspec.Struct) -> None:
        """Hand over one message; waits only while MAX_UNSENT_BYTES are not taken.

        This cannot deadlock: the front process reads whether or not its own writes are taken.

        Raises:
            ConnectionClosedError: the front process is gone.
            WireError: the message is too large for a frame.
        """
        self._unsent += pack(message)
        self._flush()
        while len(self._unsent) > MAX_UNSENT_BYTES:
            self._poll(select.POLLOUT)
            self._flush()

    def close(self, seconds: float = 1.0) -> None:
        """Give the front process so long to take what is unsent, then close."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(WireError):
            while self._unsent and (left := deadline - time.monotonic()) > 0:
                self._poll(select.POLLOUT, left)
                self._flush()
        self._sock.close()

    def _drain(self) -> list[ToEngine]:
        messages: list[ToEngine] = []
        num_bytes = 0
        while not self._ended and num_bytes < MAX_DRAIN_BYTES:
            try:
                data = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self._ended = not data
            num_bytes += len(data)
            messages += self._decoder.feed(data)
        if self._ended and not messages:
            self._decoder.end()
            raise ConnectionClosedError("The front process has closed the connection.")
        return messages

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionClosedError("The front process has closed the connection.") from error

    def _poll(self, events: int, seconds: float | None = None) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        poll.poll(None if seconds is None else seconds * 1000)
