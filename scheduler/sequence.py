"""One choice of one request while it is live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.sampling_params import SamplingParams
from quire.scheduler.block_table import BlockTable
from quire.scheduler.output import UNKNOWN_TOKEN, FinishReason
from quire.scheduler.request import Request
from quire.scheduler.status import RUNNING, WAITING

if TYPE_CHECKING:
    from quire.scheduler.beam import Beam
    from quire.scheduler.cached_prefix import FoundPrefix


class Sequence:
    """Prompt and output of one choice, how far it is computed, and where.

    The choices of a request with n > 1 are admitted together. The first is the leader; the others are its `followers`
    and hold a row but no blocks, until the leader has computed the prompt and they fork its block table.
    """

    __slots__ = (
        "_ends_with_eos",
        "beam",
        "block_keys",
        "block_table",
        "choice_index",
        "followers",
        "found_prefix",
        "leader",
        "max_num_drafts",
        "max_num_tokens",
        "next_review",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_overtakes",
        "num_preemptions",
        "num_prompt_tokens",
        "order",
        "reads_its_tokens",
        "request",
        "request_id",
        "row",
        "scoring_depth",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        choice_index: int,
        *,
        order: tuple[int, int, int],
        max_num_tokens: int,
        block_table: BlockTable,
        block_keys: list[bytes],
    ) -> None:
        params = request.params
        self.request = request
        self.request_id = request.request_id
        self.choice_index = choice_index
        self.order = order
        """(priority class, arrival, choice): the smallest runs first; unique."""
        self.status = WAITING
        self.row = 0
        """Row of the engine's persistent tables; meaningful while running, and for followers of a running leader."""
        self.token_ids = request.prompt_token_ids
        """Prompt and output. The request's own list until the sequence runs for the first time."""
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        """Tokens whose keys and values are in the cache; the last known token is always still to be computed."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache at the first admission."""
        self.num_preemptions = 0
        self.num_overtakes = 0
        """Sequences that came later and were admitted earlier."""
        self.block_table = block_table
        self.block_keys = block_keys
        """The prefix cache's root key and the keys of the leading full blocks, as far as they were needed."""
        self.found_prefix: FoundPrefix | None = None
        """What was found when it was last looked for, while the sequence waits."""
        self.beam: Beam | None = None
        """Set if this is a seat of a beam search."""
        self.leader: Sequence | None = None
        self.followers: list[Sequence] = []
        self.scoring_depth = params.prompt_logprobs
        """Entries at each prompt position that the request asks for, until it was told them; None: it does not ask."""
        self.max_num_tokens = max_num_tokens
        self.max_num_drafts = 0
        """Most tokens that are guessed in a step; set by the speculator."""
        self.next_review = 0
        """Until so many tokens are computed, a new token needs no look at blocks, followers or length."""
        self.reads_its_tokens = reads_tokens(params)
        """Whether the host has to know all tokens before the next one is sampled."""
        self.stop_token_ids = frozenset(params.stop_token_ids)
        # A grammar says by an end of sequence that the output is complete.
        self._ends_with_eos = not params.ignore_eos or params.grammar is not None
        if self._ends_with_eos:
            self.stop_token_ids |= frozenset(request.eos_token_ids)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request_id}/{self.choice_index} {self.status.name.lower()} "
            f"{self.num_computed_tokens} of {len(self.token_ids)} tokens, blocks {self.block_table.block_ids}>"
        )

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_hittable_tokens(self) -> int:
        """Tokens that a prefix hit may cover: not those that its followers are to fork before, never the last."""
        if self.beam is not None and self.beam.group.fork_length:
            return self.beam.group.fork_length
        return len(self.token_ids) - 1

    def run(self) -> None:
        """Now it has a row and blocks; from here on it appends to its own copy of the tokens."""
        self.status = RUNNING
        self.found_prefix = None
        self.next_review = 0
        if self.token_ids is self.request.prompt_token_ids:
            self.token_ids = list(self.token_ids)

    def drop_unknown_token(self) -> None:
        """Only what is known is left; nothing happens if everything is."""
        if self.token_ids[-1] == UNKNOWN_TOKEN:
            self.token_ids.pop()

    def finish_reason(self) -> tuple[FinishReason | None, int | None]:
        """Whether the last token ends the sequence, and which stop token id it was (None for end-of-sequence)."""
        return self.end_at(len(self.token_ids), self.token_ids[-1])

    def end_at(self, num_tokens: int, token_id: int) -> tuple[FinishReason | None, int | None]:
        """The same, if `token_id` were the last of `num_tokens` tokens, prompt and output."""
        if token_id in self.stop_token_ids and num_tokens - self.num_prompt_tokens > self.request.params.min_tokens:
            is_eos = self._ends_with_eos and token_id in self.request.eos_token_ids
            return FinishReason.STOP, None if is_eos else token_id
        if num_tokens >= self.max_num_tokens:
            return FinishReason.LENGTH, None
        return None, None


def reads_tokens(params: SamplingParams) -> bool:
    """Whether something before the temperature depends on which tokens came before, not only on how many."""
    return bool(
        params.grammar is not None
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_word_token_ids
    )
