"""A bar for long work: shown in a terminal or a notebook, silent elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(title: str, total: int, done: int = 0, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that advances the bar; ``show=None``: only where somebody can watch."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, force_terminal=show or None)
    visible = (console.is_terminal or console.is_jupyter) if show is None else show
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not visible, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda n: progress.update(task, advance=n)
