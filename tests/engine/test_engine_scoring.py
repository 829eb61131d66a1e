"""`LLM.score` and `LLM.perplexity` against transformers and against lm-evaluation-harness's way to cut texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from quire import LLM
from quire.engine.scoring import encode_pair, windows
from quire.sampling_params import InvalidParameterError
from quire.scheduler.request import AdmissionError
from quire.tales import MODEL_DIR

TOLERANCE = 1e-4
CONTEXT_LENGTH = 64
TEXT = (
    "Once upon a time there was a king who had three daughters, and the youngest was so beautiful that the sun "
    "itself, which has seen so much, was astonished whenever it shone in her face. Close by the castle lay a great "
    "dark forest, and under an old lime-tree in the forest was a well, and when the day was very warm, the king's "
    "child went out into the forest and sat down by the side of the cool fountain. Naïve façade, and so on."
)
PAIRS = [
    ("Once upon a time there was a", " king who had a daughter"),
    ("Once upon a time there was a ", "king who had a daughter"),
    ("Once upon a time there was a", " of of of"),
    ("", "The fox said"),
    ("The queen", " looked into the glass"),
]


@pytest.fixture(scope="module", params=["tales", "llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    return MODEL_DIR if request.param == "tales" else tiny_checkpoint(request.param)


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, max_model_len=CONTEXT_LENGTH, num_blocks=200, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def log_softmax(model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)


def test_continuations_are_scored_as_transformers_scores_them(llm: LLM, model: transformers.PreTrainedModel) -> None:
    scores = llm.score(*zip(*PAIRS, strict=True))
    for pair, score in zip(PAIRS, scores, strict=True):
        token_ids, num_context_tokens = encode_pair(llm.tokenizer, *pair)
        rows = log_softmax(model, token_ids)[num_context_tokens - 1 : -1]
        expected = rows.gather(1, torch.tensor(token_ids[num_context_tokens:])[:, None])[:, 0].tolist()
        assert score.token_log_probs == pytest.approx(expected, abs=TOLERANCE)
        assert score.log_prob == pytest.approx(sum(expected), abs=TOLERANCE * len(expected))
        assert score.num_tokens == len(expected)
        assert score.is_greedy == (rows.argmax(dim=-1).tolist() == token_ids[num_context_tokens:])
    assert scores[0] == scores[1]


def test_what_the_model_would_say_is_greedy(llm: LLM, model: transformers.PreTrainedModel) -> None:
    token_ids = llm.tokenizer.encode(PAIRS[0][0])
    for _ in range(4):
        token_ids.append(int(log_softmax(model, token_ids)[-1].argmax()))
    ((scored,), (first, *_)) = llm._score([token_ids], False), llm.score(*zip(PAIRS[2], strict=True))
    assert [entry.top_token_ids[0] for entry in scored[-4:]] == token_ids[-4:]
    assert not first.is_greedy


@pytest.mark.parametrize("stride", [None, 20, 63, 1])
def test_perplexity_of_a_long_text(llm: LLM, model: transformers.PreTrainedModel, stride: int | None) -> None:
    """The loop of transformers' documentation, "Perplexity of fixed-length models"."""
    token_ids = llm.tokenizer.encode(TEXT)[:130]
    step = CONTEXT_LENGTH - 1 if stride is None else stride
    expected: list[float] = []
    previous_end = 1
    for begin in range(0, len(token_ids), step):
        end = min(begin + CONTEXT_LENGTH, len(token_ids))
        part = token_ids[begin:end]
        rows = log_softmax(model, part)
        targets = range(len(part) - (end - previous_end), len(part))
        expected += [rows[index - 1, part[index]].item() for index in targets]
        previous_end = end
        if end == len(token_ids):
            break
    result = llm.perplexity(token_ids, stride=stride)
    assert result.num_tokens == len(token_ids) - 1
    assert result.token_log_probs == pytest.approx(expected, abs=TOLERANCE)
    assert result.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=TOLERANCE)
    num_bytes = len(llm.tokenizer.decode(token_ids[1:]).encode())
    assert result.bits_per_byte == pytest.approx(-sum(expected) / math.log(2) / num_bytes, rel=TOLERANCE)


def test_a_text_is_encoded_first(llm: LLM) -> None:
    text = TEXT[:60]
    assert llm.perplexity(text) == llm.perplexity(llm.tokenizer.encode(text))


def test_spaces_move_and_the_whole_is_encoded_at_once(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert encode_pair(tokenizer, "a king \n ", "ruled") == encode_pair(tokenizer, "a king", " \n ruled")
    token_ids, num_context_tokens = encode_pair(tokenizer, "a ki", "ng and a queen")
    assert token_ids == tokenizer.encode("a king and a queen")
    assert num_context_tokens == len(tokenizer.encode("a ki"))


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 15, 16, 40])
def test_windows_score_each_token_once(num_tokens: int, stride: int | None) -> None:
    cut = windows(num_tokens, 8, stride)
    scored = [position for window in cut for position in range(window.end - window.num_scored, window.end)]
    assert scored == list(range(1, num_tokens))
    assert all(window.num_scored < window.end - window.start <= 8 for window in cut)


def test_what_cannot_be_scored_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidParameterError, match="at least one token of its own"):
        llm.score(["The king"], [""])
    with pytest.raises(ValueError, match="2 contexts but 1"):
        llm.score(["a", "b"], ["c"])
    with pytest.raises(AdmissionError, match="maximum context length"):
        llm.score(["fine", TEXT], [" too", " long"])
    with pytest.raises(InvalidParameterError, match="at least two tokens"):
        llm.perplexity([5])
    for stride in (0, CONTEXT_LENGTH):
        with pytest.raises(InvalidParameterError, match="stride must be from 1 to 63"):
            llm.perplexity([5, 6, 7], stride=stride)
    assert llm.stats().num_used_blocks == 0
