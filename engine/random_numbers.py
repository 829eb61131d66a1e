"""Counter-based random numbers: one uniform number is a pure function of (seed, choice index, position).

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), vectorised over rows. It runs
on the host for every device, so CPU and GPU draw the same stream, whoever shares the batch and however often a
sequence was preempted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_UNIFORM_BITS = 40


def philox4x32(counter: tuple[UInt64Array, ...], key: tuple[UInt64Array, UInt64Array]) -> tuple[UInt64Array, ...]:
    """Four 32-bit words (in uint64 arrays) for each counter of four words and key of two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + np.uint64(_WEYL[0])) & _LOW
        k1 = (k1 + np.uint64(_WEYL[1])) & _LOW
    return c0, c1, c2, c3


def uniform(
    seeds: UInt64Array, choice_indices: UInt64Array, positions: UInt64Array, stream: int = 0
) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for each row, [R] float64, with 40 bits so that u * total < total for any finite total.

    Args:
        seeds: [R] the requests' 64-bit seeds.
        choice_indices: [R] index of the choice in its request.
        positions: [R] position in the sequence of the token to be drawn.
        stream: keeps draws for different purposes at one position apart.
    """
    zero = np.zeros_like(seeds)
    words = philox4x32(
        (positions & _LOW, choice_indices & _LOW, zero + np.uint64(stream), zero), (seeds & _LOW, seeds >> _SHIFT)
    )
    bits = (words[0] << np.uint64(_UNIFORM_BITS - 32)) | (words[1] >> np.uint64(64 - _UNIFORM_BITS))
    return (bits.astype(np.float64) + 0.5) * 2.0**-_UNIFORM_BITS
