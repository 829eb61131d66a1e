"""How the prompts of a step share what its decodes leave."""

from __future__ import annotations

from quire.scheduler.sequence import Sequence

LONG_PROMPT_STEPS = 4
"""A prompt is long while it would take more than so many steps of its own."""


class PromptBudget:
    """Tokens that one step may still compute of prompts.

    Prompts are computed one after another, so that the first is done as early as can be. Only a long one gives way: it
    gets half of what is left when its turn comes, those behind it the rest, and it what they have not used. A step
    computes one long prompt: sharing among two would make the first later and the second no earlier.
    """

    __slots__ = ("_long_from", "long", "num_tokens")

    def __init__(self, num_tokens: int, max_num_tokens: int) -> None:
        """
        Args:
            num_tokens: what this step has for prompts.
            max_num_tokens: what a step has for them at most.
        """
        self.num_tokens = num_tokens
        self.long: Sequence | None = None
        """The long prompt of this step."""
        self._long_from = LONG_PROMPT_STEPS * max_num_tokens

    def is_long(self, num_tokens: int) -> bool:
        """Whether a prompt is, of which so many tokens are left to compute."""
        return num_tokens > self._long_from

    def share(self, num_tokens: int, *, others_wait: bool) -> int:
        """Most that a prompt with `num_tokens` tokens left to compute may take, its turn having come."""
        if others_wait and self.is_long(num_tokens):
            return -(-self.num_tokens // 2)
        return self.num_tokens

    def spend(self, sequence: Sequence, num_tokens: int) -> None:
        """Before it counts as computed."""
        self.num_tokens -= num_tokens
        if self.is_long(len(sequence.token_ids) - sequence.num_computed_tokens):
            self.long = sequence
