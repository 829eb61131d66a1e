"""The least of a foreign package that files out of its wheel ask for, so that they can be imported without the rest."""

from __future__ import annotations

import sys
import types
from pathlib import Path


def add_module(root: Path, name: str, **members: object) -> None:
    """A module with these members; as a package it has the files that lie under `root` by its name."""
    made = types.ModuleType(name)
    made.__dict__.update(members)
    made.__path__ = [str(root / name.replace(".", "/"))]
    sys.modules[name] = made
