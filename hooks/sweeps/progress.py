"""A bar for long work: shown in a terminal or a notebook, silent elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(title: str, total: int, done: int = 0, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that advances the bar; ``show=None``: only where somebody can watch."""
    if not (_watched() if show is None else show):  # rich takes longer to say nothing than a small piece to run
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, force_terminal=show or None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda n: progress.update(task, advance=n)


def _watched() -> bool:
    """Whether this is a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
