"""What ``python -m mambascope.zoo`` does: list, prepare, train, sweep, export, evaluate, compare."""

import argparse
import math
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambascope import zoo
from mambascope.errors import ConfigError, InputError, MambascopeError
from mambascope.training.files import disk_is_full, only_writer
from mambascope.training.recipe import Recipe, load_recipe, read_recipe, with_changes

__all__ = ["main", "recipe_for"]

_LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
"""Lengths that a task is evaluated at, where none are given."""


def recipe_for(name: str, changes: Sequence[str] = ()) -> Recipe:
    """A zoo recipe by name, or a ``.toml`` file, with ``section.key=value`` changes (values as in TOML)."""
    path = Path(name) if name.endswith(".toml") else zoo.recipe_path(name)
    if not changes:
        return load_recipe(path)
    values = with_changes(read_recipe(path), _parsed(changes), str(path))
    return Recipe.from_dict(values, where=f"{path} with --set")


def _parsed(changes: Sequence[str]) -> dict[str, Any]:
    """``section.key=value`` texts as keys and TOML values; what is no TOML value is a text."""
    found: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"--set wants section.key=value, for example train.steps=1000; got {change!r}")
        try:
            found[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = text.strip()
    return found


def _minutes(text: str) -> float:
    """A time limit of the command line: a number above 0."""
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise ValueError
    return minutes


def _list(_: argparse.Namespace) -> None:
    from mambascope.loading import list_models
    from mambascope.training.sweep import sweep_names

    shipped = {info.name: info for info in list_models() if info.embedded}
    every = sorted({*zoo.names(), *shipped})
    width = max(map(len, every)) + 2
    for name in every:
        info = shipped.get(name)
        text = (
            f"{info.size:>6}  {info.licence}"
            if info
            else "not shipped; made by: python -m mambascope.zoo train " + name
        )
        print(f"{name:<{width}}{text}")
    print(f"sweeps (python -m mambascope.zoo sweep NAME): {', '.join(sweep_names())}")


def _prepare(arguments: argparse.Namespace) -> None:
    from mambascope.training.build import prepare_text

    recipe = recipe_for(arguments.model, arguments.set)
    if recipe.text is None:
        raise InputError(f"{recipe.name} is trained on a generated task; there is no text to prepare")
    with only_writer(arguments.out):
        prepare_text(recipe.text, arguments.data, arguments.out)
    print(f"prepared in {arguments.out}; train with --data {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    from mambascope.loading import usable_device
    from mambascope.training.bar import training_bar
    from mambascope.training.build import train_recipe
    from mambascope.training.export import export_model

    recipe, device = recipe_for(arguments.model, arguments.set), usable_device(arguments.device)
    with training_bar(recipe.train.steps) as (report, progress):
        _, result = train_recipe(
            recipe,
            arguments.out,
            data=arguments.data,
            device=device,
            resume=arguments.resume,
            minutes=arguments.minutes,
            floor=True if arguments.floor else None,
            report=report,
            progress=progress,
        )
    if result.finished:
        folder = export_model(arguments.out, arguments.out / "model")
        print(f"finished; the model is in {folder}. Measure it with: evaluate {recipe.name} --folder {folder}")


def _export(arguments: argparse.Namespace) -> None:
    from mambascope.training.export import export_model

    print(f"wrote {export_model(arguments.out, arguments.to)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from mambascope.training.export import evaluate_task, evaluate_text, evaluate_text_tasks
    from mambascope.training.measure import evaluate_context, evaluate_copying, evaluate_generation

    folder = arguments.folder or zoo.model_folder(arguments.model)
    extra = arguments.copying or arguments.context or arguments.generation or arguments.text_tasks is not None
    on_task = not extra and zoo.task_of(folder) is not None
    if arguments.long_answers and arguments.text_tasks is None:
        raise InputError("--long-answers is for --text-tasks FOLDER, which is not given")
    if not on_task and (arguments.lengths or arguments.sequences):
        raise InputError("--lengths and --sequences are for the task that a model was trained on; nothing here has one")
    more = {"device": arguments.device, "write": not arguments.dry}
    if arguments.copying:
        evaluate_copying(folder, seed=arguments.seed, **more)
    if arguments.context:
        evaluate_context(folder, arguments.data, **more)
    if arguments.generation:
        evaluate_generation(folder, **more)
    if arguments.text_tasks is not None:
        evaluate_text_tasks(folder, arguments.text_tasks, single_tokens=not arguments.long_answers, **more)
    if on_task:
        lengths, counts = arguments.lengths or _LENGTHS, arguments.sequences or [1000]
        evaluate_task(folder, lengths, counts, seed=arguments.seed, **more)
    elif not extra:
        evaluate_text(folder, arguments.data, **more)
    print("not written (--dry): the card of" if arguments.dry else "written to the card of", folder)


def _compare(arguments: argparse.Namespace) -> None:
    from mambascope.training.measure import compare
    from mambascope.zoo.card import number

    folders = [Path(m) if Path(m).is_dir() else zoo.model_folder(m) for m in arguments.models]
    table = compare(folders)
    print(table.map(lambda value: "" if value is None else number(value)).to_string())
    if arguments.csv is not None:
        table.to_csv(arguments.csv, index_label="what")
        print(f"written to {arguments.csv}")


def _match(arguments: argparse.Namespace) -> None:
    from mambascope.training.match import match

    target = recipe_for(arguments.model).model
    found = match(target, arguments.pattern, arguments.free, step=arguments.step, **_parsed(arguments.set))
    changed = {k: v for k, v in found.config.to_dict().items() if v and v != getattr(target, k)}
    print(found)
    print("[model]\n" + "\n".join(f"{k} = {v!r}".replace("'", '"') for k, v in changed.items()))


def _sweep(arguments: argparse.Namespace) -> None:
    from mambascope.training.executors import in_turns, local_processes, ray_cluster
    from mambascope.training.sweep import load_sweep, run_sweep

    sweep = load_sweep(arguments.sweep, _parsed(arguments.set))
    executor = local_processes(1 if arguments.workers is None else arguments.workers)
    if arguments.together is not None:
        if arguments.workers is not None or arguments.ray_address is not None:
            raise InputError("--together is for one process; leave --workers and --ray-address out, or --together")
        executor = in_turns(arguments.together)
    elif arguments.ray_address is not None:
        executor = ray_cluster(arguments.ray_address)
    table = run_sweep(
        sweep,
        arguments.out,
        executor,
        data=arguments.data,
        device=arguments.device,
        threads=arguments.threads,
        retries=arguments.retries,
        minutes=arguments.minutes,
    )
    print(table.to_string(index=False))
    print(f"written to {arguments.out / 'table.csv'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m mambascope.zoo", description="The models that ship with mambascope.")
    commands = parser.add_subparsers(required=True, metavar="list|prepare|train|sweep|match|export|evaluate|compare")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        child = commands.add_parser(name, help=about, description=about)
        child.set_defaults(run=run, again="")
        return child

    command("list", _list, "models with a recipe, and which of them ship")
    prepare = command("prepare", _prepare, "learn the tokenizer and encode the text, once")
    train = command("train", _train, "train a recipe; stops and resumes exactly")
    sweep = command("sweep", _sweep, "train a list of recipes; finished runs are never repeated")
    for child in (prepare, train):
        child.add_argument("model", help="a zoo model, or a recipe file (.toml)")
    sweep.add_argument("sweep", help="a sweep of the package, or a file (.toml)")
    for child in (prepare, train, sweep):
        child.add_argument(
            "--data",
            type=Path,
            nargs="+",
            default=[],
            help="folders with the recipe's text files, or one made by prepare",
        )
        child.add_argument("--out", type=Path, required=True, help="where everything is written")
        child.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            help="change the recipe, e.g. train.steps=1000",
        )
    train.set_defaults(again="; the last checkpoint stays: go on with --resume")
    sweep.set_defaults(again="; finished runs and checkpoints stay: the same command goes on")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    train.add_argument("--device", help="cuda, cpu, …; the GPU if there is one")
    train.add_argument("--floor", action="store_true", help="measure how fast a step could be, on a CPU too")
    train.add_argument("--minutes", type=_minutes, help="stop at a checkpoint after this time")
    sweep.add_argument("--device", default="cpu", help="cpu (the default), cuda, …")
    sweep.add_argument("--workers", type=int, help="runs at a time on this machine, each a process (1)")
    sweep.add_argument(
        "--together", type=int, metavar="N", help="N runs at a time in this process, for small models on one GPU"
    )
    sweep.add_argument("--minutes", type=_minutes, help="stop at checkpoints after this time")
    sweep.add_argument("--threads", type=int, default=1, help="torch's threads in each run")
    sweep.add_argument("--retries", type=int, default=2, help="how often a failed or killed run is tried again")
    sweep.add_argument("--ray-address", metavar="HOST:PORT", help="run on a Ray cluster; pip install mambascope[ray]")
    matching = command("match", _match, "the width at which another pattern has as many parameters as a recipe's model")
    matching.add_argument("model", help="a zoo model, or a recipe file (.toml)")
    matching.add_argument("pattern", help="letters of the layers, e.g. af, mmam")
    matching.add_argument("--free", help="the field to choose: d_ff, d_inner or n_layers")
    matching.add_argument("--step", type=int, help="choose it in multiples of this")
    matching.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. n_layers=12")
    export = command("export", _export, "write the newest checkpoint as a model folder with its card")
    export.add_argument("--out", type=Path, required=True, help="the training's folder")
    export.add_argument("--to", type=Path, required=True, help="the model folder to write")
    evaluate = command("evaluate", _evaluate, "measure a model and write the result into its card")
    evaluate.add_argument("model", help="a zoo model")
    evaluate.add_argument("--folder", type=Path, help="another model folder than the shipped one")
    evaluate.add_argument("--data", type=Path, nargs="+", default=[], help="folders that hold wikitext-2/valid.txt.xz")
    evaluate.add_argument("--text-tasks", type=Path, metavar="FOLDER", help="score the text tasks whose sets are there")
    evaluate.add_argument("--copying", action="store_true", help="loss on second copies of N random tokens")
    evaluate.add_argument("--context", action="store_true", help="in-context score on the text below --data")
    evaluate.add_argument("--generation", action="store_true", help="time and state of a generated token by position")
    evaluate.add_argument("--long-answers", action="store_true", help="keep answers of several tokens, too")
    evaluate.add_argument("--lengths", type=int, nargs="+", help="of the task's rows (64 to 16,384)")
    evaluate.add_argument("--sequences", type=int, nargs="+", help="one number, or one a length (1,000)")
    evaluate.add_argument("--seed", type=int, default=1)
    evaluate.add_argument("--device", help="cuda, cpu, …; the GPU if there is one")
    side = command("compare", _compare, "the cards of several models side by side")
    side.add_argument("models", nargs="+", help="zoo models, or model folders")
    side.add_argument("--csv", type=Path, help="write the table here as well")
    evaluate.add_argument("--dry", action="store_true", help="print only, leave the card alone")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors of ours, and of files, are one line on standard error and exit status 1; Ctrl-C 130."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except MambascopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where, why = error.filename or "the output", error.strerror or error
        what = f"{where} could not be written: {why}; make room" if disk_is_full(error) else f"{where}: {why}"
        print(f"error: {what}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted{parsed.again}", file=sys.stderr)
        return 130
    return 0
