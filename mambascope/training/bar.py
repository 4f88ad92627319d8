"""A progress bar for people: on a terminal only, with the log lines above it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["training_bar"]


@contextmanager
def training_bar(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None] | None]]:
    """``(report, progress)`` for :func:`mambascope.training.loop.train`; plain printing where output is no terminal."""
    if not sys.stdout.isatty():
        yield print, None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    with Progress(BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("steps", total=steps)

        def report(line: str) -> None:
            bar.console.print(line, highlight=False, markup=False)

        def progress(step: int) -> None:
            bar.update(task, completed=step)

        yield report, progress
