"""Floors, against sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from measuring.floors import MachineRates, ModelCost, ideal_run
from measuring.loads import LoadRequest
from measuring.summary import summarize

from quire.models.safetensors_file import read_entries

COST = ModelCost(
    weight_bytes=1000,
    linear_weights=400,
    head_weights=100,
    kv_bytes_per_token=10,
    query_size=8,
    layer_windows=(None, None),
)
READING = MachineRates(read_bytes_per_s=1000.0, operations_per_s=math.inf)
COMPUTING = MachineRates(read_bytes_per_s=math.inf, operations_per_s=1000.0)


def test_a_decode_step_reads_the_weights_and_what_is_cached() -> None:
    work = COST.step([(5, 1), (7, 1)], 2)
    assert work.num_bytes == 1000 + 2 * 10 * (5 + 7)
    assert work.num_operations == 2 * 400 * 2 + 2 * 100 * 2 + 4 * 8 * 2 * (6 + 8)
    assert work.seconds(READING) == pytest.approx(1.24)


def test_a_prompt_computes_all_of_its_tokens_and_reads_none_of_its_own() -> None:
    work = COST.step([(0, 4)], 1)
    assert work.num_bytes == 1000
    assert work.num_operations == 2 * 400 * 4 + 2 * 100 + 4 * 8 * 2 * (1 + 2 + 3 + 4)


def test_a_window_bounds_what_is_read_and_seen() -> None:
    windowed = ModelCost(1000, 400, 100, 10, 8, (3, None))
    work = windowed.step([(5, 2)], 1)
    assert work.num_bytes == 1000 + 10 * (3 + 5)
    assert work.num_operations == 2 * 400 * 2 + 2 * 100 + 4 * 8 * ((3 + 3) + (6 + 7))


def test_an_ideal_run_keeps_so_many_in_flight() -> None:
    requests = [LoadRequest([1] * 4, 3) for _ in range(4)]
    cost = ModelCost(1000, 0, 0, 0, 0, (None,))  # each step takes a second
    records, wall = ideal_run(requests, 2, cost, READING)
    assert wall == pytest.approx(6.0)
    assert [record.sent for record in records] == pytest.approx([0, 0, 3, 3])
    assert records[2].pieces == pytest.approx([4, 5, 6])
    assert summarize(records, wall).output_tokens_per_s == pytest.approx(2.0)


def test_an_ideal_run_waits_for_arrivals() -> None:
    requests = [LoadRequest([1], 1, arrival=0.0), LoadRequest([1], 2, arrival=10.0)]
    records, wall = ideal_run(requests, None, ModelCost(1000, 0, 0, 0, 0, (None,)), READING)
    assert wall == pytest.approx(12.0)
    assert records[1].sent == 10.0
    assert records[1].pieces == pytest.approx([11, 12])


def test_a_shared_prefix_is_computed_once() -> None:
    requests = [LoadRequest([1] * 10, 1, prefix_len=8) for _ in range(2)]
    only_linear = ModelCost(0, 500, 0, 0, 0, (None,))  # a second for each token
    assert ideal_run(requests, 2, only_linear, COMPUTING)[1] == pytest.approx(10 + 2)


@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_those_of_the_checkpoint(tiny_checkpoint, tied: bool) -> None:  # type: ignore[no-untyped-def]
    directory: Path = tiny_checkpoint("llama", tie_word_embeddings=tied)
    config = json.loads((directory / "config.json").read_text())
    entries = read_entries(directory / "model.safetensors")
    total = sum(math.prod(entry.shape) for entry in entries.values())
    embedding = config["vocab_size"] * config["hidden_size"]
    cost = ModelCost.of(directory, item_bytes=2)
    assert cost.head_weights == embedding
    assert cost.weight_bytes == 2 * (total if tied else total - embedding)
    vectors = sum(entry.shape[0] for entry in entries.values() if len(entry.shape) == 1)
    assert cost.linear_weights == total - vectors - embedding * (1 if tied else 2)
    assert ModelCost.of(directory, item_bytes=4).weight_bytes == 2 * cost.weight_bytes
    narrow = ModelCost.of(tiny_checkpoint("llama", tie_word_embeddings=tied, dtype="bfloat16"), item_bytes=4)
    assert narrow.weight_bytes == cost.weight_bytes + 2 * vectors
    assert narrow.kv_bytes_per_token == 2 * cost.kv_bytes_per_token
    for quantization, bytes_per_weight in (("int8", 1), ("int4", 0.5 + 2 / 128)):
        quantized = ModelCost.of(directory, item_bytes=2, quantization=quantization)
        expected = cost.linear_weights * bytes_per_weight + embedding + 2 * vectors
        assert quantized.weight_bytes == pytest.approx(expected, abs=1)
        assert quantized.linear_weights == cost.linear_weights
