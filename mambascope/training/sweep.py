"""A sweep: a list of recipes, trained by one executor, on this machine's processes or on a Ray cluster.

1. A TOML file names a recipe and what to vary; each ``[[vary]]`` table gives the product of its lists.
2. Every run has a folder of its own below ``out``. One that has ``result.json`` is finished and is not run again; any
   other is started, or goes on from its newest checkpoint. A run that fails or is killed is tried again.
3. At the end one table: ``table.csv`` in ``out``.

Where a run runs changes nothing about it: its recipe decides what is drawn, and its threads are fixed.
"""

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mambascope import zoo
from mambascope.errors import ConfigError, InputError, SweepError, UnknownNameError, nearest
from mambascope.storage import write_bytes
from mambascope.training.files import only_writer
from mambascope.training.recipe import Recipe, read_recipe, read_values, same_recipe, with_base, with_changes
from mambascope.training.worker import RUN, read_result

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Executor", "Job", "RunSpec", "Sweep", "SweepError", "load_sweep", "run_sweep", "sweep_names"]


@dataclass(frozen=True)
class RunSpec:
    """One run: its folder's name, its recipe, and what distinguishes it from the others."""

    name: str
    recipe: Recipe
    varied: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """Runs with different names."""

    name: str
    description: str
    runs: tuple[RunSpec, ...]


@dataclass
class Job:
    """A run on its way: what it needs, how often it was tried, and how it ended."""

    name: str
    folder: Path
    run: dict[str, Any]
    attempts: int = 0
    error: str = field(default="", repr=False)


class Executor(Protocol):
    """Runs jobs, each until its ``result.json`` is there or it was tried ``1 + retries`` times."""

    def __call__(self, jobs: list[Job], retries: int, report: Callable[[str], None]) -> None: ...


def _home() -> Path:
    return Path(str(resources.files("mambascope.training"))) / "sweeps"


def sweep_names() -> list[str]:
    """The sweeps that come with the package."""
    return sorted(path.stem for path in _home().glob("*.toml"))


