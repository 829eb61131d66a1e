"""How many tokens a step computes, and how its prompts share what its decodes leave."""

from __future__ import annotations

from quire.scheduler.sequence import Sequence

LONG_PROMPT_STEPS = 4
"""A prompt is long while it would take more than so many steps of its own."""


GROW_AFTER = 64
"""Steps that fit, until steps may be twice as large again."""


class StepBudget:
    """Tokens of one step: as configured, and fewer for a while where a step did not fit into the device's memory."""

    __slots__ = ("_least", "_most", "_num_fitting", "num_tokens")

    def __init__(self, most: int, least: int) -> None:
        self.num_tokens = most
        self._most = most
        self._least = least
        self._num_fitting = 0

    @property
    def is_short(self) -> bool:
        return self.num_tokens < self._most

    def shrink(self, num_tokens: int) -> bool:
        """A step of so many tokens did not fit. False if the next one cannot be smaller."""
        if num_tokens <= self._least:
            return False
        self.num_tokens = max(num_tokens // 2, self._least)
        self._num_fitting = 0
        return True

    def grow(self) -> None:
        """A step fitted."""
        self._num_fitting += 1
        if self._num_fitting == GROW_AFTER:
            self.num_tokens = min(2 * self.num_tokens, self._most)
            self._num_fitting = 0


class PromptBudget:
    """Tokens that one step may still compute of prompts.

    Prompts are computed one after another, so that the first is done as early as can be. Only a long one gives way: it
    gets half of what is left when its turn comes, those behind it the rest, and it what they have not used. It does not
    give way to others that are about as long: that would make the first later and the second no earlier.

    Where a step takes longer for each token (`one_by_one`), a prompt that ends in its second half ends what it has for
    prompts: its first token does not wait for the next one's, and streams that began together come apart.
    """

    __slots__ = ("_last_turn", "_long_from", "long", "num_tokens")

    def __init__(self, num_tokens: int, max_num_tokens: int, *, one_by_one: bool = False) -> None:
        """
        Args:
            num_tokens: what this step has for prompts.
            max_num_tokens: what a step has for them at most.
            one_by_one: whether a prompt is better off without the next one's tokens in its last step.
        """
        self.num_tokens = num_tokens
        self.long: Sequence | None = None
        """The first long prompt of this step."""
        self._last_turn = num_tokens // 2 if one_by_one else 0
        self._long_from = LONG_PROMPT_STEPS * max_num_tokens

    def is_long(self, num_tokens: int) -> bool:
        """Whether a prompt is, of which so many tokens are left to compute."""
        return num_tokens > self._long_from

    def gives_way_to(self, num_tokens: int) -> bool:
        """Whether a step may begin another prompt of so many tokens."""
        if self.long is None or not self.is_long(num_tokens):
            return True
        return 2 * num_tokens <= len(self.long.token_ids) - self.long.num_computed_tokens

    def share(self, num_tokens: int, *, others_wait: bool) -> int:
        """Most that a prompt with `num_tokens` tokens left to compute may take, its turn having come."""
        if others_wait and self.is_long(num_tokens):
            return -(-self.num_tokens // 2)
        return self.num_tokens

    def spend(self, sequence: Sequence, num_tokens: int) -> None:
        """Before it counts as computed."""
        num_left = len(sequence.token_ids) - sequence.num_computed_tokens
        self.num_tokens -= num_tokens
        if self.long is None and self.is_long(num_left):
            self.long = sequence
        if num_tokens == num_left and self.num_tokens <= self._last_turn:
            self.num_tokens = 0
