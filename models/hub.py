"""Finding a model's directory: a local one, or a download from the Hugging Face hub. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from quire.config import ConfigError

FILES = ["*.json", "model*.safetensors", "*.jinja"]
"""What is downloaded: configuration, tokenizer and weights; never a pickle and never code."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(name_or_directory: str) -> Path:
    """The directory of a model; called before the engine starts, never while it serves.

    A directory of that name wins. Otherwise "owner/name" is downloaded from the hub, or taken from the hub's local
    cache when there is no network.

    Raises:
        ConfigError: it is neither, or the hub does not hand it out.
    """
    directory = Path(name_or_directory).expanduser()
    if name_or_directory and directory.is_dir():
        return directory
    if directory.is_file() or not _HUB_NAME.fullmatch(name_or_directory) or ".." in name_or_directory:
        raise ConfigError(
            f"{name_or_directory[:200]!r} is no directory; give a checkpoint's directory or a hub name, owner/name."
        )
    return _download(name_or_directory)


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise ConfigError(
            f"{name}: the hub asks for permission; request it there, then log in with 'hf auth login'."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{name}: no such directory, and no such model on the hub (or it is private: log in)."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ConfigError(
            f"{name}: no such directory, not in the hub's cache, and the hub cannot be reached."
        ) from None
    except Exception as error:  # the hub's client also lets errors of its HTTP library through
        raise ConfigError(f"{name}: the download failed ({type(error).__name__}); try again.") from error
