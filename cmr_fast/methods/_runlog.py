"""What a training run shows and writes while it goes: metrics.csv, TensorBoard events, a progress bar."""

import csv
import io
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from cmr_fast._files import write_aside

LINE_SECONDS = 10.0


class RunLog:
    """One row per epoch to `folder`/metrics.csv and `folder`/tensorboard, and a bar (terminal) or a line now and then.

    history: the rows of the epochs already done; metrics.csv is cut back to exactly these.
    monitor: the column that is shown beside the losses.
    samples: of a stream, how many the training goes through; the bar then counts these.
    """

    def __init__(
        self,
        folder: Path,
        history: list[dict[str, float]],
        epochs: int,
        title: str,
        monitor: str,
        quiet: bool,
        samples: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        self.history = history
        self.epochs, self.title, self.monitor, self.quiet = epochs, title, monitor, quiet
        with write_aside(self.path) as aside:
            aside.write_text(_csv_rows(history, with_header=True))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=len(history) + 1)
        self._bar: Any = None
        self._each = samples / epochs if samples else 1  # of the bar, an epoch
        self._last_line = time.monotonic()

    def __enter__(self) -> "RunLog":
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=round(self._each * self.epochs), note="")
            self.within(len(self.history))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._board.close()

    def within(self, epochs: float) -> None:
        """How far the training is, between the ends of epochs."""
        if self._bar is not None:
            self._bar.update(self._task, completed=round(self._each * epochs) if self._each > 1 else epochs)

    def epoch(self, row: dict[str, float]) -> None:
        """Record one finished epoch."""
        self.history.append(row)
        with open(self.path, "a", newline="") as file:
            file.write(_csv_rows(self.history, with_header=len(self.history) == 1, start=len(self.history) - 1))
        for name, value in row.items():
            if name != "epoch":
                self._board.add_scalar(name, value, int(row["epoch"]))
        if not self.quiet:
            self._show(row)

    def say(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            (self._bar.console.print if self._bar is not None else _stderr)(text)

    def _show(self, row: dict[str, float]) -> None:
        shown = [name for name in row if name.endswith("loss") or name == self.monitor]
        note = "  ".join(f"{name} {row[name]:.4g}" for name in shown)
        if "samples" in row:
            note = f"samples {row['samples']:,}  " + (f"skipped {row['skipped']:,}  " if row["skipped"] else "") + note
        if self._bar is not None:
            self.within(int(row["epoch"]))
            self._bar.update(self._task, note=note)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or row["epoch"] in (1, self.epochs):
            self._last_line = time.monotonic()
            _stderr(f"{self.title}: epoch {int(row['epoch'])}/{self.epochs}  {note}")


class SilentLog(RunLog):
    """Of ranks after the first: keeps the rows and writes nothing."""

    def __init__(self, folder: Path, history: list[dict[str, float]], *_: object) -> None:
        self.history, self.quiet, self._bar = history, True, None

    def __exit__(self, *error: object) -> None:
        pass

    def epoch(self, row: dict[str, float]) -> None:
        """Keep one finished epoch."""
        self.history.append(row)


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _csv_rows(history: list[dict[str, float]], *, with_header: bool, start: int = 0) -> str:
    """CSV text; the columns are those of the first row, and a value that an epoch lacks stays empty."""
    if not history:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), restval="", extrasaction="ignore", lineterminator=os.linesep)
    if with_header:
        writer.writeheader()
    writer.writerows(history[start:])
    return text.getvalue()
