"""Finding a model's directory. The hub itself is played by the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from quire.config import ConfigError
from quire.models.hub import resolve_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the test's snapshot_download was asked, and what it raises."""
    calls: dict[str, Any] = {"raises": None}

    def snapshot_download(name: str, **options: Any) -> str:
        calls.update(name=name, **options)
        if calls["raises"] is not None:
            raise calls["raises"]
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_directory_wins(hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert "name" not in hub


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B"])
def test_a_hub_name_is_downloaded_without_pickles_and_code(hub: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert resolve_model(name) == tmp_path / "snapshot"
    assert hub["name"] == name
    files = ["config.json", "model-00001-of-2.safetensors", "pytorch_model.bin", "modeling.py", "onnx/config.json"]
    wanted = {"allow_patterns": hub["allow_patterns"], "ignore_patterns": hub["ignore_patterns"]}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **wanted)) == files[:2]


@pytest.mark.parametrize("name", ["", "/no/such/directory", "./model", "~/model", "a/b/c", "../model", "a/..", "a b"])
def test_what_is_neither(hub: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match="is no directory; give a checkpoint's directory or a hub name"):
        resolve_model(name)
    assert "name" not in hub


def test_a_file_is_no_directory(hub: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no directory"):
        resolve_model(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "not in the hub's cache, and the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (httpx.ReadTimeout("slow"), "the download failed .ReadTimeout.; try again"),
        (OSError("disk full"), "the download failed"),
    ],
)
def test_errors_of_the_hub(hub: dict[str, Any], error: Exception, message: str) -> None:
    hub["raises"] = error
    with pytest.raises(ConfigError, match=message):
        resolve_model("owner/name")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "no such model on the hub"),
        (errors.GatedRepoError, "the hub asks for permission"),
        (errors.HfHubHTTPError, "the download failed"),
    ],
)
def test_answers_of_the_hub(hub: dict[str, Any], kind: type[Exception], message: str) -> None:
    hub["raises"] = kind.__new__(kind)
    with pytest.raises(ConfigError, match=message):
        resolve_model("owner/name")
