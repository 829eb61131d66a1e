"""What the front process reads from a checkpoint's directory: where it is, what it is called, what it recommends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final

from quire.config import ConfigError
from quire.models.hub import resolve_model
from quire.server.settings import GenerationDefaults
from quire.tales import MODEL_DIR

BUNDLED_MODEL_NAME: Final = "tales"
_MAX_FILE_BYTES: Final = 2**20
_NOT_HONOURED: Final = {"no_repeat_ngram_size": 0, "num_beams": 1}
"""Recommendations that change the text and are not applied, with their neutral values."""
_ABOVE_ZERO: Final = ("top_p", "typical_p", "repetition_penalty")


def find_model(model: str | None) -> Path:
    """The directory of a checkpoint; without a name, of the bundled one. Raises ConfigError."""
    return MODEL_DIR if model is None else resolve_model(model)


def model_name(model: str | None) -> str:
    """What a model is called in answers: the hub name as typed, or the last part of a path (the rest is ours)."""
    if model is None:
        return BUNDLED_MODEL_NAME
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def read_generation_defaults(directory: Path) -> tuple[GenerationDefaults, list[str]]:
    """Sampling defaults from generation_config.json, and warnings for what it recommends and is not honoured.

    Raises:
        ConfigError: the file is there and cannot be used.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults(), []
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        raise ConfigError("generation_config.json of the model is not a JSON object of sensible size.") from None
    defaults = GenerationDefaults(
        temperature=_number(content, "temperature", 1.0, 0.0, 2.0),
        top_k=int(_number(content, "top_k", 0, -1, 2**31 - 1)),
        top_p=_number(content, "top_p", 1.0, 0.0, 1.0),
        min_p=_number(content, "min_p", 0.0, 0.0, 1.0),
        typical_p=_number(content, "typical_p", 1.0, 0.0, 1.0),
        repetition_penalty=_number(content, "repetition_penalty", 1.0, 0.0, 100.0),
    )
    warnings = [
        f"generation_config.json recommends {name}={value!r}, which is not applied."
        for name, neutral in _NOT_HONOURED.items()
        if isinstance(value := content.get(name), (int, float)) and value != neutral
    ]
    return defaults, warnings


def _number(content: dict[str, object], name: str, default: float, low: float, high: float) -> float:
    value = content.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"generation_config.json of the model: {name} must be a number.")
    if not low <= value <= high or (name in _ABOVE_ZERO and value == 0):
        raise ConfigError(f"generation_config.json of the model: {name} must be from {low:g} to {high:g}.")
    return float(value)
