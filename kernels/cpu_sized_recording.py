"""One recording for steps of every size.

What a kernel is told of a step's size (numbers of rows, and where the rows of a part begin) is affine in a few sizes:
how many tokens, how many decodes and so on. So a step is recorded a few times, the sizes a little apart, and what
differs between these recordings gives each parameter as a constant plus multiples of the sizes. To replay a step is to
fill these in. That it holds is checked, not assumed: the largest sizes are recorded too, and must come out as computed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from quire.kernels.cpu_recording import Arena, NotRecordableError, Recording, record

Sizes = tuple[int, ...]
Step = Callable[[Sizes], tuple[torch.Tensor, ...]]


class SizedRecording:
    """Made by `record_for_sizes`.

    Attributes:
        outputs: what the step returned for the largest sizes. Of smaller ones, the first rows are filled.
    """

    def __init__(
        self,
        recording: Recording,
        places: npt.NDArray[np.int64],
        constants: npt.NDArray[np.int64],
        factors: npt.NDArray[np.int64],
        outputs: tuple[torch.Tensor, ...],
    ) -> None:
        self._recording = recording
        self._places = places
        self._constants = constants
        self._factors = factors
        self.outputs = outputs

    def set_sizes(self, sizes: Sizes) -> None:
        self._recording.parameters[self._places] = self._constants + self._factors @ np.array(sizes)

    def replay(self, sizes: Sizes, num_threads: int) -> None:
        """Run the step for these sizes, none of them above the largest."""
        self.set_sizes(sizes)
        self._recording.replay(num_threads)

    def profile(self, sizes: Sizes, num_threads: int) -> list[tuple[str, float]]:
        """As `Recording.profile`."""
        self.set_sizes(sizes)
        return self._recording.profile(num_threads)


def record_for_sizes(arena: Arena, step: Step, smallest: Sizes, largest: Sizes, max_rows: int) -> SizedRecording:
    """Record `step`, which is called with several sizes and computes nothing.

    Args:
        step: returns tensors whose rows are its results; what it reads lies at the same place for all sizes.
        smallest: sizes from which each may go up by one.
        largest: no replay has larger ones. Memory is provided for them.
        max_rows: no tensor that a kernel makes has more rows.

    Raises:
        NotRecordableError: torch is asked to compute, or kernels or their parameters do not follow from the sizes.
    """

    def trial(sizes: Sizes) -> tuple[Recording, tuple[torch.Tensor, ...]]:
        with record(arena, max_rows) as recording:
            outputs = step(sizes)
        return recording, outputs

    trial(largest)  # so that the memory all others get is large enough
    recording, outputs = trial(largest)
    base = trial(smallest)[0]
    steps = [trial((*smallest[:i], size + 1, *smallest[i + 1 :]))[0] for i, size in enumerate(smallest)]
    shape = (recording.names, len(recording.parameters))
    if any((other.names, len(other.parameters)) != shape for other in (base, *steps)):
        raise NotRecordableError("which kernels run, or how much they are told, depends on the sizes")
    factors = np.stack([other.parameters - base.parameters for other in steps], axis=1)  # [parameters, sizes]
    constants = base.parameters - factors @ np.array(smallest)
    if not np.array_equal(constants + factors @ np.array(largest), recording.parameters):
        raise NotRecordableError("what a kernel is told is not affine in the sizes")
    places = np.flatnonzero(factors.any(axis=1))
    return SizedRecording(recording, places, constants[places], factors[places], outputs)
