"""The log-probabilities of one answer, in the forms that its request asks for."""

from __future__ import annotations

from quire.engine.text_delta import TextDelta
from quire.server.context import ServerContext
from quire.server.log_probs import (
    LogProbs,
    PromptLogProbs,
    echo_offsets,
    render,
    render_echo,
    render_prompt,
    token_id_string,
)
from quire.server.prompts import PromptJob
from quire.server.schemas import CompletionRequest


class AnswerLogProbs:
    """Those of a prompt are rendered once, however many choices show them."""

    def __init__(self, context: ServerContext, request: CompletionRequest, echoes: list[str]) -> None:
        self._context = context
        self._request = request
        self._echoes = echoes
        self._to_string = token_id_string if request.return_tokens_as_token_ids else context.token_strings.__getitem__
        self._of_echo: dict[int, LogProbs] = {}
        self._of_prompt: dict[int, PromptLogProbs] = {}
        self._taken: set[int] = set()

    async def take_prompt(self, job: PromptJob, delta: TextDelta) -> None:
        """Render what came for the prompt: with its first delta or not at all."""
        request, context = self._request, self._context
        if job.params.prompt_logprobs is None or job.prompt_index in self._taken:
            return
        self._taken.add(job.prompt_index)
        positions = delta.prompt_log_probs or []
        if len(positions) != len(job.token_ids) - 1:
            raise RuntimeError("the engine did not send the log-probabilities of a prompt")
        if request.echo and request.logprobs is not None:
            offsets = await echo_offsets(
                job.token_ids,
                self._echoes[job.prompt_index],
                context.detokenizers,
                hides_special=job.text is None and request.skip_special_tokens is not False,
            )
            self._of_echo[job.prompt_index] = await render_echo(
                job.token_ids, positions, request.logprobs, offsets, self._to_string
            )
        if request.prompt_logprobs is not None:
            self._of_prompt[job.prompt_index] = await render_prompt(
                positions, request.prompt_logprobs, context.token_strings
            )

    def of_delta(self, job: PromptJob, delta: TextDelta) -> LogProbs | None:
        if self._request.logprobs is None:
            return None
        positions, offsets = delta.log_probs or [], delta.text_offsets or []
        if len(positions) != len(delta.token_ids):
            raise RuntimeError("the engine did not send the log-probabilities of each token")
        begin = len(self._echoes[job.prompt_index])
        return render(positions, self._request.logprobs, [begin + offset for offset in offsets], self._to_string)

    def of_echo(self, job: PromptJob) -> LogProbs | None:
        return self._of_echo.get(job.prompt_index)

    def of_prompt(self, job: PromptJob) -> PromptLogProbs:
        return self._of_prompt[job.prompt_index]
