"""Tables on standard output, and on a terminal's standard error a sign that something goes on."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


def new_table(*columns: str) -> "Table":
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False)


def show(title: str, table: "Table") -> None:
    """Print a table under its title, in its natural width where the output is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=200)
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while something without a length goes on; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def track(items: Iterable[T], what: str) -> Iterable[T]:
    """A progress bar on stderr; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=what, console=Console(stderr=True), transient=True)


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, told how much more is done; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda more: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)
