"""What enters the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from quire.sampling_params import SamplingParams


class StopTexts(Protocol):
    """The stop strings of a beam search, seen from where there is no text."""

    def ended(self, output_token_ids: list[int]) -> bool:
        """Whether the last of these tokens completes a stop string in their text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One admitted request. The seed is set: randomness is a function of (seed, choice index, position) alone."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a sequence unless `params.ignore_eos`."""
    priority: int = 0
    """Lower runs first under the "priority" policy."""
    cache_salt: str = ""
    """Requests share prefix-cache blocks only with requests of the same salt."""
    stop_texts: StopTexts | None = None
    """Set for a beam search with stop strings, whose beams end in the scheduler; others end where their text is."""


class AdmissionError(ValueError):
    """The request can never run here. `code` is the error code of the HTTP answer, `param` the field at fault."""

    def __init__(self, message: str, *, code: str, param: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
