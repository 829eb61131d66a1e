"""Quire serves language models from a paged KV-cache. This door only hands on, lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from quire.engine.llm import LLM
    from quire.sampling_params import SamplingParams


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from quire.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from quire.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