def load_sweep(name: str | Path, changes: Mapping[str, Any] | None = None) -> Sweep:
    """A sweep that comes with the package, or a ``.toml`` file; ``changes`` apply to every run's recipe.

    Keys: ``name``, ``description``, ``recipe`` (a zoo model, a .toml beside the file, or a table of its own,
    which may be ``like`` a zoo model) and
    ``[[vary]]`` tables of dotted recipe keys, each with a list of values. Raises LoadError, UnknownNameError, or
    ConfigError with the run whose recipe does not hold together.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in sweep_names():
            known = sweep_names()
            raise UnknownNameError(
                f"there is no sweep {str(name)!r}{nearest(str(name), known) or '.'} Known: {', '.join(known)}"
            )
        path = _home() / f"{name}.toml"
    values = read_values(path, "sweep")
    known = {"name", "description", "recipe", "vary"}
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(sorted(known))}")
    if "recipe" not in values:
        raise ConfigError(f"{path} lacks recipe: a zoo model, a .toml beside it, or a table")
    base, tables = _base(values["recipe"], path), values.get("vary", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: vary must be written as [[vary]] tables")
    runs = [run for table in tables for run in _product(base, table, dict(changes or {}), path)]
    twice = {run.name for run in runs if sum(other.name == run.name for other in runs) > 1}
    if twice:
        raise ConfigError(f"{path} makes more than one run {sorted(twice)[0]!r}; its [[vary]] tables overlap")
    return Sweep(str(values.get("name", path.stem)), str(values.get("description", "")), tuple(runs))


def _base(recipe: Any, path: Path) -> dict[str, Any]:
    if isinstance(recipe, dict):
        return with_base(recipe, zoo.recipes())
    if not isinstance(recipe, str):
        raise ConfigError(f"{path}: recipe must be a zoo model, a .toml file or a table, got {recipe!r}")
    return read_recipe(path.parent / recipe if recipe.endswith(".toml") else zoo.recipe_path(recipe))


def _product(base: dict[str, Any], table: dict[str, Any], changes: dict[str, Any], path: Path) -> list[RunSpec]:
    lists = {key: value if isinstance(value, list) else [value] for key, value in table.items()}
    runs = []
    for values in itertools.product(*lists.values()):
        varied = dict(zip(lists, values, strict=True))
        name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in varied.items()) or "run"
        name = re.sub(r"[^\w.,=+-]+", "-", name)
        recipe = Recipe.from_dict(with_changes(base, {**changes, **varied}, str(path)), where=f"{path}, run {name}")
        runs.append(RunSpec(name, recipe, varied))
    return runs


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    executor: Executor,
    *,
    data: Sequence[str | Path] = (),
    device: str = "cpu",
    threads: int = 1,
    retries: int = 2,
    minutes: float | None = None,
    report: Callable[[str], None] = print,
) -> "pd.DataFrame":
    """Run what is not finished below ``out`` and return the table, a row a run.

    ``threads``: torch's threads in each run. ``minutes``: runs stop at a checkpoint after this time; the table says how
    far they came, and the same call goes on with them. Raises InputError (another executor works on ``out``; a folder
    below it was trained with another recipe, the difference shown) and SweepError where runs did not finish, after the
    others did; the table is written either way.
    """
    out = Path(out).resolve()
    until = {} if minutes is None else {"until": time.time() + 60 * minutes}
    if retries < 0 or threads < 1:
        raise InputError(f"retries must be ≥ 0 and threads ≥ 1, got {retries} and {threads}")
    with only_writer(out):
        jobs = []
        for spec in sweep.runs:
            folder, found = out / spec.name, read_result(out / spec.name)
            if found is not None:
                same_recipe(found["recipe"], spec.recipe.to_dict())
                continue
            run = {"recipe": spec.recipe.to_dict(), "data": [str(Path(d).resolve()) for d in data]}
            jobs.append(Job(spec.name, folder, run | {"device": device, "threads": threads, **until}))
        report(f"{sweep.name}: {len(sweep.runs)} runs, {len(sweep.runs) - len(jobs)} finished before")
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(job.folder / RUN, json.dumps(job.run, indent=1).encode())
        if jobs:
            executor(jobs, retries, report)
        table = _table(sweep, out, {job.name: job for job in jobs})
        write_bytes(out / "table.csv", table.to_csv(index=False).encode())
    failed = [job for job in jobs if read_result(job.folder) is None]
    if failed:
        why = f"in {1 + retries} attempts" if minutes is None else f"in {1 + retries} attempts and {minutes:g} minutes"
        reasons = "; ".join(f"{job.name}: {job.error}" for job in failed[:3])
        raise SweepError(
            f"{len(failed)} of {len(sweep.runs)} runs did not finish {why}: {reasons}. "
            f"The others are in {out / 'table.csv'}; the same command goes on with what is left"
        )
    return table


def _table(sweep: Sweep, out: Path, jobs: dict[str, Job]) -> "pd.DataFrame":
    """A row a run: what was varied, how it went, its last loss and evaluation, and of which step."""
    import pandas as pd

    rows = []
    for spec in sweep.runs:
        found, job = read_result(out / spec.name), jobs.get(spec.name)
        row: dict[str, Any] = {key.rsplit(".", 1)[-1]: value for key, value in spec.varied.items()} or {
            "run": spec.name
        }
        row["status"] = _status(found, job)
        row["attempts"] = 0 if job is None else job.attempts
        found = found or _so_far(out / spec.name)
        if found is not None:
            row |= {"steps": found["steps"], "loss": found["loss"], **found["evaluation"], "seconds": found["seconds"]}
        rows.append(row)
    return pd.DataFrame(rows)


def _status(found: dict[str, Any] | None, job: Job | None) -> str:
    if found is not None:
        return "finished" if job is not None else "finished before"
    return "stopped" if job is not None and time.time() > job.run.get("until", math.inf) else "failed"


def _so_far(folder: Path) -> dict[str, Any] | None:
    """Of a run that has not finished: what its last evaluation found, and after how many steps; None before one."""
    path = folder / "curve.json"
    curve = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"evaluations": []}
    if not curve["evaluations"]:
        return None
    last = dict(curve["evaluations"][-1])
    step = last.pop("step")
    row = next(row for row in curve["rows"] if row["step"] >= step)
    return {"steps": step, "loss": row["loss"], "evaluation": last, "seconds": row["seconds"]}
