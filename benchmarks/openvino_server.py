"""OpenVINO GenAI behind HTTP with streaming, as a peer of `serving.py`: its Python package has no server of its own.

    python benchmarks/serving.py MODEL --peer \\
        'openvino=OPENVINO_VENV/bin/python benchmarks/openvino_server.py CONVERTED MODEL {port} --threads {threads}'

Runs on the peer's own Python: numpy, openvino, openvino_genai and tokenizers, uvloop if it is there. In favour of the
peer the front is as thin as can be: nothing is checked, ids become text by a table, each event is a template filled in,
and a step's tokens come in one message. The engine has a process of its own, since `step` keeps Python's lock: in a
thread it would stop the front for as long. Requests are taken between any two steps; nothing else delays them.

Serves GET /v1/models and POST /v1/completions with a list of ids as prompt, greedy, streaming only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: "
EVENTS = HEAD + b"text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("converted", help="directory of the model as OpenVINO reads it")
    parser.add_argument("model", type=Path, help="directory of the checkpoint: its tokenizer.json, its name")
    parser.add_argument("port", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine (default: all cores)")
    parser.add_argument("--cache-gib", type=int, default=2, help="of keys and values (default: 2)")
    parser.add_argument("--max-batched-tokens", type=int, default=512, help="of a step (default: 512)")
    parser.add_argument(
        "--precision",
        choices=("bf16", "f32"),
        default="bf16",
        help="of arithmetic, keys and values; a processor without bfloat16 has only f32 (default: bf16)",
    )
    return parser.parse_args()


class Lines:
    """JSON lines out of the bytes that a socket brings."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Any]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def run_engine(arguments: argparse.Namespace, front: socket.socket) -> None:
    """Take [key, ids, number of tokens] from the front; after each step send [[key, new ids], ...]."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = arguments.cache_gib
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = arguments.max_batched_tokens
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    properties = {
        "INFERENCE_PRECISION_HINT": arguments.precision,
        "INFERENCE_NUM_THREADS": arguments.threads,
        "KV_CACHE_PRECISION": arguments.precision,
    }
    pipeline = genai.ContinuousBatchingPipeline(arguments.converted, scheduler, "CPU", properties)
    front.sendall(b"[]\n")  # ready
    lines = Lines()
    live: dict[int, tuple[Any, int]] = {}  # the handle, and how many tokens are to come
    while True:
        while not live or select.select([front], [], [], 0)[0]:
            data = front.recv(1 << 20)
            if not data:
                return
            for key, ids, num_tokens in lines.feed(data):
                config = genai.GenerationConfig()
                config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
                tensor = ov.Tensor(np.array([ids], dtype=np.int64))
                live[key] = pipeline.add_request(key, tensor, config), num_tokens
        pipeline.step()
        message = []
        for key, (handle, num_left) in list(live.items()):
            token_ids = []
            while handle.can_read():
                for output in handle.read().values():
                    token_ids += output.generated_ids
            if not token_ids:
                continue
            message.append([key, token_ids])
            live[key] = handle, num_left - len(token_ids)
            if num_left <= len(token_ids):
                del live[key]
        if message:
            front.sendall(json.dumps(message).encode() + b"\n")


class Stream:
    """A request whose tokens are to come."""

    def __init__(self, transport: asyncio.Transport, key: int, num_tokens: int, num_prompt_tokens: int) -> None:
        self.transport = transport
        self.num_left = self.num_tokens = num_tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.before = b'data: {"id":"%d","object":"text_completion","choices":[{"index":0,"text":' % key


class Front:
    """All connections, and the engine behind them."""

    def __init__(self, name: str, texts: list[bytes], engine: socket.socket) -> None:
        self._texts = texts
        self._engine = engine
        self._lines = Lines()
        self._streams: dict[int, Stream] = {}
        self._num_requests = 0
        body = json.dumps({"object": "list", "data": [{"id": name, "object": "model"}]}).encode()
        self.models = HEAD + b"application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def start(self, transport: asyncio.Transport, body: bytes) -> None:
        request = json.loads(body)
        ids, num_tokens = request["prompt"], request["max_tokens"]
        self._num_requests = key = self._num_requests + 1
        self._streams[key] = Stream(transport, key, num_tokens, len(ids))
        self._engine.sendall(json.dumps([key, ids, num_tokens]).encode() + b"\n")

    def on_tokens(self) -> None:
        data = self._engine.recv(1 << 20)
        if not data:
            sys.exit("the engine ended")
        for message in self._lines.feed(data):
            for key, token_ids in message:
                self._write(key, token_ids)

    def _write(self, key: int, token_ids: list[int]) -> None:
        stream = self._streams[key]
        text = b"".join([self._texts[token_id] for token_id in token_ids])
        event = stream.before + b'"%b","finish_reason":null}]}\n\n' % text
        data = b"%x\r\n%b\r\n" % (len(event), event)
        if stream.num_left == stream.num_tokens:
            data = EVENTS + data
        stream.num_left -= len(token_ids)
        if stream.num_left <= 0:
            del self._streams[key]
            usage = b'"prompt_tokens":%d,"completion_tokens":%d' % (stream.num_prompt_tokens, stream.num_tokens)
            last = b'data: {"choices":[],"usage":{%b}}\n\ndata: [DONE]\n\n' % usage
            data += b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last)
        stream.transport.write(data)
        if stream.num_left <= 0:
            stream.transport.close()


class Connection(asyncio.Protocol):
    """One request, whose head and body end where Content-Length says."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET "):
            self._transport.write(self._front.models)
            self._transport.close()
            return
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) >= int(length.split(b":")[1]):
            self._front.start(self._transport, body)


def text_table(model: Path) -> list[bytes]:
    """What a token id adds to a text, as it stands in JSON; never empty, so that every token is an event."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [tokenizer.id_to_token(token_id) or "?" for token_id in range(tokenizer.get_vocab_size())]
    return [json.dumps(text)[1:-1].encode() for text in texts]


async def run_front(arguments: argparse.Namespace, engine: socket.socket) -> None:
    if engine.recv(3) != b"[]\n":
        sys.exit("the engine did not start")
    front = Front(arguments.model.name, text_table(arguments.model), engine)
    loop = asyncio.get_running_loop()
    loop.add_reader(engine.fileno(), front.on_tokens)
    server = await loop.create_server(lambda: Connection(front), "127.0.0.1", arguments.port, backlog=1024)
    async with server:
        await server.serve_forever()


def main() -> None:
    arguments = parse_arguments()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        run_engine(arguments, theirs)
        return
    theirs.close()
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    run(run_front(arguments, ours))


if __name__ == "__main__":
    main()
