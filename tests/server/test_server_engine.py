"""`quire serve` as people run it: the bundled model, the real engine in its own process, signals, exit codes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire.config import ExitCode
from quire.tales import MODEL_DIR

pytestmark = pytest.mark.skipif(
    not (MODEL_DIR / "model.safetensors").is_file(), reason="the bundled model's weights are not here"
)


class Quire:
    """A `quire serve` process."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "quire", "serve", "--port", "0", "--num-threads", "1", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(r"^Ready: (\S+) at (\S+)$", line):
                self.model, self.url = match[1], match[2]
                break
        else:
            pytest.fail(self.end()[1])
        self.http = httpx.Client(base_url=self.url, timeout=120)

    @property
    def engine_pid(self) -> int:
        (pid,) = (pid for pid in self.children if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes())
        return pid

    @property
    def children(self) -> list[int]:
        """The engine, and from a moment after the start those that check grammars."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def complete(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 16, **body})

    def end(self, *signals: int, seconds: float = 30.0) -> tuple[int, str]:
        """Send signals, one after the other; the exit code and what was logged."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.2)
        _, log = self.process.communicate(timeout=seconds)
        if hasattr(self, "http"):
            self.http.close()
        return self.process.returncode, log

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        if hasattr(self, "http"):
            self.http.close()


@pytest.fixture(scope="module")
def tales() -> Iterator[Quire]:
    """One server for all tests here; it ends as a server does that is told twice to go while it streams."""
    server = Quire("--max-num-seqs", "16")
    try:
        server.complete(max_tokens=1)
        yield server
        children = server.children
        thread, answers = in_background(lambda: server.complete(max_tokens=1000, stream=True, ignore_eos=True, n=4))
        while not server.http.get("/health/ready").json()["running"]:
            time.sleep(0.02)
        time.sleep(0.2)  # a request that runs but has shown nothing yet is sent elsewhere at once
        begin = time.monotonic()
        code, log = server.end(signal.SIGTERM, signal.SIGTERM)
        assert time.monotonic() - begin < 4
        thread.join()
        assert code == ExitCode.DRAIN_DEADLINE, log
        assert "Traceback" not in log
        assert last_error(answers[0]) == "server_shutdown"
        assert all_gone(children, 0)
    finally:
        server.kill()


