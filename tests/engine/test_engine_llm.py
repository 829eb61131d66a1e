from __future__ import annotations

import pytest

from quire import LLM, SamplingParams
from quire.sampling_params import InvalidParameterError
from quire.scheduler.request import AdmissionError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_model_len=256, num_blocks=200, dtype="float32", device="cpu")


def test_a_tale_is_told(llm: LLM) -> None:
    (result,) = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=40))
    assert result.prompt == "Once upon a time"
    (choice,) = result.outputs
    assert choice.finish_reason in ("length", "stop")
    assert len(choice.token_ids) <= 40
    assert choice.text == llm.tokenizer.decode(choice.token_ids)
    assert len(choice.text.split()) > 15


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    prompts = ["The king", "A poor woodcutter", "The fox said", "In a far country"]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    assert [r.prompt for r in together] == prompts
    assert [r.outputs[0].text for r in together] == [r.outputs[0].text for r in alone]


def test_choices_share_the_prompt_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=20)
    (first,), (second,) = llm.generate("There was once a", params), llm.generate("There was once a", params)
    texts = [choice.text for choice in first.outputs]
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts == [choice.text for choice in second.outputs]


def test_stop_string_ends_its_choice_alone(llm: LLM) -> None:
    prompt, greedy = "Once upon a time there was a", SamplingParams(temperature=0.0, max_tokens=30)
    text = llm.generate(prompt, greedy)[0].outputs[0].text
    word = " " + text.split()[4]
    stopping = SamplingParams(temperature=0.0, max_tokens=30, stop=(word,))
    free, stopped = llm.generate([prompt] * 2, [greedy, stopping])
    assert free.outputs[0].text == text
    assert stopped.outputs[0].text == text.split(word)[0]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == word
    assert len(stopped.outputs[0].token_ids) < len(free.outputs[0].token_ids)


def test_min_tokens_keeps_the_end_away(llm: LLM) -> None:
    (free,) = llm.generate("The end.", SamplingParams(temperature=0.0, max_tokens=5))
    ender = free.outputs[0].token_ids[1]
    params = SamplingParams(temperature=0.0, max_tokens=8, min_tokens=4, stop_token_ids=(ender,))
    (late,) = llm.generate("The end.", params)
    assert len(late.outputs[0].token_ids) >= 4
    assert ender not in late.outputs[0].token_ids[:4]


def test_what_cannot_be_done_is_said_and_nothing_stays_behind(llm: LLM) -> None:
    with pytest.raises(AdmissionError, match="maximum context length is 256 tokens"):
        llm.generate(["fine", [5] * 300])
    with pytest.raises(InvalidParameterError, match="vocabulary"):
        llm.generate([[10**6]])
    with pytest.raises(InvalidParameterError, match="at least one token"):
        llm.generate([[]])
    with pytest.raises(InvalidParameterError, match="vocabulary"):
        llm.generate("x", SamplingParams(stop_token_ids=(10**6,)))
    with pytest.raises(ValueError, match="2 prompts but 1"):
        llm.generate(["a", "b"], [SamplingParams()])
    stats = llm.stats()
    assert stats.num_running == stats.num_waiting == stats.num_used_blocks == 0
