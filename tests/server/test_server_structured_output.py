"""Structured output over HTTP: every name of it, every bound, and compilers that hang, with a fake engine; then answers
of the real one, which fit what was asked."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from quire.grammar import Grammar
from quire.tales import MODEL_DIR
from tests.engine.grammar_catastrophes import REGEXES
from tests.engine.test_engine_grammar_compiler import FAKE_CHILD
from tests.server.structured_output_cases import AT_THE_LIMIT, BAD, GOOD, NOT_COMPILED
from tests.server.test_server_bad_inputs import check, slowest_health
from tests.server.test_server_engine import Quire, all_gone, text_of_stream

PLANTED_CHILD = (sys.executable, "-c", FAKE_CHILD, "honest")
"""Takes every grammar, and hangs at the regex "hang"."""
COMPILE_SECONDS = 2.0
SLACK_SECONDS = 3.0
"""For a machine that does much else, and for a new child to start."""


@pytest.fixture(scope="module")
def lenient(ending: list[Any]) -> Iterator[Any]:
    """A server whose compiler takes every grammar at once."""
    from quire.server.settings import ServerSettings
    from tests.server.conftest import FakeClient, RunningServer

    server = RunningServer(FakeClient(), ServerSettings(served_model_names=("fake",)), command=PLANTED_CHILD)
    yield server
    server.begin_close()
    ending.append(server)


@pytest.mark.parametrize("case", GOOD)
def test_every_name_becomes_one_grammar(lenient: Any, case: str) -> None:
    fields, kind, text = GOOD[case]
    response = lenient.complete(**fields, return_effective_params=True)
    assert response.status_code == 200, response.text
    assert "x-quire-ignored" not in response.headers
    assert lenient.client.calls[-1]["params"].grammar == Grammar(kind, text)  # type: ignore[arg-type]
    assert response.json()["effective_params"]["grammar"] == {"kind": kind, "text": text}


def test_without_a_constraint_there_is_no_grammar(lenient: Any) -> None:
    shown = lenient.complete(response_format={"type": "text"}, return_effective_params=True).json()["effective_params"]
    assert shown["grammar"] is None
    assert lenient.client.calls[-1]["params"].grammar is None


@pytest.mark.parametrize("case", AT_THE_LIMIT)
def test_the_limit_itself_is_served(lenient: Any, case: str) -> None:
    assert lenient.complete(**AT_THE_LIMIT[case]).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_fields(lenient: Any, case: str, stream: bool) -> None:
    fields, code, param = BAD[case]
    begin = time.monotonic()
    response = lenient.complete(**fields, stream=stream)
    assert check(response, 400, code, time.monotonic() - begin)["param"] == param


@pytest.mark.parametrize("case", NOT_COMPILED)
def test_what_only_the_compiler_can_tell(shared: Any, case: str) -> None:
    fields, code, param = NOT_COMPILED[case]
    assert check(shared.complete(**fields), 400, code, 0)["param"] == param


def test_what_is_known_and_changes_nothing_is_reported(lenient: Any) -> None:
    body = {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "description": "b", "schema": {}},
            "c": 1,
        },
        "guided_decoding_backend": "outlines",
    }
    response = lenient.complete(**body)
    assert response.status_code == 200
    assert response.headers["x-quire-ignored"] == (
        "guided_decoding_backend,response_format.c,response_format.json_schema.description"
    )
    response = lenient.complete(structured_outputs={"regex": "a", "disable_fallback": True})
    assert response.headers["x-quire-ignored"] == "structured_outputs.disable_fallback"


def test_nothing_is_compiled_or_tokenized_for_what_is_refused_anyway(serve: Any) -> None:
    server = serve()
    for body in ({"n": 129}, {"prompt": "x" * 4097}, {"json_schema": {}}):
        assert server.complete(regex="a", **body).status_code == 400
    assert not server.compiler._verdicts
    assert server.complete(regex="(a").status_code == 400
    assert server.client.tokenizer.num_encoded == 0


def test_schemas_are_neither_echoed_nor_logged(shared: Any, caplog: pytest.LogCaptureFixture) -> None:
    secret = "jabberwock"
    bodies: list[dict[str, Any]] = [
        {"guided_json": {secret: secret, "type": secret}},
        {"guided_json": secret},
        {"guided_regex": f"({secret}"},
        {"guided_grammar": f"start: {secret}"},
        {"response_format": {"type": secret}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": secret}}}},
    ]
    for body in bodies:
        response = shared.complete(**body)
        assert response.status_code == 400
        assert secret not in response.text + str(response.headers) + caplog.text


@pytest.mark.parametrize("name", REGEXES)
def test_a_catastrophic_regex_takes_no_one_down(shared: Any, name: str) -> None:
    """Refused or not, within the deadline; health does not notice, and the next grammar compiles."""
    shared.complete(regex="warm")

    def send() -> None:
        begin = time.monotonic()
        response = shared.complete(regex=REGEXES[name])
        assert time.monotonic() - begin < COMPILE_SECONDS + SLACK_SECONDS
        if response.status_code != 200:
            assert response.status_code == 400
            assert response.json()["error"]["code"] in ("grammar_too_complex", "grammar_timeout", "invalid_grammar")
            assert response.json()["error"]["param"] == "regex"

    hiccup = slowest_health(shared, lambda: time.sleep(0.2))
    assert slowest_health(shared, send) < 0.25 + 2 * hiccup
    assert shared.complete(regex=f"next|{name}").status_code == 200


def test_a_compiler_that_hangs_is_killed(serve: Any) -> None:
    server = serve(grammar={"command": PLANTED_CHILD})
    assert server.complete(regex="warm").status_code == 200

    def send() -> None:
        begin = time.monotonic()
        answers: list[Any] = []
        others = [
            threading.Thread(target=lambda: answers.append(server.complete(guided_regex="hang"))) for _ in range(4)
        ]
        for other in others:
            other.start()
        error = check(server.complete(regex="hang"), 400, "grammar_timeout", 0)
        assert error["param"] == "regex"
        for other in others:
            other.join()
        assert COMPILE_SECONDS * 0.9 < time.monotonic() - begin < COMPILE_SECONDS + SLACK_SECONDS
        assert {answer.json()["error"]["param"] for answer in answers} == {"guided_regex"}
        assert server.complete(regex="fine").status_code == 200

    hiccup = slowest_health(server, lambda: time.sleep(0.2))
    assert slowest_health(server, send) < 0.25 + 2 * hiccup
    assert server.context.admission.num_open == 0


@pytest.mark.parametrize("command", [("/nowhere",), (sys.executable, "-c", FAKE_CHILD, "unusable")])
def test_without_a_compiler_the_client_may_try_again(serve: Any, command: tuple[str, ...]) -> None:
    server = serve(grammar={"command": command})
    response = server.complete(regex="a")
    assert check(response, 503, "structured_output_unavailable", 0)["param"] == "regex"
    assert response.headers["retry-after"] == "5"
    assert server.complete().status_code == 200


def test_openai_sdk_asks_for_a_schema(lenient: Any) -> None:
    schema = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "string"}}}
    extra = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}}
    with openai.OpenAI(base_url=lenient.url + "/v1", api_key="none", max_retries=0) as client:
        client.completions.create(model="fake", prompt="x", max_tokens=2, extra_body=extra)
        grammar = lenient.client.calls[-1]["params"].grammar
        assert json.loads(grammar.text) == schema
        assert list(json.loads(grammar.text)["properties"]) == ["z", "a"]
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="fake", prompt="x", extra_body={"guided_json": {"$ref": "x"}})
        assert (caught.value.code, caught.value.param) == ("invalid_grammar", "guided_json")


needs_weights = pytest.mark.skipif(
    not (MODEL_DIR / "model.safetensors").is_file(), reason="the bundled model's weights are not here"
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "animals": {"type": "array", "items": {"enum": ["fox", "wolf", "hare"]}, "maxItems": 3},
    },
    "required": ["name", "age", "animals"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tales() -> Iterator[Quire]:
    """The bundled model; at the end no child of the server is left."""
    server = Quire("--max-num-seqs", "8", "--drain-grace", "0.2")
    try:
        server.complete(max_tokens=1, regex="a")
        children = server.children
        assert len(children) >= 2
        yield server
        children += server.children
        code, log = server.end(signal.SIGTERM)
        assert (code, "Traceback" in log) == (0, False), log
        assert all_gone(children, 0)
    finally:
        server.kill()


@needs_weights
@pytest.mark.parametrize("seed", range(4))
def test_answers_fit_the_schema(tales: Quire, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    body = {"response_format": form, "max_tokens": 300, "temperature": 1.0, "seed": seed}
    choice = tales.complete(**body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    person = json.loads(choice["text"])
    jsonschema.validate(person, PERSON)
    assert list(person) == list(PERSON["properties"]), "the order of the schema"  # type: ignore[call-overload]
    assert text_of_stream(tales.complete(**body, stream=True)) == choice["text"]


@needs_weights
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-f]{3,9}[0-9]"}, "[a-f]{3,9}[0-9]"),
        ({"guided_choice": ["a fox", "a wolf", "a hare"]}, "a fox|a wolf|a hare"),
        ({"grammar": 'root ::= "the " ("king" | "queen") "."'}, r"the (king|queen)\."),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]{2}/'}}, "x[0-9]{2}"),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_answers_match_other_grammars(tales: Quire, fields: dict[str, Any], pattern: str, n: int) -> None:
    choices = tales.complete(**fields, n=n, max_tokens=64, seed=1).json()["choices"]
    assert len(choices) == n
    for choice in choices:
        assert re.fullmatch(pattern, choice["text"])
        assert choice["finish_reason"] == "stop"


@needs_weights
def test_any_json_object(tales: Quire) -> None:
    with openai.OpenAI(base_url=tales.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="tales",
            prompt='{"name": ',
            max_tokens=400,
            seed=3,
            extra_body={"response_format": {"type": "json_object"}},
        ).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)
    else:
        assert answer.text.lstrip().startswith("{")


@needs_weights
def test_constrained_and_free_requests_share_a_step(tales: Quire) -> None:
    """What is free says the same beside neighbours with a grammar."""
    body: dict[str, Any] = {"max_tokens": 32, "temperature": 0, "ignore_eos": True}
    alone = tales.complete(**body).json()["choices"][0]["text"]
    answers: list[str] = []
    fitting = {"guided_json": PERSON, "max_tokens": 300, "n": 4, "seed": 5}
    neighbours = threading.Thread(
        target=lambda: answers.extend(each["text"] for each in tales.complete(**fitting).json()["choices"])
    )
    neighbours.start()
    try:
        assert tales.complete(**body).json()["choices"][0]["text"] == alone
    finally:
        neighbours.join()
    assert len(answers) == 4
    for answer in answers:
        jsonschema.validate(json.loads(answer), PERSON)