def all_gone(pids: list[int], seconds: float = 2.0) -> bool:
    """Whether these processes have ended, or do so in time; those that their new parent has not buried yet have."""

    def is_there(pid: int) -> bool:
        try:
            return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + seconds
    while any(is_there(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def in_background(function: Callable[[], httpx.Response]) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    return thread, answers


def last_error(response: httpx.Response) -> str:
    assert response.text.endswith("data: [DONE]\n\n")
    code: str = json.loads(response.text.split("\n\n")[-3][6:])["error"]["code"]
    return code


def text_of_stream(response: httpx.Response) -> str:
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_start_prints_the_budget_and_a_line_to_paste(tales: Quire) -> None:
    text = "".join(tales.lines)
    assert "KV-cache" in text
    assert tales.model == "tales"


@pytest.mark.parametrize("body", [{"temperature": 0}, {"seed": 7, "temperature": 1.0}])
@pytest.mark.parametrize("stops", [False, True])
def test_stream_and_whole_answer_agree(tales: Quire, body: dict[str, Any], stops: bool) -> None:
    body = {"max_tokens": 48, "ignore_eos": True, **body}
    if stops:
        text = tales.complete(**body).json()["choices"][0]["text"]
        body["stop"] = [text[len(text) // 2 :][:4]]
    whole = tales.complete(**body).json()["choices"][0]
    assert text_of_stream(tales.complete(stream=True, **body)) == whole["text"]
    if stops:
        assert whole["stop_reason"] == body["stop"][0]
        assert body["stop"][0] not in whole["text"]


def test_log_probabilities_stream_as_they_are(tales: Quire) -> None:
    body: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    whole = tales.complete(**body).json()["choices"][0]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    streamed: dict[str, list[Any]] = {name: [] for name in names}
    for line in tales.complete(**body, stream=True).text.split("\n\n"):
        if line.startswith("data: {"):
            for name in names:
                streamed[name] += json.loads(line[6:])["choices"][0]["logprobs"][name]
    assert streamed == whole["logprobs"]
    assert "".join(streamed["tokens"]) == whole["text"]
    for token, log_prob, top in zip(*(streamed[name] for name in names[:3]), strict=True):
        assert top[token] == log_prob == max(top.values()), "greedy"
        assert len(top) == 3


def test_best_of_is_the_most_probable_choice(tales: Quire) -> None:
    body: dict[str, Any] = {"max_tokens": 12, "seed": 5, "logprobs": 0}
    every = tales.complete(**body, n=5).json()["choices"]
    values = [choice["logprobs"]["token_logprobs"] for choice in every]
    best = max(range(5), key=lambda index: sum(values[index]) / len(values[index]))
    assert tales.complete(**body, best_of=5).json()["choices"][0]["text"] == every[best]["text"]


@pytest.mark.parametrize("stop", [None, ["."], [" and", ","]])
def test_beams_stream_what_they_answer(tales: Quire, stop: list[str] | None) -> None:
    """The certain beginning comes early, the rest and the other choices at the end, stop strings nowhere."""
    body: dict[str, Any] = {"use_beam_search": True, "n": 2, "best_of": 4, "max_tokens": 40, "stop": stop}
    whole = tales.complete(**body).json()["choices"]
    assert [choice["index"] for choice in whole] == [0, 1]
    assert whole[0]["text"] != whole[1]["text"]
    scores = [choice["cumulative_logprob"] / len(choice["text"]) for choice in whole]
    assert all(score < 0 for score in scores)
    texts, num_chunks = ["", ""], 0
    for line in tales.complete(stream=True, **body).text.split("\n\n"):
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["text"]
                num_chunks += bool(choice["text"])
    assert texts == [choice["text"] for choice in whole]
    for choice in whole:
        if choice["finish_reason"] == "stop" and choice["stop_reason"] is not None:
            assert choice["stop_reason"] in (stop or [])
        assert not any(text in choice["text"] for text in stop or [])
    assert stop is None or {choice["finish_reason"] for choice in whole} == {"stop"}


def test_scores_of_a_prompt_are_the_same_cold_and_warm(tales: Quire) -> None:
    text = "Once there was a miller who was poor, but he had a beautiful daughter. " * 4
    body: dict[str, Any] = {"prompt": text, "echo": True, "logprobs": 2, "max_tokens": 0}
    cold, warm = (tales.complete(**body).json() for _ in range(2))
    assert cold["choices"][0]["text"] == text
    assert cold["choices"] == warm["choices"]
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    assert warm["usage"]["completion_tokens"] == 0
    longer = tales.complete(**{**body, "max_tokens": 1, "temperature": 0}).json()["choices"][0]["logprobs"]
    assert longer["token_logprobs"][:-1] == cold["choices"][0]["logprobs"]["token_logprobs"]


def test_second_time_the_prompt_is_cached(tales: Quire) -> None:
    prompt = "There was once upon a time a queen who had a little daughter, and a stepmother who was a witch. " * 3
    first, second = (tales.complete(prompt=prompt, temperature=0).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    salted = tales.complete(prompt=prompt, temperature=0, cache_salt="other").json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_many_at_once_say_what_one_alone_says(tales: Quire) -> None:
    prompts = [f"The {animal} went into the wood" for animal in ("fox", "wolf", "hare", "bear", "frog", "goose")]
    alone = [tales.complete(prompt=prompt, temperature=0).json()["choices"][0]["text"] for prompt in prompts]
    together = tales.complete(prompt=prompts, temperature=0).json()
    assert [choice["text"] for choice in together["choices"]] == alone
    choices = tales.complete(n=4, seed=3).json()["choices"]
    assert len({choice["text"] for choice in choices}) > 1


def test_tokens_and_text_agree(tales: Quire) -> None:
    ids = tales.http.post("/tokenize", json={"prompt": "Once upon a time"}).json()["tokens"]
    by_ids = tales.complete(prompt=ids, temperature=0, return_token_ids=True, echo=True).json()["choices"][0]
    by_text = tales.complete(temperature=0, return_token_ids=True, echo=True).json()["choices"][0]
    assert by_ids["text"] == by_text["text"]
    assert by_text["text"].startswith("Once upon a time")
    assert by_ids["token_ids"] == by_text["token_ids"]
    assert by_ids["token_ids"][: len(ids)] == ids


def test_clients_that_leave_give_their_blocks_back(tales: Quire) -> None:
    baseline = tales.http.get("/health/ready").json()["free_blocks"]
    body = {"prompt": "Once", "max_tokens": 900, "stream": True, "ignore_eos": True, "n": 3}
    for _ in range(3):
        with tales.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_raw())
    deadline = time.monotonic() + 10
    while (state := tales.http.get("/health/ready").json())["running"] or state["free_blocks"] != baseline:
        # Figures are those of the last step, so there has to be one.
        tales.complete(max_tokens=1)
        assert time.monotonic() < deadline, state


def test_too_long_and_unknown(tales: Quire) -> None:
    error = tales.complete(max_tokens=100_000).json()["error"]
    assert error["message"].startswith("This model's maximum context length is")
    assert tales.complete(model="other").status_code == 404


def test_openai_sdk_against_the_engine(tales: Quire) -> None:
    with openai.OpenAI(base_url=tales.url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(model="tales", prompt="Once upon", max_tokens=12, temperature=0)
        parts = client.completions.create(model="tales", prompt="Once upon", max_tokens=12, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text


def unicode_prompts() -> list[str]:
    scraps = [
        "naïve façade",
        "日本語の物語",
        "Жил-был царь",
        "👩‍👩‍👧‍👦 and 👍🏽",
        "e\u0301a\u0308",
        "ﷺ",
        "한국어",
        "\u200bzero",
        "𝔘𝔫𝔦",
    ]
    rng = random.Random(0)
    return [" ".join(rng.choices(scraps, k=rng.randrange(1, 5))) + f" {index}" for index in range(200)]


def test_stream_and_whole_answer_agree_on_unicode(tiny_checkpoint: Callable[..., Path]) -> None:
    """A random model speaks in random bytes: characters cut in two, and bytes that are no text at all."""
    server = Quire(str(tiny_checkpoint("llama")), "--max-num-seqs", "16")

    def both(index_and_prompt: tuple[int, str]) -> tuple[str, str]:
        index, prompt = index_and_prompt
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 2.0, "seed": index, "ignore_eos": True}
        whole = server.complete(**body).json()["choices"][0]["text"]
        return text_of_stream(server.complete(**body, stream=True)), whole

    try:
        with ThreadPoolExecutor(8) as pool:
            pairs = list(pool.map(both, enumerate(unicode_prompts())))
    finally:
        server.end(signal.SIGINT)
    assert [streamed for streamed, _ in pairs] == [whole for _, whole in pairs]
    assert sum(not whole.isascii() for _, whole in pairs) > 150


def test_stop_strings_cut_at_every_split(tales: Quire) -> None:
    """Every piece of an answer as stop string: the text ends before its first place, streamed or not."""
    body: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    text = tales.complete(**body).json()["choices"][0]["text"]
    pieces = sorted({text[start : start + length] for start in range(8, 24) for length in (1, 3, 7)})

    def stopped(piece: str) -> tuple[str, str, dict[str, Any]]:
        whole = tales.complete(**body, stop=piece).json()["choices"][0]
        return text_of_stream(tales.complete(**body, stop=[piece], stream=True)), whole["text"], whole

    with ThreadPoolExecutor(8) as pool:
        for piece, (streamed, whole, choice) in zip(pieces, pool.map(stopped, pieces), strict=True):
            assert streamed == whole == text[: text.index(piece)]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", piece)


def test_idle_server_ends_cleanly() -> None:
    server = Quire("--drain-grace", "0.2")
    try:
        children = server.children
        code, log = server.end(signal.SIGTERM)
    finally:
        server.kill()
    assert code == ExitCode.CLEAN, log
    assert "Traceback" not in log
    assert all_gone(children)


def test_death_of_the_engine_is_told_and_is_an_exit_code() -> None:
    server = Quire("--drain-grace", "0.5")
    try:
        pid = server.engine_pid
        thread, answers = in_background(lambda: server.complete(max_tokens=1000, ignore_eos=True))
        while server.http.get("/load").json() == {"server_load": 0}:
            time.sleep(0.02)
        children = server.children
        os.kill(pid, signal.SIGKILL)
        thread.join()
        assert answers[0].json()["error"]["code"] == "engine_unavailable"
        assert server.http.get("/health").status_code == 503
        code, log = server.end()
    finally:
        server.kill()
    assert code == ExitCode.ENGINE_LOST, log
    assert "Traceback" not in log
    assert all_gone(children)


def test_a_server_that_is_killed_leaves_no_process() -> None:
    server = Quire()
    try:
        assert server.complete(max_tokens=1, regex="a").status_code == 200
        children = server.children
        assert len(children) >= 2
    finally:
        server.kill()
    assert all_gone(children)
