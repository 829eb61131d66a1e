"""Token embeddings and the projection back onto the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.kernels import linear as packed
from quire.models.layers.linear import Linear, PackedLinear, TorchLinear
from quire.models.weights import Weights


class Embedding:
    """Row i of a table [num_rows, size] for index i; the indices are in range."""

    def __init__(self, table: torch.Tensor | packed.PackedWeight) -> None:
        self._table = table

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        if isinstance(self._table, torch.Tensor):
            return F.embedding(indices, self._table)
        return packed.embedding(indices, self._table)


class LogitsHead:
    """From hidden states [R, hidden_size] to logits [R, vocab_size] in float32."""

    def __init__(self, projection: Linear) -> None:
        self._projection = projection

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden, out_dtype=torch.float32)


def load_embedding(weights: Weights, name: str, num_rows: int, size: int) -> Embedding:
    return Embedding(_table(weights.tensor(f"{name}.weight", num_rows, size)))


def load_embedding_and_head(
    weights: Weights, embedding_name: str, head_name: str, vocab_size: int, size: int, *, tied: bool
) -> tuple[Embedding, LogitsHead]:
    """The first and the last layer of a model: one table if they are `tied`."""
    weight = weights.tensor(f"{embedding_name}.weight", vocab_size, size)
    table = _table(weight)
    if tied:
        weights.skip_copy(f"{head_name}.weight", weight)
        return Embedding(table), LogitsHead(_projection(table))
    return Embedding(table), LogitsHead(_projection(_table(weights.tensor(f"{head_name}.weight", vocab_size, size))))


def _table(weight: torch.Tensor) -> torch.Tensor | packed.PackedWeight:
    return packed.pack(weight) if weight.device.type == "cpu" else weight


def _projection(table: torch.Tensor | packed.PackedWeight) -> Linear:
    if isinstance(table, torch.Tensor):
        return TorchLinear(table, None, None, gated=False)
    return PackedLinear(table, None, None)
