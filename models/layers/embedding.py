"""Token embeddings and the projection back onto the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.models.layers.linear import Linear
from quire.models.weights import Weights


class Embedding:
    """Row i of `weight` [num_rows, size] for index i; the indices are in range."""

    def __init__(self, weights: Weights, name: str, num_rows: int, size: int) -> None:
        self.weight = weights.tensor(f"{name}.weight", num_rows, size)

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices, self.weight)


class LogitsHead:
    """From hidden states [R, hidden_size] to logits [R, vocab_size] in float32."""

    def __init__(self, weights: Weights, name: str, embedding: Embedding, *, tied: bool) -> None:
        if tied:
            weights.skip_copy(f"{name}.weight", embedding.weight)
            self._projection = Linear(embedding.weight)
        else:
            self._projection = Linear(weights.tensor(f"{name}.weight", *embedding.weight.shape))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden).float()
