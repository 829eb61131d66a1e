"""What is refused at the door, because it could never run."""

from __future__ import annotations

from quire.config import SchedulerConfig
from quire.scheduler.request import AdmissionError, Request


def max_sequence_tokens(request: Request, config: SchedulerConfig) -> int:
    """Length, prompt and output, that a choice of this request may reach. Alone in the pool it can always reach it.

    Without `max_tokens` that is what the context and the pool have room for.

    Raises:
        AdmissionError: the request can never fit.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    num_output_tokens = request.params.max_tokens
    least_output_tokens = 1 if num_output_tokens is None else num_output_tokens
    if num_prompt_tokens == 0:
        raise AdmissionError("The prompt must have at least one token.", code="empty_prompt", param="prompt")
    if request.params.num_sequences > config.max_num_seqs:
        name = "n" if request.params.best_of is None else "best_of"
        raise AdmissionError(
            f"{name} is at most {config.max_num_seqs} here: that many sequences run at once.",
            code="n_too_large",
            param=name,
        )
    _check_context(num_prompt_tokens, least_output_tokens, config)
    pool_limit = _pool_limit(config)
    if request.params.use_beam_search:
        pool_limit = _pool_limit_of_beams(num_prompt_tokens, request.params.num_sequences, config)
    if num_prompt_tokens >= pool_limit or num_prompt_tokens + least_output_tokens > pool_limit:
        raise AdmissionError(
            f"The KV-cache of this server has room for {pool_limit - 1} tokens{_each_of(request)}. However, you "
            f"requested {num_prompt_tokens + least_output_tokens} tokens ({num_prompt_tokens} in the prompt, "
            f"{least_output_tokens} in the completion).",
            code="kv_cache_exceeded",
            param="prompt" if num_prompt_tokens >= pool_limit else "max_tokens",
        )
    if num_output_tokens is None:
        return min(config.max_model_len, pool_limit)
    return num_prompt_tokens + num_output_tokens


def _each_of(request: Request) -> str:
    return f" in each of {request.params.num_sequences} beams" if request.params.use_beam_search else ""


def _check_context(num_prompt_tokens: int, num_output_tokens: int, config: SchedulerConfig) -> None:
    if num_prompt_tokens + num_output_tokens > config.max_model_len:
        raise AdmissionError(
            f"This model's maximum context length is {config.max_model_len} tokens. However, you requested "
            f"{num_prompt_tokens + num_output_tokens} tokens ({num_prompt_tokens} in the prompt, "
            f"{num_output_tokens} in the completion). Please reduce the length of the prompt or the completion.",
            code="context_length_exceeded",
            param="prompt" if num_prompt_tokens >= config.max_model_len else "max_tokens",
        )


def _pool_limit_of_beams(num_prompt_tokens: int, width: int, config: SchedulerConfig) -> int:
    """The same for `width` beams that share no more than the full blocks of their prompt."""
    num_shared = num_prompt_tokens // config.block_size
    num_own = max(config.num_usable_blocks - num_shared, 0) // width
    return min((num_shared + num_own) * config.block_size + 1, config.max_pool_tokens + 1)


def _pool_limit(config: SchedulerConfig) -> int:
    """Longest sequence that one can grow to alone in the pool; its last token is sampled but never stored, and a prompt
    is shorter by at least that.

    With a sliding window and chunked prefill only the window and the chunk being computed are held, so length is no
    matter once they fit. Without chunked prefill a preempted sequence comes back whole.
    """
    window = config.sliding_window
    if window is not None and config.enable_chunked_prefill:
        num_window_blocks = -(-(window - 1) // config.block_size) + 1
        if num_window_blocks <= config.num_usable_blocks:
            return config.max_model_len + 1
    return config.max_pool_tokens + 1
