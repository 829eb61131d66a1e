"""Token embeddings and the projection back onto the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.kernels import linear as packed
from quire.kernels import quantized_linear as quantized
from quire.kernels.quantized_linear import QuantizedWeight
from quire.models.layers.linear import BITS, Linear, PackedLinear, QuantizedLinear, TorchLinear, quantize
from quire.models.weights import Weights

Table = torch.Tensor | packed.PackedWeight | QuantizedWeight


class Embedding:
    """Row i of a table [num_rows, size] for index i; the indices are in range."""

    def __init__(self, table: Table, dtype: torch.dtype) -> None:
        self._table = table
        self._dtype = dtype

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        if isinstance(self._table, torch.Tensor):
            return F.embedding(indices, self._table)
        if isinstance(self._table, QuantizedWeight):
            return quantized.embedding(indices, self._table, self._dtype)
        return packed.embedding(indices, self._table, self._dtype)


class LogitsHead:
    """From hidden states [R, hidden_size] to logits [R, vocab_size] in float32."""

    def __init__(self, projection: Linear) -> None:
        self._projection = projection

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden, out_dtype=torch.float32)


def load_embedding(weights: Weights, name: str, num_rows: int, size: int) -> Embedding:
    """Not rounded to fewer bits: looking a row up takes no time."""
    return Embedding(_unrounded_table(weights.tensor(f"{name}.weight", num_rows, size)), weights.dtype)


def load_embedding_and_head(
    weights: Weights, embedding_name: str, head_name: str, vocab_size: int, size: int, *, tied: bool
) -> tuple[Embedding, LogitsHead]:
    """The first and the last layer of a model: one table if they are `tied`."""
    weight = weights.matrix({f"{embedding_name}.weight": vocab_size}, size)
    table = _table(weights, weight)
    if tied:
        weights.skip_copy(f"{head_name}.weight", weight)
        return Embedding(table, weights.dtype), LogitsHead(_projection(table))
    head = _table(weights, weights.matrix({f"{head_name}.weight": vocab_size}, size))
    return Embedding(table, weights.dtype), LogitsHead(_projection(head))


def _table(weights: Weights, weight: torch.Tensor) -> Table:
    if weights.quantization in BITS:
        return quantize(weights, weight, 8)  # in int4 too: the last layer's errors are not averaged by others
    return _unrounded_table(weight)


def _unrounded_table(weight: torch.Tensor) -> Table:
    return packed.pack(weight) if weight.device.type == "cpu" else weight


def _projection(table: Table) -> Linear:
    if isinstance(table, QuantizedWeight):
        return QuantizedLinear(table, None, None)
    if isinstance(table, torch.Tensor):
        return TorchLinear(table, None, None, gated=False)
    return PackedLinear(table, None, None)
