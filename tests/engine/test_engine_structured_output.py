"""Grammars through the whole engine: in one batch with everything else, over forks, preemption and drafts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from quire.engine.llm import LLM, RequestOutput
from quire.grammar import Grammar
from quire.sampling_params import SamplingParams
from quire.scheduler.request import AdmissionError
from tests.engine.grammar_schemas import SCHEMAS

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
PROMPT = "Once upon a time"
ITEMS = Grammar("json_schema", json.dumps({"type": "array", "items": {"enum": ["fox", "king", 3]}, "maxItems": 6}))
WORD = Grammar("regex", "[a-z]{3,12}( [a-z]{3,12}){2}")

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", num_blocks=2048, max_num_seqs=64)


def closing_bias(llm: LLM) -> dict[int, float]:
    """A model that knows no JSON writes numbers, strings and lists without end; this makes it long for one."""
    bias = {
        token_id: -8.0
        for token_id in range(llm.info.vocab_size)
        if (text := llm.tokenizer.decode([token_id])) and (text.isspace() or text.isdigit() or text in ("e", "E"))
    }
    bias |= {llm.tokenizer.encode(each, add_special_tokens=False)[-1]: 12.0 for each in ('"', "}", "]")}
    return bias | dict.fromkeys(llm.info.eos_token_ids, 16.0)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [choice.text for output in outputs for choice in output.outputs]


def test_a_hundred_schemas_in_one_batch(llm: LLM) -> None:
    bias = closing_bias(llm)
    params = [
        SamplingParams(grammar=Grammar("json_schema", json.dumps(schema)), max_tokens=200, logit_bias=bias, seed=index)
        for index, schema in enumerate(SCHEMAS.values())
    ]
    outputs = llm.generate([PROMPT] * len(params), params)
    num_ended = 0
    for (name, schema), output in zip(SCHEMAS.items(), outputs, strict=True):
        choice = output.outputs[0]
        if choice.finish_reason == "stop":
            num_ended += 1
            jsonschema.validate(
                json.loads(choice.text), schema, cls=jsonschema.Draft202012Validator, format_checker=FORMATS
            )
        else:
            assert choice.finish_reason == "length", name
    assert len(SCHEMAS) == 100
    assert num_ended >= 85


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choices_drafts_and_neighbours_change_nothing(llm: LLM, temperature: float) -> None:
    def params(**fields: Any) -> list[SamplingParams]:
        common: dict[str, Any] = {"temperature": temperature, "max_tokens": 60, "seed": 5, "n": 3}
        common["logit_bias"] = closing_bias(llm)
        return [SamplingParams(grammar=grammar, **(common | fields)) for grammar in (ITEMS, WORD)]

    together = texts(llm.generate([PROMPT] * 2, params()))
    for text in together[:3]:
        assert set(json.loads(text)) <= {"fox", "king", 3}
    for text in together[3:]:
        assert re.fullmatch(WORD.text, text)
    alone = [texts(llm.generate([PROMPT], [each])) for each in params()]
    assert alone == [together[:3], together[3:]]
    assert texts(llm.generate([PROMPT] * 2, params(num_speculative_tokens=4))) == together


def test_preemption_changes_nothing() -> None:
    params = SamplingParams(grammar=WORD, max_tokens=60, seed=5)
    prompts = [PROMPT + " there was a king"[: 3 * index] for index in range(6)]
    roomy = LLM(dtype="float32", num_blocks=512, max_num_seqs=8)
    crowded = LLM(dtype="float32", num_blocks=10, block_size=8, max_num_seqs=8)
    assert texts(crowded.generate(prompts, params)) == texts(roomy.generate(prompts, params))
    assert crowded.stats().num_preemptions > 0


@pytest.mark.parametrize("width", [1, 2, 4])
def test_beams_follow_the_grammar(llm: LLM, width: int) -> None:
    """A text may be there twice, in other tokens."""
    words = ["there was a fox", "there lived a king", "the wolf", "a girl"]
    grammar = Grammar("choice", json.dumps(words))
    params = SamplingParams(
        grammar=grammar, use_beam_search=True, n=width, max_tokens=30, length_penalty=0.0, early_stopping="never"
    )
    (output,) = llm.generate([PROMPT + ","], params)
    assert {choice.text for choice in output.outputs} <= set(words)
    assert {choice.finish_reason for choice in output.outputs} == {"stop"}
    ranks = [choice.cumulative_logprob for choice in output.outputs]
    assert ranks == sorted(ranks, key=lambda rank: -(rank or 0.0))


def test_a_grammar_ends_an_output_that_would_go_on(llm: LLM) -> None:
    grammar = Grammar("choice", json.dumps(["yes", "no"]))
    params = SamplingParams(grammar=grammar, ignore_eos=True, min_tokens=9, max_tokens=20)
    (choice,) = llm.generate([PROMPT], params)[0].outputs
    assert choice.text in ("yes", "no")
    assert choice.finish_reason == "stop"


def test_nothing_that_fits_ends_its_own_request_only(llm: LLM) -> None:
    """The grammar wants a letter, and all letters are forbidden by the request itself."""
    first_tokens = [t for t in range(llm.info.vocab_size) if llm.tokenizer.decode([t])[:1] in ("x", "y")]
    impossible = SamplingParams(grammar=Grammar("regex", "[xy]+"), allowed_token_ids=(first_tokens[0] - 1,))
    outputs = llm.generate([PROMPT] * 2, [impossible, SamplingParams(temperature=0.0, max_tokens=8)])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[0].outputs[0].token_ids == []
    assert outputs[1].outputs[0].finish_reason in ("length", "stop")
    assert outputs[1].outputs[0].token_ids


def test_a_grammar_that_is_none_is_refused(llm: LLM) -> None:
    with pytest.raises(AdmissionError) as raised:
        llm.generate([PROMPT], SamplingParams(grammar=Grammar("regex", "(")))
    assert (raised.value.code, raised.value.param) == ("invalid_grammar", "grammar")
    assert texts(llm.generate([PROMPT], SamplingParams(max_tokens=2)))


def test_a_model_without_an_end_of_sequence_has_no_grammars(tiny_checkpoint: TinyCheckpoint) -> None:
    endless = LLM(tiny_checkpoint("llama", eos_token_id=None), num_blocks=64)
    with pytest.raises(AdmissionError) as raised:
        endless.generate([PROMPT], SamplingParams(grammar=ITEMS))
    assert raised.value.code == "structured_output_unavailable"
