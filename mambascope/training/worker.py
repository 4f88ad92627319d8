"""One run of a sweep in a process of its own: ``python -m mambascope.training.worker FOLDER``.

The folder holds ``run.json`` (recipe, data, device, threads). The run goes on from its newest checkpoint if it has one,
and leaves ``result.json``, written last and whole: a run with that file is finished and is never run again.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from mambascope.errors import LoadError, MambascopeError
from mambascope.storage import write_bytes

__all__ = ["read_result", "run_one", "run_steps"]

RUN, RESULT = "run.json", "result.json"


def run_one(folder: str | Path, run: dict[str, Any], report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train one recipe into ``folder`` and return what is kept of it as plain values; the same wherever it runs.

    ``run``: ``recipe`` (a dictionary), ``data`` (folders), ``device``, ``threads``, which is fixed because matrix
    products on another number of threads may round differently, and perhaps ``until``, the time (as ``time.time()``
    tells it) from which on it stops at a checkpoint, without its ``result.json``.
    """
    from mambascope.training.loop import finish

    return finish(run_steps(folder, run, report))


def run_steps(
    folder: str | Path, run: dict[str, Any], report: Callable[[str], None] = print
) -> Generator[None, None, dict[str, Any]]:
    """:func:`run_one`, pausing after each step, so that runs can take turns."""
    import torch

    from mambascope.training.build import recipe_training
    from mambascope.training.recipe import Recipe

    torch.set_num_threads(run["threads"])
    recipe = Recipe.from_dict(run["recipe"])
    folder = Path(folder)
    _, result = yield from recipe_training(
        recipe, folder, data=run["data"], device=run["device"], resume=True, floor=False, report=report,
        minutes=None if "until" not in run else (run["until"] - time.time()) / 60,
    )  # fmt: skip
    last = result.evaluations[-1] if result.evaluations else {}
    record = {
        "recipe": recipe.to_dict(),
        "steps": result.step,
        "loss": result.rows[-1]["loss"],
        "evaluation": {key: value for key, value in last.items() if key != "step"},
        "seconds": result.rows[-1]["seconds"],
    }
    if not result.finished:
        return record
    write_bytes(folder / RESULT, json.dumps(record, indent=1).encode())
    return record


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished run left; None for one that has not finished. Raises LoadError for a damaged file."""
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("recipe", "steps", "loss", "evaluation", "seconds")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} cannot be read ({error}); delete it and the run is made again") from None


def _main(folder: Path) -> int:
    parent = os.getppid()

    def report(line: str) -> None:
        print(line, flush=True)
        if os.getppid() != parent:  # whoever started us is gone: the run goes on when the sweep does
            raise SystemExit("the sweep that started this run has ended")

    try:
        run_one(folder, json.loads((folder / RUN).read_text(encoding="utf-8")), report)
    except MambascopeError as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
