"""Stop strings of beam searches, whose beams end in the scheduler: there a token has to be seen as text."""

from __future__ import annotations

from pathlib import Path

from quire.engine.detokenizer import DetokenizerFactory, StopMatcher, StopStrings
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams
from quire.scheduler.request import StopTexts

MARGIN_TOKENS = 16
"""Further tokens that are read before a stop string may begin: some have no text, and some end a character."""


class StopTextsFactory:
    """Reads the tokenizer when the first beam search with stop strings comes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._detokenizers: DetokenizerFactory | None = None

    def create(self, params: SamplingParams) -> StopTexts | None:
        """None for requests whose stop strings are found where their text is made."""
        if not (params.use_beam_search and params.stop):
            return None
        if self._detokenizers is None:
            self._detokenizers = DetokenizerFactory(Tokenizer(self._directory))
        return TailStopTexts(self._detokenizers, params)


class TailStopTexts:
    """Looks at as many of the last tokens as a stop string can take up.

    A token has at least one byte, or none if it is hidden; so the last tokens, as many as the longest stop string has
    bytes and some more, hold every stop string that the last token can complete.
    """

    def __init__(self, detokenizers: DetokenizerFactory, params: SamplingParams) -> None:
        self._detokenizers = detokenizers
        self._skip_special_tokens = params.skip_special_tokens
        self._stop = StopStrings(params.stop)
        self._num_tokens = max(len(text.encode()) for text in params.stop) + MARGIN_TOKENS

    def ended(self, output_token_ids: list[int]) -> bool:
        """Whether the last token completes a stop string."""
        *before, last = output_token_ids[-self._num_tokens :]
        detokenizer = self._detokenizers.create((), self._skip_special_tokens)
        matcher = StopMatcher(self._stop)
        for token_id in before:
            matcher.push(detokenizer.push(token_id), may_stop=False)
        matcher.push(detokenizer.push(last))
        return matcher.matched is not None
