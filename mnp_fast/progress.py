"""Progress of long work: a bar in a terminal, one line a stage anywhere else, nothing where switched off."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Shows the stages of one run on standard error: name, steps done, loss, accuracy, time spent and time left.

    Use as a context manager; without one, call `close` at the end. enabled: False shows nothing.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self._console = (console or Console(stderr=True)) if enabled else None
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._name: str | None = None
        self._values: dict[str, float] = {}
        self._started = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin the stage `name` of `total` steps (None where nobody can know), which ends the stage before it."""
        self._end_stage()
        self._name, self._values, self._started = name, {}, time.perf_counter()
        if self._console is None or not self._console.is_terminal:
            return
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
        self._task = self._bars.add_task(name, total=total, values="")

    def update(self, advance: int = 1, *, loss: float | None = None, accuracy: float | None = None) -> None:
        """Count `advance` steps of the stage, and show these values from here on."""
        new = {"loss": loss, "accuracy": accuracy}
        self._values |= {key: value for key, value in new.items() if value is not None}
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=advance, values=self._shown())

    def close(self, finished: bool = True) -> None:
        """End the last stage and leave the terminal as it was. finished: False where the stage was broken off."""
        self._end_stage(finished)
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _end_stage(self, finished: bool = True) -> None:
        if self._bars is not None and self._task is not None:
            # A stage may stop early, or not have known its end.
            done = self._bars.tasks[self._task].completed
            if finished:
                self._bars.update(self._task, total=done)
            self._bars.stop_task(self._task)
        elif self._console is not None and self._name is not None and finished:
            seconds = time.perf_counter() - self._started
            self._console.print(f"{self._name:<12} {seconds:7.1f} s  {self._shown()}".rstrip(), highlight=False)
        self._task = self._name = None

    def _shown(self) -> str:
        return "  ".join(f"{key} {value:.3f}" for key, value in self._values.items())
