"""Bounded admission: a request that could only wait is refused at once, before its body is parsed."""

from __future__ import annotations

from types import TracebackType

from quire.server.errors import ApiError


class Admission:
    """Counts of what is open. One event loop owns it: no locks."""

    def __init__(self, *, max_running: int, max_queued_requests: int, max_queued_tokens: int) -> None:
        self._max_open = max_running + max_queued_requests
        self._max_queued_tokens = max_queued_tokens
        self.num_tickets = 0
        self.num_open = 0
        """Open prompts; a request counts as one until its prompts are known."""
        self.num_queued_tokens = 0
        """Prompt tokens of requests without a first token."""
        self.rejections: dict[str, int] = {"queue_full": 0, "queued_tokens": 0}

    @property
    def full(self) -> bool:
        return self.num_open >= self._max_open

    def check(self) -> None:
        """Raise ApiError if there is no room for one more request."""
        if self.full:
            self.reject("queue_full")

    def reject(self, reason: str) -> None:
        self.rejections[reason] += 1
        raise ApiError("queue_full")

    def enter(self) -> Ticket:
        self.check()
        return Ticket(self, self._max_open, self._max_queued_tokens)


class Ticket:
    """One HTTP request's share of the bounds; a context manager that gives all of it back."""

    def __init__(self, admission: Admission, max_open: int, max_queued_tokens: int) -> None:
        self._admission = admission
        self._max_open = max_open
        self._max_queued_tokens = max_queued_tokens
        self._num_prompts = 1
        self._num_queued_tokens = 0
        admission.num_tickets += 1
        admission.num_open += 1

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.started()
        self._admission.num_open -= self._num_prompts
        self._admission.num_tickets -= 1
        self._num_prompts = 0

    def add_prompts(self, num_prompts: int) -> None:
        """Count each prompt of the request. Raises ApiError if they do not fit, unless nothing else is open."""
        extra = num_prompts - self._num_prompts
        others = self._admission.num_open - self._num_prompts
        if others and self._admission.num_open + extra > self._max_open:
            self._admission.reject("queue_full")
        self._admission.num_open += extra
        self._num_prompts = num_prompts

    def queue_tokens(self, num_tokens: int) -> None:
        """Count prompt tokens until `started`. Raises ApiError if they do not fit, unless no others wait."""
        others = self._admission.num_queued_tokens
        if others and others + num_tokens > self._max_queued_tokens:
            self._admission.reject("queued_tokens")
        self._num_queued_tokens += num_tokens
        self._admission.num_queued_tokens += num_tokens

    def started(self) -> None:
        """The first token is there: the prompt waits no more."""
        self._admission.num_queued_tokens -= self._num_queued_tokens
        self._num_queued_tokens = 0
