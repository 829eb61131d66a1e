"""What the terminal shows while the engine loads: a bar per stage, or a line per stage where no one watches."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from quire.engine.messages import LoadProgress

logger = logging.getLogger("quire.server")

_LABELS = {"weights": "Loading weights", "kernels": "Warming up"}


class LoadingDisplay:
    """A context manager; `update` is what EngineClient.start calls."""

    def __init__(self, console: Console) -> None:
        self._terminal = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._terminal,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LoadingDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, progress: LoadProgress) -> None:
        label = _LABELS.get(progress.stage, progress.stage.replace("_", " ").capitalize())
        task = self._tasks.get(progress.stage)
        if task is None:
            task = self._tasks[progress.stage] = self._progress.add_task(label, total=progress.total)
            if not self._terminal:
                logger.info("%s", label)
        self._progress.update(task, completed=progress.done, total=progress.total)
