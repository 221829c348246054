"""Tables on standard output, and on a terminal's standard error a sign that something goes on."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


def new_table(*columns: str) -> "Table":
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False)


def table_of_numbers(head: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """A table of rows whose first cell is a name and whose others are numbers."""
    table = new_table(head[0])
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def show(title: str, table: "Table") -> None:
    """Print a table under its title; numbers (columns to the right) are never cut or broken.

    Where the output is not a terminal, one line a row. On a terminal, words wrap; one too narrow for the longest word
    of each column and for the numbers wraps lines itself.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    unbounded = console.options.update(width=1 << 16)
    for column in table.columns:
        if column.justify == "right":
            column.no_wrap = True
            widths = [Measurement.get(console, unbounded, cell).maximum for cell in (column.header, *column.cells)]
            column.min_width = max(widths)
        else:
            column.overflow = "fold"
    needed = Measurement.get(console, unbounded, table)
    console = Console(width=max(console.width, needed.minimum) if console.is_terminal else max(1, needed.maximum))
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table, crop=False)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while something without a length goes on; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


FIRST, EVERY = 2.0, 30.0  # seconds until a line where there is no bar, and between lines


def _lines(total: int, what: str) -> Callable[[int], None]:
    """What a log shows of something that takes long: a line after FIRST seconds, and one every EVERY seconds."""
    started = time.monotonic()
    done, due = 0, started + FIRST

    def more(count: int) -> None:
        nonlocal done, due
        done, now = done + count, time.monotonic()
        if now >= due and done < total:
            print(f"{what}: {done} of {total}, {now - started:.0f} s", file=sys.stderr, flush=True)
            due = now + EVERY

    return more


def _told(items: Sequence[T], what: str) -> Iterator[T]:
    more = _lines(len(items), what)
    for done, item in enumerate(items):
        more(min(done, 1))
        yield item


def track(items: Sequence[T], what: str) -> Iterable[T]:
    """A progress bar on stderr, or a line now and then where stderr is not a terminal."""
    if not sys.stderr.isatty():
        return _told(items, what)
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=what, console=Console(stderr=True), transient=True)


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, told how much more is done, or a line now and then where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield _lines(total, what)
        return
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())  # goes on while nothing is counted yet
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)
