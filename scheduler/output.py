"""What leaves the scheduler: the batch of one step, and what each request is told after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from quire.scheduler.sequence import Sequence


MIN_LOG_PROB = -9999.0
UNKNOWN_TOKEN = -1
"""Stands at the end of a sequence for a token that the step in flight samples: only the device knows it."""


ErrorCode = Literal["numerical_error", "no_token_allowed", "grammar_too_complex"]


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class BlockTableUpdate:
    """Entries of one row's block table that changed: `block_ids` replace entries from `start` on."""

    row: int
    start: int
    block_ids: list[int]


@dataclass(slots=True)
class ScheduledBatch:
    """Who computes how many tokens in one step. Decodes come first; all fields set by `schedule()`.

    `sequences[i]` computes `num_scheduled_tokens[i]` of its tokens, from `num_computed_tokens` on. The sequences are
    the scheduler's own: the engine reads `row`, `token_ids`, `num_computed_tokens`, `scoring_depth`, `block_table` and
    `request` before the next call of `schedule()`, and writes nothing. A decode may compute an `UNKNOWN_TOKEN`.
    """

    step_id: int
    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    num_decodes: int
    """How many leading sequences compute exactly one token; of the others, only scored prompts may."""
    sampling: list[int]
    """Indices into `sequences` of those whose last known token is computed in this step: they sample."""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, target) block ids to be copied, all layers, before anything is written in this step."""
    block_table_updates: list[BlockTableUpdate] = field(default_factory=list)
    """Changes since the last batch, to be applied in order to a persistent [max_num_seqs, max_blocks] table."""
    started: list[str] = field(default_factory=list)
    """Ids of requests that are scheduled for the first time; a choice that had to wait longer may name its id again."""
    drafts: dict[int, list[int]] = field(default_factory=dict)
    """By index into `sequences`, in order: tokens guessed to follow the last known one, which are computed with it. Who
    has drafts stands at the end of `sampling` and samples 1 + len(drafts) rows: after its last token and each draft."""

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)

    @property
    def num_sampled_rows(self) -> int:
        """Rows of logits to sample from: one for each of `sampling`, and one behind each draft."""
        return len(self.sampling) + sum(map(len, self.drafts.values()))


@dataclass(slots=True)
class TokenLogProbs:
    """Log-probabilities at one position, natural logarithm, of the raw distribution: before penalties and temperature.

    Never below MIN_LOG_PROB, so that they can be written as JSON.
    """

    token_id: int
    log_prob: float
    top_token_ids: list[int]
    """As many as were asked for, the most probable first; of equal ones the lower id first."""
    top_log_probs: list[float]


@dataclass(slots=True)
class Candidates:
    """The best continuations of one beam, the best first; those that masks exclude are not among them."""

    token_ids: list[int]
    log_probs: list[float]
    """Of each token alone, after penalties, bias and masks: what a beam's score sums up."""
    raw: list[TokenLogProbs] | None = None
    """Of each token, if the request asks for `logprobs`."""


@dataclass(slots=True)
class SampledTokens:
    """What the sampler made of a batch."""

    token_ids: list[int | None]
    """One entry for each row: in the order of `ScheduledBatch.sampling`, one for a sequence, and one more for each of
    its drafts, sampled as if the drafts before it were right. `None`: this row's logits were not finite. Of a beam, and
    of a sequence without output, any token id."""
    log_probs: dict[int, TokenLogProbs] = field(default_factory=dict)
    """By index into `token_ids`: of the rows whose request asks for `logprobs`; beams have theirs in `candidates`."""
    candidates: dict[int, Candidates] = field(default_factory=dict)
    """By index into `token_ids`: of each beam whose logits were finite."""
    failures: dict[int, ErrorCode] = field(default_factory=dict)
    """By index into `token_ids`: why there is none, if it is not that the logits were not finite."""
    prompt_log_probs: dict[int, list[TokenLogProbs]] = field(default_factory=dict)
    """By index into `ScheduledBatch.sequences`: of a prompt that was computed to its end, all tokens but the first."""


@dataclass(slots=True)
class StepOutput:
    """What one step brought to one choice of one request."""

    request_id: str
    choice_index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token id that ended the choice; None for end-of-sequence, length and errors."""
    num_cached_tokens: int = 0
    """Prompt tokens of this choice found in the prefix cache at its first admission."""
    log_probs: list[TokenLogProbs] | None = None
    """One for each of `token_ids`, if the request asks for `logprobs`."""
    prompt_log_probs: list[TokenLogProbs] | None = None
    """Once for a request that asks for `prompt_logprobs`: of all prompt tokens but the first."""
    stopped_by_text: bool = False
    """A stop string ended this beam: its last token is part of the text, where others that stop are not."""
    error: ErrorCode | None = None
    """With FinishReason.ERROR: the code of the API's answer."""
    cumulative_log_prob: float | None = None
    """With the finish of a beam: its log-probability, without length penalty."""


TokenRow = tuple[str, int, int, int]
"""(request id, choice index, token id, num_cached_tokens) of a StepOutput with one token and nothing else to tell."""


@dataclass(slots=True)
class StepOutputs:
    """What one step brought to all choices, each of them once.

    In most steps most choices get one token and go on. An object for each of them would cost as much to make as
    everything else in update(), and more to send.
    """

    tokens: list[TokenRow] = field(default_factory=list)
    others: list[StepOutput] = field(default_factory=list)
    """Of choices that end, are told log-probabilities, or got no token or several."""

    def __len__(self) -> int:
        return len(self.tokens) + len(self.others)

    def __iter__(self) -> Iterator[StepOutput]:
        for request_id, choice_index, token_id, num_cached_tokens in self.tokens:
            yield StepOutput(request_id, choice_index, [token_id], None, None, num_cached_tokens)
        yield from self.others


@dataclass(slots=True)
class SchedulerStats:
    """Gauges as of now and counters since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_used_blocks: int = 0
    prefix_cache_queries: int = 0
    """Tokens looked up."""
    prefix_cache_hits: int = 0
    """Tokens found."""
    num_preemptions: int = 0
    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_draft_steps: int = 0
    """Drafts that were verified: one for each sequence with drafts in a step."""
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
