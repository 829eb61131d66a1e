"""Compiling the CPU kernels before the first request needs them."""

from __future__ import annotations

import torch

from quire.kernels.kv_write.cpu import kv_write
from quire.kernels.paged_decode.cpu import paged_decode
from quire.kernels.paged_prefill.cpu import paged_prefill
from quire.kernels.rms_norm.cpu import rms_norm
from quire.kernels.rope.cpu import rope


def warm_up(dtype: torch.dtype) -> None:
    """Have every CPU kernel ready for tensors of `dtype`, whatever their shapes.

    The first time on a machine they are compiled, which takes some seconds; later they are loaded from the user's cache
    directory, which takes a fraction of one.
    """
    x = torch.zeros((1, 8), dtype=dtype)
    heads, cache = x.view(1, 1, 8), torch.zeros((2, 1, 16, 8), dtype=dtype)
    tables, seq_lens = torch.ones((1, 1), dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    rms_norm(x, x[0], 1e-6)
    rope(heads, heads.clone(), torch.zeros(1, dtype=torch.int64), torch.zeros((1, 8)))
    kv_write(heads, heads, cache, cache.clone(), torch.full((1,), 16))
    paged_decode(heads, cache, cache, tables, seq_lens, 1.0)
    paged_prefill(heads, cache, cache, tables, seq_lens, torch.tensor([0, 1], dtype=torch.int32), 1.0, 1)
