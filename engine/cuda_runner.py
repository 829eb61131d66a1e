"""Runs the model on a GPU: steps that only decode as captured graphs, all others kernel by kernel.

A graph holds everything up to the final hidden states, of a batch size from a short list; steps are padded to the next
one. Head, argmax and sampler follow as launches of their own: a graph for each size that held logits would hold the
memory of all of them.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from quire.engine.device_inputs import HostBuffers, StaticInputs, send
from quire.engine.model_runner import ModelOutput
from quire.models.forward_batch import ForwardBatch
from quire.models.kv_cache import KVCache
from quire.models.model import Model

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
GRAPH_BYTES = 8 * 2**20
"""What one graph is taken to hold beside activations. An estimate: no GPU was there to measure it."""


class Graph(Protocol):
    """Kernels that were launched once, and where they leave what they compute."""

    @property
    def output(self) -> torch.Tensor: ...

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], torch.Tensor]], Graph]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: the last holds `max_num_seqs`, or is the largest that pays."""
    sizes = [size for size in SIZES if size < max_num_seqs]
    return [*sizes, min(max_num_seqs, SIZES[-1])] if not sizes or sizes[-1] != SIZES[-1] else sizes


def is_replayable(inputs: ForwardBatch) -> bool:
    """Whether a graph can hold a step: it only decodes, every row's logits are wanted, in order, and no group of rows
    is attended to as one."""
    num_seqs = len(inputs.seq_lens)
    wanted = inputs.logits_indices
    wants_all = wanted is None or len(wanted) == num_seqs
    return inputs.num_decodes == num_seqs and wants_all and inputs.prefix_groups is None


class CudaGraphs:
    """Captures graphs that share one pool of memory: they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], torch.Tensor]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = work()
        return CapturedGraph(graph, output)


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    def replay(self) -> None:
        self.graph.replay()


class CudaRunner:
    """Graphs are captured lazily: the first step of a size runs kernel by kernel, which also compiles what it needs,
    the second is captured and replayed. So a server is ready without them, and pays for sizes that it meets.

    Args:
        max_num_blocks: of a sequence.
        capture: None if every step is to run kernel by kernel.
    """

    def __init__(
        self,
        model: Model,
        kv_caches: list[KVCache],
        device: torch.device,
        *,
        max_num_seqs: int,
        max_num_blocks: int,
        capture: Capture | None,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._device = device
        self._capture = capture
        self._buffers = HostBuffers(device)
        self._sizes = graph_sizes(max_num_seqs)
        self._static: StaticInputs | None = None
        if capture is not None:
            self._static = StaticInputs(self._sizes[-1], max_num_blocks, self._buffers, device)
        self._seen: set[int] = set()
        self._graphs: dict[int, Graph] = {}

    def place(self, inputs: ForwardBatch) -> ForwardBatch:
        """Send a step's inputs to the device; those that a graph can hold are padded, and at their fixed place."""
        num_seqs = len(inputs.seq_lens)
        if self._static is None or num_seqs > self._sizes[-1] or not is_replayable(inputs):
            return send(inputs, self._buffers, self._device)
        return self._static.fill(inputs, self._sizes[bisect_left(self._sizes, num_seqs)])

    def run(self, inputs: ForwardBatch, num_sampled: int) -> ModelOutput:
        """Compute a step.

        Args:
            inputs: what `place` has returned last.
        """
        if self._static is not None and self._static.holds(inputs):
            hidden = self._decode(self._static, inputs.num_decodes)[:num_sampled]
        else:
            hidden = self._model.forward(inputs, self._kv_caches)
        return ModelOutput(self._model.logits(hidden[:num_sampled]), None, hidden[num_sampled:])

    def _decode(self, static: StaticInputs, size: int) -> torch.Tensor:
        """Final hidden states of a padded step, [size, hidden_size]."""

        def forward() -> torch.Tensor:
            return self._model.forward(static.batch(size), self._kv_caches)

        graph = self._graphs.get(size)
        if graph is None and size in self._seen and self._capture is not None:
            try:
                graph = self._graphs[size] = self._capture(forward)
                log.info("Decodes of up to %d sequences are captured as a graph.", size)
            except torch.OutOfMemoryError:
                self._capture = None
                log.warning("No memory is left for more graphs: other decodes run kernel by kernel (--enforce-eager).")
        if graph is None:
            self._seen.add(size)
            return forward()
        graph.replay()
        return graph.output
