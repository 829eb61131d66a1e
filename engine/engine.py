"""The engine: schedule, build inputs, run the model, sample, update. Everything else is a collaborator."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from quire.config import EngineConfig, SchedulerConfig
from quire.engine.cuda_runner import CudaGraphs, CudaRunner
from quire.engine.device import (
    choose_device,
    choose_dtype,
    choose_kv_cache_dtype,
    choose_prompt_budget,
    choose_quantization,
    choose_step_budget,
    dtype_name,
    keeps_fp8_weights,
    require_kernels,
    schedules_ahead,
)
from quire.engine.device_queue import CudaQueue, HostQueue
from quire.engine.grammar.factory import GrammarFactory
from quire.engine.inputs import InputBuilder
from quire.engine.kv_storage import KVStorage
from quire.engine.last_tokens import LastTokens
from quire.engine.memory import plan_memory
from quire.engine.messages import EngineInfo
from quire.engine.model_runner import ModelRunner
from quire.engine.prefix_groups import CascadeCosts
from quire.engine.prompt_log_probs import PromptLogProbs
from quire.engine.sampler import Sampler
from quire.engine.step_executor import StepExecutor
from quire.engine.step_time import StepPacer
from quire.engine.stop_texts import StopTextsFactory
from quire.engine.warm_up import load_cpu_kernels, warm_up
from quire.grammar import Grammar, GrammarError
from quire.models.config import ModelConfig
from quire.models.loading import load_model
from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.scheduler.output import ScheduledBatch, SchedulerStats, StepOutputs
from quire.scheduler.request import AdmissionError, Request
from quire.scheduler.scheduler import Scheduler

DEFAULT_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}

Progress = Callable[[str, int, int], None]
log = logging.getLogger(__name__)


def _no_progress(stage: str, done: int, total: int) -> None:
    return


class Engine:
    """One model on one device. Not thread-safe: one thread adds, aborts and steps.

    Args:
        config: what to load and how large; `model` is a directory.
        progress: called with (stage, done, total): "weights" in bytes, then "kernels".

    Raises:
        ConfigError: the model or a flag cannot be used as given.
    """

    def __init__(self, config: EngineConfig, progress: Progress = _no_progress) -> None:
        device = choose_device(config)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        directory = Path(config.model)
        model_config = ModelConfig.from_hf(directory)
        require_kernels(model_config, device)
        dtype = choose_dtype(config, model_config.checkpoint_dtype, device)
        quantization = choose_quantization(config, device)
        keeps_fp8 = keeps_fp8_weights(config, model_config.fp8, dtype, device)
        with ThreadPoolExecutor(1, thread_name_prefix="quire-kernels") as background:
            kernels = background.submit(load_cpu_kernels) if device.type == "cpu" else None
            self._model = load_model(
                directory,
                model_config,
                dtype=dtype,
                device=device,
                max_model_len=config.max_model_len,
                quantization=quantization,
                keeps_fp8=keeps_fp8,
                progress=lambda done, total: progress("weights", done, total),
            )
        if kernels is not None:
            kernels.result()
        quantization = "fp8" if keeps_fp8 else quantization
        max_num_seqs = config.max_num_seqs or DEFAULT_MAX_NUM_SEQS[device.type]
        step_budget = choose_step_budget(config, device, dtype, quantization, max_num_seqs)
        budget = plan_memory(
            config,
            model_config,
            weight_bytes=self._model.weight_bytes,
            dtype=dtype,
            device=device,
            quantization=quantization,
            max_num_seqs=max_num_seqs,
            step_budget=step_budget,
        )
        kv_dtype = choose_kv_cache_dtype(config, model_config.checkpoint_dtype, dtype, device)
        max_logprobs = min(config.max_logprobs, model_config.vocab_size)
        self._kv = KVStorage(
            model_config, budget.num_blocks, config.block_size, kv_dtype, device, max_logprobs=max_logprobs
        )
        costs = CascadeCosts.of(model_config, kv_dtype, device)
        self._inputs = InputBuilder(step_budget, max_num_seqs, budget.max_model_len, config.block_size, device, costs)
        self._runner = self._make_runner(config, device, max_num_seqs, budget.max_model_len)
        self._grammars = GrammarFactory(directory, model_config.vocab_size, model_config.eos_token_ids)
        self._sampler = Sampler(max_num_seqs, self._grammars)
        prompt_log_probs = PromptLogProbs(self._kv.log_probs, max_num_seqs, model_config.vocab_size, self._model.logits)
        runs_ahead = schedules_ahead(config, device)
        self._executor = StepExecutor(
            self._inputs,
            self._kv,
            self._runner,
            self._sampler,
            prompt_log_probs,
            HostQueue(keep=runs_ahead) if device.type == "cpu" else CudaQueue(),
            LastTokens(max_num_seqs, device) if runs_ahead else None,
        )
        self._stop_texts = StopTextsFactory(directory)
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=budget.num_blocks,
                block_size=config.block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=step_budget,
                max_model_len=budget.max_model_len,
                enable_prefix_caching=config.enable_prefix_caching,
                enable_chunked_prefill=config.enable_chunked_prefill,
                policy=config.scheduling_policy,
                sliding_window=model_config.uniform_window,
                speculative_config=config.speculative_config,
                cache_namespace=f"{config.model}|{dtype}|{kv_dtype}|{quantization}|{secrets.token_hex(16)}",
            )
        )
        self._scheduler.prompts.max_num_tokens = choose_prompt_budget(config, device, dtype, quantization)
        target = config.target_itl_ms
        self._pacer = None if target is None else StepPacer(target / 1000, step_budget)
        self.started: list[str] = []
        """Ids of the requests that the last call of `step` scheduled for the first time."""
        self.info = EngineInfo(
            architecture=model_config.architecture,
            vocab_size=model_config.vocab_size,
            max_model_len=budget.max_model_len,
            eos_token_ids=list(model_config.eos_token_ids),
            block_size=config.block_size,
            num_blocks=budget.num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=step_budget,
            dtype=dtype_name(dtype),
            kv_cache_dtype=dtype_name(kv_dtype),
            device=device.type,
            enable_prefix_caching=config.enable_prefix_caching,
            max_logprobs=max_logprobs,
            memory_budget=budget.lines,
            quantization=quantization,
        )
        progress("kernels", 0, 1)
        with torch.inference_mode():
            warm_up(self._model, self._kv, device)
            if isinstance(self._runner, ModelRunner):
                self._runner.record()
        progress("kernels", 1, 1)

    def _make_runner(
        self, config: EngineConfig, device: torch.device, max_num_seqs: int, max_model_len: int
    ) -> ModelRunner | CudaRunner:
        if device.type == "cpu":
            return ModelRunner(self._model, self._kv.layers, self._inputs.memory)
        return CudaRunner(
            self._model,
            self._kv.layers,
            device,
            max_num_seqs=max_num_seqs,
            max_num_blocks=-(-max_model_len // config.block_size),
            capture=None if config.enforce_eager else CudaGraphs().capture,
        )

    @torch.inference_mode()
    def step(self) -> StepOutputs:
        """Compute one batch; what it brought to each request, empty when there is nothing to do.

        Scheduling ahead, the next one is submitted before: it is in flight when this returns.
        """
        started, executor, scheduler = time.perf_counter(), self._executor, self._scheduler
        self.started = []
        while executor.has_room and (batch := scheduler.schedule()) is not None:
            self.started += batch.started
            executor.submit(batch)
        if executor.is_idle:
            return StepOutputs()
        batch, sampled = executor.retire()
        if sampled is None:
            self._withdraw(batch)
            return StepOutputs()
        outputs = scheduler.update(batch, sampled)
        if self._pacer is not None:
            scheduler.prompts.max_num_tokens = self._pacer.observe(batch, time.perf_counter() - started)
        return outputs

    def _withdraw(self, batch: ScheduledBatch) -> None:
        num_tokens = batch.num_tokens
        if not self._scheduler.withdraw(batch):
            raise torch.OutOfMemoryError(
                f"A step of {num_tokens} tokens does not fit into the device's memory, and cannot be smaller. Lower "
                "--gpu-memory-utilization, or see what else uses the device."
            )
        log.warning(
            "A step of %d tokens did not fit into the device's memory; steps are smaller for a while. "
            "A lower --gpu-memory-utilization or --max-num-batched-tokens leaves more room.",
            num_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            AdmissionError: it can never run here, or its grammar cannot be used.
            InvalidParameterError: a token id of its parameters lies outside the vocabulary, or it asks for more
                log-probabilities than the engine gives.
        """
        request.params.check_vocabulary(self.info.vocab_size)
        self._check_logprobs(request.params)
        if request.params.grammar is not None:
            self._check_grammar(request.params.grammar)
        stop_texts = self._stop_texts.create(request.params)
        self._scheduler.add(request if stop_texts is None else replace(request, stop_texts=stop_texts))

    def _check_grammar(self, grammar: Grammar) -> None:
        """Compiles it, unless it is still kept, so that a step only makes a copy."""
        if not self.info.eos_token_ids:
            message = "This model has no end of sequence, by which a grammar ends."
            raise AdmissionError(message, code="structured_output_unavailable", param="grammar")
        try:
            self._grammars.create(grammar)
        except GrammarError as error:
            raise AdmissionError(str(error), code=error.code, param="grammar") from error

    def _check_logprobs(self, params: SamplingParams) -> None:
        limit = self.info.max_logprobs
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and count > limit:
                raise InvalidParameterError(name, f"{name} is at most {limit} here (--max-logprobs).")

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        self._scheduler.abort(request_id, choice_index)

    def has_work(self) -> bool:
        return self._scheduler.has_work() or not self._executor.is_idle

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def reset_prefix_cache(self) -> None:
        self._scheduler.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Walk all bookkeeping; raises scheduler.invariants.InvariantError."""
        self._scheduler.check_integrity()
