"""Typed access to JSON objects that come with a checkpoint. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire.config import ConfigError

MAX_JSON_BYTES = 100 * 2**20
MAX_INTEGER = 2**31 - 1


class JsonFields:
    """One JSON object. Whatever is missing or odd is a ConfigError that names the file and the field.

    `optional_*` treat a field that is null like one that is absent.
    """

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self._values = values

    @classmethod
    def read(cls, path: Path) -> JsonFields:
        """Raise ConfigError if `path` is not a readable JSON object of at most 100 MiB."""
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES} bytes; is it a model's JSON file?")
            values = parse_json_object(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; give the directory of a Hugging Face checkpoint.") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a JSON object; download the checkpoint again.") from error
        return cls(str(path), values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> set[str]:
        return set(self._values)

    def raw(self, name: str) -> Any:
        """The value as parsed; None if it is absent."""
        return self._values.get(name)

    def integer(self, name: str, low: int = 1, high: int = MAX_INTEGER) -> int:
        value = self.optional_integer(name, low, high)
        if value is None:
            raise self.missing(name)
        return value

    def optional_integer(self, name: str, low: int = 1, high: int = MAX_INTEGER) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if not is_integer(value) or not low <= value <= high:
            raise self.error(name, f"must be an integer from {low} to {high}")
        return int(value)

    def number(self, name: str, low: float, high: float = math.inf) -> float:
        value = self.optional_number(name, low, high)
        if value is None:
            raise self.missing(name)
        return value

    def optional_number(self, name: str, low: float, high: float = math.inf) -> float | None:
        """A finite number in [low, high]."""
        value = self.raw(name)
        if value is None:
            return None
        if not is_number(value) or not low <= value <= high:
            raise self.error(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        value = self.raw(name)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(is_number(item) and item > 0 for item in value)
        ):
            raise self.error(name, f"must be a list of {length} positive numbers")
        return tuple(float(item) for item in value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def optional_string(self, name: str) -> str | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value

    def optional_object(self, name: str) -> JsonFields | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return JsonFields(f"{self.source}: {name}", value)

    def missing(self, name: str) -> ConfigError:
        return ConfigError(f"{self.source} has no {name!r}; add it, or download the checkpoint again.")

    def error(self, name: str, what: str) -> ConfigError:
        """A ConfigError about a field; the value is echoed, cut to 80 characters."""
        return ConfigError(f"{self.source}: {name!r} {what}, not {json.dumps(self.raw(name))[:80]}.")


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; raise ValueError for anything else, a repeated name and too deep nesting included."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is a number that a float can hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1000
    return isinstance(value, float) and math.isfinite(value)
