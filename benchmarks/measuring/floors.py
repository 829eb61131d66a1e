"""How fast a load could be at most: what a model must read and compute, at the measured speed of the machine.

A step reads all weights but the rows of an embedding that is only looked up, and the keys and values of every token
that its sequences had before it; it does two operations for each weight of its linear layers and each token, two for
each weight of the head and each sampled row, and four for each query head, dimension and visible token. It takes

    max(bytes / read bandwidth, operations / rate of matrix products)

and nothing else costs anything: no activations, no scheduling, no HTTP. `ideal_run` runs a load in such steps: every
request that has arrived, or has a seat, joins the next step with its whole prompt; a shared prefix is computed once. No
rate can be better than those of this schedule, and the latencies beside them are its own. A model that the processor's
cache holds may beat it: the bandwidth is that of memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring.loads import LoadRequest
from measuring.summary import Record
from quire.config import ConfigError
from quire.models.config import ModelConfig
from quire.models.safetensors_file import TensorEntry, read_entries

QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5 + 2 / 128}
"""Of a weight of a linear layer, with its part of a group's scale; those of whole rows are not worth counting."""
LOOKED_UP = ("embed_tokens.weight", "wte.weight", "wpe.weight")
"""Embeddings, of which a step reads one row a token; a tied one is the head as well."""


@dataclass(frozen=True, slots=True)
class MachineRates:
    """The best that was measured here, with the threads of the engine."""

    read_bytes_per_s: float
    operations_per_s: float
    """Multiplications and additions of a matrix product in the model's dtype."""


@dataclass(frozen=True, slots=True)
class StepWork:
    num_bytes: float
    num_operations: float

    def seconds(self, rates: MachineRates) -> float:
        return max(self.num_bytes / rates.read_bytes_per_s, self.num_operations / rates.operations_per_s)


@dataclass(frozen=True, slots=True)
class ModelCost:
    weight_bytes: int
    """What every step reads."""
    linear_weights: int
    """Elements of the linear layers, without the head."""
    head_weights: int
    kv_bytes_per_token: int
    """Keys and values of one token in one layer."""
    query_size: int
    """num_heads * head_dim."""
    layer_windows: tuple[int | None, ...]

    @classmethod
    def of(
        cls, directory: Path, item_bytes: int, kv_item_bytes: int | None = None, quantization: str | None = None
    ) -> ModelCost:
        """Read it from config.json and the headers of the weights.

        Args:
            item_bytes: of an element of what is computed with. Matrices that are stored in 16 bits are kept so.
            kv_item_bytes: of an element of the KV-cache; None: `item_bytes`.
            quantization: "int8" or "int4": of the linear layers; the head then has 8 bits.

        Raises:
            SystemExit: in one line, if the checkpoint cannot be read.
        """
        try:
            config = ModelConfig.from_hf(directory)
            entries: dict[str, TensorEntry] = {}
            for path in sorted(directory.glob("*.safetensors")):
                entries |= read_entries(path)
        except ConfigError as error:
            raise SystemExit(str(error)) from error
        sizes = {name: math.prod(entry.shape) for name, entry in entries.items()}
        matrices = {name for name, entry in entries.items() if len(entry.shape) > 1}
        looked_up = {name for name in matrices if name.endswith(LOOKED_UP)}
        head = config.vocab_size * config.hidden_size
        heads = {name for name in matrices if name.endswith("lm_head.weight")}
        linear = sum(sizes[name] for name in matrices - looked_up - heads)
        vectors = sum(sizes[name] for name in sizes.keys() - matrices)
        is_narrow = all(entries[name].dtype in ("BF16", "F16") for name in matrices)
        matrix_bytes = min(item_bytes, 2) if is_narrow else item_bytes
        layer_bytes = QUANTIZED_BYTES.get(quantization or "", matrix_bytes)
        head_bytes = matrix_bytes if quantization is None else QUANTIZED_BYTES["int8"]
        return cls(
            weight_bytes=round(linear * layer_bytes + head * head_bytes + vectors * item_bytes),
            linear_weights=linear,
            head_weights=head,
            kv_bytes_per_token=2 * config.num_kv_heads * config.head_dim * (kv_item_bytes or item_bytes),
            query_size=config.num_heads * config.head_dim,
            layer_windows=config.layer_windows,
        )

    def step(self, sequences: Sequence[tuple[int, int]], num_rows: int) -> StepWork:
        """Of one step.

        Args:
            sequences: (tokens computed before, tokens computed now) of each.
            num_rows: rows that get logits.
        """
        num_bytes, pairs, num_tokens = self.weight_bytes, 0, 0
        for before, count in sequences:
            num_tokens += count
            for window, num_layers in self._layers().items():
                kept = before if window is None else min(before, window)
                num_bytes += num_layers * kept * self.kv_bytes_per_token
                pairs += num_layers * _visible_pairs(before, count, window)
        operations = (
            2 * self.linear_weights * num_tokens + 2 * self.head_weights * num_rows + 4 * self.query_size * pairs
        )
        return StepWork(num_bytes, operations)

    def _layers(self) -> dict[int | None, int]:
        return {window: self.layer_windows.count(window) for window in set(self.layer_windows)}


def _visible_pairs(before: int, count: int, window: int | None) -> int:
    """Pairs of a query among `count` tokens after `before` others and a token that it sees, itself included."""
    if window is None:
        return count * before + count * (count + 1) // 2
    return sum(min(before + index + 1, window) for index in range(count))


@dataclass(slots=True)
class _Running:
    record: Record
    request: LoadRequest
    num_computed: int


def ideal_run(
    requests: Sequence[LoadRequest], concurrency: int | None, cost: ModelCost, rates: MachineRates
) -> tuple[list[Record], float]:
    """A load in ideal steps: what becomes of each request, and the seconds of the whole run."""
    records = [Record(len(request.token_ids), request.num_output_tokens) for request in requests]
    waiting = deque(zip(records, requests, strict=True))
    running: list[_Running] = []
    clock, prefix_is_cached = 0.0, False
    while waiting or running:
        if not running and waiting[0][1].arrival is not None:
            clock = max(clock, waiting[0][1].arrival)
        while waiting and (
            len(running) < concurrency if concurrency is not None else (waiting[0][1].arrival or 0.0) <= clock
        ):
            record, request = waiting.popleft()
            record.sent = clock if request.arrival is None else request.arrival
            running.append(_Running(record, request, request.prefix_len if prefix_is_cached else 0))
            prefix_is_cached = prefix_is_cached or request.prefix_len > 0
        counts = [max(1, len(each.request.token_ids) - each.num_computed) for each in running]
        work = cost.step([(each.num_computed, n) for each, n in zip(running, counts, strict=True)], len(running))
        clock += work.seconds(rates)
        for each, count in zip(running, counts, strict=True):
            each.num_computed += count
            each.record.pieces.append(clock)
            each.record.num_output_tokens += 1
            each.record.ended = clock
        running = [each for each in running if each.record.num_output_tokens < each.request.num_output_tokens]
    return records, clock
