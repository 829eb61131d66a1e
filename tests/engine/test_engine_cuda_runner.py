"""What is captured and replayed, and on which inputs: on a CPU, with graphs that call the same function again.

No GPU runs here: that kernels can be captured and replayed at all is shown by none of these tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.cuda_runner import SIZES, CudaGraphs, CudaRunner, graph_sizes, is_replayable
from quire.engine.device_inputs import HostBuffers, StaticInputs, send
from quire.engine.device_queue import CudaQueue
from quire.engine.inputs import InputBuilder
from quire.engine.last_tokens import LastTokens
from quire.engine.memory import graph_bytes
from quire.engine.prompt_log_probs import PromptLogProbs
from quire.engine.step_executor import StepExecutor
from quire.kernels.cascade_decode import PrefixGroups
from quire.models.config import ModelConfig
from quire.models.forward_batch import ForwardBatch
from quire.tales import MODEL_DIR

CPU = torch.device("cpu")


@dataclass
class FakeGraph:
    """Like a graph it computes where it was captured: from the same inputs, to the same output."""

    work: Callable[[], torch.Tensor]
    output: torch.Tensor
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.output.copy_(self.work())


@dataclass
class FakeGraphs:
    captured: list[FakeGraph] = field(default_factory=list)

    def capture(self, work: Callable[[], torch.Tensor]) -> FakeGraph:
        """A capture computes nothing: what is left behind is there only after a replay."""
        graph = FakeGraph(work, torch.full_like(work(), torch.nan))
        self.captured.append(graph)
        return graph

    @property
    def sizes(self) -> list[int]:
        return [len(graph.output) for graph in self.captured]


def decodes(num_seqs: int, num_columns: int = 3, **fields: Any) -> ForwardBatch:
    values: dict[str, Any] = {
        "token_ids": torch.arange(num_seqs) + 10,
        "positions": torch.arange(num_seqs) + 20,
        "slot_mapping": torch.arange(num_seqs) + 30,
        "block_tables": torch.arange(num_seqs * num_columns, dtype=torch.int32).view(num_seqs, num_columns) + 1,
        "seq_lens": torch.arange(num_seqs, dtype=torch.int32) + 21,
        "prefill_start": torch.zeros(1, dtype=torch.int32),
        "logits_indices": torch.arange(num_seqs),
        "num_decodes": num_seqs,
        "max_query_len": 0,
        "max_seq_len": 24,
    }
    return ForwardBatch(**(values | fields))


def test_sizes_cover_all_batches_that_pay() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(256)[-1] == 256
    assert graph_sizes(SIZES[-1]) == graph_sizes(4096) == list(SIZES)


def test_only_steps_that_decode_and_want_every_row_are_replayable() -> None:
    assert is_replayable(decodes(3))
    assert is_replayable(decodes(3, logits_indices=None))
    assert not is_replayable(decodes(3, logits_indices=torch.arange(2)))
    assert not is_replayable(decodes(3, num_decodes=2))
    assert not is_replayable(decodes(3, prefix_groups=PrefixGroups(*[torch.zeros(3, dtype=torch.int32)] * 4)))


def test_inputs_are_sent_as_they_are() -> None:
    buffers = HostBuffers(CPU)
    for num_seqs in (3, 40, 1, 7):
        inputs = decodes(num_seqs, num_columns=num_seqs)
        sent = send(inputs, buffers, CPU)
        for name in ForwardBatch.__slots__:
            one, other = getattr(sent, name), getattr(inputs, name)
            if isinstance(other, torch.Tensor):
                assert one.dtype == other.dtype
                assert torch.equal(one, other), name
                assert one.data_ptr() % 16 == 0
                assert one.data_ptr() != other.data_ptr()
            else:
                assert one == other


def test_what_is_in_flight_is_not_overwritten() -> None:
    buffers = HostBuffers(CPU)
    first, second = buffers.take(100), buffers.take(100)
    first.fill_(1)
    second.fill_(2)
    assert first.unique().tolist() == [1]
    assert buffers.take(50).data_ptr() == first.data_ptr()


def test_padding_has_no_tokens_and_writes_to_the_null_block() -> None:
    static = StaticInputs(8, 5, HostBuffers(CPU), CPU)
    places = {name: getattr(static.batch(8), name).data_ptr() for name in ("token_ids", "block_tables", "seq_lens")}
    static.fill(decodes(8, num_columns=5), 8)
    filled = static.fill(decodes(3), 4)
    for name, expected in (
        ("token_ids", [10, 11, 12, 0]),
        ("positions", [20, 21, 22, 0]),
        ("slot_mapping", [30, 31, 32, 0]),
        ("seq_lens", [21, 22, 23, 0]),
    ):
        assert getattr(filled, name).tolist() == expected
    assert filled.block_tables[:, :3].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert {name: getattr(filled, name).data_ptr() for name in places} == places
    assert filled.block_tables.stride() == static.batch(8).block_tables.stride() == (5, 1)


class CountingModel:
    """Hidden states that tell what they were computed from; NaN in rows of padding."""

    def __init__(self) -> None:
        self.num_calls = 0

    def forward(self, batch: ForwardBatch, kv_caches: list[Any]) -> torch.Tensor:
        self.num_calls += 1
        numbers = batch.token_ids * 1000 + batch.positions * 10 + batch.block_tables[:, 0]
        return torch.where(batch.seq_lens > 0, numbers.float(), torch.nan)[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.repeat(1, 2)


def make_runner(graphs: FakeGraphs | None, max_num_seqs: int = 8) -> tuple[CudaRunner, CountingModel]:
    model = CountingModel()
    capture = None if graphs is None else graphs.capture
    runner = CudaRunner(
        model,  # type: ignore[arg-type]
        [],
        CPU,
        max_num_seqs=max_num_seqs,
        max_num_blocks=5,
        capture=capture,
    )
    return runner, model


def logits_of(runner: CudaRunner, inputs: ForwardBatch) -> list[float]:
    output = runner.run(runner.place(inputs), len(inputs.seq_lens))
    assert len(output.scored) == 0
    return output.logits[:, 0].tolist()


def expected_logits(inputs: ForwardBatch) -> list[float]:
    return (inputs.token_ids * 1000 + inputs.positions * 10 + inputs.block_tables[:, 0]).tolist()


def test_a_size_is_captured_when_it_comes_again_and_then_replayed() -> None:
    graphs = FakeGraphs()
    runner, _ = make_runner(graphs)
    for num_seqs in (3, 3, 4, 3, 7):
        inputs = decodes(num_seqs)
        assert logits_of(runner, inputs) == expected_logits(inputs)
    assert graphs.sizes == [4]
    assert [graph.num_replays for graph in graphs.captured] == [3]
    logits_of(runner, decodes(5))
    assert graphs.sizes == [4, 8]


def test_a_graph_that_does_not_fit_is_the_last_one() -> None:
    graphs = FakeGraphs()
    capture, graphs.capture = graphs.capture, lambda work: refuse()  # type: ignore[method-assign]
    runner, _ = make_runner(graphs)

    def refuse() -> FakeGraph:
        graphs.capture = capture  # type: ignore[method-assign]
        raise torch.OutOfMemoryError

    for num_seqs in (3, 3, 3, 7, 7, 7):
        inputs = decodes(num_seqs)
        assert logits_of(runner, inputs) == expected_logits(inputs)
    assert graphs.sizes == []


def test_other_steps_and_larger_batches_run_kernel_by_kernel() -> None:
    graphs = FakeGraphs()
    runner, _ = make_runner(graphs, max_num_seqs=600)
    for inputs in [decodes(3, num_decodes=2), decodes(SIZES[-1] + 1)] * 3:
        assert logits_of(runner, inputs) == expected_logits(inputs)
    assert graphs.sizes == []


def test_without_graphs_everything_runs_kernel_by_kernel() -> None:
    runner, model = make_runner(None)
    for _ in range(3):
        assert logits_of(runner, decodes(3)) == expected_logits(decodes(3))
    assert model.num_calls == 3


def test_capture_is_done_in_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    @contextmanager
    def capturing(graph: Graph, pool: object) -> Any:
        events.append(("begin", pool))
        yield
        events.append("end")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    graphs = CudaGraphs()
    for number in (1, 2):
        graph = graphs.capture(lambda number=number: (events.append("work"), torch.tensor([number]))[1])
        graph.replay()
        assert graph.output.tolist() == [number]
    assert events == [("begin", "pool"), "work", "end", "replay"] * 2


def test_results_come_with_one_event_behind_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    empty = torch.empty

    class Event:
        def record(self) -> None:
            events.append("record")

        def synchronize(self) -> None:
            events.append("synchronize")

    def pinned(*args: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        assert pin_memory
        events.append("copy")
        return empty(*args, **options)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", pinned)
    pending = CudaQueue().run(lambda: [torch.tensor([5, 6])])
    assert events == ["copy", "record"]
    assert pending.wait()[0].tolist() == [5, 6]
    assert events == ["copy", "record", "synchronize"]


def test_an_engine_on_graphs_says_what_it_says_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole loop, scheduling ahead: graphs, padding, and tokens that never leave the device."""
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 128, "num_blocks": 200}
    options |= {"block_size": 8, "num_threads": 1, "max_num_seqs": 12}
    plain, graphed = LLM(**options), LLM(**options, async_scheduling=True)
    engine, graphs = graphed._engine, FakeGraphs()
    info = engine.info
    inputs = InputBuilder(info.max_num_batched_tokens, info.max_num_seqs, info.max_model_len, info.block_size, CPU)
    inputs.memory = None
    runner = CudaRunner(
        UnpaddedAttention(engine._model),  # type: ignore[arg-type]
        engine._kv.layers,
        CPU,
        max_num_seqs=info.max_num_seqs,
        max_num_blocks=-(-info.max_model_len // info.block_size),
        capture=graphs.capture,
    )
    engine._executor = StepExecutor(
        inputs,
        engine._kv,
        runner,
        engine._sampler,
        PromptLogProbs(engine._kv.log_probs, info.max_num_seqs, info.vocab_size, engine._model.logits),
        KeepingQueue(),
        LastTokens(info.max_num_seqs, CPU),
    )
    rng = random.Random(4)
    texts = [rng.choice(("Once upon a time", "The king", "In a far country there was")) for _ in range(40)]
    params = [
        SamplingParams(max_tokens=rng.randrange(4, 30), temperature=rng.choice((0.0, 0.9)), seed=index)
        for index in range(40)
    ]
    expected, found = plain.generate(texts, params), graphed.generate(texts, params)
    assert [each.outputs[0].token_ids for each in found] == [each.outputs[0].token_ids for each in expected]
    assert len(graphs.captured) >= 4
    assert sum(graph.num_replays for graph in graphs.captured) > 30


class KeepingQueue:
    def run(self, work: Callable[[], list[torch.Tensor]]) -> Any:
        tensors = [tensor.clone() for tensor in work()]
        return SimpleNamespace(wait=lambda: tensors)


class UnpaddedAttention:
    """The CPU's decode attention has no rows of length 0: they are left out, and have NaN for hidden states."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.logits = model.logits

    def forward(self, batch: ForwardBatch, kv_caches: list[Any]) -> torch.Tensor:
        if batch.logits_indices is not None:
            return self._model.forward(batch, kv_caches)
        num_seqs = int((batch.seq_lens > 0).sum())
        names = ("token_ids", "positions", "slot_mapping", "block_tables", "seq_lens")
        parts = {name: getattr(batch, name)[:num_seqs].clone() for name in names}
        hidden = self._model.forward(decodes(num_seqs, **parts, logits_indices=None), kv_caches)
        padding = torch.full((len(batch.seq_lens) - num_seqs, hidden.shape[1]), torch.nan)
        return torch.cat([hidden, padding])


def test_graphs_have_a_line_in_the_memory_budget() -> None:
    config = ModelConfig.from_hf(MODEL_DIR)
    assert graph_bytes(config, torch.bfloat16, 256) > graph_bytes(config, torch.bfloat16, 16) > 0
    assert EngineConfig(model="").enforce_eager is False
