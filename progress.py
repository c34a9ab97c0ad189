"""How far a command is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Counts what is done, and says how many in a second.

    Args:
        total: of all there is to do; None if unknown.
        unit: of what is counted, in the plural.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(self, total: int | None, unit: str, every: float = 10) -> None:
        self.total = total
        self.unit = unit
        self.every = every
        self.done = 0
        self._started = self._told = time.monotonic()
        self._console = Console()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._started = self._told = time.monotonic()
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self.unit, total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def speed(self) -> str:
        """As ``12.3 images/s``, since the start."""
        return f"{self.done / max(time.monotonic() - self._started, 1e-9):.1f} {self.unit}/s"

    def advance(self, count: int = 1) -> None:
        """Count some more."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=self.speed)
        elif time.monotonic() - self._told >= self.every:
            self._told = time.monotonic()
            total = "" if self.total is None else f"/{self.total}"
            print(f"{self.unit} {self.done}{total}  {self.speed}", flush=True)
